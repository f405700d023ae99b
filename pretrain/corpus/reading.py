"""Files into chunks, chunks into records.

A chunk is a stretch of one file, cut where a document ends: cheap to make (nothing is decoded or parsed), cheap to send
to another process, and the same however many processes there are. Its records are read wherever it is sent.
"""

import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pretrain.errors import CorpusError

READ_BYTES = 1 << 20  # of a file at a time
COPY_AGAIN = "copy or compress it again; what could be read of it is not used"
BLANK_LINE = re.compile(rb"\n[ \t\r]*\n")  # some of the lines that separate documents: a chunk may end after any


@dataclass(frozen=True)
class Chunk:
    """Whole documents of one file, as stored (decompressed)."""

    source: int  # which of the recipe's
    path: str  # for messages
    format: str
    first: int  # number of its first line, from 1
    data: bytes


@dataclass(frozen=True)
class Record:
    text: str
    where: str  # "…/en.jsonl, line 12"


def chunks_of(path: Path, form: str, source: int, size: int) -> Iterator[Chunk]:
    """A file in stretches of about `size` bytes, each a whole number of documents. Raises CorpusError if damaged."""
    first, held = 1, b""
    with open_file(path) as stream:
        for data in _read(stream, path, size):
            held += data
            end = _last_end(held, form)
            if len(held) >= size and end:
                yield Chunk(source, str(path), form, first, held[:end])
                first, held = first + held.count(b"\n", 0, end), held[end:]
    if held:
        yield Chunk(source, str(path), form, first, held)


def records_of(chunk: Chunk, field: str) -> Iterator[Record]:
    """The documents of a chunk, in order; empty ones do not exist. Raises CorpusError, naming file and line."""
    path = Path(chunk.path)
    lines = _decoded(chunk, path)
    for number, text in _blocks(lines) if chunk.format == "txt" else _json_lines(lines, field, path):
        yield Record(text, f"{path}, line {number}")


def format_of(path: Path) -> str:
    """ "txt" or "jsonl", from the file's name."""
    suffix = next((s for s in reversed(path.suffixes) if s not in (".gz", ".zst")), "")
    match suffix:
        case ".txt":
            return "txt"
        case ".jsonl" | ".json":
            return "jsonl"
    remedy = "set format: txt or jsonl in the recipe"
    raise CorpusError("cannot tell the format from the file's name", str(path), remedy)


def open_file(path: Path) -> BinaryIO:
    """What a file holds, decompressed. Raises CorpusError if it cannot be opened."""
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


def _read(stream: BinaryIO, path: Path, size: int) -> Iterator[bytes]:
    try:
        while data := stream.read(size):
            yield data
    except (EOFError, OSError, zlib.error) as error:
        raise CorpusError("a compressed file is damaged", f"{path}: {error}", COPY_AGAIN) from None


def _last_end(data: bytes, form: str) -> int:
    """How many leading bytes of `data` are surely whole documents."""
    if form != "txt":
        return data.rfind(b"\n") + 1
    begin = len(data)
    while begin > 0:  # backwards, a stretch at a time: the last blank line is near the end of nearly every text
        begin = max(0, begin - READ_BYTES)
        ends = [match.end() for match in BLANK_LINE.finditer(data, begin)]
        if ends:
            return ends[-1]
    return 0


def _decoded(chunk: Chunk, path: Path) -> Iterator[tuple[int, str]]:
    """(line number, line without its end). Only \\n and \\r\\n end lines; a file's leading byte-order mark goes."""
    for number, raw in enumerate(io.BytesIO(chunk.data), chunk.first):
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


def _blocks(lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """(number of its first line, document) of text between blank lines."""
    block: list[str] = []
    begin = 0
    for number, line in lines:
        if line.strip():
            begin = begin if block else number
            block.append(line)
        elif block:
            yield begin, "\n".join(block)
            block = []
    if block:
        yield begin, "\n".join(block)


def _json_lines(lines: Iterator[tuple[int, str]], field: str, path: Path) -> Iterator[tuple[int, str]]:
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
            yield number, text
