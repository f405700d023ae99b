"""The n-grams of a text as 64-bit numbers. De-duplication and decontamination compare texts by them.

A unit is a word (a run of letters and digits) in scripts with spaces between words, and one character in scripts
without (Han, kana, Thai, Lao, Khmer, Burmese). Case, punctuation, white space and width (full or half) do not count.
"""

import re
import unicodedata
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from xxhash import xxh3_64_intdigest

from pretrain.hashing import GOLDEN

UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003347f"
)
CHARACTER = re.compile(rf"[{UNSPACED}]")
BORDER = re.compile("[\n 。]")
UNIT = re.compile(rf"[{UNSPACED}]|[^\W_{UNSPACED}]+")


def units_of(text: str) -> list[str]:
    """The units of a text in order: `"The 5 G.中文"` → `the 5 g 中 文`."""
    return UNIT.findall(unicodedata.normalize("NFKC", text).lower())


@lru_cache(maxsize=1)  # decontamination and the search for near-duplicates ask for the same text in turn
def unit_hashes(text: str) -> np.ndarray:
    """(units,) uint64: the hashes of the units of a text. Memory: 24 bytes a unit, and 90 a character of a stretch."""
    return np.concatenate([hashes_of(units_of(stretch)) for stretch in _stretches(text)])


def _stretches(text: str) -> Iterator[str]:
    """Cut a text into stretches of at least STRETCH characters, at a BORDER: no unit, no normal form goes across it."""
    begin = 0
    while cut := BORDER.search(text, begin + STRETCH):
        yield text[begin : cut.start()]
        begin = cut.start()
    yield text[begin:]


def hashes_of(units: list[str]) -> np.ndarray:
    """(units,) uint64: the lowest bit is set if the unit is a character of an unspaced script."""
    if len(HASHES) > KNOWN_UNITS:
        HASHES.clear()
    return np.fromiter(map(HASHES.__getitem__, units), np.uint64, len(units))


class _Hashes(dict):
    def __missing__(self, unit: str) -> int:
        self[unit] = found = xxh3_64_intdigest(unit.encode()) & ~1 | bool(CHARACTER.match(unit))
        return found


HASHES = _Hashes()
KNOWN_UNITS = 1 << 18  # hashes that are kept: 30 MB
STRETCH = 1 << 18  # characters; as one list of units, a text of 16 million Chinese characters took 1.2 GB


def grams_of(hashes: np.ndarray, words: int, characters: int) -> tuple[np.ndarray, np.ndarray]:
    """(places, the n-grams that begin there), each (grams,).

    An n-gram has `words` units if its first unit is a word, and `characters` units if it is a character. Places too
    near the end for a whole n-gram have none: a text of fewer than `words` English words has no n-gram.
    """
    begins = (hashes & np.uint64(1)).astype(bool)
    places, grams = [], []
    for length, wanted in ((words, ~begins), (characters, begins)):
        if wanted.any():
            found = windows(hashes, length)
            wanted = wanted[: len(found)]
            places.append(np.flatnonzero(wanted))
            grams.append(found[wanted])
    return np.concatenate([np.empty(0, np.int64), *places]), np.concatenate([np.empty(0, np.uint64), *grams])


def windows(hashes: np.ndarray, length: int) -> np.ndarray:
    """(units - length + 1,) uint64: a hash of every `length` neighbouring units; empty if there are fewer units."""
    count = len(hashes) - length + 1
    if count <= 0:
        return np.empty(0, np.uint64)
    return combined([hashes[offset : offset + count] for offset in range(length)])


def combined(columns: list[np.ndarray]) -> np.ndarray:
    """(n,) uint64: one hash for each row of several columns (n,)."""
    found = np.full(len(columns[0]), len(columns), np.uint64)
    for column in columns:
        found *= GOLDEN
        found ^= found >> np.uint64(29)
        found += column
    return found * GOLDEN ^ found >> np.uint64(32)
