"""Token files: Megatron's indexed dataset (`.bin` + `.idx`) with an `index.json` that says what they are.

    index.json              counts, checksums, fingerprints of tokenizer and corpus; written last
    train-00000.bin/.idx    one Megatron sequence a document: the ids, as the tokenizer's template makes them
    train-00000.raw.npy     (documents,) uint32: bytes of raw text of each document, for bits per byte
    train.unigram.npy       (V,) int64: how often each id occurs on this side
    heldout-…               the same for the other side

Documents are stored without regard to the objective: no mask, no shift, no padding.
"""

from array import array
from pathlib import Path

import numpy as np
from pydantic import Field

from pretrain import folders
from pretrain.config import Config
from pretrain.corpus import SIDES, Skipped, open_corpus
from pretrain.errors import CorpusError, ShardError
from pretrain.progress import progress
from pretrain.shards.megatron import PieceWriter, dtype_of
from pretrain.shards.reading import Shards, check_tokenizer, open_index
from pretrain.tokenizer import open_tokenizer

__all__ = ["Shards", "ShardsConfig", "check_tokenizer", "open_index", "run"]

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
            "dtype": str(dtype_of(tokenizer.vocab_size)),
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


class _Side:
    """Writes one side's pieces and counts what goes in."""

    def __init__(self, folder: Path, side: str, vocab_size: int, piece_tokens: int):
        self.folder, self.side, self.piece_tokens = folder, side, piece_tokens
        self.dtype = dtype_of(vocab_size)
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
