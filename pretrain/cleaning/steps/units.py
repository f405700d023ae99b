"""Words, line ends and stop words of each language: the units that the filters count."""

import re
from typing import Literal

from pretrain.cleaning.step import library, primary
from pretrain.errors import ConfigError

# Languages written without spaces between words (ISO 639-1). Only Chinese has filters of its own.
UNSPACED = frozenset({"zh", "ja", "th", "lo", "km", "my", "bo", "dz"})

# Rae et al. 2021, arXiv:2112.11446, appendix A.1.1
ENGLISH_STOP_WORDS = frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})
# FineWeb-2 (Penedo et al. 2025, arXiv:2506.20920), configs cmn_Hani and lzh_Hani together: modern and literary
# Chinese. Each character is in the list in its simplified form too.
CHINESE_STOP_WORDS = frozenset(
    "的年在月是和日了於于·為为有被人中他與与後后也而由之以其國国不大者一曰王子軍军三帝所至事學学自二時时州"
)

# A line that ends in one of these, closing brackets aside, is a sentence. Items of Chinese statutes end with ； or ：.
LINE_END = {"words": ".!?\"'”’»؟۔।॥።", "chinese": '。！？…；：”’」』.!?"'}
SENTENCE_END = {
    "words": re.compile(r"[.!?…؟۔।॥።][\"'”’)\]]{0,3}(?=\s|$)"),
    "chinese": re.compile(r"[。！？…](?![。！？…])"),
}
CLOSING_BRACKETS = ")）】》]"

Units = Literal["words", "chinese"]


def units_of(language: str, step: str) -> Units:
    """The units in which `step` counts text of `language`. Raises ConfigError if it has none for the language."""
    language = primary(language)
    if language == "zh":
        return "chinese"
    if language in UNSPACED:
        where = f"a source is in {language!r}, which is written without spaces"
        raise ConfigError(
            f"{step} counts words or Chinese characters", where, f"say for which languages: {step}: [en, zh]"
        )
    return "words"


def stop_words(language: str) -> frozenset[str]:
    """The most common function words of the language; empty if no list is known."""
    language = primary(language)
    if language in ("en", "zh"):
        return ENGLISH_STOP_WORDS if language == "en" else CHINESE_STOP_WORDS
    lists = library("stopwordsiso")
    return frozenset(lists.stopwords(language)) if lists.has_lang(language) else frozenset()


def lines_of(text: str) -> list[str]:
    """The lines that are not blank, without white space around them."""
    return [line for line in map(str.strip, text.split("\n")) if line]


def ends_sentence(line: str, units: Units) -> bool:
    return line.rstrip(CLOSING_BRACKETS).endswith(tuple(LINE_END[units]))
