"""Shard sets made of shard sets, without the text and without a tokenizer: concatenated, split, or a part of them.

    parts:
      - {shards: runs/wiki/shards}
      - {shards: runs/web/shards, fraction: 0.25}

What is chosen from a set are documents of its training side; its held-out side stays whole, so that scores of runs on
its parts compare (only `files` chooses on both sides). Pieces of which every document stays are linked, not copied.
The index names every set that went in, with what was chosen, and theirs: the chain of fingerprints goes on.

A document is never on both sides. Where sets were split by different rules, training documents that another set holds
out are dropped and counted, which takes one reading of all; held-out pieces that sets share are taken once.
"""

import json
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import partial
from hashlib import blake2b
from itertools import combinations, product, starmap
from pathlib import Path

import numpy as np
from pydantic import Field, model_validator

from pretrain import folders
from pretrain.config import Config, StageConfig
from pretrain.corpus import SIDES
from pretrain.errors import ShardError
from pretrain.permutation import CHOICE, hash64
from pretrain.progress import progress
from pretrain.shards.reading import ORIGIN, ORIGINS, Shards, sidecars
from pretrain.shards.writing import SideWriter

COPY_TOKENS = 1 << 22  # copied together
BINS = 1 << 16  # of hashes, in which tokens are counted before a budget is met


class Part(Config):
    """A set, or those of its training documents that meet everything that is said here."""

    shards: str
    files: list[str] | None = Field(None, min_length=1)  # patterns of the files they came from: `zh/*.jsonl`
    documents: tuple[int, int] | None = None  # the first, and one past the last, counted from 0
    # 0.25: those whose hash lies in the first quarter; [0.25, 1]: the others. A hash is of the seed and the number of
    # the document: a larger fraction has every document of a smaller one.
    fraction: float | tuple[float, float] | None = None
    tokens: int | None = Field(None, gt=0)  # at most so many, in the order of their hashes

    @model_validator(mode="after")
    def _ranges(self) -> "Part":
        ranges = {"documents": self.documents or (0, 1), "fraction": self.share}
        for key, (first, last) in ranges.items():
            if not 0 <= first < last:
                raise ValueError(f"{key} = {getattr(self, key)} is empty, or begins below 0")
        if self.share[1] > 1:
            raise ValueError(f"fraction = {self.fraction} is of documents: at most 1")
        return self

    @property
    def share(self) -> tuple[float, float]:
        whole = 1.0 if self.fraction is None else self.fraction
        return whole if isinstance(whole, tuple) else (0.0, whole)

    @property
    def choice(self) -> dict:
        """What is said besides the set."""
        return self.model_dump(mode="json", exclude={"shards"}, exclude_none=True)


class ReshardConfig(StageConfig):
    """What `launch/reshard.py` reads."""

    parts: list[Part] = Field(min_length=1)
    out: str
    seed: int = Field(0, ge=0, lt=2**64)  # of the hashes that choose documents
    piece_tokens: int = Field(
        1 << 30, gt=0
    )  # of pieces that are written: one is closed by the document that reaches it


def run(config: ReshardConfig) -> dict:
    """Publish the set that `config` describes. Returns its index. Raises ShardError."""
    _check_out(config)
    sources = [{side: Shards(part.shards, side) for side in SIDES} for part in config.parts]
    indexes = [source["train"].index for source in sources]
    first = indexes[0]
    _check_tokenizers(config, indexes)
    _check_overlap(config, indexes)
    kept = [name for name in ("raw", "origin") if name == "origin" or all(name in sidecars(index) for index in indexes)]
    places, numbers = _places([source["train"] for source in sources])
    splits = {json.dumps(index.get("split"), sort_keys=True) for index in indexes}
    # Sources with rules of their own: a text may be of two sources, and held out by the rule of one.
    owned = any("sources" in (index.get("split") or {}) for index in indexes)
    alike = len(sources) == 1 or (len(splits) == 1 and "null" not in splits and not owned)
    held = None if alike else _held_out([source["heldout"] for source in sources])
    with folders.publish(Path(config.out), "shards", ShardError, config) as folder:
        sides, known, dropped = {}, {}, 0
        for side in SIDES:
            writer = SideWriter(folder, side, first["dtype"], first["vocab_size"], config.piece_tokens, kept)
            with progress(f"{side} side", "pieces", sum(len(source[side].pieces) for source in sources)) as advance:
                for part, source, files in zip(config.parts, sources, numbers, strict=True):
                    choose = _chooser(source[side], part, config.seed)
                    dropped += _write(writer, source[side], choose, files, held, advance)
            sides[side] = writer.close()
            known |= writer.digests
            if not sides[side]["documents"]:
                said = [f"{part.shards}: {part.choice}" for part in config.parts]
                raise ShardError(f"no document is chosen for the {side} side", *said, "choose more")
        folders.write_json(folder / ORIGINS, places)
        index = {key: first[key] for key in ("stage", "kind", "dtype", "vocab_size", "specials", "tokenizer")}
        index |= {
            "format": 2,
            "sidecars": kept,
            "split": first.get("split") if alike else None,
            "dropped": dropped,
            "sides": sides,
            "seed": config.seed,
            "parts": [_lineage(part, found) for part, found in zip(config.parts, indexes, strict=True)],
            "recorded": {
                "parts": [part.shards for part in config.parts],
                "tokenizer": first.get("recorded", {}).get("tokenizer", ""),
                **_described(indexes),
            },
        }
        index = folders.write_index(folder, index, recorded=(ORIGINS,), known=known)
    for side, found in sides.items():
        print(f"{side}: {found['documents']:,} documents, {found['tokens']:,} tokens")
    if dropped:
        print(f"dropped: {dropped:,} training documents that are held out")
    return index


