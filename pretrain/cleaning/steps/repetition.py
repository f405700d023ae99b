"""Drop documents that repeat themselves, by the rules of Gopher."""

import re
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Annotated

import numpy as np
from pydantic import Field

from pretrain.cleaning.limits import Measurement, measured
from pretrain.cleaning.step import Outcome, Section, Share, Use, judged
from pretrain.cleaning.steps.units import lines_of, units_of
from pretrain.config import Config

Split = Callable[[str], tuple[np.ndarray, np.ndarray]]  # text → its units as numbers, and their lengths in characters
Shares = dict[Annotated[int, Field(ge=2)], Share]  # size of the n-gram → limit


class WordRepetition(Config):
    """Limits for languages written with spaces, from table A1 of Rae et al. 2021; null switches one off."""

    duplicate_lines: Share | None = 0.30
    """Documents with a larger share of repeated lines are dropped."""
    duplicate_paragraphs: Share | None = 0.30
    """Documents with a larger share of repeated paragraphs are dropped."""
    duplicate_line_characters: Share | None = 0.20
    """Documents with a larger share of characters in repeated lines are dropped."""
    duplicate_paragraph_characters: Share | None = 0.20
    """Documents with a larger share of characters in repeated paragraphs are dropped."""
    top_ngrams: Shares = Field({2: 0.20, 3: 0.18, 4: 0.16})
    """By size n: documents with a larger share of characters in their most frequent n-gram are dropped."""
    duplicate_ngrams: Shares = Field({5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10})
    """By size n: documents with a larger share of characters in repeated n-grams are dropped."""


class ChineseRepetition(WordRepetition):
    """Limits for Chinese, with n-grams of characters in place of words; null switches one off.

    The n-grams are twice as long as those of words, because a Chinese word has about two characters. `top_ngrams` are
    FineWeb-2's numbers for the 2-, 3- and 4-grams of Mandarin words (arXiv:2506.20920, config cmn_Hani).
    `duplicate_ngrams` are ours: about the 99.9th percentile of Chinese Wikipedia, and above the 99th percentile of
    Chinese statutes, which repeat their formulas. The published 0.15 to 0.10 would drop 75 % of the statutes,
    FineWeb-2's 0.198 to 0.127 half of them. The limits of lines and paragraphs are those published for English.
    """

    top_ngrams: Shares = Field({4: 0.256, 6: 0.201, 8: 0.171})
    """By size n: documents with a larger share of characters in their most frequent n-gram are dropped."""
    duplicate_ngrams: Shares = Field({10: 0.50, 12: 0.45, 14: 0.42, 16: 0.40, 18: 0.38, 20: 0.36})
    """By size n: documents with a larger share of characters in repeated n-grams are dropped."""


class GopherRepetition(Section):
    """Drop documents that repeat themselves, by the rules of Gopher. Made for web pages."""

    use: Use = False
    words: WordRepetition = WordRepetition()
    chinese: ChineseRepetition = ChineseRepetition()


def gopher_repetition(section: GopherRepetition, language: str) -> Callable[[str], Outcome]:
    """Drop documents with much repetition: Rae et al. 2021, arXiv:2112.11446, appendix A.1.1, table A1.

    The second and later copies of a line, paragraph or n-gram count as repeated, the first does not (the paper leaves
    this open; FineWeb's implementation does it), and no character counts twice. The top n-gram is the most frequent
    one, or the earliest of several; it must occur at least twice. Lines are compared without the white space around
    them. Spaces between words do not count as characters.
    """
    units = units_of(language, "gopher_repetition")
    limits = section.chinese if units == "chinese" else section.words
    split = _characters if units == "chinese" else _words

    def apply(text: str) -> Outcome:
        return judged(text, chain(_line_rules(text, limits), _ngram_rules(text, limits, split)))

    return apply


def _line_rules(text: str, limits: WordRepetition) -> Iterator[Measurement]:
    for name, pieces, of_pieces, of_characters in (
        ("line", lines_of(text), limits.duplicate_lines, limits.duplicate_line_characters),
        (
            "paragraph",
            [piece for piece in map(str.strip, PARAGRAPH_END.split(text)) if piece],
            limits.duplicate_paragraphs,
            limits.duplicate_paragraph_characters,
        ),
    ):
        share, characters = duplicate_fractions(pieces)
        yield from measured(f"duplicate {name}s", share, ">", of_pieces)
        yield from measured(f"characters in duplicate {name}s", characters, ">", of_characters)


