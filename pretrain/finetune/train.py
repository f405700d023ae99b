"""One training: build a classifier, fit it with the Trainer of transformers, and let it answer."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pretrain import huggingface
from pretrain.errors import TaskError
from pretrain.finetune.task import Example
from pretrain.huggingface import library

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn
    from transformers import (
        PretrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        TrainerCallback,
        TrainingArguments,
    )

Row = dict[str, Any]  # the tokenizer's columns of one example, and `labels`: the number of its class

GRADIENT_NORM = 1.0
EVAL_BATCH = 128
LOSS_EVERY = 10  # steps; the progress bar shows their mean loss


@dataclass(frozen=True)
class FinetuneStart:
    """The model that every training starts from."""

    folder: str
    labels: list[str]
    init: Literal["pretrained", "random"]
    dropout: float | None  # None: as in the folder's config.json
    lora_rank: int | None  # None: every weight is trained


@dataclass(frozen=True)
class Schedule:
    """The length of a training, and how its learning rate and weights move."""

    epochs: int
    batch: int  # examples per step
    warmup_share: float  # the share of all steps in which the learning rate rises
    weight_decay: float

    def steps(self, examples: int) -> int:
        """The optimizer steps of a training on this number of examples."""
        return self.epochs * -(-examples // self.batch)


def open_tokenizer(folder: str, max_length: int) -> "PreTrainedTokenizerBase":
    """The folder's tokenizer. Raises TaskError when it or the model cannot take inputs of `max_length` tokens."""
    config = huggingface.open_config(folder)
    tokenizer = huggingface.open_tokenizer(folder, config)
    if tokenizer.pad_token_id is None:
        raise TaskError(
            "the tokenizer has no padding token", f"looked in: {folder}", "set model to the folder of an encoder"
        )
    limit = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or max_length)
    if max_length > limit:
        raise TaskError(
            f"max_length = {max_length}, but the model takes {limit} tokens",
            f"the limit is in config.json or tokenizer_config.json of {folder}",
            f"set max_length={limit}",
        )
    return tokenizer


def encode(
    examples: Sequence[Example], labels: list[str], tokenizer: "PreTrainedTokenizerBase", max_length: int
) -> tuple[list[Row], int]:
    """A row for each example, and the number of examples that were cut to `max_length` tokens.

    A special token such as `[SEP]` that is written in a text is encoded as text.
    """
    texts = [example.text for example in examples]
    pairs = [example.text_pair for example in examples] if examples[0].text_pair is not None else None
    whole = tokenizer(texts, pairs, split_special_tokens=True, verbose=False)["input_ids"]
    columns = tokenizer(texts, pairs, split_special_tokens=True, truncation=True, max_length=max_length)
    rows = [
        {name: column[i] for name, column in columns.items()} | {"labels": labels.index(example.label)}
        for i, example in enumerate(examples)
    ]
    return rows, sum(len(ids) > max_length for ids in whole)


def build(start: FinetuneStart, seed: int) -> "PreTrainedModel | PeftModel":
    """A classifier in fp32. Weights that the folder lacks are drawn at random from `seed`.

    Raises TaskError if the folder's weights do not fit its config.json, or if its head is for other labels.
    """
    return _built(start, seed)[0]


def check(start: FinetuneStart) -> dict:
    """Build the model once before any training, so that every TaskError of `build` comes first.

    Returns `weights`, their number, and `head`: "new", or "continued" if it comes from the folder.
    """
    model, continued = _built(start, seed=0)
    return {"weights": weights(model), "head": "continued" if continued else "new"}


def _built(start: FinetuneStart, seed: int) -> "tuple[PreTrainedModel | PeftModel, bool]":
    """The classifier, and whether its head comes from the folder."""
    transformers = library("transformers")
    numbered = dict(enumerate(start.labels))
    config = huggingface.open_config(
        start.folder, id2label=numbered, label2id={label: i for i, label in numbered.items()}
    )
    if start.dropout is not None:
        _set_dropout(config, start.dropout, start.folder)
    transformers.set_seed(seed)
    auto = transformers.AutoModelForSequenceClassification
    if start.init == "random":
        return auto.from_config(config, trust_remote_code=False).float(), False
    model, missing, shapes = huggingface.open_model(start.folder, auto, _may_be_new, config=config, dtype="float32")
    continued = _continues_head(start, model, missing, shapes)
    return (model if start.lora_rank is None else _with_adapters(model, start.lora_rank)), continued


