"""Find the documents and paragraphs of a corpus that repeat earlier ones.

Held-out documents come before train documents; within a side, the recipe's order holds. The first of several copies
stays. So a train document that repeats a held-out one is dropped, and a train document never drops a held-out one.

Near-duplicates are found by MinHash (Broder 1997) of n-grams of 5 units, with bands for locality-sensitive hashing, as
Lee et al. 2021 (arXiv:2107.06499) do for C4, and FineWeb (Penedo et al. 2024, arXiv:2406.17557: 112 hashes, 14 bands of
8) for Common Crawl. Unlike them, we verify every candidate: a document is dropped only if its estimated Jaccard
similarity to a document that stays reaches the threshold. In a chain of copies, each a little different from the last,
a document far from the first one therefore stays.

Memory: 110 bytes a document, 30 more for each of its bands (21 by default) that another document shares, and 70 a
paragraph. Signatures (4 bytes a permutation and 8 a band, per document) stay in mapped files.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
from pydantic import Field
from xxhash import xxh3_64_intdigest

from pretrain.cleaning.corpus_wide.ngrams import combined, unit_hashes, windows
from pretrain.cleaning.step import Section, library
from pretrain.config import Config
from pretrain.corpus.sides import folded

SEED = 1  # of the permutations
BATCH_GRAMS = 512  # n-grams hashed at a time: 256 KB of intermediate values; batches of 2,048 took three times as long
COMPARED = 0.99  # the share of the pairs at the threshold that are compared, at least
CROWD = 64  # documents of one bucket that later ones are compared with: bounds the work on a million similar pages
NONE = -1  # in place of a row: there is no such document
EMPTY = np.uint64(2**32 - 1)  # the signature of a text without n-grams consists of this number
NO_KEY = np.uint64(2**64 - 1)  # the band keys of a text without n-grams


class Near(Section):
    """Drop documents that nearly repeat an earlier one.

    The estimate of the similarity J has a standard deviation of sqrt(J (1 - J) / permutations): 0.035 at J = 0.8 with
    128 permutations.
    """

    use: bool = True
    """Whether near-duplicates are dropped, in all languages."""
    threshold: float = Field(0.8, ge=0.5, le=1)
    """A document is dropped if its estimated Jaccard similarity to an earlier one is at least this."""
    permutations: int = Field(128, ge=16, le=1024)
    """Numbers in a document's signature. More make the estimate better, and need more time and disk space."""
    units: int = Field(5, ge=1)
    """Words in an n-gram, or characters in Chinese and other languages without spaces."""


class Paragraphs(Section):
    """Remove paragraphs (lines) that repeat an earlier one exactly; drop documents whose long paragraphs all do."""

    use: bool = False
    """Whether repeated paragraphs are removed, in all languages."""
    min_bytes: int = Field(100, ge=1)
    """Bytes of UTF-8: shorter paragraphs always stay, such as headings and refrains. 100 are 33 Chinese characters."""


class Duplicates(Config):
    """Which copies are removed."""

    documents: bool = True
    """Drop documents that repeat an earlier one exactly, apart from white space."""
    near: Near = Near()
    paragraphs: Paragraphs = Paragraphs()


@dataclass(frozen=True)
class Twins:
    """The near-duplicates of a corpus. The arrays have one entry a document.

    `nearest` equals `first` for a document that nearly repeats an earlier one.
    """

    first: np.ndarray  # (n,) int64: the row of the earlier document that it nearly repeats, or NONE
    nearest: np.ndarray  # (n,) int64: the row of the most similar document it was compared with, or NONE
    similarity: np.ndarray  # (n,) float32: the estimated similarity to `nearest`, or NaN
    crowded: int  # full buckets: they hold CROWD documents, and later documents were compared with these alone

    @classmethod
    def none(cls, rows: int) -> "Twins":
        return cls(np.full(rows, NONE), np.full(rows, NONE), np.full(rows, np.nan, np.float32), 0)


def document_hash(text: str) -> int:
    """The hash of a document, with white space folded."""
    return xxh3_64_intdigest(folded(text))


def long_paragraphs(text: str, min_bytes: int) -> list[tuple[int, int]]:
    """(line, hash) of every paragraph of at least `min_bytes`, with white space folded."""
    found = []
    for line, paragraph in enumerate(text.split("\n")):
        folded = " ".join(paragraph.split()).encode()
        if len(folded) >= min_bytes:
            found.append((line, xxh3_64_intdigest(folded)))
    return found


def signature(text: str, near: Near) -> np.ndarray:
    """(permutations,) uint32: the MinHash of a text.

    A text shorter than an n-gram counts as a single n-gram. The signature of a text without units is all EMPTY.
    """
    minhash = _minhash(near.permutations)
    minhash.clear()
    hashes = unit_hashes(text)
    grams = windows(hashes, min(near.units, len(hashes))) >> np.uint64(32) if len(hashes) else hashes
    for begin in range(0, len(grams), BATCH_GRAMS):
        minhash.update_batch(grams[begin : begin + BATCH_GRAMS].tolist())
    return minhash.digest()


