import random
import tracemalloc

import numpy as np
import pytest

from pretrain.cleaning.corpus_wide.duplicates import (
    CROWD,
    NONE,
    Near,
    band_keys,
    bands_of,
    document_hash,
    exact_twins,
    long_paragraphs,
    near_twins,
    signature,
)
from pretrain.cleaning.corpus_wide.ngrams import grams_of, hashes_of, unit_hashes, units_of, windows
from pretrain.config import ConfigError, build

NEAR = Near()
HAN = [chr(code) for code in range(0x4E00, 0x5E00)]


def jaccard(a: str, b: str, n: int = 5) -> float:
    """The exact Jaccard similarity, by sets of tuples."""
    one, other = ({tuple(u[i : i + n]) for i in range(len(u) - n + 1)} for u in (units_of(a), units_of(b)))
    return len(one & other) / len(one | other)


def pair(similarity: float, rng: random.Random, chinese: bool) -> tuple[str, str]:
    """Two texts with a common beginning of such a length that their similarity is `similarity`."""
    length = 300
    shared = round(2 * similarity / (1 + similarity) * (length - 4)) + 4
    words = HAN if chinese else [f"w{number}" for number in range(30_000)]
    first = rng.choices(words, k=length)
    second = first[:shared] + rng.choices(words, k=length - shared)
    return tuple(("" if chinese else " ").join(text) for text in (first, second))


def found_among(texts: list[str], heldout: int = 0, near: Near = NEAR):
    signatures = np.stack([signature(text, near) for text in texts])
    return near_twins(signatures, band_keys(signatures, near), np.arange(len(texts)), near)


# Units and n-grams


@pytest.mark.parametrize(
    "text, units",
    [
        ("The quick, brown FOX!", ["the", "quick", "brown", "fox"]),
        ("5 G 网络；ＡＢＣ１２", ["5", "g", "网", "络", "abc12"]),
        ("snake_case don't", ["snake", "case", "don", "t"]),
        ("한국어 문장", ["한국어", "문장"]),
        ("かな𠀀", ["か", "な", "𠀀"]),
        ("…!?", []),
    ],
)
def test_units_are_words_or_characters_without_case_width_and_punctuation(text, units):
    assert units_of(text) == units


def long_text(border: str) -> str:
    """A text of 744,000 units, which are three stretches and more, with a line of one very long word."""
    han = "".join(chr(0x4E00 + n) for n in range(90))
    lines = [f"{n}:\tΟΔΟΣ\te\u0301\t{han}" * (n % 5) for n in range(4000)]
    return border.join(["x" * 300_000, *lines])


@pytest.mark.parametrize("border", ["\n", " ", "。"])
def test_a_long_text_is_hashed_in_stretches_to_the_same_numbers(border):
    text = long_text(border)
    assert (unit_hashes(text) == hashes_of(units_of(text))).all()


def test_a_long_text_is_hashed_in_bounded_memory():
    text = long_text(" ")
    signature("once before, for what is loaded at the first call", Near(permutations=16))
    tracemalloc.start()
    unit_hashes(text)
    signature(text, Near(permutations=16))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40 << 20, peak  # 26 MB for 744,000 units; 69 MB as one list


def test_windows_are_equal_exactly_where_the_units_are():
    rng = random.Random(0)
    units = rng.choices("ab", k=400)
    hashes = windows(hashes_of(units), 6)
    named = {}
    for place, value in enumerate(hashes.tolist()):
        assert named.setdefault(value, units[place : place + 6]) == units[place : place + 6]
    assert len(named) == len({tuple(units[i : i + 6]) for i in range(395)})


def test_the_first_unit_says_how_long_an_ngram_is():
    units = units_of("one two 三 四 five 六")
    places, grams = grams_of(hashes_of(units), words=2, characters=3)
    expected = {0: 2, 1: 2, 2: 3, 3: 3, 4: 2}
    assert sorted(places.tolist()) == sorted(expected)
    for place, gram in zip(places.tolist(), grams.tolist(), strict=True):
        assert gram == windows(hashes_of(units[place : place + expected[place]]), expected[place])[0]


# Near-duplicates


@pytest.mark.parametrize("chinese", [False, True])
def test_copies_of_known_similarity_are_found_above_the_threshold_and_never_below(chinese):
    rng = random.Random(7)
    pairs = [pair(0.3 + 0.65 * step / 399, rng, chinese) for step in range(400)]
    twins = found_among([text for both in pairs for text in both])
    similar = np.array([jaccard(*both) for both in pairs])
    found = twins.first[1::2] == np.arange(0, 800, 2)
    assert (twins.first[::2] == NONE).all()
    assert found[similar >= 0.9].mean() >= 0.99
    assert found[similar >= 0.85].mean() >= 0.95
    assert not found[similar <= 0.7].any()
    assert (found == (twins.first[1::2] != NONE)).all()  # no other pair is found


