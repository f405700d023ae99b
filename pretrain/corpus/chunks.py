"""Chunks: whole records of one source, decompressed but not parsed. A process works on one chunk at a time."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

PART_BYTES = 256  # the size of a part besides its data; it keeps a million empty files from being one chunk


@dataclass(frozen=True)
class FilePart:
    """A stretch of one file: whole records, decompressed. Lines of text end with \\n."""

    file: str  # as the recipe names it
    cut: str  # how the file is cut into records; see records.py
    first: int  # number of its first line or row, from 1
    data: bytes
    too_long: int = 0  # if the part stands for a record that was too long to keep: the bytes of this record
    stored: int = 0  # bytes read from the file, before decompression: for progress only


@dataclass(frozen=True)
class Chunk:
    """Whole records of one source."""

    source: int  # its number in the recipe
    parts: tuple[FilePart, ...]

    @property
    def bytes(self) -> int:
        """Bytes of its records, decompressed."""
        return sum(len(part.data) + part.too_long for part in self.parts)

    @property
    def stored(self) -> int:
        """Bytes of the files that were read for it, before decompression."""
        return sum(part.stored for part in self.parts)

    @property
    def key(self) -> str:
        """A hash of its bytes and their place."""
        found = blake2b(str(self.source).encode(), digest_size=16)
        for part in self.parts:
            found.update(repr((part.file, part.cut, part.first, len(part.data), part.too_long)).encode())
            found.update(part.data)
        return found.hexdigest()


def chunks_of(parts: Iterable[FilePart], source: int, size: int) -> Iterator[Chunk]:
    """Join parts into chunks of about `size` bytes: small files share a chunk.

    A chunk is full at 3/4 of `size`, because the parts of a long file are mostly a little shorter than `size`.
    """
    return (Chunk(source, held) for held, _ in together(((part, len(part.data)) for part in parts), size * 3 // 4))


def together(items: Iterable[tuple[Any, int]], size: int) -> Iterator[tuple[tuple, int]]:
    """Group items, given with their bytes, in order until a group has `size` bytes. Yields (group, its bytes)."""
    held: list[Any] = []
    held_bytes = 0
    for item, item_bytes in items:
        held.append(item)
        held_bytes += item_bytes
        if held_bytes + PART_BYTES * len(held) >= size:
            yield tuple(held), held_bytes
            held, held_bytes = [], 0
    if held:
        yield tuple(held), held_bytes
