"""What a vocabulary is trained on: how often each word occurs, and the symbols that words are spelled with.

Counting runs over the corpus in chunks, in as many processes as asked, in bounded memory: when more distinct words turn
up than `max_distinct` allows, fewer documents are counted. Which ones follows from the text alone:

- A hash of its text and `seed` gives each train document a level: half of them have level 0, a quarter level 1, …
- Words are counted by level. While the levels together hold more than `max_distinct`, the lowest is thrown away, and
  its documents are passed over from then on.

So a level is left out if and only if it and those above hold too much at the end of the corpus: what a level holds only
grows, so what was too much on the way still is at the end, and at the end all that is left is weighed. Hence the order
of files, of documents and of the processes' results changes nothing, and what is left is a fair sample of 1/2, 1/4, ….
"""

import hashlib
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import islice
from operator import attrgetter

import numpy as np

from pretrain.corpus import CHUNK_BYTES, SIDES, Chunk, Cleaned, Corpus, Document, Shares, Skipped, listing
from pretrain.corpus.spool import Aside
from pretrain.display.progress import progress
from pretrain.errors import TokenizerError
from pretrain.processes.pool import noted, ordered
from pretrain.tokenizer.fast.cut import BEGIN, BertWords, ByteWords, Words
from pretrain.tokenizer.kinds import PREFIX, SPECIALS, WORD_CHARACTERS, Rules, build, byte_of_symbol, words_of
from pretrain.tokenizer.training.tally import BREAK, Tally

MAX_DISTINCT = 12_000_000  # 2.2 GB for the bytes of 110 MB Chinese, 3.5 GB if all words are short and different
LEVELS = 17  # the last one holds all that is rarer: 1 document of 65,536
SLACK = 1.25  # the distinct words of the levels are counted when there may be that many times too many
BATCH = 1 << 16  # characters cut at a time: their arrays stay in the cache
LINE_END = re.compile(r"\n(?=\S)")
WORDS = 1 << 15  # words (or texts) looked at at a time


@dataclass(frozen=True)
class Counted:
    words: Counter[str]  # exactly those that the finished tokenizer will hand to WordPiece
    seen: dict[str, Counter]  # side → documents, characters, bytes
    sample: dict  # what part of the train side was counted
    skipped: Skipped  # records that gave no document
    shares: Shares  # documents and bytes of each side, by source

    def report(self) -> dict:
        """As JSON has it; call it when the words that nothing is learned from are taken out."""
        return {"train": {**self.seen["train"], "distinct_words": len(self.words), "counted": self.sample}}


@dataclass
class _Part:
    """What was counted in a chunk, or in all of them."""

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


def count_words(texts: Iterable[str], rules: Rules) -> Counter[str]:
    """How often each word occurs: exactly the words that the finished tokenizer will hand to WordPiece."""
    tally = Tally()
    rest = iter(texts)
    while batch := list(islice(rest, WORDS)):
        tally.update(_cutter(rules).tally(batch))
    return _spelled(tally, rules.kind)


def count_corpus(
    corpus: Corpus | Cleaned,
    rules: Rules,
    heldout: Aside,
    *,
    workers: int = 1,
    max_distinct: int = MAX_DISTINCT,
    seed: int = 0,
) -> Counted:
    """How often each word of the train side occurs, counted in `workers` processes; the other side goes to `heldout`.

    `max_distinct` bounds the distinct words that are held, one of more than 8 bytes for every 8. Memory: 300 bytes for
    each of them, when they are merged; here less. A process that counts takes 150 MB, and 23 times the longest text.
    Raises TokenizerError when not even the smallest sample fits into it.
    """
    total, lowest = _Part(), 0

    def shrink() -> int:
        """The lowest level that is kept."""
        level = lowest
        while sum(tally.size for tally in total.words.values()) > max_distinct:
            total.words.pop(level, None)
            level += 1
        return level

    each = partial(ordered, workers=workers)
    corpus.bounds(each)
    with listing(corpus, each), progress("counting words", "documents", reads=corpus.stored) as advance:
        stored: deque[int] = deque()  # bytes of the chunks on their way
        items = ((chunk, lowest) for chunk in noted(corpus.chunks(CHUNK_BYTES), attrgetter("stored"), stored))
        for part in each(partial(_counted, corpus, rules, seed), items):
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
            f"leave it at {MAX_DISTINCT:,}, or take more",
        )
    words = Tally()
    for level in sorted(total.words):
        words.update(total.words.pop(level))
    sample = {unit: counted[unit] for unit in ("documents", "bytes")}
    sample |= {f"share_of_{unit}": counted[unit] / train[unit] if counted else 1.0 for unit in sample}
    sample["levels_left_out"] = lowest
    return Counted(_spelled(words, rules.kind), total.seen, sample, total.skipped, total.shares)


def alphabet(words: Counter[str], kind: str, min_count: int) -> tuple[list[str], list[str]]:
    """Symbols that begin a word, and symbols (with prefix) that continue one, each sorted by code point.

    For `bert` only characters that occur inside words get a continuation: `##汉` could never be used. Words too long
    for WordPiece are not looked at.
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
    """Take out the words that become the unknown token whatever is merged: nothing is learned from them."""
    for word in [w for w in words if len(w) > WORD_CHARACTERS or not characters.issuperset(w)]:
        del words[word]


# One chunk, in any process


def _counted(corpus: Corpus, rules: Rules, seed: int, item: tuple[Chunk, int]) -> _Part:
    """What a chunk holds: words only of levels that are not thrown away yet."""
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
    """0 for half of all texts, 1 for a quarter, …: the leading zeros of a hash."""
    draw = hashlib.blake2b(text, digest_size=8, key=seed.to_bytes(8, "little")).digest()
    return min(64 - int.from_bytes(draw, "big").bit_length(), LEVELS - 1)


@cache
def _cutter(rules: Rules) -> "_Cutter":
    return _Cutter(rules)


class _Cutter:
    """Counts the words of texts. What characters are, it learns as it goes."""

    def __init__(self, rules: Rules):
        specials = SPECIALS[rules.kind]
        self._engine = build(list(specials.values()), rules)
        self._numbers = _Numbers({specials["unk"]: 0})  # of characters that are words wherever they stand
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
        ends = np.cumsum([0, *map(len, strings)])
        tally.add(b"".join(strings), ends[:-1], ends[1:], np.array([*others.values()], dtype=np.int64))
        return tally

    def _words(self, texts: list[str], others: Counter[str]) -> Words:
        """The words of the texts, but for texts with characters that only the library knows: theirs join `others`."""
        words = self._cut([text.encode("utf-8") for text in texts])
        if not len(words.foreign):
            return words
        foreign = set((np.searchsorted(np.flatnonzero(words.buffer == BEGIN), words.foreign) - 1).tolist())
        for number in foreign:
            others.update(words_of(texts[number], self._engine))
        return self._words([text for number, text in enumerate(texts) if number not in foreign], others)


class _Numbers(dict):
    """Every word that is asked for has a number."""

    def get(self, word: str, default: int | None = None) -> int:
        return self.setdefault(word, len(self))


def _batches(texts: list[str]) -> Iterator[list[str]]:
    """The texts in lists of about BATCH characters, long ones in parts."""
    batch, size = [], 0
    for text in texts:
        begin = 0
        while begin < len(text):
            # Between a character and the line end behind it every word ends, if no other white space follows that.
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
    """What was counted, as strings: for `byte` in the symbols of its alphabet."""
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