def test_the_estimate_is_unbiased_with_the_deviation_its_docstring_says():
    rng = random.Random(3)
    pairs = [pair(0.8, rng, False) for _ in range(150)]
    errors = [float((signature(a, NEAR) == signature(b, NEAR)).mean()) - jaccard(a, b) for a, b in pairs]
    assert abs(np.mean(errors)) < 0.01
    assert 0.025 < np.std(errors) < 0.045


def test_pairs_at_the_threshold_are_compared_as_often_as_promised():
    for threshold in (0.5, 0.7, 0.8, 0.9, 1.0):
        for permutations in (16, 112, 128, 256):
            bands, rows = bands_of(Near(threshold=threshold, permutations=permutations))
            assert bands * rows <= permutations
            assert 1 - (1 - threshold**rows) ** bands >= 0.99


def test_a_document_goes_only_for_one_that_stays():
    rng = random.Random(5)
    words = [f"w{number}" for number in range(30_000)]
    text = rng.choices(words, k=400)
    chain = []
    for _ in range(12):  # neighbours share 0.9, the ends nothing near 0.8
        chain.append(" ".join(text))
        place = rng.randrange(0, 380)
        text = text[:place] + rng.choices(words, k=16) + text[place + 16 :]
    twins = found_among(chain)
    stays = twins.first == NONE
    assert 1 < stays.sum() < 12
    for row in np.flatnonzero(~stays):
        assert stays[twins.first[row]]
        assert twins.first[row] < row


def test_rows_are_judged_in_the_order_of_priority_and_others_do_not_count():
    text = pair(0.9, random.Random(1), False)
    signatures = np.stack([signature(t, NEAR) for t in (*text, text[0])])
    keys = band_keys(signatures, NEAR)
    assert near_twins(signatures, keys, np.array([1, 0, 2]), NEAR).first.tolist() == [1, NONE, 1]
    assert near_twins(signatures, keys, np.array([2]), NEAR).first.tolist() == [NONE] * 3
    assert near_twins(signatures, keys, np.array([], np.int64), NEAR).first.tolist() == [NONE] * 3


def test_a_text_without_units_is_like_no_other():
    assert (found_among(["!!!", "???", "!!!", ""]).first == NONE).all()


def test_texts_shorter_than_an_ngram_are_alike_when_all_their_units_are():
    assert found_among(["静夜思", "静夜诗", "静夜思。", "a b", "a b c", "A, b!"]).first.tolist() == [
        -1,
        -1,
        0,
        -1,
        -1,
        3,
    ]


def test_a_long_text_is_hashed_in_slices_to_the_same_signature():
    text = pair(0.9, random.Random(2), False)[0]
    words = text.split()
    longer = " ".join(words * 3)  # 900 words
    whole = np.full(128, 2**32 - 1, np.uint32)
    for begin in range(0, 900 - 4, 100):
        whole = np.minimum(whole, signature(" ".join((words * 3)[begin : begin + 104]), NEAR))
    assert (signature(longer, NEAR) == whole).all()


def test_a_crowd_of_one_template_is_compared_with_a_bounded_number():
    rng = np.random.default_rng(0)
    rows = 4 * CROWD
    signatures = rng.integers(0, 2**32, (rows, 128), np.uint32)
    signatures[:, :6] = 7  # one band in common, nothing else
    twins = near_twins(signatures, band_keys(signatures, NEAR), np.arange(rows), NEAR)
    assert (twins.first == NONE).all()
    assert twins.crowded == 1
    assert twins.nearest.max() < CROWD


# Exact copies


def test_white_space_makes_no_difference_to_a_document():
    assert document_hash("one  two\n three ") == document_hash("one two three")
    assert document_hash("one two three") != document_hash("One two three")


def test_exact_twins_are_the_first_in_priority():
    hashes = np.array([5, 9, 5, 7, 9, 5], np.uint64)
    assert exact_twins(hashes, np.arange(6)).tolist() == [-1, -1, 0, -1, 1, 0]
    assert exact_twins(hashes, np.array([5, 4, 0, 1])).tolist() == [5, 4, -1, -1, -1, -1]
    assert exact_twins(hashes, np.array([], np.int64)).tolist() == [-1] * 6


def test_only_long_paragraphs_are_compared():
    text = "short\n" + "a " * 50 + "\n\n" + "  " + "a " * 50
    found = long_paragraphs(text, min_bytes=99)
    assert [line for line, _ in found] == [1, 3]
    assert found[0][1] == found[1][1]
    assert long_paragraphs("中" * 33, 99) != []  # bytes, not characters


def test_a_threshold_below_a_half_is_refused():
    with pytest.raises(ConfigError, match="threshold"):
        build(Near, {"threshold": "0.3"}, "test")
