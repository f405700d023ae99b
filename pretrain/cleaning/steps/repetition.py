"""Documents that repeat themselves, by the rules of Gopher."""

import re
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Annotated

import numpy as np
from pydantic import Field

from pretrain.cleaning.limits import Measurement, measured
from pretrain.cleaning.step import Outcome, Section, Share, judged
from pretrain.cleaning.steps.units import lines_of, units_of
from pretrain.config import Config

Shares = dict[Annotated[int, Field(ge=2)], Share]  # by the size of the n-gram


class WordRepetition(Config):
    """Table A1 of Rae et al. 2021: a document goes when a fraction is above its threshold; null: no such rule."""

    duplicate_lines: Share | None = 0.30  # of lines
    duplicate_paragraphs: Share | None = 0.30
    duplicate_line_characters: Share | None = 0.20  # of characters, as all that follow
    duplicate_paragraph_characters: Share | None = 0.20
    top_ngrams: Shares = Field({2: 0.20, 3: 0.18, 4: 0.16})
    duplicate_ngrams: Shares = Field({5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10})


class ChineseRepetition(WordRepetition):
    """N-grams of characters, twice as long as those of words: a Chinese word has about two.

    `top_ngrams`: what FineWeb-2 (arXiv:2506.20920, config cmn_Hani) uses for the 2-, 3- and 4-word-grams of Mandarin.
    `duplicate_ngrams`: ours, about the 99.9th percentile of Chinese Wikipedia and above the 99th of Chinese statutes,
    which repeat their formulas: the published 0.15 to 0.10 would drop 75 % of them, FineWeb-2's 0.198 to 0.127 half.
    The thresholds of lines and paragraphs are as published for English.
    """

    top_ngrams: Shares = Field({4: 0.256, 6: 0.201, 8: 0.171})
    duplicate_ngrams: Shares = Field({10: 0.50, 12: 0.45, 14: 0.42, 16: 0.40, 18: 0.38, 20: 0.36})


class GopherRepetition(Section):
    use: bool | list[str] = False
    words: WordRepetition = WordRepetition()
    chinese: ChineseRepetition = ChineseRepetition()


def gopher_repetition(section: GopherRepetition, language: str) -> Callable[[str], Outcome]:
    """Drop documents with much repetition: Rae et al. 2021, arXiv:2112.11446, appendix A.1.1, table A1.

    A duplicate is what occurred before in the document: the second and later copies count, the first does not (the
    paper leaves it open, FineWeb's implementation counts so), and no character counts twice. The top n-gram is the most
    frequent one, the earliest of several, when it occurs at least twice. Lines are compared without the white space
    around them; spaces between words are no characters.
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


def _ngram_rules(text: str, limits: WordRepetition, split: Callable) -> Iterator[Measurement]:
    top, duplicate = ngram_fractions(*split(text), set(limits.top_ngrams), set(limits.duplicate_ngrams))
    for name, found, allowed in (("top", top, limits.top_ngrams), ("duplicate", duplicate, limits.duplicate_ngrams)):
        for n, limit in allowed.items():
            yield from measured(f"{name} {n}-gram", found[n], ">", limit)


def duplicate_fractions(pieces: list[str]) -> tuple[float, float]:
    """Fraction of the pieces that occurred before, and of the characters in them."""
    seen, repeated = set(), []
    for piece in pieces:
        if piece in seen:
            repeated.append(piece)
        seen.add(piece)
    characters = sum(map(len, pieces))
    return (len(repeated) / len(pieces), sum(map(len, repeated)) / characters) if characters else (0.0, 0.0)


def _words(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Words as numbers, and their lengths."""
    words = text.split()
    number = {word: index for index, word in enumerate(dict.fromkeys(words))}
    found = np.fromiter(map(number.__getitem__, words), np.int64, len(words))
    return found, np.fromiter(map(len, words), np.int64, len(words))


def _characters(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Characters that are not white space as numbers, and as many ones."""
    found = np.frombuffer("".join(text.split()).encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.int64)
    return found, np.ones(len(found), np.int64)


def ngram_fractions(
    units: np.ndarray, lengths: np.ndarray, top: set[int], duplicate: set[int]
) -> tuple[dict[int, float], dict[int, float]]:
    """Per n, the fraction of characters in the most frequent n-gram, and in n-grams that occurred before.

    N-grams are numbered by doubling: the one of size a + b at p is the pair of that of size a at p and that of size b
    at p + a. Only repeated ones can grow into repeated ones, so the arrays shrink as n grows.
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
    """Starts and codes of the n-grams `step` units longer that occur more than once, numbered by first occurrence."""
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
    """Characters of the units that an n-gram of `starts` covers, each once."""
    edges = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.add.at(edges, starts, 1)
    np.add.at(edges, starts + n, -1)
    return int(lengths[np.cumsum(edges[:-1]) > 0].sum())
