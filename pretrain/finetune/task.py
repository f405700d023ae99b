"""A classification task: a folder with train.jsonl, dev.jsonl and test.jsonl.

One line is one example, `{"text": …, "label": …}` and, for pairs, `"text_pair"`; other keys are left alone. Labels are
strings, and the classes are the labels of train, sorted.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pretrain import folders
from pretrain.errors import TaskError

SPLITS = ("train", "dev", "test")
FORM = 'a line is {"text": "…", "label": "…"}, for pairs with "text_pair": "…"'


@dataclass(frozen=True)
class Example:
    text: str
    text_pair: str | None
    label: str
    line: int  # in its file


@dataclass(frozen=True)
class Task:
    train: list[Example]
    dev: list[Example]
    test: list[Example]
    labels: list[str]
    files: dict[str, dict]  # of each split: size and SHA-256

    @property
    def pairs(self) -> bool:
        return self.train[0].text_pair is not None


def read_task(folder: Path | str) -> Task:
    """Read and check all three files. Raises TaskError naming file and line."""
    folder = Path(folder)
    if not folder.is_dir():
        raise TaskError("no such task folder", f"looked for: {folder}", f"it needs {_names()}")
    paths = {split: folder / f"{split}.jsonl" for split in SPLITS}
    missing = [path.name for path in paths.values() if not path.is_file()]
    if missing:
        raise TaskError(f"{folder} lacks {', '.join(missing)}", f"a task has {_names()}")
    splits = {split: list(_examples(path)) for split, path in paths.items()}
    empty = [str(path) for split, path in paths.items() if not splits[split]]
    if empty:
        raise TaskError("a task file holds no example", *empty, FORM)
    labels = sorted({example.label for example in splits["train"]})
    if len(labels) == 1:
        raise TaskError(
            "a classification task needs at least two classes",
            f"{paths['train']} has only {labels[0]!r}",
            "add examples",
        )
    for split, path in paths.items():
        _check(path, splits[split], set(labels), pairs=splits["train"][0].text_pair is not None)
    return Task(**splits, labels=labels, files={path.name: folders.digest(path) for path in paths.values()})


def stratified(examples: list[Example], count: int, seed: int) -> list[Example]:
    """`count` examples in file order, the classes as near to their shares as whole numbers allow, at least one of each.

    Which ones is decided by a hash of seed and text: reordering the file or adding lines leaves most choices alone, and
    within a class a smaller choice is part of a larger one. Raises TaskError when `count` cannot be had.
    """
    by_label: dict[str, list[int]] = {}
    for position, example in enumerate(examples):
        by_label.setdefault(example.label, []).append(position)
    if count > len(examples):
        raise TaskError(
            f"labels = {count:,}, but train.jsonl has {len(examples):,} examples", "lower labels, or leave it out"
        )
    if count < len(by_label):
        raise TaskError(
            f"labels = {count} is less than one example for each of {len(by_label)} classes", "raise labels"
        )
    exact = {label: count * len(positions) / len(examples) for label, positions in by_label.items()}
    quota = dict.fromkeys(by_label, 1)
    for _ in range(count - len(quota)):
        quota[max(quota, key=lambda label: exact[label] - quota[label])] += 1
    chosen = []
    for label, positions in by_label.items():
        chosen += sorted(positions, key=lambda position: _rank(examples[position], seed))[: quota[label]]
    return [examples[position] for position in sorted(chosen)]


def _rank(example: Example, seed: int) -> bytes:
    return hashlib.sha256(json.dumps([seed, example.text, example.text_pair]).encode()).digest()


def _examples(path: Path) -> Iterator[Example]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _example(line, path, number)


def _example(line: bytes, path: Path, number: int) -> Example:
    where = f"{path}, line {number}"
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise TaskError("a task file must be UTF-8", f"{where}, byte {error.start + 1} of the line") from None
    except json.JSONDecodeError as error:
        found = line.decode("utf-8").strip()[:80]
        problem = f"{where}, column {error.colno}: {error.msg}"
        raise TaskError("not valid JSON", problem, f"found: {found}", FORM) from None
    if not isinstance(value, dict):
        raise TaskError("an example is a JSON object", where, f"found: {str(value)[:80]}", FORM)
    for key in ("text", "label"):
        if key not in value:
            raise TaskError(f"an example has no {key}", where, f"found the keys: {', '.join(value) or 'none'}", FORM)
    for key in ("text", "text_pair", "label"):
        if key in value and not (isinstance(value[key], str) and value[key].strip()):
            raise TaskError(f"{key} must be a string that is not empty", where, f"found: {value[key]!r}", FORM)
    return Example(value["text"], value.get("text_pair"), value["label"], number)


def _check(path: Path, examples: list[Example], labels: set[str], pairs: bool) -> None:
    """What can only be judged beside train: the labels, and whether examples are pairs."""
    for example in examples:
        where = f"{path}, line {example.line}"
        if example.label not in labels:
            known = ", ".join(sorted(labels)[:10]) + (", …" if len(labels) > 10 else "")
            raise TaskError(
                f"the label {example.label!r} never occurs in train.jsonl", where, f"train has: {known}", "correct it"
            )
        if (example.text_pair is not None) != pairs:
            raise TaskError("text_pair is given for some examples only", where, "give it for all, or for none")


def _names() -> str:
    return ", ".join(f"{split}.jsonl" for split in SPLITS)
