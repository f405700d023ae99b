"""A corpus: a recipe, the files that it names, and its documents as a stream with a side for each."""

import heapq
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain
from operator import attrgetter
from pathlib import Path

from pretrain.config import load
from pretrain.corpus import hub
from pretrain.corpus.bad_records import EMPTY, Bad, BadRecord, Skipped, bad_lines
from pretrain.corpus.chunks import Chunk, FilePart, chunks_of, together
from pretrain.corpus.cleaned import CLEAN_BY, CleanedCorpus
from pretrain.corpus.documents import CHUNK_BYTES, Document, Group, of_sides
from pretrain.corpus.files import expand, format_of, reached
from pretrain.corpus.recipe import Recipe, Source
from pretrain.corpus.records import Record, parts_of, passages, records_of
from pretrain.corpus.shares import SIDES, Shares
from pretrain.corpus.sides import draw_of
from pretrain.display.progress import progress
from pretrain.errors import CorpusError
from pretrain.processes.pool import noted
from pretrain.storage.files import digest
from pretrain.storage.index import INDEX, read_index

RECIPE = "recipe.yaml"


class Corpus:
    """A recipe and the folder its file names start from. Iterating reads; nothing is kept but the hashes of files."""

    def __init__(self, recipe: Recipe, root: Path, bounds: tuple[int, ...] | None = None):
        """`bounds`: what `bounds` gave in another process."""
        self.recipe, self.root, self._bounds = recipe, Path(root), bounds
        self._files: dict[str, list[str]] = {}  # source → what its names stand for
        self._datasets: dict[str, hub.Resolved] = {}  # source → what its dataset is now
        self._states: dict[Path, tuple[int, ...]] = {}  # file → `_state` when the work began
        self._hashes: dict[Path, str] = {}

    def __reduce__(self):
        # To read a chunk is all that is asked of a corpus in another process.
        return Corpus, (self.recipe, self.root, self._bounds)

    def groups(self, size: int = CHUNK_BYTES) -> Iterator[Group]:
        """The files in the recipe's order, small ones together until they have `size` bytes: what `chunks` takes."""
        for number, source in enumerate(self.recipe.sources):
            sizes = ((file, (self.root / file).stat().st_size) for file in self.files(source))
            yield from (Group(number, files, stored) for files, stored in together(sizes, size))
            if self._is_streamed(source):
                yield Group(number, (), 0)

    def chunks(self, size: int = CHUNK_BYTES, group: Group | None = None) -> Iterator[Chunk]:
        """The text in stretches of about `size` bytes, in the recipe's order: what `read` takes, anywhere.

        All of it, or that of a group; they are the same stretches. Raises CorpusError for a missing or damaged file.
        """
        for one in self.groups(size) if group is None else (group,):
            yield from chunks_of(self._parts(self.recipe.sources[one.source], one.files, size), one.source, size)

    def read(self, chunk: Chunk, skipped: Skipped | None = None) -> Iterator[Document]:
        """The documents of a chunk, in order. Records that give none are added to `skipped`.

        Raises CorpusError for the first of them, naming file and line, unless it is empty or its source skips.
        """
        source = self.recipe.sources[chunk.source]
        bound = self.bounds()[chunk.source]
        for found in self._records(chunk):
            if not isinstance(found, Bad):
                side = "heldout" if draw_of(found.text) < bound else "train"
                yield Document(found.text, source.name, source.language, side, found.where)
                continue
            if source.bad_records == "stop" and found.kind != EMPTY:
                raise BadRecord(*bad_lines({source.name: {found.kind: (1, self._placed(source, found), source.field)}}))
            if skipped is not None:
                skipped.add(source.name, found)

    def documents(
        self, sides: tuple[str, ...] = SIDES, skipped: Skipped | None = None, shares: Shares | None = None
    ) -> Iterator[Document]:
        """Every document of the given sides, in the recipe's order, read in this process; all are added to `shares`."""
        self.bounds(map)
        with listing(self, map):
            for chunk in self.chunks():
                yield from of_sides(self.read(chunk, skipped), sides, shares)

    def bounds(self, map: Callable = map) -> tuple[int, ...]:
        """Of each source the hash below which its documents are held out, found once.

        It follows from the fraction, and where a source asks for a least number of documents, from its smallest hashes:
        then all of it is read, by `map`. A document that is added moves at most one other, from held-out to train.
        """
        if self._bounds is None:
            self._bounds = tuple(self._bound(number, map) for number in range(len(self.recipe.sources)))
        return self._bounds

    def _bound(self, number: int, map: Callable) -> int:
        source = self.recipe.sources[number]
        fraction = self.recipe.heldout_fraction if source.heldout_fraction is None else source.heldout_fraction
        bound, least = int(fraction * 2**64), source.heldout_documents
        if not least:
            return bound
        groups = [group for group in self.groups() if group.source == number]
        chunks = chain.from_iterable(self.chunks(group=group) for group in groups)
        what, reads = f"smallest hashes of {source.name}", sum(group.bytes for group in groups)
        smallest: list[int] = []
        for draws in _followed(what, partial(_smallest, self, least), chunks, reads, map):
            smallest = sorted({*smallest, *draws})[:least]
        return max([bound, *(draw + 1 for draw in smallest)])

    @property
    def split(self) -> dict:
        """How the sides were made: sets of shards that were split in the same way have no document on both."""
        named = {source.name: source.split for source in self.recipe.sources if source.split}
        return {"by": "text", "heldout_fraction": self.recipe.heldout_fraction, **({"sources": named} if named else {})}

    @property
    def meant(self) -> frozenset[str]:
        """The sources that say themselves that they are on one side alone."""
        return frozenset(source.name for source in self.recipe.sources if source.heldout_fraction in (0, 1))

    @property
    def stored(self) -> int | None:
        """Bytes of all files, as stored; None where a source is streamed."""
        if any(self._is_streamed(source) for source in self.recipe.sources):
            return None
        paths = (self.root / file for source in self.recipe.sources for file in self.files(source))
        return sum((self._states.get(path) or _state(path))[0] for path in paths)

    def refused(self, map: Callable = map) -> tuple[str, ...]:
        """The first line and the details of the error about bad records, for sources that stop at them.

        All of them are read, by `map`: the first of each kind and source is named, whatever order processes work in.
        """
        total, after = Skipped(), ()
        try:
            for skipped in _followed("reading on", partial(_bad, self), self.chunks(), self.stored, map):
                total.merge(skipped)
        except CorpusError as error:  # of a file
            after = (f"then: {error.what}", *error.details[:1])
        fields = {source.name: source for source in self.recipe.sources if source.bad_records == "stop"}
        found = {}
        for name, kinds in total.counts.items():
            for kind, records in kinds.items():
                if kind != EMPTY and name in fields:
                    first = self._placed(fields[name], total.samples[name][kind][0])
                    found.setdefault(name, {})[kind] = (records, first, fields[name].field)
        return (*bad_lines(found), *after) if found else ()

    def _placed(self, source: Source, bad: Bad) -> Bad:
        """With the place of the file, as it is found from here."""
        return bad if source.dataset else replace(bad, where=str(self.root / bad.where))

    def _records(self, chunk: Chunk) -> Iterator[Record | Bad]:
        source = self.recipe.sources[chunk.source]
        for part in chunk.parts:
            records = records_of(part, source.field, source.max_record_bytes)
            yield from passages(records, source.split_characters, part.cut) if source.split_characters else records

    def fingerprint(self, map: Callable = map) -> dict:
        """Identity of the text: per source and file the SHA-256 of the bytes as stored, how it is read, the split.

        Where files are and what they are called is no part of it, nor by which pattern they were found. Of a
        dataset of the hub it is the name and the commit. Files are hashed once for a corpus, by `map`, which may use
        other processes.
        """
        paths = [path for source in self.recipe.sources for path in self._stored(source)]
        new = [path for path in dict.fromkeys(paths) if path not in self._hashes]
        for path, found in zip(new, map(digest, new), strict=True):
            if self._states.get(path, _state(path)) != _state(path):
                raise CorpusError("a file changed while it was read", str(path), "start again when it is at rest")
            self._hashes[path] = found["sha256"]
        return {
            "heldout_fraction": self.recipe.heldout_fraction,
            "sources": [self._identity(source) for source in self.recipe.sources],
        }

    def check(self) -> None:
        """Raise CorpusError for the first file that is not there or of no known format, before any work is done."""
        for source in self.recipe.sources:
            for file in self.files(source):
                path = self.root / file
                with reached(source.name):
                    there = path.is_file()
                if not there:  # a link that leads nowhere, or to itself
                    raise CorpusError("no such text file", f"{path}, of source {source.name!r}")
                form = self._format(source, file)
                if source.documents == "file" and form != "txt":
                    found = f"{path}, of source {source.name!r}, is {form}"
                    raise CorpusError("documents: file is for txt", found, "set format: txt, or remove documents:")
                self._states[path] = _state(path)
            if self._is_streamed(source):
                self._dataset(source)
        self._say_what_comes_twice()

    def _say_what_comes_twice(self) -> None:
        """Say on standard error which files are in two sources: that is allowed, for they may be read in two ways."""
        first: dict[str, str] = {}
        twice = []
        for source in self.recipe.sources if len(self.recipe.sources) > 1 else ():
            for file in self.files(source):
                other = first.setdefault(os.path.realpath(self.root / file), source.name)
                if other != source.name:
                    twice.append(f"{self.root / file} is in two sources: {other!r} and {source.name!r}")
        if twice:
            more = f"; so are {len(twice) - 1:,} other files" if len(twice) > 1 else ""
            print(f"{twice[0]}{more}: its text counts twice", file=sys.stderr)

    def files(self, source: Source) -> list[str]:
        """The files of a source, relative to the recipe; none of a dataset that `datasets` streams."""
        if source.name not in self._files:
            names = source.files
            with reached(source.name):
                if source.dataset:
                    folder = hub.saved_folder(source.dataset, self.root)
                    names = [folder] if folder else []
                self._files[source.name] = expand(names, self.root, source.name)
        return self._files[source.name]

    def held_in(self, folder: Path) -> Path | None:
        """The first file of the corpus that lies in `folder`."""
        above = os.path.join(os.path.realpath(folder), "")
        paths = (self.root / file for source in self.recipe.sources for file in self.files(source))
        return next((path for path in paths if os.path.realpath(path).startswith(above)), None)

    def _format(self, source: Source, file: str) -> str:
        return source.format or format_of(self.root / file)

    def _parts(self, source: Source, files: tuple[str, ...], size: int) -> Iterator[FilePart]:
        for file in files:
            path, form = self.root / file, self._format(source, file)
            if form in ("parquet", "arrow"):
                from pretrain.corpus import tables  # imports pyarrow

                yield from tables.parts_of(path, file, form, source.field, size)
            else:
                cut = "lines" if form == "jsonl" else source.documents
                yield from parts_of(path, file, cut, size, source.max_record_bytes)
        if not files:
            yield from hub.parts_of(self._dataset(source), source.field, size)

    def _is_streamed(self, source: Source) -> bool:
        return source.dataset is not None and not self.files(source)

    def _dataset(self, source: Source) -> hub.Resolved:
        if source.name not in self._datasets:
            self._datasets[source.name] = hub.resolve(source.dataset, self.root)
        return self._datasets[source.name]

    def _identity(self, source: Source) -> dict:
        found = {"name": source.name, "field": source.field, "max_record_bytes": source.max_record_bytes}
        if self._is_streamed(source):
            found["dataset"] = self._dataset(source).identity()
        else:
            found["formats"] = [self._format(source, file) for file in self.files(source)]
            found["documents"] = source.documents
        return {**found, **source.split, "sha256": [self._hashes[path] for path in self._stored(source)]}

    def _stored(self, source: Source) -> list[Path]:
        """The files whose bytes are the identity of a source."""
        if self._is_streamed(source):
            return self._dataset(source).files
        return [self.root / file for file in self.files(source)]


