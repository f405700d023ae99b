"""The tokens of sample i: a pure function of (shards, seed, i), in O(1).

The stream of one side is cut into blocks of `block_tokens`. Each epoch visits every block once, in the order of a
keyed permutation that is computed for one index at a time: no list of blocks is made, stored or skipped through. A
phase of the run cuts its samples out of blocks that no earlier phase has touched, so a change of sequence length
repeats nothing within an epoch. Each epoch begins its blocks at an offset of its own, so the few tokens that do not
fill a block differ from epoch to epoch.

Every function has its inverse: a token's position in the stream leads back to its place in the order of any epoch.
"""

from typing import NamedTuple, Protocol

import numpy as np

from pretrain.hashing import OFFSET, TURN, hash64, permute, unpermute
from pretrain.order.rows import Rows, of_stream
from pretrain.shards import Shards


class WordStarts(Protocol):
    """The tokens of a stream that begin a word; see shards/word_starts.py."""

    fingerprint: str

    def gather(self, starts: np.ndarray, length: int) -> np.ndarray:
        """(B, length) bool at stream positions starts[b] … starts[b] + length - 1."""

    def check_unchanged(self) -> None:
        """Raise ShardError, naming the file, if a file has changed since it was opened."""


class WindowPart(NamedTuple):
    """A stretch of the stream inside a window."""

    at: int  # position in the window
    start: int  # position in the stream
    tokens: int


class Windows:
    """Windows of one side of a shard set: place in the order ↔ stream position → ids.

    `corpus` is the number of the set among the sets of a run. Each number has an order of its own.
    """

    def __init__(self, shards: Shards, block_tokens: int, seed: int, words: WordStarts | None = None, corpus: int = 0):
        self.shards, self.block_tokens, self.seed, self.corpus = shards, block_tokens, seed, corpus
        self.blocks = shards.tokens // block_tokens  # per epoch
        self.end = shards.specials["eod" if "eod" in shards.specials else "sep"]  # closes every document
        self.word_starts = words

    def check_unchanged(self) -> None:
        """Raise ShardError, naming the file, if a file has changed since it was opened."""
        self.shards.check_unchanged()
        if self.word_starts is not None:
            self.word_starts.check_unchanged()

    def per_block(self, seq_len: int) -> int:
        """The number of windows of `seq_len` tokens in a block. `seq_len` divides `block_tokens`."""
        return self.block_tokens // seq_len

    def apart(self, seq_len: int) -> int:
        """The distance in the order between the places of two successive windows of a block."""
        return seq_len

    def in_turn(self, blocks: np.ndarray, turns: np.ndarray, each: int) -> np.ndarray:
        """The number (B,) of the window that each of `blocks` (B,) gives in its turn `turns` (B,), of `each` windows.

        An epoch has one random order of the numbers, and every block begins at its own place in it.
        """
        return self._turned(blocks, turns, each, back=False)

    def turns_of(self, blocks: np.ndarray, which: np.ndarray, each: int) -> np.ndarray:
        """The inverse of `in_turn`: the turn of its block in which each of the windows `which` (B,) is read."""
        return self._turned(blocks, which, each, back=True)

    def _turned(self, blocks: np.ndarray, numbers: np.ndarray, each: int, back: bool) -> np.ndarray:
        epoch, block = np.divmod(blocks, self.blocks)
        found = np.empty_like(numbers)
        for e in np.unique(epoch).tolist():
            now = epoch == e
            shift = (hash64(TURN, *self._key(e), block[now]) % np.uint64(each)).astype(np.int64)
            if back:
                found[now] = (unpermute(numbers[now], each, TURN, *self._key(e)) - shift) % each
            else:
                found[now] = permute((numbers[now] + shift) % each, each, TURN, *self._key(e))
        return found

    def starts(self, places: np.ndarray) -> np.ndarray:
        """The stream positions (B,) int64 of the windows at `places` (B,) of the order.

        A place is counted in tokens. It names one window of one epoch, and it is the key of every random bit that this
        window needs.
        """
        block, part = np.divmod(places, self.block_tokens)
        epoch, block = np.divmod(block, self.blocks)
        starts = np.empty(len(places), np.int64)
        for e in np.unique(epoch).tolist():
            now = epoch == e
            block_now = permute(block[now], self.blocks, *self._key(e))
            starts[now] = self._offset(e) + block_now * self.block_tokens + part[now]
        return starts

    def places_of(self, positions: np.ndarray, epoch: int) -> np.ndarray:
        """The inverse of `starts`: the places (B,) in the order of `epoch` of the tokens at stream `positions` (B,).

        A token that the epoch omits has the place -1.
        """
        block, part = np.divmod(np.asarray(positions, np.int64) - self._offset(epoch), self.block_tokens)
        inside = (block >= 0) & (block < self.blocks)
        place = unpermute(np.where(inside, block, 0), self.blocks, *self._key(epoch))
        return np.where(inside, (epoch * self.blocks + place) * self.block_tokens + part, -1)

    def grid(self, first: int, last: int, seq_len: int, epoch: int) -> np.ndarray:
        """The stream positions of all windows of `seq_len` in `epoch` that hold one of the positions
        first … last - 1."""
        begin, end = self._offset(epoch), self._offset(epoch) + self.blocks * self.block_tokens
        inside = range(max(first, begin) - begin, min(last, end) - begin)
        numbers = np.arange(inside.start // seq_len, (inside.stop - 1) // seq_len + 1) if inside else np.arange(0)
        return begin + numbers * seq_len

    def _key(self, epoch: int) -> tuple[int, ...]:
        return (self.seed, epoch, self.corpus) if self.corpus else (self.seed, epoch)

    def _offset(self, epoch: int) -> int:
        """The stream position of the first block of an epoch."""
        spare = self.shards.tokens - self.blocks * self.block_tokens
        return int(hash64(OFFSET, *self._key(epoch)) % np.uint64(spare + 1))

    def parts(self, start: int, seq_len: int) -> list[WindowPart]:
        """The parts of the stream in the window at `start`, from left to right."""
        return [WindowPart(0, start, seq_len)]

    def ahead(self, starts: np.ndarray, seq_len: int) -> None:
        """Ask the system to read windows from the disk that will be needed soon."""
        self.shards.ahead(starts, seq_len)

    def rows(self, starts: np.ndarray, seq_len: int, words: bool = False) -> Rows:
        """The windows of `seq_len` tokens at `starts` (B,), with `words` also the beginnings of words in them."""
        return of_stream(self.tokens(starts, seq_len), self.end, self.words(starts, seq_len) if words else None)

    def tokens(self, starts: np.ndarray, length: int) -> np.ndarray:
        """(B, 1 + length) int32: the token before each of `starts` (B,), and `length` tokens from there on.

        An end mark precedes the stream, so its first token is predicted like any other.
        """
        if starts.min() > 0:
            return self.shards.gather(starts - 1, 1 + length)
        tokens = np.empty((len(starts), 1 + length), np.int32)
        tokens[:, 1:] = self.shards.gather(starts, length)
        before = self.shards.gather(np.maximum(starts - 1, 0), 1)[:, 0]
        tokens[:, 0] = np.where(starts > 0, before, self.end)
        return tokens

    def words(self, starts: np.ndarray, seq_len: int) -> np.ndarray:
        """(B, seq_len) bool: True where a word begins in the windows at `starts`."""
        assert self.word_starts is not None, "this set was opened without its words"
        return self.word_starts.gather(starts, seq_len)
