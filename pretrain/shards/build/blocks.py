"""Building shards with any number of processes, on this machine or on many that share a file system.

There are three steps. Each writes files to a folder `.NAME.work` beside the output, and a file is complete when it has
its name:

    chunks-…/KEY     a tokenised chunk of the corpus, as a `ShardBlock`. KEY is its content and its place in the corpus
    runs-…/NUMBER    only when documents are shuffled: neighbouring chunks as one block, in order of a random key
    pieces-…/NAME.*  files of the output, joined from stretches of blocks and hashed while written; NAME.done last

The processes write files and send back only counts. A finished file is never made again. The output is the same for any
number of processes, any order of their work, any interruptions and any division of the corpus into chunks.

Memory of a worker: 150 MB (vocabulary 30,000), or 25 times the longest document; 200 MB if documents are shuffled. The
process that starts the workers holds two chunks for each of them, and 1 kB for every chunk of the corpus. Disk during
the build: the output twice, three times if documents are shuffled, and 8 bytes for each distinct id of a chunk.
"""

import json
import os
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Protocol

import numpy as np

from pretrain.corpus import SIDES, Chunk, CleanedCorpus, Corpus, Document, Group, Skipped
from pretrain.errors import TokenizerError
from pretrain.shards.reader import ORIGIN
from pretrain.shards.writer import SIDECARS, PieceWriter
from pretrain.storage.sealed import SEAL_BYTES, sealed, usable
from pretrain.storage.work import record, recorded
from pretrain.tokenizer import Tokenizer, open_tokenizer

ROW = np.dtype(  # a document; `begin` is its first token in its side of the block, `key` is its place when shuffled
    [("length", "<i4"), ("raw", "<u4"), ("file", "<u4"), ("number", "<u8"), ("begin", "<u8"), ("key", "<u8")]
)
COUNT = np.dtype([("id", "<u4"), ("times", "<u4")])
BATCH_CHARACTERS = 1 << 20  # characters encoded together
BUFFER_TOKENS = 1 << 20  # tokens copied at a time


@dataclass(frozen=True)
class Side:
    """The counts of one side of a block."""

    documents: int = 0
    tokens: int = 0
    raw_bytes: int = 0

    def __add__(self, other: "Side") -> "Side":
        return Side(*(a + b for a, b in zip(self.values, other.values, strict=True)))

    @property
    def values(self) -> tuple[int, int, int]:
        return self.documents, self.tokens, self.raw_bytes


@dataclass(frozen=True)
class ShardBlock:
    """A finished file of documents: first the rows (ROW) of all documents, side by side, then their ids in this order.

    The `file` of a row is a number into `places`, the origins of documents: "en.jsonl, line". The block of a chunk ends
    with the counts of each id on each side (COUNT), so that counting need not read the ids again.
    """

    path: Path
    sides: tuple[Side, ...]
    places: tuple[str, ...]
    skipped: Skipped
    distinct: tuple[int, ...] = ()  # distinct ids of each side

    def rows(self, side: int, first: int = 0, last: int | None = None) -> np.ndarray:
        """Rows first … last - 1 of a side."""
        before = sum(side.documents for side in self.sides[:side])
        count = (self.sides[side].documents if last is None else last) - first
        return self._read(ROW, count, (before + first) * ROW.itemsize)

    def ids(self, side: int, dtype: np.dtype, first: int, tokens: int) -> np.ndarray:
        """Ids first … first + tokens - 1 of a side."""
        before = sum(side.tokens for side in self.sides[:side]) + first
        begin = sum(side.documents for side in self.sides) * ROW.itemsize
        return self._read(dtype, tokens, begin + before * dtype.itemsize)

    def counts(self, side: int, dtype: np.dtype) -> np.ndarray:
        """(distinct ids of the side,) COUNT: each id of a side and its count."""
        rows, tokens = (sum(getattr(each, name) for each in self.sides) for name in ("documents", "tokens"))
        begin = rows * ROW.itemsize + tokens * dtype.itemsize
        return self._read(COUNT, self.distinct[side], begin + sum(self.distinct[:side]) * COUNT.itemsize)

    def between(self, side: int, first: int, last: int) -> tuple[int, int]:
        """The rows with keys from `first` to `last`, as (first row, last row + 1), of a side that is sorted by key."""
        count = self.sides[side].documents
        if not count:
            return 0, 0
        before = sum(side.documents for side in self.sides[:side])
        rows = np.memmap(self.path, ROW, "r", before * ROW.itemsize, (count,))
        keys = rows.view(np.ndarray)["key"]  # np.searchsorted would copy this: it is not aligned
        return bisect_left(keys, first), bisect_right(keys, last)

    def _read(self, dtype: np.dtype, count: int, offset: int) -> np.ndarray:
        found = np.fromfile(self.path, dtype, count, offset=offset)
        assert len(found) == count, (self.path, offset, len(found), count)
        return found


