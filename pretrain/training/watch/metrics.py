"""The records of a run: two files of JSON lines, and TensorBoard. Only rank 0 writes them.

`metrics.jsonl` has one line for every step, with the loss to the last bit and the digest of the batch: two runs are the
same exactly when these lines agree. `evaluations.jsonl` has one line for every evaluation and corpus. TensorBoard gets
every series twice: `train/loss` over steps and `by_tokens/train_loss` over tokens. The latter have event files of their
own, because a restart removes points of a file by its x-axis.

Records never end a run. A file that cannot be written gives one warning, and its lines are kept in memory until it can
be written again. When a run continues, it removes damaged lines of `metrics.jsonl`, with a warning that names the file
and the missing steps.
"""

import contextlib
import json
import math
import os
import statistics
from collections.abc import Iterator
from dataclasses import fields, replace
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.training.watch.dashboard import event, event_file, first_events
from pretrain.training.watch.log import StepReport, say

if TYPE_CHECKING:
    from pretrain.training.watch.observer import Findings

JSONL = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"
FLAT_STEPS = 200  # the fewest steps over which a loss may be called flat
END_BYTES = 1 << 20  # bytes at the end of a file of metrics: about 4,000 steps


class Metrics:
    """The records of one run, continued after `step` steps. Lines of later steps, from an earlier attempt, are removed.

    `before` holds the recorded steps after step `since`: they belong to the next line of the log. Evaluations after
    step `scored` are made again. The run's own steps begin after step `begun`: 0, or the step at which it branched off
    another run.
    """

    def __init__(self, run: Path, step: int, tokens: int, since: int, scored: int, config_yaml: str, begun: int = 0):
        path = run / JSONL
        self._jsonl, self._evaluations = _Record(path), _Record(run / EVALUATIONS)
        self._steps = _Record(event_file(run / "tensorboard"), first_events(step + 1))
        self._tokens = _Record(event_file(run / "tensorboard" / "by_tokens"), first_events(tokens + 1))
        self.before: list[StepReport] = []
        self.scored = False  # whether step `scored` is evaluated: the line of the mixture, "", is written last
        kept: dict[int, bytes] = {}
        damaged = 0
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
        """Append a step to metrics.jsonl."""
        values = {name: value for name, value in vars(report).items() if name != "parts" or value}
        self._jsonl.append(json.dumps(values, allow_nan=False).encode() + b"\n")

    def found(self, findings: "Findings", step: int, tokens: int) -> None:
        """Record the findings of an observer."""
        if findings.values:
            self.scalars(findings.values, step, tokens)
        for corpus, record in findings.records.items():
            self._evaluation(step, corpus, record)
        for tag, text in findings.texts.items():
            self.text(tag, text, step)

    def _evaluation(self, step: int, corpus: str, scores: dict[str, float | int | None]) -> None:
        """Append the held-out scores of a corpus, or of the mixture under the name "", to evaluations.jsonl."""
        values = {name: value if value is None or math.isfinite(value) else None for name, value in scores.items()}
        line = json.dumps({"step": step, "corpus": corpus, **values}, ensure_ascii=False, allow_nan=False)
        self._evaluations.append(line.encode() + b"\n")

    def _repair_evaluations(self, scored: int) -> None:
        """Remove damaged lines, lines after step `scored`, and lines of an unfinished evaluation of that step."""
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
        """Add a point to each series. A value that is not finite is left out."""
        from torch.utils.tensorboard.summary import scalar

        values = {tag: value for tag, value in values.items() if math.isfinite(value)}
        self._steps.append(b"".join(event(scalar(tag, value), step) for tag, value in values.items()))
        tags = {f"by_tokens/{tag.replace('/', '_')}": value for tag, value in values.items()}
        self._tokens.append(b"".join(event(scalar(tag, value), tokens) for tag, value in tags.items()))

    def text(self, tag: str, text: str, step: int) -> None:
        """Add a text in Markdown."""
        from torch.utils.tensorboard.summary import text as summary

        self._steps.append(event(summary(tag, text), step))

    def sync(self) -> None:
        """Push the lines to disk, so that no power cut loses steps of a checkpoint. A thread calls it."""
        self._jsonl.sync()
        self._evaluations.sync()

    def close(self) -> None:
        for record in (self._jsonl, self._evaluations, self._steps, self._tokens):
            record.close()


