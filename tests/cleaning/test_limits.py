"""Limits of filters: what the report says other limits would drop."""

import random

import pytest

from pretrain.cleaning.limits import BROKEN, SHARES, Distribution, Measurement, Rule
from tests.helpers.cleaning import step

VALUES = {
    "spread": [n / 100 for n in range(1, 1000)],
    "ties": [0.0] * 700 + [0.5] * 290 + [1.0] * 10,
    "one": [5.0] * 7,
    "counts": [random.Random(1).choice([1, 2, 3, 10, 250, 4100]) for _ in range(500)],
}


def distribution(rule: Rule, values: list[float]) -> Distribution:
    found = Distribution()
    for value in values:
        found.add(Measurement(rule, value))
    return found


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("sign", BROKEN)
def test_the_limit_of_a_share_is_the_strictest_that_drops_no_more(sign, values):
    rounded = [float(f"{value:.1e}") for value in values]
    report = distribution(Rule("x", sign, 2.0), values).report(Rule("x", sign, 2.0))
    for share in SHARES:
        allowed = {
            limit: dropped
            for limit in set(rounded)
            if (dropped := sum(BROKEN[sign](value, limit) for value in rounded)) <= share * len(values)
        }
        strictest = max(allowed, key=allowed.get, default=None)
        assert report["limits"][f"{share:g}"] == strictest
    assert report["documents"] == len(values)
    assert report["dropped"] == sum(BROKEN[sign](float(value), 2.0) for value in values)


def test_parts_merge_to_the_whole_in_any_order():
    rule, values = Rule("x", ">", 100.0), VALUES["counts"]
    whole = distribution(rule, values)
    for cut in (0, 100, 499):
        found = distribution(rule, values[cut:])
        found.merge(distribution(rule, values[:cut]))
        assert found.report(rule) == whole.report(rule)


def test_memory_does_not_grow_with_the_documents():
    found = distribution(Rule("x", ">", 0.5), [random.Random(2).random() for _ in range(10)])
    for n in range(1, 20_000):
        found.add(Measurement(Rule("x", ">", 0.5), n / 20_000))
    assert len(found.values) <= 5 * 90


def test_a_document_is_measured_by_the_rules_it_comes_to():
    apply = step("length", max_characters=20, min_words=2)
    assert [(one.rule.name, one.value) for one in apply("three little words").measured] == [
        ("characters", 16),
        ("characters", 16),
        ("words", 3),
    ]
    dropped = apply("short")
    assert dropped.dropped == "characters 5 < 10"
    assert [one.value for one in dropped.measured] == [5]
