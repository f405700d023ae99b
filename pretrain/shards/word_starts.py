"""The beginnings of words in a shard set, for masking whole words, also Chinese words.

In scripts with spaces the ids are enough: a token without `##` begins a word. Chinese is written without spaces and
every character is a token, so the stage `words` runs a segmenter once. Its result lies beside the ids:

    SHARDS/words/index.json     the shards, the segmenter and the dictionary; written last
    SHARDS/words/train.bits     one bit a token, 1 where a word begins; the lowest bit of a byte is the first
    SHARDS/words/heldout.bits

The segmenter reads the text of the tokens, not the original text: each run of Chinese characters is put together from
its tokens and segmented. Anything else ends a word: another script, a digit, a punctuation mark, [UNK], the document's
end. Both kinds of vocabulary follow the same rule. If a character has several tokens (`byte`), a word begins at the
first byte of its first character. A word that begins inside a token is not marked.
"""

import re
from collections.abc import Callable, Iterator

import numpy as np

from pretrain.errors import ShardError, TokenizerError
from pretrain.shards.reader import Shards, TokenFiles, check_tokenizer
from pretrain.storage.index import INDEX, check_contents, read_index
from pretrain.storage.unchanged import Unchanged
from pretrain.tokenizer import Tokenizer

MADE_BY = "python launch/words.py CONFIG.yaml"
FOLDER = "words"
# The ranges that BERT splits into characters (its `_is_chinese_char`), and the newer extensions F to J.
HAN = re.compile(
    "[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002ee5f\U0002f800-\U0002fa1f"
    "\U00030000-\U0003347f]+"
)


