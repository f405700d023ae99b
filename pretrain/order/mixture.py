"""Several corpora by weight, in closed form: item i → corpus and the item's number within it, in O(1), and back.

Weights are whole numbers, and the sequence of corpora repeats with their sum as its period. After every item of every
period, the number of items that each corpus has had differs by less than one from its weight's share. All arithmetic is
on integers: near item 10¹² a float can no longer tell one item from the next.
"""

import math
from functools import lru_cache

import numpy as np

RESOLUTION = 4096  # the largest sum of weights, which bounds the size of the tables


class Mixture:
    """Items 0, 1, 2, … dealt out to corpora: corpus c gets `weights[c]` of every `sum(weights)` items.

    An item of corpus c holds `samples[c]` samples, by default one. Samples are numbered through all corpora.
    """

    def __init__(self, weights: tuple[int, ...], samples: tuple[int, ...] | None = None):
        common = math.gcd(*weights)
        assert common and min(weights) >= 0 and sum(weights) // common <= RESOLUTION, weights
        self.weights = np.array([weight // common for weight in weights], np.int64)
        self.period = int(self.weights.sum())
        self._corpus = _one_period(tuple(self.weights.tolist()))
        is_it = self._corpus[:, None] == np.arange(len(weights))  # (period, C)
        self._before = np.zeros((self.period + 1, len(weights)), np.int64)  # [i, c]: items of corpus c before item i
        np.cumsum(is_it, axis=0, out=self._before[1:])
        self._items = [np.flatnonzero(column) for column in is_it.T]
        sizes = np.array(samples or (1,) * len(weights), np.int64)[self._corpus]
        self._first = np.concatenate([[0], np.cumsum(sizes)])  # the first sample of each item of a period

    def draw(self, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The corpus (B,) of each of `items` (B,), and the item's number among the items of its corpus (B,), int64."""
        periods, rest = np.divmod(np.asarray(items, np.int64), self.period)
        corpus = self._corpus[rest]
        return corpus, periods * self.weights[corpus] + self._before[rest, corpus]

    def items(self, corpus: int, numbers: np.ndarray) -> np.ndarray:
        """The inverse of `draw`: the items (B,) with these `numbers` (B,) in `corpus`. Its weight must not be 0."""
        periods, rest = np.divmod(np.asarray(numbers, np.int64), self.weights[corpus])
        return periods * self.period + self._items[corpus][rest]

    def items_of(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The item (B,) of each of `samples` (B,), and the sample's number within its item (B,), int64."""
        periods, rest = np.divmod(np.asarray(samples, np.int64), self._first[-1])
        item = np.searchsorted(self._first, rest, side="right") - 1
        return periods * self.period + item, rest - self._first[item]

    def first_samples(self, items: np.ndarray) -> np.ndarray:
        """The first sample (B,) of each of `items` (B,)."""
        periods, rest = np.divmod(np.asarray(items, np.int64), self.period)
        return periods * self._first[-1] + self._first[rest]

    def counts(self, items: int) -> np.ndarray:
        """How many of the first `items` items each corpus gets, (C,) int64: within one of items · weight / period."""
        periods, rest = divmod(items, self.period)
        return periods * self.weights + self._before[rest]


@lru_cache(maxsize=64)
def _one_period(weights: tuple[int, ...]) -> np.ndarray:
    """The corpus of each item of a period, (sum of weights,) int64.

    Every item goes to the corpus with the earliest deadline among the corpora that lag far enough behind their share.
    With k corpora the deviation from the share is at most 1 - 1 / (2k - 2) items. No order is better for all weights.
    Source: Tijdeman 1980, The chairman assignment problem, Discrete Mathematics 32, pp. 323-330.
    """
    period, scale = sum(weights), max(2, 2 * sum(weight > 0 for weight in weights) - 2)
    weight = np.array(weights, np.int64)
    drawn = np.zeros(len(weights), np.int64)
    order = np.empty(period, np.int64)
    never = np.iinfo(np.int64).max
    for item in range(period):
        lags = scale * (weight * (item + 1) - period * drawn) >= period
        deadline = -(-period * (scale * drawn + scale - 1) // (scale * np.maximum(weight, 1)))
        order[item] = corpus = int(np.where(lags & (weight > 0), deadline, never).argmin())
        drawn[corpus] += 1
    return order
