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

from pretrain.cleaning.step import Outcome, Section, Step
from pretrain.cleaning.steps.characters import Control, Mojibake, Script, Unicode, control, mojibake, script, unicode
from pretrain.cleaning.steps.language import Language, language
from pretrain.cleaning.steps.markup import Html, html_remains
from pretrain.cleaning.steps.privacy import Pii, pii
from pretrain.cleaning.steps.quality import C4, FineWeb, GopherQuality, Length, c4, fineweb, gopher_quality, length
from pretrain.cleaning.steps.repetition import GopherRepetition, gopher_repetition
from pretrain.cleaning.steps.stopwords import StopWords, stop_words_removed
from pretrain.config import Config

Builder = Callable[[Section, str], Callable[[str], Outcome]]


class StepsConfig(Config):
    """One section a step, in the order they run. `pii: false` is short for `pii: {use: false}`, `c4: [en]` for
    `c4: {use: [en]}`.
    """

    html: Html = Html()
    mojibake: Mojibake = Mojibake()
    unicode: Unicode = Unicode()
    control: Control = Control()
    script: Script = Script()
    pii: Pii = Pii()
    language: Language = Language()
    gopher_repetition: GopherRepetition = GopherRepetition()
    gopher_quality: GopherQuality = GopherQuality()
    fineweb: FineWeb = FineWeb()
    c4: C4 = C4()
    length: Length = Length()
    stopwords: StopWords = StopWords()


BUILDERS: dict[str, Builder] = {
    "html": html_remains,
    "mojibake": mojibake,
    "unicode": unicode,
    "control": control,
    "script": script,
    "pii": pii,
    "language": language,
    "gopher_repetition": gopher_repetition,
    "gopher_quality": gopher_quality,
    "fineweb": fineweb,
    "c4": c4,
    "length": length,
    "stopwords": stop_words_removed,
}

# What `changes` counts; a step without a unit changes nothing.
UNITS = {
    "html": "tags, comments and entities",
    "mojibake": "lines",
    "unicode": "characters",
    "control": "characters",
    "script": "characters",
    "pii": "items",
    "c4": "lines",
    "stopwords": "words",
}


def steps(config: StepsConfig, language: str) -> list[Step]:
    """The steps that are on for a source of `language` (BCP 47), in their order; a process builds its own.

    Each is a pure function, linear in the text. A document of which nothing is left is dropped by the step that took
    the last of it. Raises ConfigError for a step that has no form for the language, CorpusError for a missing library.
    """
    sections = ((name, getattr(config, name)) for name in StepsConfig.model_fields)
    return [
        Step(name, _dropping_empty(BUILDERS[name](section, language)))
        for name, section in sections
        if section.covers(language)
    ]


def _dropping_empty(apply: Callable[[str], Outcome]) -> Callable[[str], Outcome]:
    def checked(text: str) -> Outcome:
        outcome = apply(text)
        if outcome.dropped or outcome.text is text or outcome.text.strip():
            return outcome
        return Outcome(outcome.text, outcome.changes, "nothing left", outcome.measured)

    return checked
