"""Prompt a decoder folder: continuations by the `generate` of transformers, printed and optionally published."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from pretrain import folders
from pretrain.config import Config
from pretrain.errors import TaskError
from pretrain.finetune.huggingface import identity, library, model_folder, must_differ, opened, quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class GenerateConfig(Config):
    """What `launch/generate.py` reads."""

    model: str  # Hugging Face folder
    prompts: list[str] = Field(min_length=1)
    out: str | None = None  # none: only printed
    max_new_tokens: int = Field(64, gt=0)
    temperature: float = Field(0.8, ge=0)  # 0: always the likeliest token
    top_k: int = Field(40, ge=0)  # drawn from so many likeliest tokens; 0: from all
    seed: int = 0  # of each prompt anew: a prompt's continuation does not depend on the others

    @model_validator(mode="after")
    def _keeps_the_model(self) -> "GenerateConfig":
        if self.out is not None:
            must_differ(self.out, self.model)
        return self


def generate(config: GenerateConfig) -> list[str]:
    """Print and return the continuation of each prompt; with `out`, also generations.jsonl. Raises TaskError."""
    import torch

    model_folder(config.model)
    with quiet():
        transformers = library("transformers")
        tokenizer = opened("tokenizer", config.model, transformers.AutoTokenizer.from_pretrained)
        model = opened("model", config.model, transformers.AutoModelForCausalLM.from_pretrained)
        model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        options = {"max_new_tokens": config.max_new_tokens, "do_sample": config.temperature > 0}
        if options["do_sample"]:
            options |= {"temperature": config.temperature, "top_k": config.top_k}
        found = [continuation(model, tokenizer, prompt, config.seed, options) for prompt in config.prompts]
    _print(config.prompts, found)
    if config.out is not None:
        _publish(Path(config.out), config, found)
    return found


def continuation(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", prompt: str, seed: int, options: dict
) -> str:
    """What the model writes after `prompt`, which the tokenizer begins as it was trained to (our decoders: `<eod>`).

    Raises TaskError when prompt and continuation do not fit the model.
    """
    import torch

    encoded = tokenizer(prompt, return_tensors="pt", split_special_tokens=True).to(model.device)
    ids = encoded["input_ids"]
    if ids.shape[1] == 0:
        raise TaskError("this prompt has no tokens", f"prompt: {prompt!r}", "begin the text")
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and ids.shape[1] + options["max_new_tokens"] > limit:
        raise TaskError(
            f"prompt and continuation are longer than the {limit} positions of the model",
            f"prompt: {prompt[:40]!r}, {ids.shape[1]} tokens, and max_new_tokens = {options['max_new_tokens']}",
            "lower max_new_tokens, or shorten the prompt",
        )
    torch.manual_seed(seed)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    written = model.generate(ids, attention_mask=encoded["attention_mask"], pad_token_id=padding, **options)[0]

    def text(tokens: "torch.Tensor") -> str:
        return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    return text(written)[len(text(ids[0])) :]  # decoded alone, some tokenizers would drop its first space


def _print(prompts: list[str], found: list[str]) -> None:
    from rich.console import Console
    from rich.text import Text

    for prompt, written in zip(prompts, found, strict=True):
        Console().print(Text.assemble((prompt, "bold"), written), end="\n\n", soft_wrap=True)


def _publish(out: Path, config: GenerateConfig, found: list[str]) -> None:
    with folders.publish(out, "generate", TaskError) as folder:
        with open(folder / "generations.jsonl", "w", encoding="utf-8") as file:
            for prompt, written in zip(config.prompts, found, strict=True):
                print(json.dumps({"prompt": prompt, "continuation": written}, ensure_ascii=False), file=file)
        options = config.model_dump(mode="json", exclude={"model", "out"})
        index = {
            "stage": "generate",
            "base": identity(config.model),
            "options": options,
            "recorded": {"model": config.model},
        }
        folders.write_index(folder, index)
