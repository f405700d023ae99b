"""Measure how well a vocabulary fits a text, in numbers that mean the same for every tokenizer.

Words are defined by the text, not by the tokenizer. A word is a run of letters (with their marks), a number is a run of
decimal digits, and Chinese, which is written without spaces, is counted by the character. A token belongs to a run if
it covers a part of it.
"""

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from pretrain.corpus import Document
from pretrain.display import tables
from pretrain.display.progress import progress
from pretrain.tokenizer import plot
from pretrain.tokenizer.vocabulary import Vocabulary

BATCH_CHARACTERS = 1 << 18  # a token and its place take 660 bytes (measured): 170 MB where each character is one
LETTER, HAN, DIGIT = 1, 2, 3
# Han characters by block (Unicode 17): unified ideographs, extensions A to J, compatibility ideographs, 〇.
HAN_RANGES = ((0x3007, 0x3007), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3347F))
LAST_LETTER = 0x33480  # higher code points are tags, variation selectors and private use
ASCII = {chr(point) for point in range(0x21, 0x7F)}
SCRIPTS = ("letters", "han", "han_words", "digits", "mixed", "others", "parts_of_characters")
EXAMPLES = 12
SHOWN = 6  # examples on the terminal
# The tokens that train text uses are looked for only in its most frequent words, at 1.5 µs each: a token that none of
# these words uses is practically never used.
WORDS_LOOKED_AT = 500_000


@dataclass(frozen=True)
class Measured:
    """The counts of a text that one vocabulary encoded."""

    tallies: dict[tuple[str, str], Counter]  # of each source and language
    tokens: dict[str, np.ndarray]  # source → (V,) how often each token was produced
    characters: Counter[str]

    @property
    def counts(self) -> np.ndarray:
        return sum(self.tokens.values(), np.zeros((), np.int64))


def measure(vocabularies: Sequence[Vocabulary], documents: Iterable[Document]) -> list[Measured]:
    """Encode `documents` with each vocabulary and count, in one pass. The tokens of the template are not counted.

    Memory does not depend on the length of a document: BATCH_CHARACTERS of text and its tokens.
    """
    characters: Counter[str] = Counter()
    found = [Measured({}, {}, characters) for _ in vocabularies]
    with progress("measuring", "held-out documents") as advance:
        for batch in _batches(documents):
            texts = [piece for _, piece, _ in batch]
            for vocabulary, measured in zip(vocabularies, found, strict=True):
                encodings = vocabulary.engine.encode_batch(texts, add_special_tokens=False)
                produced: dict[str, list[np.ndarray]] = defaultdict(list)
                for (document, piece, first), encoding in zip(batch, encodings, strict=True):
                    ids = np.array(encoding.ids, dtype=np.int64)
                    spans = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
                    counted = measured.tallies.setdefault((document.source, document.language), Counter())
                    counted.update(tally(piece, ids, spans, vocabulary.unknown), documents=int(first))
                    produced[document.source].append(ids)
                for source, each in produced.items():
                    counts = np.bincount(np.concatenate(each), minlength=vocabulary.size)
                    measured.tokens[source] = measured.tokens.get(source, 0) + counts
            for text in texts:
                characters.update(text)
            advance(sum(first for _, _, first in batch))
    return found


def _batches(documents: Iterable[Document]) -> Iterator[list[tuple[Document, str, bool]]]:
    """Lists of (document, a piece of it, whether it is its first piece), of about BATCH_CHARACTERS each."""
    batch, size = [], 0
    for document in documents:
        for number, piece in enumerate(_pieces(document.text)):
            batch.append((document, piece, number == 0))
            size += len(piece)
            if size >= BATCH_CHARACTERS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _pieces(text: str) -> Iterator[str]:
    """The document, or the pieces of a long one. They are split before white space if possible: ` the` is a word."""
    begin = 0
    while len(text) - begin > BATCH_CHARACTERS:
        stop = begin + BATCH_CHARACTERS
        end = max(text.rfind("\n", begin, stop), text.rfind(" ", begin, stop))
        end = end if end > begin else stop
        yield text[begin:end]
        begin = end
    yield text[begin:]


