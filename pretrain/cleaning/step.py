"""The contract of a cleaning step: its section of the configuration, its function of one document, its outcome."""

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Annotated, Any

from pydantic import Field, model_validator

from pretrain.cleaning.limits import Measurement
from pretrain.config import NULL, Config
from pretrain.errors import CorpusError

Share = Annotated[float, Field(ge=0, le=1)]  # a fraction
# Each step declares its own default with this type.
Use = Annotated[
    bool | list[str],
    Field(description="`true`: on for all languages; `false`: off; a list such as `[en, zh]`: on for these languages."),
]

# ISO 639-3 codes that are Chinese too: BCP 47 lets `cmn-Hans` stand for `zh-Hans` (RFC 5646, section 4.1.2).
CHINESE = {"zh", "cmn", "yue", "wuu", "lzh", "hak", "nan", "gan", "hsn", "cdo"}


@dataclass(frozen=True)
class Outcome:
    """One document after one step."""

    text: str
    changes: int = 0  # in the step's unit
    dropped: str | None = None  # why the document is dropped; None: it stays
    measured: tuple[Measurement, ...] = field(default=(), compare=False)  # of every rule that was evaluated


def judged(text: str, found: Iterable[Measurement], changes: int = 0) -> Outcome:
    """Drop the document for the first rule that it breaks. Later rules are not evaluated."""
    measured = []
    for one in found:
        measured.append(one)
        if one.broken:
            return Outcome(text, changes, one.reason, tuple(measured))
    return Outcome(text, changes, None, tuple(measured))


@dataclass(frozen=True)
class Step:
    """A named, pure and deterministic function of a document's text."""

    name: str
    apply: Callable[[str], Outcome]


class Section(Config):
    """The settings of one step. A value alone stands for its `use`: `pii: false` means `pii: {use: false}`."""

    use: Use = True

    @model_validator(mode="before")
    @classmethod
    def _short(cls, values: Any) -> Any:
        if values is None or (isinstance(values, str) and values in NULL):
            return {"use": False}
        return {"use": values} if isinstance(values, (bool, str, list)) else values

    def covers(self, language: str) -> bool:
        """Whether the step is on for a language (BCP 47)."""
        return self.use if isinstance(self.use, bool) else primary(language) in map(primary, self.use)


def primary(language: str) -> str:
    """The primary subtag of a BCP 47 tag, with `zh` for all Chinese languages: `zh-Hant-TW` → `zh`, `cmn` → `zh`."""
    subtag = language.replace("_", "-").split("-")[0].lower()
    return "zh" if subtag in CHINESE else subtag


def library(name: str) -> ModuleType:
    """Import the optional library `name`. Raises CorpusError with the install command if it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise CorpusError(f"cleaning needs the package {name.split('.')[0]}", "pip install '.[data]'") from None
