"""Keyed permutations: every index occurs once, the inverse is exact, and the result shows no trace of the old order.

The statistics are computed from fixed keys, so a test fails always or never; limits are 5 standard deviations.
"""

import itertools
import math

import numpy as np
import pytest

from pretrain.hashing import RANKED, hash64, mix, permute, unpermute

SIZES = [3, 7, 64, RANKED, RANKED + 1, 5000, 16_384, 65_537, 1_000_003]  # both methods, and both sides of powers of 4
LARGE = 10**12


def within(chi2: float, degrees: int) -> bool:
    """χ² has mean `degrees` and variance 2 · degrees. The test is two-sided: too even is as wrong as too uneven."""
    return abs(chi2 - degrees) < 5 * (2 * degrees) ** 0.5


def test_every_index_appears_once_and_leads_back_for_many_sizes():
    for n in (*range(1, RANKED + 100), *range(RANKED + 100, 10_000, 13)):
        there = permute(np.arange(n), n, 3, 0)
        assert there.min() == 0 and there.max() == n - 1, n
        assert np.array_equal(unpermute(there, n, 3, 0), np.arange(n)), n  # so no two have the same image


def test_a_trillion_items_permute_without_a_table_and_lead_back():
    index = np.unique(np.concatenate([np.arange(1000), hash64(1, np.arange(50_000)) % np.uint64(LARGE), [LARGE - 1]]))
    there = permute(index.astype(np.int64), LARGE, 3, 0)
    assert there.min() >= 0 and there.max() < LARGE and len(np.unique(there)) == len(index)
    assert np.array_equal(unpermute(there, LARGE, 3, 0), index)
    assert np.array_equal(permute(unpermute(index, LARGE, 3, 0), LARGE, 3, 0), index)


def test_one_index_costs_what_any_other_costs_and_keeps_its_shape():
    for n in (100, 10_000):
        whole = permute(np.arange(n), n, 1)
        assert permute(np.array([[7], [n - 1]]), n, 1).tolist() == [[whole[7]], [whole[n - 1]]]
        assert len(permute(np.arange(0), n, 1)) == 0


def test_the_values_are_the_written_out_ones():
    """Existing runs depend on these values."""
    assert permute(np.arange(7), 7, 3, 1).tolist() == [5, 2, 6, 4, 0, 3, 1]
    assert permute(np.array([0, 5]), 4096, 3, 1).tolist() == [431, 1198]
    assert permute(np.array([0, 5]), 65_537, 3, 1).tolist() == [54_172, 15_216]
    assert permute(np.array([0, 5]), LARGE, 3, 1).tolist() == [695_176_080_044, 504_486_046_907]
    assert int(mix(np.uint64(0x9E3779B97F4A7C15))) == 0xE220A8397B1DCDAF  # first output of SplitMix64 seeded with 0
    assert len({int(hash64(*parts)) for parts in [(1, 2), (2, 1), (1, 2, 0), (12,), (1,), (0, 1, 2)]}) == 6


@pytest.mark.parametrize("n", [3, 4, 5])
def test_small_orders_are_all_equally_likely(n):
    """χ² over all n! permutations."""
    orders = dict.fromkeys(itertools.permutations(range(n)), 0)
    keys = 100 * len(orders)
    for key in range(keys):
        orders[tuple(permute(np.arange(n), n, key, 1).tolist())] += 1
    chi2 = sum((count - 100) ** 2 / 100 for count in orders.values())
    assert within(chi2, len(orders) - 1)


