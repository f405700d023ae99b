"""What a cleaning step is made of: its section of the configuration, what it does to one document, its name."""

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Annotated, Any

from pydantic import Field, model_validator

from pretrain.cleaning.limits import Measurement
from pretrain.config import NULL, Config
from pretrain.errors import CorpusError

Share = Annotated[float, Field(ge=0, le=1)]  # a fraction of something

# ISO 639-3 codes that are Chinese too: BCP 47 lets `cmn-Hans` stand for `zh-Hans` (RFC 5646, section 4.1.2).
CHINESE = {"zh", "cmn", "yue", "wuu", "lzh", "hak", "nan", "gan", "hsn", "cdo"}


@dataclass(frozen=True)
class Outcome:
    """One document after one step. `changes` is in the step's unit; `dropped` says why the document goes."""

    text: str
    changes: int = 0
    dropped: str | None = None
    measured: tuple[Measurement, ...] = field(default=(), compare=False)  # by the rules the document came to


def judged(text: str, found: Iterable[Measurement], changes: int = 0) -> Outcome:
    """Drop the document for the first rule it breaks; the rules after that one are not evaluated."""
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
    """The settings of one step; `use` says for which languages it is on.

    `true`: all; `false`: none; `[en, zh]`: those, by primary subtag. A section given as such a value alone means
    its `use`: `pii: false` is `pii: {use: false}`.
    """

    use: bool | list[str] = True

    @model_validator(mode="before")
    @classmethod
    def _short(cls, values: Any) -> Any:
        if values is None or (isinstance(values, str) and values in NULL):
            return {"use": False}
        return {"use": values} if isinstance(values, (bool, str, list)) else values

    def covers(self, language: str) -> bool:
        return self.use if isinstance(self.use, bool) else primary(language) in map(primary, self.use)


def primary(language: str) -> str:
    """The primary subtag of a BCP 47 tag, every Chinese one as `zh`: `zh-Hant-TW` → `zh`, `cmn` → `zh`."""
    subtag = language.replace("_", "-").split("-")[0].lower()
    return "zh" if subtag in CHINESE else subtag


def library(name: str) -> ModuleType:
    """The optional library `name`, imported; CorpusError saying how to install it when it is not there."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise CorpusError(
            f"this cleaning step needs the package {name.split('.')[0]}", "pip install '.[data]'"
        ) from None
