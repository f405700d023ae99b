"""Which pair of symbols is merged next into a token. The same words give the same tokens on every machine.

There are two criteria.

`bpe` merges the most frequent pair, as byte-pair encoding does (Sennrich et al. 2016, arXiv:1508.07909), and as the
WordPiece trainer of `tokenizers` does.

`wordpiece` merges the pair that increases the likelihood of the training text most, as WordPiece was published
(Schuster & Nakajima 2012, "Japanese and Korean voice search", section 4, step 3). Under a unigram model of the symbols,
let a and b be the counts of two symbols, n the count of the pair, and N the number of all symbols. Merging gains

    f(n) + f(a - n) - f(a) + f(b - n) - f(b) + f(N) - f(N - n)      with f(x) = x ln x

To first order this is n ln(n N / (a b)). The often quoted score n / (a b) leaves out the weight n: it prefers pairs
that occur twice and always together, and reaches a given size only with a threshold on n that is chosen for it.

`bpe` is the default: it gives more characters per token on every corpus, and no model learns measurably better with
`wordpiece`. Bits per byte of a decoder of 1.4 M parameters with 8,192 `byte` entries, mean and range of three seeds:
English (800 steps) 2.159 (2.134-2.184) with bpe, 2.167 (2.141-2.182) with wordpiece; Chinese (400 steps)
2.827 (2.809-2.853) and 2.806 (2.800-2.811). Characters per token of held-out text, 30,000 entries from 10 MB:

                          bpe    wordpiece   n / (a b), n ≥ 100
    English, bert         4.312  4.266       3.663 (8,032 entries: no more pairs)
    Chinese, byte         1.478  1.444       1.163 (9,283)
    both, byte            3.027  2.981       2.642 (19,782)
"""

import heapq
import math
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Context, Decimal

import numpy as np

from pretrain.display.progress import progress
from pretrain.tokenizer.training.chains import Chains, Pair, where

SEEN_TWICE = 2  # a pair that occurs once is an accident of one word, and is never merged


def merge(
    words: Counter[str],
    tokens: list[str],
    vocab_size: int,
    prefix: str,
    *,
    criterion: str = "bpe",
    pieces: Callable[[str], Sequence[int]] | None = None,
) -> list[str]:
    """`tokens` (specials and alphabet) followed by the tokens that merging adds, in order of creation.

    The best pair by `criterion` is merged first. Of equally good pairs, the one whose (left, right) strings come first
    by code point wins. Fewer than `vocab_size` tokens are returned when no pair occurs twice any more, or none makes
    the text more likely. A word begins as its characters, or as `pieces(word)`: ids of tokens that spell it. A merge
    that gives an existing token keeps that token's id.

    Memory: 8 bytes for each character of `words`, 12 if a word occurs 2^31 times, and 4 for each place of a pair at or
    above the floor.
    """
    tokens = list(tokens)
    ids = {token: number for number, token in enumerate(tokens)}
    chains = Chains(words, ids, prefix, pieces)
    criteria: dict[str, type[_MostFrequent | _MostLikely]] = {"bpe": _MostFrequent, "wordpiece": _MostLikely}
    with progress("merging", "tokens", vocab_size - len(tokens)) as advance:
        more = bool(words)
        while more and len(tokens) < vocab_size:
            more, known = False, False
            choice = criteria[criterion](chains, tokens)
            while not known and len(tokens) < vocab_size and (pair := choice.best()):
                # `ab` + `c` and `a` + `bc` never both occur: a merge happens everywhere at once, leftmost first, so
                # two equal strings, neither of which shares a symbol with its surroundings, are split alike wherever
                # they stand. (This does not hold for `pieces` that another vocabulary made.)
                more = True
                merged = tokens[pair[0]] + tokens[pair[1]].removeprefix(prefix)
                # Pairs of a known token become more frequent, also pairs below the floor: all are counted again.
                known = merged in ids
                if not known:
                    ids[merged] = len(tokens)
                    tokens.append(merged)
                    advance(1)
                choice.merge(ids[merged])
    return tokens


