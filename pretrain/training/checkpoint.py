"""Checkpoints: whole fp32 tensors by name, independent of stage, rank count and engine.

    step_00000400/
      weights.safetensors      fp32 master weights, named as in transformer.py
      exp_avg.safetensors      the optimizer's state for each weight, one file for each kind: here AdamW's moments
      exp_avg_sq.safetensors
      config.yaml              the resolved configuration of the run
      index.json               step, tokens, fingerprints of shards and tokenizer, world; written last

A kind of tensors that takes more than 4 GiB is divided into several files, `weights-00001-of-00003.safetensors` and so
on. The division follows from the shapes alone, never from the number of ranks. saving.py writes a checkpoint.

Every engine saves and restores this one form. From the same files a run continues bit by bit on the same ranks, or on
another ZeRO stage or number of ranks. The state of random generators and of the loader is not stored, because both are
functions of the step.
"""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from safetensors import SafetensorError, safe_open
from torch import Tensor

from pretrain.errors import ResumeError, UserError, refusal
from pretrain.storage.files import digest
from pretrain.storage.index import INDEX, check_sizes, intact, listed, read_index
from pretrain.tokenizer import Tokenizer
from pretrain.training.watch.log import say

CONFIG = "config.yaml"
STEP = re.compile(r"step_(\d{8,})")
TENSORS = re.compile(r"([a-z]\w*?)(-\d{5}-of-\d{5})?\.safetensors")


class Load(Protocol):
    """Reads tensors of a checkpoint. `kind`: "weights" or an optimizer's state; `name`: that of the weight."""

    def __call__(self, kind: str, name: str, run: slice | None = None) -> Tensor:
        """The whole fp32 tensor, memory-mapped, or the numbers of a `run` of it when it is flat, as a copy."""


@dataclass(frozen=True)
class TrainState:
    """The position of a run: it has done `step` optimizer steps."""

    step: int = 0
    steps_applied: int = 0  # the optimizer's own count: its steps less the skipped ones
    adam_began: int = 0  # the step at which the optimizer began: 0, or the step at which a branch began it anew

    @property
    def skipped(self) -> int:
        """The number of steps without a finite gradient since the optimizer began."""
        return self.step - self.adam_began - self.steps_applied

    def next(self, applied: bool) -> "TrainState":
        """The state after one more step. `applied`: whether its gradient was finite."""
        return replace(self, step=self.step + 1, steps_applied=self.steps_applied + applied)


