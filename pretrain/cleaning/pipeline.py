"""The steps that clean one document, in their order, each with its section of the configuration.

    step               on by default   why
    html               all languages   a tag is never prose; what only looks like one stays
    mojibake           all languages   repairs only what it can prove, good text is left alone
    unicode            all languages   one spelling for one character; NFC loses nothing
    control            all languages   what cannot be seen only splits words
    script             no              changes what the author wrote: choose it
    pii                all languages   masks, drops nothing: an item in 6 MB of encyclopaedia, none in books
    language           known ones      text in another language than the source says is a mistake
    gopher_repetition  no              the four sets of rules for web pages: they cost books, verse, statutes,
    gopher_quality     no              dialogue and code what they cost nobody on web pages, so whoever has
    fineweb            no              web pages switches them on, and looks at the funnel
    c4                 no
    length             all languages   below 10 characters: page numbers
    stopwords          no              pre-training keeps them

The default set is for text of unknown origin: it repairs, masks, and drops only what is surely wrong. For web pages,
as FineWeb does it: `gopher_repetition: true`, `gopher_quality: true`, `c4: {terminal_punctuation: false}` with `use:
true`, `fineweb: true`.

Why this order. Markup first, since an entity may hide a byte of mojibake; mojibake before anything that changes the
characters it is recognised by (no-break spaces, soft hyphens, C1 controls); the Unicode form before control characters
are looked at. Masking comes before the first filter, so that the funnel's samples of dropped documents show nobody's
number. Filters see repaired text: the language first, then the document as its author laid it out (repetition, quality,
FineWeb's share of punctuated lines), then C4, which takes lines out, and the length of what is left.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

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

    section: type[Section]  # its settings
    build: Callable[[Section, str], Callable[[str], Outcome]]  # its function of a text, for a section and a language
    unit: str = ""  # of what it counts as changed; a filter changes nothing


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
    """The steps that are on for a source of `language` (BCP 47), in their order; a process builds its own.

    Each is a pure function, linear in the text. A document of which nothing is left is dropped by the step that took
    the last of it. Raises ConfigError for a step that has no form for the language, CorpusError for a missing library.
    """
    sections = {name: getattr(config, name) for name in STEPS}
    return [
        Step(name, _dropping_empty(STEPS[name].build(section, language)))
        for name, section in sections.items()
        if section.covers(language)
    ]


def _dropping_empty(apply: Callable[[str], Outcome]) -> Callable[[str], Outcome]:
    def checked(text: str) -> Outcome:
        outcome = apply(text)
        if outcome.dropped or outcome.text is text or outcome.text.strip():
            return outcome
        return Outcome(outcome.text, outcome.changes, "nothing left", outcome.measured)

    return checked
