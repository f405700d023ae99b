"""Text in: a recipe names files, `documents` streams them, a document's own hash decides its side.

A recipe is a YAML file beside the text it describes (`data/sample/recipe.yaml`); a single text file does as well
and is then a recipe of one source; so does a folder that the stage `clean` published. The formats:

    txt        documents between blank lines, or one document a file (`documents: file`)
    jsonl      one JSON object a line, the document under `field`: what datatrove writes, too
    parquet    the document in the column `field`
    arrow      the same, as `datasets.save_to_disk` writes it (its folder can be named) and any Arrow file
    dataset    instead of files: what the library `datasets` loads by name from the Hugging Face hub, streamed

txt and jsonl may be compressed (.gz .zst .xz .bz2). Text is UTF-8; what is not, and any other record that gives no
text, stops the run with file and line, or is counted and left out where the source says `bad_records: skip`:
pre-training on silently repaired text is the kind of surprise that shows at step 40,000.

Memory, whatever the size of a corpus: a few chunks of CHUNK_BYTES; a longer document is held whole, up to
`max_record_bytes` (of parquet, the rows that are decoded together: tables.ROWS).
"""

import hashlib
import json
import os
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from pretrain import folders
from pretrain.config import Config, load
from pretrain.corpus import hub
from pretrain.corpus.bad import EMPTY, Bad, Skipped, refusal
from pretrain.corpus.compressed import COPY_AGAIN
from pretrain.corpus.files import expand, format_of, reached
from pretrain.corpus.hub import HubDataset
from pretrain.corpus.reading import Chunk, Part, chunks_of, parts_of, records_of, together
from pretrain.errors import CorpusError

SIDES = ("train", "heldout")
RECIPE = "recipe.yaml"
CHUNK_BYTES = 4 << 20
NARROW_SPACES = bytes(ord(" ") if chr(c).isspace() and c < 128 else c for c in range(256))  # for bytes.translate
WIDE_SPACES = [chr(c) for c in range(128, 0x3001) if chr(c).isspace()]
LANGUAGE = re.compile("[A-Za-z]{2,3}(?:[-_][A-Za-z0-9]{1,8})*")  # as BCP 47 has it; `English` would be no English
CLEAN_BY = "python launch/clean.py CONFIG.yaml"


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

    @model_validator(mode="after")
    def _consistent(self) -> "Source":
        if not LANGUAGE.fullmatch(self.language):
            said = f"the source {self.name!r} has language: {self.language!r}"
            raise ValueError(f"{said}, which is no tag such as en, zh-Hant or und")
        if (not self.files) == (self.dataset is None):
            raise ValueError(f"the source {self.name!r} needs either files: or dataset:")
        if self.dataset and (self.format or self.documents == "file"):
            raise ValueError(f"the source {self.name!r} is a dataset: format: and documents: are of files")
        return self


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
    where: str  # file, relative to the recipe, and line


@dataclass(frozen=True)
class Group:
    """Files of one source that one process may open, one after another: what it sends for is only their names."""

    source: int  # its number in the recipe
    files: tuple[str, ...]  # as the source has them; none of a dataset that is streamed
    bytes: int  # as stored


