"""Opened shards: one side of a set as one stream of ids, with the position and the origin of each document."""

import json
import mmap
import os
import resource
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from pretrain.errors import ShardError
from pretrain.shards.megatron import documents_of_size, read_idx
from pretrain.storage.index import check_contents, read_index
from pretrain.storage.unchanged import Unchanged

if TYPE_CHECKING:
    from pretrain.tokenizer import Tokenizer

MADE_BY = "python launch/shards.py CONFIG.yaml"
ORIGIN = np.dtype([("file", "<u4"), ("number", "<u8")])  # a row of the sidecar `origin`
ORIGINS = "origins.json"  # the names of the files in the sidecar `origin`
OPENED = 8  # indexes of pieces, and as many sidecars, that stay mapped: each keeps one or two descriptors
MAPPED = 4096  # token files that a process keeps mapped, or half of the limit of `ulimit -n` if that is less


class TokenFiles:
    """Several files read as one long array of `dtype`. File n has `items[n]` elements, which must agree with its size.

    A file is mapped into memory when it is first needed. The files used last stay mapped, in one cache for all sets of
    the process: Python's `mmap` keeps a descriptor open for each (until 3.13), and a set may have thousands of files.
    Mapping a file again costs 40 µs: even if every row of 512 ids needs that, reading reaches 12 M ids/s.
    """

    def __init__(self, paths: Sequence[Path | str], items: np.ndarray, dtype: np.dtype):
        self.paths, self.items, self.dtype = paths, np.asarray(items, np.int64), np.dtype(dtype)
        self.ends = np.cumsum(self.items)  # the position after each file
        self.begins = self.ends - self.items

    def rows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Elements starts[b] … starts[b] + length - 1 as (B, length) int32. All must lie in the files."""
        assert starts.min() >= 0 and starts.max() + length <= self.ends[-1], (starts.min(), starts.max(), self.ends[-1])
        files = np.searchsorted(self.ends, starts, side="right")
        begins = starts - self.begins[files]
        if files.min() == files.max() and begins.max() + length <= self.items[files[0]]:
            ids = _mapped(self, int(files[0]))[1]
            # Row n of this view is ids[n : n + length]. Indexing the view copies each row in one piece, which is twice
            # as fast as a loop over rows.
            view = np.ndarray((len(ids) - length + 1, length), self.dtype, ids, 0, (ids.itemsize, ids.itemsize))
            return view[begins].astype(np.int32)
        rows = np.empty((len(starts), length), np.int32)
        for row, file, begin in zip(rows, files.tolist(), begins.tolist(), strict=True):
            part = _mapped(self, file)[1][begin : begin + length]
            row[: len(part)] = part
            while len(part) < len(row):  # the row goes on in the next file
                row, file = row[len(part) :], file + 1
                part = _mapped(self, file)[1][: len(row)]
                row[: len(part)] = part
        return rows

    def ahead(self, starts: np.ndarray, length: int) -> None:
        """Ask the system to start reading rows that will be needed soon, all at once, and return without waiting."""
        files = np.searchsorted(self.ends, starts, side="right")
        begins = (starts - self.begins[files]) * self.dtype.itemsize
        for file, begin in zip(files.tolist(), begins.tolist(), strict=True):
            mapped, page = _mapped(self, file)[0], begin // mmap.PAGESIZE * mmap.PAGESIZE
            end = min(begin + length * self.dtype.itemsize, len(mapped))
            mapped.madvise(mmap.MADV_WILLNEED, page, end - page)


def _most_mapped() -> int:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MAPPED if limit == resource.RLIM_INFINITY else min(MAPPED, limit // 2)


@lru_cache(_most_mapped())
def _mapped(files: TokenFiles, number: int) -> tuple[mmap.mmap, np.ndarray]:
    """The mapping of file `number`, and its elements. Raises ShardError if the file is gone or has another size."""
    path, size = files.paths[number], int(files.items[number]) * files.dtype.itemsize
    try:
        with open(path, "rb", buffering=0) as file:
            found = os.fstat(file.fileno()).st_size
            if found != size:  # reading past the end of a mapped file would end the process
                raise ShardError(f"{path} was changed while it was in use: {found:,} bytes instead of {size:,}")
            mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    except OSError as error:
        raise ShardError(f"{path} cannot be read any more", str(error.strerror)) from None
    # Without this the system reads about 100 kB around each row: for 640 rows of 512 ids from a file of 1 GB that is
    # 950 MB instead of 0.7 MB, and 1.8 s instead of 0.2 s.
    mapped.madvise(mmap.MADV_RANDOM)
    return mapped, np.frombuffer(mapped, files.dtype)


class Shards:
    """One side of a shard folder as one stream of `tokens` ids and `documents` documents, both numbered from 0.

    Opening reads the index and checks the size of each file. Sets of up to 256 MiB, and with `checksums` sets of any
    size, are also hashed. No piece is opened before it is needed, and no memory grows with the tokens or documents.
    Raises ShardError for a file that is missing, truncated or (if it is hashed) altered.
    """

    def __init__(self, folder: Path | str, side: str = "train", checksums: bool = False):
        self.folder, self.side = Path(folder), side
        self.index = open_index(self.folder)
        self.fingerprint: str = self.index["fingerprint"]
        self.specials: dict[str, int] = self.index["specials"]
        self.vocab_size: int = self.index["vocab_size"]
        if side not in self.index["sides"]:
            raise ShardError(f"{folder} has no {side} side", f"it has: {', '.join(self.index['sides'])}")
        found = self.index["sides"][side]
        self.tokens: int = found["tokens"]
        self.documents: int = found["documents"]
        self.raw_bytes: int | None = found["raw_bytes"]  # None: unknown
        self.pieces: list[str] = found["pieces"]
        dtype = np.dtype(self.index["dtype"])
        files = self.index["files"]
        ends = ("bin", "idx", *(f"{sidecar}.npy" for sidecar in sidecars(self.index)))
        names = [f"{piece}.{end}" for piece in self.pieces for end in ends]
        self._unchanged = Unchanged(self.folder, self.index, names)  # take the stamps before the hashes
        check_files(self.folder, self.index, checksums)
        self.piece_tokens = np.array([files[f"{name}.bin"]["bytes"] // dtype.itemsize for name in self.pieces])
        self.piece_documents = np.array([documents_of_size(files[f"{name}.idx"]["bytes"]) for name in self.pieces])
        self._ids = TokenFiles([f"{folder}/{name}.bin" for name in self.pieces], self.piece_tokens, dtype)
        self._after = np.cumsum(self.piece_documents)  # the number of the first document after each piece
        assert self._ids.ends[-1] == self.tokens, (self._ids.ends[-1], self.tokens)
        assert self._after[-1] == self.documents, (self._after[-1], self.documents)
        self._idx = lru_cache(OPENED)(self._open_idx)
        self._sidecar = lru_cache(OPENED)(self._open_sidecar)

    def __reduce__(self):
        return Shards, (self.folder, self.side)  # another process opens the set for itself

    def gather(self, starts: np.ndarray, length: int) -> np.ndarray:
        """The ids at positions starts[b] … starts[b] + length - 1 as (B, length) int32. All must lie in the stream."""
        return self._ids.rows(starts, length)

    def check_unchanged(self) -> None:
        """Raise ShardError, naming the file, if a file of this side has changed since the set was opened."""
        self._unchanged.check(ShardError)

    def ahead(self, starts: np.ndarray, length: int) -> None:
        """Ask the system to read the rows of a later `gather` from the disk. It costs 1 to 2 µs a row and pays off on
        slow disks."""
        self._ids.ahead(starts, length)

    def document_at(self, position: int) -> tuple[int, int]:
        """The document at a stream position, and the position within the document: (number, token)."""
        assert 0 <= position < self.tokens, (position, self.tokens)
        piece = int(np.searchsorted(self._ids.ends, position, side="right"))
        _, offsets = self._idx(piece)
        at = int(position - self._ids.begins[piece])
        # Not np.searchsorted: it would copy the whole array, which is not aligned in the file.
        inside = bisect_right(offsets, at * self._ids.dtype.itemsize) - 1
        return self._first(piece) + inside, at - int(offsets[inside]) // self._ids.dtype.itemsize

    def span(self, document: int) -> tuple[int, int]:
        """The stream positions of a document: its first token, and one past its last."""
        piece, inside = self._place(document)
        lengths, offsets = self._idx(piece)
        begin = int(self._ids.begins[piece]) + int(offsets[inside]) // self._ids.dtype.itemsize
        return begin, begin + int(lengths[inside])

    def spans(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """The documents that hold stream positions first … last - 1: the first position of each, and one past its
        last."""
        begins, lengths = [], []
        pieces = np.searchsorted(self._ids.ends, [first, last - 1], side="right")
        for piece in range(pieces[0], pieces[1] + 1):
            sizes, offsets = self._idx(piece)
            base, size = int(self._ids.begins[piece]), self._ids.dtype.itemsize
            begin = max(0, bisect_right(offsets, (first - base) * size) - 1)
            end = bisect_left(offsets, (last - base) * size)
            begins.append(base + offsets[begin:end] // size)
            lengths.append(sizes[begin:end])
        found = np.concatenate(begins)
        return found, found + np.concatenate(lengths)

    def document(self, document: int) -> np.ndarray:
        """The ids of a document as stored, with the marks of the template: (tokens,) int32."""
        begin, end = self.span(document)
        return self.gather(np.array([begin]), end - begin)[0]

    def origin(self, document: int) -> str:
        """The origin of a document, such as `en.jsonl, line 12`. Raises ShardError if the set does not record it."""
        places = self.places
        piece, inside = self._place(document)
        file, number = self.sidecar(piece, "origin")[inside].tolist()
        return f"{places[file]} {number}"

    def piece_ids(self, piece: int) -> np.ndarray:
        """The ids of a whole piece in their stored dtype, mapped for reading from end to end."""
        path = self.folder / f"{self.pieces[piece]}.bin"
        return np.memmap(path, self._ids.dtype, "r", shape=(int(self.piece_tokens[piece]),)).view(np.ndarray)

    def piece_index(self, piece: int) -> tuple[np.ndarray, np.ndarray]:
        """(lengths in tokens (documents,) int32, offsets in bytes (documents,) int64) of a piece, mapped."""
        return self._idx(piece)

    def numbers(self, piece: int) -> np.ndarray:
        """(documents,) int64: the numbers of a piece's documents."""
        return np.arange(self._first(piece), self._after[piece])

    def sidecar(self, piece: int, name: str) -> np.ndarray:
        """The sidecar of a piece, mapped, one row a document: `raw`, uint32 bytes of text, or `origin`, rows of
        ("file", "number")."""
        return self._sidecar(piece, name)

    def unigram(self) -> np.ndarray:
        """(V,) int64: the count of each id on this side."""
        return _array(self.folder / f"{self.side}.unigram.npy", self.vocab_size)

    @property
    def has_origins(self) -> bool:
        """Whether the set records the origins of its documents."""
        return "origin" in sidecars(self.index)

    @cached_property
    def places(self) -> list[str]:
        """The name of each file number in the sidecar `origin`, such as `en.jsonl, line`."""
        if not self.has_origins:
            raise ShardError(
                f"{self.folder} does not say where its documents came from",
                "it was built before origins were kept, or was made elsewhere",
                f"rebuild it with: {MADE_BY}",
            )
        return json.loads((self.folder / ORIGINS).read_text(encoding="utf-8"))

    def _place(self, document: int) -> tuple[int, int]:
        """(piece, number within it) of a document."""
        assert 0 <= document < self.documents, (document, self.documents)
        piece = int(np.searchsorted(self._after, document, side="right"))
        return piece, int(document) - self._first(piece)

    def _first(self, piece: int) -> int:
        """The number of a piece's first document."""
        return int(self._after[piece] - self.piece_documents[piece])

    def _open_idx(self, piece: int) -> tuple[np.ndarray, np.ndarray]:
        """(lengths in tokens, offsets in bytes) of a piece's documents, mapped."""
        return read_idx(self.folder / f"{self.pieces[piece]}.idx")[1:]

    def _open_sidecar(self, piece: int, name: str) -> np.ndarray:
        return _array(self.folder / f"{self.pieces[piece]}.{name}.npy", int(self.piece_documents[piece]), "r")


