"""Open a file decompressed, as the end of its name says (.gz, .zst, .xz, .bz2), and any other file as it is.

What a file holds is also seen from its first bytes. A file whose name says something else is refused with the name
that it should have: a gzip file that is read as text is no text in a strange encoding.

A file that was cut or altered raises; the standard library's readers of .bz2 and .xz take what follows the first
stream for nothing at all when it is damaged, and `zstandard`'s takes a cut frame for a whole one.
"""

import gzip
import hashlib
import io
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from pretrain.errors import CorpusError

SUFFIXES = {".gz": ".gz", ".gzip": ".gz", ".zst": ".zst", ".zstd": ".zst", ".xz": ".xz", ".bz2": ".bz2", ".bz": ".bz2"}
PACKED = {  # the first bytes of a compressed file → what compressed it, the end of its name
    b"\x1f\x8b": ("gzip", ".gz"),
    b"\x28\xb5\x2f\xfd": ("zstd", ".zst"),
    b"\xfd7zXZ\x00": ("xz", ".xz"),
    b"BZh": ("bzip2", ".bz2"),
    b"\x04\x22\x4d\x18": ("lz4", None),
}
BZIP2 = re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)")  # `BZh` alone begins a word, too
OTHERS = {  # the first bytes of a file that is no text → what it is, what to do about it
    b"PK\x03\x04": ("a zip archive", "unpack it (unzip) and name the files that were in it"),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", "unpack it and name the files that were in it"),
    b"PAR1\x15": ("a parquet file", "set format: parquet in the recipe, or rename it to NAME.parquet"),
    b"ARROW1\0\0": ("an Arrow file", "set format: arrow in the recipe, or rename it to NAME.arrow"),
    b"%PDF-": ("a PDF file", "extract its text"),
    b"\xff\xfe\0\0": ("UTF-32 text", "convert the file: iconv -f UTF-32 -t UTF-8"),
    b"\0\0\xfe\xff": ("UTF-32 text", "convert the file: iconv -f UTF-32 -t UTF-8"),
    b"\xff\xfe": ("UTF-16 text", "convert the file: iconv -f UTF-16 -t UTF-8"),
    b"\xfe\xff": ("UTF-16 text", "convert the file: iconv -f UTF-16 -t UTF-8"),
}
LOOKED_AT = 4096  # bytes of a file's beginning, for what has no mark of its own
ZEROS = 0.3  # of every second byte: what UTF-16 has in ASCII text and UTF-8 never has
READ_BYTES = 1 << 20  # of text at a time
STORED_BYTES = 1 << 10  # of a compressed file at a time: zstd turns a byte of spaces into 32,750
COPY_AGAIN = "copy or compress it again; what could be read of it is not used"


class HashedFile(io.FileIO):
    """A file that is read from its beginning to its end, and hashed on the way."""

    def __init__(self, path: Path):
        super().__init__(path, "rb")
        self.hash = hashlib.sha256()

    def readinto(self, buffer: memoryview) -> int:
        size = super().readinto(buffer)
        self.hash.update(memoryview(buffer)[:size])
        return size


def open_file(path: Path, raw: io.FileIO | None = None) -> BinaryIO:
    """A stream of what a file holds, read from `raw` if that is given for a .zst file.

    Raises CorpusError if it cannot be opened or is compressed in another way.
    """
    try:
        packed = SUFFIXES.get(path.suffix.lower())
        if packed:
            _check_packed(path, packed)
        match packed:
            case ".gz":
                return gzip.open(path, "rb")
            case ".zst":
                return _open_zstd(path, raw)
            case ".bz2":
                from bz2 import BZ2Decompressor

                return _stream(path, BZ2Decompressor, OSError, (READ_BYTES,))
            case ".xz":
                from lzma import LZMADecompressor, LZMAError

                return _stream(path, LZMADecompressor, LZMAError, (READ_BYTES,), padding=b"\0")
        return open(path, "rb")
    except FileNotFoundError:
        raise CorpusError("no such text file", str(path)) from None
    except (IsADirectoryError, PermissionError) as error:
        raise CorpusError("cannot read a text file", f"{path}: {error.strerror}") from None


def position(stream: BinaryIO) -> int:
    """How many bytes of the file, as stored, were read for what `open_file` gave of it."""
    if isinstance(stream, gzip.GzipFile):
        return stream.fileobj.tell()
    raw = getattr(stream, "raw", None)
    return raw.stored() if isinstance(raw, _Frames) else stream.tell()


def read(stream: BinaryIO, path: Path, size: int) -> Iterator[bytes]:
    """Pieces of `size` bytes, the last one shorter. Raises CorpusError where a compressed file is damaged."""
    try:
        while data := stream.read(size):
            yield data
    except (EOFError, OSError, zlib.error) as error:
        raise CorpusError("a compressed file is damaged", f"{path}: {error}", COPY_AGAIN) from None


def check_text(head: bytes, path: Path) -> None:
    """Raise CorpusError when `head`, the beginning of what `path` holds, shows that it is no UTF-8 text at all."""
    found = _compression(head)
    if found and path.suffix.lower() in SUFFIXES:
        again = f"{path}: what is in it is compressed again ({found[0]})"
        raise CorpusError("a file is compressed twice", again, "decompress it once; its name says how it is then")
    if found:
        name, suffix = found
        known = " ".join(dict.fromkeys(SUFFIXES.values()))
        remedy = f"rename it to {path.name}{suffix}" if suffix else f"compress it in one of these ways: {known}"
        raise CorpusError("a file is compressed, which its name does not say", f"{path}: it is {name}", remedy)
    other = next((other for mark, other in OTHERS.items() if head.startswith(mark)), None)
    if head[257:262] == b"ustar":
        other = ("a tar archive", "unpack it (tar -xf) and name the files that were in it")
    elif other is None and (order := _zeros(head[:LOOKED_AT])):
        other = (f"UTF-16 text without a byte order mark ({order})", f"convert the file: iconv -f {order} -t UTF-8")
    if other:
        raise CorpusError("a file is not UTF-8 text", f"{path}: it is {other[0]}", other[1])