# Chunks


@dataclass(frozen=True)
class BuildJob:
    """Everything that a process needs to tokenise a chunk. The job and the chunk determine the contents of a block."""

    corpus: Corpus | CleanedCorpus
    tokenizer: Path
    fingerprint: str  # of the tokenizer
    dtype: np.dtype  # of the ids
    folder: Path
    chunk_bytes: int
    pair_mark: int | None = None  # the id of the mark between the input and the output of a pair


def tokenise(job: BuildJob, item: Group | Chunk) -> list[ShardBlock]:
    """The blocks of a chunk, or of all chunks of some files, which this process reads. Finished blocks are kept."""
    chunks = [item] if isinstance(item, Chunk) else job.corpus.chunks(job.chunk_bytes, item)
    return [_block(job, chunk) for chunk in chunks]


def items_of(corpus: Corpus | CleanedCorpus, chunk_bytes: int, workers: int) -> Iterator[Group | Chunk]:
    """The items that are sent to processes: names of files if each process gets a fair share of them, else text.

    One process reads and unpacks 100 to 500 MB/s, which is enough for 10 to 40 processes. A thousand processes must
    read for themselves.
    """
    groups = list(corpus.groups(chunk_bytes))
    share = sum(group.stored for group in groups) / (4 * workers)  # with 4 shares a process, the last ends soon
    for group in groups:
        if workers > 1 and group.files and group.stored <= share:
            yield group
        else:
            yield from corpus.chunks(chunk_bytes, group)


@lru_cache(maxsize=1)
def opened(folder: Path, fingerprint: str) -> Tokenizer:
    """The tokenizer, opened once in each process. Raises TokenizerError if its fingerprint has changed."""
    tokenizer = open_tokenizer(folder)
    if tokenizer.fingerprint != fingerprint:
        found = f"{folder} was {fingerprint[:12]}… at the start and is now {tokenizer.fingerprint[:12]}…"
        raise TokenizerError("the tokenizer changed while shards were built with it", found, "start again")
    return tokenizer


def _block(job: BuildJob, chunk: Chunk) -> ShardBlock:
    path = job.folder / chunk.key
    if usable(path):
        return read_block(path)
    tokenizer, skipped = opened(job.tokenizer, job.fingerprint), Skipped()
    sides = {side: _Encoded(tokenizer, job.dtype, job.pair_mark) for side in SIDES}
    places: dict[str, int] = {}
    for document in job.corpus.read(chunk, skipped):
        place, _, number = document.where.rpartition(" ")
        sides[document.side].add(document, places.setdefault(place, len(places)), int(number))
    rows, ids, counts = map(list, zip(*(sides[side].arrays() for side in SIDES), strict=True))
    return write_block(path, rows, ids, tuple(places), skipped, counts)


