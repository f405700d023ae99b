"""Count millions of short byte strings in arrays.

A `Counter` needs 140 ns for every word of a text (a hash, and a cache miss in a large table) and 200 bytes for every
distinct word. An array of packed words needs 30 ns and 16 to 24 bytes, and can be sent to another process unchanged.
"""

from collections import Counter
from collections.abc import Iterator

import numpy as np

from pretrain.hashing import mix

BLOCK = 8  # bytes: a string is stored as a row of 64-bit numbers, and the last one is filled up with FILL
FILL, BREAK = 0xFF, 0xFE  # neither occurs in UTF-8
WIDEST = 16  # blocks of a row; longer strings are rare in text and are counted one by one
LOOSE = 1 << 18  # unsorted blocks are sorted when they are more than this, and more than the sorted ones
PART = 1 << 15  # strings that are returned at a time

_KEEP = np.array([(1 << 8 * length) - 1 for length in range(BLOCK)] + [2**64 - 1], dtype=np.uint64)


class Tally:
    """Exact counts of UTF-8 strings, as 64-bit integers."""

    def __init__(self):
        self._rows: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}  # width → [(rows (n, width), counts (n,)), …]
        self._long: Counter[bytes] = Counter()
        self._sorted = self._loose = 0  # blocks in the first part of each width, and in its other parts

    def add(self, data: bytes, starts: np.ndarray, ends: np.ndarray, counts: np.ndarray | None = None) -> None:
        """Count every `data[start:end]` once, or `counts` times. No string may be empty."""
        lengths = ends - starts
        widths = (lengths + (BLOCK - 1)) // BLOCK
        blocks = np.ndarray(len(data), dtype="<u8", buffer=data + bytes(BLOCK), strides=(1,))  # at every byte
        wide = np.flatnonzero(widths > 1)
        for width in (1, *np.unique(widths[wide]).tolist()):
            if width > WIDEST:
                break
            if width == 1:
                here = np.flatnonzero(widths == 1)
            else:
                here = wide[widths[wide] == width]
            begin, used = starts[here], lengths[here] - (width - 1) * BLOCK  # used: bytes of the last block, 1 to 8
            rows = np.empty((len(here), width), dtype=np.uint64)
            for number in range(width):
                rows[:, number] = blocks[begin + number * BLOCK]
            rows[:, -1] = rows[:, -1] & _KEEP[used] | ~_KEEP[used]
            self._put(*_distinct(rows, None if counts is None else counts[here]))
        for string in np.flatnonzero(widths > WIDEST).tolist():
            self._long[data[starts[string] : ends[string]]] += 1 if counts is None else int(counts[string])

    def update(self, other: "Tally") -> None:
        """Add the counts of `other`."""
        for parts in other._rows.values():
            for rows, counts in parts:
                self._put(rows, counts)
        for string, count in other._long.items():
            self._long[string] += count

    @property
    def size(self) -> int:
        """The number of 8-byte blocks of all distinct strings: 1 for up to 8 bytes, 2 for up to 16, …"""
        self._settle()
        return self.most

    @property
    def most(self) -> int:
        """An upper bound of `size`, without sorting."""
        return self._sorted + self._loose + sum(-(-len(string) // BLOCK) for string in self._long)

    def items(self) -> Iterator[tuple[np.ndarray, list[int]]]:
        """All distinct strings, up to PART at a time: their bytes, each followed by BREAK, and their counts."""
        self._settle()
        for width, ((rows, counts),) in sorted(self._rows.items()):
            for begin in range(0, len(rows), PART):
                part = slice(begin, begin + PART)
                yield _strings(rows[part], width), counts[part].tolist()
        if self._long:
            joined = b"".join(string + bytes([BREAK]) for string in self._long)
            yield np.frombuffer(joined, dtype=np.uint8), list(self._long.values())

    def _put(self, rows: np.ndarray, counts: np.ndarray) -> None:
        if len(rows):
            self._rows.setdefault(rows.shape[1], []).append((rows, counts))
            self._loose += rows.size
        if self._loose > max(LOOSE, self._sorted):
            self._settle()

    def _settle(self) -> None:
        if not self._loose:
            return
        for width, parts in self._rows.items():
            if len(parts) > 1:
                rows, counts = (np.concatenate(side) for side in zip(*parts, strict=True))
                self._rows[width] = [_distinct(rows, counts)]
        self._sorted = sum(rows.size for ((rows, _),) in self._rows.values())
        self._loose = 0


def _distinct(rows: np.ndarray, counts: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """The distinct rows of (n, width), and how often each occurs, or the sum of its `counts`."""
    if not len(rows):
        return rows, np.zeros(0, dtype=np.int64)
    if counts is None and rows.shape[1] == 1:
        rows[:, 0].sort()  # 4 ns a row
        new = rows[1:, 0] != rows[:-1, 0]
    else:
        hashes = mixed(rows)
        order = np.argsort(hashes, kind="quick" if counts is None else "stable")  # stable is fast on sorted parts
        hashes, sorted_rows = hashes[order], rows[order]
        new = (sorted_rows[1:] != sorted_rows[:-1]).any(axis=1)
        if (new & (hashes[1:] == hashes[:-1])).any():  # two strings have one hash: equal rows may not be neighbours
            order = np.lexsort(rows.T)
            sorted_rows = rows[order]
            new = (sorted_rows[1:] != sorted_rows[:-1]).any(axis=1)
        rows = sorted_rows
        counts = None if counts is None else counts[order]
    first = np.flatnonzero(np.concatenate(([True], new)))
    totals = np.diff(np.append(first, len(rows))) if counts is None else np.add.reduceat(counts, first)
    return rows[first], totals


def mixed(rows: np.ndarray) -> np.ndarray:
    """A hash of every row, (n,) uint64; for a row of one number, the number itself."""
    found = rows[:, 0]
    for number in range(1, rows.shape[1]):
        found = mix(found) + rows[:, number]
    return found


def _strings(rows: np.ndarray, width: int) -> np.ndarray:
    """The bytes of the strings in packed rows, each followed by BREAK."""
    raw = np.full((len(rows), width * BLOCK + 1), BREAK, dtype=np.uint8)
    raw[:, :-1] = np.ascontiguousarray(rows, dtype="<u8").view(np.uint8).reshape(len(rows), width * BLOCK)
    flat = raw.ravel()
    return flat[flat != FILL]
