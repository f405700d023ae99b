"""Which documents and paragraphs of a corpus are copies of earlier ones.

Held-out documents come first, then train, each in the recipe's order; among equals the first stays. A train document
that repeats a held-out one therefore goes, and no held-out document goes because of a train one.

Near-duplicates: MinHash (Broder 1997) of n-grams of 5 units, banded for locality-sensitive hashing, as Lee et al. 2021
(arXiv:2107.06499) clean C4 and FineWeb (Penedo et al. 2024, arXiv:2406.17557: 112 hashes, 14 bands of 8) Common
Crawl. Unlike theirs, every candidate is verified: a document goes only if its estimated Jaccard similarity to one that
stays reaches the threshold, so that a chain of ever less similar copies is not cut at one end for the other.

Memory: 110 bytes a document, 30 more for each of its bands (21 by default) that another document shares, and 70 a
paragraph. Signatures (4 bytes a permutation and 8 a band, per document) stay on disk, mapped.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

import numpy as np
from pydantic import Field
from xxhash import xxh3_64_intdigest

from pretrain.cleaning.corpus_wide.ngrams import combined, unit_hashes, windows
from pretrain.cleaning.step import Section, library
from pretrain.config import Config
from pretrain.corpus.sides import folded

SEED = 1  # of the permutations
BATCH_GRAMS = 512  # hashed at a time: 256 KB of intermediate values; 2,048 at a time took three times as long
COMPARED = 0.99  # of the pairs at the threshold, at least
CROWD = 64  # documents that stay and are compared, per bucket: bounds the work on a million pages of one template
NONE = -1
EMPTY = np.uint64(2**32 - 1)  # every number of the signature of a text without n-grams
NO_KEY = np.uint64(2**64 - 1)


class Near(Section):
    """Near-duplicates: a document goes when its Jaccard similarity to an earlier one is estimated ≥ `threshold`.

    The estimate has a standard deviation of sqrt(J (1 - J) / permutations): 0.035 at 0.8 with 128.
    """

    use: bool = True  # for every language
    threshold: float = Field(0.8, ge=0.5, le=1)
    permutations: int = Field(128, ge=16, le=1024)
    units: int = Field(5, ge=1)  # words, or characters of Chinese, in an n-gram


class Paragraphs(Section):
    """Exact duplicates by paragraph (a line): later copies go, and a document of which none that long is left."""

    use: bool = False
    min_bytes: int = Field(100, ge=1)  # shorter ones stay: headings, refrains, 33 Chinese characters


class Duplicates(Config):
    documents: bool = True  # exact copies, white space folded
    near: Near = Near()
    paragraphs: Paragraphs = Paragraphs()


@dataclass(frozen=True)
class Twins:
    """Per document (n,): the row of the earlier one that it nearly repeats, or NONE; the row of the most similar of
    those it was compared with, or NONE, and how similar that is, or NaN. The first two agree where it repeats one.
    """

    first: np.ndarray  # int64
    nearest: np.ndarray  # int64
    similarity: np.ndarray  # float32, estimated
    crowded: int  # buckets that were full: CROWD documents stay in each, and others were not compared with more

    @classmethod
    def none(cls, rows: int) -> "Twins":
        return cls(np.full(rows, NONE), np.full(rows, NONE), np.full(rows, np.nan, np.float32), 0)


def document_hash(text: str) -> int:
    return xxh3_64_intdigest(folded(text))


def long_paragraphs(text: str, min_bytes: int) -> list[tuple[int, int]]:
    """(line, hash) of the paragraphs of at least `min_bytes`, white space folded."""
    found = []
    for line, paragraph in enumerate(text.split("\n")):
        folded = " ".join(paragraph.split()).encode()
        if len(folded) >= min_bytes:
            found.append((line, xxh3_64_intdigest(folded)))
    return found


def signature(text: str, near: Near) -> np.ndarray:
    """(permutations,) uint32: MinHash of a text. One shorter than an n-gram is one itself; no unit at all: EMPTY."""
    minhash = _minhash(near.permutations)
    minhash.clear()
    hashes = unit_hashes(text)
    grams = windows(hashes, min(near.units, len(hashes))) >> np.uint64(32) if len(hashes) else hashes
    for begin in range(0, len(grams), BATCH_GRAMS):
        minhash.update_batch(grams[begin : begin + BATCH_GRAMS].tolist())
    return minhash.digest()


@lru_cache(maxsize=1)
def _minhash(permutations: int):
    return library("datasketch").MinHash(permutations, SEED, hashfunc=int, scheme="affine32")


def bands_of(near: Near) -> tuple[int, int]:
    """(bands, rows of each): the most selective that compare COMPARED of the pairs at the threshold.

    128 permutations at 0.8 make 21 bands of 6: of pairs at 0.8 99.8 % are compared, at 0.5 28 %, at 0.2 0.1 %.
    """
    for rows in range(near.permutations, 1, -1):
        bands = near.permutations // rows
        if 1 - (1 - near.threshold**rows) ** bands >= COMPARED:
            return bands, rows
    return near.permutations, 1


def band_keys(signatures: np.ndarray, near: Near) -> np.ndarray:
    """(bands, n) uint64 of signatures (n, permutations): equal where all rows of a band are. NO_KEY without n-grams."""
    bands, rows = bands_of(near)
    columns = signatures.T.astype(np.uint64)  # (permutations, n)
    keys = np.stack([combined(list(columns[band * rows : (band + 1) * rows])) for band in range(bands)])
    keys[:, (columns == EMPTY).all(axis=0)] = NO_KEY
    return keys


def exact_twins(hashes: np.ndarray, priority: np.ndarray) -> np.ndarray:
    """(n,) int64: for each row the first of `priority` with the same hash, NONE for that one itself.

    `priority` (m,) lists the rows that count, the ones that stay first.
    """
    first = np.full(len(hashes), NONE, np.int64)
    if len(priority):
        order = priority[np.argsort(hashes[priority], kind="stable")]
        begins = np.flatnonzero(_begins(hashes[order]))
        first[order] = np.repeat(order[begins], np.diff(np.r_[begins, len(order)]))
        first[order[begins]] = NONE
    return first


def near_twins(signatures: np.ndarray, keys: np.ndarray, priority: np.ndarray, near: Near) -> Twins:
    """Near-duplicates among the rows of `priority` (m,), those that stay first, greedily: only what stays is compared.

    signatures (n, permutations) uint32 and keys (bands, n) uint64 may be mapped files.
    """
    twins = Twins.none(len(signatures))
    places, buckets = _shared_buckets(keys, priority)
    room = np.minimum(np.bincount(buckets), CROWD).astype(np.uint8)
    begin = np.cumsum(room, dtype=np.int64) - room
    staying = np.empty(int(room.sum(dtype=np.int64)), np.int32)  # places in `priority`, bucket by bucket
    filled = np.zeros(len(room), np.uint8)
    for low, high in _runs(places):
        row, mine = priority[places[low]], buckets[low:high]
        candidates = np.unique(np.concatenate([staying[begin[b] : begin[b] + filled[b]] for b in mine]))
        if len(candidates):
            others = priority[candidates]
            similar = (signatures[others] == signatures[row]).mean(axis=1, dtype=np.float32)
            enough = np.flatnonzero(similar >= near.threshold)
            best = enough[0] if len(enough) else similar.argmax()  # the first that it repeats, or the most similar
            twins.similarity[row], twins.nearest[row] = similar[best], others[best]
            if len(enough):
                twins.first[row] = others[best]
                continue
        open_ = mine[filled[mine] < room[mine]]
        staying[begin[open_] + filled[open_]] = places[low]
        filled[open_] += 1
    return replace(twins, crowded=int((filled == CROWD).sum()))


def _shared_buckets(keys: np.ndarray, priority: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(places in `priority`, their buckets), each (memberships,) int32, by place: of buckets that hold two or more."""
    places, buckets, count = [np.empty(0, np.int32)], [np.empty(0, np.int32)], 0
    for band in keys:
        values = np.asarray(band[priority])
        order = np.argsort(values, kind="stable")
        values = values[order]
        begins = _begins(values)
        shared = (~begins | np.r_[~begins[1:], False]) & (values != NO_KEY)
        places.append(order[shared].astype(np.int32))
        buckets.append((count + np.cumsum(begins[shared]) - 1).astype(np.int32))
        count += int(begins[shared].sum())
    assert max(count, keys.shape[1]) < 2**31, (count, keys.shape)
    places, buckets = np.concatenate(places), np.concatenate(buckets)
    order = np.argsort(places, kind="stable")
    return places[order], buckets[order]


def _begins(values: np.ndarray) -> np.ndarray:
    """(n,) bool: where a run of equal values begins."""
    return np.r_[True, values[1:] != values[:-1]][: len(values)]


def _runs(values: np.ndarray) -> Iterator[tuple[int, int]]:
    """(begin, end) of every run of equal values."""
    edges = np.r_[np.flatnonzero(_begins(values)), len(values)].tolist()
    return pairwise(edges)