def tally(text: str, ids: np.ndarray, spans: np.ndarray, unknown: int | None) -> Counter:
    """The counts of a text whose tokens are `ids` (T,); `spans` (T, 2) are the characters that each token covers."""
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    kinds = classes()[np.minimum(points, LAST_LETTER)]  # (C,)
    begins, ends = spans[:, 0], spans[:, 1]
    known = np.ones(len(ids), dtype=bool) if unknown is None else ids != unknown
    written = _covered(begins[known], ends[known], len(points))
    ascii_, han = (points >= 0x21) & (points < 0x7F), kinds == HAN
    found = Counter(
        characters=len(points),
        bytes=len(text.encode("utf-8")),
        tokens=len(ids),
        unknown=int((~known).sum()),
        unknown_characters=int(_covered(begins[~known], ends[~known], len(points)).sum()),
        ascii=int(ascii_.sum()),
        ascii_written=int((ascii_ & written).sum()),
        han=int(han.sum()),
        han_written=int((han & written).sum()),
    )
    real = ends > begins  # SentencePiece puts a space before the text, and that token covers no character
    # Normalisation may reorder marks; the runs below need spans in order.
    begins, ends = (np.maximum.accumulate(side[real]) for side in (begins, ends))
    for name, kind in (("word", LETTER), ("han", HAN), ("number", DIGIT)):
        first, last = _runs(kinds == kind)
        touching = np.searchsorted(begins, last, "left") - np.searchsorted(ends, first, "right")
        found[f"{name}_runs"] = len(first)
        found[f"{name}_tokens"] = int(touching.sum())
        if kind == LETTER:
            token = np.minimum(np.searchsorted(ends, first, "right"), max(0, len(ends) - 1))
            found["whole_words"] = int(((touching == 1) & known[real][token]).sum()) if len(ends) else 0
    found["digits"] = int((kinds == DIGIT).sum())
    return found


def report(
    vocabulary: Vocabulary,
    measured: Measured,
    words: Counter[str] | None = None,
    characters: Iterable[str] = (),
) -> dict:
    """All measurements, for report.json. `words` and `characters` are of the train text, if there is one."""
    counts, texts = measured.counts, texts_of(vocabulary)
    dead = {"heldout": _dead(vocabulary, texts, counts > 0)}
    if words is not None:
        often, share = _frequent(words, WORDS_LOOKED_AT)
        said = {"words": len(often), "share_of_running_words": share}
        dead["train"] = said | _dead(vocabulary, texts, _used(vocabulary, often))
    return {
        "heldout": rates(measured),
        "coverage": _coverage(vocabulary, measured, characters),
        "entries": _entries(vocabulary, texts),
        "numerals": _numerals(vocabulary, texts),
        "frequency": _frequency(vocabulary, counts),
        "longest": _longest(vocabulary, texts, counts),
        "dead": dead,
    }


def rates(measured: Measured) -> dict:
    """The rates of all text (`overall`), of each of the `sources` and of each of the `languages`."""
    by_source: defaultdict[str, Counter] = defaultdict(Counter)
    by_language: defaultdict[str, Counter] = defaultdict(Counter)
    for (source, language), counted in measured.tallies.items():
        by_source[source] += counted
        by_language[language] += counted
    return {
        "overall": _rates(sum(measured.tallies.values(), Counter())),
        "sources": {name: _rates(counted) for name, counted in by_source.items()},
        "languages": {name: _rates(counted) for name, counted in by_language.items()},
    }


