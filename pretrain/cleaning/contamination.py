"""Evaluation texts kept out of a corpus: a document that shares n-grams with one of them is dropped.

As for GPT-3 (Brown et al. 2020, arXiv:2005.14165, appendix C): 13-grams of words, case and punctuation ignored; one in
common is enough. An n-gram that begins with a character of an unspaced script counts 20 characters instead, 11 words of
Chinese (1.84 characters each, as jieba counts). Chosen on text without formulas: of what 12,000 Tang and Song poems
share with 983 others, some is titles of books in notes at 8 and 10 characters, and all is the same lines from 12 on.

Formulas are longer than any n-gram ("was listed on the National Register of Historic Places in 2000" has 13 words), so
long evaluation texts want `share`: how much of an item a document must have, as PaLM asks for 70 % of an item's 8-grams
(Chowdhery et al. 2022, arXiv:2204.02311, section 8). The report counts documents by share.

An evaluation item shorter than an n-gram is looked for whole, down to SHORTEST of its length; what is shorter still
says nothing (GPT-3 has the same floor, 8 words) and is counted in the report. Items are looked for as they are and as
the cleaning steps leave them: a document whose characters were simplified still meets its traditional original.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
from pydantic import Field

from pretrain.cleaning.funnel import draw, excerpt
from pretrain.cleaning.grams import CHARACTER, grams_of, hashes_of, units_of, windows
from pretrain.config import Config
from pretrain.corpus import open_corpus
from pretrain.errors import CorpusError
from pretrain.folders import digests, fingerprint

SHORTEST = 8 / 13
BY_GRAM, WHOLE, TOO_SHORT = "items by n-gram", "items whole", "items too short"
BINS = 20  # of shares, from 0 to 1


class Decontaminate(Config):
    """Which evaluation texts to keep out. A file whose items are not under `text` gets a recipe that says `field:`."""

    files: list[str] = []  # whatever opens as a corpus: text files, recipes; a document of it is an item
    words: int = Field(13, ge=8)
    characters: int = Field(20, ge=8)
    share: float = Field(0, ge=0, le=1)  # of an item's n-grams that a document must have to go; 0: one is enough


@dataclass(frozen=True)
class Match:
    """What a document shares with the evaluation item (its number) of which it has the largest share."""

    item: int
    share: float  # of the item's n-grams
    ngram: str  # the first of them in the document, normalised


class Evaluation:
    """The n-grams of evaluation items. Memory: 12 bytes an n-gram, mapped from a file; about 300 a short item."""

    def __init__(self, folder: Path):
        # (pairs,) uint64, sorted, and (pairs,) int32: the n-grams and the items that have them, each pair once
        self.grams, self.items = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("grams", "items"))
        self.sizes = np.load(folder / "sizes.npy", mmap_mode="r")  # (items,) int32: distinct n-grams
        self.words, self.characters, self.shortest = np.load(folder / "lengths.npy").tolist()
        self._short: dict[int, list[tuple[int, int, int]]] = {}  # first `shortest` units → (units, gram, item)
        for first, units, gram, item in np.load(folder / "short.npy").tolist():
            self._short.setdefault(first, []).append((units, gram, item))
        self._first = np.sort(np.array(list(self._short), np.uint64))

    def find(self, text: str) -> Match | None:
        """The item of which `text` has the largest share, the first of several; None if it shares no n-gram."""
        units = units_of(text)
        hashes = hashes_of(units)
        if self._short and (match := self._find_short(units, hashes)):
            return match
        places, grams = grams_of(hashes, self.words, self.characters)
        hits = _within(grams, self.grams)
        if not hits.any():
            return None
        places, grams = places[hits], grams[hits]
        distinct, items = self._pairs(np.unique(grams))
        held, counts = np.unique(items, return_counts=True)
        shares = np.minimum(1, counts / self.sizes[held])
        item = held[shares.argmax()]
        place = int(places[_within(grams, distinct[items == item])].min())
        length = self.characters if int(hashes[place]) & 1 else self.words
        return Match(int(item), float(shares.max()), _text(units[place : place + length]))

    def _pairs(self, grams: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Each of `grams` with each item that has it, sorted by n-gram."""
        low, high = (np.searchsorted(self.grams, grams, side) for side in ("left", "right"))
        sizes = high - low
        within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return np.repeat(grams, sizes), self.items[np.repeat(low, sizes) + within]

    def _find_short(self, units: list[str], hashes: np.ndarray) -> Match | None:
        begins = windows(hashes, self.shortest)
        for place in np.flatnonzero(_within(begins, self._first)).tolist():
            for length, gram, item in self._short[int(begins[place])]:
                whole = windows(hashes[place : place + length], length)
                if len(whole) and int(whole[0]) == gram:
                    return Match(item, 1.0, _text(units[place : place + length]))
        return None


@dataclass(frozen=True)
class Found:
    """What of the evaluation texts was found. Memory: a few numbers an item."""

    items: Counter[int] = field(default_factory=Counter)  # item → documents dropped for it
    shares: Counter[tuple[int, bool]] = field(default_factory=Counter)  # (bin, dropped) → documents
    examples: dict[int, tuple[str, dict]] = field(default_factory=dict)  # bin → (draw, sample), the smallest draw

    def add(self, match: Match, dropped: bool, where: str, text: str) -> None:
        number = min(BINS - 1, int(match.share * BINS))
        self.shares[number, dropped] += 1
        if dropped:
            self.items[match.item] += 1
        self._offer(number, (draw(where), {"where": where, **asdict(match), "text": excerpt(text)}))

    def merge(self, other: "Found") -> None:
        self.items.update(other.items)
        self.shares.update(other.shares)
        for number, example in other.examples.items():
            self._offer(number, example)

    def _offer(self, number: int, example: tuple[str, dict]) -> None:
        self.examples[number] = min(self.examples.get(number, example), example, key=lambda pair: pair[0])