@pytest.mark.parametrize("n", [*SIZES, LARGE])
def test_where_an_index_lands_is_uniform_over_keys(n):
    """χ² of the landing places of the first, a middle and the last index over 1,000 keys, on at most 40 bins."""
    bins, keys = min(n, 40), 1000
    index = np.array([0, n // 3, n - 1])
    landed = np.stack([permute(index, n, key, 1) for key in range(keys)])  # (keys, 3)
    expected = (
        np.bincount(np.arange(n) * bins // n, minlength=bins) * keys / n if n < LARGE else np.full(bins, keys / bins)
    )
    for column in landed.T:
        counts = np.bincount((column * bins // n).astype(int), minlength=bins)
        assert within(float(((counts - expected) ** 2 / expected).sum()), bins - 1)


@pytest.mark.parametrize("n", [RANKED, RANKED + 1, 5000, 16_384, 65_537, 1_000_003, LARGE])
def test_no_region_of_the_input_prefers_a_region_of_the_output(n):
    """χ² of (32nd of the input) x (32nd of the output); the margins are fixed, which leaves 31² degrees of freedom."""
    index = np.arange(n) if n < LARGE else np.arange(0, n, n // 200_000)
    for key in range(3):
        there = permute(index, n, key, 0)
        cells = np.bincount((index * 32 // n) * 32 + there * 32 // n, minlength=1024).reshape(32, 32)
        expected = cells.sum(1, keepdims=True) * cells.sum(0, keepdims=True) / cells.sum()
        chi2 = float(((cells - expected) ** 2 / expected).sum()) * (len(index) - 1) / len(index)
        assert within(chi2, 31**2), (key, chi2)


@pytest.mark.parametrize("n", [RANKED, RANKED + 1, 5000, 65_537, 1_000_003])
def test_items_are_displaced_as_far_as_chance_moves_them(n):
    """|π(i) - i| has mean (n² - 1) / 3n; over a uniform permutation the sum has variance (n+1)(2n²+7)/45 (Spearman's
    footrule; Diaconis & Graham 1977)."""
    for key in range(5):
        moved = np.abs(permute(np.arange(n), n, key, 0) - np.arange(n)).sum()
        mean, variance = (n * n - 1) / 3, (n + 1) * (2 * n * n + 7) / 45
        assert abs(moved - mean) < 5 * variance**0.5, key


@pytest.mark.parametrize("n", [RANKED, RANKED + 1, 5000, 65_537, 1_000_003])
def test_neighbours_at_no_distance_stay_related(n):
    """Autocorrelation of π, and of its inverse, at small lags and at powers of two: |r| < 5/√n."""
    for order in (permute(np.arange(n), n, 1, 0), unpermute(np.arange(n), n, 1, 0)):
        centred = order - (n - 1) / 2
        for lag in [1, 2, 3, 5, 7, *(2**k for k in range(2, (n - 1).bit_length()))]:
            if lag < n // 2:
                r = float((centred[lag:] * centred[:-lag]).sum() / (centred**2).sum())
                assert abs(r) < 5 / n**0.5, (lag, r)


@pytest.mark.parametrize("n", [RANKED, 5000])
def test_neighbours_stay_neighbours_as_often_as_by_chance(n):
    """The number of i with π(i+1) = π(i) + 1 is Poisson with mean (n - 1) / n over keys."""
    keys = 400
    kept = sum(int((np.diff(permute(np.arange(n), n, key, 0)) == 1).sum()) for key in range(keys))
    mean = keys * (n - 1) / n
    assert abs(kept - mean) < 5 * mean**0.5


@pytest.mark.parametrize("n", [64, RANKED, 5000, 65_537])
def test_epochs_seeds_and_corpora_are_independent(n):
    """Keys that differ by one: correlation below 5/√n, Poisson(1) coincidences, and no shift that aligns them."""
    keys = [(seed, epoch, *corpus) for seed in (1, 2) for epoch in range(4) for corpus in ((), (1,), (2,))]
    orders = [permute(np.arange(n), n, *key) for key in keys]
    pairs = list(itertools.combinations(orders, 2))
    coincidences = 0
    for a, b in pairs:
        r = float(np.corrcoef(a, b)[0, 1])
        assert abs(r) < 5 / n**0.5
        coincidences += int((a == b).sum())
        shifts = np.bincount((a - b) % n, minlength=n)
        assert shifts.max() < 5 + 3 * math.log(n)  # the count at each shift is Poisson(1) too
    assert abs(coincidences - len(pairs)) < 5 * len(pairs) ** 0.5
