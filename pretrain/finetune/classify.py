"""Fine-tune an encoder folder: every learning rate on dev, the best one on test with fresh seeds, one model published.

What the folder holds:

    config.json  model.safetensors                          method full: a stock folder
    adapter_config.json  adapter_model.safetensors          method lora: what PEFT lays over the base model
    tokenizer.json  tokenizer_config.json  README.md        the base's tokenizer; how to open the folder
    report.json  predictions.jsonl                          the scores; label and answer of each test example
    index.json                                              what it was made from, written last

`report.json` and the index's fingerprint hold no time and no place, so equal runs are equal folders.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field, model_validator

from pretrain import folders
from pretrain.config import Config
from pretrain.errors import TaskError
from pretrain.finetune import scores
from pretrain.finetune.huggingface import identity, library, must_differ, quiet
from pretrain.finetune.task import Example, Task, read_task, stratified
from pretrain.finetune.train import Row, Schedule, Start, accuracy, answers, build, encode, fit, open_tokenizer, weights
from pretrain.progress import progress

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FULL_CARD = """\
---
library_name: transformers
pipeline_tag: text-classification
---

# A text classifier

```python
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSequenceClassification.from_pretrained(folder)
```
"""

LORA_CARD = """\
---
library_name: peft
pipeline_tag: text-classification
---

# A text classifier: LoRA adapters and a head

The base model is not in this folder: it is the one with the fingerprint `{base}`.

```python
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(folder)
base = AutoModelForSequenceClassification.from_pretrained(base_folder, id2label={labels})
model = PeftModel.from_pretrained(base, folder)
```
"""

REST = """
Encode texts with `tokenizer(text, split_special_tokens=True, truncation=True, max_length={max_length})`, as in
training. Test accuracy, this seed: {accuracy:.1%}; the others and the baselines stand in report.json.
"""


class FinetuneConfig(Config):
    """What `launch/finetune.py` reads."""

    model: str  # Hugging Face folder
    task: str  # folder of train.jsonl, dev.jsonl, test.jsonl
    out: str
    method: Literal["full", "lora"]
    init: Literal["pretrained", "random"] = "pretrained"  # random: the same shape with fresh weights, to compare with
    labels: int | None = Field(None, gt=0)  # training examples used, stratified; none: all
    labels_seed: int = 0  # which ones
    epochs: int = Field(gt=0)
    batch: int = Field(gt=0)
    learning_rates: list[float] = Field(min_length=1)  # the best mean over dev_seeds wins
    dev_seeds: list[int] = Field(min_length=1)
    test_seeds: list[int] = Field(min_length=1)
    max_length: int = Field(gt=2)  # tokens; longer texts are truncated and counted
    warmup_share: float = Field(0.1, ge=0, lt=1)  # of all steps; then linear decay to 0
    weight_decay: float = Field(0.01, ge=0)
    dropout: float | None = Field(None, ge=0, lt=1)  # none: as the model's config.json says
    lora_rank: int = Field(8, gt=0)  # method lora only

    @model_validator(mode="after")
    def _consistent(self) -> "FinetuneConfig":
        if self.init == "random" and self.method == "lora":
            raise ValueError(
                "init = random contradicts method = lora: without its random base the adapter is lost; take method=full"
            )
        if min(self.learning_rates) <= 0:
            raise ValueError(f"learning_rates = {self.learning_rates}: every one must be greater than 0")
        seeds = {"learning_rates": self.learning_rates, "dev_seeds and test_seeds": self.dev_seeds + self.test_seeds}
        for name, values in seeds.items():
            if len(set(values)) < len(values):
                raise ValueError(f"{name} = {values}: a value occurs twice")
        must_differ(self.out, self.model, self.task)
        return self


def run(config: FinetuneConfig) -> dict:
    """Fine-tune, publish `config.out`, print a table; returns report.json plus `seconds`. Raises TaskError.

    The published model is the test seed that is best on dev: chosen by its test score it would look better than it is.
    On a CPU with the same number of threads the same configuration gives the same fingerprint.
    """
    started = time.monotonic()
    versions = {name: library(name).__version__ for name in ("torch", "transformers", "peft", "accelerate")}
    task = read_task(config.task)
    texts = {"train": task.train, "dev": task.dev, "test": task.test}
    if config.labels is not None:
        texts["train"] = stratified(task.train, config.labels, config.labels_seed)
    base = identity(config.model)
    with folders.publish(Path(config.out), "finetune", TaskError) as folder, quiet():
        tokenizer = open_tokenizer(config.model, config.max_length)
        rows, truncated = {}, {}
        for name, examples in texts.items():
            rows[name], truncated[name] = encode(examples, task.labels, tokenizer, config.max_length)
        best, found = _search(config, task.labels, tokenizer, rows, folder)
        report = {
            "method": config.method,
            "init": config.init,
            "examples": {"available": len(task.train)} | {name: len(examples) for name, examples in texts.items()},
            "labels": task.labels,
            "truncated": truncated,
            "also_in_train": {name: _overlap(texts["train"], texts[name]) for name in ("dev", "test")},
            **found,
            "baselines": {
                "majority": scores.majority(texts["train"], task.test),
                "naive_bayes": scores.naive_bayes(texts["train"], task.test),
            },
        }
        _write(folder, config, tokenizer, best, report, [example.label for example in task.test], base)
        seconds = round(time.monotonic() - started, 1)
        folders.write_index(folder, _index(config, task, base, {**versions, "seconds": seconds}))
    _print(config, report, seconds)
    return report | {"seconds": seconds}


@dataclass(frozen=True)
class _Fitted:
    model: "PreTrainedModel | PeftModel"
    seed: int
    dev: float
    test: float
    answers: np.ndarray  # to the test examples


def _search(
    config: FinetuneConfig,
    labels: list[str],
    tokenizer: "PreTrainedTokenizerBase",
    rows: dict[str, list[Row]],
    scratch: Path,
) -> tuple[_Fitted, dict]:
    """Every rate on dev, the best one on test with fresh seeds: the model to publish, and the report's scores."""
    rank = config.lora_rank if config.method == "lora" else None
    start = Start(config.model, labels, config.init, config.dropout, rank)
    schedule = Schedule(config.epochs, config.batch, config.warmup_share, config.weight_decay)
    trainings = len(config.learning_rates) * len(config.dev_seeds) + len(config.test_seeds)
    with progress("fine-tuning", "trainings", trainings) as advance:

        def train(rate: float, seed: int) -> "PreTrainedModel | PeftModel":
            model = build(start, seed)
            fit(model, tokenizer, rows["train"], schedule, rate, seed, scratch)
            advance(1)
            return model

        def on_dev(model: "PreTrainedModel | PeftModel") -> float:
            return accuracy(answers(model, tokenizer, rows["dev"]), rows["dev"])

        dev = []
        for rate in config.learning_rates:
            by_seed = [on_dev(train(rate, seed)) for seed in config.dev_seeds]
            dev.append({"learning_rate": rate, "accuracy": fmean(by_seed), "by_seed": by_seed})
        rate = max(dev, key=lambda tried: tried["accuracy"])["learning_rate"]
        test, best = [], None
        for seed in config.test_seeds:
            model = train(rate, seed)
            given = answers(model, tokenizer, rows["test"])
            fitted = _Fitted(model, seed, on_dev(model), accuracy(given, rows["test"]), given)
            test.append({"seed": seed, "accuracy": fitted.test, "dev": fitted.dev})
            if best is None or fitted.dev > best.dev:
                best = fitted
    by_seed = [fitted["accuracy"] for fitted in test]
    return best, {
        "weights": weights(best.model),
        "learning_rate": rate,
        "dev": dev,
        "test": {
            "accuracy": fmean(by_seed),
            "interval95": scores.interval95(by_seed, len(rows["test"])),
            "interval_covers": "test examples and training seeds" if len(by_seed) > 1 else "test examples, one seed",
            "by_seed": test,
        },
        "published_seed": best.seed,
    }