@lru_cache(maxsize=1)
def _minhash(permutations: int) -> Any:  # datasketch has no types
    return library("datasketch").MinHash(permutations, SEED, hashfunc=int, scheme="affine32")


def bands_of(near: Near) -> tuple[int, int]:
    """(bands, rows of each): the longest bands that still compare at least COMPARED of the pairs at the threshold.

    128 permutations at 0.8 make 21 bands of 6 rows: they compare 99.8 % of the pairs with similarity 0.8, 28 % of those
    with 0.5, and 0.1 % of those with 0.2.
    """
    for rows in range(near.permutations, 1, -1):
        bands = near.permutations // rows
        if 1 - (1 - near.threshold**rows) ** bands >= COMPARED:
            return bands, rows
    return near.permutations, 1


def band_keys(signatures: np.ndarray, near: Near) -> np.ndarray:
    """(bands, n) uint64: one key for each band of signatures (n, permutations).

    Two documents have the same key if all rows of the band are equal. Texts without n-grams have NO_KEY.
    """
    bands, rows = bands_of(near)
    columns = signatures.T.astype(np.uint64)  # (permutations, n)
    keys = np.stack([combined(list(columns[band * rows : (band + 1) * rows])) for band in range(bands)])
    keys[:, (columns == EMPTY).all(axis=0)] = NO_KEY
    return keys


def exact_twins(hashes: np.ndarray, priority: np.ndarray) -> np.ndarray:
    """(n,) int64: for each row, the first row of `priority` with the same hash; NONE for that first row itself.

    `priority` (m,) lists the rows to compare. Of several copies the first in this list stays.
    """
    first = np.full(len(hashes), NONE, np.int64)
    if len(priority):
        order = priority[np.argsort(hashes[priority], kind="stable")]
        begins = np.flatnonzero(_begins(hashes[order]))
        first[order] = np.repeat(order[begins], np.diff(np.r_[begins, len(order)]))
        first[order[begins]] = NONE
    return first


def near_twins(signatures: np.ndarray, keys: np.ndarray, priority: np.ndarray, near: Near) -> Twins:
    """Find the near-duplicates among the rows of `priority` (m,), in this order.

    The search is greedy: each row is compared only with earlier rows that stay. signatures (n, permutations) uint32 and
    keys (bands, n) uint64 may be mapped files.
    """
    twins = Twins.none(len(signatures))
    places, buckets = _shared_buckets(keys, priority)
    room = np.minimum(np.bincount(buckets), CROWD).astype(np.uint8)
    begin = np.cumsum(room, dtype=np.int64) - room
    staying = np.empty(int(room.sum(dtype=np.int64)), np.int32)  # rows that stay, as places in `priority`, by bucket
    filled = np.zeros(len(room), np.uint8)
    for low, high in _runs(places):
        row, mine = priority[places[low]], buckets[low:high]
        candidates = np.unique(np.concatenate([staying[begin[b] : begin[b] + filled[b]] for b in mine]))
        if len(candidates):
            others = priority[candidates]
            similar = (signatures[others] == signatures[row]).mean(axis=1, dtype=np.float32)
            enough = np.flatnonzero(similar >= near.threshold)
            # The first one at the threshold; without any, the most similar one.
            best = enough[0] if len(enough) else similar.argmax()
            twins.similarity[row], twins.nearest[row] = similar[best], others[best]
            if len(enough):
                twins.first[row] = others[best]
                continue
        open_ = mine[filled[mine] < room[mine]]
        staying[begin[open_] + filled[open_]] = places[low]
        filled[open_] += 1
    return replace(twins, crowded=int((filled == CROWD).sum()))


def _shared_buckets(keys: np.ndarray, priority: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(places in `priority`, their buckets), each (memberships,) int32, sorted by place.

    A bucket holds the rows with the same key of a band. Buckets with a single row are left out.
    """
    all_places, all_buckets, count = [np.empty(0, np.int32)], [np.empty(0, np.int32)], 0
    for band in keys:
        values = np.asarray(band[priority])
        order = np.argsort(values, kind="stable")
        values = values[order]
        begins = _begins(values)
        shared = (~begins | np.r_[~begins[1:], False]) & (values != NO_KEY)
        all_places.append(order[shared].astype(np.int32))
        all_buckets.append((count + np.cumsum(begins[shared]) - 1).astype(np.int32))
        count += int(begins[shared].sum())
    assert max(count, keys.shape[1]) < 2**31, (count, keys.shape)
    places, buckets = np.concatenate(all_places), np.concatenate(all_buckets)
    order = np.argsort(places, kind="stable")
    return places[order], buckets[order]


def _begins(values: np.ndarray) -> np.ndarray:
    """(n,) bool: True at the first of each run of equal values."""
    return np.r_[True, values[1:] != values[:-1]][: len(values)]


def _runs(values: np.ndarray) -> Iterator[tuple[int, int]]:
    """(begin, end) of every run of equal values."""
    edges = np.r_[np.flatnonzero(_begins(values)), len(values)].tolist()
    return pairwise(edges)
