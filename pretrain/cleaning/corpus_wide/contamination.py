"""Keep evaluation texts out of a corpus: drop every document that shares n-grams with one of them.

The method is GPT-3's (Brown et al. 2020, arXiv:2005.14165, appendix C): 13-grams of words, without case and
punctuation; one n-gram in common is enough. An n-gram that begins with a character of an unspaced script has 20
characters instead. That is 11 words of Chinese, with 1.84 characters a word by jieba's count. We chose the length on
text without formulas, by the n-grams that 12,000 Tang and Song poems share with 983 others: at 8 and 10 characters some
of them are titles of books in notes; from 12 characters on, all of them are the same lines.

Formulas are longer than any n-gram ("was listed on the National Register of Historic Places in 2000" has 13 words). For
long evaluation texts, set `share`: a document must then have this share of an item's n-grams, as PaLM asks for 70 % of
an item's 8-grams (Chowdhery et al. 2022, arXiv:2204.02311, section 8). The report counts documents by share.

An evaluation item shorter than an n-gram is searched as a whole, if it has at least SHORTEST of an n-gram's length.
Still shorter items prove nothing (GPT-3 has the same floor, 8 words); the report counts them. Every item is searched as
it is and as the cleaning steps leave it, so a document that was converted to simplified characters still matches its
traditional original.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path

import numpy as np
from pydantic import Field

from pretrain.cleaning.corpus_wide.ngrams import CHARACTER, grams_of, unit_hashes, units_of, windows
from pretrain.cleaning.report.funnel import draw, excerpt
from pretrain.config import Config
from pretrain.corpus import open_corpus
from pretrain.errors import CorpusError
from pretrain.storage.index import digests, fingerprint

SHORTEST = 8 / 13
BY_GRAM, WHOLE, TOO_SHORT = "items by n-gram", "items whole", "items too short"
BINS = 20  # bins of the histogram of shares, from 0 to 1


class Decontaminate(Config):
    """Keep evaluation texts out of the corpus: documents that share n-grams with them are dropped."""

    files: list[str] = []
    """The evaluation texts: text files, or recipes (which can set `field:`). Each of their documents is an item."""
    words: int = Field(13, ge=8, lt=1 << 31)
    """Words in an n-gram."""
    characters: int = Field(20, ge=8, lt=1 << 31)
    """Characters in an n-gram of Chinese and other scripts without spaces."""
    share: float = Field(0, ge=0, le=1)
    """A document is dropped if it has at least this share of an item's n-grams; at 0, one n-gram is enough."""


@dataclass(frozen=True)
class Match:
    """The evaluation item of which a document has the largest share."""

    item: int  # its number
    share: float  # of the item's n-grams
    ngram: str  # the first shared n-gram in the document, normalised


