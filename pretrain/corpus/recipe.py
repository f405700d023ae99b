"""The recipe of a corpus: its sources, how their files are read, and which part of each is held out."""

import re
from collections import Counter
from typing import Literal

from pydantic import Field, field_validator, model_validator

from pretrain.config import Config
from pretrain.corpus.hub import HubDataset

LANGUAGE = re.compile("[A-Za-z]{2,3}(?:[-_][A-Za-z0-9]{1,8})*")  # BCP 47; the word `English` does not match
SPLIT = ("heldout_fraction", "heldout_documents", "split_characters")  # keys of a source


class Source(Config):
    """One source of a corpus: its files, how they are read, and its held-out part."""

    name: str
    """The name of the source in reports and configurations. It is part of the corpus's fingerprint."""
    files: list[str] | None = None
    """Files, patterns (also `**`) and folders, relative to the recipe."""
    dataset: HubDataset | None = None
    """A dataset of the Hugging Face hub, or a folder that `datasets` can load, in place of files."""
    language: str = "und"
    """The language as a BCP 47 tag such as `en` or `zh-Hant`; `und`: not known. Cleaning chooses its steps by it."""
    licence: str = "unstated"
    """The licence of the text. It is written into the index of every stage."""
    format: Literal["txt", "jsonl", "parquet", "arrow"] | None = None
    """The format of all files; null: the name of each file tells."""
    documents: Literal["blocks", "file"] = "blocks"
    """The documents of a .txt file: `blocks` of text between blank lines, or the whole `file`."""
    field: str = Field("text", min_length=1)
    """The key or column with the text, in all formats but txt. `a.b` is b inside a; a list of texts is one document."""
    output_field: str | None = Field(None, min_length=1)
    """The key or column with the output of a labelled pair, for span_corruption. The input is then under `field`."""
    bad_records: Literal["stop", "skip"] = "stop"
    """The reaction to a record that gives no text: `stop` the run, or count it and `skip` it."""
    max_record_bytes: int = Field(64 << 20, gt=0)
    """Bytes of the longest record (a line, or a document of a .txt file), decompressed. Longer ones are bad records."""
    heldout_fraction: float | None = Field(None, ge=0, le=1)
    """The fraction of the source's documents that is held out; null: the recipe's."""
    heldout_documents: int = Field(0, ge=0)
    """The least number of documents to hold out: those with the smallest hashes. The source is read once more."""
    split_characters: int | None = Field(None, ge=100)
    """Split longer documents into passages of about this many characters. Else a book is on one side as a whole."""

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
            raise ValueError(f"the source {self.name!r} is a dataset, so remove format: and documents:")
        if self.output_field and self.split_characters:
            raise ValueError(f"the source {self.name!r} has pairs, which are never split: remove split_characters:")
        return self

    @property
    def fields(self) -> tuple[str, ...]:
        """The keys or columns that a document is made of: its text, or the input and the output of a pair."""
        return (self.field,) if self.output_field is None else (self.field, self.output_field)

    @property
    def split(self) -> dict:
        """The keys that decide the sides of the source's documents, without those left at their defaults."""
        return self.model_dump(include=set(SPLIT), exclude_defaults=True)


class Recipe(Config):
    """The recipe of a corpus."""

    name: str
    """The name of the corpus."""
    heldout_fraction: float = Field(0.01, gt=0, lt=1)
    """The fraction of the documents that is held out. A document's hash decides."""
    sources: list[Source] = Field(min_length=1)
    """The sources of the corpus. Their order is the order of the documents."""

    @field_validator("sources")
    @classmethod
    def _distinct(cls, sources: list[Source]) -> list[Source]:
        names = [source.name for source in sources]
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise ValueError(f"two sources share a name: {', '.join(twice)}: rename one")
        return sources

    @property
    def paired(self) -> list[str]:
        """The names of the sources of labelled pairs."""
        return [source.name for source in self.sources if source.output_field]
