"""The stage `export`: a checkpoint written as a Hugging Face folder, compared with our model, and published."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor

from pretrain import config
from pretrain.config import StageConfig
from pretrain.dialects import DIALECTS, DialectName, check_expressible
from pretrain.dialects.dialect import Dialect
from pretrain.errors import ExportError
from pretrain.export import card, provenance, reference, tokenizer_files
from pretrain.export.card import last_objective
from pretrain.export.facts import FACTS, facts_of
from pretrain.model.config import ModelConfig
from pretrain.model.models import model_of
from pretrain.model.transformer import Transformer
from pretrain.model.weights import weights_of
from pretrain.objectives import OBJECTIVES
from pretrain.storage.files import write_json
from pretrain.storage.index import write_index
from pretrain.storage.publish import publish
from pretrain.tokenizer import open_tokenizer
from pretrain.training import checkpoint
from pretrain.training.checkpoint import Checkpoint

OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


class ExportConfig(StageConfig):
    """The configuration of `launch/export.py`."""

    checkpoint: str
    """A run's folder, for its newest checkpoint, or the folder of one of its checkpoints (`checkpoints/step_…`)."""
    dialect: DialectName
    """The architecture of transformers that the model is written as."""
    out: str
    """The folder that the model is published in."""
    average: int = Field(1, gt=0)
    """How many checkpoints of the run are averaged: `checkpoint` and the newest ones before it. The mean of the weights
    is often better than the last ones while the learning rate is high (Izmailov et al. 2018, arXiv:1803.05407)."""
    tokenizer: str | None = None
    """The folder of the run's tokenizer, if it has moved; null: where the run found it."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """The type of the written weights. `bfloat16` halves the folder and rounds the weights; training kept fp32."""
    max_shard_gb: float = Field(5.0, gt=0)
    """The most gigabytes (10^9 bytes) of one weights file. A larger model is written as several files and an index."""


def run(cfg: ExportConfig) -> dict:
    """Publish `cfg.out` and return its certificate: the numbers of compared logits and texts, the largest
    difference, and the versions.

    Raises ExportError if the dialect cannot express the model, or if the exported folder does not give the answers of
    our model and tokenizer. `out` is then left as it was.
    """
    source = Checkpoint(checkpoint.resolve(cfg.checkpoint))
    settings = config.read_values(source.config_text)
    model = config.build(ModelConfig, settings["model"], f"{source.folder}/{checkpoint.CONFIG}")
    tokenizer = open_tokenizer(cfg.tokenizer or settings["data"]["tokenizer"])
    source.check_tokenizer(tokenizer, ExportError)
    dialect = DIALECTS[cfg.dialect]
    if OBJECTIVES[last_objective(settings)].causal is None:  # trained in both directions: an encoder and a decoder
        model = model.model_copy(update={"causal": dialect.wanted["causal"]})
    check_expressible(model, cfg.dialect, tokenizer.specials)
    padded, model = model, model.model_copy(update={"vocab_multiple": 1})

    every = [source]
    if cfg.average > 1:
        every = [Checkpoint(folder) for folder in checkpoint.before(source.folder, cfg.average)]
    _check_same(every)
    steps = [one.index["step"] for one in every]

    def weights() -> dict[str, Tensor]:
        return _rounded(_without_padding(_mean(every), padded, tokenizer.vocab_size), cfg.dtype)

    with publish(Path(cfg.out), "export", ExportError, cfg) as aside:
        ours = weights()
        vocab_size, parameters = len(ours["embed.weight"]), sum(tensor.numel() for tensor in ours.values())
        assert vocab_size >= tokenizer.vocab_size, f"{vocab_size} embeddings for {tokenizer.vocab_size} tokens"
        longest = card.trained_length(settings)
        tokenizer_files.write_tokenizer(aside, tokenizer, longest, model.causal, model.composition)
        _write_settings(aside, dialect, model, vocab_size, tokenizer.specials, cfg.dtype)
        _write_weights(aside, dialect.weights(model, ours), cfg)
        said = aside / "said"  # inside, so that the next export deletes it after a kill
        reference.write(said, opened(model, ours), tokenizer, dialect.auto_class, cfg.dtype)
        del ours  # the other process needs the memory
        certificate = verify(aside, said, lambda: reference.write_exact(said, opened(model, weights())))
        shutil.rmtree(said)
        texts = provenance.texts(settings, source.index)
        scores = provenance.scores(source.folder, source.index["step"]) if len(every) == 1 else []
        made = {"dialect": cfg.dialect, "dtype": cfg.dtype, "parameters": parameters, "vocab_size": vocab_size}
        made |= {"training": card.training(settings), "averaged": steps if len(every) > 1 else None}
        known = facts_of(source.folder, source.index, settings, texts, scores, **made)
        write_json(aside / FACTS, known.written())
        text = card.card(known, model, tokenizer, settings, texts, scores, certificate)
        (aside / "README.md").write_text(text, encoding="utf-8")
        index = {
            "stage": "export",
            "dialect": cfg.dialect,
            "checkpoint": source.index["fingerprint"],
            "tokenizer": tokenizer.fingerprint,
            "step": source.index["step"],
            "recorded": {"checkpoint": str(source.folder), "certificate": certificate},
        }
        if len(every) > 1:
            index["averaged"] = [one.index["fingerprint"] for one in every]
        write_index(aside, index, recorded=("README.md", FACTS))
    which = f"step {steps[-1]}" if len(every) == 1 else f"the mean of steps {', '.join(map(str, steps))}"
    print(f"{cfg.out}: equal to {which} in transformers {certificate['transformers']}", flush=True)
    compared = f"{certificate['logits']:,} logits and {certificate['texts']:,} texts compared"
    print(f"  {compared}, largest difference of two logits {certificate['max_logit_diff']:.1e}", flush=True)
    if rounds := card.rounds(certificate):
        print(f"  {rounds}", flush=True)
    return certificate


def verify(folder: Path, said: Path, add_exact: Callable[[], None]) -> dict:
    """Compare `folder`, opened by stock transformers in a fresh process, with the answers in `said`.

    If numbers differ by little, they are compared once more after `add_exact`, which writes our logits in fp64 to
    `said`. Returns the measurements. Raises ExportError with a line for each difference.
    """
    certificate, faults, may_be_rounding = _compared(folder, said)
    if may_be_rounding:
        add_exact()
        certificate, faults, _ = _compared(folder, said)
    if faults:
        opened_by = f"opened by transformers {certificate['transformers']}"
        raise ExportError("the exported folder is not equal to our model and tokenizer", *faults, opened_by)
    return certificate


def _compared(folder: Path, said: Path) -> tuple[dict, list[str], bool]:
    """The measurements of parity.py, a line for each difference, and whether rounding may have made them."""
    result = said / "result.json"
    script = Path(__file__).with_name("parity.py")
    python = Path(sys.executable).absolute()  # it is relative if PATH has a relative .venv/bin
    command: list[str | Path] = [python, "-P", script, folder.resolve(), said.resolve(), result.resolve()]
    done = subprocess.run(command, cwd=said, env=os.environ | OFFLINE, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise ExportError("transformers cannot use the exported folder", *done.stderr.strip().splitlines()[-8:])
    certificate = json.loads(result.read_text(encoding="utf-8"))
    return certificate, certificate.pop("faults"), certificate.pop("may_be_rounding")


def _check_same(checkpoints: list[Checkpoint]) -> None:
    """Raise ExportError unless the weights of all checkpoints belong to one model."""
    models = [config.read_values(one.config_text)["model"] for one in checkpoints]
    for one, model in zip(checkpoints, models, strict=True):
        keys = [f"model.{key}" for key in model if model[key] != models[-1].get(key)]
        if keys:
            last = checkpoints[-1].folder.name
            raise ExportError(f"{one.folder} cannot be averaged with {last}", f"they differ in {', '.join(keys)}")


def _mean(checkpoints: list[Checkpoint]) -> dict[str, Tensor]:
    """The mean of the weights of all checkpoints, in fp32. It is computed in fp64, weight by weight."""
    first, *others = checkpoints
    if not others:
        return first.weights()
    loads = [one.tensors() for one in others]
    found = {}
    for name, tensor in first.weights().items():
        total = tensor.double()
        for load in loads:
            total += load("weights", name)
        found[name] = (total / len(checkpoints)).float()
    return found


def _without_padding(weights: dict[str, Tensor], model: ModelConfig, vocab_size: int) -> dict[str, Tensor]:
    """The weights without the rows that round the vocabulary up to a multiple."""
    if model.vocab_multiple == 1:
        return weights
    with torch.device("meta"):
        roles = weights_of(model_of(model, vocab_size))
    return {name: tensor[: roles[name].tokens] for name, tensor in weights.items()}


def _rounded(weights: dict[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """The weights in fp32, with the values that they have in `dtype`."""
    return {name: tensor.to(getattr(torch, dtype)).float() for name, tensor in weights.items()}


def _write_settings(
    folder: Path, dialect: Dialect, model: ModelConfig, vocab_size: int, specials: dict[str, int], dtype: str
) -> None:
    """Write config.json, and generation_config.json for a model that writes."""
    settings = dialect.config(model, vocab_size, specials) | {"dtype": dtype, "torch_dtype": dtype}
    write_json(folder / "config.json", settings)
    if model.causal or model.decoder_layers:
        keys = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
        write_json(folder / "generation_config.json", {key: settings[key] for key in keys if key in settings})


def _write_weights(folder: Path, theirs: dict[str, Tensor], cfg: ExportConfig) -> None:
    """Write model.safetensors; a model of more than `max_shard_gb` as several files and model.safetensors.index.json.

    The hub's own library decides which file a tensor is in. A tensor that is larger than a file has one of its own.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    theirs = {name: tensor.to(getattr(torch, cfg.dtype)) for name, tensor in theirs.items()}
    split = split_torch_state_dict_into_shards(theirs, max_shard_size=round(cfg.max_shard_gb * 1e9))
    for file, names in split.filename_to_tensors.items():
        save_file({name: theirs[name] for name in names}, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        places = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", places)


def opened(model: ModelConfig, weights: dict[str, Tensor]) -> Transformer:
    """Our model in evaluation mode. It shares the memory of `weights`, the tensors of a checkpoint."""
    with torch.device("meta"):
        empty = model_of(model, len(weights["embed.weight"]))
    first = {id(p): name for name, p in empty.named_parameters()}  # the first name of a tensor that has several
    every = {name: weights[first[id(p)]] for name, p in empty.named_parameters(remove_duplicate=False)}
    empty.load_state_dict(every, assign=True)
    return empty.eval()
