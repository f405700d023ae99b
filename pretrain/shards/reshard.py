"""Make one shard set from several sets or parts of sets. Neither the text nor the tokenizer is needed.

    parts:
      - {shards: runs/wiki/shards}
      - {shards: runs/web/shards, fraction: 0.25}

`fraction` chooses training documents. The held-out side of each set stays whole, so that scores of runs on parts of a
set can be compared. `files` chooses documents of both sides by the file that they came from. A piece is linked, not
copied, if all of its documents are chosen. The index names every set that was used, the choice from each set, and the
sets that each set was made from in turn.

No document is on both sides. If the sets were split by different rules, every document is hashed, and a training
document that another set holds out is dropped and counted.
"""

import json
from collections.abc import Callable
from fnmatch import fnmatchcase
from hashlib import blake2b
from itertools import combinations
from pathlib import Path

import numpy as np
from pydantic import Field, model_validator

from pretrain.config import Config, StageConfig
from pretrain.corpus import SIDES
from pretrain.display.progress import progress
from pretrain.errors import ShardError
from pretrain.hashing import CHOICE, hash64
from pretrain.shards.reader import ORIGIN, Shards, sidecars
from pretrain.shards.writer import SideWriter, write_shards_index
from pretrain.storage.files import digest, lies_in
from pretrain.storage.publish import publish

COPY_TOKENS = 1 << 22  # tokens copied at a time


class ReshardPart(Config):
    """A set, or the documents of a set that meet all conditions given here."""

    shards: str
    """The folder of a shard set."""
    files: list[str] | None = Field(None, min_length=1)
    """Patterns such as `zh/*.jsonl`: only documents from files that match one of them are taken."""
    fraction: float | tuple[float, float] | None = None
    """The share of the training documents that is taken: 0.25 takes a quarter, and `[0.25, 1]` takes the others. Each
    document has a hash of `seed` and its number, uniform in [0, 1), and is taken if the hash lies in the range. So 0.2
    includes all documents of 0.1."""

    @model_validator(mode="after")
    def _range(self) -> "ReshardPart":
        first, last = self.range
        if not 0 <= first < last <= 1:
            raise ValueError(f"fraction = {self.fraction} must be a range within 0 and 1 that is not empty")
        return self

    @property
    def range(self) -> tuple[float, float]:
        """The range of hashes that are taken."""
        whole = 1.0 if self.fraction is None else self.fraction
        return whole if isinstance(whole, tuple) else (0.0, whole)

    @property
    def choice(self) -> dict:
        """The conditions in the form that the index records."""
        return self.model_dump(mode="json", exclude={"shards"}, exclude_none=True)


class ReshardConfig(StageConfig):
    """The configuration of the stage `reshard`."""

    parts: list[ReshardPart] = Field(min_length=1)
    """The sets, or parts of sets, that are joined."""
    out: str
    """The folder for the new set."""
    seed: int = Field(0, ge=0, lt=2**64)
    """The seed of the hashes that `fraction` compares."""
    piece_tokens: int = Field(1 << 30, gt=0)
    """The tokens of a piece that is written anew. The document that reaches this number is the last of its piece."""


