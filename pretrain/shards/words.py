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

import hashlib
import logging
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib import metadata
from pathlib import Path
from typing import Literal

import numpy as np

from pretrain.config import StageConfig, free
from pretrain.corpus import SIDES
from pretrain.display.progress import closing_line, progress
from pretrain.errors import ConfigError, ShardError, TokenizerError
from pretrain.processes.pool import ordered
from pretrain.shards import Shards, check_tokenizer
from pretrain.shards.reader import TokenFiles
from pretrain.storage.index import INDEX, check_contents, read_index, write_index
from pretrain.storage.publish import publish
from pretrain.storage.sealed import sealed, unsealed, usable
from pretrain.storage.unchanged import Unchanged
from pretrain.storage.work import kept, settled
from pretrain.tokenizer import Tokenizer, open_tokenizer

MADE_BY = "python launch/words.py CONFIG.yaml"
FOLDER = "words"
STRETCH_TOKENS = 1 << 21  # of whole documents, that a process segments at a time: 10 to 20 s, 0.2 GB

# The ranges that BERT takes apart into characters (its `_is_chinese_char`), and the newer extensions F to J.
HAN = re.compile(
    "[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002ee5f\U0002f800-\U0002fa1f"
    "\U00030000-\U0003347f]+"
)


class WordsConfig(StageConfig):
    """What `launch/words.py` reads."""

    shards: str  # folder of the shards stage; the result becomes its folder `words`
    tokenizer: str  # the one they were built with
    segmenter: Literal["jieba"] = "jieba"
    user_dictionary: str | None = None  # words it does not know, as jieba has them: a line each, `word [count] [tag]`
    workers: int = free(1, ge=1)


def run(config: WordsConfig) -> dict:
    """Segment a shard set into `SHARDS/words`; returns the index. Killed and started again it goes on where it was.

    Raises ShardError, TokenizerError, or ConfigError for the dictionary.
    """
    began = time.monotonic()
    segmenter = Segmenter(config.segmenter, _dictionary(config.user_dictionary))
    identity = segmenter.identity()
    folder = Path(config.shards)
    sides = {side: Shards(folder, side) for side in SIDES}
    train = sides["train"]
    tokenizer = open_tokenizer(config.tokenizer)
    check_tokenizer(train.index, folder, tokenizer)
    _check_prefix(tokenizer)
    with (
        publish(folder / FOLDER, "words", ShardError, config) as out,
        kept(folder / FOLDER, "stretches", "stretches-*/[!.]*", ShardError, derived=True) as parent,
    ):
        work = settled(parent, "stretches", [train.fingerprint, identity, STRETCH_TOKENS])
        counts = {}
        for side, shards in sides.items():
            stretches = list(_stretches(shards))
            job = Job(folder, side, Path(config.tokenizer), segmenter, work)
            with progress(f"words of {side}", "tokens", shards.tokens) as advance:
                begun = 0
                with BitFile(out / f"{side}.bits") as file:
                    results = ordered(partial(segment_stretch, job), stretches, config.workers)
                    for stretch, path in zip(stretches, results, strict=True):
                        begins = np.unpackbits(
                            np.frombuffer(unsealed(path), np.uint8), count=stretch.tokens, bitorder="little"
                        )
                        begun += int(begins.sum())
                        file.add(begins)
                        advance(stretch.tokens)
            counts[side] = {"tokens": shards.tokens, "words": begun}
        index = {
            "stage": "words",
            "format": 1,
            "shards": train.fingerprint,
            **identity,
            "sides": counts,
            "recorded": {"shards": config.shards, "user_dictionary": config.user_dictionary},
        }
        index = write_index(out, index)
    for side, found in counts.items():
        print(f"{side}: {found['words']:,} words in {found['tokens']:,} tokens")
    closing_line("words", began)
    return index


# Use


class Words:
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


class MarkedWords:
    """The same from the ids alone: a token begins a word unless it is written as the continuation of one."""

    def __init__(self, shards: Shards, tokenizer: Tokenizer):
        self.fingerprint = tokenizer.fingerprint  # which decides it, with the ids
        self._shards, self._begins = shards, ~_Tokens(tokenizer).continues

    def check_unchanged(self) -> None:
        """It reads the ids alone, and the shards are checked for themselves."""

    def gather(self, starts: np.ndarray, length: int) -> np.ndarray:
        return np.take(self._begins, self._shards.gather(starts, length))


def open_words(shards: Shards, tokenizer: Tokenizer) -> Words | MarkedWords:
    """Where words begin in `shards`: as the stage `words` found them, or as the ids say if there is no Chinese.

    Raises ShardError when there is Chinese and the stage was not run, or was run on other shards; TokenizerError when
    the tokens do not say what continues a word.
    """
    check_tokenizer(shards.index, shards.folder, tokenizer)
    _check_prefix(tokenizer)
    if (shards.folder / FOLDER / INDEX).exists():
        return Words(shards)
    tokens = _Tokens(tokenizer)
    chinese = int(shards.unigram()[tokens.han].sum())
    if chinese or tokenizer.vocabulary.in_bytes:
        found = f"{chinese:,} of the {shards.tokens:,} {shards.side} tokens of {shards.folder} are Chinese"
        if tokenizer.vocabulary.in_bytes:
            found = f"the tokens of {shards.folder} are bytes: which of them are Chinese is not seen from each"
        remedy = f"find the words, once, with: {MADE_BY} (shards={shards.folder})"
        raise ShardError("Chinese words are not seen from the ids", found, remedy)
    return MarkedWords(shards, tokenizer)