def other_than(mark: bytes, path: Path) -> str | None:
    """Name the kind of a file that should begin with `mark`, by its first bytes: compressed, another form, plain text.

    None where they say nothing, or begin as they should.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(LOOKED_AT)
    except OSError:
        return None
    if head.startswith(mark[: len(head)]):
        return None
    if found := _compression(head):
        return f"compressed ({found[0]})"
    other = next((other for mark, (other, _) in OTHERS.items() if head.startswith(mark)), None)
    return other or ("plain text" if _is_plain(head) else None)


def _check_packed(path: Path, suffix: str) -> None:
    """Raise CorpusError when a file is empty, compressed in another way than `suffix` says, or not compressed."""
    with open(path, "rb") as file:
        head = file.read(LOOKED_AT)
    if not head:
        raise CorpusError("a compressed file is damaged", f"{path}: it has no bytes at all", COPY_AGAIN)
    found = _compression(head)
    if found and found[1] != suffix:
        found = f"{path}: it is {found[0]}" + (f": rename it to {path.stem}{found[1]}" if found[1] else "")
        raise CorpusError("a file is compressed in another way than its name says", found)
    begun = any(suffix == end and mark.startswith(head[: len(mark)]) for mark, (_, end) in PACKED.items())  # then cut
    if not found and not begun and _is_plain(head):
        remedy = f"rename it to {path.stem}, or compress it"
        raise CorpusError("a file is not compressed, although its name says so", f"{path}: it is plain text", remedy)


def _compression(head: bytes) -> tuple[str, str | None] | None:
    """The compressor of a file and the suffix of such files, or None if the file is not compressed."""
    for mark, found in PACKED.items():
        if head.startswith(mark) and (found[0] != "bzip2" or BZIP2.match(head)):
            return found
    return None


def _is_plain(head: bytes) -> bool:
    """Whether some bytes that begin a file are UTF-8 without control characters; its last character may be cut."""
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.end < len(head) - 3:
            return False
        text = head[: error.start].decode("utf-8")
    return bool(text) and all(c.isprintable() or c in "\t\n\r" for c in text)


def _zeros(head: bytes) -> str | None:
    """The byte order of UTF-16 text without a mark, where it is seen from the zeros of ASCII characters."""
    if b"\0" not in head:
        return None
    even, odd = (side.count(0) / max(1, len(side)) for side in (head[::2], head[1::2]))
    if max(even, odd) < ZEROS or min(even, odd) > ZEROS / 3:
        return None
    return "UTF-16LE" if odd > even else "UTF-16BE"


def _open_zstd(path: Path, raw: io.FileIO | None) -> BinaryIO:
    try:
        import zstandard
    except ImportError:
        raise CorpusError(f"{path} needs the package zstandard", "pip install '.[data]'") from None
    decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
    file = io.BufferedReader(raw) if raw else open(path, "rb")
    return io.BufferedReader(_Frames(file, decompressor.decompressobj, zstandard.ZstdError, (), b""), READ_BYTES)


def _stream(path: Path, begin: Callable, fault: type[Exception], limit: tuple, padding: bytes = b"") -> BinaryIO:
    return io.BufferedReader(_Frames(open(path, "rb"), begin, fault, limit, padding), READ_BYTES)


class _Frames(io.RawIOBase):
    """What a compressed file holds, frame after frame; an OSError where it is damaged, an EOFError where it is cut.

    `begin` makes the decompressor of a frame, `fault` is what it raises, `limit` its arguments that bound what it
    gives at a time, `padding` what may stand between frames.
    """

    def __init__(self, file: BinaryIO, begin: Callable, fault: type[Exception], limit: tuple, padding: bytes):
        self._file, self._begin, self._fault, self._limit, self._padding = file, begin, fault, limit, padding
        self._frame = None  # the one being read
        self._stored, self._text = b"", memoryview(b"")  # read but not decompressed, decompressed but not asked for

    def stored(self) -> int:
        return self._file.tell()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while not self._text and self._fill():
            pass
        size = min(len(buffer), len(self._text))
        buffer[:size], self._text = self._text[:size], self._text[size:]
        return size

    def _fill(self) -> bool:
        """Decompress some more; False at the end of the file."""
        if self._frame is None or getattr(self._frame, "needs_input", True):  # zstandard's always does
            self._stored = self._stored or self._file.read(STORED_BYTES)
            if not self._stored:
                if self._frame is not None:
                    raise EOFError("the file ends inside a frame")
                return False
        if self._frame is None:
            self._stored = self._stored.lstrip(self._padding)
            if not self._stored:
                return True
            self._frame = self._begin()
        self._text = memoryview(b"")  # lets go of what was decompressed before
        try:
            self._text = memoryview(self._frame.decompress(self._stored, *self._limit))
        except self._fault as error:
            raise OSError(str(error)) from None
        self._stored = self._frame.unused_data
        if self._frame.eof:
            self._frame = None
        return True

    def close(self) -> None:
        self._file.close()
        super().close()
