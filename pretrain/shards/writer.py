"""The writer of shard sets: the files of a piece, a side made of documents or of whole pieces, and the index."""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from io import BytesIO
from pathlib import Path
from types import TracebackType

import numpy as np

from pretrain.shards.megatron import dtype_of, write_idx
from pretrain.shards.reader import ORIGIN, ORIGINS, Shards
from pretrain.storage.files import finished, write_json
from pretrain.storage.index import write_index
from pretrain.tokenizer import Tokenizer

FORMAT = 2  # format 1 had no origins
SIDECARS = {"raw": np.dtype("<u4"), "origin": ORIGIN}  # arrays with one row a document: NAME.raw.npy, NAME.origin.npy
TOKENIZED = ("kind", "dtype", "vocab_size", "specials", "tokenizer")  # the entries of an index about the ids


def write_shards_index(
    folder: Path,
    tokenized: dict,
    sidecars: list[str],
    sides: dict[str, dict],
    places: list[str],
    files: dict[str, dict],
    recorded: dict,
    **identity: object,
) -> dict:
    """Write ORIGINS and the index of a shard set, and return the index.

    `tokenized` has the keys TOKENIZED. `places` are the names of the file numbers in the sidecar `origin`. `files` has
    the digests that are already known. `identity` describes the sources of this kind of set.
    """
    write_json(folder / ORIGINS, places)
    index = {"stage": "shards", "format": FORMAT, **{key: tokenized[key] for key in TOKENIZED}, "sidecars": sidecars}
    index |= {**identity, "sides": sides, "recorded": recorded}
    return write_index(folder, index, recorded=(ORIGINS,), known=files)


def tokenized(tokenizer: Tokenizer) -> dict:
    """The entries of an index about ids that `tokenizer` made."""
    return {
        "kind": tokenizer.kind,
        "dtype": str(dtype_of(tokenizer.vocab_size)),
        "vocab_size": tokenizer.vocab_size,
        "specials": tokenizer.specials,
        "tokenizer": tokenizer.fingerprint,
    }


class PieceWriter:
    """The files of one piece: NAME.bin, NAME.idx and NAME.SIDECAR.npy. Use it as a context manager.

    Each file is hashed while it is written, and gets its name when it is complete. `files` has the digests.
    """

    def __init__(self, folder: Path, name: str, dtype: np.dtype, sidecars: list[str]):
        self.folder, self.name, self.dtype, self.sidecars = folder, name, np.dtype(dtype), sidecars
        self.files: dict[str, dict] = {}
        self._bin = ExitStack()

    def __enter__(self) -> "PieceWriter":
        self._write = self._bin.enter_context(self._hashed("bin"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bin.__exit__(kind, error, trace)

    def add(self, ids: np.ndarray) -> None:
        """Append the ids of successive documents."""
        self._write(np.ascontiguousarray(ids, self.dtype))

    def close(self, documents: int, rows: Callable[[], Iterable[dict[str, np.ndarray]]]) -> None:
        """Finish the ids, and write the index and the sidecars.

        `rows()` yields groups of successive documents. A group is a mapping of `length` and every sidecar to an array
        with one row a document. `rows` is called once for each sidecar and twice for the index, so only one group must
        be in memory at a time.
        """
        self._bin.close()
        with self._hashed("idx") as write:
            write_idx(write, documents, lambda: (stretch["length"] for stretch in rows()), self.dtype)
        for sidecar in self.sidecars:
            with self._hashed(f"{sidecar}.npy") as write:
                write(_npy_header(SIDECARS[sidecar], documents))
                for stretch in rows():
                    write(np.ascontiguousarray(stretch[sidecar], SIDECARS[sidecar]))

    @contextmanager
    def _hashed(self, end: str) -> Iterator[Callable[[bytes | np.ndarray], None]]:
        """A function that writes to a file of the piece. At the end the file's size and SHA-256 are in `files`."""
        name, found, size = f"{self.name}.{end}", hashlib.sha256(), 0
        with finished(self.folder / name) as file:

            def write(data: bytes | np.ndarray) -> None:
                nonlocal size
                view = (data if isinstance(data, bytes) else data.data.cast("B")) if len(data) else b""
                found.update(view)
                size += file.write(view)

            yield write
        self.files[name] = {"bytes": size, "sha256": found.hexdigest()}


def _npy_header(dtype: np.dtype, rows: int) -> bytes:
    file = BytesIO()
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (rows,)}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue()


class SideWriter:
    """Writes one side of a shard folder, piece by piece. It needs some 30 bytes of memory a document of the open piece.

    `digests` has the digests of the files that need not be read again.
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
        self._rows: list[dict[str, np.ndarray]] = []  # the documents of the open piece

    def add(self, ids: np.ndarray, lengths: np.ndarray, rows: dict[str, np.ndarray]) -> None:
        """Add successive documents of `lengths` (n,) tokens from `ids`, with n rows for each sidecar.

        The document that reaches `piece_tokens` is the last of its piece.
        """
        self.unigram += np.bincount(ids, minlength=len(self.unigram))
        ends = np.cumsum(lengths)
        first = 0
        while first < len(lengths):
            before = int(ends[first - 1]) if first else 0
            room = self.piece_tokens - self._open_tokens
            last = min(len(lengths), int(np.searchsorted(ends, before + room)) + 1)
            if self._piece is None:
                self._piece = PieceWriter(self.folder, self._name(), self.dtype, self.sidecars).__enter__()
            self._piece.add(ids[before : ends[last - 1]])
            self._open_tokens += int(ends[last - 1]) - before
            sidecars = {name: rows[name][first:last] for name in self.sidecars}
            self._rows.append({"length": lengths[first:last], **sidecars})
            if self._open_tokens >= self.piece_tokens:
                self._close_piece()
            first = last
        self.documents, self.tokens = self.documents + len(lengths), self.tokens + int(ends[-1] if len(ends) else 0)
        self.raw_bytes += int(rows["raw"].sum(dtype=np.int64)) if "raw" in self.sidecars else 0

    def take(self, source: Shards, piece: int, rows: dict[str, np.ndarray]) -> None:
        """Add a whole piece unchanged: linked, or copied to another file system. `rows` replaces some of its sidecars.

        The ids are not read, and not counted in `unigram`.
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
        """Finish the side, and return its entry in the index."""
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
        self._piece.close(sum(len(rows["length"]) for rows in self._rows), lambda: self._rows)
        self.digests |= self._piece.files
        self.pieces.append(self._name())
        self._piece, self._rows, self._open_tokens = None, [], 0


def link(source: Path, target: Path) -> None:
    """Give a file of this user a second name. Copy it if it belongs to another user or lies on another file system."""
    if source.stat().st_uid == os.geteuid():
        try:
            return os.link(source, target)
        except OSError:
            pass
    shutil.copyfile(source, target)
