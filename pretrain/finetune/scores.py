"""Judge a test accuracy: two baselines that it should beat, and an interval around it."""

import math
import re
from collections import Counter
from collections.abc import Hashable, Sequence
from itertools import pairwise
from statistics import fmean, stdev

import numpy as np

from pretrain.finetune.task import Example

WORD = re.compile(r"\w+|[^\w\s]")
HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003347f]")
Z975 = 1.959964  # 97.5 % quantile of the normal distribution
# 97.5 % quantiles of Student's t for 1 to 10 degrees of freedom; beyond, a series in 1/df is right to 1e-4.
T975 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)


def majority(train: Sequence[Example], test: Sequence[Example]) -> float:
    """The accuracy on test of a predictor that always answers the commonest label of train."""
    commonest, _ = Counter(example.label for example in train).most_common(1)[0]
    return fmean(example.label == commonest for example in test)


def naive_bayes(train: Sequence[Example], test: Sequence[Example]) -> float:
    """The accuracy on test of multinomial naive Bayes over 1- and 2-grams with add-one smoothing.

    Grams that do not occur in train are ignored. Grams consist of lower-cased words and punctuation marks, or of
    characters if most letters of train are Han. The two texts of a pair share one bag of grams. Source: Wang & Manning
    2012, section 2.1.
    """
    by_character = han_share(train) > 0.5
    labels = sorted({example.label for example in train})
    vocabulary: dict[Hashable, int] = {}
    owners, columns = [], []  # label and column of every gram of train
    for example in train:
        found = [vocabulary.setdefault(gram, len(vocabulary)) for gram in grams(example, by_character)]
        columns += found
        owners += [labels.index(example.label)] * len(found)
    counts = np.ones((len(labels), len(vocabulary)))
    np.add.at(counts, (owners, columns), 1)
    likelihood = np.log(counts / counts.sum(axis=1, keepdims=True))
    prior = np.log([sum(example.label == label for example in train) for label in labels])

    def answer(example: Example) -> str:
        known = [vocabulary[gram] for gram in grams(example, by_character) if gram in vocabulary]
        return labels[int(np.argmax(prior + likelihood[:, known].sum(axis=1)))]

    return fmean(answer(example) == example.label for example in test)


def grams(example: Example, by_character: bool) -> list[Hashable]:
    """The units of an example and the pairs of neighbouring units. No pair reaches from one text into the other."""
    found: list[Hashable] = []
    for text in filter(None, (example.text, example.text_pair)):
        units = list("".join(text.split())) if by_character else WORD.findall(text.lower())
        found += units + list(pairwise(units))
    return found


def han_share(examples: Sequence[Example]) -> float:
    """The share of Han characters among all letters; 0 if there are no letters."""
    text = "".join(example.text + (example.text_pair or "") for example in examples)
    letters = sum(map(str.isalpha, text))
    return len(HAN.findall(text)) / letters if letters else 0.0


def interval95(accuracies: Sequence[float], examples: int) -> tuple[float, float]:
    """The 95 % interval of the mean accuracy of several training seeds on one test set of `examples` examples.

    Two independent errors add in quadrature: the error of the seeds, Student's t times s / sqrt(n), and the error of
    the test set, z times sqrt(p (1 - p) / m). The second does not shrink with more seeds, because all seeds answer the
    same examples. Two right and two wrong answers are added to p, so that a perfect score keeps an error (Agresti &
    Coull 1998). With one seed, the error of the seeds is unknown, and the interval covers only the test set.
    """
    seeds, mean = len(accuracies), fmean(accuracies)
    p = (mean * examples + 2) / (examples + 4)
    test_error = Z975 * math.sqrt(p * (1 - p) / (examples + 4))
    seed_error = t975(seeds - 1) * stdev(accuracies) / math.sqrt(seeds) if seeds > 1 else 0.0
    half = math.hypot(seed_error, test_error)
    return max(0.0, mean - half), min(1.0, mean + half)


def t975(df: int) -> float:
    """97.5 % quantile of Student's t. Source: Abramowitz & Stegun 26.7.5."""
    if df <= len(T975):
        return T975[df - 1]
    z = Z975
    return (
        z
        + (z**3 + z) / (4 * df)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * df**3)
    )