def _overlap(train: Sequence[Example], others: Sequence[Example]) -> int:
    """How many of `others` have the very texts of a training example."""
    seen = {(example.text, example.text_pair) for example in train}
    return sum((example.text, example.text_pair) in seen for example in others)


def _write(
    folder: Path,
    config: FinetuneConfig,
    tokenizer: "PreTrainedTokenizerBase",
    best: _Fitted,
    report: dict,
    gold: list[str],
    base: str,
) -> None:
    """Everything but the index."""
    tokenizer.save_pretrained(folder)
    best.model.to("cpu").save_pretrained(folder)
    folders.write_json(folder / "report.json", report)
    labels = report["labels"]
    with open(folder / "predictions.jsonl", "w", encoding="utf-8") as file:
        for label, answer in zip(gold, best.answers, strict=True):
            print(json.dumps({"label": label, "predicted": labels[answer]}, ensure_ascii=False), file=file)
    card = {"full": FULL_CARD, "lora": LORA_CARD}[config.method] + REST
    text = card.format(base=base, labels=dict(enumerate(labels)), max_length=config.max_length, accuracy=best.test)
    (folder / "README.md").write_text(text, encoding="utf-8")  # in place of the form that peft leaves to be filled in


def _index(config: FinetuneConfig, task: Task, base: str, recorded: dict) -> dict:
    places = {"model": config.model, "task": config.task}
    return {
        "stage": "finetune",
        "base": base,
        "task": task.files,
        "options": config.model_dump(mode="json", exclude={"out", *places}),
        "recorded": {**places, **recorded},
    }


def _print(config: FinetuneConfig, report: dict, seconds: float) -> None:
    from rich.console import Console
    from rich.table import Table

    start = "" if config.init == "pretrained" else ", random start"
    title = f"{Path(config.task).name}: {config.method}{start}, {report['examples']['train']:,} labels, {seconds:.0f} s"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    table.add_column("accuracy %", justify="right")
    table.add_column("95 % interval", justify="right")
    for tried in report["dev"]:
        chosen = ", chosen" if tried["learning_rate"] == report["learning_rate"] else ""
        table.add_row(f"dev, rate {tried['learning_rate']:g}{chosen}", _percent(tried["accuracy"]))
    table.add_section()
    table.add_row("test, majority class", _percent(report["baselines"]["majority"]))
    table.add_row("test, naive Bayes", _percent(report["baselines"]["naive_bayes"]))
    test = report["test"]
    interval = " to ".join(map(_percent, test["interval95"]))
    seeds = len(test["by_seed"])
    table.add_row(
        "test, one seed" if seeds == 1 else f"test, mean of {seeds} seeds", _percent(test["accuracy"]), interval
    )
    Console().print(table)
    print(f"{config.out}: the model of seed {report['published_seed']}, the best of them on dev", flush=True)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