class Corpus:
    """A recipe and the folder its file names start from. Iterating reads; nothing is kept but the hashes of files."""

    def __init__(self, recipe: Recipe, root: Path):
        self.recipe, self.root = recipe, Path(root)
        self._files: dict[str, list[str]] = {}  # source → what its names stand for
        self._datasets: dict[str, hub.Resolved] = {}  # source → what its dataset is now
        self._states: dict[Path, tuple[int, ...]] = {}  # file → `_state` when the work began
        self._hashes: dict[Path, str] = {}

    def __reduce__(self):
        return Corpus, (self.recipe, self.root)  # to read a chunk is all that is asked of a corpus in another process

    def groups(self, size: int = CHUNK_BYTES) -> Iterator[Group]:
        """The files in the recipe's order, small ones together until they have `size` bytes: what `chunks` takes."""
        for number, source in enumerate(self.recipe.sources):
            sizes = ((file, (self.root / file).stat().st_size) for file in self.files(source))
            yield from (Group(number, files, stored) for files, stored in together(sizes, size))
            if self._is_streamed(source):
                yield Group(number, (), 0)

    def chunks(self, size: int = CHUNK_BYTES, group: Group | None = None) -> Iterator[Chunk]:
        """The text in stretches of about `size` bytes, in the recipe's order: what `read` takes, anywhere.

        All of it, or that of a group; they are the same stretches. Raises CorpusError for a missing or damaged file.
        """
        for one in self.groups(size) if group is None else (group,):
            yield from chunks_of(self._parts(self.recipe.sources[one.source], one.files, size), one.source, size)

    def read(self, chunk: Chunk, skipped: Skipped | None = None) -> Iterator[Document]:
        """The documents of a chunk, in order. Records that give none are added to `skipped`.

        Raises CorpusError for the first of them, naming file and line, unless it is empty or its source skips.
        """
        source = self.recipe.sources[chunk.source]
        for part in chunk.parts:
            for found in records_of(part, source.field, source.max_record_bytes):
                if not isinstance(found, Bad):
                    side = side_of(found.text, self.recipe.heldout_fraction)
                    yield Document(found.text, source.name, source.language, side, found.where)
                    continue
                if source.bad_records == "stop" and found.kind != EMPTY:
                    where = found.where if source.dataset else str(self.root / found.where)
                    raise refusal(found, where, source.field)
                if skipped is not None:
                    skipped.add(source.name, found)

    def documents(self, sides: tuple[str, ...] = SIDES, skipped: Skipped | None = None) -> Iterator[Document]:
        """Every document of the given sides, in the recipe's order, read in this process."""
        for chunk in self.chunks():
            yield from (document for document in self.read(chunk, skipped) if document.side in sides)

    def fingerprint(self, map: Callable = map) -> dict:
        """Identity of the text: per source and file the SHA-256 of the bytes as stored, how it is read, the split.

        Where files are and what they are called is no part of it, nor by which pattern they were found. Of a
        dataset of the hub it is the name and the commit. Files are hashed once for a corpus, by `map`, which may use
        other processes.
        """
        paths = [path for source in self.recipe.sources for path in self._stored(source)]
        new = [path for path in dict.fromkeys(paths) if path not in self._hashes]
        for path, found in zip(new, map(folders.digest, new), strict=True):
            if self._states.get(path, _state(path)) != _state(path):
                raise CorpusError("a file changed while it was read", str(path), "start again when it is at rest")
            self._hashes[path] = found["sha256"]
        return {
            "heldout_fraction": self.recipe.heldout_fraction,
            "sources": [self._identity(source) for source in self.recipe.sources],
        }

    def check(self) -> None:
        """Raise CorpusError for the first file that is not there or of no known format, before any work is done."""
        for source in self.recipe.sources:
            for file in self.files(source):
                path, form = self.root / file, self._format(source, file)
                with reached(source.name):
                    there = path.is_file()
                if not there:
                    raise CorpusError("no such text file", f"{path}, of source {source.name!r}")
                if source.documents == "file" and form != "txt":
                    found = f"{path}, of source {source.name!r}, is {form}"
                    raise CorpusError("documents: file is for txt", found, "set format: txt, or remove documents:")
                self._states[path] = _state(path)
            if self._is_streamed(source):
                self._dataset(source)

    def files(self, source: Source) -> list[str]:
        """The files of a source, relative to the recipe; none of a dataset that `datasets` streams."""
        if source.name not in self._files:
            names = source.files
            with reached(source.name):
                if source.dataset:
                    folder = hub.saved_folder(source.dataset, self.root)
                    names = [folder] if folder else []
                self._files[source.name] = expand(names, self.root, source.name)
        return self._files[source.name]

    def held_in(self, folder: Path) -> Path | None:
        """The first file of the corpus that lies in `folder`."""
        above = os.path.join(os.path.realpath(folder), "")
        paths = (self.root / file for source in self.recipe.sources for file in self.files(source))
        return next((path for path in paths if os.path.realpath(path).startswith(above)), None)

    def _format(self, source: Source, file: str) -> str:
        return source.format or format_of(self.root / file)

    def _parts(self, source: Source, files: tuple[str, ...], size: int) -> Iterator[Part]:
        for file in files:
            path, form = self.root / file, self._format(source, file)
            if form in ("parquet", "arrow"):
                from pretrain.corpus import tables  # imports pyarrow

                yield from tables.parts_of(path, file, form, source.field, size)
            else:
                cut = "lines" if form == "jsonl" else source.documents
                yield from parts_of(path, file, cut, size, source.max_record_bytes)
        if not files:
            yield from hub.parts_of(self._dataset(source), source.field, size)

    def _is_streamed(self, source: Source) -> bool:
        return source.dataset is not None and not self.files(source)

    def _dataset(self, source: Source) -> hub.Resolved:
        if source.name not in self._datasets:
            self._datasets[source.name] = hub.resolve(source.dataset, self.root)
        return self._datasets[source.name]

    def _identity(self, source: Source) -> dict:
        found = {"name": source.name, "field": source.field, "max_record_bytes": source.max_record_bytes}
        if self._is_streamed(source):
            found["dataset"] = self._dataset(source).identity()
        else:
            found["formats"] = [self._format(source, file) for file in self.files(source)]
            found["documents"] = source.documents
        return {**found, "sha256": [self._hashes[path] for path in self._stored(source)]}

    def _stored(self, source: Source) -> list[Path]:
        """The files whose bytes are the identity of a source."""
        if self._is_streamed(source):
            return self._dataset(source).files
        return [self.root / file for file in self.files(source)]