def folder_of(run: Path, step: int) -> Path:
    """The folder of the checkpoint of a step."""
    return run / "checkpoints" / f"step_{step:08d}"


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn an error of the operating system while `path` is written into a ResumeError that says what to do."""
    try:
        yield
    except OSError as error:
        undone = f"{path} was not written"
        raise ResumeError(*(refusal(error, undone) or (undone, str(error), "start again"))) from None


def sweep(run: Path, state: TrainState) -> None:
    """Remove the remains of killed saves: hidden folders, and folders newer than `state` without an index.

    A folder with an index stays, even if one of its files is missing or cut, because that file may be copied again.
    """
    for leftover in (run / "checkpoints").glob(".step_*"):
        shutil.rmtree(leftover, ignore_errors=True)
    for folder in _numbered(run):
        if _step(folder) > state.step and not (folder / INDEX).exists():
            say(f"removing {folder}: not complete, it has no {INDEX}")
            shutil.rmtree(folder, ignore_errors=True)


def prune(run: Path, keep: int, keep_every: int = 0) -> None:
    """Remove all but the `keep` newest complete checkpoints.

    With `keep_every` the first checkpoint at or after each multiple of that many steps also stays.
    """
    complete = [folder for folder in _numbered(run) if _fault(folder) is None]
    milestones: dict[int, Path] = {}
    for folder in complete:
        if keep_every and _step(folder) >= keep_every:
            milestones.setdefault(_step(folder) // keep_every, folder)
    for folder in complete[:-keep]:
        if folder not in milestones.values():
            shutil.rmtree(folder, ignore_errors=True)


def newest(run: Path, speak: bool = True, before: int | None = None) -> Path | None:
    """The newest complete checkpoint of a run, or the newest one `before` a step.

    An incomplete checkpoint (no index, a file missing or cut) is passed over. A checkpoint of another version raises
    ResumeError: passing over it would lose its steps.
    """
    for folder in reversed(_numbered(run)):
        if before is not None and _step(folder) >= before:
            continue
        fault = _fault(folder)
        if fault is None:
            return folder
        if intact(folder / INDEX):
            _read(folder)  # raises if it is of another version
        if speak:
            say(f"passing over {folder}: {fault}")
    return None


class Checkpoint:
    """A complete checkpoint, opened for reading.

    Every byte of it is hashed once, which takes 1.1 CPU seconds a GB (measured on a Xeon of 2.8 GHz). Each of several
    ranks hashes only its share of the files (`rank` of `ranks`), so the ranks must check afterwards that none failed.
    """

    def __init__(self, folder: Path | str, rank: int = 0, ranks: int = 1):
        self.folder = Path(folder)
        self.index = _read(self.folder)
        check_sizes(self.folder, self.index, ResumeError)
        entries = listed(self.index)
        altered = [
            f"{name}: altered, its SHA-256 differs"
            for name in sorted(entries, key=lambda name: (entries[name]["bytes"], name))[rank::ranks]
            if digest(self.folder / name)["sha256"] != entries[name]["sha256"]
        ]
        if altered:
            remedy = f"remove {self.folder} to use the checkpoint before it"
            raise ResumeError(f"{self.folder} was altered after it was made", *altered, remedy)
        self.state = TrainState(self.index["step"], self.index["steps_applied"], self.index.get("adam_began", 0))
        self.config_text = (self.folder / CONFIG).read_text(encoding="utf-8")

    def check_tokenizer(self, tokenizer: Tokenizer, error: type[UserError]) -> None:
        """Raise `error` unless the run was trained with `tokenizer`."""
        if tokenizer.fingerprint != self.index["tokenizer"]:
            raise error(
                "this checkpoint was trained with another tokenizer",
                f"{self.folder / INDEX} says {self.index['tokenizer'][:12]}…, "
                f"{tokenizer.folder} is {tokenizer.fingerprint[:12]}…",
                "point tokenizer= at the folder its shards were built with",
            )

    def tensors(self) -> Load:
        """The function that reads tensors. Only the pages of a file that hold the wanted numbers are read.

        A file is open only during a call: pages of an open file would count as memory of this process.
        """
        files = {key: path for path, keys in self._names() for key in keys}

        def load(kind: str, name: str, run: slice | None = None) -> Tensor:
            if (kind, name) not in files:
                raise ResumeError(f"{self.folder} has no {kind} of {name}")
            with safe_open(files[kind, name], "pt") as file:
                tensor = file.get_tensor(name)
            return tensor if run is None else tensor.view(-1)[run].clone()

        return load

    def weights(self) -> dict[str, Tensor]:
        """Every weight by name, in fp32, memory-mapped."""
        found: dict[str, Tensor] = {}
        for path, keys in self._names():
            with safe_open(path, "pt") as file:
                found |= {name: file.get_tensor(name) for kind, name in keys if kind == "weights"}
        return found

    def _names(self) -> Iterator[tuple[Path, list[tuple[str, str]]]]:
        """Each file of tensors, with the kind and the name of its tensors."""
        for path in self.index["files"]:
            found = TENSORS.fullmatch(path)
            if found is None:
                continue
            try:
                with safe_open(self.folder / path, "pt") as file:
                    yield self.folder / path, [(found[1], name) for name in file.keys()]  # noqa: SIM118 (not a dict)
            except SafetensorError as error:
                raise ResumeError(f"{self.folder / path} cannot be read", str(error)) from None


def steps_of(run: Path) -> list[int]:
    """The steps of a run's complete checkpoints."""
    return [_step(folder) for folder in _numbered(run) if _fault(folder) is None]


def resolve(path: Path | str) -> Path:
    """The checkpoint folder that `path` names: itself, or the newest one of a run folder. Raises ResumeError."""
    path = Path(path)
    if (path / INDEX).is_file():
        return path
    folder = newest(path)
    if folder is None:
        state = "no complete checkpoint in it" if path.is_dir() else "no such folder"
        raise ResumeError(f"{path}: {state}", "expected a run folder or one of its checkpoints/step_…")
    return folder


def before(folder: Path, count: int) -> list[Path]:
    """The `count` newest complete checkpoints of a run up to the checkpoint `folder`, in the order of their steps.

    Raises ResumeError if there are fewer.
    """
    run = folder.resolve().parent.parent
    found = [path for path in _numbered(run) if _fault(path) is None and _step(path) <= _step(folder.resolve())]
    if len(found) < count:
        raise ResumeError(
            f"{run} has too few checkpoints to average {count}",
            f"complete up to {folder.name}: {', '.join(path.name for path in found) or 'none'}",
            "average fewer, or train with a larger checkpoint.keep or with checkpoint.keep_every",
        )
    return found[-count:]


def _read(folder: Path) -> dict:
    """The index of a checkpoint. Raises ResumeError when it is missing, damaged or of another version."""
    return read_index(folder, ResumeError, "launch/pretrain.py CONFIG.yaml", stage="checkpoint")


def _fault(folder: Path) -> str | None:
    """The reason why a checkpoint is incomplete, judged by its index and the sizes of its files; None: complete."""
    try:
        check_sizes(folder, _read(folder), ResumeError)
    except ResumeError as error:
        return error.what
    return None


def _numbered(run: Path) -> list[Path]:
    """The checkpoint folders of a run, complete or not, in the order of their steps."""
    found = [path for path in (run / "checkpoints").glob("step_*") if STEP.fullmatch(path.name)]
    return sorted(found, key=_step)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))
