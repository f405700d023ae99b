r"""Encode text with array operations on whole batches: the ids of `tokenizers`, about ten times as fast on one core.

One module finds the words of all documents at once, another their tokens. Each id is written at the byte where its
token begins:

    \xfehe plays.\xff…
    2   7  9   532          [CLS] he play ##s . [SEP]

There is no cache of words, so the speed does not depend on repetition.

The ids are checked. If a `tokenizers` object has parts that are unknown here, or gives other ids for the probe texts,
it encodes all text itself, and `Encoder.path` is "library".
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Literal

import numpy as np
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from pretrain.tokenizer.fast.cut import BEGIN, END, BertWords, ByteWords, CutText
from pretrain.tokenizer.fast.prefixes import Prefixes
from pretrain.tokenizer.kinds import BYTE_WORDS, SPECIALS, WORD_CHARACTERS, Rules, build

SMALL = 1 << 14  # characters of a batch for the library: below 4,000 it is as fast, and building our tables takes 0.1 s
GROUP = 1 << 18  # characters that are processed together; the arrays take 23 bytes for each byte of text


class Encoder:
    """Encodes like `engine.encode_batch_fast`, but faster and on one thread, for processes that each encode a part.

    Documents are not divided, so memory is 23 times the longest document (with the library 85 times). Opening is free,
    because the first batch that is not small builds the tables.
    """

    def __init__(self, engine: tokenizers.Tokenizer):
        self._engine = engine

    def __reduce__(self):
        return Encoder, (self._engine,)  # the other process builds its own tables

    @property
    def path(self) -> Literal["fast", "library"]:
        """The encoder of large batches. It is the library, too, if special tokens in text are to be recognised."""
        return "fast" if self._engine.encode_special_tokens and self._fast else "library"

    def encode_flat(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all texts with templates, concatenated, (tokens,) int32; and their numbers, (texts,) int64.

        Raises UnicodeEncodeError or TypeError for a lone surrogate.
        """
        if sum(map(len, texts)) < SMALL or self.path == "library" or self._fast is None:
            return _flat(encoding.ids for encoding in self._engine.encode_batch_fast(texts))
        ids, lengths = zip(*map(self._fast.encode, _groups(texts)), strict=True)
        return np.concatenate(ids), np.concatenate(lengths)

    @cached_property
    def _fast(self) -> "_Fast | None":
        vocabulary = self._engine.get_vocab(with_added_tokens=False)
        words = _words(self._engine, vocabulary)
        if words is None:
            return None
        fast, probes = _Fast(self._engine, vocabulary, words), _probes(vocabulary)
        expected = _flat(encoding.ids for encoding in self._engine.encode_batch_fast(probes))
        return fast if all(map(np.array_equal, fast.encode(probes), expected)) else None


