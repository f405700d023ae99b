"""Fine-tune a model folder on a task, and publish one classifier.

Several learning rates are compared on dev. The best rate is trained with fresh seeds, each of these models answers the
test examples, and the one that is best on dev is published. A single learning rate is not compared with anything.

The published folder:

    config.json  model.safetensors                          method full: a stock folder
    adapter_config.json  adapter_model.safetensors          method lora: PEFT adapters for the base model
    tokenizer.json  tokenizer_config.json …                 the base's tokenizer, byte for byte
    README.md                                               how to open the folder
    report.json  predictions.jsonl                          the scores; label and answer of each test example
    index.json                                              fingerprints of its sources; written last

The index's fingerprint contains no time and no path, so equal runs give equal folders. `report.json` is hashed, but it
is not part of the fingerprint: its comparison with a random twin depends on the folders beside this one.
"""

import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from pretrain.config import StageConfig
from pretrain.display import tables
from pretrain.display.progress import progress
from pretrain.errors import TaskError
from pretrain.finetune import compare, scores
from pretrain.finetune.task import Example, Task, class_lines, read_task, stratified
from pretrain.finetune.train import (
    FinetuneStart,
    Row,
    Schedule,
    accuracy,
    answers,
    build,
    check,
    encode,
    fit,
    open_tokenizer,
)
from pretrain.huggingface import identity, library, model_folder, must_differ, quiet
from pretrain.storage.files import write_json
from pretrain.storage.index import write_index
from pretrain.storage.publish import publish

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


Seed = Annotated[int, Field(ge=0, lt=2**32)]  # the range that transformers and NumPy accept
# Files that are copied in addition to those that the class of a tokenizer names.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
)  # fmt: skip


class FinetuneConfig(StageConfig):
    """The configuration of `launch/finetune.py`."""

    model: str
    """The Hugging Face folder to start from: an export, a result of this stage, or a folder of other origin."""
    task: str
    """The folder with train.jsonl, dev.jsonl and test.jsonl."""
    out: str
    """The folder that the result is published in."""
    method: Literal["full", "lora"]
    """`full` trains every weight. `lora` trains low-rank adapters and the head, and keeps the base as it is."""
    init: Literal["pretrained", "random"] = "pretrained"
    """`random` starts from fresh weights of the same shape, as a twin to compare the pre-trained result with."""
    labels: int | None = Field(None, gt=0)
    """The number of training examples to use, each class by its share; null: all of them."""
    labels_seed: int = Field(0, ge=0, lt=2**63)
    """The seed that chooses these examples."""
    epochs: int = Field(gt=0, lt=2**31)
    """The number of passes over the training examples."""
    batch: int = Field(gt=0, lt=2**31)
    """The number of examples per optimizer step."""
    learning_rates: list[float] = Field(min_length=1)
    """The peak learning rates to try. If there are several, the one with the best mean accuracy on dev is taken."""
    dev_seeds: list[Seed] = []
    """The seeds of the trainings that compare several learning rates. A single rate needs none."""
    test_seeds: list[Seed] = Field(min_length=1)
    """The seeds of the final trainings. Each is scored on test, and the best of them on dev is published."""
    max_length: int = Field(gt=2, lt=2**31)
    """The largest number of tokens per example. Longer texts are truncated, and the report counts them."""
    warmup_share: float = Field(0.1, ge=0, lt=1)
    """The share of all steps in which the learning rate rises; after them it falls linearly to 0."""
    weight_decay: float = Field(0.01, ge=0)
    """The weight decay of AdamW."""
    dropout: float | None = Field(None, ge=0, lt=1)
    """The dropout rate of all layers; null: the rates of the model's config.json. A large model may need a higher rate
    on little data."""
    lora_rank: int = Field(8, gt=0, lt=2**31)
    """The rank of the adapters; only for `method: lora`. A higher rank trains more weights."""

    @model_validator(mode="after")
    def _consistent(self) -> "FinetuneConfig":
        if self.init == "random" and self.method == "lora":
            raise ValueError(
                "init = random contradicts method = lora: without its random base the adapter is lost; take method=full"
            )
        if min(self.learning_rates) <= 0:
            raise ValueError(f"learning_rates = {self.learning_rates}: every one must be greater than 0")
        if len(self.learning_rates) > 1 and not self.dev_seeds:
            raise ValueError("dev_seeds is missing: several learning_rates are compared on dev with these seeds")
        lists: dict[str, Sequence[float]] = {
            "learning_rates": self.learning_rates,
            "dev_seeds and test_seeds": self.dev_seeds + self.test_seeds,
        }
        for name, values in lists.items():
            if len(set(values)) < len(values):
                raise ValueError(f"{name} = {values}: a value occurs twice")
        must_differ(self.out, self.model, self.task)
        return self