class _Encoded:
    """The documents of one side of a chunk."""

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype, pair_mark: int | None = None):
        self.tokenizer, self.dtype, self.pair_mark = tokenizer, dtype, pair_mark
        self.texts: list[str] = []  # a document has one, a pair has two
        self.inputs: list[int] = []  # the numbers of the texts that are inputs of pairs
        self.characters = 0
        self.ids: list[np.ndarray] = []
        self.lengths: list[np.ndarray] = []
        self.rows: list[tuple[int, int, int, int, int, int]] = []
        self.times = np.zeros(tokenizer.vocab_size, np.int64)

    def add(self, document: Document, file: int, number: int) -> None:
        text = document.text
        self.rows.append((0, len(text) if text.isascii() else len(text.encode("utf-8")), file, number, 0, 0))
        if document.input_characters is None:
            self.texts.append(text)
        else:
            self.inputs.append(len(self.texts))
            self.texts += [text[: document.input_characters], text[document.input_characters + 1 :]]
        self.characters += len(text)
        if self.characters >= BATCH_CHARACTERS:
            self._encode()

    def arrays(self) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
        """The documents as (documents,) ROW, their ids in order, and the count of each id, (distinct ids,) COUNT."""
        if self.texts:
            self._encode()
        rows = np.array(self.rows, ROW)
        if len(rows):
            rows["length"] = np.concatenate(self.lengths)
            rows["begin"] = begins(rows["length"])
        distinct = np.flatnonzero(self.times)
        counts = np.empty(len(distinct), COUNT)
        counts["id"], counts["times"] = distinct, self.times[distinct]
        return rows, self.ids, counts

    def _encode(self) -> None:
        ids, lengths = self.tokenizer.encode_flat(self.texts)
        if self.inputs:
            assert self.pair_mark is not None, "a corpus with pairs has a mark"
            ids, lengths = _paired(ids, lengths, np.array(self.inputs), self.pair_mark, self.tokenizer)
        self.times += np.bincount(ids, minlength=len(self.times))
        self.ids.append(ids.astype(self.dtype))
        self.lengths.append(lengths)
        self.texts, self.inputs, self.characters = [], [], 0


