"""Randomness as arithmetic: a hash, and keyed permutations that are computed for one index at a time, with inverses.

Nothing here has state. NumPy does not promise equal random streams across versions, and a generator object for each
sample costs 70 µs. Integer arithmetic on 64-bit words gives the same result on every machine, for ever.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import overload

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
LOW = 2**64 - 1
RANKED = 4096  # up to this many items a permutation sorts hashes: a Feistel network is not uniform on tiny domains
TABLED = 8  # up to this many bits of a half, a table holds the cipher: 65,536 words
ROUNDS = 8
CACHED = 1 << 14  # words mixed at a time: twice as fast as 2^16 words, which do not fit into the core's cache
# One number for each use of randomness, so that no two uses share bits.
ORDER, OFFSET, MASK, REPLACE, RANDOM_TOKEN, INIT, DROPOUT, FIRST, SPAN, DIGEST, SHUFFLE, CHOICE, PACK = range(1, 14)
TURN, PREFIX, MIDDLE, DIRECTION, GENERATED = range(14, 19)


def mix(words: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): uint64 → uint64, a bijection with full avalanche."""
    return mix_in_place(np.array(words, np.uint64))[()]  # a scalar stays a scalar


def mix_in_place(words: np.ndarray) -> np.ndarray:
    """`mix` of a contiguous array. The array is overwritten with the result."""
    line = words.reshape(-1)
    spare = np.empty(min(CACHED, line.size), np.uint64)
    for first in range(0, line.size, CACHED):
        part = line[first : first + CACHED]
        _mix(part, spare[: part.size])
    return words


def _mix(words: np.ndarray, spare: np.ndarray) -> None:
    """`mix` in place, with `spare` as working space: half the time of allocating arrays for every operation."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, None)):
        np.right_shift(words, np.uint64(shift), out=spare)
        np.bitwise_xor(words, spare, out=words)
        if factor:
            np.multiply(words, np.uint64(factor), out=words)


@overload
def hash64(*parts: int) -> np.uint64: ...  # type: ignore[overload-overlap]  # ints alone give a scalar
@overload
def hash64(*parts: int | np.ndarray) -> np.ndarray: ...
def hash64(*parts: int | np.ndarray) -> np.uint64 | np.ndarray:
    """A 64-bit hash of a tuple of non-negative integers, elementwise over broadcast arrays."""
    state: int | np.ndarray = len(parts)
    for part in parts:
        state = absorb(state, part)
    return np.uint64(state) if isinstance(state, int) else state


def fraction(words: np.ndarray) -> np.ndarray:
    """uint64 → float64 in [0, 1), evenly: the upper 53 bits."""
    return (words >> np.uint64(11)) * 2.0**-53


def absorb(state: int | np.ndarray, part: int | np.ndarray) -> int | np.ndarray:
    """Add one part to a hash: hash64(a, b) is absorb(absorb(2, a), b). So hashes can share the work of first parts."""
    if isinstance(state, int) and isinstance(part, int):  # takes a fiftieth of the time of an array of one element
        return _mixed((state + int(GOLDEN) & LOW) ^ _mixed(part + int(GOLDEN) & LOW))
    mixed = mix(np.add(part, GOLDEN, dtype=np.uint64, casting="unsafe"))
    return mix(np.bitwise_xor(mixed, np.add(state, GOLDEN, dtype=np.uint64)))


def _mixed(word: int) -> int:
    """`mix` of one number."""
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & LOW
    word = (word ^ word >> 27) * 0x94D049BB133111EB & LOW
    return word ^ word >> 31


def permute(index: np.ndarray, n: int, *key: int) -> np.ndarray:
    """The images of `index` (int64 array) under a keyed permutation of 0 … n-1. For n above 65,536 it has no table.

    A balanced Feistel network on the next even number of bits is applied until its result is below n (Black & Rogaway
    2002, "Ciphers with arbitrary finite domains"): fewer than 4 steps on average, 35 ns each.
    """
    return _ranked(n, key)[0][index] if n <= RANKED else _walk(index, n, key, _encipher)


def unpermute(place: np.ndarray, n: int, *key: int) -> np.ndarray:
    """The inverse of `permute`, at the same cost."""
    return _ranked(n, key)[1][place] if n <= RANKED else _walk(place, n, key, _decipher)


@lru_cache(maxsize=64)  # of at most 64 KiB each
def _ranked(n: int, key: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The permutation as a table, and its inverse."""
    table = np.argsort(hash64(ORDER, *key, np.arange(n)), kind="stable")
    inverse = np.empty_like(table)
    inverse[table] = np.arange(n)
    return table, inverse


def _walk(index: np.ndarray, n: int, key: tuple[int, ...], step: "_Step") -> np.ndarray:
    """Apply `step` to each index until the result is below n. It ends: the cipher's cycle leads back to the index."""
    bits = ((n - 1).bit_length() + 1) // 2
    out = np.array(index, np.uint64).ravel()
    walking = np.arange(len(out))
    while len(walking):
        now = _table(bits, key, step)[out[walking]] if bits <= TABLED else step(out[walking], bits, key)
        out[walking] = now
        walking = walking[now >= np.uint64(n)]
    return out.astype(np.int64).reshape(np.shape(index))


@lru_cache(maxsize=16)  # of at most 512 KiB each
def _table(bits: int, key: tuple[int, ...], step: "_Step") -> np.ndarray:
    return step(np.arange(1 << 2 * bits, dtype=np.uint64), bits, key)


def _encipher(words: np.ndarray, bits: int, key: tuple[int, ...]) -> np.ndarray:
    """Feistel rounds on words of twice `bits`: (left, right) → (right, left ^ F(right))."""
    left, right = _rounds(words >> np.uint64(bits), words & _low(bits), bits, _round_keys(key))
    return left << np.uint64(bits) | right


def _decipher(words: np.ndarray, bits: int, key: tuple[int, ...]) -> np.ndarray:
    """Undo the rounds: a Feistel network with exchanged halves and reversed keys is its own inverse."""
    right, left = _rounds(words & _low(bits), words >> np.uint64(bits), bits, _round_keys(key)[::-1])
    return left << np.uint64(bits) | right


_Step = Callable[[np.ndarray, int, tuple[int, ...]], np.ndarray]


def _rounds(left: np.ndarray, right: np.ndarray, bits: int, keys: tuple[np.uint64, ...]) -> tuple:
    mixed, spare = np.empty_like(left), np.empty_like(left)
    for key in keys:
        np.bitwise_xor(right, key, out=mixed)
        _mix(mixed, spare)
        np.bitwise_and(mixed, _low(bits), out=mixed)
        np.bitwise_xor(left, mixed, out=left)
        left, right = right, left
    return left, right


@lru_cache(maxsize=64)
def _round_keys(key: tuple[int, ...]) -> tuple[np.uint64, ...]:
    return tuple(hash64(ORDER, *key, round_) for round_ in range(ROUNDS))


def _low(bits: int) -> np.uint64:
    return np.uint64((1 << bits) - 1)
