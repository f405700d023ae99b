"""Shards out of shards: documents are added, or whole pieces taken over as they are, and a side counts what it has."""

import os
import shutil
from pathlib import Path

import numpy as np

from pretrain.shards.megatron import PieceWriter
from pretrain.shards.reader import Shards


class SideWriter:
    """Writes one side of a shard folder, piece by piece; memory is some 30 bytes a document of the open piece.

    `digests` has what is known of the files without reading them again.
    """

    def __init__(
        self, folder: Path, side: str, dtype: np.dtype, vocab_size: int, piece_tokens: int, sidecars: list[str]
    ):
        self.folder, self.side, self.dtype, self.piece_tokens = folder, side, np.dtype(dtype), piece_tokens
        self.sidecars = sidecars
        self.unigram = np.zeros(vocab_size, np.int64)
        self.digests: dict[str, dict] = {}
        self.pieces: list[str] = []
        self.documents = self.tokens = self.raw_bytes = 0
        self._piece: PieceWriter | None = None
        self._open_tokens = 0
        self._rows: dict[str, list[np.ndarray]] = {}

    def add(self, ids: np.ndarray, lengths: np.ndarray, rows: dict[str, np.ndarray]) -> None:
        """Documents of `lengths` (n,) that lie one after another in `ids`, with n rows for each sidecar.

        A piece is closed by the document that reaches `piece_tokens`.
        """
        self.unigram += np.bincount(ids, minlength=len(self.unigram))
        ends = np.cumsum(lengths)
        first = 0
        while first < len(lengths):
            before = int(ends[first - 1]) if first else 0
            room = self.piece_tokens - self._open_tokens
            last = min(len(lengths), int(np.searchsorted(ends, before + room)) + 1)
            if self._piece is None:
                self._piece = PieceWriter(self.folder / self._name(), self.dtype)
                self._rows = {name: [] for name in self.sidecars}
            self._piece.add(ids[before : ends[last - 1]], lengths[first:last])
            self._open_tokens += int(ends[last - 1]) - before
            for name, kept in self._rows.items():
                kept.append(rows[name][first:last])
            if self._open_tokens >= self.piece_tokens:
                self._close_piece()
            first = last
        self.documents, self.tokens = self.documents + len(lengths), self.tokens + int(ends[-1] if len(ends) else 0)
        self.raw_bytes += int(rows["raw"].sum(dtype=np.int64)) if "raw" in self.sidecars else 0

    def take(self, source: Shards, piece: int, rows: dict[str, np.ndarray]) -> None:
        """A whole piece as it is: linked, or copied to another file system. `rows` are sidecars that change.

        Its ids are not read, and not counted in `unigram`.
        """
        self._close_piece()
        name, theirs = self._name(), source.pieces[piece]
        for end in (".bin", ".idx", *(f".{sidecar}.npy" for sidecar in self.sidecars if sidecar not in rows)):
            link(source.folder / f"{theirs}{end}", self.folder / f"{name}{end}")
            self.digests[f"{name}{end}"] = source.index["files"][f"{theirs}{end}"]
        for sidecar, row in rows.items():
            np.save(self.folder / f"{name}.{sidecar}.npy", row)
        self.pieces.append(name)
        self.documents += int(source.piece_documents[piece])
        self.tokens += int(source.piece_tokens[piece])
        if "raw" in self.sidecars:
            self.raw_bytes += int(source.sidecar(piece, "raw").sum(dtype=np.int64))

    def close(self) -> dict:
        """The side's entry in the index."""
        self._close_piece()
        np.save(self.folder / f"{self.side}.unigram.npy", self.unigram)
        raw_bytes = self.raw_bytes if "raw" in self.sidecars else None
        counts = {"documents": self.documents, "tokens": self.tokens, "raw_bytes": raw_bytes}
        return {"pieces": self.pieces, **counts}

    def _name(self) -> str:
        return f"{self.side}-{len(self.pieces):05d}"

    def _close_piece(self) -> None:
        if self._piece is None:
            return
        name = self._name()
        self.digests[f"{name}.bin"] = self._piece.close()
        for sidecar, rows in self._rows.items():
            np.save(self.folder / f"{name}.{sidecar}.npy", np.concatenate(rows))
        self.pieces.append(name)
        self._piece, self._open_tokens = None, 0


def link(source: Path, target: Path) -> None:
    """A second name for a file of ours; a copy on another file system, or of what belongs to somebody else."""
    if source.stat().st_uid == os.geteuid():
        try:
            return os.link(source, target)
        except OSError:
            pass
    shutil.copyfile(source, target)