class StoredWordStarts:
    """The beginnings of words on one side of a shard set, as found by the stage `words`.

    Raises ShardError if there is no result of the stage, or if it belongs to other shards.
    """

    def __init__(self, shards: Shards):
        folder = shards.folder / FOLDER
        index = read_index(folder, ShardError, MADE_BY, stage="words")
        if index["shards"] != shards.fingerprint:
            raise ShardError(
                "these words were found in other shards",
                f"{folder} says {index['shards'][:12]}…, {shards.folder} has {shards.fingerprint[:12]}…",
                f"find them again with: {MADE_BY}",
            )
        self._unchanged = Unchanged(folder, index, [f"{shards.side}.bits"])
        check_contents(folder, index, ShardError, f"make it again with: {MADE_BY}")
        self.fingerprint: str = index["fingerprint"]
        self.tokens = shards.tokens
        self._bytes = TokenFiles([folder / f"{shards.side}.bits"], np.array([-(-self.tokens // 8)]), np.dtype(np.uint8))

    def check_unchanged(self) -> None:
        """Raise ShardError, naming the file, if the bits have changed since they were opened."""
        self._unchanged.check(ShardError)

    def gather(self, starts: np.ndarray, length: int) -> np.ndarray:
        """(B, length) bool: True where a word begins at stream positions starts[b] … starts[b] + length - 1."""
        assert starts.min() >= 0 and starts.max() + length <= self.tokens, (starts.min(), starts.max(), self.tokens)
        first, shift = starts >> 3, starts & 7
        count = min(-(-length // 8) + 1, int(self._bytes.ends[-1]))
        inside = np.minimum(first, int(self._bytes.ends[-1]) - count)  # near the end, begin earlier
        bits = np.unpackbits(self._bytes.rows(inside, count).astype(np.uint8), axis=1, bitorder="little")
        shift += (first - inside) * 8
        # Row n of this view is bits[n : n + length]. Indexing the view copies each row in one piece.
        view = np.ndarray((bits.size - length + 1, length), np.bool_, bits, 0, (1, 1))
        return view[np.arange(len(starts)) * bits.shape[1] + shift]


class MarkedWordStarts:
    """The beginnings of words from the ids alone: every token begins a word unless it has the prefix `##`."""

    def __init__(self, shards: Shards, tokenizer: Tokenizer):
        self.fingerprint = tokenizer.fingerprint  # the ids and the tokenizer determine the result
        self._shards, self._begins = shards, ~TokenKinds(tokenizer).continues

    def check_unchanged(self) -> None:
        """Nothing to check: it reads only the ids, and `Shards` checks them."""

    def gather(self, starts: np.ndarray, length: int) -> np.ndarray:
        return np.take(self._begins, self._shards.gather(starts, length))


def open_words(shards: Shards, tokenizer: Tokenizer) -> StoredWordStarts | MarkedWordStarts:
    """The beginnings of words in `shards`: from the stage `words`, or from the ids if there is no Chinese.

    Raises ShardError if there is Chinese and the stage was not run or was run on other shards, and TokenizerError if
    the vocabulary has no prefix for the continuation of a word.
    """
    check_tokenizer(shards.index, shards.folder, tokenizer)
    check_prefix(tokenizer)
    if (shards.folder / FOLDER / INDEX).exists():
        return StoredWordStarts(shards)
    tokens = TokenKinds(tokenizer)
    chinese = int(shards.unigram()[tokens.han].sum())
    if chinese or tokenizer.vocabulary.in_bytes:
        found = f"{chinese:,} of the {shards.tokens:,} {shards.side} tokens of {shards.folder} are Chinese"
        if tokenizer.vocabulary.in_bytes:
            found = f"the tokens of {shards.folder} are bytes, so a single token does not show whether it is Chinese"
        remedy = f"find the words once with: {MADE_BY} (shards={shards.folder})"
        raise ShardError("Chinese words are not seen from the ids", found, remedy)
    return MarkedWordStarts(shards, tokenizer)


def check_prefix(tokenizer: Tokenizer) -> None:
    """Raise TokenizerError if the vocabulary has no prefix for the continuation of a word."""
    if not tokenizer.vocabulary.prefix:
        raise TokenizerError(
            "the tokens of this vocabulary do not show which of them continue a word",
            f"{tokenizer.folder} has no prefix such as ##",
            "mask tokens: objective.unit=token",
        )


class TokenKinds:
    """The text of every token of a vocabulary, and its kind."""

    def __init__(self, tokenizer: Tokenizer):
        vocabulary = tokenizer.vocabulary
        ids = range(tokenizer.vocab_size)
        self.raw = [vocabulary.raw(i) or b"\0" for i in ids]  # a mark separates its neighbours
        self.sizes = np.array([len(raw) for raw in self.raw], np.int64)
        written = [vocabulary.engine.id_to_token(i) or "" for i in ids]
        self.continues = np.array([self.raw[i] != b"\0" and written[i].startswith(vocabulary.prefix) for i in ids])
        self.space = np.array([raw == b" " for raw in self.raw])
        self.han = np.array([HAN.match(raw.decode("utf-8", errors="ignore")) is not None for raw in self.raw])

    def begins(self, ids: np.ndarray, cut: Callable[[str], list[str]]) -> np.ndarray:
        """(n,) bool: True where a word begins, for the `ids` of successive whole documents."""
        begins = ~self.continues[ids]
        if not len(ids):
            return begins
        text = b"".join(map(self.raw.__getitem__, ids.tolist())).decode("utf-8", errors="surrogateescape")
        state = np.zeros(int(self.sizes[ids].sum()) + 1, np.uint8)  # of each byte: 1 Chinese, 2 a word begins
        for at, characters in _runs(text):
            state[at : at + _size(characters)] = 1
            state[at + _offsets(cut(characters))] = 2
        offsets = np.cumsum(self.sizes[ids])
        offsets -= self.sizes[ids]
        found = state[offsets]
        # A Chinese word begins with the space before it, as an English word does.
        spaced = self.continues[ids] & np.concatenate([[False], self.space[ids[:-1]]])
        return np.where(found == 0, begins, (found == 2) & ~spaced)


def _runs(text: str) -> Iterator[tuple[int, str]]:
    """The position of each run of Chinese characters in the text, in bytes, and the run."""
    last = at = 0
    for match in HAN.finditer(text):
        at += _size(text[last : match.start()])
        yield at, match[0]
        at += _size(match[0])
        last = match.end()


def _offsets(words: list[str]) -> np.ndarray:
    """The first byte of each word."""
    sizes = np.array([_size(word) for word in words])
    return np.cumsum(sizes) - sizes


def _size(text: str) -> int:
    return len(text.encode("utf-8", errors="surrogateescape"))
