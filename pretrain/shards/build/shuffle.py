"""Documents in random order: an external sort by a random key, which is a function of seed, side and document number.

Neighbouring chunks become runs: blocks with their documents sorted by key. Each piece of the output then joins one
range of keys from every run. With runs of 128 MB and pieces of 2 GB, a build of 5 TB of ids has 40,000 runs, and a
piece takes 50 kB of each: files are read in long sections, and never document by document.

The order depends only on the corpus and the seed, not on chunks, runs or processes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pretrain.corpus import SIDES, Skipped
from pretrain.hashing import SHUFFLE, hash64
from pretrain.shards.build.blocks import ROW, BlockStretch, ShardBlock, ShardPiece, begins, read_block, write_block
from pretrain.storage.sealed import usable

RUN_TOKENS = 1 << 26  # 128 MB of ids; a process holds them twice
GATHER_TOKENS = 1 << 21  # tokens sorted at a time
PLAN_DOCUMENTS = 1 << 18  # documents planned at a time
KEYS = 1 << 64


@dataclass(frozen=True)
class Run:
    """Neighbouring blocks that become one sorted block."""

    path: Path
    blocks: tuple[ShardBlock, ...]
    files: tuple[np.ndarray, ...]  # one for each block, as in BlockStretch
    numbers: tuple[int, ...]  # the number of the first document on each side, among all documents of the side


def runs_of(folder: Path, blocks: list[ShardBlock], files: list[np.ndarray]) -> Iterator[Run]:
    """Join neighbouring blocks until they reach RUN_TOKENS."""
    held: list[tuple[ShardBlock, np.ndarray]] = []
    tokens, made, numbers = 0, 0, [0] * len(SIDES)
    begun = tuple(numbers)
    for block, table in zip(blocks, files, strict=True):
        held.append((block, table))
        tokens += sum(side.tokens for side in block.sides)
        numbers = [number + side.documents for number, side in zip(numbers, block.sides, strict=True)]
        if tokens >= RUN_TOKENS or block is blocks[-1]:
            run_blocks, run_files = zip(*held, strict=True)
            yield Run(folder / f"{made:06d}", run_blocks, run_files, begun)
            held, tokens, made, begun = [], 0, made + 1, tuple(numbers)


def make_run(seed: int, dtype: np.dtype, run: Run) -> ShardBlock:
    """Write a run, unless it is finished."""
    if usable(run.path):
        return read_block(run.path)
    rows, ids = [], []
    for side, number in enumerate(run.numbers):
        stretches = [
            BlockStretch(block, side, 0, block.sides[side].documents, table)
            for block, table in zip(run.blocks, run.files, strict=True)
            if block.sides[side].documents
        ]
        found = np.concatenate([np.zeros(0, ROW), *(stretch.rows() for stretch in stretches)])
        found["key"] = hash64(SHUFFLE, seed, side, number + np.arange(len(found)))
        order = np.argsort(found["key"])
        found = found[order]
        found["begin"] = begins(found["length"])
        rows.append(found)
        ids.append(_ids(stretches, dtype, found["length"], order))
    return write_block(run.path, rows, ids, (), Skipped())


@dataclass(frozen=True)
class Merge:
    """The documents of one side of several runs with keys from `first` to `last`, in order of their keys."""

    runs: tuple[ShardBlock, ...]
    side: int
    first: int
    last: int

    def rows(self) -> np.ndarray:
        return self._sorted()[0]

    def ids(self, dtype: np.dtype) -> Iterator[np.ndarray]:
        rows, order, stretches = self._sorted()
        return _ids(stretches, dtype, rows["length"], order)

    def _sorted(self) -> tuple[np.ndarray, np.ndarray, list[BlockStretch]]:
        """The rows in order, the position of each in the stretches, and the stretches."""
        found = [(run, *run.between(self.side, self.first, self.last)) for run in self.runs]
        stretches = [BlockStretch(run, self.side, first, last) for run, first, last in found if last > first]
        rows = np.concatenate([np.zeros(0, ROW), *(stretch.rows() for stretch in stretches)])
        order = np.argsort(rows["key"])
        return rows[order], order, stretches


def shuffled_pieces(side: int, runs: tuple[ShardBlock, ...], piece_tokens: int) -> Iterator[ShardPiece]:
    """The pieces of a side. As without shuffling, the document that reaches `piece_tokens` is the last of its piece.

    This reads the lengths of all documents, PLAN_DOCUMENTS at a time.
    """
    parts: list[Merge] = []
    filled = documents = made = 0
    spans = sum(run.sides[side].documents for run in runs) // PLAN_DOCUMENTS + 1
    for span in range(spans):
        rows = Merge(runs, side, KEYS * span // spans, KEYS * (span + 1) // spans - 1).rows()
        ends = np.cumsum(rows["length"], dtype=np.int64)
        first = begin = 0
        while first < len(rows):
            wanted = min(GATHER_TOKENS, piece_tokens - filled)
            last = min(len(rows), int(np.searchsorted(ends, begin + wanted)) + 1)
            parts.append(Merge(runs, side, int(rows["key"][first]), int(rows["key"][last - 1])))
            documents, filled = documents + last - first, filled + int(ends[last - 1]) - begin
            first, begin = last, int(ends[last - 1])
            if filled >= piece_tokens:
                yield ShardPiece.of(side, made, documents, parts)
                parts, filled, documents, made = [], 0, 0, made + 1
    if parts:
        yield ShardPiece.of(side, made, documents, parts)


def _ids(
    stretches: list[BlockStretch], dtype: np.dtype, lengths: np.ndarray, order: np.ndarray
) -> Iterator[np.ndarray]:
    """The ids of the documents of `stretches`, reordered by `order`, about GATHER_TOKENS at a time.

    `lengths` (n,) are the lengths of the documents in the new order.
    """
    ids = np.concatenate([np.zeros(0, dtype), *(ids for stretch in stretches for ids in stretch.ids(dtype))])
    before = np.empty_like(lengths)
    before[order] = lengths
    starts, ends = begins(before)[order], np.cumsum(lengths, dtype=np.int64)
    first = done = 0
    while first < len(order):
        last = min(len(order), int(np.searchsorted(ends, done + GATHER_TOKENS)) + 1)
        shift = starts[first:last] - (ends[first:last] - lengths[first:last])
        yield ids[np.repeat(shift, lengths[first:last]) + np.arange(done, ends[last - 1])]
        first, done = last, int(ends[last - 1])
