"""Which tokens sample i is made of: a pure function of (shards, seed, i), in O(1).

The stream of one side is cut into blocks of `block_tokens`. Each epoch visits every block once, in the order of a
keyed permutation computed per index; nothing is listed, stored or skipped. A phase of the run cuts its samples out of
blocks that no earlier phase has touched, so a change of sequence length repeats nothing within an epoch. The few
tokens that do not fill a block are not always the same ones: each epoch starts its blocks at its own offset.

Every function has its inverse: a token's position in the stream leads back to its place in the order of any epoch.
"""

from typing import NamedTuple, Protocol

import numpy as np

from pretrain.hashing import OFFSET, TURN, hash64, permute, unpermute
from pretrain.order.rows import Rows, of_stream
from pretrain.shards import Shards


class WordStarts(Protocol):
    """Which tokens of a stream begin a word; see shards/word_starts.py."""

    fingerprint: str

    def gather(self, starts: np.ndarray, length: int) -> np.ndarray:
        """(B, length) bool at stream positions starts[b] … starts[b] + length - 1."""

    def check_unchanged(self) -> None:
        """Raise ShardError if what it reads is no longer what it was when it was opened."""


class WindowPart(NamedTuple):
    """A stretch of the stream inside a window."""

    at: int  # position in the window
    start: int  # position in the stream
    tokens: int


class Windows:
    """Fixed-length views over one side of a shard set: place in the order ↔ stream position → ids.

    `corpus` is the number of the set among those of a run: each has an order of its own.
    """

    def __init__(self, shards: Shards, block_tokens: int, seed: int, words: WordStarts | None = None, corpus: int = 0):
        self.shards, self.block_tokens, self.seed, self.corpus = shards, block_tokens, seed, corpus
        self.blocks = shards.tokens // block_tokens  # per epoch
        self.end = shards.specials["eod" if "eod" in shards.specials else "sep"]  # closes every document
        self.word_starts = words

    def check_unchanged(self) -> None:
        """Raise ShardError, naming the file, if what is read here is no longer what it was when it was opened."""
        self.shards.check_unchanged()
        if self.word_starts is not None:
            self.word_starts.check_unchanged()

    def per_block(self, seq_len: int) -> int:
        """Windows of `seq_len`, a divisor of block_tokens, that a block is cut into."""
        return self.block_tokens // seq_len

    def apart(self, seq_len: int) -> int:
        """How far apart in the order the places of two successive windows of a block are."""
        return seq_len

    def in_turn(self, blocks: np.ndarray, turns: np.ndarray, each: int) -> np.ndarray:
        """Which of the `each` windows of `blocks` (B,) of the order is read when its block has its turn `turns` (B,).

        One random order of an epoch, which every block begins at its own place.
        """
        return self._turned(blocks, turns, each, back=False)

    def turns_of(self, blocks: np.ndarray, which: np.ndarray, each: int) -> np.ndarray:
        """The inverse: in which turn of its block each of the windows `which` (B,) is read."""
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
        """Stream positions (B,) int64 of the windows at `places` (B,) of the order.

        A place is counted in tokens. It names one window of one epoch: it is the key of every random bit spent on it.
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
        """The inverse: where the order of `epoch` has the tokens at stream `positions` (B,); -1 for those it omits."""
        block, part = np.divmod(np.asarray(positions, np.int64) - self._offset(epoch), self.block_tokens)
        inside = (block >= 0) & (block < self.blocks)
        place = unpermute(np.where(inside, block, 0), self.blocks, *self._key(epoch))
        return np.where(inside, (epoch * self.blocks + place) * self.block_tokens + part, -1)

    def grid(self, first: int, last: int, seq_len: int, epoch: int) -> np.ndarray:
        """Where those windows of `seq_len` begin that `epoch` cuts out of the stream and that hold one of the positions
        first … last - 1."""
        begin, end = self._offset(epoch), self._offset(epoch) + self.blocks * self.block_tokens
        inside = range(max(first, begin) - begin, min(last, end) - begin)
        numbers = np.arange(inside.start // seq_len, (inside.stop - 1) // seq_len + 1) if inside else np.arange(0)
        return begin + numbers * seq_len

    def _key(self, epoch: int) -> tuple[int, ...]:
        return (self.seed, epoch, self.corpus) if self.corpus else (self.seed, epoch)

    def _offset(self, epoch: int) -> int:
        """Where the blocks of an epoch begin in the stream."""
        spare = self.shards.tokens - self.blocks * self.block_tokens
        return int(hash64(OFFSET, *self._key(epoch)) % np.uint64(spare + 1))

    def parts(self, start: int, seq_len: int) -> list[WindowPart]:
        """What the window at `start` holds, from left to right."""
        return [WindowPart(0, start, seq_len)]

    def ahead(self, starts: np.ndarray, seq_len: int) -> None:
        """Have the system begin to read windows that will be asked for."""
        self.shards.ahead(starts, seq_len)

    def rows(self, starts: np.ndarray, seq_len: int, words: bool = False) -> Rows:
        """The windows of `seq_len` tokens at `starts` (B,); with `words` also where words begin in them."""
        return of_stream(self.tokens(starts, seq_len), self.end, self.words(starts, seq_len) if words else None)

    def tokens(self, starts: np.ndarray, length: int) -> np.ndarray:
        """(B, 1 + length) int32: `length` tokens of the stream from each of `starts` (B,) on, and the one before them.

        The stream is preceded by an end mark, so that its first token is predicted like any other.
        """
        if starts.min() > 0:
            return self.shards.gather(starts - 1, 1 + length)
        tokens = np.empty((len(starts), 1 + length), np.int32)
        tokens[:, 1:] = self.shards.gather(starts, length)
        before = self.shards.gather(np.maximum(starts - 1, 0), 1)[:, 0]
        tokens[:, 0] = np.where(starts > 0, before, self.end)
        return tokens

    def words(self, starts: np.ndarray, seq_len: int) -> np.ndarray:
        """(B, seq_len) bool: where words begin in the windows at `starts`."""
        assert self.word_starts is not None, "this set was opened without its words"
        return self.word_starts.gather(starts, seq_len)
