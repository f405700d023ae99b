"""What a corpus gives: its documents, each on its side, and groups of files that are read together."""

from collections.abc import Iterator
from dataclasses import dataclass

from pretrain.corpus.shares import Shares

CHUNK_BYTES = 4 << 20


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

    @property
    def stored(self) -> int:
        return self.bytes


def of_sides(documents: Iterator[Document], sides: tuple[str, ...], shares: Shares | None) -> Iterator[Document]:
    """The documents of these sides; `shares` counts those of all."""
    for document in documents:
        if shares is not None:
            shares.add(document.source, document.side, 1, len(document.text.encode()))
        if document.side in sides:
            yield document
