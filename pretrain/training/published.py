"""Begin from published weights: a Hugging Face folder of one of the dialects, read as a model of ours."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import tokenizers

from pretrain import huggingface
from pretrain.dialects import DIALECTS
from pretrain.dialects.dialect import Dialect
from pretrain.errors import ConfigError
from pretrain.model.config import ModelConfig
from pretrain.tokenizer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from pretrain.model.transformer import Transformer

# Keys that may differ from the folder's: another objective, longer windows, other dropout.
CHANGED = {
    "causal",
    "dropout",
    "init_std",
    "max_positions",
    "rope_theta",
    "local_rope_theta",
    "rope_scaling",
    "init_from",
    "generator",
}
# Keys of config.json that say nothing about the arithmetic, or that our model has no part in.
ASIDE = {
    *("architectures", "dtype", "torch_dtype", "vocab_size", "initializer_range", "position_embedding_type"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "cls_token_id", "sep_token_id", "mask_token_id"),
    "decoder_start_token_id",
    *("rope_theta", "global_rope_theta", "local_rope_theta", "global_attn_every_n_layers", "classifier_pooling"),
    *("decoder_bias", "type_vocab_size"),
}
EMBEDDINGS = ("embed.weight", "head.decoder.weight", "head.decoder.bias")  # a row for each token
SPECIALS = {"pad": 0, "cls": 0, "sep": 0, "mask": 0, "eod": 0}


def shape_of(folder: str, given: dict) -> dict:
    """The section `model` of a run that begins from `folder`: the folder's shape, with the `given` keys laid over it.

    Raises ConfigError when our model cannot be what config.json says, or when a given key contradicts it.
    """
    dialect, config = _read(folder)
    values = dialect.wanted | dialect.shape(config)
    if "generator" in dialect.free:
        if not given.get("generator"):
            raise ConfigError(
                f"model.init_from = {folder} is a discriminator: it needs a generator, which the folder does not have",
                "say its shape in model.generator: {layers: …, width: …, heads: …, mlp_width: …}",
            )
        values["generator"] = given["generator"]
    model = ModelConfig(**{"bias": False, **values})
    ours = dialect.config(model, config["vocab_size"], SPECIALS)
    differing = [
        f"config.json: {key} is {config[key]!r}, and as a {dialect.name} of ours it would be {value!r}"
        for key, value in ours.items()
        if key in config
        and key not in ASIDE | dialect.aside(config)
        and "dropout" not in key
        and "pdrop" not in key
        and config[key] != value
    ]
    if differing:
        raise ConfigError(f"model.init_from = {folder}: our model cannot be this one", *differing)
    contradicted = [
        f"model.{key} = {value}: the folder has {getattr(model, key)}"
        for key, value in given.items()
        if key not in CHANGED and key in values and str(value).lower() != str(getattr(model, key)).lower()
    ]
    if contradicted:
        raise ConfigError(f"keys contradict model.init_from = {folder}", *contradicted, "leave them out")
    return {"bias": False, **values, **given}


def fill(model: "Transformer", folder: str, tokenizer: Tokenizer) -> list[str]:
    """Copy the weights of `folder` into `model`. Returns the names of the weights that it lacks; they stay as they are.

    Tokens that the run's vocabulary has more get the mean of the rows of the pieces that the folder's tokenizer makes
    of them. Raises ConfigError when the folder's tokens have other ids, or a weight another shape.
    """
    import torch

    dialect, _ = _read(folder)
    ours = dict(model.named_parameters())
    shaped = model.config.model_copy(update={"causal": dialect.wanted["causal"]})
    found = dialect.from_weights(shaped, _tensors(folder, dialect), {name: len(p) for name, p in ours.items()})
    pieces = _new_tokens(folder, tokenizer)
    with torch.no_grad():
        for name, p in ours.items():
            if name not in found:
                continue
            theirs = found[name].to(p.dtype)
            if name in EMBEDDINGS:
                rows = min(len(theirs), tokenizer.vocab_size - len(pieces))
                p[:rows] = theirs[:rows]
                for token, ids in pieces.items():
                    if ids:
                        p[token] = theirs[ids].mean(0)
            elif theirs.shape != p.shape:
                raise ConfigError(
                    f"model.init_from = {folder}: a weight has another shape",
                    f"{name} is {list(p.shape)} in this run and {list(theirs.shape)} in the folder",
                    "leave out the keys of model that change it",
                )
            else:
                p.copy_(theirs)
    return [name for name in ours if name not in found]


def _read(folder: str) -> tuple[Dialect, dict]:
    """The dialect of a folder, and its config.json with all defaults. Raises TaskError or ConfigError."""
    if not Path(folder).is_dir():
        raise ConfigError(f"model.init_from = {folder}: there is no such folder", "name a local Hugging Face folder")
    huggingface.model_folder(folder)
    config = huggingface.open_config(folder).to_dict()
    known = {dialect.model_type: dialect for dialect in DIALECTS.values()}
    if config["model_type"] not in known:
        said = f"config.json: model_type is {config['model_type']}; known are {', '.join(known)}"
        raise ConfigError(f"model.init_from = {folder} has an architecture that is no dialect", said)
    return known[config["model_type"]], config


def _tensors(folder: str, dialect: Dialect) -> "dict[str, Tensor]":
    """All tensors of the folder, under the names that the class with the head gives them."""
    from safetensors.torch import load_file

    found: dict[str, Tensor] = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        found |= load_file(path)
    found = {name.replace(".gamma", ".weight").replace(".beta", ".bias"): tensor for name, tensor in found.items()}
    prefix = dialect.names.outside["embed"].split(".")[0] + "."
    if not any(name.startswith(prefix) for name in found):  # a class without a head was saved
        found = {prefix + name: tensor for name, tensor in found.items()}
    return found


def _new_tokens(folder: str, tokenizer: Tokenizer) -> dict[int, list[int]]:
    """The tokens of the run that the folder's vocabulary lacks, each with the ids of its pieces there.

    Raises ConfigError unless every token of the folder has the same id in the run's vocabulary.
    """
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(f"model.init_from = {folder} has no tokenizer.json", "save its tokenizer beside the model")
    theirs = tokenizers.Tokenizer.from_str(json.dumps(_unpadded(json.loads(path.read_text(encoding="utf-8")))))
    known = theirs.get_vocab(with_added_tokens=True)
    ours = tokenizer.vocabulary.engine.get_vocab(with_added_tokens=True)
    other = [token for token, number in known.items() if ours.get(token) != number]
    if other:
        token = min(other, key=known.__getitem__)
        raise ConfigError(
            f"{len(other):,} tokens of {folder} have another id in the vocabulary of this run, or none",
            f"the first is {token!r}: {known[token]} there, {ours.get(token, 'absent')} in {tokenizer.folder}",
            f"make the vocabulary from it, and extend that: python launch/tokenizer.py CONFIG.yaml adopt={folder}",
        )
    new = range(max(known.values()) + 1, tokenizer.vocab_size)
    return {number: theirs.encode(tokenizer.decode([number]), add_special_tokens=False).ids for number in new}


def _unpadded(engine: dict) -> dict:
    """tokenizer.json without its padding and truncation."""
    return engine | {"padding": None, "truncation": None}
