"""Token files made elsewhere, as a shard folder: the `.bin`/`.idx` pairs of Megatron's preprocess_data and its kin.

    pairs: [data/wiki_text_document]          wiki_text_document.bin and .idx
    tokenizer: runs/wiki/tokenizer            the vocabulary they were made with, adopted by the tokenizer stage
    out: runs/wiki/shards

A tokenizer other than the one that made the ids mostly gives other ids for the text that it decodes them to. A sample
of documents is tried: right ones give back 99.6 % of the tokens and more, documents that were cut included; wrong ones
of the same size mostly 40 to 91 % (8,000 entries, trained on halves of 10 MB), but 95 to 99 % where one of the two is a
`bert` vocabulary of Chinese characters: that is not seen. Read what is printed, the first document.

Whatever marks the tool put around a sequence go, those of our template come: `[CLS] … [SEP]` around each document, or
`<eod>` behind it. Sequences of one document (sentences) are joined. A document's side is decided by its text, as in the
shards stage, where the vocabulary gives the text back: sets made here and there agree; elsewhere by its ids. Bytes of
text are counted if the vocabulary counts them.
"""

import time
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from pretrain.config import StageConfig, free
from pretrain.corpus import SIDES
from pretrain.corpus.sides import side_of
from pretrain.display.progress import closing_line, progress
from pretrain.errors import ShardError
from pretrain.shards.megatron import dtype_of, read_document_index, read_idx
from pretrain.shards.reader import ORIGIN
from pretrain.shards.writer import SideWriter, tokenized, write_shards_index
from pretrain.storage.files import digest, lies_in
from pretrain.storage.publish import publish
from pretrain.tokenizer import Tokenizer, open_tokenizer

BATCH_TOKENS = 1 << 20  # worked on together, or one document
SHOWN_TOKENS = 40
SAMPLED = 64  # documents of a pair that are decoded and encoded again, their first SAMPLED_TOKENS
SAMPLED_TOKENS = 1000
FEW_TOKENS = 200  # say nothing about a tokenizer


class ImportConfig(StageConfig):
    """What `launch/import_megatron.py` reads."""

    pairs: list[str] = Field(min_length=1)  # paths without .bin and .idx
    tokenizer: str  # folder of the tokenizer stage
    out: str
    heldout_fraction: float = Field(0.01, gt=0, lt=1)  # of documents
    # [CLS], [SEP], <eod> or padding in the middle of a sequence: a text that spelled them, or a file of another kind.
    inner_marks: Literal["stop", "remove"] = "stop"
    # How many tokens of a sample must come back when it is decoded and encoded again. Fewer do where the tool that made
    # the pair knew the vocabulary but treated text otherwise: another normaliser, or BPE-dropout.
    min_returned: float = free(0.95, ge=0, le=1)
    piece_tokens: int = Field(1 << 30, gt=0)  # a piece is closed by the document that reaches this


@dataclass(frozen=True)
class Pair:
    """A pair as it lies on the disk, mapped."""

    prefix: str
    ids: np.ndarray  # (tokens,) uint16 or int32
    lengths: np.ndarray  # (sequences,)
    offsets: np.ndarray  # (sequences,) in bytes
    documents: np.ndarray  # (documents + 1,) the first sequence of each, and how many there are


@dataclass(frozen=True)
class CheckedPair:
    """Some documents of a pair without their marks, and what was noticed."""

    ids: np.ndarray  # (tokens,) int64
    lengths: np.ndarray  # (documents,) none is 0
    numbers: np.ndarray  # (documents,) of each in its pair
    read: int  # documents
    removed: int  # marks inside of documents


