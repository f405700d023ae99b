"""A classification task: a folder with train.jsonl, dev.jsonl and test.jsonl.

One line is one example, `{"text": …, "label": …}` and, for pairs, `"text_pair"`; other keys are ignored. Labels are
strings, and the classes are the labels of train, sorted.
"""

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pretrain.errors import TaskError

SPLITS = ("train", "dev", "test")
FORM = 'a line is {"text": "…", "label": "…"}, for pairs with "text_pair": "…"'


@dataclass(frozen=True)
class Example:
    """A labelled text, or a labelled pair of texts."""

    text: str
    text_pair: str | None  # None in a task of single texts
    label: str
    line: int  # its number in the file, from 1


@dataclass(frozen=True)
class Task:
    """The examples of all three files."""

    train: list[Example]
    dev: list[Example]
    test: list[Example]
    labels: list[str]  # the classes: the labels of train, sorted
    files: dict[str, dict]  # size and SHA-256 of each file, by name


def read_task(folder: Path | str) -> Task:
    """Read and check all three files. Raises TaskError naming file and line."""
    paths, contents = _contents(Path(folder))
    splits = {split: list(_examples(path, contents[split])) for split, path in paths.items()}
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
    _check_distinct(paths["train"], splits["train"])
    for split, path in paths.items():
        _check(path, splits[split], set(labels), pairs=splits["train"][0].text_pair is not None)
    return Task(**splits, labels=labels, files=_digests(paths, contents))


def class_lines(examples: dict[str, list[Example]], shown: int = 20) -> list[str]:
    """A table of the number of examples of each class in each split, the largest classes of train first."""
    counts = {split: Counter(example.label for example in found) for split, found in examples.items()}
    labels = sorted(counts["train"], key=lambda label: (-counts["train"][label], label))
    plain = (label if label.isprintable() else ascii(label) for label in labels[:shown])
    names = [label if len(label) <= 40 else f"{label[:39]}…" for label in plain]
    width = max(map(len, [*names, "class"]))
    lines = [f"  {'class':<{width}}" + "".join(f"{split:>9}" for split in counts)]
    for label, name in zip(labels, names, strict=False):
        lines.append(f"  {name:<{width}}" + "".join(f"{found[label]:>9,}" for found in counts.values()))
    return lines + ([f"  and {len(labels) - shown:,} smaller classes"] if len(labels) > shown else [])


def stratified(examples: list[Example], count: int, seed: int) -> list[Example]:
    """Choose `count` examples, in file order; each class keeps its share, rounded, and at least one example.

    A hash of seed and text chooses, so reordering the file or adding lines changes little of the choice. Within a
    class, a smaller choice is part of a larger one. Raises TaskError if `count` is larger than the number of examples
    or smaller than the number of classes.
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


def _contents(folder: Path) -> tuple[dict[str, Path], dict[str, bytes]]:
    """The path and the bytes of each split. Raises TaskError unless all can be read."""
    paths = {split: folder / f"{split}.jsonl" for split in SPLITS}
    try:
        if not folder.is_dir():
            raise TaskError("no such task folder", f"looked for: {folder}", f"it needs {_names()}")
        missing = [path.name for path in paths.values() if not path.is_file()]
        if missing:
            raise TaskError(f"{folder} lacks {', '.join(missing)}", f"add it: a task has {_names()}")
        return paths, {split: path.read_bytes() for split, path in paths.items()}
    except (OSError, ValueError) as error:  # no permission, a name that is too long, a NUL
        remedy = "set task to a folder that can be read"
        raise TaskError("the task cannot be read", f"{str(folder)!r:.200}: {error}", remedy) from None


def _digests(paths: dict[str, Path], contents: dict[str, bytes]) -> dict[str, dict]:
    """Size and SHA-256 of each file, computed from the bytes that the examples were read from."""
    return {
        paths[split].name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for split, data in contents.items()
    }


def _examples(path: Path, data: bytes) -> Iterator[Example]:
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            yield _example(line, path, number)


def _example(line: bytes, path: Path, number: int) -> Example:
    where = f"{path}, line {number}"
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        found = f"{where}, byte {error.start + 1} of the line: {error.object[error.start]:#04x}"
        raise TaskError("a task file must be UTF-8", found, "convert it: iconv -f … -t utf-8") from None
    except (ValueError, RecursionError) as error:
        found = line.decode("utf-8-sig").strip()[:80]
        raise TaskError("not valid JSON", f"{where}{_problem(error)}", f"found: {found}", FORM) from None
    if not isinstance(value, dict):
        raise TaskError("an example is a JSON object", where, f"found: {str(value)[:80]}", FORM)
    for key in ("text", "label"):
        if key not in value:
            found = ", ".join(value)[:200] or "none"
            raise TaskError(f"an example has no {key}", where, f"found the keys: {found}", FORM)
    for key in ("text", "text_pair", "label"):
        if key in value and not (isinstance(value[key], str) and value[key].strip()):
            raise TaskError(f"{key} must be a string that is not empty", where, f"found: {repr(value[key])[:80]}", FORM)
        if key in value:
            _check_scalar_values(key, value[key], where)
    return Example(value["text"], value.get("text_pair"), value["label"], number)


def _problem(error: ValueError | RecursionError) -> str:
    """Why a line is not JSON, for an error message, which has the place of the line before it."""
    if isinstance(error, json.JSONDecodeError):
        return f", column {error.colno}: {error.msg}"
    if isinstance(error, RecursionError):
        return ": it is nested too deeply to be read"
    return ": a number in it has more than 4,300 digits"  # the only other ValueError of json.loads


def _check_scalar_values(key: str, text: str, where: str) -> None:
    """Raise TaskError for a lone surrogate: JSON can write it (`\\ud800`), but it has no UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TaskError(
            f"{key} is not valid Unicode",
            f"{where}: character {error.start + 1} of {key} is half of a surrogate pair, {text[error.start]!a}",
            "repair or remove the line",
        ) from None


def _folded(label: str) -> str:
    """A label without capitals, wide forms (`Ａ`), composed forms (`é`) and doubled or outer white space."""
    return " ".join(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", label).casefold()).split())


def _check_distinct(path: Path, examples: list[Example]) -> None:
    """Raise TaskError if two labels differ only in white space, capitals or Unicode form: they are one class."""
    first: dict[str, Example] = {}
    for example in examples:
        other = first.setdefault(_folded(example.label), example)
        if other.label != example.label:
            raise TaskError(
                "two labels differ only in spaces, capitals or Unicode form",
                f"{path}, line {other.line}: {other.label!a}",
                f"{path}, line {example.line}: {example.label!a}",
                "write one class in one way, or choose names that differ in more",
            )


def _check(path: Path, examples: list[Example], labels: set[str], pairs: bool) -> None:
    """Raise TaskError if a label does not occur in train, or if only some examples are pairs."""
    for example in examples:
        where = f"{path}, line {example.line}"
        if example.label not in labels:
            known = ", ".join(sorted(labels)[:10]) + (", …" if len(labels) > 10 else "")
            near = next((label for label in labels if _folded(label) == _folded(example.label)), None)
            raise TaskError(
                f"the label {example.label!r} never occurs in train.jsonl",
                where,
                f"train has: {known}",
                f"write it as there: {near!r}" if near else "correct it",
            )
        if (example.text_pair is not None) != pairs:
            raise TaskError("text_pair is given for some examples only", where, "give it for all, or for none")


def _names() -> str:
    return ", ".join(f"{split}.jsonl" for split in SPLITS)
