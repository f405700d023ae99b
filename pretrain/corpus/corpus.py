"""A corpus: a recipe, the files that it names, and a stream of documents, each on its side."""

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
    """A recipe, and the folder that its file names are relative to. Documents are read again each time."""

    def __init__(self, recipe: Recipe, root: Path, bounds: tuple[int, ...] | None = None):
        """`bounds`: the result of the method `bounds`, if another process has found it."""
        self.recipe, self.root, self._bounds = recipe, Path(root), bounds
        self._files: dict[str, list[str]] = {}  # source → its files
        self._datasets: dict[str, hub.Resolved] = {}  # source → its dataset
        self._states: dict[Path, tuple[int, ...]] = {}  # file → its `_state` when the work began
        self._hashes: dict[Path, str] = {}  # file → SHA-256

    def __reduce__(self) -> tuple:
        # Other processes only read chunks; they need neither the files nor their hashes.
        return Corpus, (self.recipe, self.root, self._bounds)

    def groups(self, size: int = CHUNK_BYTES) -> Iterator[Group]:
        """The files in the recipe's order, in groups for `chunks`. Small files form groups of `size` bytes."""
        for number, source in enumerate(self.recipe.sources):
            sizes = ((file, (self.root / file).stat().st_size) for file in self.files(source))
            yield from (Group(number, files, stored) for files, stored in together(sizes, size))
            if self._is_streamed(source):
                yield Group(number, (), 0)

    def chunks(self, size: int = CHUNK_BYTES, group: Group | None = None) -> Iterator[Chunk]:
        """Cut the text into chunks of about `size` bytes, in the recipe's order. `read` takes them, in any process.

        With `group`, only the chunks of this group are made; they are the same ones. Raises CorpusError for a missing
        or damaged file.
        """
        for one in self.groups(size) if group is None else (group,):
            yield from chunks_of(self._parts(self.recipe.sources[one.source], one.files, size), one.source, size)

    def read(self, chunk: Chunk, skipped: Skipped | None = None) -> Iterator[Document]:
        """The documents of a chunk, in order. Bad records are added to `skipped`.

        A bad record raises a CorpusError with its file and line, unless it is empty or its source skips bad records.
        """
        source = self.recipe.sources[chunk.source]
        bound = self.bounds()[chunk.source]
        for found in self._records(chunk):
            if not isinstance(found, Bad):
                side = "heldout" if draw_of(found.decisive) < bound else "train"
                yield Document(found.text, source.name, source.language, side, found.where, found.input_characters)
                continue
            if source.bad_records == "stop" and found.kind != EMPTY:
                first = (1, self._placed(source, found), source.fields)
                raise BadRecord(*bad_lines({source.name: {found.kind: first}}))
            if skipped is not None:
                skipped.add(source.name, found)

    def documents(
        self, sides: tuple[str, ...] = SIDES, skipped: Skipped | None = None, shares: Shares | None = None
    ) -> Iterator[Document]:
        """The documents of the given sides in the recipe's order, read in this process. `shares` counts all sides."""
        self.bounds(map)
        with listing(self, map):
            for chunk in self.chunks():
                yield from of_sides(self.read(chunk, skipped), sides, shares)

    def bounds(self, map: Callable = map) -> tuple[int, ...]:
        """For each source, the bound of the held-out side: documents with a smaller hash are held out. Found once.

        The fraction gives the bound. For a source with `heldout_documents`, its smallest hashes may raise it; `map`
        then reads the whole source. A new document moves at most one other document, from held-out to train.
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
        title, reads = f"smallest hashes of {source.name}", sum(group.stored for group in groups)
        smallest: list[int] = []
        for draws in _followed(title, partial(_smallest, self, least), chunks, reads, map):
            smallest = sorted({*smallest, *draws})[:least]
        return max([bound, *(draw + 1 for draw in smallest)])

    @property
    def split(self) -> dict:
        """How the sides were made. Shard sets with equal splits share no document between train and held-out."""
        named = {source.name: source.split for source in self.recipe.sources if source.split}
        return {"by": "text", "heldout_fraction": self.recipe.heldout_fraction, **({"sources": named} if named else {})}

    @property
    def meant(self) -> frozenset[str]:
        """The sources that are on one side on purpose: their `heldout_fraction` is 0 or 1."""
        return frozenset(source.name for source in self.recipe.sources if source.heldout_fraction in (0, 1))

    @property
    def stored(self) -> int | None:
        """Bytes of all files before decompression; None if a source is streamed."""
        if any(self._is_streamed(source) for source in self.recipe.sources):
            return None
        paths = (self.root / file for source in self.recipe.sources for file in self.files(source))
        return sum((self._states.get(path) or _state(path))[0] for path in paths)

    def refused(self, map: Callable = map) -> tuple[str, ...]:
        """The first line and the details of the error about bad records, in the sources that stop at them.

        `map` reads the whole corpus. The error names the first record of each kind and source, in the corpus's order.
        """
        total = Skipped()
        after: tuple[str, ...] = ()
        try:
            for skipped in _followed("reading on", partial(_bad, self), self.chunks(), self.stored, map):
                total.merge(skipped)
        except CorpusError as error:  # a file that cannot be read
            after = (f"then: {error.what}", *error.details[:1])
        stopping = {source.name: source for source in self.recipe.sources if source.bad_records == "stop"}
        found: dict[str, dict[str, tuple[int, Bad, tuple[str, ...]]]] = {}
        for name, kinds in total.counts.items():
            for kind, records in kinds.items():
                if kind != EMPTY and name in stopping:
                    source = stopping[name]
                    first = self._placed(source, total.samples[name][kind][0])
                    found.setdefault(name, {})[kind] = (records, first, source.fields)
        return (*bad_lines(found), *after) if found else ()

    def _placed(self, source: Source, bad: Bad) -> Bad:
        """The same bad record, with the path of its file from the working folder."""
        return bad if source.dataset else replace(bad, where=str(self.root / bad.where))

    def _records(self, chunk: Chunk) -> Iterator[Record | Bad]:
        source = self.recipe.sources[chunk.source]
        for part in chunk.parts:
            records = records_of(part, source.fields, source.max_record_bytes)
            yield from passages(records, source.split_characters, part.cut) if source.split_characters else records

    def fingerprint(self, map: Callable = map) -> dict:
        """The identity of the text: for each source the SHA-256 of its files, the options of reading, and the split.

        File names, locations and patterns do not change the fingerprint. A dataset of the hub has its name and commit.
        Files are hashed once, by `map`, which may use other processes.
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
        """Raise CorpusError for the first file that is missing or has no known format, before any work is done."""
        for source in self.recipe.sources:
            for file in self.files(source):
                path = self.root / file
                with reached(source.name):
                    there = path.is_file()
                if not there:  # for example a link that leads nowhere, or to itself
                    raise CorpusError("no such text file", f"{path}, of source {source.name!r}")
                form = self._format(source, file)
                if source.documents == "file" and form != "txt":
                    found = f"{path}, of source {source.name!r}, is {form}"
                    raise CorpusError("documents: file is for txt", found, "set format: txt, or remove documents:")
                if source.output_field and form == "txt":
                    found = f"{path}, of source {source.name!r}, is txt"
                    remedy = "write one JSON object a line and name it .jsonl, or remove output_field:"
                    raise CorpusError("output_field: is for records with keys or columns", found, remedy)
                self._states[path] = _state(path)
            if self._is_streamed(source):
                self._dataset(source)
        self._warn_of_shared_files()

    def _warn_of_shared_files(self) -> None:
        """Warn on standard error of files that are in two sources. This is allowed: they may be read in two ways."""
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
        """The files of a source, relative to the recipe. A streamed dataset has none."""
        if source.name not in self._files:
            names = source.files or []
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

                yield from tables.parts_of(path, file, form, source.fields, size)
            else:
                cut = "lines" if form == "jsonl" else source.documents
                yield from parts_of(path, file, cut, size, source.max_record_bytes)
        if not files:
            yield from hub.parts_of(self._dataset(source), source.fields, size)

    def _is_streamed(self, source: Source) -> bool:
        return source.dataset is not None and not self.files(source)

    def _dataset(self, source: Source) -> hub.Resolved:
        if source.name not in self._datasets:
            assert source.dataset is not None, source.name
            self._datasets[source.name] = hub.resolve(source.dataset, self.root)
        return self._datasets[source.name]

    def _identity(self, source: Source) -> dict:
        found = {"name": source.name, "field": source.field, "max_record_bytes": source.max_record_bytes}
        if source.output_field:
            found["output_field"] = source.output_field
        if self._is_streamed(source):
            found["dataset"] = self._dataset(source).identity()
        else:
            found["formats"] = [self._format(source, file) for file in self.files(source)]
            found["documents"] = source.documents
        return {**found, **source.split, "sha256": [self._hashes[path] for path in self._stored(source)]}

    def _stored(self, source: Source) -> list[Path]:
        """The files of a source, or of its dataset, that its fingerprint hashes."""
        if self._is_streamed(source):
            return self._dataset(source).files
        return [self.root / file for file in self.files(source)]