def run(config: ImportConfig) -> dict:
    """Publish `config.pairs` as shards. Returns the index. Raises ShardError or TokenizerError."""
    began = time.monotonic()
    tokenizer = open_tokenizer(config.tokenizer)
    pairs = [open_pair(prefix) for prefix in config.pairs]
    for pair in pairs:
        if lies_in(f"{pair.prefix}.bin", config.out):
            found = f"{pair.prefix}.bin is in {config.out}"
            raise ShardError("the output folder holds a pair that it is made of", found, "choose another out=")
    identity = _identity(pairs)
    digests = [pair for pair, _ in identity]
    for number, found in enumerate(digests):
        if found["bytes"] and found in digests[:number]:
            same = f"{config.pairs[digests.index(found)]}.bin and {config.pairs[number]}.bin"
            raise ShardError("documents would stand twice", f"{same} are the same, byte by byte", "leave one out")
    for pair in pairs:
        _check_returned(pair, tokenizer, config.min_returned)
    spelling = [tokenizer.vocabulary.raw(token) for token in range(tokenizer.vocab_size)]
    kept = ["raw", "origin"] if tokenizer.counts_bytes else ["origin"]
    read = removed = 0
    with publish(Path(config.out), "shards", ShardError, config) as folder:
        dtype = dtype_of(tokenizer.vocab_size)
        writers = {
            side: SideWriter(folder, side, dtype, tokenizer.vocab_size, config.piece_tokens, kept) for side in SIDES
        }
        with progress("adopting", "documents", sum(len(pair.documents) - 1 for pair in pairs)) as advance:
            for number, pair in enumerate(pairs):
                for found in documents(pair, tokenizer, config.inner_marks):
                    if read == 0 and len(found.lengths):
                        shown = tokenizer.decode(found.ids[: min(SHOWN_TOKENS, found.lengths[0])])
                        print(f"the first document begins: {shown!r}")
                    _write(writers, found, number, tokenizer, spelling, config.heldout_fraction)
                    read, removed = read + found.read, removed + found.removed
                    advance(found.read)
        for pair, before, after in zip(pairs, identity, _identity(pairs), strict=True):
            if before != after:
                raise ShardError("a pair changed while it was read", pair.prefix, "start again when it is at rest")
        sides = {side: writer.close() for side, writer in writers.items()}
        _check_sides(sides, config)
        index = write_shards_index(
            folder,
            tokenized(tokenizer),
            kept,
            sides,
            [f"{pair.prefix}, document" for pair in pairs],
            writers["train"].digests | writers["heldout"].digests,
            recorded={"pairs": config.pairs, "tokenizer": config.tokenizer},
            corpus={"pairs": identity},
            split={"by": "text" if tokenizer.lossless else "ids", "heldout_fraction": config.heldout_fraction},
            inner_marks=config.inner_marks,
        )
    for side, entry in sides.items():
        print(f"{side}: {entry['documents']:,} documents, {entry['tokens']:,} tokens")
    empty = read - sum(entry["documents"] for entry in sides.values())
    for count, what in ((empty, "documents without a token left out"), (removed, "marks inside of documents removed")):
        if count:
            print(f"{count:,} {what}")
    closing_line("adopt", began)
    return index


def _identity(pairs: list[Pair]) -> list[list[dict]]:
    """Size and hash of the two files of each pair."""
    return [[digest(Path(f"{pair.prefix}.{end}")) for end in ("bin", "idx")] for pair in pairs]


def open_pair(prefix: str) -> Pair:
    """A pair, checked but for its ids. Raises ShardError when it is not what the format says."""
    bin_, idx = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    for path in (bin_, idx):
        if not path.is_file():
            raise ShardError(f"{path} is missing", "a pair is named by its path without .bin and .idx")
    dtype, lengths, offsets = read_idx(idx)
    sequences = read_document_index(idx)
    size = bin_.stat().st_size
    for first in range(0, len(lengths), BATCH_TOKENS):
        here = slice(first, first + BATCH_TOKENS)
        ends = offsets[here] + lengths[here].astype(np.int64) * dtype.itemsize
        following = np.append(offsets[first + 1 : first + len(ends) + 1], size)[: len(ends)]
        wrong = np.flatnonzero((ends != following) | (lengths[here] < 0))
        if len(wrong):
            at = f"sequence {first + wrong[0]:,} of {len(lengths):,} ends at byte {ends[wrong[0]]:,}"
            raise ShardError(f"{bin_} is not what {idx.name} says", f"{at}, the next begins at {following[wrong[0]]:,}")
    for first in range(0, len(sequences), BATCH_TOKENS):
        part = sequences[first : first + BATCH_TOKENS + 1]
        if (np.diff(part) < 0).any() or sequences[0] != 0 or sequences[-1] != len(lengths):
            raise ShardError(f"{idx} is damaged", "its document index does not divide its sequences")
    ids = np.memmap(bin_, dtype, "r") if size else np.empty(0, dtype)
    return Pair(prefix, ids, lengths, offsets, sequences)