def run(config: ReshardConfig) -> dict:
    """Publish the set that `config` describes. Returns its index. Raises ShardError."""
    _check_out(config)
    sources = [{side: Shards(part.shards, side) for side in SIDES} for part in config.parts]
    indexes = [source["train"].index for source in sources]
    first = indexes[0]
    _check_tokenizers(config, indexes)
    _check_twice(config, indexes)
    mark = _pair_mark(config, indexes)
    kept = [name for name in ("raw", "origin") if name == "origin" or all(name in sidecars(index) for index in indexes)]
    places, numbers = _places([source["train"] for source in sources])
    chosen = [_files(source["train"], part) for source, part in zip(sources, config.parts, strict=True)]
    alike = _split_alike(indexes)
    held = None if alike else _held_out([source["heldout"] for source in sources])
    with publish(Path(config.out), "shards", ShardError, config) as folder:
        sides: dict[str, dict] = {}
        known: dict[str, dict] = {}
        dropped = 0
        for side in SIDES:
            writer = SideWriter(folder, side, first["dtype"], first["vocab_size"], config.piece_tokens, kept)
            with progress(f"{side} side", "pieces", sum(len(source[side].pieces) for source in sources)) as advance:
                for part, source, files, rows in zip(config.parts, sources, chosen, numbers, strict=True):
                    choose = _chooser(source[side], part, files, config.seed)
                    dropped += _write(writer, source[side], choose, rows, held, advance)
            sides[side] = writer.close()
            known |= writer.digests
            if not sides[side]["documents"]:
                said = [f"{part.shards}: {part.choice}" for part in config.parts]
                raise ShardError(f"no document is chosen for the {side} side", *said, "choose more documents")
        index = write_shards_index(
            folder,
            first,
            kept,
            sides,
            places,
            known,
            recorded={
                "parts": [part.shards for part in config.parts],
                "tokenizer": first.get("recorded", {}).get("tokenizer", ""),
                **_described(indexes),
            },
            split=first.get("split") if alike else None,
            dropped=dropped,
            seed=config.seed,
            parts=[_lineage(part, found) for part, found in zip(config.parts, indexes, strict=True)],
            **({"pair_mark": mark} if mark else {}),
        )
    for side, found in sides.items():
        print(f"{side}: {found['documents']:,} documents, {found['tokens']:,} tokens")
    if dropped:
        print(f"dropped: {dropped:,} training documents that another set holds out")
    return index


def _lineage(part: ReshardPart, index: dict) -> dict:
    """The index's record of a part: its fingerprint, the choice, and the same record of the sets it was made from."""
    made = {"seed": index["seed"], "parts": index["parts"]} if "parts" in index else {}
    return {"shards": index["fingerprint"], **part.choice, **made}


def _described(indexes: list[dict]) -> dict:
    """The name and the sources of all sets, for a model card; empty if one of the sets does not record its sources.

    A part may leave out every document of a source, so the text need not be from all sources listed.
    """
    described = [index.get("recorded", {}) for index in indexes]
    if not all("sources" in one for one in described):
        return {}
    sources = {json.dumps(source, sort_keys=True): source for one in described for source in one["sources"]}
    return {
        "name": ", ".join(dict.fromkeys(one.get("name", "") for one in described)),
        "sources": list(sources.values()),
    }


# Which documents are chosen


Choose = Callable[[int], np.ndarray]  # piece → (documents,) bool


def _files(source: Shards, part: ReshardPart) -> np.ndarray | None:
    """(files,) bool: the files of the set that the patterns of `part` match."""
    if part.files is None:
        return None
    places = [place.rpartition(", ")[0] for place in source.places]
    for pattern in part.files:
        if not any(fnmatchcase(place, pattern) for place in places):
            some = ", ".join(places[:8]) + (", …" if len(places) > 8 else "")
            remedy = "correct the pattern in parts: files"
            raise ShardError(f"no document came from a file {pattern!r}", f"{part.shards} has {some}", remedy)
    return np.array([any(fnmatchcase(place, pattern) for pattern in part.files) for place in places])


def _chooser(source: Shards, part: ReshardPart, files: np.ndarray | None, seed: int) -> Choose:
    """A function that says which documents of a piece `part` chooses."""
    low, high = (int(share * 2**64) for share in part.range)

    def choose(piece: int) -> np.ndarray:
        numbers = source.numbers(piece)
        chosen = np.ones(len(numbers), dtype=bool)
        if files is not None:
            chosen &= files[source.sidecar(piece, "origin")["file"]]
        if source.side == "train" and part.fraction is not None:
            hashes = hash64(CHOICE, seed, numbers)
            chosen &= (hashes >= low) & (hashes < high)
        return chosen

    return choose


