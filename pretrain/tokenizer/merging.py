"""Merging pairs of symbols into tokens, deterministically.

Two criteria say which pair comes next.

`bpe` takes the most frequent one, as byte-pair encoding does (Sennrich et al. 2016, arXiv:1508.07909), and as the
WordPiece trainer of `tokenizers` does.

`wordpiece` takes the one that makes the training text most likely, as WordPiece was published (Schuster & Nakajima
2012, "Japanese and Korean voice search", section 4, step 3): under a unigram model of the symbols, the gain of merging
a and b, which occur a, b and together n times among N symbols, is

    f(n) + f(a - n) - f(a) + f(b - n) - f(b) + f(N) - f(N - n)      with f(x) = x ln x

To first order that is n ln(n N / (a b)). The often quoted score n / (a b) leaves out the weight n: it merges what
occurs twice and always together first, and reaches a size only by a threshold made for it.

`bpe` is the default: every corpus has more characters a token with it, and no model learns measurably better with the
other. Bits per byte of a decoder of 1.4 M parameters with 8,192 `byte` entries, mean and range of three seeds: English
(800 steps) 2.159 (2.134-2.184) with bpe, 2.167 (2.141-2.182) with wordpiece; Chinese (400 steps) 2.827 (2.809-2.853)
and 2.806 (2.800-2.811). Characters per token of held-out text, 30,000 entries from 10 MB:

                          bpe    wordpiece   n / (a b), n ≥ 100
    English, bert         4.312  4.266       3.663 (8,032 entries: no more pairs)
    Chinese, byte         1.478  1.444       1.163 (9,283)
    both, byte            3.027  2.981       2.642 (19,782)
"""

import heapq
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from decimal import Context, Decimal
from itertools import islice, pairwise
from typing import NamedTuple

import numpy as np

from pretrain.progress import progress

SEEN_TWICE = 2  # a pair that occurs once is one word's accident, and never merged
WORDS = 1 << 15  # spelled at a time
STRETCH = 1 << 20  # positions whose pairs are sorted at a time: sorting all at once doubles the memory of training


def merge(
    words: Counter[str],
    tokens: list[str],
    vocab_size: int,
    prefix: str,
    *,
    criterion: str = "bpe",
    pieces: Callable[[str], Sequence[int]] | None = None,
) -> list[str]:
    """`tokens` (specials and alphabet) and what merging adds to them, in order of creation.

    The best pair by `criterion` is merged first; of equally good ones the pair whose (left, right) strings come first
    by code point. Fewer than `vocab_size` tokens come back when no pair is left that occurs twice, or none that makes
    the text more likely. A word begins as its characters, or as `pieces(word)`: ids of tokens that spell it. What is
    merged into a token that is there already keeps that token's id.

    Memory: 8 bytes for each character of `words`, 12 if a word occurs 2^31 times, and 4 for each that begins a
    frequent pair.
    """
    tokens = list(tokens)
    ids = {token: number for number, token in enumerate(tokens)}
    chains = _Chains(words, ids, prefix, pieces)
    choices = {"bpe": _MostFrequent, "wordpiece": _MostLikely}[criterion]
    with progress("merging", "tokens", vocab_size - len(tokens)) as advance:
        more = bool(words)
        while more and len(tokens) < vocab_size:
            more, known = False, False
            choice = choices(chains, tokens)
            while not known and len(tokens) < vocab_size and (pairs := choice.best(vocab_size - len(tokens))):
                # Never both ab+c and a+bc: merges happen everywhere at once, leftmost first, so equal strings that no
                # symbol sticks out of are cut alike wherever they stand. (Not so with `pieces` of another making.)
                more, numbers = True, []
                for left, right in pairs:
                    merged = tokens[left] + tokens[right].removeprefix(prefix)
                    known = merged in ids  # its pairs become more frequent, those left out so far among them
                    if known:
                        break
                    ids[merged] = len(tokens)
                    numbers.append(len(tokens))
                    tokens.append(merged)
                advance(len(numbers))
                if known and not numbers:
                    numbers.append(ids[merged])
                else:
                    known = False
                choice.merge(numbers)
    return tokens


