"""Count the words of a corpus, and list the symbols that spell them: the input of training.

The corpus is counted in chunks, in any number of processes, in bounded memory. If it has more distinct words than
`max_distinct` allows, fewer documents are counted. The text alone decides which ones:

- A hash of its text and `seed` gives each train document a level. Half of them have level 0, a quarter level 1, …
- Words are counted for each level. While the levels together have more than `max_distinct` words, the lowest level is
  dropped, and its documents are skipped from then on.

Counts only grow. A level that is dropped early, because the levels from it upwards had too many words, would also be
dropped at the end. So dropping early gives the same result as deciding at the end, and the order of files, of documents
and of results from the processes does not matter. The documents that are counted are a fair sample of 1/2, 1/4, ….
"""

import hashlib
import re
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import islice
from operator import attrgetter

import numpy as np

from pretrain.corpus import CHUNK_BYTES, SIDES, Chunk, CleanedCorpus, Corpus, Document, Shares, Skipped, listing
from pretrain.corpus.spool import Spool
from pretrain.display.progress import progress
from pretrain.errors import TokenizerError
from pretrain.processes.pool import noted, ordered
from pretrain.tokenizer.fast.cut import BEGIN, BertWords, ByteWords, CutText
from pretrain.tokenizer.kinds import PREFIX, SPECIALS, WORD_CHARACTERS, Rules, build, byte_of_symbol, words_of
from pretrain.tokenizer.training.tally import BREAK, Tally

MAX_DISTINCT = 12_000_000  # takes 2.2 GB for 110 MB of Chinese of kind byte; 3.5 GB if all words are short and distinct
LEVELS = 17  # the last level contains all rarer hashes: 1 document in 65,536
SLACK = 1.25  # distinct words are counted exactly when the upper bound exceeds max_distinct by this factor
BATCH = 1 << 16  # characters that are split at a time, so that their arrays stay in the cache
LINE_END = re.compile(r"\n(?=\S)")
WORDS = 1 << 15  # words that are processed at a time


@dataclass(frozen=True)
class Counted:
    """The counted words of a corpus, and statistics of the text that was read."""

    words: Counter[str]  # exactly the words that the finished tokenizer passes to WordPiece
    seen: dict[str, Counter]  # side → documents, characters, bytes
    sample: dict  # how much of the train side was counted
    skipped: Skipped  # records that gave no document
    shares: Shares  # documents and bytes of each side, by source

    def report(self) -> dict:
        """For report.json. Call it after `drop_unspellable`."""
        return {"train": {**self.seen["train"], "distinct_words": len(self.words), "counted": self.sample}}


@dataclass
class _Part:
    """The counts of one chunk, or of all chunks."""

    seen: dict[str, Counter] = field(default_factory=lambda: {side: Counter() for side in SIDES})
    train: list[Counter] = field(default_factory=lambda: [Counter() for _ in range(LEVELS)])  # documents, bytes
    words: dict[int, Tally] = field(default_factory=dict)  # by level
    heldout: list[Document] = field(default_factory=list)
    skipped: Skipped = field(default_factory=Skipped)
    shares: Shares = field(default_factory=Shares)

    def update(self, other: "_Part", lowest: int) -> None:
        for side, counts in other.seen.items():
            self.seen[side].update(counts)
        self.skipped.merge(other.skipped)
        self.shares.merge(other.shares)
        for counts, more in zip(self.train, other.train, strict=True):
            counts.update(more)
        for level, tally in other.words.items():
            if level >= lowest:
                self.words.setdefault(level, Tally()).update(tally)


