"""Sealed files: results of a killed stage, with a hash behind them that shows damage before they are taken over."""

import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from pretrain.storage.files import finished

SEAL_BYTES = hashlib.sha256().digest_size  # at the end of a sealed file


class Sealed:
    """A file that is written with the SHA-256 of its name and its bytes behind them: `with sealed(path) as file`."""

    def __init__(self, file: BinaryIO, path: Path):
        self._file, self._found = file, _of_name(path)

    def write(self, data: bytes | memoryview) -> int:
        self._found.update(data)
        return self._file.write(data)

    def close(self) -> None:
        self._file.write(self._found.digest())


@contextmanager
def sealed(path: Path) -> Iterator[Sealed]:
    """`finished`, for a file that a later run takes over if this one is killed: `usable` says whether it still may."""
    with finished(path) as file:
        seal = Sealed(file, path)
        yield seal
        seal.close()


def usable(path: Path) -> bool:
    """Whether the `sealed` file of a killed run is there with all its bytes as they were written: each is hashed.

    A damaged one is removed, so that it is made again, and named.
    """
    if not path.exists():
        return False
    found, left = _of_name(path), path.stat().st_size - SEAL_BYTES
    with open(path, "rb") as file:
        while left > 0 and (data := file.read(min(left, 1 << 20))):
            found.update(data)
            left -= len(data)
        if left == 0 and file.read() == found.digest():
            return True
    discard(path)
    return False


def _of_name(path: Path) -> "hashlib._Hash":
    """The beginning of a seal. Names say of what a file was made: the contents of another are not taken for it."""
    return hashlib.sha256(f"{path.parent.name}/{path.name}\0".encode())


def discard(path: Path) -> None:
    """Remove what a killed run left of a file that is no longer what was written, and say so."""
    print(f"{path} is not what was written: it was damaged since, and is made again", file=sys.stderr, flush=True)
    path.unlink(missing_ok=True)


def unsealed(path: Path) -> bytes:
    """The contents of a `usable` file, without its hash."""
    return path.read_bytes()[:-SEAL_BYTES]