def run(config: FinetuneConfig) -> dict:
    """Fine-tune, publish `config.out` and print a table. Returns report.json, with the key `seconds` added.

    The published model is the one that is best on dev. Chosen by its test score, it would look better than it is.
    On a CPU with the same number of threads the same configuration gives the same fingerprint. Raises TaskError if the
    task, the folder or a setting does not fit, or if the training diverges.
    """
    started = time.monotonic()
    versions = {name: library(name).__version__ for name in ("torch", "transformers", "peft", "accelerate")}
    task = read_task(config.task)
    texts = {"train": task.train, "dev": task.dev, "test": task.test}
    if config.labels is not None:
        texts["train"] = stratified(task.train, config.labels, config.labels_seed)
    model_folder(config.model)
    with publish(Path(config.out), "finetune", TaskError, config) as folder, quiet():
        base = identity(config.model)
        tokenizer = open_tokenizer(config.model, config.max_length)
        rows, truncated = {}, {}
        for name, examples in texts.items():
            rows[name], truncated[name] = encode(examples, task.labels, tokenizer, config.max_length)
        rank = config.lora_rank if config.method == "lora" else None
        start = FinetuneStart(config.model, task.labels, config.init, config.dropout, rank)
        report = {
            "method": config.method,
            "init": config.init,
            "examples": {"available": len(task.train)} | {name: len(examples) for name, examples in texts.items()},
            "labels": task.labels,
            "truncated": truncated,
            "also_in_train": {name: _overlap(texts["train"], texts[name]) for name in ("dev", "test")},
            **check(start),
            "baselines": {
                "majority": scores.majority(texts["train"], task.test),
                "naive_bayes": scores.naive_bayes(texts["train"], task.test),
            },
        }
        _announce(config, texts, report)
        best, found = _search(config, start, tokenizer, rows, folder)
        report |= found
        index = _index(config, task, base)
        report["twins"] = compare.compared(Path(config.out), index, report)
        report["said"] = _verdicts(report, config.learning_rates)
        _write(folder, config, tokenizer, best, report, [example.label for example in task.test], base)
        seconds = round(time.monotonic() - started, 1)
        index["recorded"] |= {**versions, "seconds": seconds}
        write_index(folder, index, recorded=("report.json",))
    _print(config, report, seconds)
    return report | {"seconds": seconds}


def _announce(config: FinetuneConfig, texts: dict[str, list[Example]], report: dict) -> None:
    """Print the facts known before the first training: classes, head, weights, truncated and shared texts."""
    print(f"{config.task}: {len(report['labels']):,} classes", *class_lines(texts), sep="\n")
    weights, where = report["weights"], "drawn at random" if config.init == "random" else f"from {config.model}"
    head = (
        "the folder's head is continued, as it has the same labels" if report["head"] == "continued" else "a new head"
    )
    print(f"{weights['trained']:,} of {weights['all']:,} weights are trained, {where}; {head}")
    for line in _text_notes(report):
        print(line)
    sys.stdout.flush()