def count_corpus(
    corpus: Corpus | CleanedCorpus,
    rules: Rules,
    heldout: Spool,
    *,
    workers: int = 1,
    max_distinct: int = MAX_DISTINCT,
    seed: int = 0,
) -> Counted:
    """Count the words of the train side in `workers` processes, and put the held-out documents into `heldout`.

    `max_distinct` bounds the distinct words in memory; a word counts once for every 8 bytes. They take up to 300 bytes
    each while merging, and less here. A counting process takes 150 MB and 23 times the longest text.
    Raises TokenizerError if the smallest sample has more than `max_distinct` words.
    """
    total, lowest = _Part(), 0

    def shrink() -> int:
        """Drop the lowest levels until the others have at most `max_distinct` words. Returns the lowest one kept."""
        level = lowest
        while sum(tally.size for tally in total.words.values()) > max_distinct:
            total.words.pop(level, None)
            level += 1
        return level

    each = partial(ordered, workers=workers)
    corpus.bounds(each)
    with listing(corpus, each), progress("counting words", "documents", reads=corpus.stored) as advance:
        stored: deque[int] = deque()  # bytes of the chunks that are being counted
        items = ((chunk, lowest) for chunk in noted(corpus.chunks(CHUNK_BYTES), attrgetter("stored"), stored))
        for part in ordered(partial(_counted, corpus, rules, seed), items, workers):
            total.update(part, lowest)
            heldout.put(part.heldout)
            advance(sum(counts["documents"] for counts in part.seen.values()), read=stored.popleft())
            if sum(tally.most for tally in total.words.values()) > max_distinct * SLACK:
                lowest = shrink()
    lowest = shrink()
    counted, train = sum(total.train[lowest:], Counter()), total.seen["train"]
    if train["documents"] and not counted["documents"]:
        raise TokenizerError(
            f"max_distinct = {max_distinct:,} is too small for this corpus",
            "the smallest sample of its documents has more distinct words than that",
            f"use the default of {MAX_DISTINCT:,} or a larger number",
        )
    words = Tally()
    for level in sorted(total.words):
        words.update(total.words.pop(level))
    sample = _sample(counted, train) | {"levels_left_out": lowest}
    return Counted(_spelled(words, rules.kind), total.seen, sample, total.skipped, total.shares)


def _sample(counted: Counter, train: Counter) -> dict[str, float]:
    """The documents and bytes that were counted, and their shares of the train side."""
    units = ("documents", "bytes")
    shares = {f"share_of_{unit}": counted[unit] / train[unit] if counted else 1.0 for unit in units}
    return {unit: counted[unit] for unit in units} | shares


def alphabet(words: Counter[str], kind: str, min_count: int) -> tuple[list[str], list[str]]:
    """The symbols that begin a word, and those (with prefix) that continue one, each sorted by code point.

    For `bert` only characters that occur inside words get a continuation: `##汉` could never be used. Words that are
    too long for WordPiece are ignored.
    """
    if kind == "byte":
        characters = sorted(byte_of_symbol())
        return characters, [PREFIX[kind] + c for c in characters]
    counts, inside = np.zeros(0x110000, dtype=np.int64), np.zeros(0x110000, dtype=bool)
    rest = ((word, count) for word, count in words.items() if len(word) <= WORD_CHARACTERS)
    while batch := list(islice(rest, WORDS)):
        text = "".join(word + "\n" for word, _ in batch)  # no word of `bert` holds a line end
        points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
        end = points == ord("\n")
        number = np.cumsum(end) - end
        weights = np.array([count for _, count in batch], dtype=np.int64)
        np.add.at(counts, points[~end], weights[number[~end]])
        first = np.append(True, end[:-1])
        inside[points[~first & ~end]] = True
    starts = np.flatnonzero(counts >= min_count)
    continuations = starts[inside[starts]]
    return [chr(c) for c in starts.tolist()], [PREFIX[kind] + chr(c) for c in continuations.tolist()]


def drop_unspellable(words: Counter[str], characters: set[str]) -> None:
    """Remove the words that every vocabulary encodes as the unknown token: nothing can be learned from them."""
    for word in [w for w in words if len(w) > WORD_CHARACTERS or not characters.issuperset(w)]:
        del words[word]


# One chunk, in any process


def _counted(corpus: Corpus | CleanedCorpus, rules: Rules, seed: int, item: tuple[Chunk, int]) -> _Part:
    """Count one chunk. Words are counted only for levels that have not been dropped yet."""
    chunk, lowest = item
    part = _Part()
    texts: dict[int, list[str]] = {}
    for document in corpus.read(chunk, part.skipped):
        data = document.text.encode("utf-8")
        seen = part.seen[document.side]
        seen["documents"] += 1
        seen["characters"] += len(document.text)
        seen["bytes"] += len(data)
        part.shares.add(document.source, document.side, 1, len(data))
        if document.side == "train":
            level = _level(data, seed)
            part.train[level]["documents"] += 1
            part.train[level]["bytes"] += len(data)
            if level >= lowest:
                texts.setdefault(level, []).append(document.text)
        else:
            part.heldout.append(document)
    part.words = {level: _cutter(rules).tally(some) for level, some in texts.items()}
    return part


