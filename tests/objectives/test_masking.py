"""The choice of targets: exactly K tokens, each as likely as any other, in whole words and spans."""

from collections import Counter

import numpy as np
import pytest

from pretrain.hashing import FIRST, MASK, SPAN, hash64
from pretrain.objectives import masking
from pretrain.objectives.masking import Draws

# A row of words of 1 to 7 tokens: a digit is a token of the word that it names, and "." is a mark.
ROW = ".0112223333.44444555555.6789999999aabb."


def window(text: str, copies: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """(begins, marks), both (copies, T), of a row written as above."""
    letters = np.array(list(text))
    marks = letters == "."
    begins = ~marks & (letters != np.roll(letters, 1))
    return np.tile(begins, (copies, 1)), np.tile(marks, (copies, 1))


def slow_units(begins: np.ndarray, marks: np.ndarray, draws: Draws, targets: int) -> list[tuple[int, int]]:
    """`masking.units` of one row, word by word: (position, begin of its unit), ascending."""
    T, words = len(marks), []
    for t in range(T):
        if not marks[t]:
            if begins[t] or t == 0 or marks[t - 1]:
                words.append([])
            words[-1].append(t)
    draw = draws.all(MASK, T)[0].tolist()
    text = [t for word in words for t in word]
    first = text[int(draws.first(FIRST)[0]) % len(text)]
    mine = next(word for word in words if first in word)
    others = sorted((word for word in words if word is not mine), key=lambda word: draw[word[0]] % 2**63)
    circle = [(t, word[0]) for word in [mine, *others] for t in word]
    at = circle.index((first, mine[0]))
    return sorted((circle[at:] + circle[:at])[:targets])


def test_units_are_taken_from_a_circle_of_shuffled_words():
    for seed in range(300):
        rng = np.random.default_rng(seed)
        T = int(rng.integers(3, 60))
        marks = rng.random(T) < rng.choice([0.05, 0.5])
        marks[0] = False
        begins = rng.random(T) < rng.choice([0.1, 0.7])
        K = int(rng.integers(1, (~marks).sum() + 1))
        draws = Draws(seed, np.array([seed]), T)
        chosen, unit = masking.units(begins[None], marks[None], draws, K)
        assert list(zip(chosen[0].tolist(), unit[0].tolist(), strict=True)) == slow_units(begins, marks, draws, K)


def test_the_draws_are_the_hash_of_use_seed_key_and_number():
    keys = np.array([3, 10**12, 7])
    draws = Draws(5, keys, 9)
    assert np.array_equal(draws.all(MASK, 9), hash64(MASK, 5, keys[:, None], np.arange(9)))
    assert np.array_equal(
        draws.at(SPAN, np.array([2, 0]), np.array([8, 1])), hash64(SPAN, 5, keys[[2, 0]], np.array([8, 1]))
    )


def chi2_limit(n: int) -> float:
    """Mean and five standard deviations of χ² with n degrees of freedom."""
    return n + 5 * (2 * n) ** 0.5


KINDS = {
    "token": lambda begins, marks, draws, K: masking.tokens(marks, draws, K),
    "word": lambda begins, marks, draws, K: masking.units(begins, marks, draws, K)[0],
    "span": lambda begins, marks, draws, K: masking.units(
        masking.spans(~marks, marks, draws, 0.2, 10), marks, draws, K
    )[0],
    "word span": lambda begins, marks, draws, K: masking.units(
        masking.spans(begins, marks, draws, 0.2, 10), marks, draws, K
    )[0],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("K", [1, 5, 17, 34, 35])
def test_exactly_k_tokens_each_as_likely_as_any_other(kind, K):
    """35 tokens in words of 1 to 7 tokens: the length of its word does not change a token's probability."""
    n = 20_000
    begins, marks = window(ROW, n)
    chosen = KINDS[kind](begins, marks, Draws(1, np.arange(n), len(ROW)), K)
    assert chosen.shape == (n, K) and (np.diff(chosen, axis=1) > 0).all()
    counts = np.bincount(chosen.ravel(), minlength=len(ROW))
    assert (counts[marks[0]] == 0).all()
    text, share = counts[~marks[0]], K / 35
    assert len(text) == 35
    deviation = (text - n * share) / max((n * share * (1 - share)) ** 0.5, 1e-9)
    assert np.abs(deviation).max() < 4.5, deviation.round(1)


@pytest.mark.parametrize("K", [3, 10, 20])
def test_at_most_two_words_are_cut(K):
    n = 3000
    begins, marks = window(ROW, n)
    chosen, unit = masking.units(begins, marks, Draws(2, np.arange(n), len(ROW)), K)
    letters = np.array(list(ROW))
    size = Counter(ROW)
    cut = np.zeros(n, int)
    for letter in sorted(set(ROW) - {"."}):
        taken = (letters[chosen] == letter).sum(axis=1)
        cut += (taken > 0) & (taken < size[letter])
    assert cut.max() == 2
    assert np.array_equal(letters[chosen], letters[unit])  # the unit of a token is its word
    assert begins[0][unit].all()


def test_a_word_that_fits_is_whole_or_not_there_most_of_the_time():
    n = 5000
    begins, marks = window("." + "".join(letter * 2 for letter in "abcdefghijklmnopqrst") + ".", n)
    _, unit = masking.units(begins, marks, Draws(3, np.arange(n), 42), 8)
    whole = np.array([sum(count == 2 for count in Counter(row).values()) for row in unit.tolist()])
    # A start at the first token of a word (half of the time) gives four words; any other gives three and two halves.
    assert set(whole.tolist()) == {3, 4} and abs((whole == 4).mean() - 0.5) < 0.04


def test_pairs_of_words_are_drawn_independently():
    """Two words of one token, anywhere: P(both) = K(K-1) / (n(n-1)) when all words are single tokens."""
    n, T, K = 20_000, 22, 5
    begins, marks = window("." + "abcdefghijklmnopqrst" + ".", n)
    chosen, _ = masking.units(begins, marks, Draws(4, np.arange(n), T), K)
    table = np.zeros((n, T))
    np.put_along_axis(table, chosen, 1, axis=1)
    both = (table.T @ table)[1:-1, 1:-1]
    pairs = both[np.triu_indices(20, 1)]
    expected = n * K * (K - 1) / (20 * 19)
    assert float(((pairs - expected) ** 2 / expected).sum()) < chi2_limit(len(pairs))


def test_a_row_with_fewer_tokens_than_slots_is_filled_up_with_marks():
    begins, marks = window("..aab......")
    chosen, unit = masking.units(begins, marks, Draws(0, np.zeros(1, np.int64), 11), 6)
    assert set(chosen[0].tolist()) >= {2, 3, 4} and len(set(chosen[0].tolist())) == 6
    begins, marks = window("...........")
    chosen, unit = masking.units(begins, marks, Draws(0, np.zeros(1, np.int64), 11), 6)
    assert chosen.tolist() == unit.tolist() == [[0, 1, 2, 3, 4, 5]]


def test_rows_do_not_depend_on_their_neighbours():
    begins, marks = window(ROW, 50)
    marks[7:20] = True
    begins[3, ::2] = True
    begins &= ~marks
    keys = np.arange(50) * 1000
    whole = masking.units(begins, marks, Draws(9, keys, len(ROW)), 9)
    for b in range(50):
        alone = masking.units(begins[b : b + 1], marks[b : b + 1], Draws(9, keys[b : b + 1], len(ROW)), 9)
        assert all(np.array_equal(x[b], y[0]) for x, y in zip(whole, alone, strict=True)), b


def spans_of(p: float, longest: int, n: int, T: int = 400) -> np.ndarray:
    marks = np.zeros((n, T), bool)
    marks[:, 0] = marks[:, -1] = True
    begins = masking.spans(~marks, marks, Draws(6, np.arange(n), T), p, longest)
    assert begins[:, 1].all() and not begins[marks].any()
    at = [np.flatnonzero(row) for row in begins]
    return np.concatenate([np.diff(row) for row in at])  # without the last span of a row, which the end cuts


@pytest.mark.parametrize(("p", "longest"), [(0.2, 10), (0.5, 4), (0.1, 30), (0.3, 1)])
def test_span_lengths_are_geometric_up_to_the_longest(p, longest):
    lengths = spans_of(p, longest, 500)
    counts = np.bincount(lengths, minlength=longest + 1)[1:]
    weights = (1 - p) ** np.arange(longest)
    expected = weights / weights.sum() * len(lengths)
    assert len(counts) == longest
    if longest > 1:
        # The last span of a row is missing, and it is more often long: less than a percent at 400 tokens a row.
        assert float(((counts - expected) ** 2 / expected).sum()) < chi2_limit(longest - 1) * 1.5


def test_spanberts_spans_are_3_8_long_in_the_mean():
    assert abs(spans_of(0.2, 10, 500).mean() - 3.8) < 0.03


def test_spans_of_words_begin_where_words_do_and_end_with_the_document():
    n = 500
    begins, marks = window(ROW, n)
    found = masking.spans(begins, marks, Draws(8, np.arange(n), len(ROW)), 0.5, 3)
    assert not (found & ~begins).any() and found[:, 1].all()
    document = np.cumsum(marks[0])
    chosen, unit = masking.units(found, marks, Draws(8, np.arange(n), len(ROW)), 10)
    assert np.array_equal(document[chosen], document[unit])


def test_a_span_longer_than_a_row_is_no_trouble():
    begins, marks = window(".abcdef.", 20)
    found = masking.spans(begins, marks, Draws(0, np.arange(20), 8), 0.001, 1000)
    assert found.sum() < 25
    chosen, _ = masking.units(found, marks, Draws(0, np.arange(20), 8), 3)
    assert chosen.shape == (20, 3)
