"""Text in: a recipe names files, `documents` streams them, a document's own hash decides its side.

A recipe is a YAML file beside the text it describes (`data/sample/recipe.yaml`); a single text file does as well
and is then a recipe of one source. Two formats, each plain, .gz or .zst:

    txt    documents separated by blank lines
    jsonl  one JSON object a line, the document under `field`

Text is UTF-8; a byte that is not stops the run with file, line and offset: pre-training on silently repaired text is
the kind of surprise that shows at step 40,000.
"""

import gzip
import hashlib
import io
import json
import unicodedata
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from pydantic import Field, field_validator

from pretrain.config import Config, load
from pretrain.errors import CorpusError

SIDES = ("train", "heldout")
READ_BYTES = 1 << 20  # of a .zst file at a time
COPY_AGAIN = "copy or compress it again; what could be read of it is not used"


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
    source: str
    side: str  # of SIDES


class Corpus:
    """A recipe and the folder its file names start from. Iterating reads; nothing is kept."""

    def __init__(self, recipe: Recipe, root: Path):
        self.recipe, self.root = recipe, Path(root)
        self._hashes: dict[str, str] = {}

    def documents(self, sides: tuple[str, ...] = SIDES) -> Iterator[Document]:
        """Every document of the given sides, in the recipe's order. Empty documents do not exist.

        Raises CorpusError for a missing file, invalid UTF-8 or a bad record, naming file and line.
        """
        for source in self.recipe.sources:
            for name in source.files:
                for text in self._texts(source, name):
                    side = side_of(text, self.recipe.heldout_fraction)
                    if side in sides:
                        yield Document(text, source.name, side)

    def fingerprint(self) -> dict:
        """Identity of the text: per source and file the SHA-256 of the bytes as stored, and the split."""
        sources = []
        for source in self.recipe.sources:
            hashes = [self._hash(self.root / name) for name in source.files]
            formats = [source.format or _format_of(self.root / name) for name in source.files]
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
                    _format_of(path)

    def _hash(self, path: Path) -> str:
        key = str(path)
        if key not in self._hashes:
            with open(path, "rb") as file:
                self._hashes[key] = hashlib.file_digest(file, "sha256").hexdigest()
        return self._hashes[key]

    def _texts(self, source: Source, name: str) -> Iterator[str]:
        path = self.root / name
        form = source.format or _format_of(path)
        with _open(path) as stream:
            lines = _decoded(stream, path)
            yield from _blocks(lines) if form == "txt" else _records(lines, source.field, path)


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


def _format_of(path: Path) -> str:
    suffix = next((s for s in reversed(path.suffixes) if s not in (".gz", ".zst")), "")
    match suffix:
        case ".txt":
            return "txt"
        case ".jsonl" | ".json":
            return "jsonl"
    remedy = "set format: txt or jsonl in the recipe"
    raise CorpusError("cannot tell the format from the file's name", str(path), remedy)


def _open(path: Path) -> BinaryIO:
    try:
        if path.suffix in (".gz", ".zst") and not path.stat().st_size:
            raise CorpusError("a compressed file is damaged", f"{path}: it has no bytes at all", COPY_AGAIN)
        if path.suffix == ".gz":
            return gzip.open(path, "rb")
        if path.suffix == ".zst":
            return _open_zstd(path)
        return open(path, "rb")
    except FileNotFoundError:
        raise CorpusError("no such text file", str(path)) from None
    except (IsADirectoryError, PermissionError) as error:
        raise CorpusError("cannot read a text file", f"{path}: {error.strerror}") from None


def _open_zstd(path: Path) -> BinaryIO:
    try:
        import zstandard
    except ImportError:
        raise CorpusError(f"{path} needs the package zstandard", "pip install '.[data]'") from None
    decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
    return io.BufferedReader(_Zstd(open(path, "rb"), decompressor.decompressobj, zstandard.ZstdError), READ_BYTES)


class _Zstd(io.RawIOBase):
    """What a .zst file holds, frame after frame; an OSError where it is damaged, an EOFError where it is cut.

    The library's own `stream_reader` takes a file cut inside a frame for one that ends there.
    """

    def __init__(self, file: BinaryIO, begin: Callable, fault: type[Exception]):
        self._file, self._begin, self._fault = file, begin, fault
        self._frame = None  # the one being read
        self._stored, self._text = b"", memoryview(b"")  # read but not decompressed, decompressed but not asked for

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while not self._text:
            self._stored = self._stored or self._file.read(READ_BYTES)
            if not self._stored:
                if self._frame is not None:
                    raise EOFError("the file ends inside a frame")
                return 0
            self._frame = self._frame or self._begin()
            try:
                self._text = memoryview(self._frame.decompress(self._stored))
            except self._fault as error:
                raise OSError(str(error)) from None
            self._stored = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        size = min(len(buffer), len(self._text))
        buffer[:size], self._text = self._text[:size], self._text[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()


def _decoded(stream: BinaryIO, path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, line without its end). Only \\n and \\r\\n end lines; a leading byte-order mark goes."""
    try:
        for number, raw in enumerate(stream, 1):
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise CorpusError(
                    "the text is not valid UTF-8",
                    f"{path}, line {number}, byte {error.start + 1} of the line: {raw[error.start]:#04x}",
                    "convert the file (iconv -f … -t utf-8) or remove the line; nothing is repaired silently",
                ) from None
            if number == 1:
                line = line.removeprefix("\ufeff")
            yield number, line.removesuffix("\n").removesuffix("\r")
    except (EOFError, OSError, zlib.error) as error:
        raise CorpusError("a compressed file is damaged", f"{path}: {error}", COPY_AGAIN) from None


def _blocks(lines: Iterator[tuple[int, str]]) -> Iterator[str]:
    block: list[str] = []
    for _, line in lines:
        if line.strip():
            block.append(line)
        elif block:
            yield "\n".join(block)
            block = []
    if block:
        yield "\n".join(block)


def _records(lines: Iterator[tuple[int, str]], field: str, path: Path) -> Iterator[str]:
    for number, line in lines:
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # ValueError: also a number of more than 4,300 digits
            raise CorpusError("a line is not JSON", where, str(error)) from None
        text = record.get(field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            keys = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            remedy = "set field: in the recipe"
            raise CorpusError(f"a record has no text under {field!r}", where, f"found: {keys or 'nothing'}", remedy)
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            found = f"{where}: a lone surrogate at character {error.start + 1}"
            raise CorpusError("the text is not valid Unicode", found, "repair or remove the line") from None
        if text.strip():
            yield text
