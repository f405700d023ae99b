"""Filters that count words, characters and lines: length, Gopher's quality rules, C4, FineWeb."""

import re
from collections.abc import Callable, Iterator

from pydantic import Field

from pretrain.cleaning.limits import Measurement, measured
from pretrain.cleaning.step import Outcome, Section, Share, Use, judged, primary
from pretrain.cleaning.steps.repetition import duplicate_fractions
from pretrain.cleaning.steps.units import (
    SENTENCE_END,
    UNSPACED,
    Units,
    ends_sentence,
    lines_of,
    stop_words,
    units_of,
)
from pretrain.config import Config
from pretrain.corpus.sides import folded

Count = int | None  # None: the rule is off
Ratio = float | None


# Length


class Length(Section):
    """Drop documents that are too short or too long. Null switches a limit off."""

    min_characters: Count = Field(10, ge=1)
    """Documents with fewer characters are dropped. White space is not counted."""
    max_characters: Count = Field(None, ge=1)
    """Documents with more characters are dropped. White space is not counted."""
    min_words: Count = Field(None, ge=1)
    """Documents with fewer words are dropped. Languages written without spaces have no such limit."""
    max_words: Count = Field(None, ge=1)
    """Documents with more words are dropped. Languages written without spaces have no such limit."""


def length(section: Length, language: str) -> Callable[[str], Outcome]:
    """Drop documents that are too short or too long.

    The default drops only documents below 10 characters: page numbers, stray titles. The shortest poem in the Tang
    corpus that we measured has 18.
    """
    spaced = primary(language) not in UNSPACED

    def rules(text: str) -> Iterator[Measurement]:
        words = folded(text).decode()
        spaces = words.count(" ")
        characters = len(words) - spaces
        yield from measured("characters", characters, "<", section.min_characters)
        yield from measured("characters", characters, ">", section.max_characters)
        if spaced:
            count = spaces + 1 if words else 0
            yield from measured("words", count, "<", section.min_words)
            yield from measured("words", count, ">", section.max_words)

    return lambda text: judged(text, rules(text))


# Gopher


class WordQuality(Config):
    """Limits for languages written with spaces; null switches one off.

    Rae et al. 2021, arXiv:2112.11446, appendix A.1.1; every number is as published.
    """

    min_words: Count = 50
    """Documents with fewer words are dropped."""
    max_words: Count = 100_000
    """Documents with more words are dropped."""
    min_mean_word: Ratio = 3.0
    """Documents with a smaller mean word length are dropped, in characters."""
    max_mean_word: Ratio = 10.0
    """Documents with a larger mean word length are dropped, in characters. Finnish or Turkish need more."""
    max_symbols_per_word: Ratio = 0.1
    """Documents with more `#` per word are dropped, and documents with more ellipses per word."""
    max_bullet_lines: Share | None = 0.9
    """Documents with a larger share of lines that begin with a bullet are dropped."""
    max_ellipsis_lines: Share | None = 0.3
    """Documents with a larger share of lines that end in an ellipsis are dropped."""
    min_words_with_letter: Share | None = 0.8
    """Documents with a smaller share of words that have a letter are dropped."""
    min_stop_words: Count = 2
    """Documents with fewer different stop words are dropped."""


