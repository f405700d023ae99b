"""Checkpoints: whole fp32 tensors by name, independent of stage, rank count and engine.

    step_00000400/
      weights.safetensors      fp32 master weights, named as in transformer.py
      exp_avg.safetensors      the optimizer's state for each weight, one file for each kind: here AdamW's moments
      exp_avg_sq.safetensors
      config.yaml              the resolved configuration of the run
      index.json               step, tokens, fingerprints of shards and tokenizer, world; written last

A kind of tensors that takes more than PART_BYTES is divided into several files, `weights-00001-of-00003.safetensors`
and so on. The division follows from the shapes alone, never from the number of ranks.

Every engine saves and restores this one form. From the same files a run continues bit by bit on the same ranks, or on
another ZeRO stage or number of ranks. The state of random generators and of the loader is not stored, because both are
functions of the step.
"""

import hashlib
import json
import math
import os
import re
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import FileIO
from itertools import zip_longest
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pretrain.errors import ResumeError, UserError, refusal
from pretrain.storage.files import digest, finished
from pretrain.storage.index import INDEX, check_sizes, intact, listed, read_index, write_index
from pretrain.tokenizer import Tokenizer
from pretrain.training.engine.engine import Engine
from pretrain.training.engine.peers import Peers
from pretrain.training.watch.log import say

CONFIG = "config.yaml"
STEP = re.compile(r"step_(\d{8,})")
TENSORS = re.compile(r"([a-z]\w*?)(-\d{5}-of-\d{5})?\.safetensors")
PART_BYTES = 4 << 30  # the most bytes of one file; a larger tensor has a file of its own
CHUNK_BYTES = 8 << 20  # bytes that are written and then hashed, while they are still in the processor's cache
AHEAD = 2  # tensors that wait in memory for the writing thread of a rank

Shapes = dict[str, tuple[int, ...]]


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


def publish(run: Path, state: TrainState, engine: Engine, peers: Peers, config_yaml: str, identity: dict) -> Path:
    """Write checkpoint `state.step` of `run`; a collective. Whenever a process dies, it is either complete or absent.

    Rank i modulo the number of ranks writes file i, so several files are written at the same time. Rank 0 collects
    their checksums, writes the index and renames the folder. Raises ResumeError on every rank when one rank cannot
    write.
    """
    folder = folder_of(run, state.step)
    aside = folder.with_name(f".{folder.name}.tmp")
    speaks = peers.world.speaks
    try:
        with peers.one_fate(), explained(folder):
            if speaks:
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir(parents=True)
        with peers.one_fate(), explained(folder):
            written = _write(aside, engine, peers)
        known = {name: entry for found in peers.share(written) for name, entry in found.items()}
        with peers.one_fate(), explained(folder):
            if speaks:
                index = {"stage": "checkpoint", **vars(state), **identity}
                recorded = identity.get("recorded", {}) | {
                    "world": peers.world.size,
                    "engine": engine.name,
                    "torch": torch.__version__,
                }
                _complete(aside, folder, {**index, "recorded": recorded}, config_yaml, known)
    except BaseException:
        if speaks:
            shutil.rmtree(aside, ignore_errors=True)  # an unusable checkpoint must not fill the disk
        raise
    return folder


def _write(aside: Path, engine: Engine, peers: Peers) -> dict[str, dict]:
    """Write this rank's files of a checkpoint into `aside`, and return their digests by name; a collective.

    Each tensor is gathered on every rank, and a thread of one rank writes it while the next tensor is gathered. Before
    each tensor the ranks meet in the group of `peers`. There they wait for a rank with a slow disk; a collective of the
    engine would end such a wait after the time limit of a step.
    """
    files, world = _files(aside, engine.shapes(), engine.kinds), peers.world
    mine = {key: file for number, (key, file) in enumerate(files.items()) if number % world.size == world.rank}
    behind: deque[Future] = deque()
    failure: BaseException | None = None
    with ThreadPoolExecutor(max_workers=1) as writer:
        for kind, part, name in _alternating(files):
            if peers.any(failure is not None):
                break
            tensor = engine.whole(kind, name)
            if (kind, part) in mine:
                behind.append(writer.submit(mine[kind, part].write, tensor))
            while len(behind) > AHEAD:
                failure = failure or behind.popleft().exception()
    failures = [failure, *(future.exception() for future in behind)]
    for file in mine.values():
        file.close()
    for failure in filter(None, failures):
        raise failure
    return {file.path.name: file.digest for file in mine.values() if file.digest}


