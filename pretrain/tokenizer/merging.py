"""Merging pairs of symbols into tokens, deterministically."""

import heapq
from collections import Counter

import numpy as np

from pretrain.progress import progress

STRETCH = 1 << 20  # positions whose pairs are sorted at a time: sorting all at once doubles the memory of training
SEEN_TWICE = 2  # a pair that occurs once is one word's accident, and never merged


def merge(words: Counter[str], tokens: list[str], vocab_size: int, prefix: str) -> list[str]:
    """`tokens` (specials and alphabet) and what byte-pair merging of `words` adds, in order of creation.

    The pair with the highest count is merged first; of equally frequent ones the pair whose (left, right) strings
    come first by code point. Fewer than `vocab_size` tokens come back when no pair is left that occurs twice.
    """
    tokens = list(tokens)
    ids = {token: number for number, token in enumerate(tokens)}
    pieces = _Pieces(words, ids, prefix)
    heap = [(-count, tokens[a], tokens[b]) for (a, b), count in pieces.counts.items() if count >= SEEN_TWICE]
    heapq.heapify(heap)
    with progress("merging", "tokens", vocab_size - len(tokens)) as advance:
        while heap and len(tokens) < vocab_size:
            claimed, left, right = heapq.heappop(heap)
            pair = ids[left], ids[right]
            count = pieces.counts.get(pair, 0)
            if count != -claimed:  # other merges took some since it was pushed
                if count >= SEEN_TWICE:
                    heapq.heappush(heap, (-count, left, right))
                continue
            # Never both ab+c and a+bc: merges happen everywhere at once, leftmost first, so equal strings that no
            # symbol sticks out of are cut alike wherever they stand.
            merged = left + right.removeprefix(prefix)
            assert merged not in ids, f"{merged!r} was made twice"
            ids[merged] = len(tokens)
            tokens.append(merged)
            for a, b in pieces.merge(pair, ids[merged]):
                if pieces.counts[a, b] >= SEEN_TWICE:
                    heapq.heappush(heap, (-pieces.counts[a, b], tokens[a], tokens[b]))
            advance(1)
    return tokens


class _Pieces:
    """Every distinct word as a chain of symbols, and `counts`: how often each pair of neighbours occurs.

    The words lie end to end in flat arrays over N positions, a boundary before, between and after them. A merge
    rewrites all its places at once with a few NumPy calls, which is what makes 8,000 merges of 10 MB take seconds.
    """

    BOUNDARY, SWALLOWED = -1, -2

    def __init__(self, words: Counter[str], ids: dict[str, int], prefix: str):
        text = "\n" + "".join(word + "\n" for word in words)  # no word holds a line end
        points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        starts, continuations = np.full((2, 0x110000), self.BOUNDARY, dtype=np.int32)
        for character in set(text) - {"\n"}:
            starts[ord(character)] = ids[character]
            continuations[ord(character)] = ids.get(prefix + character, self.BOUNDARY)
        boundary = points == ord("\n")
        after_boundary = np.concatenate(([True], boundary[:-1]))
        places = np.arange(len(points), dtype=np.int32)
        self.symbol = np.where(after_boundary, starts[points], continuations[points])  # (N,)
        self.before, self.after = places - 1, places + 1  # (N,) int32: the neighbours still standing
        self.weight = np.array([*words.values(), 0], dtype=np.int64)[np.cumsum(boundary) - 1]  # (N,) count of its word
        self.places = self._places_by_symbol()  # symbol → sorted positions that hold it or once did
        self.counts: dict[tuple[int, int], int] = self._count_pairs()

    def merge(self, pair: tuple[int, int], new: int) -> list[tuple[int, int]]:
        """Write `new` wherever `pair` stands, leftmost first. Returns the pairs that this made."""
        a, b = pair
        here = self._find(a, b)
        swallowed = self.after[here]
        left, right = self.before[here], self.after[swallowed]
        weight = self.weight[here]
        # In "abab" the second place's left neighbour is the first place's b: that pair is counted there, once.
        free = np.concatenate(([True], left[1:] != swallowed[:-1]))
        left, left_weight = left[free], weight[free]
        self._count(self.symbol[left], a, -left_weight)
        self._count(b, self.symbol[right], -weight)
        self.symbol[here], self.symbol[swallowed] = new, self.SWALLOWED
        self.after[here], self.before[right] = right, here
        self.places[new] = here
        del self.counts[pair]
        return self._count(self.symbol[left], new, left_weight) + self._count(new, self.symbol[right], weight)

    def _find(self, a: int, b: int) -> np.ndarray:
        """Sorted positions of `a` directly followed by `b`; in a run such as aaa only every other."""
        rarer = a if len(self.places[a]) <= len(self.places[b]) else b
        places = self.places[rarer]
        places = self.places[rarer] = places[self.symbol[places] == rarer]
        here = places if rarer == a else self.before[places]
        here = here[(self.symbol[here] == a) & (self.symbol[self.after[here]] == b)]
        if a != b:
            return here
        number = np.arange(len(here))
        begins = np.concatenate(([True], here[1:] != self.after[here[:-1]]))
        return here[(number - np.maximum.accumulate(np.where(begins, number, 0))) % 2 == 0]

    def _count(self, left: int | np.ndarray, right: int | np.ndarray, weight: np.ndarray) -> list[tuple[int, int]]:
        """Add `weight` to the counts of the pairs (left, right), one of them an array. Returns the distinct pairs."""
        many_left = isinstance(left, np.ndarray)
        neighbours = left if many_left else right
        inside = neighbours != self.BOUNDARY
        found, totals = _totals(neighbours[inside], weight[inside])
        pairs = [(s, right) if many_left else (left, s) for s in found.tolist()]
        for key, total in zip(pairs, totals.tolist(), strict=True):
            self.counts[key] = self.counts.get(key, 0) + total
        return pairs

    def _count_pairs(self) -> dict[tuple[int, int], int]:
        size = int(self.symbol.max(initial=0)) + 1
        counts: Counter[tuple[int, int]] = Counter()
        for begin in range(0, len(self.symbol) - 1, STRETCH):
            left, right = self.symbol[begin : begin + STRETCH], self.symbol[begin + 1 : begin + 1 + STRETCH]
            pairs = np.flatnonzero((left[: len(right)] != self.BOUNDARY) & (right != self.BOUNDARY))
            keys, totals = _totals(left[pairs].astype(np.int64) * size + right[pairs], self.weight[begin + pairs])
            for key, total in zip(keys.tolist(), totals.tolist(), strict=True):
                counts[divmod(key, size)] += total
        return dict(counts)

    def _places_by_symbol(self) -> dict[int, np.ndarray]:
        order = np.argsort(self.symbol, kind="stable").astype(np.int32)
        symbols, first = np.unique(self.symbol[order], return_index=True)
        return dict(zip(symbols.tolist(), np.split(order, first[1:]), strict=True))


def _totals(keys: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct keys and the sum of each one's weights, in integers (bincount would add floats)."""
    order = np.argsort(keys, kind="stable")
    distinct, first = np.unique(keys[order], return_index=True)
    return distinct, np.add.reduceat(weight[order], first) if len(first) else weight[:0]