class _MostFrequent:
    """The pairs at or above some count, the most frequent one on top.

    Counts only fall, except that a new symbol brings new pairs. So the count that a pair was pushed with is a bound,
    and the pair is looked at again when it comes to the top: rare pairs and pairs that lose to others cost nothing.

    Pairs have no place in common, and do not change each other's counts, unless one begins with what the other ends
    with. So the next ones are looked at together, and merged together as far as none brings a pair that may come before
    the next: for NumPy 1,000 places are hardly more work than 50.
    """

    REACH = 16  # pairs this many times rarer than the best are left out until it is their turn
    TOGETHER = 1 << 11  # places, or those of one pair

    def __init__(self, chains: "_Chains", tokens: list[str]):
        self._chains, self._tokens = chains, tokens
        pairs = chains.pairs(len(tokens))
        self._floor = max(SEEN_TWICE, int(pairs.counts.max(initial=0)) // self.REACH)
        found = list(pairs.often(self._floor))
        self._places = {(pair.left, pair.right): pair.places for pair in found}
        self._heap = [self._entry(pair) for pair in found]
        heapq.heapify(self._heap)

    def best(self, most: int) -> list[tuple[int, int]]:
        """The pairs to be merged next, in order, at most `most`; none if it is time to look at all pairs again."""
        while self._heap:
            entries = self._next(most)
            pairs = [(left, right) for *_, left, right in entries]
            found = self._chains.find(pairs, [self._places.pop(pair) for pair in pairs])
            ranked = sorted(
                (-count, *entry[1:], number)
                for number, (count, entry) in enumerate(zip(found.counts(), entries, strict=True))
                if count >= self._floor
            )
            first = sum(entry < self._heap[0] for entry in ranked) if self._heap else len(ranked)
            if first > 1:
                after = self._chains.most_after(found)
                brought = 0
                for n, (count, *_, number) in enumerate(ranked[:first]):
                    if brought >= -count:
                        first = n
                        break
                    brought = max(brought, int(after[number]))
            self._ranked, self._found = ranked, found
            if first:
                return [(left, right) for *_, left, right, _ in ranked[:first]]
            self._put_back(ranked)
        return []

    def merge(self, numbers: list[int]) -> None:
        """Merge as many of the best pairs as there are ids for what is made of them."""
        self._put_back(self._ranked[len(numbers) :])
        found = self._found.of([number for *_, number in self._ranked[: len(numbers)]])
        for pair in self._chains.merge(found, numbers).often(self._floor):
            heapq.heappush(self._heap, self._entry(pair))
            self._places[pair.left, pair.right] = pair.places

    def _next(self, most: int) -> list[tuple]:
        """The entries on top, taken off: of TOGETHER places, or one. None ends with what another begins with."""
        entries, lefts, rights, places = [], set(), set(), 0
        while self._heap and len(entries) < most:
            *_, left, right = self._heap[0]
            places += len(self._places[left, right])
            if entries and (places > self.TOGETHER or left == right or left in rights or right in lefts):
                break
            entries.append(heapq.heappop(self._heap))
            lefts.add(left)
            rights.add(right)
            if left == right:
                break
        return entries

    def _put_back(self, ranked: list[tuple]) -> None:
        places = self._found.places() if ranked else ()
        for *entry, left, right, number in ranked:
            heapq.heappush(self._heap, (*entry, left, right))
            self._places[left, right] = places[number].copy()  # or all of them would be kept

    def _entry(self, pair: "_Pair") -> tuple[int, str, str, int, int]:
        return -pair.count, self._tokens[pair.left], self._tokens[pair.right], pair.left, pair.right


class _MostLikely:
    """The pairs at or above some count, with what each would add to the log-likelihood of the text (nats).

    A gain changes with the count of the pair, of either symbol and, a little, of all symbols, and no bound on it lasts.
    So all gains lie in an array; those of a merged pair's neighbours are worked out anew, and the greatest is sought.
    """

    REACH = 2  # pairs that could gain this many times less than the best are left out until it is their turn
    ERROR = 1e-12  # of a gain, more than logarithms of two machines may differ, for each time that the pair occurs
    DRIFT = 1e-3  # the number of symbols may fall by this share before all gains are worked out anew

    def __init__(self, chains: "_Chains", tokens: list[str]):
        self._chains, self._tokens = chains, tokens
        self._of = chains.symbol_counts(len(tokens))  # (V,) int64
        self._all = self._then = int(self._of.sum())
        pairs = chains.pairs(len(tokens))
        other = pairs.left != pairs.right  # aaa has two pairs, of which one can be merged
        found = _gains(pairs.left[other], pairs.right[other], pairs.counts[other], self._of, self._all)
        self._floor = max(SEEN_TWICE, int(pairs.counts.max(initial=0)))
        while self._floor > SEEN_TWICE and self._most(self._floor) * self.REACH > found.max(initial=0.0):
            self._floor = max(SEEN_TWICE, self._floor // 2)
        self._pairs = np.zeros((3, 0), dtype=np.int64)  # left, right, count
        self._gains = np.zeros(0)  # of each, as they were with `_then` symbols
        self._places: list[np.ndarray] = []
        self._rows = 0  # of these arrays that are used
        self._add(list(pairs.often(self._floor)))
        self._renew()

    def best(self, most: int) -> list[tuple[int, int]]:
        """The best pair; none if it is time to look at all pairs again."""
        if self._all < self._then * (1 - self.DRIFT):
            self._renew()
        if not self._rows:
            return []
        # The fewer symbols in all, the smaller a gain, by less than 2 n ln(then / now): half of them are in no pair.
        then, counts = self._gains[: self._rows], self._pairs[2, : self._rows]
        top = then.argmax()
        fallen = counts[top] * (2 * math.log(self._then / self._all) + self.ERROR)
        rows = _where(then + counts * self.ERROR >= then[top] - fallen)
        gains, error = _gains(*self._pairs[:, rows], self._of, self._all), counts[rows] * self.ERROR
        least = (gains - error).max()
        if not least > self._least:  # nan if no pair is left
            return []
        self._best = self._first(rows[gains + error >= least].tolist())
        left, right, _ = self._pairs[:, self._best].tolist()
        return [(left, right)]

    def merge(self, numbers: list[int]) -> None:
        """Merge the best pair into the symbol whose id is given."""
        (new,) = numbers
        a, b, _ = self._pairs[:, self._best].tolist()
        made = self._chains.merge(self._chains.find([(a, b)], [self._places[self._best]]), numbers)
        if new == len(self._of):
            self._of = np.append(self._of, 0)
        for symbol, change in ((a, -made.count), (b, -made.count), (new, made.count)):
            self._of[symbol] += change
        self._all -= made.count
        lost = np.zeros((2, len(self._of)), dtype=np.int64)  # by pairs of each symbol and a, of b and each symbol
        behind = made.sides == 1
        np.add.at(lost[0], np.where(made.others == new, b, made.others)[~behind], made.weight[~behind])
        np.add.at(lost[1], made.others[behind], made.weight[behind])
        left, right, counts = self._pairs[:, : self._rows]
        touched = _where((left == a) | (left == b) | (right == a) | (right == b))
        left, right = left[touched], right[touched]
        counts[touched] -= np.where(right == a, lost[0][left], 0) + np.where(left == b, lost[1][right], 0)
        for row in touched[left == right].tolist():
            counts[row] = self._chains.count_apart(int(self._pairs[0, row]), self._places[row])
        counts[self._best] = 0
        self._gains[touched] = self._gains_then(touched)
        self._add(list(made.often(self._floor)))

    def _add(self, found: "list[_Pair]") -> None:
        rows = self._rows + len(found)
        if rows > len(self._gains):
            room = max(rows, 1024)
            self._pairs = np.concatenate((self._pairs, np.zeros((3, room), dtype=np.int64)), axis=1)
            self._gains = np.concatenate((self._gains, np.zeros(room)))
        for row, pair in enumerate(found, self._rows):
            count = pair.count if pair.left != pair.right else self._chains.count_apart(pair.left, pair.places)
            self._pairs[:, row] = pair.left, pair.right, count
        self._places += [pair.places for pair in found]
        self._gains[self._rows : rows] = self._gains_then(np.arange(self._rows, rows))
        self._rows = rows

    def _renew(self) -> None:
        """All gains as of now, without the pairs that fell below the floor."""
        self._then, self._least = self._all, self._most(self._floor) if self._floor > SEEN_TWICE else 0.0
        kept = _where(self._pairs[2, : self._rows] >= self._floor)
        self._pairs, self._places, self._rows = self._pairs[:, kept], [self._places[row] for row in kept], len(kept)
        self._gains = self._gains_then(np.arange(self._rows))

    def _gains_then(self, rows: np.ndarray) -> np.ndarray:
        left, right, counts = self._pairs[:, rows]
        return np.where(counts >= self._floor, _gains(left, right, counts, self._of, self._then), -np.inf)

    def _most(self, count: int) -> float:
        """What a pair that occurs `count` times gains at most: if neither symbol occurs without the other."""
        return float(_gains(np.array([0]), np.array([1]), np.array([count]), np.array([count, count]), self._all)[0])

    def _first(self, rows: list[int]) -> int:
        """Of rows with nearly equal gains the best one; of equal ones that whose strings come first."""
        if len(rows) == 1:
            return rows[0]
        cases: dict[tuple, list[int]] = {}
        for row in rows:
            left, right, count = self._pairs[:, row].tolist()
            around = sorted((int(self._of[left]), int(self._of[right])))
            cases.setdefault((count, *around, left == right), []).append(row)
        if len(cases) > 1:
            gains = {case: _exact_gain(*case, self._all) for case in cases}
            best = max(gains.values())
            rows = [row for case, gain in gains.items() if gain == best for row in cases[case]]
        return min(rows, key=lambda row: tuple(self._tokens[symbol] for symbol in self._pairs[:2, row]))


def _gains(left: np.ndarray, right: np.ndarray, counts: np.ndarray, of: np.ndarray, total: int) -> np.ndarray:
    """How much more likely merging each pair makes the text, in nats. (P,) float64, right to about 1e-13 of `counts`.

    f(a - n) - f(a) is (a - n) ln(1 - n / a) - n ln a, without the difference of two large numbers.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        n, a, b = counts.astype(np.float64), of[left].astype(np.float64), of[right].astype(np.float64)

        def rest(whole: np.ndarray, taken: np.ndarray) -> np.ndarray:
            return np.where(whole > taken, (whole - taken) * np.log1p(-taken / whole), 0.0)

        alone = np.where(left == right, rest(a, 2 * n), rest(a, n) + rest(b, n))
        return n * (np.log(n) - np.log(a) - np.log(b) + np.log(total)) + alone - rest(np.float64(total), n)


def _exact_gain(n: int, a: int, b: int, same: bool, total: int) -> Decimal:
    """As `_gains`, to 40 digits: the same on every machine, and equal for what is equal."""
    precise = Context(prec=60)

    def f(x: int) -> Decimal:
        return precise.multiply(Decimal(x), precise.ln(Decimal(x))) if x else Decimal(0)

    gain = Decimal(0)
    for more in (n, total, a - 2 * n) if same else (n, total, a - n, b - n):
        gain = precise.add(gain, f(more))
    for less in (total - n, a) if same else (total - n, a, b):
        gain = precise.subtract(gain, f(less))
    return Context(prec=40).plus(gain)


class _Pair(NamedTuple):
    left: int
    right: int
    count: int  # of places where the two are neighbours; in aaa they are twice
    places: np.ndarray  # int32: where the left one begins


class _Pairs(NamedTuple):
    """All pairs of neighbours."""

    left: np.ndarray  # (P,) ids
    right: np.ndarray
    counts: np.ndarray  # (P,) int64
    stretches: list[tuple[np.ndarray, ...]]  # of each: its pairs among the P, ends of their places, the places

    def often(self, floor: int) -> Iterator[_Pair]:
        """The pairs that occur at least `floor` times."""
        often = _where(self.counts >= floor)
        number = np.full(len(self.counts), -1)
        number[often] = np.arange(len(often))
        where: list[list[np.ndarray]] = [[] for _ in often]
        for pairs, ends, places in self.stretches:
            mine = _where(number[pairs] >= 0)
            for pair, begin, end in _listed(number[pairs[mine]], ends[mine], ends[mine + 1]):
                where[pair].append(places[begin:end])
        for number, pair in enumerate(_listed(self.left[often], self.right[often], self.counts[often])):
            places = where[number]
            yield _Pair(*pair, places[0] if len(places) == 1 else np.concatenate(places))


class _Found(NamedTuple):
    """Where some pairs stand, one pair's places after another's."""

    pairs: np.ndarray  # (K, 2) ids
    which: np.ndarray | None  # (n,) the pair; None if there is but one
    here: np.ndarray  # (n,) where its left symbol begins
    weight: np.ndarray  # (n,) int64

    def counts(self) -> list[int]:
        """How often each pair occurs."""
        if self.which is None:
            return [int(self.weight.sum())]
        sums = np.concatenate(([0], self.weight.cumsum()))
        return np.diff(sums[self._ends()], prepend=0).tolist()

    def places(self) -> list[np.ndarray]:
        """Of each pair, int32."""
        here = self.here.astype(np.int32)
        if self.which is None:
            return [here]
        return [here[begin:end] for begin, end in pairwise([0, *self._ends().tolist()])]

    def of(self, pairs: list[int]) -> "_Found":
        """Some of the pairs, in that order."""
        if self.which is None:
            return self
        rank = np.full(len(self.pairs), -1)
        rank[pairs] = np.arange(len(pairs))
        which = rank[self.which]
        kept = _where(which >= 0)
        return _Found(self.pairs[pairs], which[kept] if len(pairs) > 1 else None, self.here[kept], self.weight[kept])

    def each(self, values: np.ndarray) -> np.ndarray:
        """`values` (K,) of the pairs at their places."""
        return values[0] if self.which is None else values[self.which]

    def _ends(self) -> np.ndarray:
        return np.bincount(self.which, minlength=len(self.pairs)).cumsum()


class _Made(NamedTuple):
    """The pairs of neighbours that symbols just made are part of."""

    new: list[int]  # the symbols
    count: int  # of places where one was made, weighted
    sides: np.ndarray  # (n,) 2 k where the k-th of them is the right one of the pair, 2 k + 1 where it is the left one
    others: np.ndarray  # (n,) int32, ids
    places: np.ndarray  # (n,) where the left one begins
    weight: np.ndarray  # (n,) int64

    def often(self, floor: int) -> Iterator[_Pair]:
        """Those that occur at least `floor` times."""
        if not len(self.others):
            return
        size = int(self.others.max()) + 1
        narrow = np.int32 if 2 * len(self.new) * size < 2**31 else np.int64  # is sorted in half the time
        keys = self.sides.astype(narrow) * size + self.others
        order = keys.argsort()
        keys, ends, counts = _runs(keys[order], self.weight[order])
        often = _where(counts >= floor)
        if not len(often):
            return
        places = self.places[order].astype(np.int32)
        for key, count, begin, end in _listed(keys[often], counts[often], ends[often], ends[often + 1]):
            side, other = divmod(key, size)
            new = self.new[side // 2]
            yield _Pair(*((new, other) if side % 2 else (other, new)), count, places[begin:end])


class _Chains:
    """Every distinct word as a chain of symbols, end to end in flat arrays with a boundary before, between, after them.

    A symbol stands at the place of its first character and leaves its length at that of its last, so that neighbours
    on both sides are found without links. A merge rewrites all its places at once with a few NumPy calls, which is
    what makes 27,000 merges of 100 MB take 2 s.
    """

    BOUNDARY, INSIDE = -1, -2  # at the last character of a symbol of several: -1 - length

    def __init__(
        self, words: Counter[str], ids: dict[str, int], prefix: str, pieces: Callable[[str], Sequence[int]] | None
    ):
        size = 1 + sum(map(len, words)) + len(words)
        assert size < 2**31, f"{size} characters of distinct words, and their places are 32-bit"
        self._lengths = np.array([len(token.removeprefix(prefix)) for token in ids])  # (V or more,) of each symbol
        counts = np.fromiter(words.values(), dtype=np.int64, count=len(words))
        self._symbol = np.full(size, self.INSIDE, dtype=np.int32)  # (N,)
        narrow = np.int32 if counts.max(initial=0) < 2**31 else np.int64
        self._weights = np.zeros(size, dtype=narrow)  # (N,) how often its word occurs
        self._symbol[0] = self.BOUNDARY
        spell = self._pieces(pieces) if pieces else _characters(ids, prefix)
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
            places = begin + _where(self._symbol[begin:end] >= 0)
            np.add.at(counts, self._symbol[places], self._weight(places))
        return counts

    def pairs(self, size: int) -> _Pairs:
        """All pairs of neighbours among `size` symbols."""
        keys, counts, stretches = [], [], []
        for begin, end in self._stretches():
            places = begin + _where(self._symbol[begin : end + 1] >= self.BOUNDARY)
            symbols = self._symbol[places]
            inside = _where((symbols[:-1] >= 0) & (symbols[1:] >= 0))
            key = symbols[inside].astype(np.int64) * size + symbols[inside + 1]
            order = np.argsort(key)
            places = places[inside[order]].astype(np.int32)
            found, ends, count = _runs(key[order], self._weight(places))
            keys.append(found)
            counts.append(count)
            stretches.append((ends, places))
        order = np.argsort(np.concatenate(keys))
        distinct, _, totals = _runs(np.concatenate(keys)[order], np.concatenate(counts)[order])
        stretches = [(np.searchsorted(distinct, key), *rest) for key, rest in zip(keys, stretches, strict=True)]
        return _Pairs(*np.divmod(distinct, size), totals, stretches)

    def find(self, pairs: list[tuple[int, int]], places: list[np.ndarray]) -> _Found:
        """For each pair those of `places` where its left symbol is still followed by its right one."""
        # To index with numbers that are not intp takes three times as long.
        pairs, here, which = np.array(pairs), np.concatenate(places, dtype=np.intp), None
        left, right = pairs[:, 0], pairs[:, 1]
        if len(pairs) == 1:
            here = here[self._symbol[here] == left[0]]
            here = here[self._symbol[here + self._lengths[left[0]]] == right[0]]
        else:
            which = np.arange(len(pairs)).repeat([len(some) for some in places])
            kept = _where(self._symbol[here] == left[which])
            here, which = here[kept], which[kept]
            kept = _where(self._symbol[here + self._lengths[left][which]] == right[which])
            here, which = here[kept], which[kept]
        return _Found(pairs, which, here, self._weight(here))

    def count_apart(self, symbol: int, places: np.ndarray) -> int:
        """How often a pair of equal symbols would be merged: once in aaa."""
        return int(self._apart(self.find([(symbol, symbol)], [places])).weight.sum())

    def most_after(self, found: _Found) -> np.ndarray:
        """(K,) what each pair, if it was merged, would bring: no pair of the new symbol is more frequent.

        Of pairs that have no place in common, whichever of them are merged before.
        """
        lengths = self._lengths[found.pairs].sum(axis=1)
        before, behind = self._around(found.here, found.each(lengths))
        symbols = np.concatenate((self._symbol[before], behind))
        sides = found.which << 33
        keys = np.concatenate((sides, sides | 1 << 32)) | symbols
        some = _where(symbols >= 0)
        keys, weight = keys[some], np.concatenate((found.weight, found.weight))[some]
        order = keys.argsort()
        keys, _, counts = _runs(keys[order], weight[order])
        most = np.zeros(len(found.pairs), dtype=np.int64)
        np.maximum.at(most, keys >> 33, counts)
        return most

    def merge(self, found: _Found, new: list[int]) -> _Made:
        """Write the symbol `new` (K,), neighbouring numbers, wherever each pair stands, leftmost first.

        They have no place in common; or it is one pair, and may be of equal symbols.
        """
        left, right = found.pairs[:, 0], found.pairs[:, 1]
        if left[0] == right[0]:
            found = self._apart(found)
        while new[-1] >= len(self._lengths):
            self._lengths = np.concatenate((self._lengths, np.zeros_like(self._lengths)))
        self._lengths[new] = self._lengths[left] + self._lengths[right]
        symbol, here, weight, made = self._symbol, found.here, found.weight, np.array(new)
        lengths = found.each(self._lengths[made])
        symbol[here + found.each(self._lengths[left])] = self.INSIDE
        symbol[here] = found.each(made)
        symbol[here + (lengths - 1)] = -1 - lengths
        before, behind = self._around(here, lengths)
        left = symbol[before]
        some = _where(left >= 0)
        other = _where((behind >= 0) & ((behind < new[0]) | (behind > new[-1])))  # or it is the other's `left`
        sides = np.zeros(len(here), dtype=np.int64) if found.which is None else 2 * found.which
        return _Made(
            new,
            int(weight.sum()),
            np.concatenate((sides[some], sides[other] + 1)),
            np.concatenate((left[some], behind[other])),
            np.concatenate((before[some], here[other])),
            np.concatenate((weight[some], weight[other])),
        )

    def _around(self, here: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of stretches of characters the place of the symbol before each, or of a boundary, and the symbol behind."""
        last = here - 1
        mark = self._symbol[last]
        return np.where(mark >= self.BOUNDARY, last, last + mark + 2), self._symbol[here + lengths]

    def _apart(self, found: _Found) -> _Found:
        """Of one pair of equal symbols every other place of each run of them, from its first on."""
        order = np.argsort(found.here)
        here, weight = found.here[order], found.weight[order]
        number = np.arange(len(here))
        begins = np.append(True, here[1:] != here[:-1] + self._lengths[found.pairs[0, 0]])[: len(here)]
        taken = (number - np.maximum.accumulate(np.where(begins, number, 0))) % 2 == 0
        return found._replace(here=here[taken], weight=weight[taken])

    def _weight(self, places: np.ndarray) -> np.ndarray:
        return self._weights[places].astype(np.int64)

    def _stretches(self) -> Iterator[tuple[int, int]]:
        """All places but the last boundary, from boundary to boundary."""
        begin, last = 0, len(self._symbol) - 1
        while begin < last:
            end = min(begin + STRETCH, last)
            while self._symbol[end] != self.BOUNDARY:
                end += 1
            yield begin, end
            begin = end

    def _pieces(self, pieces: Callable[[str], Sequence[int]]) -> Callable[[list[str]], tuple[np.ndarray, np.ndarray]]:
        def spell(words: list[str]) -> tuple[np.ndarray, np.ndarray]:
            symbols = np.array([symbol for word in words for symbol in (*pieces(word), self.BOUNDARY)], dtype=np.int32)
            lengths = np.array([*self._lengths, 1])  # a boundary's, -1, is the last
            return symbols, lengths[symbols]

        return spell


def _characters(ids: dict[str, int], prefix: str) -> Callable[[list[str]], tuple[np.ndarray, np.ndarray]]:
    """Words as the symbols of their characters, each with a boundary behind it; and the length of each symbol."""
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
        symbols[boundary] = _Chains.BOUNDARY
        return symbols, np.ones(len(symbols), dtype=np.int64)

    return spell


def _runs(keys: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of sorted keys the distinct ones, where each one's run ends (0 before the first), and the sum of its weights.

    Sums are of integers: bincount would add floats.
    """
    new = _where(keys[1:] != keys[:-1]) + 1
    ends = np.concatenate(([0], new, [len(keys)]))
    first = ends[:-1] if len(keys) else ends[:0]
    return keys[first], ends, np.add.reduceat(weight, first) if len(keys) else weight[:0]


def _where(condition: np.ndarray) -> np.ndarray:
    return condition.nonzero()[0]


def _listed(*arrays: np.ndarray) -> Iterator[tuple[int, ...]]:
    return zip(*(array.tolist() for array in arrays), strict=True)
