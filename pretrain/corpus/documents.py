"""Documents, each on its side, and groups of files that one process reads together."""

from collections.abc import Iterator
from dataclasses import dataclass

from pretrain.corpus.shares import Shares

CHUNK_BYTES = 4 << 20


@dataclass(frozen=True)
class Document:
    """One document of a corpus."""

    text: str
    source: str  # the name of its source
    language: str
    side: str  # one of SIDES
    where: str  # its file, relative to the recipe, and line
    input_characters: int | None = None  # of a labelled pair: the length of its input; \n and the output follow


@dataclass(frozen=True)
class Group:
    """Files of one source that one process opens and reads. Only their names are sent to the process."""

    source: int  # the number of the source in the recipe
    files: tuple[str, ...]  # relative to the recipe; empty for a streamed dataset
    stored: int  # bytes of the files, before decompression


def of_sides(documents: Iterator[Document], sides: tuple[str, ...], shares: Shares | None) -> Iterator[Document]:
    """The documents of these sides. `shares` counts the documents of all sides."""
    for document in documents:
        if shares is not None:
            shares.add(document.source, document.side, 1, len(document.text.encode()))
        if document.side in sides:
            yield document
