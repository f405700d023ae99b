"""The stage `words`: a segmenter finds the beginnings of words in the Chinese text of a shard set."""

import hashlib
import logging
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
from pretrain.errors import ConfigError, ShardError
from pretrain.processes.pool import ordered
from pretrain.shards.reader import Shards, check_tokenizer
from pretrain.shards.word_starts import FOLDER, TokenKinds, check_prefix
from pretrain.storage.index import write_index
from pretrain.storage.publish import publish
from pretrain.storage.sealed import sealed, unsealed, usable
from pretrain.storage.work import kept, settled
from pretrain.tokenizer import open_tokenizer

STRETCH_TOKENS = 1 << 21  # tokens of whole documents that a process segments at a time: 10 to 20 s, 0.2 GB


class WordsConfig(StageConfig):
    """The configuration of the stage `words`."""

    shards: str
    """The folder of a shard set. The result is written to its folder `words`."""
    tokenizer: str
    """The folder of the tokenizer that the shards were built with."""
    segmenter: Literal["jieba"] = "jieba"
    """The program that divides Chinese text into words."""
    user_dictionary: str | None = None
    """A file of words that the segmenter does not know, in jieba's format: a line `word [count] [tag]` for each."""
    workers: int = free(1, ge=1)
    """The processes that segment."""


def run(config: WordsConfig) -> dict:
    """Segment a shard set into `SHARDS/words`, and return the index. A killed stage continues when started again.

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
    check_prefix(tokenizer)
    with (
        publish(folder / FOLDER, "words", ShardError, config) as out,
        kept(folder / FOLDER, "stretches", "stretches-*/[!.]*", ShardError, derived=True) as parent,
    ):
        work = settled(parent, "stretches", [train.fingerprint, identity, STRETCH_TOKENS])
        counts = {}
        for side, shards in sides.items():
            stretches = list(_stretches(shards))
            job = SegmentJob(folder, side, Path(config.tokenizer), segmenter, work)
            with progress(f"words of {side}", "tokens", shards.tokens) as advance:
                words = 0
                with BitFile(out / f"{side}.bits") as file:
                    results = ordered(partial(segment_stretch, job), stretches, config.workers)
                    for stretch, path in zip(stretches, results, strict=True):
                        begins = np.unpackbits(
                            np.frombuffer(unsealed(path), np.uint8), count=stretch.tokens, bitorder="little"
                        )
                        words += int(begins.sum())
                        file.add(begins)
                        advance(stretch.tokens)
            counts[side] = {"tokens": shards.tokens, "words": words}
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


# Segmenting


@dataclass(frozen=True)
class Segmenter:
    """A segmenter by name, with the user's words (UTF-8) in addition to its own dictionary."""

    name: str
    user_dictionary: bytes

    def identity(self) -> dict:
        """Everything that determines the result: name, version, hashes of the dictionaries."""
        with _jieba().Tokenizer().get_dict_file() as file:
            own = file.read()
        return {
            "segmenter": self.name,
            "segmenter_version": metadata.version(self.name),
            "dictionary": hashlib.sha256(own).hexdigest(),
            "user_dictionary": hashlib.sha256(self.user_dictionary).hexdigest() if self.user_dictionary else None,
        }

    def cut(self) -> Callable[[str], list[str]]:
        """A function that divides a run of characters into words."""
        return _cut(self.user_dictionary)


@lru_cache(maxsize=1)
def _cut(user_dictionary: bytes) -> Callable[[str], list[str]]:
    tokenizer = _jieba().Tokenizer()
    # Not `initialize`: it would read /tmp/jieba.cache, which any user of the machine may have written.
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
    """The bytes of the user's dictionary. Raises ConfigError if it cannot be read or has a wrong line."""
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


# Work


@dataclass(frozen=True)
class SegmentJob:
    """Everything that a process needs to segment stretches of one side."""

    folder: Path
    side: str
    tokenizer: Path
    segmenter: Segmenter
    work: Path


@dataclass(frozen=True)
class SegmentStretch:
    """Whole documents of one piece: `tokens` tokens from token `first` of the piece on."""

    piece: int
    first: int
    tokens: int


def _stretches(shards: Shards) -> Iterator[SegmentStretch]:
    for piece in range(len(shards.pieces)):
        ends = np.cumsum(shards.piece_index(piece)[0], dtype=np.int64)
        first = 0
        while first < ends[-1]:
            last = int(np.searchsorted(ends, first + STRETCH_TOKENS, side="left"))
            end = int(ends[min(last, len(ends) - 1)])
            yield SegmentStretch(piece, first, end - first)
            first = end


def segment_stretch(job: SegmentJob, stretch: SegmentStretch) -> Path:
    """Return the file with the bits of a stretch, and make it if it is missing or damaged."""
    path = job.work / f"{job.side}-{stretch.piece:05d}-{stretch.first:012d}"
    if not usable(path):
        shards, tokens = _opened(job.folder, job.side), _tokens(job.tokenizer)
        ids = shards.piece_ids(stretch.piece)[stretch.first : stretch.first + stretch.tokens]
        with sealed(path) as file:
            file.write(np.packbits(tokens.begins(ids, job.segmenter.cut()), bitorder="little").data)
    return path


@lru_cache(maxsize=2)
def _opened(folder: Path, side: str) -> Shards:
    return Shards(folder, side)


@lru_cache(maxsize=1)
def _tokens(folder: Path) -> TokenKinds:
    return TokenKinds(open_tokenizer(folder))


class BitFile:
    """A file of bits that are added in order. The first bit of a byte is its lowest."""

    def __init__(self, path: Path):
        self._file, self._left = open(path, "wb"), np.empty(0, np.uint8)

    def __enter__(self) -> "BitFile":
        return self

    def add(self, bits: np.ndarray) -> None:
        bits = np.concatenate([self._left, bits])
        whole = len(bits) // 8 * 8
        self._file.write(np.packbits(bits[:whole], bitorder="little").tobytes())
        self._left = bits[whole:]

    def __exit__(self, *_: object) -> None:
        self._file.write(np.packbits(self._left, bitorder="little").tobytes())
        self._file.close()
