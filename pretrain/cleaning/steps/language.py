"""Drop documents in another language than their source declares."""

import re
from collections.abc import Callable
from functools import cache
from typing import Any

from pydantic import Field

from pretrain.cleaning.limits import Measurement, Rule
from pretrain.cleaning.step import Outcome, Section, library, primary
from pretrain.errors import ConfigError

# Groups of languages that the identifier cannot tell apart in a paragraph.
ALIKE = ({"no", "nn", "nb"}, {"bs", "hr", "sr", "sh"}, {"id", "ms"}, {"uz", "uzs"}, {"ku", "sdh"})

MISTAKEN = {"cn": "zh", "jp": "ja", "kr": "ko", "ua": "uk", "gr": "el", "cz": "cs", "dk": "da"}  # country → language
NO_LANGUAGE = "zxx"  # ISO 639-2: the identifier's answer for tables of numbers


class Language(Section):
    """Drop documents in another language than their source declares.

    `use: true` covers every source with a language that py3langid knows. Other sources, also `und`, are not filtered.
    """

    min_score: float = Field(0.65, gt=0, le=1)
    """A document is dropped if another language has at least this score. A larger value drops fewer documents."""
    min_bytes: int = Field(100, ge=1)
    """Bytes of UTF-8: shorter documents are not judged."""
    sample_characters: int = Field(800, ge=100)
    """Characters of each document that are read to identify its language."""

    def covers(self, language: str) -> bool:
        if self.use is True:
            return primary(language) != "und" and family(language) in _families()
        for chosen in self.use or ():
            _check(chosen)
        return super().covers(language)


def language(section: Language, source: str) -> Callable[[str], Outcome]:
    """Drop documents for which another language than the source's has a score of at least `min_score`.

    The identifier is py3langid (after Lui & Baldwin 2012, langid.py), with scores normalised over all its languages;
    0.65 is FineWeb's threshold for fastText. In doubt the declared language is right: FineWeb drops documents that are
    not surely English, this step only documents that are surely in another language, because code, tables and names
    look like any language. The identifier reads four passages of a long document, so the work is bounded. Documents
    below 100 bytes (100 English letters, 33 Chinese characters) are not judged: of 747 English articles cut to 50
    letters, 7 score 0.65 in another language; cut to 100 letters, none does.

    The step drops 7 of 25,447 articles of English Wikipedia, 5 of them mostly in another language, and none of 99,028
    Chinese articles, poems and statutes.

    Mandarin, Cantonese and Wu count as one language. A text mostly in Chinese characters, without kana and hangul, is
    Chinese of either script and any age; the model is not asked. The model takes 120 MB a process.
    """
    _check(source)
    own, identifier, rule = family(source), _identifier(), Rule("score of another language", "≥", section.min_score)

    def apply(text: str) -> Outcome:
        sample = _sample(text, section.sample_characters)
        if len(sample.encode("utf-8", "surrogatepass")) < section.min_bytes or (own == "zh" and _is_han(sample)):
            return Outcome(text)
        if family(identifier.classify(sample)[0]) == own:
            return Outcome(text, measured=(Measurement(rule, 0.0),))
        scores: dict[str, float] = {}
        for label, score in identifier.rank(sample):
            scores[family(label)] = scores.get(family(label), 0.0) + score
        found, score = max(scores.items(), key=lambda item: item[1])
        one = Measurement(rule, 0.0 if found in (own, NO_LANGUAGE) else score)
        reason = f"language {found} {score:.2f}, not {source}" if one.broken else None
        return Outcome(text, dropped=reason, measured=(one,))

    return apply


def _check(language: str) -> None:
    """Raise ConfigError for a language that the identifier does not know."""
    if family(language) not in _families():
        known = f"leave it out; known: {', '.join(sorted(_identifier().labels))}"
        meant = MISTAKEN.get(primary(language))
        remedy = f"did you mean {meant}? Else {known}" if meant else known
        raise ConfigError(f"the language filter does not know {language!r}", remedy)


NOT_HAN = re.compile("[^\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003347f]+")
KANA_OR_HANGUL = re.compile("[\u3041-\u3096\u30a1-\u30fa\u31f0-\u31ff\uff66-\uff9d\uac00-\ud7a3]")


def _is_han(text: str) -> bool:
    return len(NOT_HAN.sub("", text)) > len(text) / 2 and not KANA_OR_HANGUL.search(text)


@cache
def family(language: str) -> str:
    """The language itself, or for a member of a group in ALIKE the alphabetically first member."""
    subtag = primary(language)
    return min(next((group for group in ALIKE if subtag in group), {subtag}))


@cache
def _identifier() -> Any:
    langid = library("py3langid.langid")
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)


@cache
def _families() -> frozenset[str]:
    return frozenset(map(family, _identifier().labels))


def _sample(text: str, characters: int) -> str:
    """The text, or four passages of it at equal distances."""
    if len(text) <= characters:
        return text
    part = characters // 4
    starts = (round(quarter * (len(text) - part) / 3) for quarter in range(4))
    return "\n".join(text[start : start + part] for start in starts)
