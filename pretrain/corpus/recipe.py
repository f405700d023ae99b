"""The recipe of a corpus: its sources, how their files are read, and which part of each is held out."""

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from pretrain.config import Config
from pretrain.corpus.hub import HubDataset

LANGUAGE = re.compile("[A-Za-z]{2,3}(?:[-_][A-Za-z0-9]{1,8})*")  # as BCP 47 has it; `English` would be no English
SPLIT = ("heldout_fraction", "heldout_documents", "split_characters")  # keys of a source


class Source(Config):
    name: str
    files: list[str] | None = None  # relative to the recipe: files, patterns (`**` too), folders
    dataset: HubDataset | None = None  # instead of files
    language: str = "und"  # BCP 47; und: not known
    licence: str = "unstated"
    format: Literal["txt", "jsonl", "parquet", "arrow"] | None = None  # default: from each file's name
    documents: Literal["blocks", "file"] = "blocks"  # txt: what is between blank lines, or each file
    field: str = Field("text", min_length=1)  # all but txt; `a.b` is b inside a; a list of texts is one document
    bad_records: Literal["stop", "skip"] = "stop"
    max_record_bytes: int = Field(64 << 20, gt=0)  # of a line or a document as stored
    heldout_fraction: float | None = Field(None, ge=0, le=1)  # of its documents; default: that of the recipe
    heldout_documents: int = Field(0, ge=0)  # at least so many, of the smallest hashes; found by reading it once more
    split_characters: int | None = Field(None, ge=100)  # longer documents become passages of about that length

    @model_validator(mode="after")
    def _consistent(self) -> "Source":
        if not LANGUAGE.fullmatch(self.language):
            said = f"the source {self.name!r} has language: {self.language!r}"
            raise ValueError(f"{said}, which is no tag such as en, zh-Hant or und")
        if (not self.files) == (self.dataset is None):
            raise ValueError(f"the source {self.name!r} needs either files: or dataset:")
        if self.heldout_fraction == 0 and self.heldout_documents:
            said = f"the source {self.name!r} has heldout_fraction: 0 and heldout_documents: {self.heldout_documents}"
            raise ValueError(f"{said}: remove one")
        if self.dataset and (self.format or self.documents == "file"):
            raise ValueError(f"the source {self.name!r} is a dataset: format: and documents: are of files")
        return self

    @property
    def split(self) -> dict:
        """The keys of the source that decide about its sides, where it has any."""
        return self.model_dump(include=set(SPLIT), exclude_defaults=True)


class Recipe(Config):
    name: str
    heldout_fraction: float = Field(0.01, gt=0, lt=1)  # of documents
    sources: list[Source] = Field(min_length=1)

    @field_validator("sources")
    @classmethod
    def _distinct(cls, sources: list[Source]) -> list[Source]:
        names = [source.name for source in sources]
        if len(set(names)) < len(names):
            raise ValueError(f"two sources share a name: {', '.join(names)}")
        return sources
