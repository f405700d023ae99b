"""Prompt a folder: the `generate` of transformers continues each prompt; the texts are printed or published.

A decoder continues a text. An encoder with a decoder reads it and writes another: a T5 the spans for its sentinels.
"""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from pretrain import huggingface
from pretrain.config import StageConfig
from pretrain.errors import TaskError
from pretrain.huggingface import identity, library, must_differ, quiet
from pretrain.storage.index import write_index
from pretrain.storage.publish import publish

if TYPE_CHECKING:
    from transformers import BatchEncoding, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# Logits divided by less than this could leave the range of float32; every draw would be the likeliest token anyway.
COLDEST = 1e-6


class GenerateConfig(StageConfig):
    """The configuration of `launch/generate.py`."""

    model: str
    """The Hugging Face folder of a decoder, or of an encoder with a decoder."""
    prompts: list[str] = Field(min_length=1)
    """The texts to continue, or for an encoder with a decoder to read."""
    out: str | None = None
    """The folder for generations.jsonl; null: the texts are only printed."""
    max_new_tokens: int = Field(64, gt=0)
    """The largest number of tokens to add to each prompt."""
    temperature: float = Field(0.8, ge=0, le=1e6)
    """Logits are divided by this before a token is drawn; 0 always takes the likeliest token."""
    top_k: int = Field(40, ge=0, lt=2**31)
    """Tokens are drawn from this many of the likeliest ones; 0: from all."""
    seed: int = Field(0, ge=0, lt=2**63)
    """The seed of every prompt anew, so the continuation of a prompt does not depend on the other prompts."""

    @model_validator(mode="after")
    def _consistent(self) -> "GenerateConfig":
        if 0 < self.temperature < COLDEST:
            raise ValueError(
                f"temperature = {self.temperature:g}: set 0 for the likeliest token, or at least {COLDEST:g} to draw"
            )
        if self.out is not None:
            must_differ(self.out, self.model)
        return self


def run(config: GenerateConfig) -> list[str]:
    """Print and return the continuation of each prompt; if `out` is set, publish them too. Raises TaskError."""
    huggingface.model_folder(config.model)
    if config.out is None:
        identity(config.model)
        found = _continuations(config)
        _print(config.prompts, found)
        return found
    with publish(Path(config.out), "generate", TaskError, config) as folder:
        base = identity(config.model)
        found = _continuations(config)
        _write(folder, config, base, found)
    _print(config.prompts, found)  # after publishing: with `| head`, printing may fail
    return found


def _continuations(config: GenerateConfig) -> list[str]:
    """Open the folder and continue each prompt. Raises TaskError if its model writes nothing, or for a long prompt."""
    import torch

    with quiet():
        transformers = library("transformers")
        settings = huggingface.open_config(config.model)
        _check_writes(config.model, settings)
        tokenizer = huggingface.open_tokenizer(config.model, settings)
        reads = settings.is_encoder_decoder
        auto = transformers.AutoModelForSeq2SeqLM if reads else transformers.AutoModelForCausalLM
        model, _, _ = huggingface.open_model(config.model, auto, lambda name, model: False, dtype="float32")
        model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        options: dict[str, float] = {"max_new_tokens": config.max_new_tokens, "do_sample": config.temperature > 0}
        if options["do_sample"]:
            options |= {"temperature": config.temperature, "top_k": config.top_k}
        with huggingface.explained(f"transformers cannot continue text with {config.model}"):
            encoded = [_encoded(prompt, tokenizer, model, config.max_new_tokens) for prompt in config.prompts]
            return [continuation(model, tokenizer, prompt, config.seed, options) for prompt in encoded]


def _check_writes(folder: str, config: "PretrainedConfig") -> None:
    """Raise TaskError unless the folder holds a model that was trained to write text.

    transformers would open an encoder as a decoder, and a classifier with a new head, and both would write nonsense.
    """
    known = library("transformers.models.auto.modeling_auto")
    decoders, encoders = known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, known.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    kind, named = config.model_type, config.architectures or []
    found = [str(name) for name in (named if isinstance(named, list) else [named])]
    classes = {name for names in decoders.values() for name in ([names] if isinstance(names, str) else names)}
    others = known.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    if config.is_encoder_decoder:
        decoders, classes = others, set(others.values())
    causal = any(name in classes for name in found) if found else kind in decoders
    if kind in encoders and not (getattr(config, "is_decoder", False) or config.is_encoder_decoder):
        causal = False  # BERT is in both lists, and without `is_decoder` it attends to the tokens that follow
    if not causal:
        holds = ", ".join(found) or f"a model of the kind {kind}"
        raise TaskError(
            f"{folder}: this folder holds {holds}, and generate needs a decoder",
            "a decoder is a causal language model, such as Qwen3ForCausalLM; encoders and classifiers continue no text",
            "set model to the folder of an exported decoder",
        )


def _encoded(
    prompt: str, tokenizer: "PreTrainedTokenizerBase", model: "PreTrainedModel", max_new_tokens: int
) -> "BatchEncoding":
    """The ids of a prompt. The tokenizer begins them as documents begin in training (our decoders: with `<eod>`).

    Raises TaskError if the prompt is empty, or if prompt and continuation are too long for the model.
    """
    as_text = not model.config.is_encoder_decoder  # there the sentinels of a prompt are tokens
    encoded = tokenizer(prompt, return_tensors="pt", split_special_tokens=as_text).to(model.device)
    tokens = encoded["input_ids"].shape[1]
    if tokens == 0:
        raise TaskError("this prompt has no tokens", f"prompt: {prompt!r}", "write at least the first word")
    limit = getattr(model.config, "max_position_embeddings", None)
    written = max(tokens, max_new_tokens) if model.config.is_encoder_decoder else tokens + max_new_tokens
    if limit is not None and written > limit:
        raise TaskError(
            f"prompt and continuation are longer than the {limit} positions of the model",
            f"prompt: {prompt[:40]!r}, {tokens} tokens, and max_new_tokens = {max_new_tokens}",
            "lower max_new_tokens, or shorten the prompt",
        )
    return encoded


def continuation(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", encoded: "BatchEncoding", seed: int, options: dict
) -> str:
    """The text that the model writes after an encoded prompt."""
    import torch

    ids = encoded["input_ids"]
    torch.manual_seed(seed)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    written = model.generate(ids, attention_mask=encoded["attention_mask"], pad_token_id=padding, **options)[0]
    if model.config.is_encoder_decoder:  # it begins with padding, and its sentinels say which span is which
        kept = [token for token in written[1:].tolist() if token not in (padding, tokenizer.eos_token_id)]
        return tokenizer.decode(kept, clean_up_tokenization_spaces=False)

    def text(tokens: "torch.Tensor") -> str:
        return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    return text(written)[len(text(ids[0])) :]  # some tokenizers drop the first space of a text that is decoded alone


def _print(prompts: list[str], found: list[str]) -> None:
    bold, plain = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")
    for prompt, written in zip(prompts, found, strict=True):
        print(f"{bold}{prompt}{plain}{written}\n")


def _write(folder: Path, config: GenerateConfig, base: str, found: list[str]) -> None:
    with open(folder / "generations.jsonl", "w", encoding="utf-8") as file:
        for prompt, written in zip(config.prompts, found, strict=True):
            print(json.dumps({"prompt": prompt, "continuation": written}, ensure_ascii=False), file=file)
    options = config.model_dump(mode="json", exclude={"model", "out", "replace"})
    recorded = {"model": config.model}
    write_index(folder, {"stage": "generate", "base": base, "options": options, "recorded": recorded})
