"""Entities of BIO tags, as benchmarks/tagging.py counts them."""

import numpy as np
import pytest

from benchmarks.tagging import entities, f1


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("O O", set()),
        ("B-a I-a O B-a", {("a", 0, 2), ("a", 3, 4)}),
        ("B-a B-a", {("a", 0, 1), ("a", 1, 2)}),
        ("B-a I-b", {("a", 0, 1), ("b", 1, 2)}),
        ("O I-a I-a", {("a", 1, 3)}),  # an entity that begins without its B-
    ],
)
def test_entities_have_a_type_and_both_ends(tags, expected):
    assert entities(tags.split()) == expected


def test_f1_is_of_all_sentences_together():
    assert f1(np.array([(1, 1, 2), (0, 1, 0)])) == pytest.approx(2 * 1 / (2 + 2))