class ChineseQuality(Config):
    """Limits for Chinese, which count characters in place of words; null switches one off.

    The shares of lines are as published, the other numbers are ours. We measured 5,136 articles, 58,149 poems and 777
    statutes. 50 words are about 80 characters, which would drop most poems (half have fewer than 53), so the limit is
    20. A clause (the text between punctuation marks) takes the place of a word: its mean length is 3.5 to 24 characters
    in 99 % of the texts. 0.1 symbols a word are 0.06 a character. Letters are at least 0.65 of the characters. One stop
    word is enough: 12 % of the poems have fewer than two, 3 % have none.
    """

    min_characters: Count = 20
    """Documents with fewer characters are dropped. White space is not counted."""
    max_characters: Count = 200_000
    """Documents with more characters are dropped. White space is not counted."""
    min_mean_clause: Ratio = 2.5
    """Documents with a smaller mean length of the clauses are dropped, in characters."""
    max_mean_clause: Ratio = 30.0
    """Documents with a larger mean length of the clauses are dropped, in characters."""
    max_symbols_per_character: Ratio = 0.06
    """Documents with more `#` per character are dropped, and documents with more ellipses per character."""
    max_bullet_lines: Share | None = 0.9
    """Documents with a larger share of lines that begin with a bullet are dropped."""
    max_ellipsis_lines: Share | None = 0.3
    """Documents with a larger share of lines that end in an ellipsis are dropped."""
    min_letters: Share | None = 0.6
    """Documents with a smaller share of letters are dropped. Chinese characters are letters."""
    min_stop_words: Count = 1
    """Documents with fewer different stop words are dropped."""


class GopherQuality(Section):
    """Drop documents that are not prose, by the quality rules of Gopher. Made for web pages."""

    use: Use = False
    words: WordQuality = WordQuality()
    chinese: ChineseQuality = ChineseQuality()


BULLETS = ("•", "-", "*", "‣", "◦", "●", "○", "■", "□", "◆", "★", "·", "–")
CLAUSE = re.compile(r"\w+")


def gopher_quality(section: GopherQuality, language: str) -> Callable[[str], Outcome]:
    """Drop documents that are not prose: Rae et al. 2021, arXiv:2112.11446, appendix A.1.1.

    Words are separated by white space, as in Dolma's implementation. The published numbers are for English. Other
    languages have their own stop words (units.stop_words); the rule does not apply if none are known. Languages with
    long words (Finnish, Turkish) need a larger `max_mean_word`.
    """
    units = units_of(language, "gopher_quality")
    common = stop_words(language)
    if units == "chinese":
        return lambda text: judged(text, _chinese_quality(text, section.chinese, common))
    return lambda text: judged(text, _word_quality(text, section.words, common))


def _word_quality(text: str, limits: WordQuality, common: frozenset[str]) -> Iterator[Measurement]:
    words = text.split()
    yield from measured("words", len(words), "<", limits.min_words)
    yield from measured("words", len(words), ">", limits.max_words)
    n_words = max(len(words), 1)
    mean = sum(map(len, words)) / n_words
    yield from measured("mean word length", mean, "<", limits.min_mean_word)
    yield from measured("mean word length", mean, ">", limits.max_mean_word)
    yield from measured("# per word", text.count("#") / n_words, ">", limits.max_symbols_per_word)
    yield from measured("ellipses per word", _ellipses(text) / n_words, ">", limits.max_symbols_per_word)
    yield from _line_shares(text, limits)
    lettered = sum(word.isalpha() or any(map(str.isalpha, word)) for word in words)
    yield from measured("words with a letter", lettered / n_words, "<", limits.min_words_with_letter)
    if common:
        yield from measured("stop words", len(common & set(map(str.lower, set(words)))), "<", limits.min_stop_words)


def _chinese_quality(text: str, limits: ChineseQuality, common: frozenset[str]) -> Iterator[Measurement]:
    characters = "".join(text.split())
    yield from measured("characters", len(characters), "<", limits.min_characters)
    yield from measured("characters", len(characters), ">", limits.max_characters)
    n_characters = max(len(characters), 1)
    clauses = CLAUSE.findall(text)
    mean = sum(map(len, clauses)) / max(len(clauses), 1)
    yield from measured("mean clause length", mean, "<", limits.min_mean_clause)
    yield from measured("mean clause length", mean, ">", limits.max_mean_clause)
    yield from measured("# per character", text.count("#") / n_characters, ">", limits.max_symbols_per_character)
    yield from measured("ellipses per character", _ellipses(text) / n_characters, ">", limits.max_symbols_per_character)
    yield from _line_shares(text, limits)
    yield from measured("letters", sum(map(str.isalpha, characters)) / n_characters, "<", limits.min_letters)
    yield from measured("stop words", len(common & set(characters)), "<", limits.min_stop_words)