def _described(indexes: list[dict]) -> dict:
    """The name and the sources of all the sets, as a model card says them; nothing where one set does not know its own.

    A part may leave out every document of a source: the sources are those that the text can be from.
    """
    described = [index.get("recorded", {}) for index in indexes]
    if not all("sources" in one for one in described):
        return {}
    sources = {json.dumps(source, sort_keys=True): source for one in described for source in one["sources"]}
    return {
        "name": ", ".join(dict.fromkeys(one.get("name", "") for one in described)),
        "sources": list(sources.values()),
    }


def _check_out(config: ReshardConfig) -> None:
    for part in config.parts:
        if folders.lies_in(config.out, part.shards) or folders.lies_in(part.shards, config.out):
            raise ShardError(
                "the output folder is a set that it is made of, or inside of one",
                f"out = {config.out}, shards = {part.shards}",
                "choose another out=",
            )


# What is chosen


Choose = Callable[[int], np.ndarray]  # piece → (documents,) bool


def _chooser(source: Shards, part: Part, seed: int) -> Choose:
    """Which documents of a piece are meant by `part`."""
    if source.side == "heldout":
        part = Part(shards=part.shards, files=part.files)
    first, last = part.documents or (0, source.documents)
    if last > source.documents:
        found = f"{part.shards} has {source.documents:,} on its training side, documents = [{first}, {last}]"
        raise ShardError("there are not so many documents", found)
    files = _files(source, part)
    low, high = (int(share * 2**64) for share in part.share)

    def chosen(piece: int, high: int) -> np.ndarray:
        numbers = source.numbers(piece)
        found = (numbers >= first) & (numbers < last)
        if files is not None:
            found &= files[source.sidecar(piece, "origin")["file"]]
        if low > 0 or high < 2**64:
            hashes = hash64(CHOICE, seed, numbers)
            found &= (hashes >= np.uint64(low)) & (hashes <= np.uint64(high - 1))
        return found

    if part.tokens:
        high = min(high, _budget(source, part, seed, partial(chosen, high=high)))
    return partial(chosen, high=high)


def _files(source: Shards, part: Part) -> np.ndarray | None:
    """(files,) bool: which files the patterns of `part` mean."""
    if part.files is None:
        return None
    places = [place.rpartition(", ")[0] for place in source.places]
    for pattern in part.files:
        if not any(fnmatchcase(place, pattern) for place in places):
            some = ", ".join(places[:8]) + (", …" if len(places) > 8 else "")
            raise ShardError(f"no document came from a file {pattern!r}", f"{part.shards} has {some}")
    return np.array([any(fnmatchcase(place, pattern) for pattern in part.files) for place in places])


def _budget(source: Shards, part: Part, seed: int, choose: Choose) -> int:
    """The hash below which the documents that `choose` means have at most `part.tokens`.

    Two readings of all lengths: tokens are counted in BINS of hashes; then the documents of the bin in which the
    budget is met are put into order.
    """

    def chosen(piece: int) -> tuple[np.ndarray, np.ndarray]:
        found = choose(piece)
        return hash64(CHOICE, seed, source.numbers(piece)[found]), source.piece_index(piece)[0][found]

    counts = np.zeros(BINS, np.int64)
    for piece in range(len(source.pieces)):
        hashes, lengths = chosen(piece)
        counts += np.bincount((hashes >> np.uint64(48)).astype(np.int64), lengths, BINS).astype(np.int64)
    ends = np.cumsum(counts)
    if ends[-1] < part.tokens:
        raise ShardError("there are not so many tokens", f"{part.shards}: {part.choice}, found {ends[-1]:,}")
    met = int(np.searchsorted(ends, part.tokens, side="right"))
    if met == BINS:
        return 2**64
    inside = [
        (hashes[here], lengths[here])
        for hashes, lengths in map(chosen, range(len(source.pieces)))
        if (here := hashes >> np.uint64(48) == met).any()
    ]
    hashes, lengths = (np.concatenate(arrays) for arrays in zip(*inside, strict=True))
    order = np.argsort(hashes)
    fitting = np.cumsum(lengths[order], dtype=np.int64) <= part.tokens - (ends[met] - counts[met])
    return int(hashes[order][fitting.sum()])