def _check_prefix(tokenizer: Tokenizer) -> None:
    if not tokenizer.vocabulary.prefix:
        raise TokenizerError(
            "the tokens of this vocabulary do not say what continues a word",
            f"{tokenizer.folder} has no prefix such as ##",
            "mask tokens: objective.unit=token",
        )


# Segmenting


@dataclass(frozen=True)
class Segmenter:
    """A segmenter by name, with words of the user's (UTF-8) beside its own dictionary."""

    name: str
    user_dictionary: bytes

    def identity(self) -> dict:
        """What decides the result: name, version, hash of the dictionaries."""
        own = _jieba().Tokenizer().get_dict_file().read()
        return {
            "segmenter": self.name,
            "segmenter_version": metadata.version(self.name),
            "dictionary": hashlib.sha256(own).hexdigest(),
            "user_dictionary": hashlib.sha256(self.user_dictionary).hexdigest() if self.user_dictionary else None,
        }

    def cut(self) -> Callable[[str], list[str]]:
        """The function from a run of characters to its words."""
        return _cut(self.user_dictionary)


@lru_cache(maxsize=1)
def _cut(user_dictionary: bytes) -> Callable[[str], list[str]]:
    tokenizer = _jieba().Tokenizer()
    # Not `initialize`: it would read what any user of the machine may have left in /tmp/jieba.cache.
    tokenizer.FREQ, tokenizer.total = tokenizer.gen_pfdict(tokenizer.get_dict_file())
    tokenizer.initialized = True
    tokenizer.load_userdict(user_dictionary.decode("utf-8").splitlines())
    return lru_cache(1 << 16)(tokenizer.lcut)


def _jieba():
    try:
        import jieba
    except ImportError:
        raise ConfigError("Chinese words need the package jieba", "pip install '.[data]'") from None
    jieba.setLogLevel(logging.WARNING)
    return jieba


def _dictionary(path: str | None) -> bytes:
    """The user's dictionary, checked."""
    if path is None:
        return b""
    try:
        data = Path(path).read_bytes()
        lines = data.decode("utf-8").splitlines()
    except OSError as error:
        raise ConfigError("the user dictionary cannot be read", f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError("the user dictionary must be UTF-8", f"{path}, byte {error.start + 1}") from None
    for number, line in enumerate(lines, 1):
        parts = line.split()
        if len(parts) > 3 or (len(parts) == 3 and not parts[1].isdecimal()):
            raise ConfigError(
                "the user dictionary cannot be read",
                f"{path}, line {number}: {line!r}",
                "a line is: word [count] [tag]",
            )
    return data


class _Tokens:
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


# Work


@dataclass(frozen=True)
class Job:
    folder: Path
    side: str
    tokenizer: Path
    segmenter: Segmenter
    work: Path


@dataclass(frozen=True)
class Stretch:
    """Whole documents of one piece: token `first` of the piece and how many."""

    piece: int
    first: int
    tokens: int


def _stretches(shards: Shards) -> Iterator[Stretch]:
    for piece in range(len(shards.pieces)):
        ends = np.cumsum(shards.piece_index(piece)[0], dtype=np.int64)
        first = 0
        while first < ends[-1]:
            last = int(np.searchsorted(ends, first + STRETCH_TOKENS, side="left"))
            end = int(ends[min(last, len(ends) - 1)])
            yield Stretch(piece, first, end - first)
            first = end


def segment_stretch(job: Job, stretch: Stretch) -> Path:
    """The file with a stretch's bits, made unless it is there."""
    path = job.work / f"{job.side}-{stretch.piece:05d}-{stretch.first:012d}"
    if not usable(path):
        shards, tokens = _opened(job.folder, job.side), _tokens(job.tokenizer)
        ids = shards.piece_ids(stretch.piece)[stretch.first : stretch.first + stretch.tokens]
        with sealed(path) as file:
            file.write(np.packbits(tokens.begins(ids, job.segmenter.cut()), bitorder="little"))
    return path


@lru_cache(maxsize=2)
def _opened(folder: Path, side: str) -> Shards:
    return Shards(folder, side)


@lru_cache(maxsize=1)
def _tokens(folder: Path) -> _Tokens:
    return _Tokens(open_tokenizer(folder))


class BitFile:
    """Bits written one after another, the lowest of each byte first."""

    def __init__(self, path: Path):
        self._file, self._left = open(path, "wb"), np.empty(0, np.uint8)

    def __enter__(self) -> "BitFile":
        return self

    def add(self, bits: np.ndarray) -> None:
        bits = np.concatenate([self._left, bits])
        whole = len(bits) // 8 * 8
        self._file.write(np.packbits(bits[:whole], bitorder="little").tobytes())
        self._left = bits[whole:]

    def __exit__(self, *_) -> None:
        self._file.write(np.packbits(self._left, bitorder="little").tobytes())
        self._file.close()
