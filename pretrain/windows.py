"""Which tokens sample i is made of: a pure function of (shards, seed, i), in O(1).

The stream of one side is cut into blocks of `block_tokens`. Each epoch visits every block once, in the order of a
keyed permutation computed per index; nothing is listed, stored or skipped. A phase of the run cuts its samples out of
successive blocks, so a change of sequence length repeats nothing within an epoch. The few tokens that do not fill a
block are not always the same ones: each epoch starts its blocks at its own offset.

Random bits are written out here as integer arithmetic on 64-bit words: NumPy does not promise its streams across
versions, and a generator object per sample costs 70 µs.
"""

from functools import lru_cache

import numpy as np

from pretrain.shards import Shards

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
RANKED = 4096  # below this many items a permutation ranks hashes: a Feistel network is not uniform on tiny domains
ROUNDS = 8
# One number per independent use of randomness, so that no two uses share bits.
ORDER, OFFSET, MASK, REPLACE, RANDOM_TOKEN, INIT, DROPOUT = range(1, 8)


def mix(words: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): uint64 → uint64, a bijection with full avalanche."""
    words = np.asarray(words, np.uint64)
    with np.errstate(over="ignore"):
        words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def hash64(*parts: int | np.ndarray) -> np.ndarray:
    """A 64-bit hash of a tuple of non-negative integers, elementwise over broadcast arrays."""
    state = np.uint64(len(parts))
    with np.errstate(over="ignore"):
        for part in parts:
            state = mix((state + GOLDEN) ^ mix(np.asarray(part).astype(np.uint64) + GOLDEN))
    return state


def permute(index: np.ndarray, n: int, *key: int) -> np.ndarray:
    """Where a keyed permutation of 0 … n-1 sends `index` (int64 array); no table for n above 4096.

    A balanced Feistel network on the next even number of bits, walked until it lands below n (Black & Rogaway 2002,
    "Ciphers with arbitrary finite domains"): fewer than 4 steps on average.
    """
    index = np.asarray(index, np.int64)
    if n <= RANKED:
        return _ranked(n, key)[index]
    half = np.uint64(((n - 1).bit_length() + 1) // 2)
    low = (np.uint64(1) << half) - np.uint64(1)
    keys = [hash64(ORDER, *key, round_) for round_ in range(ROUNDS)]
    out = index.astype(np.uint64)
    outside = np.ones(out.shape, bool)
    while outside.any():
        left, right = out[outside] >> half, out[outside] & low
        for round_key in keys:
            left, right = right, left ^ (mix(right ^ round_key) & low)
        out[outside] = left << half | right
        outside = out >= np.uint64(n)
    return out.astype(np.int64)


@lru_cache(maxsize=8)
def _ranked(n: int, key: tuple[int, ...]) -> np.ndarray:
    return np.argsort(hash64(ORDER, *key, np.arange(n)), kind="stable")


class Windows:
    """Fixed-length views over one side of a shard set: sample → place in the order → stream position → ids."""

    def __init__(self, shards: Shards, block_tokens: int, seed: int):
        self.shards, self.block_tokens, self.seed = shards, block_tokens, seed
        self.blocks = shards.tokens // block_tokens  # per epoch
        self.before = shards.specials["eod" if "eod" in shards.specials else "sep"]  # what precedes the stream

    def places(self, samples: np.ndarray, seq_len: int, first_block: int = 0) -> np.ndarray:
        """Where `samples` (B,) of a phase stand in the run's whole order, in tokens, (B,) int64.

        The phase has windows of `seq_len`, a divisor of block_tokens, and begins at its `first_block` of the run.
        A place names one window of one epoch: it is the key of every random bit spent on that window.
        """
        block, part = np.divmod(np.asarray(samples, np.int64), self.block_tokens // seq_len)
        return (block + first_block) * self.block_tokens + part * seq_len

    def starts(self, places: np.ndarray) -> np.ndarray:
        """Stream positions (B,) int64 of the windows at `places` of the run's order."""
        block, part = np.divmod(places, self.block_tokens)
        epoch, block = np.divmod(block, self.blocks)
        starts = np.empty(len(places), np.int64)
        for e in np.unique(epoch).tolist():
            now = epoch == e
            spare = self.shards.tokens - self.blocks * self.block_tokens
            offset = int(hash64(OFFSET, self.seed, e) % np.uint64(spare + 1))
            starts[now] = offset + permute(block[now], self.blocks, self.seed, e) * self.block_tokens + part[now]
        return starts

    def rows(self, starts: np.ndarray, seq_len: int, lead: int) -> np.ndarray:
        """(B, lead + seq_len) int32: the windows at `starts`, each with `lead` (0 or 1) tokens from before it.

        The stream is preceded by an end mark, so that its first token is predicted like any other.
        """
        rows = np.empty((len(starts), lead + seq_len), np.int32)
        rows[:, lead:] = self.shards.gather(starts, seq_len)
        if lead:
            before = self.shards.gather(np.maximum(starts - 1, 0), 1)[:, 0]
            rows[:, 0] = np.where(starts > 0, before, self.before)
        return rows