def open_corpus(path: Path | str) -> Corpus | CleanedCorpus:
    """Open a corpus: `recipe.yaml`, a folder that holds one, a folder of the stage `clean`, or a single text file."""
    path = Path(path)
    corpus: Corpus | CleanedCorpus
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
        remedy = "write one beside the text (docs/en/your-corpus.md shows how), or name one file"
        raise CorpusError(f"the folder has no {RECIPE} that says what is in it", str(path), remedy)
    else:
        remedy = f"corpus: is a text file, a {RECIPE}, its folder, or a folder that the stage clean wrote"
        raise CorpusError("no such text file or folder", str(path), remedy)
    corpus.check()
    return corpus


@contextmanager
def listing(corpus: Corpus | CleanedCorpus, map: Callable) -> Iterator[None]:
    """If a bad record ends the work inside, read on by `map`, and raise one error that lists all kinds of bad records.

    So the user learns of all of them at once, and need not start again after each repair.
    """
    try:
        yield
    except BadRecord as error:
        print(f"{error.what} ({error.details[0]}): reading on, to list all bad records", file=sys.stderr, flush=True)
        found = corpus.refused(map)
        raise CorpusError(*found) if found else error from None


def check_apart(corpus: Corpus | CleanedCorpus, out: Path | str) -> None:
    """Raise CorpusError if the output folder `out` holds a file of the corpus."""
    if held := corpus.held_in(Path(out)):
        found = f"{held} is in {out}"
        raise CorpusError("the output folder holds a file of the corpus", found, "choose another out=")