def _is_of_head(name: str, model: "PreTrainedModel") -> bool:
    return not name.startswith(f"{model.base_model_prefix}.")


def _may_be_new(name: str, model: "PreTrainedModel") -> bool:
    """Whether a weight may start at random: the head, and the pooler of an encoder, which our pre-training lacks."""
    return _is_of_head(name, model) or ".pooler." in name


def _continues_head(
    start: FinetuneStart, model: "PreTrainedModel", missing: set[str], shapes: dict[str, tuple]
) -> bool:
    """Whether the whole head came from the folder, which was then fine-tuned.

    Raises TaskError if the folder was fine-tuned for other labels, or if other weights are missing beside its head.
    """
    if shapes or not any(_is_of_head(name, model) for name in missing):
        labels = huggingface.open_config(start.folder).id2label
        own = [str(labels[number]) for number in sorted(labels)]
        if shapes or own != start.labels:
            raise TaskError(
                "this folder was fine-tuned for other labels, so its head does not fit this task",
                f"{start.folder} has a head for {_listed(own)}",
                f"the task has {_listed(start.labels)}",
                "take the pre-trained folder that it was fine-tuned from, such as the export of the encoder",
            )
        if missing:
            raise TaskError(
                "the folder has a fine-tuned head but not all of the model below it",
                f"{start.folder}: {len(missing)} weights are missing, the first is {min(missing)}",
                huggingface.MAKE_AGAIN,
            )
        return True
    return False


def _listed(labels: list[str], shown: int = 6) -> str:
    names = ", ".join(labels[:shown]) + (", …" if len(labels) > shown else "")
    return f"{len(labels):,} labels: {names}"


def fit(
    model: "PreTrainedModel | PeftModel",
    tokenizer: "PreTrainedTokenizerBase",
    rows: list[Row],
    schedule: Schedule,
    learning_rate: float,
    seed: int,
    scratch: Path,
    advance: Callable[..., None] = lambda steps, note="": None,
) -> None:
    """Train `model` in place with AdamW, linear warm-up and decay, on the first GPU or on the CPU. Saves nothing.

    `advance(1)` is called after every step, and `advance(0, "loss 0.412")` with the mean loss of the last steps.
    Raises TaskError if the training diverged: every answer of such a model would be the first label.
    """
    import torch

    transformers = library("transformers")
    settings = _settings(schedule, len(rows), learning_rate, seed, scratch)
    collator = transformers.DataCollatorWithPadding(tokenizer)
    trainer = transformers.Trainer(model, settings, train_dataset=rows, data_collator=collator)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.add_callback(_reporter(advance))
    trainer.train()
    if not all(torch.isfinite(weight).all() for weight in model.parameters()):
        raise TaskError(
            f"training diverged at learning rate {learning_rate:g}",
            f"seed {seed}: its weights are no longer finite numbers",
            "take that rate out of learning_rates",
        )


def _settings(schedule: Schedule, examples: int, learning_rate: float, seed: int, scratch: Path) -> "TrainingArguments":
    import torch

    transformers = library("transformers")
    steps = schedule.steps(examples)
    by_length: dict[str, str | bool] = {"train_sampling_strategy": "group_by_length"}
    if not hasattr(transformers.TrainingArguments, "train_sampling_strategy"):  # transformers 4
        by_length = {"group_by_length": True}
    settings = transformers.TrainingArguments(
        output_dir=str(scratch),  # the Trainer makes this folder although nothing is saved
        num_train_epochs=schedule.epochs,
        per_device_train_batch_size=schedule.batch,
        learning_rate=learning_rate,
        warmup_steps=round(schedule.warmup_share * steps),
        weight_decay=schedule.weight_decay,
        max_grad_norm=GRADIENT_NORM,
        seed=seed,
        use_cpu=not torch.cuda.is_available(),
        dataloader_num_workers=0,
        dataloader_pin_memory=torch.cuda.is_available(),
        save_strategy="no",
        logging_strategy="steps",
        logging_steps=min(LOSS_EVERY, steps),
        report_to="none",
        disable_tqdm=True,
        label_names=["labels"],  # the Trainer does not find them in a PeftModel
        **by_length,
    )
    # With several GPUs the Trainer would wrap the model in DataParallel and multiply the batch by their number.
    settings._n_gpu = min(settings.n_gpu, 1)
    return settings