def _text_notes(report: dict) -> list[str]:
    """Lines about texts that were cut, and about dev and test texts that train has too: accuracies show neither."""
    lines, examples = [], report["examples"]
    if any(report["truncated"].values()):
        shares = (f"{count:,} of {examples[name]:,} {name}" for name, count in report["truncated"].items())
        lines.append(f"cut to max_length: {', '.join(shares)} texts")
    if any(report["also_in_train"].values()):
        shares = (f"{count:,} of {examples[name]:,} {name}" for name, count in report["also_in_train"].items())
        lines.append(f"also in train, word for word: {', '.join(shares)} texts")
    return lines


def _verdicts(report: dict, rates: list[float]) -> list[str]:
    """Lines about results that a reader of the table could miss."""
    lines, test, baselines = [], report["test"], report["baselines"]
    levels = {"naive Bayes": baselines["naive_bayes"], "the majority class": baselines["majority"]}
    name, level = max(levels.items(), key=lambda found: found[1])
    if test["accuracy"] < level:
        lines.append(f"worse than {name}: {_percent(test['accuracy'])} where {name} has {_percent(level)}")
    elif test["interval95"][0] <= level:
        low, high = map(_percent, test["interval95"])
        lines.append(f"not clearly better than {name}, {_percent(level)}: the 95 % interval is {low} to {high}")
    if len(rates) > 1 and report["learning_rate"] in (min(rates), max(rates)):
        which = "smallest" if report["learning_rate"] == min(rates) else "largest"
        other = "smaller" if which == "smallest" else "larger"
        lines.append(f"the chosen rate {report['learning_rate']:g} is the {which} tried: a {other} one may be better")
    return lines + [twin["said"] for twin in report["twins"]]


@dataclass(frozen=True)
class _Fitted:
    """A trained model with its accuracies."""

    model: "PreTrainedModel | PeftModel"
    seed: int
    dev: float
    test: float
    answers: np.ndarray  # (examples,) int64: the class that the model gives each test example


def _search(
    config: FinetuneConfig,
    start: FinetuneStart,
    tokenizer: "PreTrainedTokenizerBase",
    rows: dict[str, list[Row]],
    scratch: Path,
) -> tuple[_Fitted, dict]:
    """Choose a rate on dev if there are several, and train it with each test seed.

    Returns the model that is best on dev, and the scores of all.
    """
    schedule = Schedule(config.epochs, config.batch, config.warmup_share, config.weight_decay)
    rates, dev_seeds = config.learning_rates, config.dev_seeds if len(config.learning_rates) > 1 else []
    trainings = len(rates) * len(dev_seeds) + len(config.test_seeds)
    begun = 0
    with progress("fine-tuning", "steps", trainings * schedule.steps(len(rows["train"]))) as advance:

        def train(rate: float, seed: int) -> "PreTrainedModel | PeftModel":
            nonlocal begun
            begun += 1
            which = f"training {begun} of {trainings}, "

            def step(steps: int, note: str = "") -> None:
                advance(steps, note and which + note)

            model = build(start, seed)
            fit(model, tokenizer, rows["train"], schedule, rate, seed, scratch, step)
            return model

        def on_dev(model: "PreTrainedModel | PeftModel") -> float:
            return accuracy(answers(model, tokenizer, rows["dev"]), rows["dev"])

        dev: list[dict] = []
        for rate in rates if dev_seeds else ():
            by_seed = [on_dev(train(rate, seed)) for seed in dev_seeds]
            dev.append({"learning_rate": rate, "accuracy": fmean(by_seed), "by_seed": by_seed})
        rate = max(dev, key=lambda tried: tried["accuracy"])["learning_rate"] if dev else rates[0]
        test: list[dict] = []
        best: _Fitted | None = None
        for seed in config.test_seeds:
            model = train(rate, seed)
            given = answers(model, tokenizer, rows["test"])
            fitted = _Fitted(model, seed, on_dev(model), accuracy(given, rows["test"]), given)
            test.append({"seed": seed, "accuracy": fitted.test, "dev": fitted.dev})
            if best is None or fitted.dev > best.dev:
                best = fitted
    assert best is not None, "a configuration has at least one test seed"
    found = {"learning_rate": rate, "dev": dev, "test": _on_test(test, len(rows["test"]))}
    return best, found | {"published_seed": best.seed}