def open_corpus(path: Path | str) -> Corpus | CleanedCorpus:
    """A corpus from `recipe.yaml`, a folder that holds one, a folder of the stage `clean`, or a single text file."""
    path = Path(path)
    if (path / RECIPE).exists():
        path /= RECIPE
    if path.suffix in (".yaml", ".yml"):
        corpus = Corpus(load(Recipe, path), path.parent)
    elif (path / INDEX).is_file():
        corpus = CleanedCorpus(path, read_index(path, CorpusError, CLEAN_BY, stage="clean"))
    elif path.is_file():
        # Not named after the file: a source's name is part of the fingerprint, a path is not.
        corpus = Corpus(Recipe(name="text", sources=[Source(name="text", files=[path.name])]), path.parent)
    elif path.is_dir():
        remedy = "write one beside the text (README, Your own corpus), or name one file"
        raise CorpusError(f"the folder has no {RECIPE} that says what is in it", str(path), remedy)
    else:
        remedy = f"corpus: is a text file, a {RECIPE}, its folder, or what the stage clean wrote"
        raise CorpusError("no such text file or folder", str(path), remedy)
    corpus.check()
    return corpus


@contextmanager
def listing(corpus: Corpus | CleanedCorpus, map: Callable) -> Iterator[None]:
    """Where a bad record ends the work inside, read on, by `map`, to name the first of each kind and source: whoever
    has to repair records should not learn of them one at a time.
    """
    try:
        yield
    except BadRecord as error:
        what, where, *_ = str(error).split("\n  ")
        print(f"{what} ({where}): reading on, to list what else is wrong", file=sys.stderr, flush=True)
        found = corpus.refused(map)
        raise CorpusError(*found) if found else error from None