def _line_shares(text: str, limits: WordQuality | ChineseQuality) -> Iterator[Measurement]:
    lines = lines_of(text)
    n_lines = max(len(lines), 1)
    bullets = sum(line.startswith(BULLETS) for line in lines)
    yield from measured("bullet lines", bullets / n_lines, ">", limits.max_bullet_lines)
    ellipses = sum(line.endswith(("...", "…")) for line in lines)
    yield from measured("lines ending in an ellipsis", ellipses / n_lines, ">", limits.max_ellipsis_lines)


def _ellipses(text: str) -> int:
    return text.count("...") + text.count("…") - text.count("……")  # Chinese writes an ellipsis as ……


# C4


class WordLines(Config):
    """Limits for languages written with spaces; null switches one off.

    Raffel et al. 2020, section 2.2 (JMLR version); the longest word is from the published code.
    """

    min_line_words: Count = 5
    """Lines with fewer words are dropped."""
    min_sentences: Count = 3
    """Documents with fewer sentences in their remaining lines are dropped."""
    max_word_characters: Count = 1000
    """Lines with a longer word are dropped, in characters."""


class ChineseLines(Config):
    """Limits for Chinese; null switches one off.

    The numbers are ours: 95 % of the lines of poems have at least 6 characters; 22 % of the poems have two sentences.
    """

    min_line_characters: Count = 5
    """Lines with fewer characters are dropped. Spaces are not counted."""
    min_sentences: Count = 2
    """Documents with fewer sentences in their remaining lines are dropped."""


class C4(Section):
    """Drop lines that are not sentences, and documents that look like code or filler. Made for web pages."""

    use: Use = False
    terminal_punctuation: bool = True
    """Drop lines that do not end in terminal punctuation. FineWeb does not: the rule removed 30 % of all its tokens."""
    javascript: bool = True
    """Drop lines that mention JavaScript."""
    policies: bool = True
    """Drop lines that mention terms of use, a privacy policy or cookies."""
    lorem_ipsum: bool = True
    """Drop documents that contain the filler text "lorem ipsum"."""
    curly_bracket: bool = True
    """Drop documents that contain `{`: they are mostly code."""
    citations: bool = True
    """Remove `[1]`, `[edit]` and `[citation needed]` from lines."""
    words: WordLines = WordLines()
    chinese: ChineseLines = ChineseLines()


POLICIES = (  # the phrases of C4's published code, then those of Chinese pages
    *("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies"),
    *("隐私政策", "使用条款", "服务条款", "隱私政策", "隱私權政策", "使用條款", "服務條款"),
)
CITATION = re.compile(r"\[[0-9]{0,4}\]|\[edit\]|\[citation needed\]|\[编辑\]|\[編輯\]|\[来源请求\]|\[來源請求\]")
MANY_LINES = re.compile(r"\n{3,}")


def c4(section: C4, language: str) -> Callable[[str], Outcome]:
    """Drop lines that are not sentences, and documents that look like code or filler. Counts dropped or changed lines.

    Raffel et al. 2020, arXiv:1910.10683, section 2.2. A line stays if it ends in terminal punctuation or a quotation
    mark (but not in an ellipsis of dots), has 5 words, and mentions neither "javascript" nor a policy. A document stays
    if it has 3 sentences and neither `lorem ipsum` nor `{`. Three rules of the paper are not here: the list of bad
    words, repeated spans of three sentences (see de-duplication), and langdetect (see the step `language`). Blank lines
    between paragraphs stay. In Chinese, 。！？…；： and closing quotes end a line; brackets may follow.
    """
    units = units_of(language, "c4")
    limits = section.chinese if units == "chinese" else section.words

    def apply(text: str) -> Outcome:
        lowered = text.lower()
        if section.lorem_ipsum and "lorem ipsum" in lowered:
            return Outcome(text, dropped="lorem ipsum")
        if section.curly_bracket and "{" in text:
            return Outcome(text, dropped="curly bracket")
        lines, changes = [], 0
        for line in map(str.strip, text.split("\n")):
            kept = CITATION.sub("", line).strip() if section.citations and "[" in line else line
            stays = not kept or _stays(kept, section, limits, units)
            changes += kept != line or not stays
            if stays:
                lines.append(kept)
        new = MANY_LINES.sub("\n\n", "\n".join(lines)).strip("\n")
        sentences = len(SENTENCE_END[units].findall(new))
        return judged(new if changes else text, measured("sentences", sentences, "<", limits.min_sentences), changes)

    return apply