def _files(folder: Path, shapes: Shapes, kinds: tuple[str, ...]) -> dict[tuple[str, int], "_File"]:
    """The files of a checkpoint by kind and part. Each part has consecutive weights, in the order of the model."""
    parts: list[Shapes] = [{}]
    size = 0
    for name, shape in shapes.items():
        size += (nbytes := 4 * math.prod(shape))
        if size > PART_BYTES and parts[-1]:
            parts.append({})
            size = nbytes
        parts[-1][name] = shape
    return {
        (kind, part): _File(folder / f"{_name(kind, part, len(parts))}.safetensors", parts[part])
        for part in range(len(parts))
        for kind in kinds
    }


def _name(kind: str, part: int, parts: int) -> str:
    """The name of a file, without its suffix."""
    return kind if parts == 1 else f"{kind}-{part + 1:05d}-of-{parts:05d}"


def _alternating(files: dict[tuple[str, int], "_File"]) -> Iterator[tuple[str, int, str]]:
    """Every tensor as (kind, part, name): first the first tensor of each file, then the second of each, and so on.

    In this order all files are written at the same time.
    """
    for names in zip_longest(*(file.shapes for file in files.values())):
        for (kind, part), name in zip(files, names, strict=True):
            if name is not None:
                yield kind, part, name


class _File:
    """One safetensors file, written and hashed tensor by tensor in the order of `shapes`.

    The writer of safetensors needs all tensors in memory, and its file must be read again to be hashed. It took 3.3 CPU
    seconds a GB, and this class takes 1.5 (medians of four). The format: the length of the header in eight bytes, the
    header as JSON, and the tensors one after another.
    """

    def __init__(self, path: Path, shapes: Shapes):
        self.path, self.shapes = path, shapes
        self.digest: dict | None = None  # None until the file is complete
        self._left = len(shapes)
        self._file: FileIO | None = None
        self._hash, self._size = hashlib.sha256(), 0

    def write(self, tensor: Tensor) -> None:
        """Append the next tensor. After the last one, push the file to disk and close it."""
        if self._file is None:
            self._file = open(self.path, "wb", buffering=0)
            self._append(self._file, memoryview(_header(self.shapes)))
        self._append(self._file, tensor.contiguous().numpy().data.cast("B"))
        self._left -= 1
        if not self._left:
            os.fsync(self._file.fileno())
            self.close()
            self.digest = {"bytes": self._size, "sha256": self._hash.hexdigest()}

    def _append(self, file: FileIO, data: memoryview) -> None:
        while data:
            written = file.write(data[:CHUNK_BYTES])
            self._hash.update(data[:written])
            self._size, data = self._size + written, data[written:]

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _header(shapes: Shapes) -> bytes:
    """The beginning of a safetensors file: the length of the header, and the header."""
    entries, begin = {}, 0
    for name, shape in shapes.items():
        end = begin + 4 * math.prod(shape)
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of eight bytes
    return len(text).to_bytes(8, "little") + text


def _complete(aside: Path, folder: Path, index: dict, config_yaml: str, known: dict[str, dict]) -> None:
    """Rank 0: add the configuration and the index to the files of all ranks, and give the folder its name."""
    for name, entry in known.items():
        path = aside / name
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            raise ResumeError(
                "another rank wrote a file that rank 0 does not see",
                f"{path} should have {entry['bytes']:,} bytes",
                "out must be on a file system that all nodes share",
            )
    with finished(aside / CONFIG) as file:
        file.write(config_yaml.encode())
    write_index(aside, index, recorded=(CONFIG,), known=known)
    _sync(aside)
    if folder.exists():  # it is incomplete: the run would have continued from a complete one
        old = folder.with_name(f".{folder.name}.old")
        folder.rename(old)
        shutil.rmtree(old, ignore_errors=True)
    aside.rename(folder)
    _sync(folder.parent)


def _sync(folder: Path) -> None:
    """Push the names in a folder to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


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

    def tensors(self) -> Callable[[str, str], Tensor]:
        """`load(kind, name)` returns a whole fp32 tensor, memory-mapped. `kind`: "weights" or an optimizer's state."""
        files = self._files()

        def load(kind: str, name: str) -> Tensor:
            if (kind, name) not in files:
                raise ResumeError(f"{self.folder} has no {kind} of {name}")
            return files[kind, name].get_tensor(name)

        return load

    def weights(self) -> dict[str, Tensor]:
        """Every weight by name, in fp32."""
        return {name: file.get_tensor(name) for (kind, name), file in self._files().items() if kind == "weights"}

    def _files(self) -> dict[tuple[str, str], safe_open]:
        """The open file of each tensor, by its kind and name."""
        files: dict[tuple[str, str], safe_open] = {}
        for path in self.index["files"]:
            found = TENSORS.fullmatch(path)
            if found is None:
                continue
            try:
                file = safe_open(self.folder / path, "pt")
            except SafetensorError as error:
                raise ResumeError(f"{self.folder / path} cannot be read", str(error)) from None
            files |= {(found[1], name): file for name in file.keys()}  # noqa: SIM118 (not a dict)
        return files


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
