"""The corpus that the stage `clean` published."""

import json
import sys
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

from pretrain.config import build
from pretrain.corpus.bad_records import Skipped
from pretrain.corpus.chunks import Chunk, FilePart, chunks_of, together
from pretrain.corpus.compressed import COPY_AGAIN, HashedFile
from pretrain.corpus.documents import CHUNK_BYTES, Document, Group, of_sides
from pretrain.corpus.files import reached
from pretrain.corpus.recipe import SPLIT, Recipe
from pretrain.corpus.records import parts_of
from pretrain.corpus.shares import SIDES, Shares
from pretrain.errors import CorpusError
from pretrain.storage.index import INDEX, check_contents

CLEAN_BY = "python launch/clean.py CONFIG.yaml"


class CleanedCorpus:
    """A corpus that the stage `clean` published. It is read like a `Corpus`; every document has its side with it."""

    def __init__(self, folder: Path, index: dict):
        self.folder, self.index = folder, index
        named = [{**source, "files": ["part-*"]} for source in index["sources"]]
        values = {"name": index["name"], "heldout_fraction": index["heldout_fraction"], "sources": named}
        self.recipe = build(Recipe, values, f"{folder / INDEX}")

    def groups(self, size: int = CHUNK_BYTES) -> Iterator[Group]:
        files = sorted(
            (name, entry["bytes"]) for name, entry in self.index["files"].items() if name.startswith("part-")
        )
        return (Group(0, names, stored) for names, stored in together(files, size))

    def chunks(self, size: int = CHUNK_BYTES, group: Group | None = None) -> Iterator[Chunk]:
        for one in self.groups(size) if group is None else (group,):
            yield from chunks_of(chain.from_iterable(self._parts(name, size) for name in one.files), 0, size)

    def _parts(self, name: str, size: int) -> Iterator[FilePart]:
        """Cut a file into parts and hash it on the way. Raises CorpusError if its hash is not the one in the index."""
        path = self.folder / name
        with reached(self.recipe.name):
            raw = HashedFile(path)
        with raw:
            yield from parts_of(path, name, "lines", size, sys.maxsize, raw)
            if raw.hash.hexdigest() != self.index["files"][name]["sha256"]:
                found = f"{path}: its SHA-256 is not the one in {INDEX}"
                raise CorpusError("a cleaned corpus was altered after it was made", found, COPY_AGAIN)

    def read(self, chunk: Chunk, skipped: Skipped | None = None) -> Iterator[Document]:
        """The documents of a chunk, in order. There are no bad records. Raises CorpusError for a damaged document."""
        for part in chunk.parts:
            for number, line in enumerate(part.data.splitlines(), part.first):
                try:
                    yield Document(**json.loads(line))
                except (ValueError, TypeError) as error:
                    where = f"{self.folder / part.file}, line {number}: {error}"
                    raise CorpusError("a cleaned corpus is damaged", where, COPY_AGAIN) from None

    def documents(
        self, sides: tuple[str, ...] = SIDES, skipped: Skipped | None = None, shares: Shares | None = None
    ) -> Iterator[Document]:
        for chunk in self.chunks():
            yield from of_sides(self.read(chunk), sides, shares)

    def bounds(self, map: Callable = map) -> tuple[int, ...]:
        return ()  # the documents have their sides with them

    @property
    def split(self) -> dict:
        sources = self.index.get("corpus", {}).get("sources", ())
        named = {one["name"]: said for one in sources if (said := {key: one[key] for key in SPLIT if key in one})}
        return {"by": "text", "heldout_fraction": self.recipe.heldout_fraction, **({"sources": named} if named else {})}

    @property
    def meant(self) -> frozenset[str]:
        named = self.split.get("sources", {})
        return frozenset(name for name, said in named.items() if said.get("heldout_fraction") in (0, 1))

    @property
    def shares(self) -> Shares:
        """The counts from the time of cleaning; empty for a folder of an older version."""
        return Shares(self.index.get("recorded", {}).get("shares", {}))

    @property
    def stored(self) -> int | None:
        return sum(entry["bytes"] for name, entry in self.index["files"].items() if name.startswith("part-"))

    def refused(self, map: Callable = map) -> tuple[str, ...]:
        return ()  # there are no bad records

    def held_in(self, folder: Path) -> Path | None:
        return self.folder if Path(folder).resolve() in self.folder.resolve().parents else None

    def fingerprint(self, map: Callable = map) -> dict:
        return {"clean": self.index["fingerprint"]}

    def check(self) -> None:
        """Raise CorpusError if a file has another size than the index says, or in a small folder another hash."""
        check_contents(self.folder, self.index, CorpusError, f"make it again with: {CLEAN_BY}")
