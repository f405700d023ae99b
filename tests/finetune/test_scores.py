"""Baselines and intervals agree with their definitions, with tables and with a simulation."""

import math
import random
from collections import Counter

import numpy as np
import pytest

from pretrain.finetune import scores
from pretrain.finetune.task import Example


def slow_naive_bayes(train: list[Example], test: list[Example], units) -> float:
    """By the definition: products of (count + 1) / (grams of the class + vocabulary), one gram at a time, as logs."""

    def bag(example: Example) -> list[tuple]:
        found = []
        for text in [example.text] + ([example.text_pair] if example.text_pair else []):
            cut = units(text)
            found += [(unit,) for unit in cut] + [(cut[i], cut[i + 1]) for i in range(len(cut) - 1)]
        return found

    counts = {label: Counter() for label in sorted({e.label for e in train})}
    for example in train:
        counts[example.label].update(bag(example))
    vocabulary = {gram for counter in counts.values() for gram in counter}
    right = 0
    for example in test:
        best, answer = -math.inf, None
        for label, counter in counts.items():
            score = math.log(sum(e.label == label for e in train) / len(train))
            for gram in bag(example):
                if gram in vocabulary:
                    score += math.log((counter[gram] + 1) / (counter.total() + len(vocabulary)))
            if score > best:
                best, answer = score, label
        right += answer == example.label
    return right / len(test)


@pytest.mark.parametrize(("words", "joint", "units"), [("abcdefgh!", " ", str.split), ("天地人日月山水。", "", list)])
def test_naive_bayes_agrees_with_its_definition(words, joint, units):
    draw = random.Random(7)

    def made(count: int) -> list[Example]:
        texts = [[joint.join(draw.choices(words, k=draw.randint(1, 6))) for _ in "12"] for _ in range(count)]
        return [Example(one, two, "xyz"[(one.count(words[0]) + draw.randint(0, 1)) % 3], 0) for one, two in texts]

    train_set, test_set = made(120), made(150)
    assert scores.naive_bayes(train_set, test_set) == slow_naive_bayes(train_set, test_set, units)


def test_naive_bayes_reads_chinese_by_character_and_beats_the_majority_there():
    task = [
        Example(text, None, label, 0) for text, label in (("春眠不觉晓", "春"), ("春色满园", "春"), ("秋风起", "秋"))
    ]
    assert scores.han_share(task) == 1.0
    new = [Example("一夜秋雨", None, "秋", 0), Example("早春", None, "春", 0)]
    assert scores.majority(task, new) == 0.5
    assert scores.naive_bayes(task, new) == 1.0


def test_t_quantiles_are_those_of_the_tables():
    table = {1: 12.706, 2: 4.303, 4: 2.776, 10: 2.228, 11: 2.201, 20: 2.086, 30: 2.042, 100: 1.984}
    assert {df: round(scores.t975(df), 3) for df in table} == table


def test_the_interval_adds_seed_and_test_errors_in_quadrature():
    # s = 0.02, so 4.3027 * 0.02 / sqrt(3) = 0.04968; p = 822 / 1004, so 1.96 * sqrt(p * (1 - p) / 1004) = 0.02383
    low, high = scores.interval95([0.80, 0.82, 0.84], 1000)
    assert (low, high) == pytest.approx((0.82 - 0.05510, 0.82 + 0.05510), abs=1e-5)


def test_the_interval_of_one_seed_is_the_test_set_s_and_a_perfect_score_has_one():
    assert scores.interval95([0.5], 96) == pytest.approx((0.402, 0.598), abs=1e-4)  # 1.96 * sqrt(0.25 / 100)
    low, high = scores.interval95([1.0, 1.0], 100)
    assert high == 1.0
    assert 0.96 < low < 0.98  # the "rule of three" says 0.97


def test_the_interval_covers_the_truth_about_95_times_in_100():
    """Right answers drawn for one test set and noise for each seed; over many repetitions the truth 0.7 is inside."""
    draw = np.random.default_rng(0)
    hits = 0
    for _ in range(1000):
        test_set = 0.7 + draw.normal(0, math.sqrt(0.7 * 0.3 / 400))
        low, high = scores.interval95([test_set + draw.normal(0, 0.02) for _ in range(4)], 400)
        hits += low <= 0.7 <= high
    assert 0.93 <= hits / 1000 <= 0.99