def split(ids: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    """The ids of each text, as views of `ids`."""
    return [ids[start:end] for start, end in pairwise([0, *np.cumsum(lengths).tolist()])]


class _Fast:
    """The fast path of `Encoder`."""

    def __init__(self, engine: tokenizers.Tokenizer, vocabulary: dict[str, int], words: BertWords | ByteWords):
        self._engine, self._words = engine, words
        self._unknown = vocabulary[engine.model.unk_token]
        self._longest = engine.model.max_input_chars_per_word
        prefix = engine.model.continuing_subword_prefix
        starts, continuations = {}, {}
        for token, number in vocabulary.items():
            starts[words.spelled(token)] = number  # a token with the prefix too: text may spell it
            if token.startswith(prefix):
                continuations[words.spelled(token.removeprefix(prefix))] = number
        for tokens in (starts, continuations):
            tokens.pop(b"", None)
        self._prefixes = Prefixes(starts, continuations)
        text, document = (engine.encode("a", add_special_tokens=whole).ids for whole in (False, True))
        place = document.index(text[0])
        self._marks = {BEGIN: document[:place], END: document[place + len(text) :]}  # the template

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """As `Encoder.encode_flat`."""
        words = self._words([text.encode() for text in texts])
        ids = words.ids
        self._match(words)
        for mark, tokens in self._marks.items():
            ids[words.buffer == mark] = tokens[0] if tokens else -1
        places = np.flatnonzero(ids >= 0)
        ends = np.searchsorted(places, np.flatnonzero(words.buffer == END), side="right")
        ids, lengths = ids[places], np.diff(ends, prepend=0)
        if not len(words.foreign):
            return ids, lengths
        documents = np.searchsorted(np.flatnonzero(words.buffer == BEGIN), words.foreign) - 1
        rows = split(ids, lengths)
        foreign = np.unique(documents).tolist()
        for n, encoding in zip(foreign, self._engine.encode_batch_fast([texts[n] for n in foreign]), strict=True):
            rows[n] = np.array(encoding.ids, np.int32)
        return _flat(rows)

    def _match(self, words: CutText) -> None:
        """Write the tokens of all words. A word is unknown if it is too long or if no token matches a part of it."""
        starts, ends = words.starts, words.ends
        long = np.flatnonzero(ends - starts > self._longest)  # first by bytes, then by characters
        sizes = [np.count_nonzero(words.buffer[starts[n] : ends[n]] & 0xC0 != 0x80) for n in long]
        over = long[np.array(sizes, np.int64) > self._longest]
        words.ids[starts[over]] = self._unknown
        starts, ends = np.delete(starts, over), np.delete(ends, over)
        stuck = self._prefixes.match(words.buffer, starts, ends, words.ids)
        unknown = np.searchsorted(starts, stuck, side="right") - 1
        starts, sizes = starts[unknown], ends[unknown] - starts[unknown]
        words.ids[np.repeat(starts + sizes - np.cumsum(sizes), sizes) + np.arange(sizes.sum())] = -1
        words.ids[starts] = self._unknown


def _groups(texts: list[str]) -> Iterator[list[str]]:
    """`texts` in order, in lists of about GROUP characters."""
    group, size = [], 0
    for text in texts:
        group.append(text)
        size += len(text)
        if size >= GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group


def _flat(rows: Iterable[Sequence[int] | np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    arrays = [np.array(row, np.int32) for row in rows]
    return np.concatenate([np.zeros(0, np.int32), *arrays]), np.array([len(row) for row in arrays], np.int64)


# Which `tokenizers` objects the fast path supports


def _words(engine: tokenizers.Tokenizer, vocabulary: dict[str, int]) -> BertWords | ByteWords | None:
    """The splitter that equals the normaliser and pre-tokenizer of `engine`; None if one of them is unknown here."""
    model = engine.model
    if not isinstance(model, models.WordPiece) or model.unk_token not in vocabulary:
        return None
    if engine.truncation or engine.padding or not all(t.special for t in engine.get_added_tokens_decoder().values()):
        return None  # the library searches text for added tokens that are not special
    changes, cuts = _parts(engine.normalizer), _parts(engine.pre_tokenizer)
    if not changes and model.max_input_chars_per_word == WORD_CHARACTERS:
        for digits in BYTE_WORDS:
            if cuts == _parts(build(list(SPECIALS["byte"].values()), Rules("byte", digits=digits)).pre_tokenizer):
                return ByteWords(single=digits == "single")
    names = [change["type"] for change in changes]
    bert, single = {"type": "BertPreTokenizer"}, {"type": "Digits", "individual_digits": True}
    if names in (["BertNormalizer"], ["NFKC", "BertNormalizer"]) and cuts in ([bert], [bert, single]):
        return BertWords(engine, vocabulary, composes="NFKC" in names)
    return None


def _parts(whole: normalizers.Normalizer | pre_tokenizers.PreTokenizer | None) -> list[dict]:
    """The parts of a normaliser or pre-tokenizer, in order."""
    if whole is None:
        return []
    state = json.loads(whole.__getstate__())
    return state.get("normalizers") or state.get("pretokenizers") or [state]


def _probes(vocabulary: dict[str, int]) -> list[str]:
    """Texts that reveal differences: characters of every kind, every way to split them, hundreds of tokens."""
    characters = [chr(code) for code in range(0x180)]
    characters += "\u0301\u0345\u1680\u180e\u200b\u2028\u3000\ufeff\ufffd\ue000\U000e0041\U00020000\U0002b820\U0001fae8"
    characters += "ΑΣςяйİẞﬁ½①㈱™…—’“”，。、！？（）《》「」Ａａ１ｱﾞがか한ᄒ\u1161กำनीעا٣Ⅷ漢汉㐀豈😀"
    runs = [character * size for character in "a1.汉 \n" for size in (2, 23, 24, 25, 26, 48, 49, 50, 100, 101)]
    words = (
        "don't we'll I'VE they're 'tis ''s x's's it'd'm 3.14 10,000 naïve Élan e\u0301tude か\u3099 [SEP] <eod> "
        "“你好，世界！”——『２０２４年』\u3000北京 abc汉字abc\n\n\tThe end.  \r\n"
    )
    tokens = sorted(vocabulary)[:: len(vocabulary) // 500 + 1]
    return [
        *("", " ", "".join(characters), "x".join(runs), " ".join(runs), ".".join(runs), "\t\n 汉".join(runs)),
        " ".join(f"b{character}b {character} 1{character}.{character}'s" for character in characters),
        *(words, words.upper(), words.replace(" ", "  "), words[::-1]),
        "!" * 24 + "'s" + "!" * 25 + "'s '" + "." * 48 + "'ll",
        *(" ".join(tokens), "".join(tokens)),
    ]
