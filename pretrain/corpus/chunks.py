"""Chunks: what one process works on, whole records of one source, as stored but decompressed."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

PART_BYTES = 256  # what a part takes beside its data: a million empty files are not one chunk


@dataclass(frozen=True)
class FilePart:
    """A stretch of one file: whole records, as stored (decompressed; lines of text end with \\n)."""

    file: str  # as the recipe has it
    cut: str
    first: int  # number of its first line or row, from 1
    data: bytes
    too_long: int = 0  # bytes of the one record it stands for, which was not kept
    stored: int = 0  # bytes of the file that were read for it, compressed ones if it is compressed: for progress only


@dataclass(frozen=True)
class Chunk:
    """Whole records of one source."""

    source: int  # its number in the recipe
    parts: tuple[FilePart, ...]

    @property
    def bytes(self) -> int:
        return sum(len(part.data) + part.too_long for part in self.parts)

    @property
    def stored(self) -> int:
        return sum(part.stored for part in self.parts)

    @property
    def key(self) -> str:
        """Its identity: of its bytes and their place."""
        found = blake2b(str(self.source).encode(), digest_size=16)
        for part in self.parts:
            found.update(repr((part.file, part.cut, part.first, len(part.data), part.too_long)).encode())
            found.update(part.data)
        return found.hexdigest()


def chunks_of(parts: Iterable[FilePart], source: int, size: int) -> Iterator[Chunk]:
    """Parts together until they have about `size` bytes: small files share a chunk.

    A stretch of a long file ends with a record, and is mostly a little less.
    """
    return (Chunk(source, held) for held, _ in together(((part, len(part.data)) for part in parts), size * 3 // 4))


def together(items: Iterable[tuple[Any, int]], size: int) -> Iterator[tuple[tuple, int]]:
    """Things with their bytes, in order, as many together as reach `size` bytes; and what these have together."""
    held, held_bytes = [], 0
    for item, item_bytes in items:
        held.append(item)
        held_bytes += item_bytes
        if held_bytes + PART_BYTES * len(held) >= size:
            yield tuple(held), held_bytes
            held, held_bytes = [], 0
    if held:
        yield tuple(held), held_bytes