def check_apart(corpus: Corpus | CleanedCorpus, out: Path | str) -> None:
    """Raise CorpusError when `out`, which is to be written, holds a file of the corpus."""
    if held := corpus.held_in(Path(out)):
        found = f"{held} is in {out}"
        raise CorpusError("the output folder holds a file of the corpus", found, "choose another out=")


def _followed(what: str, work: Callable, chunks: Iterator[Chunk], reads: int | None, map: Callable) -> Iterator:
    """`map(work, chunks)`, with its progress by the bytes that are read of `reads`."""
    stored: deque[int] = deque()  # of the chunks on their way
    with progress(what, "chunks", reads=reads) as advance:
        for found in map(work, noted(chunks, attrgetter("stored"), stored)):
            yield found
            advance(1, read=stored.popleft())


def _smallest(corpus: Corpus, count: int, chunk: Chunk) -> list[int]:
    """The `count` smallest of the hashes of a chunk's documents."""
    draws = {draw_of(found.text) for found in corpus._records(chunk) if not isinstance(found, Bad)}
    return heapq.nsmallest(count, draws)


def _bad(corpus: Corpus, chunk: Chunk) -> Skipped:
    """The records of a chunk that give no document."""
    skipped, source = Skipped(), corpus.recipe.sources[chunk.source]
    for found in corpus._records(chunk):
        if isinstance(found, Bad):
            skipped.add(source.name, found)
    return skipped


def _state(path: Path) -> tuple[int, ...]:
    """The stamp of a file, which differs once the file has changed. It includes ctime, which no program can set.

    `rsync -t` and `cp -p` keep the size and the other time. The number of the inode is no part of this: file systems in
    user space (of object stores, for instance) give a file a new one while it is the same.
    """
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns
