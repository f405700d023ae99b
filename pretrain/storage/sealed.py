"""Sealed files: finished work of a stage that ends with a hash, so that damage is found before the work is reused."""

import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from pretrain.storage.files import finished

SEAL_BYTES = hashlib.sha256().digest_size  # the bytes of the hash at the end of a sealed file


class Sealed:
    """A file that ends with the SHA-256 of its name and its contents. Use it as `with sealed(path) as file`."""

    def __init__(self, file: BinaryIO, path: Path):
        self._file, self._found = file, _of_name(path)

    def write(self, data: bytes | memoryview) -> int:
        self._found.update(data)
        return self._file.write(data)

    def close(self) -> None:
        self._file.write(self._found.digest())


@contextmanager
def sealed(path: Path) -> Iterator[Sealed]:
    """Like `finished`, for a file that a later run may reuse if this one is killed. `usable` checks such a file."""
    with finished(path) as file:
        seal = Sealed(file, path)
        yield seal
        seal.close()


def usable(path: Path) -> bool:
    """Whether the `sealed` file exists and has exactly the bytes that were written. Every byte is hashed.

    A damaged file is deleted, so that it is made again, and a message names it.
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
    """The beginning of a seal. It includes the name, which stands for the settings: a renamed file is refused."""
    return hashlib.sha256(f"{path.parent.name}/{path.name}\0".encode())


def discard(path: Path) -> None:
    """Delete a damaged file of a killed run, and print a message that names it."""
    print(f"{path} is not what was written: it was damaged since, and is made again", file=sys.stderr, flush=True)
    path.unlink(missing_ok=True)


def unsealed(path: Path) -> bytes:
    """The contents of a `usable` file, without the seal."""
    return path.read_bytes()[:-SEAL_BYTES]