def _check_returned(pair: Pair, tokenizer: Tokenizer, wanted: float) -> None:
    """Raise ShardError when too few tokens of a sample come back from text.

    As many as of what the tokenizer encoded itself would do: not every one is made to give back its own ids.
    """
    rows = list(_sample(pair, tokenizer))
    if sum(map(len, rows)) < FEW_TOKENS or any(((row < 0) | (row >= tokenizer.vocab_size)).any() for row in rows):
        return  # an id that no token has is named when all are read
    first = _returned(rows, tokenizer)
    share, own = _share(rows, first), _share(first, _returned(first, tokenizer))
    if share < wanted * own:
        begin = tokenizer.decode(max(rows, key=len)[:SHOWN_TOKENS])
        raise ShardError(
            f"{pair.prefix}.bin was probably made with another tokenizer than {tokenizer.folder}",
            f"of the tokens of {len(rows)} documents, {share:.1%} come back when they are decoded and encoded again",
            f"of text that this tokenizer encoded, {own:.1%} do; a document begins: {begin!r}",
            "name the tokenizer that it was made with; if this is the one, lower min_returned",
        )


def _sample(pair: Pair, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """The first ids of some documents, without marks."""
    marks = list(tokenizer.specials.values())
    count = len(pair.documents) - 1
    for document in range(0, count, max(1, -(-count // SAMPLED))):
        begin, end = map(int, pair.documents[document : document + 2])
        if begin < end:
            first = int(pair.offsets[begin]) // pair.ids.itemsize
            tokens = int(pair.lengths[begin:end][:SAMPLED_TOKENS].sum())
            ids = np.asarray(pair.ids[first : first + min(tokens, SAMPLED_TOKENS)], np.int64)
            yield ids[~np.isin(ids, marks)]


def _returned(rows: list[np.ndarray], tokenizer: Tokenizer) -> list[np.ndarray]:
    """The ids of the texts that rows of ids are decoded to, without marks."""
    marks = list(tokenizer.specials.values())
    return [ids[~np.isin(ids, marks)] for ids in tokenizer.encode_batch([tokenizer.decode(row) for row in rows])]


def _share(rows: list[np.ndarray], others: list[np.ndarray]) -> float:
    """Of all tokens of rows, those that the others have as well, wherever."""
    common = total = 0
    for row, other in zip(rows, others, strict=True):
        size = max(row.max(initial=0), other.max(initial=0)) + 1
        common += int(np.minimum(np.bincount(row, minlength=size), np.bincount(other, minlength=size)).sum())
        total += len(row)
    return common / max(total, 1)


def documents(pair: Pair, tokenizer: Tokenizer, inner_marks: str) -> Iterator[CheckedPair]:
    """The documents of a pair, about BATCH_TOKENS together. Raises ShardError."""
    token = first = 0
    while first < len(pair.documents) - 1:
        begin = int(pair.documents[first])
        ends = np.cumsum(pair.lengths[begin : begin + BATCH_TOKENS], dtype=np.int64)
        reached = begin + int(np.searchsorted(ends, BATCH_TOKENS))
        last = max(first + 1, bisect_right(pair.documents, reached, first) - 1)
        bounds = np.asarray(pair.documents[first : last + 1])
        lengths = np.asarray(pair.lengths[bounds[0] : bounds[-1]], np.int64)
        ids = np.asarray(pair.ids[token : token + lengths.sum()], np.int64)
        yield _found(pair, ids, lengths, bounds - begin, first, tokenizer, inner_marks == "remove")
        token, first = token + len(ids), last


def _found(
    pair: Pair,
    ids: np.ndarray,
    lengths: np.ndarray,
    bounds: np.ndarray,
    first: int,
    tokenizer: Tokenizer,
    remove: bool,
) -> CheckedPair:
    """Documents `first` … of a pair, of sequences of `lengths`, those of document d from bounds[d] to bounds[d + 1]."""
    ends = np.cumsum(lengths)
    begins = ends - lengths
    edges = np.append(begins, ends[-1:] if len(ends) else 0)[bounds]  # tokens before each document

    def place(at: int) -> str:
        document = int(np.searchsorted(edges, at, side="right")) - 1
        return f"document {first + document:,}, token {at - edges[document]:,}: id {ids[at]}"

    wrong = np.flatnonzero((ids < 0) | (ids >= tokenizer.vocab_size))
    if len(wrong):
        has = f"{tokenizer.folder} has 0 to {tokenizer.vocab_size - 1}"
        remedy = "name the tokenizer that it was made with"
        raise ShardError(f"{pair.prefix}.bin has an id that no token has", place(wrong[0]), has, remedy)
    marks = {tokenizer.specials[role] for role in ("cls", "sep", "eod", "pad") if role in tokenizer.specials}
    is_mark = np.isin(ids, list(marks))
    keep = ~is_mark
    inner = is_mark & ~_outer(is_mark, begins, ends)
    if inner.any() and not remove:
        at = int(np.flatnonzero(inner)[0])
        raise ShardError(
            f"{pair.prefix}.bin has {tokenizer.token_text(int(ids[at]))} in the middle of a sequence",
            place(at),
            "set inner_marks=remove to leave such tokens out, if the tokenizer is the right one",
        )
    counts = np.append(0, np.cumsum(keep))[edges]
    lengths = np.diff(counts)
    return CheckedPair(ids[keep], lengths[lengths > 0], first + np.flatnonzero(lengths), len(lengths), int(inner.sum()))


def _outer(is_mark: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """(tokens,) bool: the marks with nothing but marks between them and the begin or the end of their sequence."""
    text = np.append(0, np.cumsum(~is_mark))  # tokens of text before each
    before, after = np.repeat(text[begins], ends - begins), np.repeat(text[ends], ends - begins)
    return is_mark & ((text[:-1] == before) | (text[:-1] == after))


def _write(
    writers: dict[str, SideWriter],
    found: CheckedPair,
    pair: int,
    tokenizer: Tokenizer,
    spelling: list[bytes],
    heldout_fraction: float,
) -> None:
    ids, lengths = _with_template(found, tokenizer.specials)
    origin = np.zeros(len(lengths), ORIGIN)
    origin["file"], origin["number"] = pair, found.numbers
    raw, sides, begin = np.empty(len(lengths), np.uint32), [], 0
    for document, end in enumerate(np.cumsum(found.lengths).tolist()):
        text = b"".join(map(spelling.__getitem__, found.ids[begin:end].tolist()))
        raw[document] = len(text)
        if not tokenizer.lossless:
            text = found.ids[begin:end].astype("<i4").tobytes().hex().encode()
        sides.append(side_of(text.decode("utf-8", errors="replace"), heldout_fraction))
        begin = end
    for side, writer in writers.items():
        here = np.array(sides) == side
        writer.add(ids[np.repeat(here, lengths)], lengths[here], {"raw": raw[here], "origin": origin[here]})


def _with_template(found: CheckedPair, specials: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """(ids, lengths) of the documents with our marks around them."""
    before = [specials["cls"]] if "eod" not in specials else []
    after = [specials["eod" if "eod" in specials else "sep"]]
    lengths = found.lengths + len(before) + len(after)
    ends = np.cumsum(lengths)
    ids = np.empty(int(lengths.sum()), np.int64)
    text = np.ones(len(ids), bool)
    for mark, at in ((before, ends - lengths), (after, ends - 1)):
        if mark:
            ids[at], text[at] = mark[0], False
    ids[text] = found.ids
    return ids, lengths


def _check_sides(sides: dict[str, dict], config: ImportConfig) -> None:
    if not any(entry["documents"] for entry in sides.values()):
        raise ShardError("no pair holds a token", ", ".join(config.pairs), "name pairs that hold text")
    for side, entry in sides.items():
        if not entry["documents"]:
            total = sum(other["documents"] for other in sides.values())
            raise ShardError(
                f"the {side} side would be empty",
                f"{', '.join(config.pairs)}: {total:,} documents, heldout_fraction = {config.heldout_fraction}",
                "choose another heldout_fraction",
            )