# Writing


def _write(
    writer: SideWriter, source: Shards, choose: Choose, files: np.ndarray, held: np.ndarray | None, advance: Callable
) -> int:
    """Write the chosen documents of one side of a set. Returns the number of documents dropped because of `held`."""
    whole, dropped = [], 0
    for piece in range(len(source.pieces)):
        chosen = choose(piece)
        if held is not None and source.side == "train":
            unseen = ~np.isin(_hashes(source, piece), held)
            dropped += int((chosen & ~unseen).sum())
            chosen &= unseen
        if chosen.all():
            whole.append(piece)
            same = source.has_origins and np.array_equal(files, np.arange(len(files)))
            writer.take(source, piece, {} if same else {"origin": _origins(source, piece, files)})
        elif chosen.any():
            _check_piece(source, piece)
            _copy(writer, source, piece, chosen, files)
        advance(1)
    if len(whole) == len(source.pieces):
        writer.unigram += source.unigram()
    else:
        for piece in whole:
            for part in np.array_split(source.piece_ids(piece), source.piece_tokens[piece] // COPY_TOKENS + 1):
                writer.unigram += np.bincount(part, minlength=len(writer.unigram))
    return dropped


def _check_piece(source: Shards, piece: int) -> None:
    """Raise ShardError if a byte of a piece has changed since it was made: a copy would hide this with new digests."""
    for end in ("bin", "idx", *(f"{name}.npy" for name in sidecars(source.index))):
        name = f"{source.pieces[piece]}.{end}"
        if digest(source.folder / name) != source.index["files"][name]:
            raise ShardError(
                f"{source.folder / name} was altered after it was made", "copy it again, or rebuild the set"
            )


def _copy(writer: SideWriter, source: Shards, piece: int, chosen: np.ndarray, files: np.ndarray) -> None:
    """Add the chosen documents of a piece, about COPY_TOKENS tokens at a time."""
    ids, lengths = source.piece_ids(piece), source.piece_index(piece)[0]
    rows = {"origin": _origins(source, piece, files)}
    if "raw" in sidecars(source.index):
        rows["raw"] = source.sidecar(piece, "raw")
    ends = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
    cuts = np.flatnonzero(np.diff(ends[1:] // COPY_TOKENS)) + 1
    for first, last in zip([0, *cuts.tolist()], [*cuts.tolist(), len(lengths)], strict=True):
        here = chosen[first:last]
        tokens = ids[ends[first] : ends[last]][here.repeat(lengths[first:last])]
        writer.add(tokens, lengths[first:last][here], {name: row[first:last][here] for name, row in rows.items()})


# Origins of documents


def _places(sources: list[Shards]) -> tuple[list[str], list[np.ndarray]]:
    """One table of the places of all sets, and for each set the row numbers of its own places in this table.

    If two sets name the same place, the name in the later set gets the fingerprint of its set in front. A set without
    origins gets one place: its fingerprint, and the number of each document in the set.
    """
    of: dict[str, str] = {}  # place → fingerprint of the set
    named = []
    for source in sources:
        mark = source.fingerprint[:12]
        own = source.places if source.has_origins else [f"shards {mark}, document"]
        named.append([place if of.get(place, mark) == mark else f"{mark}: {place}" for place in own])
        of |= dict.fromkeys(named[-1], mark)
    number = {place: n for n, place in enumerate(of)}
    return list(of), [np.array([number[place] for place in places], np.uint32) for places in named]


def _origins(source: Shards, piece: int, files: np.ndarray) -> np.ndarray:
    """The rows of a piece's sidecar `origin`, with its files renumbered by `files`."""
    numbers = source.numbers(piece)
    rows = np.zeros(len(numbers), ORIGIN)
    if source.has_origins:
        known = source.sidecar(piece, "origin")
        rows["file"], rows["number"] = files[known["file"]], known["number"]
    else:
        rows["file"], rows["number"] = files[0], numbers
    return rows


# Checks


def _check_out(config: ReshardConfig) -> None:
    for part in config.parts:
        if lies_in(config.out, part.shards) or lies_in(part.shards, config.out):
            raise ShardError(
                "the output folder is one of its own parts, or lies inside one",
                f"out = {config.out}, shards = {part.shards}",
                "choose another out=",
            )


def _check_tokenizers(config: ReshardConfig, indexes: list[dict]) -> None:
    for part, index in zip(config.parts, indexes, strict=True):
        if index["tokenizer"] != indexes[0]["tokenizer"]:
            raise ShardError(
                "the sets were built with different tokenizers",
                *(f"{p.shards}: {i['tokenizer'][:12]}…" for p, i in ((config.parts[0], indexes[0]), (part, index))),
                "rebuild one of them with the other's tokenizer",
            )


def _pair_mark(config: ReshardConfig, indexes: list[dict]) -> str | None:
    """The mark between the inputs and the outputs of labelled pairs, which is one in all sets that have pairs."""
    both = zip(config.parts, indexes, strict=True)
    marks = {index["pair_mark"]: part.shards for part, index in both if "pair_mark" in index}
    if len(marks) > 1:
        raise ShardError(
            "the labelled pairs of the sets have different marks",
            *(f"{shards}: pair_mark = {mark}" for mark, shards in marks.items()),
            "build one of them again with the other's pair_mark",
        )
    return next(iter(marks), None)


def _check_twice(config: ReshardConfig, indexes: list[dict]) -> None:
    """Raise ShardError if two parts are the same set, were made from a common set, or have an equal piece."""
    for (a, one), (b, other) in combinations(zip(config.parts, map(_ancestry, indexes), strict=True), 2):
        for shared in one.keys() & other.keys():
            raise ShardError(
                "documents would be in the result twice",
                f"{a.shards} and {b.shards} both contain {one[shared]}",
                "leave one of them out; to weight sets against each other, train on several corpora (data.corpora)",
            )


def _ancestry(index: dict) -> dict[str, str]:
    """Digest → description, for a set, for every set that it was made from, and for its pieces."""
    found, lines = {}, [{"shards": index["fingerprint"], "parts": index.get("parts", ())}]
    while lines:
        line = lines.pop()
        found[line["shards"]] = f"documents of the set {line['shards'][:12]}…"
        lines += line.get("parts", ())
    pieces = [piece for side in index["sides"].values() for piece in side["pieces"]]
    return {index["files"][f"{piece}.bin"]["sha256"]: f"the bytes of {piece}.bin" for piece in pieces} | found


def _split_alike(indexes: list[dict]) -> bool:
    """Whether one rule, which reads only the text, decides the side of a document in all sets."""
    splits = [index.get("split") for index in indexes]
    # A source may have a rule of its own, so a text in two sources may be held out in only one of them.
    known = all(split is not None and "sources" not in split for split in splits)
    return len(splits) == 1 or (known and all(split == splits[0] for split in splits))


def _held_out(sources: list[Shards]) -> np.ndarray:
    """The hashes of all held-out documents, sorted: 8 bytes each."""
    return np.unique(np.concatenate([_hashes(s, piece) for s in sources for piece in range(len(s.pieces))]))


def _hashes(source: Shards, piece: int) -> np.ndarray:
    """(documents,) uint64: a hash of the ids of each document of a piece."""
    lengths, offsets = source.piece_index(piece)
    data = source.piece_ids(piece).data.cast("B")
    ends = offsets + lengths.astype(np.int64) * (len(data) // int(source.piece_tokens[piece]))
    digests = (blake2b(data[a:b], digest_size=8).digest() for a, b in zip(offsets.tolist(), ends.tolist(), strict=True))
    return np.frombuffer(b"".join(digests), "<u8")