def _stays(line: str, section: C4, limits: WordLines | ChineseLines, units: Units) -> bool:
    if section.terminal_punctuation and not ends_sentence(line, units):
        return False
    if isinstance(limits, ChineseLines):
        long_enough = limits.min_line_characters is None or len(line) - line.count(" ") >= limits.min_line_characters
    else:
        if section.terminal_punctuation and line.endswith("..."):
            return False
        words = line.split()
        long_enough = limits.min_line_words is None or len(words) >= limits.min_line_words
        if limits.max_word_characters is not None and max(map(len, words), default=0) > limits.max_word_characters:
            return False
    lowered = line.lower()
    script = section.javascript and "javascript" in lowered
    policy = section.policies and any(phrase in lowered for phrase in POLICIES)
    return long_enough and not script and not policy


# FineWeb


class WordPage(Config):
    """Limits for languages written with spaces; null switches one off. A document at a limit is dropped, too.

    Penedo et al. 2024, arXiv:2406.17557, section 3.6.
    """

    punctuated_lines: Share | None = 0.12
    """Documents with at most this share of lines that end in punctuation are dropped."""
    duplicate_line_characters: Share | None = 0.1
    """Documents with at least this share of characters in repeated lines are dropped. Datatrove's default is 0.01."""
    short_lines: Share | None = 0.67
    """Documents with at least this share of short lines are dropped."""
    short_line_characters: int = 30
    """A line with fewer characters is short."""


class ChinesePage(WordPage):
    """Limits for Chinese; null switches one off. A document at a limit is dropped, too.

    FineWeb-2 (Penedo et al. 2025, arXiv:2506.20920) for Mandarin: 0.106, 0.1, and no rule about short lines.
    """

    punctuated_lines: Share | None = 0.106
    """Documents with at most this share of lines that end in punctuation are dropped."""
    short_lines: Share | None = None
    """Documents with at least this share of short lines are dropped."""
    short_line_characters: int = 10
    """A line with fewer characters is short."""


class FineWeb(Section):
    """Drop lists and boilerplate, by the three filters of FineWeb. Made for web pages."""

    use: Use = False
    words: WordPage = WordPage()
    chinese: ChinesePage = ChinesePage()


def fineweb(section: FineWeb, language: str) -> Callable[[str], Outcome]:
    """Drop lists and boilerplate: the three filters of FineWeb, Penedo et al. 2024, arXiv:2406.17557, section 3.6."""
    units = units_of(language, "fineweb")
    limits = section.chinese if units == "chinese" else section.words

    def rules(text: str) -> Iterator[Measurement]:
        lines = lines_of(text)
        n_lines = max(len(lines), 1)
        punctuated = sum(ends_sentence(line, units) for line in lines) / n_lines
        yield from measured("punctuated lines", punctuated, "≤", limits.punctuated_lines)
        repeated = duplicate_fractions(lines)[1]
        yield from measured("characters in duplicate lines", repeated, "≥", limits.duplicate_line_characters)
        short = sum(len(line) < limits.short_line_characters for line in lines) / n_lines
        yield from measured("short lines", short, "≥", limits.short_lines)

    return lambda text: judged(text, rules(text))
