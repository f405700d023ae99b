"""Evaluation texts kept out of a corpus: a document that shares an n-gram with one of them is dropped.

As for GPT-3 (Brown et al. 2020, arXiv:2005.14165, appendix C): 13-grams of words, case and punctuation ignored. An
n-gram that begins with a character of an unspaced script counts characters instead. An evaluation item shorter than
that is looked for whole, down to SHORTEST of the length; what is shorter still says nothing (GPT-3 has the same floor,
8 words) and is counted in the report.

Items are looked for as they are and as the cleaning steps leave them, so that a document whose characters were
simplified still meets its traditional original.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from pydantic import Field

from pretrain.cleaning.grams import CHARACTER, grams_of, hashes_of, units_of, windows
from pretrain.config import Config
from pretrain.corpus import open_corpus
from pretrain.errors import CorpusError
from pretrain.folders import digests, fingerprint

SHORTEST = 8 / 13
BY_GRAM, WHOLE, TOO_SHORT = "items by n-gram", "items whole", "items too short"


class Decontaminate(Config):
    """Which evaluation texts to keep out. A file whose items are not under `text` gets a recipe that says `field:`."""

    files: list[str] = []  # whatever opens as a corpus: text files, recipes; a document of it is an item
    words: int = Field(13, ge=8)
    characters: int = Field(20, ge=8)


@dataclass(frozen=True)
class Item:
    file: str  # of the evaluation corpus, and its source: "evals.yaml, ceval"
    where: str


@dataclass(frozen=True)
class Match:
    """What a document shares with an evaluation item (its number): the n-gram, normalised."""

    item: int
    gram: str


class Evaluation:
    """The n-grams of evaluation items. Memory: 12 bytes an n-gram, mapped from a file; about 300 a short item."""

    def __init__(self, folder: Path):
        self.grams = np.load(folder / "grams.npy", mmap_mode="r")  # (G,) uint64, sorted, distinct
        self.items = np.load(folder / "items.npy", mmap_mode="r")  # (G,) int32: the first item that has it
        self.words, self.characters, self.shortest = np.load(folder / "lengths.npy").tolist()
        self._short: dict[int, list[tuple[int, int, int]]] = {}  # first `shortest` units → (units, gram, item)
        for first, units, gram, item in np.load(folder / "short.npy").tolist():
            self._short.setdefault(first, []).append((units, gram, item))
        self._first = np.sort(np.array(list(self._short), np.uint64))

    def find(self, text: str) -> Match | None:
        """The first n-gram of `text` that an item has too."""
        units = units_of(text)
        hashes = hashes_of(units)
        places, grams = grams_of(hashes, self.words, self.characters)
        hits = np.flatnonzero(_within(grams, self.grams))
        if len(hits):
            hit = hits[np.argmin(places[hits])]
            place = int(places[hit])
            length = self.characters if int(hashes[place]) & 1 else self.words
            return Match(int(self.items[np.searchsorted(self.grams, grams[hit])]), _text(units[place : place + length]))
        return self._find_short(units, hashes) if self._short else None

    def _find_short(self, units: list[str], hashes: np.ndarray) -> Match | None:
        begins = windows(hashes, self.shortest)
        for place in np.flatnonzero(_within(begins, self._first)).tolist():
            for length, gram, item in self._short[int(begins[place])]:
                whole = windows(hashes[place : place + length], length)
                if len(whole) and int(whole[0]) == gram:
                    return Match(item, _text(units[place : place + length]))
        return None


def prepare(config: Decontaminate, variants: list[Callable[[str], str]], folder: Path) -> "Evaluated":
    """Write into `folder` what `Evaluation` opens.

    An item is looked for as it is and as each of `variants` makes it. Raises CorpusError for an evaluation file that
    cannot be read or holds nothing.
    """
    items: list[Item] = []
    files: dict[str, dict[str, int]] = {}
    grams, owners, short = [], [], []
    for path in config.files:
        corpus, before = open_corpus(path), len(items)
        for document in corpus.documents():
            name = path if len(corpus.recipe.sources) == 1 else f"{path}, {document.source}"
            looked = TOO_SHORT
            for text in dict.fromkeys([document.text, *(variant(document.text) for variant in variants)]):
                hashes = hashes_of(units_of(text))
                _, found = grams_of(hashes, config.words, config.characters)
                if len(found):
                    looked = BY_GRAM
                    grams.append(found)
                    owners.append(np.full(len(found), len(items), np.int32))
                elif _share(hashes, config) >= SHORTEST:
                    looked = WHOLE if looked == TOO_SHORT else looked
                    short.append((hashes, len(items)))
            files.setdefault(name, dict.fromkeys((BY_GRAM, WHOLE, TOO_SHORT), 0))[looked] += 1
            items.append(Item(name, document.where))
        if len(items) == before:
            raise CorpusError("an evaluation file holds no item", path, "remove it from decontaminate.files")
    folder.mkdir(parents=True)
    _write(folder, config, grams, owners, short)
    return Evaluated(items, files, fingerprint({"files": digests(folder)}))


@dataclass(frozen=True)
class Evaluated:
    """Evaluation texts as the report tells of them."""

    items: list[Item]
    files: dict[str, dict[str, int]]  # file → how its items are looked for → how many
    digest: str  # of their n-grams

    def name(self, samples: list[tuple[str, dict]]) -> None:
        """Put files and places for the item numbers in `samples`, (draw, sample) each."""
        for _, sample in samples:
            sample["item"] = asdict(self.items[sample["item"]])

    def report(self, dropped: Counter[int]) -> dict:
        """Per file: its items, how many were found in the corpus, and the documents that went; `dropped` by item."""
        found = {name: {**counts, "items found": 0, "documents dropped": 0} for name, counts in self.files.items()}
        for item, documents in dropped.items():
            counts = found[self.items[item].file]
            counts["items found"] += 1
            counts["documents dropped"] += documents
        return found


def _write(folder: Path, config: Decontaminate, grams: list, owners: list, short: list) -> None:
    distinct, first = np.unique(np.concatenate([np.empty(0, np.uint64), *grams]), return_index=True)
    np.save(folder / "grams.npy", distinct)
    np.save(folder / "items.npy", np.concatenate([np.empty(0, np.int32), *owners])[first])
    shortest = min((len(hashes) for hashes, _ in short), default=1)
    wholes = [(windows(h, shortest)[0], len(h), windows(h, len(h))[0], item) for h, item in short]
    np.save(folder / "short.npy", np.array(wholes, np.uint64).reshape(-1, 4))
    np.save(folder / "lengths.npy", np.array([config.words, config.characters, shortest]))


def _share(hashes: np.ndarray, config: Decontaminate) -> float:
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
