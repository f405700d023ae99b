"""Token files: Megatron's indexed dataset (`.bin` + `.idx`) with an `index.json` that says what they are.

    index.json              counts, checksums, fingerprints of tokenizer and corpus; written last
    train-00000.bin/.idx    one Megatron sequence a document: the ids, as the tokenizer's template makes them
    train-00000.raw.npy     (documents,) uint32: bytes of raw text of each document, for bits per byte
    train.unigram.npy       (V,) int64: how often each id occurs on this side
    heldout-…               the same for the other side

Documents are stored without regard to the objective: no mask, no shift, no padding. Ids are uint16 up to 65,500,
else int32 (the format has no uint32). The layout of `.idx` (little endian), after Megatron-LM's
`indexed_dataset.py`, version 1: magic `MMIDIDX\\0\\0`, uint64 version, uint8 dtype code, uint64 sequences, uint64
documents + 1, int32 lengths, int64 byte offsets, int64 document index.
"""

import struct
from array import array
from pathlib import Path

import numpy as np
from pydantic import Field

from pretrain import folders
from pretrain.config import Config
from pretrain.corpus import SIDES, Skipped, open_corpus
from pretrain.errors import CorpusError, ShardError
from pretrain.progress import progress
from pretrain.tokenizer import Tokenizer, open_tokenizer

MADE_BY = "python launch/shards.py CONFIG.yaml"
MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
CODES = {np.dtype(np.uint16): 8, np.dtype(np.int32): 4}
UINT16_VOCABULARY = 65_500
BATCH_CHARACTERS = 1 << 20


class ShardsConfig(Config):
    """What `launch/shards.py` reads."""

    corpus: str  # recipe.yaml, a folder that holds one, or one text file
    tokenizer: str  # folder of the tokenizer stage
    out: str
    piece_tokens: int = Field(1 << 30, gt=0)  # a piece is closed by the document that reaches this


def run(config: ShardsConfig) -> dict:
    """Tokenise a corpus into `config.out`. Returns the index. Raises CorpusError, TokenizerError or ShardError."""
    corpus = open_corpus(config.corpus)
    tokenizer, skipped = open_tokenizer(config.tokenizer), Skipped()
    with folders.publish(Path(config.out), "shards", ShardError) as folder:
        sides = {side: _Side(folder, side, tokenizer.vocab_size, config.piece_tokens) for side in SIDES}
        with progress("tokenising", unit="documents") as advance:
            for documents in _batches(corpus.documents(skipped=skipped)):
                for document, ids in zip(documents, tokenizer.encode_batch([d.text for d in documents]), strict=True):
                    sides[document.side].add(ids, len(document.text.encode("utf-8")))
                advance(len(documents))
        counted = {side: writer.close() for side, writer in sides.items()}
        for side, found in counted.items():
            if not found["documents"]:
                other = sum(entry["documents"] for entry in counted.values())
                raise CorpusError(
                    f"the {side} side of the corpus is empty",
                    f"{config.corpus} has {other:,} documents, heldout_fraction {corpus.recipe.heldout_fraction}",
                    "add text, or choose another heldout_fraction in the recipe",
                )
        index = {
            "stage": "shards",
            "format": 1,
            "kind": tokenizer.kind,
            "dtype": str(_dtype(tokenizer.vocab_size)),
            "vocab_size": tokenizer.vocab_size,
            "specials": tokenizer.specials,
            "tokenizer": tokenizer.fingerprint,
            "corpus": corpus.fingerprint(),
            "sides": counted,
            "recorded": {"corpus": config.corpus, "tokenizer": config.tokenizer},
        }
        index = folders.write_index(folder, index)
    if skipped:
        print(skipped.line())
    for side, found in counted.items():
        print(f"{side}: {found['documents']:,} documents, {found['tokens']:,} tokens, {found['raw_bytes']:,} bytes")
    return index


class PieceWriter:
    """One `.bin`/`.idx` pair, written document by document; memory is 4 bytes a document."""

    def __init__(self, prefix: Path, dtype: np.dtype):
        self.prefix, self.dtype = prefix, np.dtype(dtype)
        self.lengths = array("i")
        self._bin = open(prefix.with_suffix(".bin"), "wb")

    def add(self, ids: np.ndarray) -> None:
        self._bin.write(ids.astype(self.dtype, copy=False).tobytes())
        self.lengths.append(len(ids))

    def close(self) -> None:
        self._bin.close()
        lengths = np.frombuffer(self.lengths, np.int32)
        write_idx(self.prefix.with_suffix(".idx"), lengths, self.dtype)