class Cleaned:
    """A corpus that the stage `clean` published, read as a `Corpus` is. Sides and places are as they were written."""

    def __init__(self, folder: Path, index: dict):
        self.folder, self.index = folder, index
        named = [Source(**source, files=["part-*"]) for source in index["sources"]]
        self.recipe = Recipe(name=index["name"], heldout_fraction=index["heldout_fraction"], sources=named)

    def groups(self, size: int = CHUNK_BYTES) -> Iterator[Group]:
        files = sorted(
            (name, entry["bytes"]) for name, entry in self.index["files"].items() if name.startswith("part-")
        )
        return (Group(0, names, stored) for names, stored in together(files, size))

    def chunks(self, size: int = CHUNK_BYTES, group: Group | None = None) -> Iterator[Chunk]:
        for one in self.groups(size) if group is None else (group,):
            parts = (part for n in one.files for part in parts_of(self.folder / n, n, "lines", size, sys.maxsize))
            yield from chunks_of(parts, 0, size)

    def read(self, chunk: Chunk, skipped: Skipped | None = None) -> Iterator[Document]:
        """The documents of a chunk, in order; there are no bad records. Raises CorpusError for altered ones."""
        for part in chunk.parts:
            for number, line in enumerate(part.data.splitlines(), part.first):
                try:
                    yield Document(**json.loads(line))
                except (ValueError, TypeError) as error:
                    where = f"{self.folder / part.file}, line {number}: {error}"
                    raise CorpusError("a cleaned corpus is damaged", where, COPY_AGAIN) from None

    def documents(self, sides: tuple[str, ...] = SIDES, skipped: Skipped | None = None) -> Iterator[Document]:
        for chunk in self.chunks():
            yield from (document for document in self.read(chunk) if document.side in sides)

    def held_in(self, folder: Path) -> Path | None:
        return self.folder if Path(folder).resolve() in self.folder.resolve().parents else None

    def fingerprint(self, map: Callable = map) -> dict:
        return {"clean": self.index["fingerprint"]}

    def check(self) -> None:
        """Raise CorpusError unless every file has its size, and in a small folder its bytes."""
        folders.check(self.folder, self.index, CorpusError, f"make it again with: {CLEAN_BY}")


def open_corpus(path: Path | str) -> Corpus | Cleaned:
    """A corpus from `recipe.yaml`, a folder that holds one, a folder of the stage `clean`, or a single text file."""
    path = Path(path)
    if (path / RECIPE).exists():
        path /= RECIPE
    if path.suffix in (".yaml", ".yml"):
        corpus = Corpus(load(Recipe, path), path.parent)
    elif (path / folders.INDEX).is_file():
        corpus = Cleaned(path, folders.read_index(path, CorpusError, CLEAN_BY, stage="clean"))
    elif path.is_file():
        # Not named after the file: a source's name is part of the fingerprint, a path is not.
        corpus = Corpus(Recipe(name="text", sources=[Source(name="text", files=[path.name])]), path.parent)
    elif path.is_dir():
        remedy = "write one beside the text (README, Your own corpus), or name one file"
        raise CorpusError(f"the folder has no {RECIPE} that says what is in it", str(path), remedy)
    else:
        remedy = f"corpus: is a text file, a {RECIPE}, its folder, or what the stage clean wrote"
        raise CorpusError("no such text file or folder", str(path), remedy)
    corpus.check()
    return corpus


def check_apart(corpus: Corpus | Cleaned, out: Path | str) -> None:
    """Raise CorpusError when `out`, which is to be written, holds a file of the corpus."""
    if held := corpus.held_in(Path(out)):
        found = f"{held} is in {out}"
        raise CorpusError("the output folder holds a file of the corpus", found, "choose another out=")


def side_of(text: str, heldout_fraction: float) -> str:
    """ "train" or "heldout", by the document's own hash: adding, renaming or reordering files moves nobody.

    The hash is of the text as read (NFC, white space folded), not of its position and not of cleaned text: or last
    month's scores would stop meaning anything. Equal documents always fall on the same side.
    """
    draw = int.from_bytes(hashlib.blake2b(folded(unicodedata.normalize("NFC", text)), digest_size=8).digest(), "little")
    return "heldout" if draw < int(heldout_fraction * 2**64) else "train"


def folded(text: str) -> bytes:
    """`" ".join(text.split())` as UTF-8. Memory: of English 4 times the text; a string of every word takes 13 times."""
    head = text[:100]
    if len(head.encode("utf-8")) < 2 * len(head) and not any(space in text for space in WIDE_SPACES):
        # As in English: half the time of making a string of every word. Chinese has few words to make.
        data = text.encode("utf-8").translate(NARROW_SPACES)
        codes = np.frombuffer(data, np.uint8)
        # Two spaces, or something as rare; `b"  " in data` takes three times as long.
        if (codes[1:] | codes[:-1]).min(initial=255) <= ord(" "):
            while b"  " in data:
                data = data.replace(b"  ", b" ")
        return data.strip(b" ")
    return " ".join(text.split()).encode("utf-8")


def _state(path: Path) -> tuple[int, ...]:
    """What differs when a file is changed: the time of the last change of its inode too, which no program can set.

    `rsync -t` and `cp -p` keep the size and the other time. The number of the inode is no part of this: file systems in
    user space (of object stores, for instance) give a file a new one while it is the same.
    """
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns
