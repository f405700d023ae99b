"""WordPiece vocabularies: trained here by deterministic code, opened here by every later stage.

Two kinds. `bert` is stock BERT, text normalised and Chinese characters isolated, for encoders:

    Héllo 漢字 playing   →  [CLS] hello 漢 字 play ##ing [SEP]

`byte` loses nothing, for decoders: WordPiece over the bytes of UTF-8, each shown as one printable character, with a
continuation prefix from outside those 256 (`#` is one of them, hence not `##`):

    low 漢 lowest        →  low Ġ ‿æ ‿¼ ‿¢ Ġlow ‿est <eod>

Training counts words, then merges the most frequent pair of symbols again and again (byte-pair encoding), and writes
the symbols down as WordPieces. The trainer of `tokenizers` is not used: it gives another vocabulary in every run
(upstream issue 1794). The same text and settings give the same tokenizer.json here, byte for byte, whatever the
order of the documents, the thread count or the hash seed: counts do not depend on order, and ties are broken by the
strings.
"""

import heapq
import platform
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import tokenizers
from pydantic import Field, model_validator
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from pretrain.config import Config
from pretrain.corpus import SIDES, Corpus, Document, open_corpus
from pretrain.errors import CorpusError, TokenizerError
from pretrain.folders import faults, publish, read_index, write_index, write_json
from pretrain.progress import progress

MADE_BY = "python launch/tokenizer.py CONFIG.yaml"
SPECIALS = {
    "bert": {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"},
    "byte": {"pad": "<pad>", "unk": "<unk>", "eod": "<eod>"},
}
PREFIX = {"bert": "##", "byte": "‿"}  # U+203F is outside the byte-level alphabet

# WordPiece turns a word of more characters into the unknown token; raising this makes encoding quadratic.
WORD_CHARACTERS = 100

# The pattern of GPT-2, every repetition cut to 24 code points: with the leading space at most 97 bytes, so that no word
# reaches WORD_CHARACTERS and nothing is ever unknown.
BYTE_WORDS = (
    r"'s|'t|'re|'ve|'m|'ll|'d"
    r"| ?\p{L}{1,24}| ?\p{N}{1,24}| ?[^\s\p{L}\p{N}]{1,24}"
    r"|\s{1,24}(?!\S)|\s{1,24}"
)

# Chunks repeat, so words are cut out of each distinct chunk once. A chunk must end where a word surely ends. Python's
# own idea of white space will not do: BERT deletes \x0b, \x0c, \x1c-\x1f and \x85 ("a\x0bb" is one word), and to the
# pattern above \x1c-\x1f are not white space. Chinese characters are chunks of their own because BERT isolates them.
_SPACE = " \t\n\r\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_HAN = "\u3400-\u4dbf\u4e00-\u9fff"
CHUNK = {
    "bert": re.compile(f"[{_HAN}]|[^{_SPACE}{_HAN}]+"),
    "byte": re.compile(f"[{_SPACE}\x0b\x0c\x85]*[^{_SPACE}\x0b\x0c\x85]+|[{_SPACE}\x0b\x0c\x85]+"),
}

STRETCH = 1 << 20  # positions whose pairs are sorted at a time: sorting all at once doubles the memory of training
SEEN_TWICE = 2  # a pair that occurs once is one word's accident, and never merged


class TokenizerConfig(Config):
    corpus: str  # recipe.yaml, a folder that holds one, or a text file
    out: str
    kind: Literal["bert", "byte"]
    vocab_size: int = Field(gt=0)  # at most; a small corpus has fewer merges to offer
    lowercase: bool | None = None  # bert only, default true: lower case without accents, as BERT uncased
    alphabet_min_count: int = Field(1, gt=0)  # bert only: characters seen less often in train text become [UNK]

    @model_validator(mode="after")
    def _byte_is_lossless(self) -> "TokenizerConfig":
        if self.kind == "byte" and self.lowercase:
            raise ValueError("lowercase = true contradicts kind = byte, which keeps every character: remove lowercase")
        if self.kind == "byte" and self.alphabet_min_count > 1:
            raise ValueError(
                f"alphabet_min_count = {self.alphabet_min_count} contradicts kind = byte, whose alphabet is always "
                "all 256 bytes: remove alphabet_min_count"
            )
        return self


def run(config: TokenizerConfig) -> dict:
    """Train on the train side of the corpus, publish `config.out`, return the report (also there as report.json).

    Raises CorpusError when a side is empty, TokenizerError when the vocabulary cannot hold the alphabet.
    """
    kind, lowercase = config.kind, config.lowercase is not False
    corpus = open_corpus(config.corpus)
    with publish(Path(config.out), "tokenizer", TokenizerError) as folder:
        seen = {side: Counter() for side in SIDES}
        words = count_words(_tallied(corpus, seen), kind, lowercase)
        _check_sides(config.corpus, seen)
        specials = list(SPECIALS[kind].values())
        starts, continuations = alphabet(words, kind, config.alphabet_min_count)
        tokens = specials + starts + continuations
        _check_room(config, len(specials), len(tokens))
        words = _spellable(words, set(starts))
        tokens = merge(words, tokens, config.vocab_size, PREFIX[kind])
        engine = build(tokens, kind, lowercase)
        report = {
            "kind": kind,
            "vocab_size": len(tokens),
            "vocab_size_asked": config.vocab_size,
            "alphabet_size": len(starts),
            "merges": len(tokens) - len(specials) - len(starts) - len(continuations),
            "train": {**seen["train"], "distinct_words": len(words)},
            "heldout": measure(engine, kind, corpus.documents(("heldout",))),
        }
        _write(folder, engine, tokens, kind, lowercase)
        write_json(folder / "report.json", report)
        options = {"vocab_size": config.vocab_size}
        if kind == "bert":
            options |= {"lowercase": lowercase, "alphabet_min_count": config.alphabet_min_count}
        index = {
            "stage": "tokenizer",
            "kind": kind,
            "vocab_size": len(tokens),
            "options": options,
            "specials": {role: engine.token_to_id(token) for role, token in SPECIALS[kind].items()},
            "corpus": corpus.fingerprint(),
            "recorded": {
                "corpus": config.corpus,
                "tokenizers": tokenizers.__version__,
                "numpy": np.__version__,
                "python": platform.python_version(),
            },
        }
        write_index(folder, index)
    overall = report["heldout"]["overall"]
    rates = f"{overall['characters_per_token']:.2f} characters a token, {overall['unknown_rate']:.2%} unknown"
    print(f"{config.out}: {report['vocab_size']:,} entries; on held-out text {rates}")
    return report


class Tokenizer:
    """A vocabulary in use. `specials` gives ids by role: pad unk cls sep mask (bert), pad unk eod (byte)."""

    def __init__(self, engine: tokenizers.Tokenizer, index: dict, folder: Path):
        self.kind: str = index["kind"]
        self.vocab_size: int = index["vocab_size"]
        self.specials: dict[str, int] = index["specials"]
        self.fingerprint: str = index["fingerprint"]
        self.folder = folder
        self._engine = engine

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Ids (int32) of each text with its template: `[CLS] … [SEP]` or `… <eod>`. Special-token strings are text.

        Raises TokenizerError for a lone surrogate, the one thing in a `str` that has no UTF-8.
        """
        try:
            encodings = self._engine.encode_batch_fast(texts)
        except TypeError:  # what `tokenizers` says, without saying which text
            for number, text in enumerate(texts):
                _check_scalar_values(text, number)
            raise
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """Text without specials. For `byte` the very text that was encoded, if the ids are all of it."""
        return self._engine.decode([int(i) for i in ids], skip_special_tokens=True)

    def token_text(self, token: int) -> str:
        """A token to be looked at: `##ing`, or for `byte` its text (`‿ing`), with bytes that are no text as \\xe6."""
        text = self._engine.id_to_token(int(token))
        if text is None:
            raise TokenizerError(f"no token has the id {token}", f"{self.folder} has ids 0 to {self.vocab_size - 1}")
        if self.kind == "bert" or text in SPECIALS["byte"].values():
            return text
        prefix = PREFIX["byte"] if text.startswith(PREFIX["byte"]) else ""
        raw = bytes(map(_byte_of_symbol().__getitem__, text.removeprefix(prefix)))
        return prefix + raw.decode("utf-8", errors="backslashreplace")

    def token_bytes(self) -> np.ndarray:
        """How many bytes of UTF-8 each token stands for: (V,) int64, 0 for specials. Their sum over a text is exact.

        Raises TokenizerError for `bert`, whose tokens stand for normalised text.
        """
        if self.kind == "bert":
            raise TokenizerError(
                "the tokens of a bert vocabulary stand for no certain number of bytes",
                f"{self.folder} normalises text before cutting it",
                "take the bytes of each document from the shards",
            )
        tokens = (self._engine.id_to_token(i) for i in range(self.vocab_size))
        sizes = np.array([len(token.removeprefix(PREFIX["byte"])) for token in tokens], dtype=np.int64)
        sizes[list(self.specials.values())] = 0
        return sizes


def open_tokenizer(folder: Path | str) -> Tokenizer:
    """The tokenizer published in `folder`, every file checked against the index. Raises TokenizerError."""
    folder = Path(folder)
    index = read_index(folder, TokenizerError, MADE_BY, stage="tokenizer")
    found = faults(folder, index)
    if found:
        remedy = f"copy it again from where it was made, or make it again with: {MADE_BY}"
        raise TokenizerError(f"{folder} is not the tokenizer that was published", *found, remedy)
    engine = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    engine.encode_special_tokens = True  # not stored in tokenizer.json: "[SEP]" in a corpus is five characters
    return Tokenizer(engine, index, folder)


# Words and alphabet


def count_words(texts: Iterable[str], kind: str, lowercase: bool) -> Counter[str]:
    """How often each word occurs: exactly the words that the finished tokenizer will hand to WordPiece."""
    chunks: Counter[str] = Counter()
    with progress("counting words", "documents") as advance:
        for text in texts:
            chunks.update(CHUNK[kind].findall(text))
            advance(1)
    engine = build(list(SPECIALS[kind].values()), kind, lowercase)
    words: Counter[str] = Counter()
    for chunk, count in chunks.items():
        for word in words_of(chunk, engine):
            words[word] += count
    return words


def words_of(text: str, engine: tokenizers.Tokenizer) -> list[str]:
    """`text` normalised and cut into words."""
    if engine.normalizer is not None:
        text = engine.normalizer.normalize_str(text)
    return [word for word, _ in engine.pre_tokenizer.pre_tokenize_str(text)]


def alphabet(words: Counter[str], kind: str, min_count: int) -> tuple[list[str], list[str]]:
    """Symbols that begin a word, and symbols (with prefix) that continue one, each sorted by code point.

    For `bert` only characters that occur inside words get a continuation: `##汉` could never be used. Words too long
    for WordPiece are not looked at.
    """
    if kind == "byte":
        characters = sorted(_byte_of_symbol())
        return characters, [PREFIX[kind] + c for c in characters]
    counts: Counter[str] = Counter()
    inside: set[str] = set()
    for word, count in words.items():
        if len(word) <= WORD_CHARACTERS:
            inside.update(word[1:])
            for character in word:
                counts[character] += count
    starts = sorted(c for c, count in counts.items() if count >= min_count)
    return starts, [PREFIX[kind] + c for c in starts if c in inside]


def _spellable(words: Counter[str], characters: set[str]) -> Counter[str]:
    """The words that do not become the unknown token whatever is merged: nothing is learned from the others."""
    return Counter({w: n for w, n in words.items() if len(w) <= WORD_CHARACTERS and characters.issuperset(w)})


# Merging


def merge(words: Counter[str], tokens: list[str], vocab_size: int, prefix: str) -> list[str]:
    """`tokens` (specials and alphabet) and what byte-pair merging of `words` adds, in order of creation.

    The pair with the highest count is merged first; of equally frequent ones the pair whose (left, right) strings
    come first by code point. Fewer than `vocab_size` tokens come back when no pair is left that occurs twice.
    """
    tokens = list(tokens)
    ids = {token: number for number, token in enumerate(tokens)}
    pieces = _Pieces(words, ids, prefix)
    heap = [(-count, tokens[a], tokens[b]) for (a, b), count in pieces.counts.items() if count >= SEEN_TWICE]
    heapq.heapify(heap)
    with progress("merging", "tokens", vocab_size - len(tokens)) as advance:
        while heap and len(tokens) < vocab_size:
            claimed, left, right = heapq.heappop(heap)
            pair = ids[left], ids[right]
            count = pieces.counts.get(pair, 0)
            if count != -claimed:  # other merges took some since it was pushed
                if count >= SEEN_TWICE:
                    heapq.heappush(heap, (-count, left, right))
                continue
            # Never both ab+c and a+bc: merges happen everywhere at once, leftmost first, so equal strings that no
            # symbol sticks out of are cut alike wherever they stand.
            merged = left + right.removeprefix(prefix)
            assert merged not in ids, f"{merged!r} was made twice"
            ids[merged] = len(tokens)
            tokens.append(merged)
            for a, b in pieces.merge(pair, ids[merged]):
                if pieces.counts[a, b] >= SEEN_TWICE:
                    heapq.heappush(heap, (-pieces.counts[a, b], tokens[a], tokens[b]))
            advance(1)
    return tokens


class _Pieces:
    """Every distinct word as a chain of symbols, and `counts`: how often each pair of neighbours occurs.

    The words lie end to end in flat arrays over N positions, a boundary before, between and after them. A merge
    rewrites all its places at once with a few NumPy calls, which is what makes 8,000 merges of 10 MB take seconds.
    """

    BOUNDARY, SWALLOWED = -1, -2

    def __init__(self, words: Counter[str], ids: dict[str, int], prefix: str):
        text = "\n" + "".join(word + "\n" for word in words)  # no word holds a line end
        points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        starts, continuations = np.full((2, 0x110000), self.BOUNDARY, dtype=np.int32)
        for character in set(text) - {"\n"}:
            starts[ord(character)] = ids[character]
            continuations[ord(character)] = ids.get(prefix + character, self.BOUNDARY)
        boundary = points == ord("\n")
        after_boundary = np.concatenate(([True], boundary[:-1]))
        places = np.arange(len(points), dtype=np.int32)
        self.symbol = np.where(after_boundary, starts[points], continuations[points])  # (N,)
        self.before, self.after = places - 1, places + 1  # (N,) int32: the neighbours still standing
        self.weight = np.array([*words.values(), 0], dtype=np.int64)[np.cumsum(boundary) - 1]  # (N,) count of its word
        self.places = self._places_by_symbol()  # symbol → sorted positions that hold it or once did
        self.counts: dict[tuple[int, int], int] = self._count_pairs()

    def merge(self, pair: tuple[int, int], new: int) -> list[tuple[int, int]]:
        """Write `new` wherever `pair` stands, leftmost first. Returns the pairs that this made."""
        a, b = pair
        here = self._find(a, b)
        swallowed = self.after[here]
        left, right = self.before[here], self.after[swallowed]
        weight = self.weight[here]
        # In "abab" the second place's left neighbour is the first place's b: that pair is counted there, once.
        free = np.concatenate(([True], left[1:] != swallowed[:-1]))
        left, left_weight = left[free], weight[free]
        self._count(self.symbol[left], a, -left_weight)
        self._count(b, self.symbol[right], -weight)
        self.symbol[here], self.symbol[swallowed] = new, self.SWALLOWED
        self.after[here], self.before[right] = right, here
        self.places[new] = here
        del self.counts[pair]
        return self._count(self.symbol[left], new, left_weight) + self._count(new, self.symbol[right], weight)

    def _find(self, a: int, b: int) -> np.ndarray:
        """Sorted positions of `a` directly followed by `b`; in a run such as aaa only every other."""
        rarer = a if len(self.places[a]) <= len(self.places[b]) else b
        places = self.places[rarer]
        places = self.places[rarer] = places[self.symbol[places] == rarer]
        here = places if rarer == a else self.before[places]
        here = here[(self.symbol[here] == a) & (self.symbol[self.after[here]] == b)]
        if a != b:
            return here
        number = np.arange(len(here))
        begins = np.concatenate(([True], here[1:] != self.after[here[:-1]]))
        return here[(number - np.maximum.accumulate(np.where(begins, number, 0))) % 2 == 0]

    def _count(self, left: int | np.ndarray, right: int | np.ndarray, weight: np.ndarray) -> list[tuple[int, int]]:
        """Add `weight` to the counts of the pairs (left, right), one of them an array. Returns the distinct pairs."""
        many_left = isinstance(left, np.ndarray)
        neighbours = left if many_left else right
        inside = neighbours != self.BOUNDARY
        found, totals = _totals(neighbours[inside], weight[inside])
        pairs = [(s, right) if many_left else (left, s) for s in found.tolist()]
        for key, total in zip(pairs, totals.tolist(), strict=True):
            self.counts[key] = self.counts.get(key, 0) + total
        return pairs

    def _count_pairs(self) -> dict[tuple[int, int], int]:
        size = int(self.symbol.max(initial=0)) + 1
        counts: Counter[tuple[int, int]] = Counter()
        for begin in range(0, len(self.symbol) - 1, STRETCH):
            left, right = self.symbol[begin : begin + STRETCH], self.symbol[begin + 1 : begin + 1 + STRETCH]
            pairs = np.flatnonzero((left[: len(right)] != self.BOUNDARY) & (right != self.BOUNDARY))
            keys, totals = _totals(left[pairs].astype(np.int64) * size + right[pairs], self.weight[begin + pairs])
            for key, total in zip(keys.tolist(), totals.tolist(), strict=True):
                counts[divmod(key, size)] += total
        return dict(counts)

    def _places_by_symbol(self) -> dict[int, np.ndarray]:
        order = np.argsort(self.symbol, kind="stable").astype(np.int32)
        symbols, first = np.unique(self.symbol[order], return_index=True)
        return dict(zip(symbols.tolist(), np.split(order, first[1:]), strict=True))


def _totals(keys: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct keys and the sum of each one's weights, in integers (bincount would add floats)."""
    order = np.argsort(keys, kind="stable")
    distinct, first = np.unique(keys[order], return_index=True)
    return distinct, np.add.reduceat(weight[order], first) if len(first) else weight[:0]


# What is written


def build(tokens: list[str], kind: str, lowercase: bool) -> tokenizers.Tokenizer:
    """The tokenizer with exactly these tokens, ids in their order."""
    vocab = {token: number for number, token in enumerate(tokens)}
    assert len(vocab) == len(tokens), f"{len(tokens)} tokens, {len(vocab)} of them distinct"
    specials, prefix = SPECIALS[kind], PREFIX[kind]
    model = models.WordPiece(
        vocab,
        unk_token=specials["unk"],
        continuing_subword_prefix=prefix,
        max_input_chars_per_word=WORD_CHARACTERS,
    )
    engine = tokenizers.Tokenizer(model)
    engine.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials.values()])
    engine.encode_special_tokens = True
    if kind == "bert":
        engine.normalizer = normalizers.BertNormalizer(
            clean_text=True, handle_chinese_chars=True, strip_accents=lowercase, lowercase=lowercase
        )
        engine.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        engine.decoder = decoders.WordPiece(prefix=prefix)
        single, pair = "[CLS]:0 $A:0 [SEP]:0", "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1"
        template = ["cls", "sep"]
    else:
        words = pre_tokenizers.Split(Regex(BYTE_WORDS), behavior="isolated")
        symbols = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # BYTE_WORDS has cut already
        engine.pre_tokenizer = pre_tokenizers.Sequence([words, symbols])
        engine.decoder = decoders.Sequence([decoders.Replace(prefix, ""), decoders.ByteLevel()])
        single, pair = "$A <eod>", "$A <eod> $B <eod>"
        template = ["eod"]
    special_tokens = [(specials[role], vocab[specials[role]]) for role in template]
    engine.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=special_tokens)
    return engine


def _write(folder: Path, engine: tokenizers.Tokenizer, tokens: list[str], kind: str, lowercase: bool) -> None:
    """The files that `AutoTokenizer.from_pretrained(folder)` of transformers 4 and 5 opens with the same ids."""
    (folder / "tokenizer.json").write_bytes((engine.to_str(pretty=True) + "\n").encode("utf-8"))
    specials = SPECIALS[kind]
    if kind == "bert":
        (folder / "vocab.txt").write_bytes("".join(token + "\n" for token in tokens).encode("utf-8"))
        config = {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": lowercase,
            "strip_accents": lowercase,
            "tokenize_chinese_chars": True,
            **{f"{role}_token": token for role, token in specials.items()},
        }
    else:
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_input_names": ["input_ids", "attention_mask"],  # decoders refuse token_type_ids
            "pad_token": specials["pad"],
            "unk_token": specials["unk"],
            "eos_token": specials["eod"],
        }
    write_json(folder / "tokenizer_config.json", {**config, "clean_up_tokenization_spaces": False})


# What is reported


def measure(engine: tokenizers.Tokenizer, kind: str, documents: Iterator[Document]) -> dict:
    """How well the vocabulary fits `documents`, `overall` and in `sources`; the template's tokens are not counted."""
    tokens = (engine.id_to_token(i) for i in range(engine.get_vocab_size()))
    continues = np.array([token.startswith(PREFIX[kind]) for token in tokens])  # (V,)
    unknown = engine.token_to_id(SPECIALS[kind]["unk"])
    tallies: dict[str, Counter] = {}
    while batch := list(islice(documents, 64)):
        encodings = engine.encode_batch_fast([document.text for document in batch], add_special_tokens=False)
        for document, encoding in zip(batch, encodings, strict=True):
            ids = np.array(encoding.ids, dtype=np.int64)
            begins = ~continues[ids]  # every word has one token that does, and [UNK] is a word
            alone = begins & np.append(begins[1:], True) & (ids != unknown)
            tally = tallies.setdefault(document.source, Counter())
            tally["documents"] += 1
            tally["characters"] += len(document.text)
            tally["bytes"] += len(document.text.encode("utf-8"))
            tally["tokens"] += len(ids)
            tally["unknown"] += int((ids == unknown).sum())
            tally["words"] += int(begins.sum())
            tally["whole_words"] += int(alone.sum())
    overall = sum(tallies.values(), Counter())
    return {"overall": _rates(overall), "sources": {name: _rates(tally) for name, tally in tallies.items()}}


