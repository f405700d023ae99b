"""Mixtures: every prefix is within one item of the weights, in closed form and back, also at item 10¹²."""

from fractions import Fraction

import numpy as np
import pytest

from pretrain.order.mixture import RESOLUTION, Mixture

LARGE = 10**12


def mixtures(count: int = 120) -> list[tuple[int, ...]]:
    """Random weights of 1 to 9 corpora, even and lopsided, some of them 0, up to the finest resolution."""
    random, found = np.random.default_rng(0), [(1,), (7, 3), (0, 5, 0, 2), (4093, 1, 1, 1), (1000, 1000, 1048, 1048)]
    while len(found) < count:
        weights = random.geometric(random.choice([0.5, 0.1, 0.01, 0.003]), random.integers(1, 10))
        weights = weights * (random.random(len(weights)) < 0.9)
        if 0 < weights.sum() <= RESOLUTION:
            found.append(tuple(weights.tolist()))
    return found


def slow(weights: tuple[int, ...], items: int) -> list[int]:
    """Tijdeman's rule with fractions, item by item: an independent reference."""
    parts = [Fraction(weight, sum(weights)) for weight in weights]
    slack = Fraction(1, max(2, 2 * sum(weight > 0 for weight in weights) - 2))
    drawn, order = [0] * len(weights), []
    for item in range(1, items + 1):
        late = [c for c, part in enumerate(parts) if part and part * item - drawn[c] >= slack]
        order.append(min(late, key=lambda c: -(-(drawn[c] + 1 - slack) // parts[c])))
        drawn[order[-1]] += 1
    return order


@pytest.mark.parametrize("weights", mixtures(40), ids=str)
def test_the_order_is_that_of_the_slow_rule(weights):
    items = min(sum(weights), 300)
    assert Mixture(weights).draw(np.arange(items))[0].tolist() == slow(weights, items)


def test_every_prefix_is_within_one_of_its_part():
    """All prefixes of a period are even within 1 - 1/(2k - 2) items, the best bound of any rule."""
    for weights in mixtures():
        mixture, k = Mixture(weights), sum(weight > 0 for weight in weights)
        corpora, _ = mixture.draw(np.arange(mixture.period))
        drawn = np.cumsum(corpora[:, None] == np.arange(len(weights)), axis=0)
        items = np.arange(1, mixture.period + 1)[:, None]
        off = np.abs(drawn * sum(weights) - items * np.array(weights)).max()  # in 1/sum(weights) of an item
        assert off * (2 * k - 2) <= sum(weights) * (2 * k - 3) if k > 1 else off == 0, weights
        assert (drawn[-1] == mixture.weights).all()  # so every later period is the same


def test_a_trillion_items_in_they_still_are():
    for weights in mixtures():
        mixture, total = Mixture(weights), sum(weights)
        for items in (LARGE, LARGE + 1, LARGE + mixture.period // 2, 2**52 + 1):
            counts = mixture.counts(items).tolist()
            assert sum(counts) == items
            assert all(abs(n * total - weight * items) <= total for n, weight in zip(counts, weights, strict=True))


@pytest.mark.parametrize("first", [0, 12_345, LARGE])
def test_items_of_a_corpus_are_numbered_one_after_the_other_and_lead_back(first):
    for weights in mixtures():
        mixture = Mixture(weights)
        items = np.arange(first, first + 1000)
        corpora, numbers = mixture.draw(items)
        before, after = mixture.counts(first), mixture.counts(first + 1000)
        for corpus in range(len(weights)):
            mine = corpora == corpus
            assert numbers[mine].tolist() == list(range(before[corpus], after[corpus]))
            if weights[corpus]:
                assert np.array_equal(mixture.items(corpus, numbers[mine]), items[mine])


def test_only_the_ratio_of_the_weights_counts():
    items = np.arange(100)
    assert np.array_equal(Mixture((70, 30)).draw(items), Mixture((7, 3)).draw(items))
    assert Mixture((70, 30)).period == 10


def test_corpora_do_not_come_in_runs():
    """A rare corpus is spread evenly: the gaps between its items differ by less than two periods of its own."""
    corpora, _ = Mixture((63, 1)).draw(np.arange(64 * 50))
    assert set(np.diff(np.flatnonzero(corpora == 1)).tolist()) == {64}
    corpora, _ = Mixture((5, 3)).draw(np.arange(800))
    assert np.diff(np.flatnonzero(corpora == 1)).max() <= 4
