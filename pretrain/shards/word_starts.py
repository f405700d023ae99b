"""Where words begin in a shard set: what masks whole words, Chinese ones too.

In spaced scripts the ids say it: a token without `##` begins a word. Chinese is written without spaces and every
character is a token, so a segmenter says it, once, here; the result lies beside the ids, and lengths never change:

    SHARDS/words/index.json     which shards, segmenter and dictionary; written last
    SHARDS/words/train.bits     a bit a token of the stream, 1 where a word begins; the first token is the lowest bit
    SHARDS/words/heldout.bits

Words are of the ids, not of the text as it was: a run of Chinese characters is put together again from its tokens and
segmented. Whatever stands between ends a word: another script, a digit, a punctuation mark, [UNK], the document's end.
The same in both kinds: where characters are made of several tokens (`byte`) a word begins at the first byte of its
first character, and one that begins inside a token begins nowhere.
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
# The ranges that BERT takes apart into characters (its `_is_chinese_char`), and the newer extensions F to J.
HAN = re.compile(
    "[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002ee5f\U0002f800-\U0002fa1f"
    "\U00030000-\U0003347f]+"
)


class StoredWordStarts:
    """Which tokens of one side of a shard set begin a word, as the stage `words` found them.

    Raises ShardError when there is no such result, or it is of other shards.
    """

    def __init__(self, shards: Shards):
        folder = shards.folder / FOLDER
        index = read_index(folder, ShardError, MADE_BY, stage="words")
        if index["shards"] != shards.fingerprint:
            raise ShardError(
                "these words were found in other shards",
                f"{folder} says {index['shards'][:12]}…, {shards.folder} is {shards.fingerprint[:12]}…",
                f"find them again with: {MADE_BY}",
            )
        self._unchanged = Unchanged(folder, index, [f"{shards.side}.bits"])
        check_contents(folder, index, ShardError, f"make it again with: {MADE_BY}")
        self.fingerprint: str = index["fingerprint"]
        self.tokens = shards.tokens
        self._bytes = TokenFiles([folder / f"{shards.side}.bits"], np.array([-(-self.tokens // 8)]), np.uint8)

    def check_unchanged(self) -> None:
        """Raise ShardError if the bits are no longer what they were when they were opened."""
        self._unchanged.check(ShardError)

    def gather(self, starts: np.ndarray, length: int) -> np.ndarray:
        """(B, length) bool at stream positions starts[b] … starts[b] + length - 1; all must lie in the stream."""
        assert starts.min() >= 0 and starts.max() + length <= self.tokens, (starts.min(), starts.max(), self.tokens)
        first, shift = starts >> 3, starts & 7
        count = min(-(-length // 8) + 1, int(self._bytes.ends[-1]))
        inside = np.minimum(first, int(self._bytes.ends[-1]) - count)  # the last bytes are read from further ahead
        bits = np.unpackbits(self._bytes.rows(inside, count).astype(np.uint8), axis=1, bitorder="little")
        shift += (first - inside) * 8
        # Every place of the bits begins a row of a view: choosing rows copies each in one piece.
        view = np.ndarray((bits.size - length + 1, length), np.bool_, bits, 0, (1, 1))
        return view[np.arange(len(starts)) * bits.shape[1] + shift]


class MarkedWordStarts:
    """The same from the ids alone: a token begins a word unless it is written as the continuation of one."""

    def __init__(self, shards: Shards, tokenizer: Tokenizer):
        self.fingerprint = tokenizer.fingerprint  # which decides it, with the ids
        self._shards, self._begins = shards, ~TokenKinds(tokenizer).continues

    def check_unchanged(self) -> None:
        """It reads the ids alone, and the shards are checked for themselves."""

    def gather(self, starts: np.ndarray, length: int) -> np.ndarray:
        return np.take(self._begins, self._shards.gather(starts, length))


def open_words(shards: Shards, tokenizer: Tokenizer) -> StoredWordStarts | MarkedWordStarts:
    """Where words begin in `shards`: as the stage `words` found them, or as the ids say if there is no Chinese.

    Raises ShardError when there is Chinese and the stage was not run, or was run on other shards; TokenizerError when
    the tokens do not say what continues a word.
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
            found = f"the tokens of {shards.folder} are bytes: which of them are Chinese is not seen from each"
        remedy = f"find the words, once, with: {MADE_BY} (shards={shards.folder})"
        raise ShardError("Chinese words are not seen from the ids", found, remedy)
    return MarkedWordStarts(shards, tokenizer)


def check_prefix(tokenizer: Tokenizer) -> None:
    if not tokenizer.vocabulary.prefix:
        raise TokenizerError(
            "the tokens of this vocabulary do not say what continues a word",
            f"{tokenizer.folder} has no prefix such as ##",
            "mask tokens: objective.unit=token",
        )


class TokenKinds:
    """What the tokens of a vocabulary are as text."""

    def __init__(self, tokenizer: Tokenizer):
        vocabulary = tokenizer.vocabulary
        ids = range(tokenizer.vocab_size)
        self.raw = [vocabulary.raw(i) or b"\0" for i in ids]  # a mark parts what it stands between
        self.sizes = np.array([len(raw) for raw in self.raw], np.int64)
        written = [vocabulary.engine.id_to_token(i) or "" for i in ids]
        self.continues = np.array([self.raw[i] != b"\0" and written[i].startswith(vocabulary.prefix) for i in ids])
        self.space = np.array([raw == b" " for raw in self.raw])
        self.han = np.array([HAN.match(raw.decode("utf-8", errors="ignore")) is not None for raw in self.raw])

    def begins(self, ids: np.ndarray, cut: Callable[[str], list[str]]) -> np.ndarray:
        """(n,) bool: which tokens of whole documents, one after another, begin a word."""
        begins = ~self.continues[ids]
        if not len(ids):
            return begins
        text = b"".join(map(self.raw.__getitem__, ids.tolist())).decode("utf-8", errors="surrogateescape")
        state = np.zeros(int(self.sizes[ids].sum()) + 1, np.uint8)  # by byte: 1 Chinese, 2 where a word begins
        for at, characters in _runs(text):
            state[at : at + _size(characters)] = 1
            state[at + _offsets(cut(characters))] = 2
        offsets = np.cumsum(self.sizes[ids])
        offsets -= self.sizes[ids]
        found = state[offsets]
        # A space is the first token of the word behind it, as it is the first character of an English one.
        spaced = self.continues[ids] & np.concatenate([[False], self.space[ids[:-1]]])
        return np.where(found == 0, begins, (found == 2) & ~spaced)


def _runs(text: str) -> Iterator[tuple[int, str]]:
    """Runs of Chinese characters, and at which byte of the text each begins."""
    last = at = 0
    for match in HAN.finditer(text):
        at += _size(text[last : match.start()])
        yield at, match[0]
        at += _size(match[0])
        last = match.end()


def _offsets(words: list[str]) -> np.ndarray:
    """The byte at which each word begins."""
    sizes = np.array([_size(word) for word in words])
    return np.cumsum(sizes) - sizes


def _size(text: str) -> int:
    return len(text.encode("utf-8", errors="surrogateescape"))