def _rates(tally: Counter) -> dict:
    """Counts of a part of the text, and their ratios (None where it has no words at all, only control characters)."""

    def ratio(part: str, whole: str) -> float | None:
        return tally[part] / tally[whole] if tally[whole] else None

    return {
        **{key: tally[key] for key in ("documents", "characters", "bytes", "tokens", "words")},
        "characters_per_token": ratio("characters", "tokens"),
        "bytes_per_token": ratio("bytes", "tokens"),
        "tokens_per_word": ratio("tokens", "words"),
        "whole_word_share": ratio("whole_words", "words"),
        "unknown_rate": ratio("unknown", "tokens"),
    }


# What is refused


def _tallied(corpus: Corpus, seen: dict[str, Counter]) -> Iterator[str]:
    """The train texts; the documents of both sides are counted in `seen`."""
    for document in corpus.documents():
        tally = seen[document.side]
        tally["documents"] += 1
        tally["characters"] += len(document.text)
        tally["bytes"] += len(document.text.encode("utf-8"))
        if document.side == "train":
            yield document.text


def _check_sides(name: str, seen: dict[str, Counter]) -> None:
    train, heldout = seen["train"]["documents"], seen["heldout"]["documents"]
    if train == 0 or heldout == 0:
        raise CorpusError(
            "a vocabulary needs train documents to learn from and held-out ones to be measured on",
            f"{name} has {train} train and {heldout} held-out documents",
            "add documents (in .txt a blank line ends one), or set heldout_fraction in a recipe.yaml",
        )


def _check_room(config: TokenizerConfig, specials: int, needed: int) -> None:
    if config.vocab_size < needed:
        remedy = f"set vocab_size to {needed} or more"
        if config.kind == "bert":
            remedy += f", or alphabet_min_count above {config.alphabet_min_count} (rare characters become [UNK])"
        raise TokenizerError(
            f"vocab_size = {config.vocab_size} is too small for the alphabet",
            f"{specials} specials and {needed - specials} symbols of the alphabet need {needed}",
            remedy,
        )


def _check_scalar_values(text: str, number: int) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TokenizerError(
            "the text is not valid Unicode",
            f"text {number} of the batch, character {error.start + 1}: lone surrogate {text[error.start]!a}",
            "repair or remove the text",
        ) from None


def _byte_of_symbol() -> dict[str, int]:
    """The byte-level alphabet: printable Latin-1 stands for itself, the other 68 bytes for U+0100 and on (GPT-2)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}
