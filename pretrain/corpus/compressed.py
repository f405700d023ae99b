"""Open files. The suffixes .gz, .zst, .xz and .bz2 mean that a file is decompressed.

The first bytes of a file must agree with its suffix. If they do not, the error gives the name that the file should
have: otherwise a gzip file without a suffix would be read as text in a strange encoding.

A file that was cut or altered raises an error. The standard library's readers would ignore damaged data after the first
stream of a .bz2 or .xz file, and the reader of `zstandard` would accept a frame that was cut.
"""

import gzip
import hashlib
import io
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from pretrain.errors import CorpusError

if TYPE_CHECKING:
    from typing_extensions import Buffer

SUFFIXES = {".gz": ".gz", ".gzip": ".gz", ".zst": ".zst", ".zstd": ".zst", ".xz": ".xz", ".bz2": ".bz2", ".bz": ".bz2"}
PACKED: dict[bytes, tuple[str, str | None]] = {  # the first bytes of a compressed file → the compressor, its suffix
    b"\x1f\x8b": ("gzip", ".gz"),
    b"\x28\xb5\x2f\xfd": ("zstd", ".zst"),
    b"\xfd7zXZ\x00": ("xz", ".xz"),
    b"BZh": ("bzip2", ".bz2"),
    b"\x04\x22\x4d\x18": ("lz4", None),
}
BZIP2 = re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)")  # `BZh` alone may begin a text
OTHERS = {  # the first bytes of a file that is no UTF-8 text → what the file is, and the remedy
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
LOOKED_AT = 4096  # bytes at the beginning of a file that are examined
ZEROS = 0.3  # share of zeros in every second byte: UTF-16 has more in ASCII text, UTF-8 never has
READ_BYTES = 1 << 20  # text read at a time
STORED_BYTES = 1 << 10  # compressed data read at a time: zstd turns one byte into 32,750 spaces
COPY_AGAIN = "copy or compress it again; the part that could be read is not used"


class HashedFile(io.FileIO):
    """A file that is hashed while it is read from its beginning to its end."""

    def __init__(self, path: Path):
        super().__init__(path, "rb")
        self.hash = hashlib.sha256()

    def readinto(self, buffer: "Buffer") -> int:
        size = super().readinto(buffer)
        self.hash.update(memoryview(buffer)[:size])
        return size


def open_file(path: Path, raw: io.FileIO | None = None) -> io.BufferedIOBase:
    """Open a file as a stream of its decompressed content. If `raw` is given, a .zst file is read from it.

    Raises CorpusError if the file cannot be opened, or is not compressed as its name says.
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


def position(stream: io.BufferedIOBase) -> int:
    """The bytes of the file, before decompression, that a stream of `open_file` has read so far."""
    if isinstance(stream, gzip.GzipFile):
        raw: Any = stream.fileobj  # a file; its declared type has no tell()
        return raw.tell()
    frames = getattr(stream, "raw", None)
    return frames.stored() if isinstance(frames, _Frames) else stream.tell()


def read(stream: io.BufferedIOBase, path: Path, size: int) -> Iterator[bytes]:
    """Yield pieces of `size` bytes; the last one may be shorter. Raises CorpusError for a damaged compressed file."""
    try:
        while data := stream.read(size):
            yield data
    except (EOFError, OSError, zlib.error) as error:
        raise CorpusError("a compressed file is damaged", f"{path}: {error}", COPY_AGAIN) from None


def check_text(head: bytes, path: Path) -> None:
    """Raise CorpusError if `head`, the beginning of the content of `path`, shows that it is not UTF-8 text."""
    found = _compression(head)
    if found and path.suffix.lower() in SUFFIXES:
        again = f"{path}: its content is compressed again ({found[0]})"
        raise CorpusError("a file is compressed twice", again, "decompress it once")
    if found:
        name, suffix = found
        known = " ".join(dict.fromkeys(SUFFIXES.values()))
        remedy = f"rename it to {path.name}{suffix}" if suffix else f"compress it in one of these ways: {known}"
        raise CorpusError("a file is compressed, but its name does not say so", f"{path}: it is {name}", remedy)
    other = next((other for mark, other in OTHERS.items() if head.startswith(mark)), None)
    if head[257:262] == b"ustar":
        other = ("a tar archive", "unpack it (tar -xf) and name the files that were in it")
    elif other is None and (order := _zeros(head[:LOOKED_AT])):
        other = (f"UTF-16 text without a byte order mark ({order})", f"convert the file: iconv -f {order} -t UTF-8")
    if other:
        raise CorpusError("a file is not UTF-8 text", f"{path}: it is {other[0]}", other[1])


def other_than(mark: bytes, path: Path) -> str | None:
    """The kind of a file that should begin with `mark`, by its first bytes: compressed, another format, plain text.

    None if the first bytes do not tell, or are `mark`.
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
    """Raise CorpusError if a file is empty, compressed in another way than `suffix` says, or not compressed."""
    with open(path, "rb") as file:
        head = file.read(LOOKED_AT)
    if not head:
        raise CorpusError("a compressed file is damaged", f"{path}: it has no bytes at all", COPY_AGAIN)
    found = _compression(head)
    if found and found[1] != suffix:
        kind = f"{path}: it is {found[0]}" + (f": rename it to {path.stem}{found[1]}" if found[1] else "")
        raise CorpusError("a file is compressed in another way than its name says", kind)
    # A file that was cut within its first bytes: its reader will say so.
    begun = any(suffix == end and mark.startswith(head[: len(mark)]) for mark, (_, end) in PACKED.items())
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
    """Whether the first bytes of a file are UTF-8 without control characters. The last character may be cut."""
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.end < len(head) - 3:
            return False
        text = head[: error.start].decode("utf-8")
    return bool(text) and all(c.isprintable() or c in "\t\n\r" for c in text)


def _zeros(head: bytes) -> str | None:
    """The byte order of UTF-16 text without a mark, by the zeros of ASCII characters; None for other text."""
    if b"\0" not in head:
        return None
    even, odd = (side.count(0) / max(1, len(side)) for side in (head[::2], head[1::2]))
    if max(even, odd) < ZEROS or min(even, odd) > ZEROS / 3:
        return None
    return "UTF-16LE" if odd > even else "UTF-16BE"


def _open_zstd(path: Path, raw: io.FileIO | None) -> io.BufferedReader:
    try:
        import zstandard
    except ImportError:
        raise CorpusError(f"{path} needs the package zstandard", "pip install '.[data]'") from None
    decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
    file = io.BufferedReader(raw) if raw else open(path, "rb")
    return io.BufferedReader(_Frames(file, decompressor.decompressobj, zstandard.ZstdError, (), b""), READ_BYTES)


def _stream(
    path: Path, begin: Callable, fault: type[Exception], limit: tuple, padding: bytes = b""
) -> io.BufferedReader:
    return io.BufferedReader(_Frames(open(path, "rb"), begin, fault, limit, padding), READ_BYTES)


class _Frames(io.RawIOBase):
    """The content of a compressed file, frame after frame. Raises OSError if it is damaged, EOFError if it was cut.

    `begin` makes a frame's decompressor, which raises `fault`. Its arguments `limit` bound the size of its output.
    `padding` are bytes that may stand between frames.
    """

    def __init__(self, file: BinaryIO, begin: Callable, fault: type[Exception], limit: tuple, padding: bytes):
        self._file, self._begin, self._fault, self._limit, self._padding = file, begin, fault, limit, padding
        self._frame: Any = None  # the decompressor in use; those of the three libraries share no type
        self._stored, self._text = b"", memoryview(b"")  # not yet decompressed; decompressed and not yet returned

    def stored(self) -> int:
        """Bytes read from the file."""
        return self._file.tell()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "Buffer") -> int:
        while not self._text and self._fill():
            pass
        wanted = memoryview(buffer)
        size = min(len(wanted), len(self._text))
        wanted[:size], self._text = self._text[:size], self._text[size:]
        return size

    def _fill(self) -> bool:
        """Decompress some more. Returns False at the end of the file."""
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
        self._text = memoryview(b"")  # frees the memory of the output before
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