# What is written


def _write(
    writer: SideWriter, source: Shards, choose: Choose, files: np.ndarray, held: np.ndarray | None, advance: Callable
) -> int:
    """Add the chosen documents of one side of a set; how many were not added because they are `held` out."""
    shared = {writer.digests[f"{name}.bin"]["sha256"] for name in writer.pieces if source.side == "heldout"}
    whole, dropped = [], 0
    for piece, name in enumerate(source.pieces):
        advance(1)
        if source.index["files"][f"{name}.bin"]["sha256"] in shared:
            continue
        chosen = choose(piece)
        if held is not None and source.side == "train":
            unseen = ~np.isin(_hashes(source, piece), held)
            dropped += int((chosen & ~unseen).sum())
            chosen &= unseen
        if chosen.all():
            whole.append(piece)
            writer.take(source, piece, _changed(source, piece, files))
        elif chosen.any():
            _check_piece(source, piece)
            for documents in _batches(source, piece, np.flatnonzero(chosen)):
                writer.add(*_documents(source, piece, documents, files))
    if len(whole) == len(source.pieces):
        writer.unigram += source.unigram()
    else:
        for piece in whole:
            for part in np.array_split(source.piece_ids(piece), source.piece_tokens[piece] // COPY_TOKENS + 1):
                writer.unigram += np.bincount(part, minlength=len(writer.unigram))
    return dropped


def _check_piece(source: Shards, piece: int) -> None:
    """Raise ShardError unless every byte of a piece is what it was: it gets new checksums."""
    for end in ("bin", "idx", *(f"{name}.npy" for name in sidecars(source.index))):
        name = f"{source.pieces[piece]}.{end}"
        if folders.digest(source.folder / name) != source.index["files"][name]:
            raise ShardError(
                f"{source.folder / name} was altered after it was made", "copy it again, or rebuild the set"
            )


def _batches(source: Shards, piece: int, documents: np.ndarray) -> list[np.ndarray]:
    """Documents of a piece, about COPY_TOKENS together."""
    ends = np.cumsum(source.piece_index(piece)[0][documents], dtype=np.int64)
    return np.split(documents, np.flatnonzero(np.diff(ends // COPY_TOKENS)) + 1)


def _documents(
    source: Shards, piece: int, documents: np.ndarray, files: np.ndarray
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """(ids, lengths, rows of sidecars) of documents of a piece, in order; neighbours are copied together."""
    lengths, offsets = source.piece_index(piece)
    ids = source.piece_ids(piece)
    begins = offsets[documents] // ids.itemsize
    ends = begins + lengths[documents]
    cuts = np.flatnonzero(np.diff(documents) > 1)
    runs = zip(begins[[0, *(cuts + 1)]].tolist(), ends[[*cuts, -1]].tolist(), strict=True)
    rows = {"origin": _origins(source, piece, files)[documents]}
    if "raw" in sidecars(source.index):
        rows["raw"] = source.sidecar(piece, "raw")[documents]
    return np.concatenate([ids[begin:end] for begin, end in runs]), lengths[documents], rows


# Where documents came from


def _places(sources: list[Shards]) -> tuple[list[str], list[np.ndarray]]:
    """One table of the places of all sets, and for each set the numbers its own have there.

    A place that two sets name is told apart by the set. One that does not know where its documents came from gives
    their numbers in it.
    """
    of: dict[str, str] = {}  # place → the set it is of
    named = []
    for source in sources:
        mark = source.fingerprint[:12]
        own = source.places if source.has_origins else [f"shards {mark}, document"]
        named.append([place if of.get(place, mark) == mark else f"{mark}: {place}" for place in own])
        of |= dict.fromkeys(named[-1], mark)
    number = {place: n for n, place in enumerate(of)}
    return list(of), [np.array([number[place] for place in places], np.uint32) for places in named]


def _origins(source: Shards, piece: int, files: np.ndarray) -> np.ndarray:
    """The rows of a piece's sidecar `origin` in the new table."""
    numbers = source.numbers(piece)
    rows = np.zeros(len(numbers), ORIGIN)
    if source.has_origins:
        known = source.sidecar(piece, "origin")
        rows["file"], rows["number"] = files[known["file"]], known["number"]
    else:
        rows["file"], rows["number"] = files[0], numbers
    return rows


def _changed(source: Shards, piece: int, files: np.ndarray) -> dict[str, np.ndarray]:
    """The sidecars of a piece that is taken whole which do not stay as they are."""
    same = source.has_origins and np.array_equal(files, np.arange(len(files)))
    return {} if same else {"origin": _origins(source, piece, files)}


# What may not be


def _check_tokenizers(config: ReshardConfig, indexes: list[dict]) -> None:
    for part, index in zip(config.parts, indexes, strict=True):
        if index["tokenizer"] != indexes[0]["tokenizer"]:
            raise ShardError(
                "the sets were built with different tokenizers",
                *(f"{p.shards}: {i['tokenizer'][:12]}…" for p, i in ((config.parts[0], indexes[0]), (part, index))),
                "rebuild one of them with the other's tokenizer",
            )


def _check_overlap(config: ReshardConfig, indexes: list[dict]) -> None:
    """Raise ShardError if documents would stand twice on the training side: if two parts have a set in common, and
    what was chosen from it does not show that they share none of its documents."""
    lines = [_lineage(part, index) for part, index in zip(config.parts, indexes, strict=True)]
    for (a, mine), (b, other) in combinations(zip(config.parts, lines, strict=True), 2):
        mine, other = _chosen(mine, config.seed), _chosen(other, config.seed)
        for shared in mine.keys() & other.keys():
            if not all(starmap(_disjoint, product(mine[shared], other[shared]))):
                raise ShardError(
                    "documents would stand twice on the training side",
                    f"{a.shards} and {b.shards} both have documents of the set {shared[:12]}…",
                    "leave one out, or choose ranges of `documents` or `fraction` (of one seed) that do not meet",
                )
    digests = [_train_digests(index) for index in indexes]
    for (a, mine, one), (b, other, two) in combinations(zip(config.parts, digests, indexes, strict=True), 2):
        if one["fingerprint"] != two["fingerprint"] and mine.keys() & other.keys():
            name = mine[next(iter(mine.keys() & other.keys()))]
            raise ShardError(
                "documents would stand twice on the training side",
                f"{name} of {a.shards} is also a piece of {b.shards}, byte by byte",
                "leave one out",
            )


def _train_digests(index: dict) -> dict[str, str]:
    return {index["files"][f"{name}.bin"]["sha256"]: name for name in index["sides"]["train"]["pieces"]}


def _lineage(part: Part, index: dict) -> dict:
    """A set that went into another: its fingerprint, what was chosen of it, and the same of those it was made of."""
    made = {"seed": index["seed"], "parts": index["parts"]} if "parts" in index else {}
    return {"shards": index["fingerprint"], **part.choice, **made}


def _chosen(line: dict, seed: int) -> dict[str, list[tuple[dict, int]]]:
    """Of each set that a line comes from, what was chosen of it, and by which seed."""
    found = {line["shards"]: [(line, seed)]}
    for inner in line.get("parts", ()):
        for shards, choices in _chosen(inner, line["seed"]).items():
            found.setdefault(shards, []).extend(choices)
    return found


def _disjoint(one: tuple[dict, int], other: tuple[dict, int]) -> bool:
    """Whether two choices from one set can have no document in common."""
    (a, seed), (b, other_seed) = one, other
    ranges = [(a["documents"], b["documents"])] if "documents" in a and "documents" in b else []
    if "fraction" in a and "fraction" in b and seed == other_seed:
        ranges.append(
            tuple(found if isinstance(found, list) else [0, found] for found in (a["fraction"], b["fraction"]))
        )
    return any(first[1] <= second[0] or second[1] <= first[0] for first, second in ranges)


def _held_out(sources: list[Shards]) -> np.ndarray:
    """The hashes of all held-out documents, sorted: 8 bytes each."""
    return np.unique(np.concatenate([_hashes(s, piece) for s in sources for piece in range(len(s.pieces))]))


def _hashes(source: Shards, piece: int) -> np.ndarray:
    """(documents,) uint64: a hash of the ids of each document of a piece."""
    lengths, offsets = source.piece_index(piece)
    data = memoryview(source.piece_ids(piece)).cast("B")
    ends = offsets + lengths.astype(np.int64) * (len(data) // int(source.piece_tokens[piece]))
    digests = (blake2b(data[a:b], digest_size=8).digest() for a, b in zip(offsets.tolist(), ends.tolist(), strict=True))
    return np.frombuffer(b"".join(digests), "<u8")