def _paired(
    ids: np.ndarray, lengths: np.ndarray, inputs: np.ndarray, mark: int, tokenizer: Tokenizer
) -> tuple[np.ndarray, np.ndarray]:
    """Join each text with a number in `inputs` and the text after it into one document, `input mark output end`.

    The mark takes the place of the input's end mark. The output loses its [CLS], if the template has one.
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    ids[ends[inputs] - 1] = mark
    found = lengths.copy()
    if tokenizer.kind == "bert":
        assert (ids[ends[inputs]] == tokenizer.specials["cls"]).all()
        ids = np.delete(ids, ends[inputs])
        found[inputs + 1] -= 1
    found[inputs] += found[inputs + 1]
    return ids, np.delete(found, inputs + 1)


def write_block(
    path: Path,
    rows: list[np.ndarray],
    ids: Sequence[Iterable[np.ndarray]],
    places: tuple[str, ...],
    skipped: Skipped,
    counts: Sequence[np.ndarray] = (),
) -> ShardBlock:
    """Write the rows and the ids of each side, the ids as several arrays, and their counts.

    The end of the file is a JSON head that describes the block, its length in 8 bytes, and the seal of `sealed.sealed`.
    """
    sides = tuple(Side(len(r), int(r["length"].sum(dtype=np.int64)), int(r["raw"].sum(dtype=np.int64))) for r in rows)
    block = ShardBlock(path, sides, places, skipped, tuple(map(len, counts)))
    with sealed(path) as file:
        for array in chain(rows, chain.from_iterable(ids), counts):
            file.write(array.data)
        head = json.dumps({**asdict(block), "path": None}).encode()
        file.write(head + len(head).to_bytes(8, "little"))
    return block


def read_block(path: Path) -> ShardBlock:
    """The block in a file. `sealed.usable` must have checked the file."""
    with open(path, "rb") as file:
        file.seek(-8 - SEAL_BYTES, os.SEEK_END)
        size = int.from_bytes(file.read(8), "little")
        file.seek(-8 - size - SEAL_BYTES, os.SEEK_END)
        head = json.loads(file.read(size))
    sides, skipped = tuple(Side(**side) for side in head["sides"]), Skipped.of(head["skipped"])
    return ShardBlock(path, sides, tuple(head["places"]), skipped, tuple(head["distinct"]))


def counted(dtype: np.dtype, vocab_size: int, blocks: Sequence[ShardBlock]) -> np.ndarray:
    """(sides, V) int64: the count of each id on each side of the blocks of some chunks."""
    counts = np.zeros((len(SIDES), vocab_size), np.int64)
    for block in blocks:
        for side, total in enumerate(counts):
            found = block.counts(side, dtype)
            total[found["id"]] += found["times"]
    return counts


# Pieces


@dataclass(frozen=True)
class BlockStretch:
    """Documents first … last - 1 of one side of a block, at least one."""

    block: ShardBlock
    side: int
    first: int
    last: int
    files: np.ndarray | None = None  # file number in the block → in the output; None: unchanged

    def rows(self) -> np.ndarray:
        rows = self.block.rows(self.side, self.first, self.last)
        if self.files is not None:
            rows["file"] = self.files[rows["file"]]
        return rows

    def ids(self, dtype: np.dtype) -> Iterator[np.ndarray]:
        (head,) = self.block.rows(self.side, self.first, self.first + 1)
        (tail,) = self.block.rows(self.side, self.last - 1, self.last)
        first, end = int(head["begin"]), int(tail["begin"]) + int(tail["length"])
        for begin in range(first, end, BUFFER_TOKENS):
            yield self.block.ids(self.side, dtype, begin, min(BUFFER_TOKENS, end - begin))


class PiecePart(Protocol):
    """Some documents of a piece, in order."""

    def rows(self) -> np.ndarray: ...

    def ids(self, dtype: np.dtype) -> Iterator[np.ndarray]: ...


@dataclass(frozen=True)
class ShardPiece:
    """The plan of a piece: a `.bin` file and the files beside it."""

    name: str
    side: int
    documents: int
    parts: tuple[PiecePart, ...]

    @classmethod
    def of(cls, side: int, number: int, documents: int, parts: Iterable[PiecePart]) -> "ShardPiece":
        return cls(f"{SIDES[side]}-{number:05d}", side, documents, tuple(parts))


def pieces_of(side: int, blocks: list[ShardBlock], files: list[np.ndarray], piece_tokens: int) -> Iterator[ShardPiece]:
    """The pieces of a side. The document that reaches `piece_tokens` is the last of its piece."""
    parts: list[PiecePart] = []
    filled = documents = made = 0
    for block, table in zip(blocks, files, strict=True):
        first = before = 0
        for last, tokens in _cuts(block, side, piece_tokens - filled, piece_tokens):
            parts.append(BlockStretch(block, side, first, last, table))
            documents, filled = documents + last - first, filled + tokens - before
            first, before = last, tokens
            if filled >= piece_tokens:
                yield ShardPiece.of(side, made, documents, parts)
                parts, filled, documents, made = [], 0, 0, made + 1
    if parts:
        yield ShardPiece.of(side, made, documents, parts)


def _cuts(block: ShardBlock, side: int, room: int, piece_tokens: int) -> list[tuple[int, int]]:
    """The ends of the pieces in a block, each as the (documents, tokens) before it. The end of the block is the last.

    `room` is the number of tokens that the first piece still takes. A block is opened only if a piece ends in it.
    """
    found, cuts, begin = block.sides[side], [], 0
    if found.tokens >= room:
        ends = np.cumsum(block.rows(side)["length"], dtype=np.int64)
        while found.tokens - begin >= room:
            last = int(np.searchsorted(ends, begin + room)) + 1
            begin, room = int(ends[last - 1]), piece_tokens
            cuts.append((last, begin))
    rest = found.documents - (cuts[-1][0] if cuts else 0)
    return [*cuts, (found.documents, found.tokens)] if rest else cuts


@dataclass(frozen=True)
class Written:
    """The files of a finished piece."""

    name: str
    side: str
    files: dict[str, dict]  # name → {"bytes", "sha256"}


def write_piece(folder: Path, dtype: np.dtype, piece: ShardPiece) -> Written:
    """Write the files of a piece, unless they are finished. Memory: the rows of one part, or the ids that it sorts."""
    done = folder / f"{piece.name}.done"
    if (found := recorded(done)) is not None:
        return Written(**found)
    with PieceWriter(folder, piece.name, dtype, list(SIDECARS)) as writer:
        for part in piece.parts:
            for ids in part.ids(dtype):
                writer.add(ids)
        writer.close(piece.documents, lambda: (_rows(part) for part in piece.parts))
    written = Written(piece.name, SIDES[piece.side], writer.files)
    record(done, written.files, {"name": written.name, "side": written.side})
    return written


def _rows(part: PiecePart) -> dict[str, np.ndarray]:
    """The rows of a part's documents, as `PieceWriter` takes them."""
    rows = part.rows()
    origin = np.empty(len(rows), ORIGIN)
    origin["file"], origin["number"] = rows["file"], rows["number"]
    return {"length": rows["length"], "raw": rows["raw"], "origin": origin}


def begins(lengths: np.ndarray) -> np.ndarray:
    """The first token of each of (n,) successive documents."""
    return np.cumsum(lengths, dtype=np.int64) - lengths
