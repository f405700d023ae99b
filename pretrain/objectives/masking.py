"""The choice of the tokens that are masked. Every function takes and returns arrays of integers.

A function works on a whole batch at once, and the result of a row depends on its key and its tokens alone. There are B
windows of T tokens and K targets. A *unit* is masked as a whole: a token, a word, or a span of tokens or words.
"""

from functools import lru_cache

import numpy as np

from pretrain.hashing import FIRST, GENERATED, GOLDEN, MASK, RANDOM_TOKEN, REPLACE, SPAN, absorb, mix, mix_in_place

USES = (MASK, REPLACE, RANDOM_TOKEN, FIRST, SPAN, GENERATED)
LAST = np.uint64(1 << 63)
NOWHERE = np.uint64(2**64 - 1)


class Draws:
    """`hash64(use, seed, key, number)` for B windows and numbers below `count`. Shared parts are computed once."""

    def __init__(self, seed: int, keys: np.ndarray, count: int):
        states = np.asarray(absorb(_begun(seed), keys)) + GOLDEN
        self._states = dict(zip(USES, states, strict=True))  # each (B,)
        self._numbers = _mixed(count)

    def first(self, use: int) -> np.ndarray:
        """(B,) uint64: one draw for each window."""
        return self._states[use]

    def all(self, use: int, count: int) -> np.ndarray:
        """(B, count) uint64: draws number 0 … count - 1 of every window."""
        return mix_in_place(self._states[use][:, None] ^ self._numbers[:count])

    def at(self, use: int, rows: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """uint64: draw `numbers[i]` of window `rows[i]`, for arrays that broadcast."""
        return mix_in_place(self._states[use][rows] ^ self._numbers[numbers])


@lru_cache(maxsize=8)
def _begun(seed: int) -> np.ndarray:
    """(uses, 1): the state of the hash for each use after the seed."""
    return np.asarray(absorb(absorb(4, np.array(USES)[:, None]), seed))


@lru_cache(maxsize=8)
def _mixed(count: int) -> np.ndarray:
    return mix(np.arange(count, dtype=np.uint64) + GOLDEN)


def tokens(marks: np.ndarray, draws: Draws, targets: int) -> np.ndarray:
    """(B, K) positions, ascending: K tokens of each row, drawn without replacement.

    `marks` (B, T) is True for tokens that are never targets. They fill up a row that has fewer than K other tokens.
    """
    B, T = marks.shape
    draw = draws.all(MASK, T)
    draw >>= np.uint64(1)
    draw.ravel()[flat(marks)] |= LAST
    # To compare with the K-th smallest draw takes half the time of sorting indices. If another draw of 63 bits equals
    # it, there is one token too many. That case is handled here, but it has never been seen.
    limit = np.partition(draw, targets - 1, axis=1)[:, targets - 1, None]
    chosen = flat(draw <= limit)
    if len(chosen) > B * targets:
        return np.sort(np.argsort(draw, axis=1, kind="stable")[:, :targets], axis=1)
    return chosen.reshape(B, targets) - np.arange(0, B * T, T)[:, None]


def units(begins: np.ndarray, marks: np.ndarray, draws: Draws, targets: int) -> tuple[np.ndarray, np.ndarray]:
    """K tokens of each row in whole units: their positions, ascending, and the begin of each one's unit, both (B, K).

    `begins` (B, T) is True where a unit begins; one also begins after every mark. The units are laid in a circle in
    random order, and K consecutive tokens are taken from a random token on. So each of the n tokens of a row is a
    target with probability K / n, whatever the lengths of units, and at most two units are cut: the first and the last.
    (BERT's code takes units in random order until the next one does not fit, which prefers short units.)
    """
    B, T = marks.shape
    row = np.arange(0, B * T, T)
    heads = _heads(begins, marks)
    edges = flat(heads | marks)  # the begins of units and of marks
    length = np.empty(B * T, np.int64)
    length[edges] = gaps(edges, B * T)

    # The random token comes first, with the rest of its unit. The other units follow in the order of their draws. The
    # low bits of a draw are the position of the unit. K units are enough.
    first, head = _first(marks, edges, draws)
    skipped = first - head
    low = np.uint64((1 << T.bit_length()) - 1)
    draw = draws.all(MASK, T)
    draw &= ~low
    draw |= _lasts(T)  # only the unit of the random token will not have the highest bit, so it comes first
    draw |= heads.astype(np.uint64) - np.uint64(1)  # NOWHERE, except on heads
    some = heads.ravel()[head]  # False for a row of marks only
    draw.ravel()[head[some]] = (head - row)[some]
    drawn = np.sort(np.partition(draw, targets - 1, axis=1)[:, :targets], axis=1)

    unit = np.minimum(drawn & low, np.uint64(T - 1)).astype(np.int64) + row[:, None]  # in the order of the circle
    taken = np.where(drawn == NOWHERE, 0, length[unit])
    taken[:, 0] -= skipped
    left = targets - taken.cumsum(axis=1)  # negative after the unit that is cut
    again = np.minimum(np.maximum(left[:, -1], 0), skipped)  # the circle ends with the begin of the first unit
    taken = np.maximum(taken + np.minimum(left, 0), 0)
    begin = unit.copy()
    begin[:, 0] += skipped
    head = head[:, None]
    return _listed(
        np.concatenate((begin, head), axis=1).ravel(),
        np.concatenate((unit, head), axis=1).ravel(),
        np.concatenate((taken, again[:, None]), axis=1).ravel(),
        marks,
        targets,
    )


def _heads(begins: np.ndarray, marks: np.ndarray) -> np.ndarray:
    """(B, T) True on the first token of every unit."""
    heads = begins.copy()
    heads[:, 0] = True
    heads[:, 1:] |= marks[:, :-1]
    heads &= ~marks
    return heads


def flat(at: np.ndarray) -> np.ndarray:
    """The positions of True in the flattened array."""
    return at.ravel().nonzero()[0]


@lru_cache(maxsize=64)
def places(count: int) -> np.ndarray:
    """0 … count - 1 in int32, made once for each count."""
    made = np.arange(count, dtype=np.int32)
    made.flags.writeable = False
    return made


@lru_cache(maxsize=8)
def _lasts(count: int) -> np.ndarray:
    """(count,) uint64: each position with the highest bit set."""
    return np.arange(count, dtype=np.uint64) | LAST


def gaps(at: np.ndarray, end: int) -> np.ndarray:
    """The distance from each of the ascending positions to the next one, and from the last to `end`."""
    gaps = np.empty_like(at)
    np.subtract(at[1:], at[:-1], out=gaps[:-1])
    gaps[-1:] = end - at[-1:]
    return gaps


def _first(marks: np.ndarray, edges: np.ndarray, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
    """A random token of each row and the begin of its unit, as flat positions (B,). In a row of marks: the first."""
    B, T = marks.shape
    first = np.arange(0, B * T, T)
    text = flat(~marks)
    before, after = text.searchsorted(first), text.searchsorted(first + T)
    some = after > before
    number = draws.first(FIRST)[some] % (after - before)[some].astype(np.uint64)
    first[some] = text[before[some] + number.astype(np.int64)]
    return first, edges[edges.searchsorted(first, side="right") - 1]


def _listed(
    begin: np.ndarray, unit: np.ndarray, taken: np.ndarray, marks: np.ndarray, targets: int
) -> tuple[np.ndarray, np.ndarray]:
    """The result of `units` from its stretches: `taken` tokens from `begin` on, of the unit that begins at `unit`.

    Positions are flat, and the stretches are in the order of rows. Marks fill up the rows with fewer than K tokens.
    """
    B, T = marks.shape
    ends = taken.cumsum()
    position = (begin - ends + taken).repeat(taken) + places(int(ends[-1]))
    both = position << 32 | unit.repeat(taken)
    if len(both) < B * targets:
        spare = [np.flatnonzero(row) for row in marks]
        missing = [targets - T + len(at) for at in spare]
        fill = np.concatenate([at[: max(n, 0)] + T * b for b, (at, n) in enumerate(zip(spare, missing, strict=True))])
        both = np.sort(np.concatenate([both, fill << 32 | fill]))
    both = both.reshape(B, targets)
    both.sort(axis=1)
    both -= (np.arange(0, B * T, T) * (1 << 32 | 1))[:, None]
    return both >> 32, both & (1 << 32) - 1


def spans(begins: np.ndarray, marks: np.ndarray, draws: Draws, p: float, longest: int) -> np.ndarray:
    """(B, T), True where a span begins: every row is divided into spans of units with geometric lengths.

    A span has 1 … `longest` units, with weights (1 - p)^(length - 1). With p = 0.2 and `longest` = 10 the mean is 3.8
    (Joshi et al. 2020, "SpanBERT", arXiv:1907.10529, section 3.1). A span ends with its document.
    """
    B, T = marks.shape
    heads = flat(_heads(begins, marks))
    offsets = heads.searchsorted(np.arange(0, B * T + 1, T))
    counts = offsets[1:] - offsets[:-1]
    lengths, mean = _lengths(p, longest)
    likely = int(1.3 * T / mean) + 8  # so many spans fill a row, except for one row in ten thousand
    for wanted in (min(likely, T), T):
        bits = draws.all(SPAN, -(-wanted // 4)).astype("<u8", copy=False).view("<u2")  # four lengths from each draw
        starts = lengths[bits].cumsum(axis=1)  # the number of the first unit of each span in its row
        if (starts[:, -1] >= counts).all():
            break
    found = np.zeros(B * T, bool)
    found[heads[offsets[:-1][counts > 0]]] = True
    found[heads[(starts + offsets[:-1, None])[starts < counts[:, None]]]] = True
    return found.reshape(B, T)


@lru_cache(maxsize=8)
def _lengths(p: float, longest: int) -> tuple[np.ndarray, float]:
    """The span length for each 16-bit number, (65536,) int64, and the mean length."""
    weights = (1 - p) ** np.arange(longest)
    last = np.rint(np.cumsum(weights) / weights.sum() * 65536).astype(np.int64)
    lengths = np.repeat(np.arange(1, longest + 1), np.diff(last, prepend=0))
    return lengths, float(lengths.mean())