def _level(text: bytes, seed: int) -> int:
    """The number of leading zeros of a hash of the text: 0 for half of all texts, 1 for a quarter, …"""
    draw = hashlib.blake2b(text, digest_size=8, key=seed.to_bytes(8, "little")).digest()
    return min(64 - int.from_bytes(draw, "big").bit_length(), LEVELS - 1)


@cache
def _cutter(rules: Rules) -> "_Cutter":
    return _Cutter(rules)


class _Cutter:
    """Counts the words of texts. It learns the class of a character when the character first occurs."""

    def __init__(self, rules: Rules):
        specials = SPECIALS[rules.kind]
        self._engine = build(list(specials.values()), rules)
        self._numbers = _Numbers({specials["unk"]: 0})  # of the characters that are always words of their own
        self._cut: BertWords | ByteWords
        if rules.kind == "bert":
            self._cut = BertWords(self._engine, self._numbers, composes=rules.width == "fold")
        else:
            self._cut = ByteWords(single=rules.digits == "single")

    def tally(self, texts: list[str]) -> Tally:
        data, starts, ends, numbers, size = [], [], [], [], 0
        others: Counter[str] = Counter()
        for batch in _batches(texts):
            words = self._words(batch, others)
            data.append(words.buffer.tobytes())
            starts.append(words.starts + size)
            ends.append(words.ends + size)
            numbers.append(words.ids[words.ids >= 0])
            size += len(words.buffer)
        counts = np.bincount(np.concatenate(numbers), minlength=len(self._numbers))
        others.update({word: counts[number] for word, number in self._numbers.items() if counts[number]})
        tally = Tally()
        tally.add(b"".join(data), np.concatenate(starts), np.concatenate(ends))
        strings = [word.encode("utf-8") for word in others]
        bounds = np.cumsum([0, *map(len, strings)])
        tally.add(b"".join(strings), bounds[:-1], bounds[1:], np.array([*others.values()], dtype=np.int64))
        return tally

    def _words(self, texts: list[str], others: Counter[str]) -> CutText:
        """The words of the texts. A text with a character that only the library can split is counted in `others`."""
        words = self._cut([text.encode("utf-8") for text in texts])
        if not len(words.foreign):
            return words
        foreign = set((np.searchsorted(np.flatnonzero(words.buffer == BEGIN), words.foreign) - 1).tolist())
        for number in foreign:
            others.update(words_of(texts[number], self._engine))
        return self._words([text for number, text in enumerate(texts) if number not in foreign], others)


class _Numbers(dict[str, int]):
    """Gives every word a number when it is first looked up."""

    def get(self, word: str, default: int | None = None) -> int:  # type: ignore[override]  # it always has a number
        return self.setdefault(word, len(self))


def _batches(texts: list[str]) -> Iterator[list[str]]:
    """The texts in lists of about BATCH characters; a long text is split into parts."""
    batch, size = [], 0
    for text in texts:
        begin = 0
        while begin < len(text):
            # A word always ends before a line end that no other white space follows, so the text can be split there.
            found = LINE_END.search(text, begin + BATCH)
            end = found.start() if found else len(text)
            batch.append(text[begin:end])
            size += end - begin
            begin = end
            if size >= BATCH:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _spelled(tally: Tally, kind: str) -> Counter[str]:
    """The counted words as strings; for `byte` they are written in the symbols of its alphabet."""
    byte = {number: symbol for symbol, number in byte_of_symbol().items()}
    symbols = np.array(["\n" if number == BREAK else byte[number] for number in range(256)])  # no word has a line end
    words: Counter[str] = Counter()
    for raw, counts in tally.items():
        if kind == "byte":
            text = symbols[raw].tobytes().decode("utf-32-le")
        else:
            text = raw.tobytes().replace(bytes([BREAK]), b"\n").decode("utf-8")
        dict.update(words, zip(text.split("\n")[:-1], counts, strict=True))
    return words