PARAGRAPH_END = re.compile(r"\n{2,}")


def _ngram_rules(text: str, limits: WordRepetition, split: Split) -> Iterator[Measurement]:
    top, duplicate = ngram_fractions(*split(text), set(limits.top_ngrams), set(limits.duplicate_ngrams))
    for name, found, allowed in (("top", top, limits.top_ngrams), ("duplicate", duplicate, limits.duplicate_ngrams)):
        for n, limit in allowed.items():
            yield from measured(f"{name} {n}-gram", found[n], ">", limit)


def duplicate_fractions(pieces: list[str]) -> tuple[float, float]:
    """The fraction of the pieces that occurred before, and the fraction of the characters in these pieces."""
    seen: set[str] = set()
    repeated: list[str] = []
    for piece in pieces:
        if piece in seen:
            repeated.append(piece)
        seen.add(piece)
    characters = sum(map(len, pieces))
    return (len(repeated) / len(pieces), sum(map(len, repeated)) / characters) if characters else (0.0, 0.0)


def _words(text: str) -> tuple[np.ndarray, np.ndarray]:
    """The words of a text as numbers, and their lengths."""
    words = text.split()
    number = {word: index for index, word in enumerate(dict.fromkeys(words))}
    found = np.fromiter(map(number.__getitem__, words), np.int64, len(words))
    return found, np.fromiter(map(len, words), np.int64, len(words))


def _characters(text: str) -> tuple[np.ndarray, np.ndarray]:
    """The characters of a text, without white space, as numbers; and their lengths, which are all 1."""
    found = np.frombuffer("".join(text.split()).encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.int64)
    return found, np.ones(len(found), np.int64)


def ngram_fractions(
    units: np.ndarray, lengths: np.ndarray, top: set[int], duplicate: set[int]
) -> tuple[dict[int, float], dict[int, float]]:
    """For each size n, the fraction of characters in the most frequent n-gram, and in n-grams that occurred before.

    `units` are words or characters as numbers, `lengths` their lengths in characters. Each n-gram gets an integer id.
    The id of an (a+b)-gram at position p is derived from the ids of the a-gram at p and the b-gram at p + a. A repeated
    n-gram consists of repeated shorter ones, so only repeated n-grams are kept and the arrays shrink as n grows.
    """
    total = max(int(lengths.sum()), 1)
    size, starts, codes = 1, np.arange(len(units)), units
    found: dict[int, tuple[float, float]] = {}
    for n in sorted(top | duplicate):
        while size < n and len(starts):
            step = min(size, n - size)
            starts, codes = _longer(starts, codes, step, len(units))
            size += step
        if not len(starts):
            break
        first = np.unique(codes, return_index=True)[1]
        again = np.ones(len(codes), dtype=bool)
        again[first] = False
        most = starts[codes == np.bincount(codes).argmax()]
        found[n] = (_covered(most, n, lengths) / total, _covered(starts[again], n, lengths) / total)
    none = (0.0, 0.0)
    return {n: found.get(n, none)[0] for n in top}, {n: found.get(n, none)[1] for n in duplicate}


def _longer(starts: np.ndarray, codes: np.ndarray, step: int, n_units: int) -> tuple[np.ndarray, np.ndarray]:
    """Make n-grams `step` units longer. Returns the starts and ids of those that occur more than once.

    Ids follow the order of first occurrence.
    """
    at = np.full(n_units + step, -1, dtype=np.int64)
    at[starts] = codes
    rest = at[starts + step]
    starts, codes, rest = starts[rest >= 0], codes[rest >= 0], rest[rest >= 0]
    if not len(starts):
        return starts, codes
    _, first, inverse, counts = np.unique(
        codes * (int(rest.max()) + 1) + rest, return_index=True, return_inverse=True, return_counts=True
    )
    repeated = counts[inverse] > 1
    rank = np.empty_like(first)
    rank[np.argsort(first, kind="stable")] = np.arange(len(first))
    return starts[repeated], rank[inverse][repeated]


def _covered(starts: np.ndarray, n: int, lengths: np.ndarray) -> int:
    """Count the characters that the n-grams at `starts` cover. A character in several n-grams counts once."""
    edges = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.add.at(edges, starts, 1)
    np.add.at(edges, starts + n, -1)
    return int(lengths[np.cumsum(edges[:-1]) > 0].sum())
