"""Text in: a recipe names files, `documents` streams them, a document's own hash decides its side.

A recipe is a YAML file beside the text it describes (`data/sample/recipe.yaml`); a single text file does as well
and is then a recipe of one source. Two formats, each plain, .gz or .zst:

    txt    documents separated by blank lines
    jsonl  one JSON object a line, the document under `field`

Text is UTF-8; a byte that is not stops the run with file, line and offset: pre-training on silently repaired text is
the kind of surprise that shows at step 40,000.
"""

import hashlib
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from pretrain.config import Config, load
from pretrain.corpus.reading import Chunk, chunks_of, format_of, records_of
from pretrain.errors import CorpusError

SIDES = ("train", "heldout")
CHUNK_BYTES = 4 << 20


class Source(Config):
    name: str
    files: list[str] = Field(min_length=1)  # relative to the recipe
    language: str = "und"  # BCP 47
    licence: str = "unstated"
    format: Literal["txt", "jsonl"] | None = None  # default: from the file's name
    field: str = "text"  # jsonl only


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


@dataclass(frozen=True)
class Document:
    text: str
    source: str  # its name
    language: str
    side: str  # of SIDES
    where: str  # file and line


class Corpus:
    """A recipe and the folder its file names start from. Iterating reads; nothing is kept."""

    def __init__(self, recipe: Recipe, root: Path):
        self.recipe, self.root = recipe, Path(root)
        self._hashes: dict[str, str] = {}

    def chunks(self, size: int = CHUNK_BYTES) -> Iterator[Chunk]:
        """The whole text in stretches of about `size` bytes, in the recipe's order: what `read` takes, anywhere.

        Raises CorpusError for a missing or damaged file.
        """
        for number, source in enumerate(self.recipe.sources):
            for path in (self.root / name for name in source.files):
                yield from chunks_of(path, source.format or format_of(path), number, size)

    def read(self, chunk: Chunk) -> Iterator[Document]:
        """The documents of a chunk, in order. Empty ones do not exist.

        Raises CorpusError for invalid UTF-8 or a bad record, naming file and line.
        """
        source = self.recipe.sources[chunk.source]
        for record in records_of(chunk, source.field):
            side = side_of(record.text, self.recipe.heldout_fraction)
            yield Document(record.text, source.name, source.language, side, record.where)

    def documents(self, sides: tuple[str, ...] = SIDES) -> Iterator[Document]:
        """Every document of the given sides, in the recipe's order, read in this process."""
        for chunk in self.chunks():
            yield from (document for document in self.read(chunk) if document.side in sides)

    def fingerprint(self) -> dict:
        """Identity of the text: per source and file the SHA-256 of the bytes as stored, and the split."""
        sources = []
        for source in self.recipe.sources:
            hashes = [self._hash(self.root / name) for name in source.files]
            formats = [source.format or format_of(self.root / name) for name in source.files]
            sources.append({"name": source.name, "formats": formats, "field": source.field, "sha256": hashes})
        return {"heldout_fraction": self.recipe.heldout_fraction, "sources": sources}

    def check(self) -> None:
        """Raise CorpusError for the first file that is not there or of no known format, before any work is done."""
        for source in self.recipe.sources:
            for path in (self.root / name for name in source.files):
                if not path.is_file():
                    remedy = "a recipe names its files relative to itself"
                    raise CorpusError("no such text file", f"{path}, of source {source.name!r}", remedy)
                if source.format is None:
                    format_of(path)

    def _hash(self, path: Path) -> str:
        key = str(path)
        if key not in self._hashes:
            with open(path, "rb") as file:
                self._hashes[key] = hashlib.file_digest(file, "sha256").hexdigest()
        return self._hashes[key]


def open_corpus(path: Path | str) -> Corpus:
    """A corpus from `recipe.yaml`, from a folder that holds one, or from a single text file."""
    path = Path(path)
    if path.is_dir():
        path = path / "recipe.yaml"
    if path.suffix in (".yaml", ".yml"):
        corpus = Corpus(load(Recipe, path), path.parent)
    else:
        # Not named after the file: a source's name is part of the fingerprint, a path is not.
        corpus = Corpus(Recipe(name="text", sources=[Source(name="text", files=[path.name])]), path.parent)
    corpus.check()
    return corpus


def side_of(text: str, heldout_fraction: float) -> str:
    """ "train" or "heldout", by the document's own hash: adding, renaming or reordering files moves nobody.

    The hash is of the text as read (NFC, white space folded), not of its position and not of cleaned text: or last
    month's scores would stop meaning anything. Equal documents always fall on the same side.
    """
    folded = " ".join(unicodedata.normalize("NFC", text).split())
    draw = int.from_bytes(hashlib.blake2b(folded.encode("utf-8"), digest_size=8).digest(), "little")
    return "heldout" if draw < int(heldout_fraction * 2**64) else "train"