def _on_test(by_seed: list[dict], examples: int) -> dict:
    """The section `test` of the report: the mean accuracy of all seeds, and its interval."""
    accuracies = [fitted["accuracy"] for fitted in by_seed]
    return {
        "accuracy": fmean(accuracies),
        "interval95": scores.interval95(accuracies, examples),
        "interval_covers": "test examples and training seeds" if len(by_seed) > 1 else "test examples, one seed",
        "by_seed": by_seed,
    }


def _overlap(train: Sequence[Example], others: Sequence[Example]) -> int:
    """The number of `others` with exactly the texts of a training example."""
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
    """Write all files of the folder except its index."""
    _copy_tokenizer(Path(config.model), tokenizer, folder)
    best.model.to("cpu").save_pretrained(folder)
    write_json(folder / "report.json", report)
    labels = report["labels"]
    with open(folder / "predictions.jsonl", "w", encoding="utf-8") as file:
        for label, answer in zip(gold, best.answers, strict=True):
            print(json.dumps({"label": label, "predicted": labels[answer]}, ensure_ascii=False), file=file)
    card = {"full": FULL_CARD, "lora": LORA_CARD}[config.method] + REST
    text = card.format(base=base, labels=dict(enumerate(labels)), max_length=config.max_length, accuracy=best.test)
    (folder / "README.md").write_text(text, encoding="utf-8")  # replaces the template that peft writes


def _copy_tokenizer(base: Path, tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """Copy the tokenizer files of the base unchanged, because its certificate is about these files.

    `save_pretrained` would write into them the truncation of the last call, and a class that transformers 4 does not
    know.
    """
    for name in {*TOKENIZER_FILES, *tokenizer.vocab_files_names.values()}:
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)


def _index(config: FinetuneConfig, task: Task, base: str) -> dict:
    places = {"model": config.model, "task": config.task}
    return {
        "stage": "finetune",
        "base": base,
        "task": task.files,
        "options": config.model_dump(mode="json", exclude={"out", "replace", *places}),
        "recorded": places,
    }


def _print(config: FinetuneConfig, report: dict, seconds: float) -> None:
    start = "" if config.init == "pretrained" else ", random start"
    title = f"{Path(config.task).name}: {config.method}{start}, {report['examples']['train']:,} labels, {seconds:.0f} s"
    rows: list[tuple[str, str, str] | None] = []
    for tried in report["dev"]:
        chosen = ", chosen" if tried["learning_rate"] == report["learning_rate"] else ""
        rows.append((f"dev, rate {tried['learning_rate']:g}{chosen}", _percent(tried["accuracy"]), ""))
    test = report["test"]
    seeds = len(test["by_seed"])
    mean = "one seed" if seeds == 1 else f"mean of {seeds} seeds"
    if not report["dev"]:
        on_dev = fmean(fitted["dev"] for fitted in test["by_seed"])
        rows.append((f"dev, rate {report['learning_rate']:g}, {mean}", _percent(on_dev), ""))
    rows.append(None)
    rows.append(("test, majority class", _percent(report["baselines"]["majority"]), ""))
    rows.append(("test, naive Bayes", _percent(report["baselines"]["naive_bayes"]), ""))
    interval = " to ".join(map(_percent, test["interval95"]))
    rows.append((f"test, {mean}", _percent(test["accuracy"]), interval))
    tables.show(("", "accuracy %", "95 % interval"), rows, title=title)
    for line in (*_text_notes(report), *report["said"]):
        print(line)
    print(f"{config.out}: the model of seed {report['published_seed']}, the best of them on dev", flush=True)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
