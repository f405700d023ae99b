"""Import token files made elsewhere: the `.bin`/`.idx` pairs of Megatron's preprocess_data and similar tools.

    pairs: [data/wiki_text_document]          wiki_text_document.bin and .idx
    tokenizer: runs/wiki/tokenizer            the vocabulary they were made with, adopted by the tokenizer stage
    out: runs/wiki/shards

The stage checks that the tokenizer is the right one: it decodes a sample of documents and encodes the text again. The
right tokenizer gives back at least 99.6 % of the tokens, even of documents that were cut. A wrong one of the same size
mostly gives back 40 to 91 % (8,000 entries, trained on halves of 10 MB). If one of the two is a `bert` vocabulary of
Chinese characters, a wrong one gives back 95 to 99 %, and the check does not notice. So the beginning of the first
document is printed: read it.

The marks that the tool put around sequences are replaced by the marks of our template: `[CLS] … [SEP]` around each
document, or `<eod>` behind it. Sequences of one document (sentences) are joined. If the vocabulary gives the text back,
the text decides the side of a document, so that imported and built sets agree; otherwise the ids decide. Bytes of text
are counted if the vocabulary counts them.
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

BATCH_TOKENS = 1 << 20  # tokens processed together, or one longer document
SHOWN_TOKENS = 40
SAMPLED = 64  # documents of a pair whose first SAMPLED_TOKENS are decoded and encoded again
SAMPLED_TOKENS = 1000
FEW_TOKENS = 200  # fewer tokens tell nothing about a tokenizer


class ImportConfig(StageConfig):
    """The configuration of the stage `import_megatron`."""

    pairs: list[str] = Field(min_length=1)
    """The pairs of files, each as its path without `.bin` and `.idx`."""
    tokenizer: str
    """The folder of the tokenizer that the pairs were made with."""
    out: str
    """The folder for the shards."""
    heldout_fraction: float = Field(0.01, gt=0, lt=1)
    """The share of the documents that is held out."""
    inner_marks: Literal["stop", "remove"] = "stop"
    """The reaction to [CLS], [SEP], <eod> or padding in the middle of a sequence. `stop` ends with an error, because
    the file may be of another kind. `remove` leaves these tokens out; choose it for texts that spell them."""
    min_returned: float = free(0.95, ge=0, le=1)
    """The share of the tokens of a sample that must come back when it is decoded and encoded again. Lower it if the
    tool that made the pairs used this vocabulary with another normaliser or with BPE-dropout."""
    piece_tokens: int = Field(1 << 30, gt=0)
    """The tokens of a piece (one `.bin` file). The document that reaches this number is the last of its piece."""


@dataclass(frozen=True)
class Pair:
    """A pair of files, mapped."""

    prefix: str
    ids: np.ndarray  # (tokens,) uint16 or int32
    lengths: np.ndarray  # (sequences,) in tokens
    offsets: np.ndarray  # (sequences,) in bytes
    documents: np.ndarray  # (documents + 1,) the first sequence of each document, and the number of sequences


@dataclass(frozen=True)
class CheckedDocuments:
    """Some documents of a pair without their marks. Documents without a token are left out."""

    ids: np.ndarray  # (tokens,) int64
    lengths: np.ndarray  # (documents,) in tokens
    numbers: np.ndarray  # (documents,) the number of each document in its pair
    read: int  # documents read, also empty ones
    removed: int  # marks removed from inside documents


def run(config: ImportConfig) -> dict:
    """Publish `config.pairs` as shards. Returns the index. Raises ShardError or TokenizerError."""
    began = time.monotonic()
    tokenizer = open_tokenizer(config.tokenizer)
    pairs = [open_pair(prefix) for prefix in config.pairs]
    identity = _identity(pairs)
    _check_pairs(config, [bin_ for bin_, _ in identity])
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
        with progress("importing", "documents", sum(len(pair.documents) - 1 for pair in pairs)) as advance:
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
                raise ShardError("a pair changed while it was read", pair.prefix, "start again when it is complete")
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
    _print_counts(sides, read, removed)
    closing_line("import_megatron", began)
    return index


def _check_pairs(config: ImportConfig, digests: list[dict]) -> None:
    """Raise ShardError if the output folder holds a pair, or if two `.bin` files have the same bytes."""
    for number, (prefix, found) in enumerate(zip(config.pairs, digests, strict=True)):
        if lies_in(f"{prefix}.bin", config.out):
            place = f"{prefix}.bin is in {config.out}"
            raise ShardError("the output folder holds a pair that it is made of", place, "choose another out=")
        if found["bytes"] and found in digests[:number]:
            same = f"{config.pairs[digests.index(found)]}.bin and {prefix}.bin have the same bytes"
            raise ShardError("documents would be in the result twice", same, "leave one of the pairs out")


def _print_counts(sides: dict[str, dict], read: int, removed: int) -> None:
    for side, entry in sides.items():
        print(f"{side}: {entry['documents']:,} documents, {entry['tokens']:,} tokens")
    empty = read - sum(entry["documents"] for entry in sides.values())
    for count, what in ((empty, "documents without a token left out"), (removed, "marks inside of documents removed")):
        if count:
            print(f"{count:,} {what}")


def _identity(pairs: list[Pair]) -> list[list[dict]]:
    """The size and the digest of both files of each pair."""
    return [[digest(Path(f"{pair.prefix}.{end}")) for end in ("bin", "idx")] for pair in pairs]


def open_pair(prefix: str) -> Pair:
    """Open a pair. Raises ShardError if it does not follow the format; the ids are checked later."""
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
            then = f"{at}, the next begins at {following[wrong[0]]:,}"
            raise ShardError(f"{bin_} does not fit {idx.name}", then, "copy both files again from where they were made")
    parts = (sequences[first : first + BATCH_TOKENS + 1] for first in range(0, len(sequences), BATCH_TOKENS))
    whole = len(sequences) > 0 and sequences[0] == 0 and sequences[-1] == len(lengths)
    if not whole or any((np.diff(part) < 0).any() for part in parts):
        wrong_index = "its document index does not divide its sequences into documents"
        raise ShardError(f"{idx} is damaged", wrong_index, "copy it again from where it was made")
    ids = np.memmap(bin_, dtype, "r") if size else np.empty(0, dtype)
    return Pair(prefix, ids, lengths, offsets, sequences)


def _check_returned(pair: Pair, tokenizer: Tokenizer, wanted: float) -> None:
    """Raise ShardError if too few tokens of a sample come back when it is decoded and encoded again.

    Some tokenizers do not even give back all of their own ids, so the share is compared with the share of the tokens
    that come back from text which this tokenizer encoded itself.
    """
    rows = list(_sample(pair, tokenizer))
    if sum(map(len, rows)) < FEW_TOKENS or any(((row < 0) | (row >= tokenizer.vocab_size)).any() for row in rows):
        return  # `documents` names an id outside of the vocabulary
    first = _returned(rows, tokenizer)
    share, own = _share(rows, first), _share(first, _returned(first, tokenizer))
    if share < wanted * own:
        begin = tokenizer.decode(max(rows, key=len)[:SHOWN_TOKENS])
        raise ShardError(
            f"{pair.prefix}.bin was probably made with another tokenizer than {tokenizer.folder}",
            f"of the tokens of {len(rows)} documents, {share:.1%} come back when they are decoded and encoded again",
            f"of text that this tokenizer encoded, {own:.1%} come back; a document begins: {begin!r}",
            "name the tokenizer that the pair was made with; if this is the one, lower min_returned",
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
    """Decode rows of ids to text, and encode the text again, without marks."""
    marks = list(tokenizer.specials.values())
    return [ids[~np.isin(ids, marks)] for ids in tokenizer.encode_batch([tokenizer.decode(row) for row in rows])]


def _share(rows: list[np.ndarray], others: list[np.ndarray]) -> float:
    """The share of the tokens of `rows` that the row in `others` has too, at any position."""
    common = total = 0
    for row, other in zip(rows, others, strict=True):
        size = max(row.max(initial=0), other.max(initial=0)) + 1
        common += int(np.minimum(np.bincount(row, minlength=size), np.bincount(other, minlength=size)).sum())
        total += len(row)
    return common / max(total, 1)


def documents(pair: Pair, tokenizer: Tokenizer, inner_marks: str) -> Iterator[CheckedDocuments]:
    """The documents of a pair, in batches of about BATCH_TOKENS. Raises ShardError for a wrong id or mark."""
    token = first = 0
    while first < len(pair.documents) - 1:
        begin = int(pair.documents[first])
        ends = np.cumsum(pair.lengths[begin : begin + BATCH_TOKENS], dtype=np.int64)
        reached = begin + int(np.searchsorted(ends, BATCH_TOKENS))
        last = max(first + 1, bisect_right(pair.documents, reached, first) - 1)
        bounds = np.asarray(pair.documents[first : last + 1])
        lengths = np.asarray(pair.lengths[bounds[0] : bounds[-1]], np.int64)
        ids = np.asarray(pair.ids[token : token + lengths.sum()], np.int64)
        yield _checked(pair, ids, lengths, bounds - begin, first, tokenizer, inner_marks == "remove")
        token, first = token + len(ids), last


def _checked(
    pair: Pair,
    ids: np.ndarray,
    lengths: np.ndarray,
    bounds: np.ndarray,
    first: int,
    tokenizer: Tokenizer,
    remove: bool,
) -> CheckedDocuments:
    """Check documents of a pair, beginning with number `first`, and remove their marks.

    Document `first + d` consists of the sequences bounds[d] to bounds[d + 1] - 1, which have `lengths` tokens.
    """
    ends = np.cumsum(lengths)
    begins = ends - lengths
    edges = np.append(begins, ends[-1:] if len(ends) else 0)[bounds]  # the tokens before each document

    def place(at: int) -> str:
        document = int(np.searchsorted(edges, at, side="right")) - 1
        return f"document {first + document:,}, token {at - edges[document]:,}: id {ids[at]}"

    wrong = np.flatnonzero((ids < 0) | (ids >= tokenizer.vocab_size))
    if len(wrong):
        has = f"{tokenizer.folder} has 0 to {tokenizer.vocab_size - 1}"
        remedy = "name the tokenizer that the pair was made with"
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
            "if the tokenizer is the right one, set inner_marks=remove to leave such tokens out",
        )
    counts = np.append(0, np.cumsum(keep))[edges]
    lengths = np.diff(counts)
    numbers = first + np.flatnonzero(lengths)
    return CheckedDocuments(ids[keep], lengths[lengths > 0], numbers, len(lengths), int(inner.sum()))


def _outer(is_mark: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """(tokens,) bool: True for marks with only marks between them and the beginning or the end of their sequence."""
    text = np.append(0, np.cumsum(~is_mark))  # the tokens of text before each token
    before, after = np.repeat(text[begins], ends - begins), np.repeat(text[ends], ends - begins)
    return is_mark & ((text[:-1] == before) | (text[:-1] == after))


def _write(
    writers: dict[str, SideWriter],
    found: CheckedDocuments,
    pair: int,
    tokenizer: Tokenizer,
    spelling: list[bytes],
    heldout_fraction: float,
) -> None:
    """Write some documents of pair number `pair`, each to its side."""
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


def _with_template(found: CheckedDocuments, specials: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """(ids, lengths) of the documents with the marks of our template."""
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
    """Raise ShardError if one side has no document."""
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