class Evaluation:
    """The n-grams of all evaluation items. An item has one or more forms: as it is, and as cleaning steps leave it.

    Memory: 12 bytes an n-gram in mapped files, about 300 a short item, and 16 MB.
    """

    def __init__(self, folder: Path):
        # (pairs,) uint64, sorted, and (pairs,) int32: every pair of an n-gram and a form that has it
        self.grams, self.forms = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("grams", "forms"))
        # (forms,) int32: the number of distinct n-grams of each form, and its item
        self.sizes, self.items = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("sizes", "items"))
        self.words, self.characters, self.shortest = np.load(folder / "lengths.npy").tolist()
        self._short: dict[int, list[tuple[int, int, int]]] = {}  # first `shortest` units → (units, gram, item)
        for first, units, gram, item in np.load(folder / "short.npy").tolist():
            self._short.setdefault(first, []).append((units, gram, item))
        self._first = _Set(np.sort(np.array(list(self._short), np.uint64)))
        self._all = _Set(self.grams)

    def find(self, text: str) -> Match | None:
        """The item of which `text` has the largest share, or the first of several; None if no n-gram is shared."""
        hashes = unit_hashes(text)
        if self._short and (match := self._find_short(text, hashes)):
            return match
        places, grams = grams_of(hashes, self.words, self.characters)
        hits = self._all.has(grams)
        if not hits.any():
            return None
        places, grams = places[hits], grams[hits]
        distinct, forms = self._pairs(np.unique(grams))
        held, counts = np.unique(forms, return_counts=True)
        shares = counts / self.sizes[held]
        form = held[shares.argmax()]
        place = int(places[np.isin(grams, distinct[forms == form])].min())
        length = self.characters if int(hashes[place]) & 1 else self.words
        return Match(int(self.items[form]), float(shares.max()), _text(units_of(text)[place : place + length]))

    def _pairs(self, grams: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pair each of `grams` with each form that has it, sorted by n-gram."""
        low, high = (np.searchsorted(self.grams, grams, side) for side in ("left", "right"))
        sizes = high - low
        within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return np.repeat(grams, sizes), self.forms[np.repeat(low, sizes) + within]

    def _find_short(self, text: str, hashes: np.ndarray) -> Match | None:
        begins = windows(hashes, self.shortest)
        for place in np.flatnonzero(self._first.has(begins)).tolist():
            for length, gram, item in self._short[int(begins[place])]:
                whole = windows(hashes[place : place + length], length)
                if len(whole) and int(whole[0]) == gram:
                    return Match(item, 1.0, _text(units_of(text)[place : place + length]))
        return None


@dataclass(frozen=True)
class FoundTexts:
    """Counts of the evaluation texts that were found in documents. Memory: a few numbers an item."""

    items: Counter[int] = field(default_factory=Counter)  # item → documents dropped for it
    shares: Counter[tuple[int, bool]] = field(default_factory=Counter)  # (bin, dropped) → documents
    examples: dict[int, tuple[str, dict]] = field(default_factory=dict)  # bin → (draw, sample) with the smallest draw

    def add(self, match: Match, dropped: bool, where: str, text: str) -> None:
        number = min(BINS - 1, int(match.share * BINS))
        self.shares[number, dropped] += 1
        if dropped:
            self.items[match.item] += 1
        self._offer(number, (draw(where), {"where": where, **asdict(match), "text": excerpt(text)}))

    def merge(self, other: "FoundTexts") -> None:
        self.items.update(other.items)
        self.shares.update(other.shares)
        for number, example in other.examples.items():
            self._offer(number, example)

    def _offer(self, number: int, example: tuple[str, dict]) -> None:
        self.examples[number] = min(self.examples.get(number, example), example, key=lambda pair: pair[0])


@dataclass(frozen=True)
class Item:
    """The place of an evaluation item."""

    file: str  # the evaluation file, and its source if it has several: "evals.yaml, ceval"
    where: str


@dataclass(frozen=True)
class Evaluated:
    """The evaluation texts, as the report needs them."""

    items: list[Item]
    files: dict[str, dict[str, int]]  # file → way of searching (BY_GRAM, WHOLE, TOO_SHORT) → number of items
    digest: str  # of all their n-grams

    def named(self, sample: dict) -> dict:
        """A sample with its item's file and place instead of its number."""
        return {**sample, "item": asdict(self.items[sample["item"]])}

    def report(self, found: FoundTexts, share: float) -> dict:
        """The number of items, of found items and of dropped documents of each file, and a histogram of the shares."""
        files = {name: {**counts, "items found": 0, "documents dropped": 0} for name, counts in self.files.items()}
        for item, documents in found.items.items():
            counts = files[self.items[item].file]
            counts["items found"] += 1
            counts["documents dropped"] += documents
        return {"share": share, "files": files, "histogram": [self._bin(found, number) for number in range(BINS)]}

    def _bin(self, found: FoundTexts, number: int) -> dict:
        dropped, stayed = found.shares[number, True], found.shares[number, False]
        entry = {"from": number / BINS, "to": (number + 1) / BINS, "documents": dropped + stayed, "dropped": dropped}
        example = found.examples.get(number)
        return {**entry, "example": self.named(example[1])} if example else entry


def prepare(config: Decontaminate, variants: Sequence[Callable[[str], str]], folder: Path) -> Evaluated:
    """Write the files of an `Evaluation` into `folder`.

    Each item has a form as it is, and a form by each of `variants`. Raises CorpusError for an evaluation file that
    cannot be read or holds no item.
    """
    items: list[Item] = []
    files: dict[str, dict[str, int]] = {}
    forms: list[tuple[int, np.ndarray]] = []  # (item, distinct n-grams of one of its forms)
    short: list[tuple[int, np.ndarray]] = []  # (item, unit hashes) of the forms that are searched as a whole
    for path in config.files:
        corpus, before = open_corpus(path), len(items)
        for document in corpus.documents():
            name = path if len(corpus.recipe.sources) == 1 else f"{path}, {document.source}"
            looked = TOO_SHORT
            for text in dict.fromkeys([document.text, *(variant(document.text) for variant in variants)]):
                hashes = unit_hashes(text)
                grams = np.unique(grams_of(hashes, config.words, config.characters)[1])
                if len(grams):
                    looked = BY_GRAM
                    forms.append((len(items), grams))
                elif _length(hashes, config) >= SHORTEST:
                    looked = WHOLE if looked == TOO_SHORT else looked
                    short.append((len(items), hashes))
            files.setdefault(name, dict.fromkeys((BY_GRAM, WHOLE, TOO_SHORT), 0))[looked] += 1
            items.append(Item(name, document.where))
        if len(items) == before:
            raise CorpusError("an evaluation file holds no item", path, "remove it from decontaminate.files")
    folder.mkdir(parents=True)
    _write(folder, config, _distinct(forms), short)
    return Evaluated(items, files, fingerprint({"files": digests(folder)}))


def _distinct(forms: list[tuple[int, np.ndarray]]) -> list[tuple[int, np.ndarray]]:
    """Drop the forms with the same n-grams as an earlier form of their item.

    Most forms are dropped, because n-grams ignore case and width.
    """
    found: dict[tuple[int, bytes], np.ndarray] = {}
    for item, grams in forms:
        found.setdefault((item, blake2b(grams.data, digest_size=16).digest()), grams)
    return [(item, grams) for (item, _), grams in found.items()]


def _write(folder: Path, config: Decontaminate, forms: list, short: list) -> None:
    grams = np.concatenate([np.empty(0, np.uint64), *(grams for _, grams in forms)])
    sizes = np.array([len(grams) for _, grams in forms], np.int32)
    order = np.argsort(grams, kind="stable")
    np.save(folder / "grams.npy", grams[order])
    np.save(folder / "forms.npy", np.repeat(np.arange(len(forms), dtype=np.int32), sizes)[order])
    np.save(folder / "sizes.npy", sizes)
    np.save(folder / "items.npy", np.array([item for item, _ in forms], np.int32))
    shortest = min((len(hashes) for _, hashes in short), default=1)
    wholes = [(windows(h, shortest)[0], len(h), windows(h, len(h))[0], item) for item, h in short]
    np.save(folder / "short.npy", np.array(wholes, np.uint64).reshape(-1, 4))
    np.save(folder / "lengths.npy", np.array([config.words, config.characters, shortest]))


def _length(hashes: np.ndarray, config: Decontaminate) -> float:
    """The length of a text in n-grams: 8 of 13 words and 10 of 20 characters make 1.1."""
    characters = int((hashes & np.uint64(1)).sum())
    return (len(hashes) - characters) / config.words + characters / config.characters


class _Set:
    """A set of numbers: a sorted array, with a table of the numbers' first bits, so that most lookups need no search.

    Memory: the table has 16 to 32 bytes a number, at most 16 MB.
    """

    def __init__(self, known: np.ndarray):
        self._known = known
        bits = min(24, max(8, len(known).bit_length() + 4))
        self._shift = np.uint64(64 - bits)
        self._table = np.zeros(1 << bits, bool)
        self._table[known >> self._shift] = True

    def has(self, values: np.ndarray) -> np.ndarray:
        """(values,) bool: whether each value is in the set."""
        found = self._table[values >> self._shift]
        near = values[found]
        found[found] = self._known[np.minimum(np.searchsorted(self._known, near), len(self._known) - 1)] == near
        return found


def _text(units: list[str]) -> str:
    """Units as readable text: spaces between words, none between characters of unspaced scripts."""
    text = units[0]
    for before, unit in pairwise(units):
        text += unit if CHARACTER.match(before) and CHARACTER.match(unit) else f" {unit}"
    return text