def _rates(counted: Counter) -> dict:
    """The counts of a part of the text, and their ratios (None if the divisor is 0)."""

    def ratio(part: str, whole: str) -> float | None:
        return counted[part] / counted[whole] if counted[whole] else None

    return {
        **{key: counted[key] for key in ("documents", "characters", "bytes", "tokens")},
        "words": counted["word_runs"],
        "han": counted["han"],
        "numbers": counted["number_runs"],
        "characters_per_token": ratio("characters", "tokens"),
        "bytes_per_token": ratio("bytes", "tokens"),
        "tokens_per_word": ratio("word_tokens", "word_runs"),
        "tokens_per_han": ratio("han_tokens", "han"),
        "tokens_per_number": ratio("number_tokens", "number_runs"),
        "digits_per_number": ratio("digits", "number_runs"),
        "whole_word_share": ratio("whole_words", "word_runs"),
        "unknown_rate": ratio("unknown", "tokens"),
        "unknown_characters": ratio("unknown_characters", "characters"),
        "ascii_written": ratio("ascii_written", "ascii"),
        "han_written": ratio("han_written", "han"),
    }


def words_in(text: str, longest_han: int) -> list[str]:
    """The words of a text, and its runs of at most `longest_han` Han characters."""
    kinds = classes()[np.minimum(np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32), LAST_LETTER)]
    letters, han = (zip(*_runs(kinds == kind), strict=True) for kind in (LETTER, HAN))
    short = [(first, last) for first, last in han if last - first <= longest_han]
    return [text[first:last] for first, last in [*letters, *short]]


@cache
def classes() -> np.ndarray:
    """(LAST_LETTER + 1,) uint8: LETTER, HAN, DIGIT or 0 for each code point; the last one is for all higher ones."""
    kinds = np.zeros(LAST_LETTER + 1, dtype=np.uint8)
    for point in range(LAST_LETTER):
        category = unicodedata.category(chr(point))
        kinds[point] = LETTER if category[0] in "LM" else DIGIT if category == "Nd" else 0
    for first, last in HAN_RANGES:
        kinds[first : last + 1] = HAN
    return kinds


def _covered(begins: np.ndarray, ends: np.ndarray, length: int) -> np.ndarray:
    """(length,) bool: which characters lie in a span."""
    steps = np.zeros(length + 1, dtype=np.int64)
    np.add.at(steps, begins, 1)
    np.add.at(steps, ends, -1)
    return np.cumsum(steps[:-1]) > 0


