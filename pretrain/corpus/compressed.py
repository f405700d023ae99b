"""What a file holds, decompressed: .gz, .zst, .xz and .bz2 by the end of its name, and anything else as it is.

A file that was cut or altered raises; the standard library's readers of .bz2 and .xz take what follows the first
stream for nothing at all when it is damaged, and `zstandard`'s takes a cut frame for a whole one.
"""

import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from pretrain.errors import CorpusError

SUFFIXES = (".gz", ".zst", ".xz", ".bz2")
READ_BYTES = 1 << 20  # of text at a time
STORED_BYTES = 1 << 10  # of a compressed file at a time: zstd turns a byte of spaces into 32,750
COPY_AGAIN = "copy or compress it again; what could be read of it is not used"


def open_file(path: Path) -> BinaryIO:
    """A stream of what a file holds. Raises CorpusError if it cannot be opened."""
    try:
        if path.suffix in SUFFIXES and not path.stat().st_size:
            raise CorpusError("a compressed file is damaged", f"{path}: it has no bytes at all", COPY_AGAIN)
        match path.suffix:
            case ".gz":
                return gzip.open(path, "rb")
            case ".zst":
                return _open_zstd(path)
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


def read(stream: BinaryIO, path: Path, size: int) -> Iterator[bytes]:
    """Pieces of `size` bytes, the last one shorter. Raises CorpusError where a compressed file is damaged."""
    try:
        while data := stream.read(size):
            yield data
    except (EOFError, OSError, zlib.error) as error:
        raise CorpusError("a compressed file is damaged", f"{path}: {error}", COPY_AGAIN) from None


def _open_zstd(path: Path) -> BinaryIO:
    try:
        import zstandard
    except ImportError:
        raise CorpusError(f"{path} needs the package zstandard", "pip install '.[data]'") from None
    decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
    return _stream(path, decompressor.decompressobj, zstandard.ZstdError, ())


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