class _Record:
    """A file that is only appended to. If it cannot be written, the run goes on and warns once.

    Data that could not be written are written with the next call. A file that was removed is begun again with `head`.
    """

    def __init__(self, path: Path, head: bytes = b""):
        self.path, self._head = path, head
        self._file: FileIO | None = None
        self._unwritten = b""
        self._warned = False

    def append(self, data: bytes) -> None:
        self._unwritten += data
        try:
            file = self._open()
            size = os.fstat(file.fileno()).st_size
            written = file.write(self._unwritten)
            if written < len(self._unwritten):  # the disk is full: remove the torn line
                os.ftruncate(file.fileno(), size)
                raise OSError("the disk is full")
            self._unwritten = b""
        except OSError as error:
            self._warn(f"cannot be written: {error.strerror or error}")

    def replace(self, data: bytes) -> None:
        """Replace the contents of the file. If the process is killed here, the old contents stay."""
        aside = self.path.with_name(f".{self.path.name}.tmp")
        try:
            aside.write_bytes(data)
            aside.rename(self.path)
        except OSError as error:
            self._warn(f"cannot be written: {error.strerror or error}")

    def sync(self) -> None:
        """Push the file to disk. It is opened for this alone, because another thread may close `_file` meanwhile."""
        try:
            with contextlib.suppress(FileNotFoundError), open(self.path, "rb") as file:
                os.fsync(file.fileno())
        except OSError as error:
            self._warn(f"cannot be synced: {error.strerror or error}")

    def close(self) -> None:
        with contextlib.suppress(OSError):
            if self._file:
                self._file.close()

    def _open(self) -> FileIO:
        """The open file. It is opened again if it was removed or if another file now has its name."""
        if self._file:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                if os.path.samestat(os.fstat(self._file.fileno()), os.stat(self.path)):
                    return self._file
            self._warn("was removed or replaced while the run wrote to it; it is begun again from here on")
            self.close()
            self._file = None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "ab", buffering=0)
        if self._head and not os.fstat(self._file.fileno()).st_size:
            self._file.write(self._head)
        return self._file

    def _warn(self, what: str) -> None:
        if not self._warned:
            say(f"warning: {self.path} {what}; the training goes on")
        self._warned = True


def reports(run: Path) -> list[StepReport]:
    """The recorded steps of a run; lines that are damaged are left out."""
    return [report for _, report in _lines(run / JSONL) if report is not None]


def evaluations(run: Path, step: int) -> dict[str, dict]:
    """The lines of evaluations.jsonl about `step`, by corpus. Empty if the file cannot be read."""
    try:
        lines = (run / EVALUATIONS).read_bytes().splitlines(keepends=True)
    except OSError:
        return {}
    found = ((_evaluated(line), line) for line in lines)
    return {point[1]: json.loads(line) for point, line in found if point and point[0] == step}


def flat_steps(run: Path) -> int:
    """The number of last steps in which the training loss of a run has not fallen: half of all steps, or 0.

    The loss has fallen if its mean over the last quarter of the steps is below that of the quarter before by more than
    two standard errors of the difference. In a healthy small run the difference is 5 to 15 standard errors after every
    100 steps.
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
    """The last step that a run has recorded; 0: none; None: there is no file of metrics.

    Only the end of the file is read, because it may have millions of lines.
    """
    try:
        with open(run / JSONL, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - END_BYTES))
            lines = file.read().splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return next((report.step for report in map(_parsed, reversed(lines)) if report), 0)


def _lines(path: Path) -> Iterator[tuple[bytes, StepReport | None]]:
    """Each line of a file of metrics with the step that it records, or with None if it is damaged.

    The torn last line of a killed process is passed over. Raises OSError when the file cannot be read.
    """
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield line[:-1], _parsed(line)


def _parsed(line: bytes) -> StepReport | None:
    """The step that a line of metrics.jsonl records; None if the line is damaged."""
    try:
        values = {"parts": {}} | json.loads(line)
        found = StepReport(**{field.name: values[field.name] for field in fields(StepReport)})
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    whole = all(type(number) is int and 0 < number < 2**63 for number in (found.step, found.tokens))
    real = all(type(number) is float for number in (found.lr, found.step_s, found.data_wait_s))
    perhaps = all(number is None or type(number) is float for number in (found.loss, found.grad_norm))
    parts = type(found.parts) is dict and all(type(number) is float for number in found.parts.values())
    if not (whole and real and perhaps and parts and type(found.digest) is str):
        return None
    if found.loss is not None and not math.isfinite(found.loss):  # older versions wrote NaN
        return replace(found, loss=None)
    return found


def _evaluated(line: bytes) -> tuple[int, str] | None:
    """The step and the corpus of a line of evaluations.jsonl; None if the line is damaged."""
    try:
        values = json.loads(line)
        whole = type(values["step"]) is int and type(values["corpus"]) is str and "loss" in values
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return (values["step"], values["corpus"]) if whole and line.endswith(b"\n") else None


def _warn_of_losses(path: Path, damaged: int, steps: range, recorded: dict[int, bytes]) -> None:
    """Warn if a file of metrics had damaged lines, or lacks some of `steps`."""
    missing = [number for number in steps if number not in recorded]
    said = []
    if damaged:
        said.append(f"had {damaged} damaged line{'s'[: damaged != 1]}, now removed,")
    if missing:
        said.append(f"lacks step{'s'[: len(missing) != 1]} {_ranges(missing)}")
    if said:
        say(f"warning: {path} {' and '.join(said)}; the checkpoint is whole, and the training goes on")


def _ranges(numbers: list[int]) -> str:
    """Numbers as ranges, `16 to 20, 31`: at most five ranges."""
    begins = [number for number, before in zip(numbers, [None, *numbers], strict=False) if number - 1 != before]
    ends = [number for number, after in zip(numbers, [*numbers[1:], None], strict=True) if number + 1 != after]
    found = [f"{a} to {b}" if a < b else f"{a}" for a, b in zip(begins, ends, strict=True)]
    return ", ".join(found[:5]) + (f" and others, {len(numbers)} in all" if len(found) > 5 else "")