@dataclass(frozen=True)
class Item:
    file: str  # of the evaluation corpus, and its source: "evals.yaml, ceval"
    where: str


@dataclass(frozen=True)
class Evaluated:
    """Evaluation texts as the report tells of them."""

    items: list[Item]
    files: dict[str, dict[str, int]]  # file → how its items are looked for → how many
    digest: str  # of their n-grams

    def named(self, sample: dict) -> dict:
        """A sample with file and place for the number of its item."""
        return {**sample, "item": asdict(self.items[sample["item"]])}

    def report(self, found: Found, share: float) -> dict:
        """Per file its items, how many were found and the documents that went for them; documents by share."""
        files = {name: {**counts, "items found": 0, "documents dropped": 0} for name, counts in self.files.items()}
        for item, documents in found.items.items():
            counts = files[self.items[item].file]
            counts["items found"] += 1
            counts["documents dropped"] += documents
        return {"share": share, "files": files, "histogram": [self._bin(found, number) for number in range(BINS)]}

    def _bin(self, found: Found, number: int) -> dict:
        dropped, stayed = found.shares[number, True], found.shares[number, False]
        entry = {"from": number / BINS, "to": (number + 1) / BINS, "documents": dropped + stayed, "dropped": dropped}
        example = found.examples.get(number)
        return {**entry, "example": self.named(example[1])} if example else entry


def prepare(config: Decontaminate, variants: list[Callable[[str], str]], folder: Path) -> Evaluated:
    """Write into `folder` what `Evaluation` opens.

    An item is looked for as it is and as each of `variants` makes it. Raises CorpusError for an evaluation file that
    cannot be read or holds nothing.
    """
    items: list[Item] = []
    files: dict[str, dict[str, int]] = {}
    grams, short = [], []
    for path in config.files:
        corpus, before = open_corpus(path), len(items)
        for document in corpus.documents():
            name = path if len(corpus.recipe.sources) == 1 else f"{path}, {document.source}"
            texts = dict.fromkeys([document.text, *(variant(document.text) for variant in variants)])
            hashes = [hashes_of(units_of(text)) for text in texts]
            found = [np.unique(grams_of(h, config.words, config.characters)[1]) for h in hashes]
            whole = [h for h, g in zip(hashes, found, strict=True) if not len(g) and _length(h, config) >= SHORTEST]
            short += [(h, len(items)) for h in whole]
            grams.append([g for g in found if len(g)])
            looked = BY_GRAM if grams[-1] else WHOLE if whole else TOO_SHORT
            files.setdefault(name, dict.fromkeys((BY_GRAM, WHOLE, TOO_SHORT), 0))[looked] += 1
            items.append(Item(name, document.where))
        if len(items) == before:
            raise CorpusError("an evaluation file holds no item", path, "remove it from decontaminate.files")
    folder.mkdir(parents=True)
    _write(folder, config, grams, short)
    return Evaluated(items, files, fingerprint({"files": digests(folder)}))


def _write(folder: Path, config: Decontaminate, grams: list[list[np.ndarray]], short: list) -> None:
    """`grams`: of each item those of each of its variants; `short`: (hashes, item) of what is looked for whole."""
    both = [np.unique(np.concatenate([np.empty(0, np.uint64), *variants])) for variants in grams]
    pairs = np.concatenate(both)
    order = np.argsort(pairs, kind="stable")
    np.save(folder / "grams.npy", pairs[order])
    np.save(
        folder / "items.npy", np.repeat(np.arange(len(both), dtype=np.int32), [len(found) for found in both])[order]
    )
    np.save(folder / "sizes.npy", np.array([min(map(len, variants), default=1) for variants in grams], np.int32))
    shortest = min((len(hashes) for hashes, _ in short), default=1)
    wholes = [(windows(h, shortest)[0], len(h), windows(h, len(h))[0], item) for h, item in short]
    np.save(folder / "short.npy", np.array(wholes, np.uint64).reshape(-1, 4))
    np.save(folder / "lengths.npy", np.array([config.words, config.characters, shortest]))


def _length(hashes: np.ndarray, config: Decontaminate) -> float:
    """How long a text is, in n-grams: 8 words of 13 and 10 characters of 20 make 1.1."""
    characters = int((hashes & np.uint64(1)).sum())
    return (len(hashes) - characters) / config.words + characters / config.characters


def _within(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """(values,) bool: which of them are in the sorted array `known`."""
    if not len(known):
        return np.zeros(len(values), bool)
    return known[np.minimum(np.searchsorted(known, values), len(known) - 1)] == values


def _text(units: list[str]) -> str:
    """Units as one reads them: words apart, characters of an unspaced script together."""
    text = units[0]
    for before, unit in pairwise(units):
        text += unit if CHARACTER.match(before) and CHARACTER.match(unit) else f" {unit}"
    return text