def _followed(title: str, work: Callable, chunks: Iterator[Chunk], reads: int | None, map: Callable) -> Iterator:
    """`map(work, chunks)` with a progress bar over the `reads` bytes of the files."""
    stored: deque[int] = deque()  # the stored bytes of the chunks that are being worked on
    with progress(title, "chunks", reads=reads) as advance:
        for found in map(work, noted(chunks, attrgetter("stored"), stored)):
            yield found
            advance(1, read=stored.popleft())


def _smallest(corpus: Corpus, count: int, chunk: Chunk) -> list[int]:
    """The `count` smallest hashes of a chunk's documents."""
    draws = {draw_of(found.decisive) for found in corpus._records(chunk) if not isinstance(found, Bad)}
    return heapq.nsmallest(count, draws)


def _bad(corpus: Corpus, chunk: Chunk) -> Skipped:
    """The bad records of a chunk."""
    skipped, source = Skipped(), corpus.recipe.sources[chunk.source]
    for found in corpus._records(chunk):
        if isinstance(found, Bad):
            skipped.add(source.name, found)
    return skipped


def _state(path: Path) -> tuple[int, ...]:
    """A stamp of a file that changes whenever the file changes: size, mtime, and ctime, which no program can set.

    `rsync -t` and `cp -p` can replace a file with equal size and mtime. The inode's number is left out, because file
    systems in user space (for object stores, for instance) change it while the file stays the same.
    """
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns
