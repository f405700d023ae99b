"""The records of a run: one log line an interval, two files of lines, TensorBoard. Only rank 0 writes them.

`metrics.jsonl` has one line for every step, with losses to the last bit and the digest of the batch: two runs are the
same run exactly when these lines agree. `evaluations.jsonl` has one line for every evaluation and corpus. TensorBoard
gets every series twice: `train/loss` over steps and `by_tokens/train_loss` over tokens. The latter have event files of
their own, because what a restart purges is counted in the x-axis of the whole file.

Records never end a run. A file that cannot be written is warned of once, and what should be in it is kept in memory
until it can be written again. Lines of `metrics.jsonl` that were damaged are removed when the run continues, with a
warning that names the file and the steps that are missing.
"""

import contextlib
import json
import math
import os
import statistics
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.training.watch.dashboard import event, event_file, first_events
from pretrain.training.watch.log import StepReport, say

if TYPE_CHECKING:
    from pretrain.training.watch.observer import Findings

JSONL = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"
FLAT_STEPS = 200  # the fewest that are compared before a loss is called flat
END_BYTES = 1 << 20  # of a file of metrics: about 4,000 steps


class Metrics:
    """The records of one run, continued after `step` steps: lines of later steps, of an earlier attempt, are removed.

    `before` are the recorded steps after step `since`: those of the log line that was not yet due. Evaluations after
    step `scored` are made again. The run's own steps begin after step `begun`: 0, or where it branched off another run.
    """

    def __init__(self, run: Path, step: int, tokens: int, since: int, scored: int, config_yaml: str, begun: int = 0):
        path = run / JSONL
        self._jsonl, self._evaluations = _Record(path), _Record(run / EVALUATIONS)
        self._steps = _Record(event_file(run / "tensorboard"), first_events(step + 1))
        self._tokens = _Record(event_file(run / "tensorboard" / "by_tokens"), first_events(tokens + 1))
        self.before: list[StepReport] = []
        self.scored = False  # whether step `scored` has been evaluated; its line "" is the last to be written
        kept, damaged = {}, 0
        try:
            for line, report in _lines(path):
                damaged += report is None
                if report is not None and report.step <= step:
                    kept[report.step] = line
                    self.before += [report] if report.step > since else []
            if path.exists():
                self._jsonl.replace(b"".join(kept[number] + b"\n" for number in sorted(kept)))
        except OSError as error:
            say(f"warning: {path} cannot be read: {error.strerror}; the training goes on")
        else:
            _warn_of_losses(path, damaged, range(begun + 1, step + 1), kept)
        self._repair_evaluations(scored)
        self.text("config", f"```yaml\n{config_yaml}```", step)

    def record(self, report: StepReport) -> None:
        """Every step, to metrics.jsonl."""
        self._jsonl.append(json.dumps(vars(report), allow_nan=False).encode() + b"\n")

    def found(self, findings: "Findings", step: int, tokens: int) -> None:
        """Record what an observer found."""
        if findings.values:
            self.scalars(findings.values, step, tokens)
        for corpus, record in findings.records.items():
            self._evaluation(step, corpus, record)
        for tag, text in findings.texts.items():
            self.text(tag, text, step)

    def _evaluation(self, step: int, corpus: str, scores: dict[str, float | int | None]) -> None:
        """The held-out scores of a corpus, or under "" of the mixture, to evaluations.jsonl."""
        values = {name: value if value is None or math.isfinite(value) else None for name, value in scores.items()}
        line = json.dumps({"step": step, "corpus": corpus, **values}, ensure_ascii=False, allow_nan=False)
        self._evaluations.append(line.encode() + b"\n")

    def _repair_evaluations(self, scored: int) -> None:
        """Remove damaged lines, those after step `scored`, and those of an evaluation of it that was not finished."""
        path = self._evaluations.path
        try:
            lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        except OSError as error:
            say(f"warning: {path} cannot be read: {error.strerror}; the training goes on")
            return
        found = [_evaluated(line) for line in lines]
        self.scored = (scored, "") in found
        last = scored if self.scored else scored - 1
        kept = [line for line, point in zip(lines, found, strict=True) if point and point[0] <= last]
        if len(kept) < len(lines):
            self._evaluations.replace(b"".join(kept))
        damaged = sum(not point and line.endswith(b"\n") for line, point in zip(lines, found, strict=True))
        if damaged:
            say(f"warning: {path}: {damaged} damaged line{'s'[: damaged != 1]} removed; the training goes on")

    def scalars(self, values: dict[str, float], step: int, tokens: int) -> None:
        """A point of each series; a value that is not finite is left out."""
        from torch.utils.tensorboard.summary import scalar

        values = {tag: value for tag, value in values.items() if math.isfinite(value)}
        self._steps.append(b"".join(event(scalar(tag, value), step) for tag, value in values.items()))
        tags = {f"by_tokens/{tag.replace('/', '_')}": value for tag, value in values.items()}
        self._tokens.append(b"".join(event(scalar(tag, value), tokens) for tag, value in tags.items()))

    def text(self, tag: str, text: str, step: int) -> None:
        from torch.utils.tensorboard.summary import text as summary

        self._steps.append(event(summary(tag, text), step))

    def sync(self) -> None:
        """Push the lines to disk: before a checkpoint is published, which a power cut leaves whole."""
        self._jsonl.sync()
        self._evaluations.sync()

    def close(self) -> None:
        for record in (self._jsonl, self._evaluations, self._steps, self._tokens):
            record.close()