class _MostFrequent:
    """The pairs at or above a floor, the most frequent one first.

    Counts only fall, except that a new symbol brings new pairs. So the count that a pair was pushed with is an upper
    bound. A pair is counted again only when it comes to the top of the heap: rare pairs cost nothing.
    """

    REACH = 16  # the floor is the count of the most frequent pair divided by this

    def __init__(self, chains: Chains, tokens: list[str]):
        self._chains, self._tokens = chains, tokens
        pairs = chains.pairs(len(tokens))
        self._floor = max(SEEN_TWICE, int(pairs.counts.max(initial=0)) // self.REACH)
        self._rest = pairs.often(self._floor)
        self._next = next(self._rest, None)  # pairs enter the heap in order of their counts, when their turn comes
        self._heap: list[tuple[int, str, str, int, int]] = []
        self._places: dict[tuple[int, int], np.ndarray] = {}

    def best(self) -> tuple[int, int] | None:
        """The pair to be merged next; None when all pairs have to be counted again."""
        while True:
            while self._next and (not self._heap or self._next.total >= -self._heap[0][0]):
                self._push(self._next)
                self._next = next(self._rest, None)
            if not self._heap:
                return None
            bound, *_, left, right = heapq.heappop(self._heap)
            here, weight = self._chains.find(left, right, self._places.pop((left, right)))
            count = int(weight.sum())
            if count == -bound:
                self._best = left, right, here, weight
                return left, right
            if count >= self._floor:
                self._push(Pair(left, right, count, here.astype(np.int32)))

    def merge(self, new: int) -> None:
        """Merge the best pair into the symbol `new`."""
        for pair in self._chains.merge(*self._best, new).often(self._floor):
            self._push(pair)

    def _push(self, pair: Pair) -> None:
        entry = -pair.total, self._tokens[pair.left], self._tokens[pair.right], pair.left, pair.right
        heapq.heappush(self._heap, entry)
        self._places[pair.left, pair.right] = pair.places


class _MostLikely:
    """The pairs at or above a floor, each with its gain: the log-likelihood (nats) that merging it adds.

    A gain depends on the counts of the pair, of both symbols and, a little, of all symbols, so it can rise and fall,
    and no bound on it lasts. All gains are therefore kept in an array. A merge recomputes the gains of the pairs that
    share a symbol with it; then the largest gain is searched.
    """

    REACH = 2  # the floor leaves out pairs that could gain at most the best gain divided by this
    ERROR = 1e-12  # times the count of a pair: more than the gains of two machines differ by rounding
    DRIFT = 1e-3  # all gains are recomputed when the number of symbols has fallen by this share

    def __init__(self, chains: Chains, tokens: list[str]):
        self._chains, self._tokens = chains, tokens
        self._of = chains.symbol_counts(len(tokens))  # (V,) int64
        self._all = self._then = int(self._of.sum())
        pairs = chains.pairs(len(tokens))
        other = pairs.left != pairs.right  # `aaa` has two places of (a, a), of which one can be merged
        found = _gains(pairs.left[other], pairs.right[other], pairs.counts[other], self._of, self._all)
        self._floor = max(SEEN_TWICE, int(pairs.counts.max(initial=0)))
        while self._floor > SEEN_TWICE and self._most(self._floor) * self.REACH > found.max(initial=0.0):
            self._floor = max(SEEN_TWICE, self._floor // 2)
        self._pairs = np.zeros((3, 0), dtype=np.int64)  # left, right, count
        self._gains = np.zeros(0)  # of each pair, computed as if there were `_then` symbols in all
        self._places: list[np.ndarray] = []
        self._rows = 0  # the number of pairs; the arrays may be longer
        self._add(list(pairs.often(self._floor)))
        self._renew()

    def best(self) -> tuple[int, int] | None:
        """The pair to be merged next; None when all pairs have to be counted again."""
        if self._all < self._then * (1 - self.DRIFT):
            self._renew()
        if not self._rows:
            return None
        # A gain falls with the number of all symbols, by less than 2 n ln(then / now): n is at most half of it.
        then, counts = self._gains[: self._rows], self._pairs[2, : self._rows]
        top = then.argmax()
        fallen = counts[top] * (2 * math.log(self._then / self._all) + self.ERROR)
        rows = where(then + counts * self.ERROR >= then[top] - fallen)
        lefts, rights, often = self._pairs[:, rows]
        gains, error = _gains(lefts, rights, often, self._of, self._all), counts[rows] * self.ERROR
        least = (gains - error).max()
        if not least > self._least:  # nan if no pair is left
            return None
        self._best = self._first(rows[gains + error >= least].tolist())
        left, right, _ = self._pairs[:, self._best].tolist()
        return left, right

    def merge(self, new: int) -> None:
        """Merge the best pair into the symbol `new`."""
        a, b, _ = self._pairs[:, self._best].tolist()
        made = self._chains.merge(a, b, *self._chains.find(a, b, self._places[self._best]), new)
        if new == len(self._of):
            self._of = np.append(self._of, 0)
        for symbol, change in ((a, -made.total), (b, -made.total), (new, made.total)):
            self._of[symbol] += change
        self._all -= made.total
        lost = np.zeros((2, len(self._of)), dtype=np.int64)  # by pairs of each symbol and a, of b and each symbol
        before = made.others[~made.first]
        np.add.at(lost[0], np.where(before == new, b, before), made.weight[~made.first])
        np.add.at(lost[1], made.others[made.first], made.weight[made.first])
        left, right, counts = self._pairs[:, : self._rows]
        touched = where((left == a) | (left == b) | (right == a) | (right == b))
        left, right = left[touched], right[touched]
        counts[touched] -= np.where(right == a, lost[0][left], 0) + np.where(left == b, lost[1][right], 0)
        for row in touched[left == right].tolist():
            counts[row] = self._chains.count_apart(int(self._pairs[0, row]), self._places[row])
        counts[self._best] = 0
        self._gains[touched] = self._gains_then(touched)
        self._add(list(made.often(self._floor)))

    def _add(self, found: list[Pair]) -> None:
        rows = self._rows + len(found)
        if rows > len(self._gains):
            room = max(rows, 1024)
            self._pairs = np.concatenate((self._pairs, np.zeros((3, room), dtype=np.int64)), axis=1)
            self._gains = np.concatenate((self._gains, np.zeros(room)))
        for row, pair in enumerate(found, self._rows):
            count = pair.total if pair.left != pair.right else self._chains.count_apart(pair.left, pair.places)
            self._pairs[:, row] = pair.left, pair.right, count
        self._places += [pair.places for pair in found]
        self._gains[self._rows : rows] = self._gains_then(np.arange(self._rows, rows))
        self._rows = rows

    def _renew(self) -> None:
        """Drop the pairs that fell below the floor, and compute all gains for the present number of symbols."""
        self._then, self._least = self._all, self._most(self._floor) if self._floor > SEEN_TWICE else 0.0
        kept = where(self._pairs[2, : self._rows] >= self._floor)
        self._pairs, self._places, self._rows = self._pairs[:, kept], [self._places[row] for row in kept], len(kept)
        self._gains = self._gains_then(np.arange(self._rows))

    def _gains_then(self, rows: np.ndarray) -> np.ndarray:
        left, right, counts = self._pairs[:, rows]
        return np.where(counts >= self._floor, _gains(left, right, counts, self._of, self._then), -np.inf)

    def _most(self, count: int) -> float:
        """The largest gain of a pair that occurs `count` times: neither symbol occurs without the other."""
        return float(_gains(np.array([0]), np.array([1]), np.array([count]), np.array([count, count]), self._all)[0])

    def _first(self, rows: list[int]) -> int:
        """The row with the largest of several nearly equal gains; of equal gains, the row whose strings come first."""
        if len(rows) == 1:
            return rows[0]
        cases: dict[tuple[int, int, int, bool], list[int]] = {}
        for row in rows:
            left, right, count = self._pairs[:, row].tolist()
            rarer, commoner = sorted((int(self._of[left]), int(self._of[right])))
            cases.setdefault((count, rarer, commoner, left == right), []).append(row)
        if len(cases) > 1:
            gains = {case: _exact_gain(*case, self._all) for case in cases}
            best = max(gains.values())
            rows = [row for case, gain in gains.items() if gain == best for row in cases[case]]
        return min(rows, key=lambda row: tuple(self._tokens[symbol] for symbol in self._pairs[:2, row]))


def _gains(left: np.ndarray, right: np.ndarray, counts: np.ndarray, of: np.ndarray, total: int) -> np.ndarray:
    """(P,) float64: the log-likelihood (nats) that merging each pair adds, to about 1e-13 of `counts`.

    f(a - n) - f(a) is computed as (a - n) ln(1 - n / a) - n ln a, which avoids the difference of two large numbers.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        n, a, b = counts.astype(np.float64), of[left].astype(np.float64), of[right].astype(np.float64)

        def rest(whole: np.ndarray | np.float64, taken: np.ndarray) -> np.ndarray:
            return np.where(whole > taken, (whole - taken) * np.log1p(-taken / whole), 0.0)

        alone = np.where(left == right, rest(a, 2 * n), rest(a, n) + rest(b, n))
        return n * (np.log(n) - np.log(a) - np.log(b) + np.log(total)) + alone - rest(np.float64(total), n)


def _exact_gain(n: int, a: int, b: int, same: bool, total: int) -> Decimal:
    """The gain of one pair to 40 digits: the same on every machine, and equal for pairs whose gains are equal."""
    precise = Context(prec=60)

    def f(x: int) -> Decimal:
        return precise.multiply(Decimal(x), precise.ln(Decimal(x))) if x else Decimal(0)

    gain = Decimal(0)
    for more in (n, total, a - 2 * n) if same else (n, total, a - n, b - n):
        gain = precise.add(gain, f(more))
    for less in (total - n, a) if same else (total - n, a, b):
        gain = precise.subtract(gain, f(less))
    return Context(prec=40).plus(gain)
