"""The steps that clean one document, in the order in which they run, each with its section of the configuration.

    step               on by default   why
    html               all languages   a tag is never prose; text that only looks like a tag stays
    mojibake           all languages   it repairs only text that is provably broken
    unicode            all languages   one spelling for each character; NFC loses nothing
    control            all languages   invisible characters only split words
    script             no              it changes the author's own characters
    pii                all languages   it masks and drops nothing: one item in 6 MB of encyclopaedia, none in books
    language           known ones      text in another language than its source declares is a mistake
    gopher_repetition  no              these four filters were made for web pages. From other text they also drop good
    gopher_quality     no              documents: books, verse, statutes, dialogue, code. Switch them on for web pages,
    fineweb            no              and look at the funnel
    c4                 no
    length             all languages   documents below 10 characters are page numbers
    stopwords          no              a language model has to learn the stop words

The default set is for text of unknown origin: it repairs, masks, and drops only text that is surely wrong. FineWeb's
choice for web pages is `gopher_repetition: true`, `gopher_quality: true`, `fineweb: true` and
`c4: {use: true, terminal_punctuation: false}`.

Why this order? Markup is removed first, because an entity may hide a byte of mojibake. Mojibake is repaired before
anything changes the characters that reveal it (no-break spaces, soft hyphens, C1 controls). The Unicode form is set
before control characters are removed. Masking comes before the first filter, so that samples of dropped documents show
no personal data. The filters see repaired text: first the language, then the document with its original lines
(repetition, quality, FineWeb's share of punctuated lines), then C4, which removes lines, and last the length of the
remaining text.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import create_model

from pretrain.cleaning.step import Outcome, Section, Step
from pretrain.cleaning.steps.characters import Control, Mojibake, Script, Unicode, control, mojibake, script, unicode
from pretrain.cleaning.steps.language import Language, language
from pretrain.cleaning.steps.markup import Html, html_remains
from pretrain.cleaning.steps.privacy import Pii, pii
from pretrain.cleaning.steps.quality import C4, FineWeb, GopherQuality, Length, c4, fineweb, gopher_quality, length
from pretrain.cleaning.steps.repetition import GopherRepetition, gopher_repetition
from pretrain.cleaning.steps.stopwords import StopWords, stop_words_removed
from pretrain.config import Config


class Entry(NamedTuple):
    """A step in the list of steps."""

    section: type[Section]  # the class of its settings
    build: Callable[[Any, str], Callable[[str], Outcome]]  # makes its function, for a `section` and a language
    unit: str = ""  # the unit of its changes; a filter has none, for it changes nothing


STEPS: dict[str, Entry] = {
    "html": Entry(Html, html_remains, "tags, comments and entities"),
    "mojibake": Entry(Mojibake, mojibake, "lines"),
    "unicode": Entry(Unicode, unicode, "characters"),
    "control": Entry(Control, control, "characters"),
    "script": Entry(Script, script, "characters"),
    "pii": Entry(Pii, pii, "items"),
    "language": Entry(Language, language),
    "gopher_repetition": Entry(GopherRepetition, gopher_repetition),
    "gopher_quality": Entry(GopherQuality, gopher_quality),
    "fineweb": Entry(FineWeb, fineweb),
    "c4": Entry(C4, c4, "lines"),
    "length": Entry(Length, length),
    "stopwords": Entry(StopWords, stop_words_removed, "words"),
}

if TYPE_CHECKING:
    StepsConfig = Config
else:
    StepsConfig = create_model(
        "StepsConfig",
        __base__=Config,
        __module__=__name__,
        __doc__="One section for each step, in the order in which they run. `pii: false` is short for "
        "`pii: {use: false}`, and `c4: [en]` for `c4: {use: [en]}`.",
        **{name: (entry.section, entry.section()) for name, entry in STEPS.items()},
    )


def steps(config: StepsConfig, language: str) -> list[Step]:
    """The steps that are on for a source of `language` (BCP 47), in their order. Each process builds its own.

    Each step is a pure function, and its time is linear in the text. A step that leaves no text drops the document.
    Raises ConfigError for a step that does not support the language, CorpusError for a missing library.
    """
    sections = {name: getattr(config, name) for name in STEPS}
    return [
        Step(name, _dropping_empty(STEPS[name].build(section, language)))
        for name, section in sections.items()
        if section.covers(language)
    ]


def _dropping_empty(apply: Callable[[str], Outcome]) -> Callable[[str], Outcome]:
    """Let a step drop the document when it leaves no text."""

    def checked(text: str) -> Outcome:
        outcome = apply(text)
        if outcome.dropped or outcome.text is text or outcome.text.strip():
            return outcome
        return Outcome(outcome.text, outcome.changes, "nothing left", outcome.measured)

    return checked
