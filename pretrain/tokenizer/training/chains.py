"""The words of a training text as chains of symbols, in flat arrays in which pairs of symbols are found and merged."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np

WORDS = 1 << 15  # words that are spelled at a time
STRETCH = 1 << 20  # positions whose pairs are sorted at a time: sorting all at once doubles the memory of training

Spell = Callable[[list[str]], tuple[np.ndarray, np.ndarray]]  # words → symbols (n,) and the length of each (n,)


class Pair(NamedTuple):
    """Two symbols that are neighbours in some words."""

    left: int
    right: int
    total: int  # of places where the two are neighbours, weighted; `aaa` has two places of the pair `a`, `a`
    places: np.ndarray  # int32: where the left symbol begins


class Pairs(NamedTuple):
    """All pairs of neighbours, P of them."""

    left: np.ndarray  # (P,) ids
    right: np.ndarray
    counts: np.ndarray  # (P,) int64
    # For each stretch: the numbers of its pairs, the bounds of each pair's places, and the places.
    stretches: list[tuple[np.ndarray, np.ndarray, np.ndarray]]

    def often(self, floor: int) -> Iterator[Pair]:
        """The pairs that occur at least `floor` times, the most frequent first."""
        sizes = np.zeros(len(self.counts), dtype=np.int64)  # places of each pair
        for numbers, bounds, _ in self.stretches:
            sizes[numbers] += np.diff(bounds)
        sizes[self.counts < floor] = 0
        ends = sizes.cumsum()
        free = ends - sizes  # the index in `gathered` of each pair's next place
        gathered = np.empty(sizes.sum(), dtype=np.int32)
        for numbers, bounds, places in self.stretches:
            size, kept = np.diff(bounds), self.counts[numbers] >= floor
            places, size, numbers = places[kept.repeat(size)], size[kept], numbers[kept]
            gathered[(free[numbers] - size.cumsum() + size).repeat(size) + np.arange(len(places))] = places
            free[numbers] += size
        often = where(self.counts >= floor)
        often = often[np.argsort(-self.counts[often], kind="stable")]
        columns = self.left, self.right, self.counts, ends - sizes, ends
        for left, right, total, begin, end in listed(*(column[often] for column in columns)):
            yield Pair(left, right, total, gathered[begin:end])


class NewPair(NamedTuple):
    """The pairs of neighbours that contain a symbol just made."""

    new: int  # the symbol
    total: int  # of places where it was made, weighted
    first: np.ndarray  # (n,) bool: whether the new symbol is the left one of the pair
    others: np.ndarray  # (n,) int32: the other symbol of the pair
    places: np.ndarray  # (n,) where the left symbol begins
    weight: np.ndarray  # (n,) int64

    def often(self, floor: int) -> Iterator[Pair]:
        """The pairs that occur at least `floor` times."""
        keys = self.others * 2 + self.first
        order = keys.argsort()
        keys, ends, counts = _runs(keys[order], self.weight[order])
        often = where(counts >= floor)
        if not len(often):
            return
        places = self.places[order].astype(np.int32)
        for key, count, begin, end in listed(keys[often], counts[often], ends[often], ends[often + 1]):
            other = key // 2
            yield Pair(*((self.new, other) if key % 2 else (other, self.new)), count, places[begin:end])


class Chains:
    """Every distinct word as a chain of symbols, end to end in flat arrays, with a boundary around each word.

    Each character has a place. A symbol is written at the place of its first character, and its length at the place
    of its last one, so both neighbours of a symbol are found without links. A merge rewrites all places of a pair at
    once with a few NumPy calls.
    """

    BOUNDARY, INSIDE = -1, -2  # the last character of a symbol of several has -1 - length

    def __init__(
        self, words: Counter[str], ids: dict[str, int], prefix: str, pieces: Callable[[str], Sequence[int]] | None
    ):
        size = 1 + sum(map(len, words)) + len(words)
        assert size < 2**31, f"{size} characters of distinct words, and their places are 32-bit"
        self._lengths = [len(token.removeprefix(prefix)) for token in ids]  # by symbol, in characters
        counts = np.fromiter(words.values(), dtype=np.int64, count=len(words))
        self._symbol = np.full(size, self.INSIDE, dtype=np.int32)  # (N,)
        narrow = np.int32 if counts.max(initial=0) < 2**31 else np.int64
        self._weights = np.zeros(size, dtype=narrow)  # (N,) how often the word at this place occurs
        self._symbol[0] = self.BOUNDARY
        spell = self._by_pieces(pieces) if pieces else _by_character(ids, prefix)
        begin, number, rest = 1, 0, iter(words)
        while batch := list(islice(rest, WORDS)):
            symbols, lengths = spell(batch)
            ends = begin + np.cumsum(lengths)
            self._symbol[(ends - 1)[lengths > 1]] = -1 - lengths[lengths > 1]
            self._symbol[ends - lengths] = symbols
            sizes = [len(word) + 1 for word in batch]
            assert ends[-1] == begin + sum(sizes), "pieces do not spell their word"
            self._weights[begin : ends[-1]] = np.repeat(counts[number : number + len(batch)], sizes)
            begin, number = int(ends[-1]), number + len(batch)

    def symbol_counts(self, size: int) -> np.ndarray:
        """How often each of `size` symbols occurs: (size,) int64."""
        counts = np.zeros(size, dtype=np.int64)
        for begin, end in self._stretches():
            places = begin + where(self._symbol[begin:end] >= 0)
            np.add.at(counts, self._symbol[places], self._weight(places))
        return counts

    def pairs(self, size: int) -> Pairs:
        """All pairs of neighbours among `size` symbols."""
        keys, counts, stretches = [], [], []
        for begin, end in self._stretches():
            places = begin + where(self._symbol[begin : end + 1] >= self.BOUNDARY)
            symbols = self._symbol[places]
            inside = where((symbols[:-1] >= 0) & (symbols[1:] >= 0))
            key = symbols[inside].astype(np.int64) * size + symbols[inside + 1]
            order = np.argsort(key)
            places = places[inside[order]].astype(np.int32)
            found, bounds, count = _runs(key[order], self._weight(places))
            keys.append(found)
            counts.append(count)
            stretches.append((bounds, places))
        order = np.argsort(np.concatenate(keys))
        distinct, _, totals = _runs(np.concatenate(keys)[order], np.concatenate(counts)[order])
        left, right = np.divmod(distinct, size)
        numbers = [np.searchsorted(distinct, key) for key in keys]
        return Pairs(left, right, totals, [(n, *rest) for n, rest in zip(numbers, stretches, strict=True)])

    def find(self, left: int, right: int, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The places among `places` where `right` still follows `left`, and how often the word there occurs."""
        here = places.astype(np.intp)  # indexing with other integers takes three times as long
        here = here[self._symbol[here] == left]
        here = here[self._symbol[here + self._lengths[left]] == right]
        return here, self._weight(here)

    def count_apart(self, symbol: int, places: np.ndarray) -> int:
        """How often a pair of equal symbols would be merged: once in `aaa`."""
        return int(self._apart(symbol, *self.find(symbol, symbol, places))[1].sum())

    def merge(self, left: int, right: int, here: np.ndarray, weight: np.ndarray, new: int) -> NewPair:
        """Write the symbol `new` over the pair at the places `here`; where places overlap, the leftmost is merged."""
        if left == right:
            here, weight = self._apart(left, here, weight)
        half, length = self._lengths[left], self._lengths[left] + self._lengths[right]
        if new == len(self._lengths):
            self._lengths.append(length)
        symbol = self._symbol
        symbol[here + half] = self.INSIDE
        symbol[here] = new
        symbol[here + (length - 1)] = -1 - length
        last = here - 1  # the last character of the symbol before, or a boundary
        mark = symbol[last]
        before = np.where(mark >= self.BOUNDARY, last, last + mark + 2)
        others = np.concatenate((symbol[before], symbol[here + length]))
        first = np.arange(len(others)) >= len(here)
        # Where two new symbols are neighbours, both see the same pair: it is counted once, for the right one.
        kept = (others >= 0) & ~((others == new) & first)
        places, both = np.concatenate((before, here)), np.concatenate((weight, weight))
        return NewPair(new, int(weight.sum()), first[kept], others[kept], places[kept], both[kept])

    def _apart(self, symbol: int, here: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Select the places to merge for a pair of equal symbols: every other place of each run of the symbol."""
        order = np.argsort(here)
        here, weight = here[order], weight[order]
        number = np.arange(len(here))
        begins = np.append(True, here[1:] != here[:-1] + self._lengths[symbol])[: len(here)]
        taken = (number - np.maximum.accumulate(np.where(begins, number, 0))) % 2 == 0
        return here[taken], weight[taken]

    def _weight(self, places: np.ndarray) -> np.ndarray:
        return self._weights[places].astype(np.int64)

    def _stretches(self) -> Iterator[tuple[int, int]]:
        """Begin and end of stretches of about STRETCH places; each ends at a boundary, which is not part of it."""
        begin, last = 0, len(self._symbol) - 1
        while begin < last:
            end = min(begin + STRETCH, last)
            while self._symbol[end] != self.BOUNDARY:
                end += 1
            yield begin, end
            begin = end

    def _by_pieces(self, pieces: Callable[[str], Sequence[int]]) -> Spell:
        """Spells each word as `pieces(word)`, with a boundary behind it."""

        def spell(words: list[str]) -> tuple[np.ndarray, np.ndarray]:
            symbols = np.array([symbol for word in words for symbol in (*pieces(word), self.BOUNDARY)], dtype=np.int32)
            lengths = np.array([*self._lengths, 1])  # BOUNDARY is -1, the index of the last one
            return symbols, lengths[symbols]

        return spell


def _by_character(ids: dict[str, int], prefix: str) -> Spell:
    """Spells each word as the symbols of its characters, with a boundary behind it."""
    starts, continuations = np.full((2, 0x110000), -1, dtype=np.int32)
    for token, number in ids.items():
        if len(token) == 1:
            starts[ord(token)] = number
        if len(token) == len(prefix) + 1 and token.startswith(prefix):
            continuations[ord(token[-1])] = number

    def spell(words: list[str]) -> tuple[np.ndarray, np.ndarray]:
        points = np.frombuffer("".join(word + "\n" for word in words).encode("utf-32-le"), dtype="<u4")
        boundary = points == ord("\n")  # no word holds a line end
        first = np.append(True, boundary[:-1])
        symbols = np.where(first, starts[points], continuations[points])
        assert (symbols[~boundary] >= 0).all(), "a word has a character that is no token"
        symbols[boundary] = Chains.BOUNDARY
        return symbols, np.ones(len(symbols), dtype=np.int64)

    return spell


def _runs(keys: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For sorted keys: the distinct ones, the bounds of their runs (one more, from 0), and the weight of each run.

    The weights are added as integers, which `bincount` would not do.
    """
    new = where(keys[1:] != keys[:-1]) + 1
    bounds = np.concatenate(([0], new, [len(keys)]))
    first = bounds[:-1] if len(keys) else bounds[:0]
    return keys[first], bounds, np.add.reduceat(weight, first) if len(keys) else weight[:0]


def where(condition: np.ndarray) -> np.ndarray:
    """The indexes at which a one-dimensional condition holds."""
    return condition.nonzero()[0]


def listed(*arrays: np.ndarray) -> Iterator[tuple[int, ...]]:
    """The rows of several columns, as Python's numbers, which are faster one by one."""
    return zip(*(array.tolist() for array in arrays), strict=True)