class _Record:
    """A file that is only appended to. Whatever happens to it, the run goes on: it is warned of once.

    What could not be written is written with the next call; a file that was removed is begun again, with `head`.
    """

    def __init__(self, path: Path, head: bytes = b""):
        self.path, self._head = path, head
        self._file = None
        self._unwritten = b""
        self._warned = False

    def append(self, data: bytes) -> None:
        self._unwritten += data
        try:
            self._open()
            size = os.fstat(self._file.fileno()).st_size
            written = self._file.write(self._unwritten)
            if written < len(self._unwritten):  # the disk is full: no torn line stays
                os.ftruncate(self._file.fileno(), size)
                raise OSError("the disk is full")
            self._unwritten = b""
        except OSError as error:
            self._warn(f"cannot be written: {error.strerror or error}")

    def replace(self, data: bytes) -> None:
        """Give the file other contents; a kill here must not cost the old ones."""
        aside = self.path.with_name(f".{self.path.name}.tmp")
        try:
            aside.write_bytes(data)
            aside.rename(self.path)
        except OSError as error:
            self._warn(f"cannot be written: {error.strerror or error}")

    def sync(self) -> None:
        try:
            if self._file:
                os.fsync(self._file.fileno())
        except OSError as error:
            self._warn(f"cannot be synced: {error.strerror or error}")

    def close(self) -> None:
        with contextlib.suppress(OSError):
            if self._file:
                self._file.close()

    def _open(self) -> None:
        """Open the file, again if another has its name by now or none has."""
        if self._file:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                if os.path.samestat(os.fstat(self._file.fileno()), os.stat(self.path)):
                    return
            self._warn("was removed or replaced while the run wrote to it; it is begun again from here on")
            self.close()
            self._file = None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "ab", buffering=0)
        if self._head and not os.fstat(self._file.fileno()).st_size:
            self._file.write(self._head)

    def _warn(self, what: str) -> None:
        if not self._warned:
            say(f"warning: {self.path} {what}; the training goes on")
        self._warned = True


def reports(run: Path) -> list[StepReport]:
    """The recorded steps of a run; lines that are damaged are left out."""
    return [report for _, report in _lines(run / JSONL) if report is not None]


def flat_steps(run: Path) -> int:
    """Over how many of its last steps the training loss of a run has not fallen: half of all, or 0.

    It has fallen when its mean over the last quarter of the steps is below that of the quarter before by more than two
    standard errors of the difference. Of a healthy small run it is 5 to 15 of them after every 100 steps.
    """
    losses = [report.loss for report in reports(run) if report.loss is not None]
    quarter = len(losses) // 4
    if 2 * quarter < FLAT_STEPS:
        return 0
    before, last = losses[-2 * quarter : -quarter], losses[-quarter:]
    error = math.sqrt((statistics.variance(before) + statistics.variance(last)) / quarter)
    fallen = statistics.mean(before) - statistics.mean(last) > 2 * error
    return 0 if fallen else 2 * quarter


def last_step(run: Path) -> int | None:
    """The last step that a run has recorded, 0 if it has none; None where there is no file of metrics.

    Of a file of millions of lines only the end is read.
    """
    try:
        with open(run / JSONL, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - END_BYTES))
            lines = file.read().splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return next((report.step for report in map(_parsed, reversed(lines)) if report), 0)


def _lines(path: Path) -> Iterator[tuple[bytes, StepReport | None]]:
    """Each line of a file of metrics with the step it records, None if it is damaged.

    What a killed process left of its last line does not count. Raises OSError when the file cannot be read.
    """
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield line[:-1], _parsed(line)


def _parsed(line: bytes) -> StepReport | None:
    """The step that a line of metrics.jsonl records; None if the line is damaged."""
    try:
        values = json.loads(line)
        found = StepReport(**{field.name: values[field.name] for field in fields(StepReport)})
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    whole = all(type(number) is int and 0 < number < 2**63 for number in (found.step, found.tokens))
    real = all(type(number) is float for number in (found.lr, found.step_s, found.data_wait_s))
    perhaps = all(number is None or type(number) is float for number in (found.loss, found.grad_norm))
    if not (whole and real and perhaps and type(found.digest) is str):
        return None
    if found.loss is not None and not math.isfinite(found.loss):  # older versions wrote NaN
        return replace(found, loss=None)
    return found


def _evaluated(line: bytes) -> tuple[int, str] | None:
    """The step and the corpus that a line of evaluations.jsonl is of; None if the line is damaged."""
    try:
        values = json.loads(line)
        whole = type(values["step"]) is int and type(values["corpus"]) is str and "loss" in values
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return (values["step"], values["corpus"]) if whole and line.endswith(b"\n") else None


def _warn_of_losses(path: Path, damaged: int, steps: range, recorded: dict[int, bytes]) -> None:
    """One line that says what is wrong with a file of metrics that should have these `steps`, if anything is."""
    missing = [number for number in steps if number not in recorded]
    said = []
    if damaged:
        said.append(f"had {damaged} damaged line{'s'[: damaged != 1]}, now removed,")
    if missing:
        said.append(f"lacks step{'s'[: len(missing) != 1]} {_ranges(missing)}")
    if said:
        say(f"warning: {path} {' and '.join(said)}; the checkpoint is whole, and the training goes on")


def _ranges(numbers: list[int]) -> str:
    """`16 to 20, 31`, at most five of them."""
    begins = [number for number, before in zip(numbers, [None, *numbers], strict=False) if number - 1 != before]
    ends = [number for number, after in zip(numbers, [*numbers[1:], None], strict=True) if number + 1 != after]
    found = [f"{a} to {b}" if a < b else f"{a}" for a, b in zip(begins, ends, strict=True)]
    return ", ".join(found[:5]) + (f" and others, {len(numbers)} in all" if len(found) > 5 else "")