def _reporter(advance: Callable[..., None]) -> "TrainerCallback":
    class Reporter(library("transformers").TrainerCallback):  # type: ignore[misc]  # a class only if installed
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            advance(1)

        def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **_: Any) -> None:
            if logs and "loss" in logs:
                advance(0, f"loss {float(logs['loss']):.3f}")

    return Reporter()


def answers(model: "nn.Module", tokenizer: "PreTrainedTokenizerBase", rows: list[Row]) -> np.ndarray:
    """The class predicted for each row: (rows,) int64.

    Not by Trainer.predict: with length grouping it returns the answers in a random order (transformers 5.23, see
    `Trainer._get_eval_sampler`).
    """
    import torch

    collator = library("transformers").DataCollatorWithPadding(tokenizer)
    order = np.argsort([len(row["input_ids"]) for row in rows], kind="stable")  # equal lengths need no padding
    found = np.empty(len(rows), dtype=np.int64)
    model.eval()
    for first in range(0, len(rows), EVAL_BATCH):
        places = order[first : first + EVAL_BATCH]
        with torch.inference_mode():
            logits = model(**collator([rows[i] for i in places]).to(model.device)).logits
        found[places] = logits.argmax(dim=-1).cpu().numpy()
    return found


def accuracy(found: np.ndarray, rows: list[Row]) -> float:
    """The share of right answers among `found` (rows,)."""
    return float(np.mean(found == [row["labels"] for row in rows]))


def weights(model: "nn.Module") -> dict[str, int]:
    """The number of all weights, and the number of weights that are trained."""
    sizes = [(weight.numel(), weight.requires_grad) for weight in model.parameters()]
    return {"all": sum(size for size, _ in sizes), "trained": sum(size for size, trained in sizes if trained)}


def _set_dropout(config: "PretrainedConfig", rate: float, folder: str) -> None:
    """Set every dropout rate, whatever the architecture calls it. A rate of None follows another one and is kept."""
    names = [name for name, value in config.to_dict().items() if "dropout" in name and isinstance(value, int | float)]
    if not names:
        found = f"{folder}/config.json has no key with a dropout rate"
        raise TaskError(f"dropout = {rate}, but this model has no dropout", found, "leave dropout out")
    for name in names:
        setattr(config, name, rate)


def _with_adapters(model: "PreTrainedModel", rank: int) -> "PeftModel":
    """Add low-rank adapters to every linear layer of the blocks. Head and pooler start at random and train in full.

    Source: Hu et al. 2021, arXiv:2106.09685. The feed-forward layers have adapters too, because they hold most weights.
    """
    from torch import nn

    peft = library("peft")
    encoder = model.base_model_prefix
    modules = model.base_model.named_modules(prefix=encoder)
    sides = {name: min(module.weight.shape) for name, module in modules if isinstance(module, nn.Linear)}
    linear = list(sides)
    places = [re.fullmatch(r"(.+?)\.\d+\.(.+)", name) for name in linear]  # the list of blocks, the layer in a block
    blocks = sorted({re.escape(place[1]) for place in places if place})
    inside = sorted({re.escape(place[2]) for place in places if place})
    if not inside:
        kind = type(model).__name__
        raise TaskError("lora finds no linear layers in the blocks of this model", kind, "take method=full")
    widest = max(sides[name] for name, place in zip(linear, places, strict=True) if place)
    if rank > widest:
        raise TaskError(
            f"lora_rank = {rank:,} is larger than every layer: the adapters would be larger than the model",
            f"{type(model).__name__}: the smaller side of its layers is at most {widest:,}",
            "set lora_rank to 8, or to a small part of that",
        )
    heads = [name for name, module in model.named_children() if name != encoder and weights(module)["all"]]
    if getattr(model.base_model, "pooler", None) is not None:
        heads.append(f"{encoder}.pooler")
    # A pattern, because peft writes a list of names to adapter_config.json in another order every time.
    targets = rf"({'|'.join(blocks)})\.\d+\.({'|'.join(inside)})"
    settings = peft.LoraConfig(
        task_type="SEQ_CLS", r=rank, lora_alpha=2 * rank, target_modules=targets, modules_to_save=heads
    )
    return peft.get_peft_model(model, settings)
