"""Write checkpoints while the training goes on: a save copies the state to memory, and a thread writes the copy.

    begin     the ranks copy the state, each the tensors of its own files                        training waits
    write     the thread of each rank writes, hashes and syncs its files                         training goes on
    advance   at the boundary of a step at which all ranks have written: rank 0 gets the checksums
    complete  the thread of rank 0 writes the index and renames the folder                       training goes on
    advance   at the boundary of a step at which rank 0 has done so: the checkpoint counts

A plain process needs no agreement, so its thread completes the checkpoint at once. Threads never talk to other ranks:
every collective is on the main thread, in `begin` and `advance`. The memory for copies is kept until the process ends,
because the system clears new memory page by page: copying 1.5 GB took 0.1 s into memory that was used before, and 0.9
to 4.3 s into new memory (two cores of an EPYC).
"""

import hashlib
import json
import math
import mmap
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from io import FileIO
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pretrain.errors import ResumeError, UserError
from pretrain.storage.files import finished
from pretrain.storage.index import write_index
from pretrain.training.checkpoint import CONFIG, TrainState, explained, folder_of, prune
from pretrain.training.engine.engine import Engine
from pretrain.training.engine.gather import Key, Wanted
from pretrain.training.engine.peers import Peers

PART_BYTES = 4 << 30  # the most bytes of one file; a larger tensor has a file of its own
CHUNK_BYTES = 8 << 20  # bytes that are written and then hashed, while they are still in the processor's cache
PAGE = 4096

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is complete."""

    step: int
    stall_s: float  # seconds that the training waited for it
    write_s: float  # seconds from the copy until it was complete


@dataclass
class _Save:
    """A checkpoint in the making."""

    step: int
    folder: Path
    aside: Path  # its name until it is complete
    index: dict[str, Any]
    before: Callable[[], None] | None
    stall_s: float
    completing: bool  # whether only the task of rank 0 is left
    began: float = field(default_factory=time.monotonic)
    task: Future = field(default_factory=Future)  # of the thread of this rank


class Writer:
    """Writes the checkpoints of a run, one at a time. Whenever a process dies, each is either complete or absent.

    Rank i modulo the number of ranks writes file i, so several files are written at the same time.
    """

    def __init__(self, run: Path, engine: Engine, peers: Peers, config_yaml: str):
        self._run, self._engine, self._peers, self._config_yaml = run, engine, peers, config_yaml
        files = _files(engine.shapes(), engine.kinds)
        ranks = {(file.kind, file.part): number % peers.world.size for number, file in enumerate(files)}
        self._mine = [file for file in files if ranks[file.kind, file.part] == peers.world.rank]
        self._wanted = [Wanted(file.kind, name, ranks[file.kind, file.part]) for file, name in _alternating(files)]
        self._memory: Future | None = None  # a mapping with the bytes of the tensors of each of these files
        self._removal: Future | None = None
        self._save: _Save | None = None
        self._leaving = threading.Event()  # set: a thread stops writing

    @property
    def saving(self) -> bool:
        """Whether a checkpoint is in the making. It is the same on every rank."""
        return self._save is not None

    @property
    def busy(self) -> bool:
        """Whether the thread of this rank has not done its present part of a checkpoint."""
        return self._save is not None and not self._save.task.done()

    @property
    def failed(self) -> bool:
        """Whether the thread of this rank could not write."""
        return self._save is not None and self._save.task.done() and self._save.task.exception() is not None

    def reserve(self) -> None:
        """Take the memory for copies now, in a thread. The first save then need not wait until it is cleared."""
        self._memory = self._memory or _in_thread(_memory, sum(file.nbytes for file in self._mine))

    def begin(self, state: TrainState, identity: dict, before: Callable[[], None] | None = None) -> None:
        """Copy the state and begin to write checkpoint `state.step`; a collective. No other may be in the making.

        The thread of rank 0 calls `before` before the checkpoint is complete. Raises ResumeError on every rank when one
        rank cannot write.
        """
        assert self._save is None, "one checkpoint at a time"
        began = time.monotonic()
        folder, peers, memory = folder_of(self._run, state.step), self._peers, None
        aside = folder.with_name(f".{folder.name}.tmp")
        self.reserve()
        with peers.one_fate(), explained(folder):
            memory = self._memory.result() if self._memory else None
            if peers.world.speaks:
                self._await_removal()
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir(parents=True)
        assert memory is not None
        bodies = _bodies(memory, self._mine)
        tensors: dict[Key, torch.Tensor] = {}
        for file, body in zip(self._mine, bodies, strict=True):
            numbers = torch.frombuffer(body, dtype=torch.float32)
            pieces = numbers.split([math.prod(shape) for shape in file.shapes.values()])
            tensors |= {(file.kind, name): piece for name, piece in zip(file.shapes, pieces, strict=True)}
        self._engine.gather(self._wanted, tensors)
        index = {"stage": "checkpoint", **vars(state), **identity}
        index["recorded"] = identity.get("recorded", {}) | {
            "world": peers.world.size,
            "engine": self._engine.name,
            "torch": torch.__version__,
        }
        alone = peers.world.size == 1
        save = self._save = _Save(state.step, folder, aside, index, before, time.monotonic() - began, completing=alone)
        if alone:  # without an agreement, so that it is complete even if an evaluation takes long
            save.task = _in_thread(lambda: self._complete(save, self._write(save, bodies)))
        else:
            save.task = _in_thread(self._write, save, bodies)

    def advance(self, failed: bool = False) -> Saved | None:
        """Go on with the checkpoint in the making; a collective. Returns the checkpoint once it is complete.

        Call it when no rank is busy, or with `failed` when the thread of a rank has failed. Then the others stop
        writing, the remains are removed, and the error of that rank is raised on every rank, as a ResumeError.
        """
        save, peers = self._save, self._peers
        assert save is not None
        began = time.monotonic()
        try:
            if failed:
                self._leaving.set()
            with peers.one_fate(), explained(save.folder):
                done = save.task.result()
            if save.completing:
                self._save = None
                ended = done if peers.world.speaks else time.monotonic()
                return Saved(save.step, save.stall_s + time.monotonic() - began, ended - save.began)
            known = {name: entry for found in peers.share(done) for name, entry in found.items()}
            save.completing = True
            if peers.world.speaks:
                save.task = _in_thread(self._complete, save, known)
            save.stall_s += time.monotonic() - began
            return None
        except BaseException:
            self._give_up()
            raise

    def finish(self) -> Saved | None:
        """Wait until the checkpoint in the making is complete, if there is one; a collective."""
        saved = None
        while self._save is not None:
            began = time.monotonic()
            with suppress(Exception):  # `advance` raises it
                self._save.task.result()
            self._save.stall_s += time.monotonic() - began
            saved = self.advance()
        return saved

    def save(self, state: TrainState, identity: dict) -> Path:
        """Write checkpoint `state.step` and wait until it is complete; a collective. Returns its folder."""
        self.begin(state, identity)
        self.finish()
        return folder_of(self._run, state.step)

    def prune(self, keep: int, keep_every: int) -> None:
        """Rank 0 removes older checkpoints in its thread, as `checkpoint.prune` does."""
        if self._peers.world.speaks:
            self._await_removal()
            self._removal = _in_thread(prune, self._run, keep, keep_every)

    def close(self) -> None:
        """End the threads. A plain process completes the checkpoint in the making; ranks can no longer agree on one."""
        if self._peers.world.size == 1:
            with suppress(UserError):  # another error may be on its way
                self.finish()
        self._give_up()
        self._await_removal()

    def _write(self, save: _Save, bodies: list[memoryview]) -> dict[str, dict]:
        """In the thread: write the files of this rank."""
        return _write(save.aside, self._mine, bodies, self._leaving)

    def _complete(self, save: _Save, known: dict[str, dict]) -> float:
        """In the thread of rank 0: complete the checkpoint, and return the time."""
        if not self._leaving.is_set():
            if save.before:
                save.before()
            _complete(save.aside, save.folder, save.index, self._config_yaml, known)
        return time.monotonic()

    def _await_removal(self) -> None:
        if self._removal:
            self._removal.result()

    def _give_up(self) -> None:
        """Let the thread of this rank end, and remove the checkpoint in the making: it must not fill the disk."""
        save, self._save = self._save, None
        self._leaving.set()
        if save:
            save.task.exception()
            if self._peers.world.speaks:
                shutil.rmtree(save.aside, ignore_errors=True)


@dataclass(frozen=True)
class _File:
    """One safetensors file: some of the tensors of a kind, in the order of the model.

    The format: the length of the header in eight bytes, the header as JSON, and the tensors one after another. The
    library's own writer needs 3.3 CPU seconds a GB, with the hash for which it reads the file again; `_write` needs 1.5
    (medians of four).
    """

    kind: str
    part: int
    parts: int
    shapes: Shapes

    @property
    def name(self) -> str:
        parts = "" if self.parts == 1 else f"-{self.part + 1:05d}-of-{self.parts:05d}"
        return f"{self.kind}{parts}.safetensors"

    @property
    def nbytes(self) -> int:
        """The bytes of its tensors."""
        return sum(4 * math.prod(shape) for shape in self.shapes.values())

    def header(self) -> bytes:
        entries, begin = {}, 0
        for name, shape in self.shapes.items():
            end = begin + 4 * math.prod(shape)
            entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
            begin = end
        text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of eight bytes
        return len(text).to_bytes(8, "little") + text


def _files(shapes: Shapes, kinds: tuple[str, ...]) -> list[_File]:
    """The files of a checkpoint. Each part of a kind has consecutive weights, in the order of the model."""
    parts: list[Shapes] = [{}]
    size = 0
    for name, shape in shapes.items():
        size += (nbytes := 4 * math.prod(shape))
        if size > PART_BYTES and parts[-1]:
            parts.append({})
            size = nbytes
        parts[-1][name] = shape
    return [_File(kind, part, len(parts), parts[part]) for part in range(len(parts)) for kind in kinds]


def _alternating(files: list[_File]) -> Iterator[tuple[_File, str]]:
    """Every tensor with its file: first the first tensor of each file, then the second of each, and so on.

    So tensors for all ranks are exchanged at the same time.
    """
    for names in zip_longest(*(file.shapes for file in files)):
        for file, name in zip(files, names, strict=True):
            if name is not None:
                yield file, name


def _memory(nbytes: int) -> mmap.mmap:
    """New memory, cleared by the system. It takes large pages, which are cleared four times as fast as small ones."""
    try:
        memory = mmap.mmap(-1, max(1, nbytes))
    except OSError as error:
        raise MemoryError(f"the copy of the state that a save makes takes {nbytes / 1e9:.1f} GB: {error}") from None
    for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):  # a worker of data.workers does not need it
        with suppress(OSError, AttributeError):
            memory.madvise(getattr(mmap, advice))
    pages = np.frombuffer(memory, np.uint8)[::PAGE]
    for begin in range(0, len(pages), PAGE):
        pages[begin : begin + PAGE] = 0
    return memory


def _bodies(memory: mmap.mmap, files: list[_File]) -> list[memoryview]:
    """The memory for the tensors of each file."""
    ends = np.cumsum([file.nbytes for file in files], dtype=np.int64).tolist()
    return [memoryview(memory)[end - file.nbytes : end] for file, end in zip(files, ends, strict=True)]


def _in_thread(work: Callable[..., Any], *arguments: Any) -> Future:
    """Call `work` in a new thread."""
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
    future = thread.submit(work, *arguments)
    thread.shutdown(wait=False)
    return future


def _write(aside: Path, files: list[_File], bodies: list[memoryview], leaving: threading.Event) -> dict[str, dict]:
    """Write files, push them to disk, and return their digests by name. Stops early when `leaving` is set."""
    digests = {}
    for file, body in zip(files, bodies, strict=True):
        found, size = hashlib.sha256(), 0
        with open(aside / file.name, "wb", buffering=0) as out:
            for data in (memoryview(file.header()), body):
                for chunk in _appended(out, data):
                    found.update(chunk)
                    size += len(chunk)
                    if leaving.is_set():
                        return {}
            os.fsync(out.fileno())
        digests[file.name] = {"bytes": size, "sha256": found.hexdigest()}
    return digests


def _appended(out: FileIO, data: memoryview) -> Iterator[memoryview]:
    """Append `data` to a file in chunks, and yield each chunk that is written."""
    while data:
        written = out.write(data[:CHUNK_BYTES])
        yield data[:written]
        data = data[written:]


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