def write_idx(path: Path, lengths: np.ndarray, dtype: np.dtype) -> None:
    """Write Megatron's index for documents of `lengths` (n,) int32 tokens, one sequence a document."""
    n = len(lengths)
    offsets = np.zeros(n, np.int64)
    np.cumsum(lengths[:-1], dtype=np.int64, out=offsets[1:])
    with open(path, "wb") as file:
        file.write(HEADER.pack(MAGIC, 1, CODES[np.dtype(dtype)], n, n + 1))
        file.write(lengths.astype("<i4").tobytes())
        file.write((offsets * np.dtype(dtype).itemsize).astype("<i8").tobytes())
        file.write(np.arange(n + 1, dtype="<i8").tobytes())


def read_idx(path: Path) -> tuple[np.dtype, np.ndarray, np.ndarray]:
    """(dtype of ids, lengths (n,) int32, byte offsets (n,) int64) of a Megatron index, the arrays mapped.

    Raises ShardError when the header or the file's size is not what the format says.
    """
    with open(path, "rb") as file:
        header = file.read(HEADER.size)
    if len(header) < HEADER.size or header[:9] != MAGIC:
        raise ShardError(f"{path} is not a Megatron index", f"expected magic {MAGIC!r}, found {header[:9]!r}")
    _, version, code, n, documents = HEADER.unpack(header)
    dtype = next((dtype for dtype, known in CODES.items() if known == code), None)
    expected = HEADER.size + 12 * n + 8 * documents
    if version != 1 or dtype is None or path.stat().st_size != expected:
        raise ShardError(
            f"{path} cannot be read",
            f"version {version}, dtype code {code}, {path.stat().st_size:,} bytes",
            f"expected version 1, code in {sorted(CODES.values())}, {expected:,} bytes",
        )
    lengths = np.memmap(path, "<i4", "r", HEADER.size, (n,))
    return dtype, lengths, np.memmap(path, "<i8", "r", HEADER.size + 4 * n, (n,))


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


class _Side:
    """Writes one side's pieces and counts what goes in."""

    def __init__(self, folder: Path, side: str, vocab_size: int, piece_tokens: int):
        self.folder, self.side, self.piece_tokens = folder, side, piece_tokens
        self.dtype = _dtype(vocab_size)
        self.unigram = np.zeros(vocab_size, np.int64)
        self.pieces: list[str] = []
        self.documents = self.tokens = self.raw_bytes = 0
        self._piece: PieceWriter | None = None

    def add(self, ids: np.ndarray, raw_bytes: int) -> None:
        if self._piece is None:
            self._name = f"{self.side}-{len(self.pieces):05d}"
            self._piece = PieceWriter(self.folder / self._name, self.dtype)
            self._raw, self._piece_tokens = array("I"), 0
        self._piece.add(ids)
        self._raw.append(raw_bytes)
        self._piece_tokens += len(ids)
        self.unigram += np.bincount(ids, minlength=len(self.unigram))
        self.documents, self.tokens = self.documents + 1, self.tokens + len(ids)
        self.raw_bytes += raw_bytes
        if self._piece_tokens >= self.piece_tokens:
            self._close_piece()

    def close(self) -> dict:
        self._close_piece()
        np.save(self.folder / f"{self.side}.unigram.npy", self.unigram)
        return {
            "pieces": self.pieces,
            "documents": self.documents,
            "tokens": self.tokens,
            "raw_bytes": self.raw_bytes,
        }

    def _close_piece(self) -> None:
        if self._piece is not None:
            self._piece.close()
            np.save(self.folder / f"{self._name}.raw.npy", np.frombuffer(self._raw, np.uint32))
            self.pieces.append(self._name)
            self._piece = None


def _dtype(vocab_size: int) -> np.dtype:
    return np.dtype(np.uint16 if vocab_size <= UINT16_VOCABULARY else np.int32)


def _batches(documents):
    """Lists of documents of about BATCH_CHARACTERS together: encode_batch runs over threads, memory stays flat."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
