"""Opened shards: one side of a set as one stream of ids, mapped, not read."""

from pathlib import Path

import numpy as np

from pretrain import folders
from pretrain.errors import ShardError
from pretrain.tokenizer import Tokenizer

MADE_BY = "python launch/shards.py CONFIG.yaml"


class Shards:
    """One side of a shard folder as one stream of `tokens` ids, mapped, not read.

    Opening costs a stat a file and, for sets up to 256 MiB, one checksum pass. Raises ShardError for anything that
    is missing, truncated or (small sets) altered.
    """

    def __init__(self, folder: Path | str, side: str = "train"):
        self.folder, self.side = Path(folder), side
        self.index = open_index(self.folder)
        self.fingerprint: str = self.index["fingerprint"]
        self.specials: dict[str, int] = self.index["specials"]
        self.vocab_size: int = self.index["vocab_size"]
        found = self.index["sides"][side]
        self.tokens: int = found["tokens"]
        self.documents: int = found["documents"]
        self.raw_bytes: int = found["raw_bytes"]
        dtype = np.dtype(self.index["dtype"])
        self._pieces = [np.memmap(self.folder / f"{name}.bin", dtype, "r") for name in found["pieces"]]
        self._ends = np.cumsum([len(piece) for piece in self._pieces])  # stream position after each piece
        assert self._ends[-1] == self.tokens, (self._ends[-1], self.tokens)

    def gather(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Stream positions starts[b] … starts[b] + length - 1 as (B, length) int32; all must lie in the stream."""
        assert starts.min() >= 0 and starts.max() + length <= self.tokens, (starts.min(), starts.max(), self.tokens)
        if len(self._pieces) == 1:
            return self._pieces[0][starts[:, None] + np.arange(length)].astype(np.int32)
        rows = np.empty((len(starts), length), np.int32)
        for row, start in zip(rows, starts.tolist(), strict=True):
            done = 0
            while done < length:
                piece = int(np.searchsorted(self._ends, start + done, side="right"))
                first = start + done - (int(self._ends[piece - 1]) if piece else 0)
                part = self._pieces[piece][first : first + length - done]
                row[done : done + len(part)] = part
                done += len(part)
        return rows

    def unigram(self) -> np.ndarray:
        """(V,) int64: how often each id occurs on this side."""
        return np.load(self.folder / f"{self.side}.unigram.npy")


def open_index(folder: Path) -> dict:
    """The checked index of a shard folder: sizes always, checksums when the set is small."""
    index = folders.read_index(folder, ShardError, MADE_BY, stage="shards")
    folders.check(folder, index, ShardError, f"rebuild it with: {MADE_BY}")
    return index


def check_tokenizer(index: dict, folder: Path | str, tokenizer: Tokenizer) -> None:
    """Raise ShardError unless `tokenizer` is the one these shards were built with."""
    if index["tokenizer"] != tokenizer.fingerprint:
        raise ShardError(
            "these shards were built with another tokenizer",
            f"{folder} says {index['tokenizer'][:12]}…, {tokenizer.folder} says {tokenizer.fingerprint[:12]}…",
            "rebuild the shards, or point data.tokenizer at the one they were made with",
        )