def _runs(inside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first position of each run of True, and the position after its last one."""
    steps = np.diff(inside.astype(np.int8), prepend=0, append=0)
    return np.flatnonzero(steps == 1), np.flatnonzero(steps == -1)


# Characters that the vocabulary can write


def _coverage(vocabulary: Vocabulary, measured: Measured, train: Iterable[str]) -> dict:
    """For kinds of characters: how many can be written without the unknown token, and their share of the text."""
    overall = sum(measured.tallies.values(), Counter())
    kinds = {
        "ascii": measured.characters.keys() & ASCII,
        "han": han_in(measured.characters),
        "gb2312_level_1": _gb2312(),
    }
    if train:
        kinds["han_of_train"] = han_in(train)
    found: dict[str, dict[str, float | None]] = {}
    for name, characters in kinds.items():
        found[name] = {"characters": len(characters), "written": len(written(vocabulary, characters))}
    for name in ("ascii", "han"):
        running = overall[f"{name}_written"] / overall[name] if overall[name] else None
        found[name]["running"] = running
    return found


def written(vocabulary: Vocabulary, characters: Iterable[str]) -> set[str]:
    """The characters that are encoded without the unknown token when they are alone."""
    characters = sorted(characters)
    found = set()
    for character, encoding in zip(
        characters, vocabulary.engine.encode_batch_fast(characters, add_special_tokens=False), strict=True
    ):
        if encoding.ids and vocabulary.unknown not in encoding.ids:
            found.add(character)
    return found


def han_in(characters: Iterable[str]) -> set[str]:
    """The Han characters among them."""
    return {c for c in characters if classes()[min(ord(c), LAST_LETTER)] == HAN}


def _gb2312() -> set[str]:
    """The 3,755 most used simplified characters: level 1 of GB 2312-80, rows 16 to 55."""
    cells = (bytes((0xA0 + row, 0xA0 + cell)) for row in range(16, 56) for cell in range(1, 95))
    return set(b"".join(cells).decode("gb2312", errors="ignore"))


# Kinds of entries


def texts_of(vocabulary: Vocabulary) -> dict[int, str | None]:
    """The text of every token that is not a mark, by id; None for a token that is part of a character."""
    found: dict[int, str | None] = {}
    for token in range(vocabulary.size):
        raw = vocabulary.raw(token)
        if raw and token != vocabulary.unknown:
            try:
                found[token] = raw.decode("utf-8")
            except UnicodeDecodeError:
                found[token] = None
    return found


def _entries(vocabulary: Vocabulary, texts: dict[int, str | None]) -> dict:
    """The number of entries of each script; `parts_of_characters` are tokens whose bytes alone are not valid text."""
    found = Counter(_script(text) for text in texts.values())
    return {"marks": vocabulary.size - len(texts)} | {name: found[name] for name in SCRIPTS}


def _script(text: str | None) -> str:
    if text is None:
        return "parts_of_characters"
    text = text.strip()
    kinds = set(classes()[[min(ord(c), LAST_LETTER) for c in text]].tolist())
    if kinds == {HAN}:
        return "han" if len(text) == 1 else "han_words"
    return {LETTER: "letters", DIGIT: "digits"}.get(max(kinds, default=0), "others") if len(kinds) < 2 else "mixed"


def _numerals(vocabulary: Vocabulary, texts: dict[int, str | None]) -> dict:
    """The entries of several digits, and how a long number is split."""
    sizes = [len(text.strip()) for text in texts.values() if text and text.strip().isdecimal()]
    example = vocabulary.engine.encode("1234567890", add_special_tokens=False).ids
    return {
        "entries_of_several_digits": sum(size > 1 for size in sizes),
        "longest": max(sizes, default=0),
        "example": [vocabulary.text(token) for token in example],
    }


def _frequency(vocabulary: Vocabulary, counts: np.ndarray) -> dict:
    """How many distinct tokens the held-out text uses, how many make up half of it, and the most frequent ones."""
    order = np.argsort(-counts, kind="stable")
    half = int(np.searchsorted(np.cumsum(counts[order]), counts.sum() / 2)) + 1
    return {
        "produced": int((counts > 0).sum()),
        "half_of_text": half,
        "top": [[vocabulary.text(token), int(counts[token])] for token in order[:EXAMPLES].tolist()],
    }


def _longest(vocabulary: Vocabulary, texts: dict[int, str | None], counts: np.ndarray) -> list[dict]:
    sized = sorted((-len(text), text, token) for token, text in texts.items() if text)
    return [
        {"token": vocabulary.text(token), "characters": -size, "heldout": int(counts[token])}
        for size, _, token in sized[:EXAMPLES]
    ]


# Entries that are never used


def _dead(vocabulary: Vocabulary, texts: dict[int, str | None], used: np.ndarray) -> dict:
    """Entries with text that did not occur. The examples are spread evenly over the ids."""
    dead = [token for token in texts if not used[token]]
    some = dead[:: -(-len(dead) // EXAMPLES) or 1]
    return {"tokens": len(dead), "examples": [vocabulary.text(token) for token in some]}


def _frequent(words: Counter[str], most: int) -> tuple[list[str], float]:
    """At most `most` words, the most frequent ones, and their share of the text.

    Words of equal count are kept or left out together, so that their order does not matter.
    """
    counts = np.fromiter(words.values(), dtype=np.int64, count=len(words))
    floor = int(np.partition(counts, -most - 1)[-most - 1]) if len(counts) > most else 0
    often = [word for word, count in words.items() if count > floor]
    return often, float(counts[counts > floor].sum() / max(1, counts.sum()))


def _used(vocabulary: Vocabulary, words: Iterable[str]) -> np.ndarray:
    """(V,) bool: which tokens the words are split into."""
    used = np.zeros(vocabulary.size, dtype=bool)
    tokenize = vocabulary.engine.model.tokenize
    used[list({token.id for word in words for token in tokenize(word)})] = True
    return used


# The printed report


def draw(path: Path, vocabularies: dict[str, Vocabulary], measured: dict[str, Measured]) -> None:
    """report.png: tokens by frequency and entries by length. A vocabulary alone has a curve for each source too."""
    counts = {name: part.counts for name, part in measured.items()}
    if len(measured) == 1:
        (part,) = measured.values()
        counts = {"all": part.counts} | (part.tokens if len(part.tokens) > 1 else {})
    lengths = {
        name: np.array([len(text) for text in texts_of(vocabulary).values() if text], dtype=np.int64)
        for name, vocabulary in vocabularies.items()
    }
    plot.write(path, counts, lengths)


COLUMNS = {
    "characters_per_token": ("characters", "a token", ".2f"),
    "bytes_per_token": ("bytes", "a token", ".2f"),
    "tokens_per_word": ("tokens", "a word", ".2f"),
    "tokens_per_han": ("tokens", "a 汉字", ".2f"),
    "tokens_per_number": ("tokens", "a number", ".2f"),
    "whole_word_share": ("words", "whole", ".1%"),
    "unknown_rate": ("tokens", "unknown", ".2%"),
}
COVERED = {"ascii": "ASCII", "han": "汉字", "gb2312_level_1": "GB 2312 level 1", "han_of_train": "汉字 of train text"}


def show(found: dict[str, dict]) -> None:
    """Print two tables of the named vocabularies: rates on each part of the held-out text, and facts about entries."""
    for name, said in found.items():
        overall = dict(zip(COLUMNS, cells(said["heldout"]["overall"]), strict=True))
        rates = f"{overall['characters_per_token']} characters a token, {overall['unknown_rate']} unknown"
        print(f"{name}: {said['vocab_size']:,} entries; on held-out text {rates}")
    parts = {name: _parts(said, len(found) == 1) for name, said in found.items()}
    rows = [
        (part if len(found) == 1 else name if part == "all" else f"{part}: {name}", *cells(mine[part]))
        for part in next(iter(parts.values()))
        for name, mine in parts.items()
    ]
    tables.show(("", *(f"{above}\n{below}" for above, below, _ in COLUMNS.values())), rows, title="held-out text")
    facts = {name: _facts(said) for name, said in found.items()}
    keys = dict.fromkeys(key for mine in facts.values() for key in mine)
    rows = [(key, *(mine.get(key, "–") for mine in facts.values())) for key in keys]
    rows = [row for row in rows if set(row[1:]) != {"0"}]
    tables.show(("", *found), rows, title="entries", left=range(len(found) + 1))


def cells(rates: dict) -> list[str]:
    """The values of COLUMNS as they are shown."""
    return ["–" if rates[key] is None else format(rates[key], form) for key, (*_, form) in COLUMNS.items()]


def _parts(said: dict, alone: bool) -> dict[str, dict]:
    """The rates to be shown: of all text, of each language, and of each source if a vocabulary is shown alone."""
    heldout, parts = said["heldout"], {"all": said["heldout"]["overall"]}
    languages, sources = heldout["languages"], heldout["sources"]
    if len(languages) > 1 and not (alone and len(languages) == len(sources)):
        parts |= languages
    if alone and len(sources) > 1:
        parts |= sources
    return parts | ({"all, before": said["parent"]["overall"]} if "parent" in said else {})


def _facts(said: dict) -> dict[str, str]:
    """The rows of the report on the kinds of entries, the characters that they can write, and unused entries."""
    facts = {kind.replace("_", " "): f"{number:,}" for kind, number in said["entries"].items()}
    for key, text in COVERED.items():
        cover = said["coverage"].get(key, {})
        if cover.get("characters"):
            facts[f"{text} that can be written"] = f"{cover['written']:,} of {cover['characters']:,}"
    for side, dead in said["dead"].items():
        where = "on held-out text"
        if side == "train":
            where = f"in the {dead['words']:,}{' most frequent' * (dead['share_of_running_words'] != 1)} train words"
        some = f", such as  {'  '.join(dead['examples'][:SHOWN])}" if dead["tokens"] else ""
        facts[f"never produced {where}"] = f"{dead['tokens']:,}{some}"
    return facts | {"longest": "  ".join(entry["token"].strip() for entry in said["longest"][:SHOWN])}