def _array(path: Path, rows: int, mode: Literal["r"] | None = None) -> np.ndarray:
    """The array of `rows` rows in a file. Raises ShardError for a damaged file: a large set is not hashed when it is
    opened."""
    try:
        found = np.load(path, mmap_mode=mode, allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError) as error:
        raise ShardError(
            f"{path} cannot be read", str(error).split("\n")[0], "copy it again, or rebuild the set"
        ) from None
    if found.shape != (rows,):
        raise ShardError(f"{path} is damaged", f"its shape is {found.shape}, expected ({rows},)", "copy it again")
    return found


def sidecars(index: dict) -> list[str]:
    """The names of the arrays beside each piece that have one row a document."""
    return index.get("sidecars", ["raw"])  # format 1 had only `raw`


def open_index(folder: Path) -> dict:
    """The index of a shard folder."""
    return read_index(folder, ShardError, MADE_BY, stage="shards")


def check_files(folder: Path, index: dict, checksums: bool = False) -> None:
    """Raise ShardError if the size of a file differs from the index; in a small set, or with `checksums`, also if its
    bytes differ."""
    check_contents(folder, index, ShardError, f"rebuild it with: {MADE_BY}", thorough=checksums)


def check_tokenizer(index: dict, folder: Path | str, tokenizer: "Tokenizer") -> None:
    """Raise ShardError unless `tokenizer` is the one these shards were built with."""
    if index["tokenizer"] != tokenizer.fingerprint:
        raise ShardError(
            "these shards were built with another tokenizer",
            f"{folder} says {index['tokenizer'][:12]}…, {tokenizer.folder} says {tokenizer.fingerprint[:12]}…",
            "rebuild the shards, or name the tokenizer that they were built with",
        )
