"""Which tokens of a window are asked for and what is shown in their place: arrays in, arrays out, in integers.

Everything works on a whole batch at once; a row's result depends on its key and its tokens alone. B windows, T tokens,
K targets a window. A *unit* is what is masked as a whole: a token, a word, or a span of either.
"""

from functools import lru_cache

import numpy as np

from pretrain.hashing import FIRST, GOLDEN, MASK, RANDOM_TOKEN, REPLACE, SPAN, absorb, mix, mix_in_place

USES = (MASK, REPLACE, RANDOM_TOKEN, FIRST, SPAN)
LAST = np.uint64(1 << 63)
NOWHERE = np.uint64(2**64 - 1)


class Draws:
    """`hash64(use, seed, key, number)` of B windows, numbers below `count`; what they share is computed once."""

    def __init__(self, seed: int, keys: np.ndarray, count: int):
        self._states = dict(zip(USES, absorb(_begun(seed), keys) + GOLDEN, strict=True))  # each (B,)
        self._numbers = _mixed(count)

    def first(self, use: int) -> np.ndarray:
        """(B,) uint64: one draw a window."""
        return self._states[use]

    def all(self, use: int, count: int) -> np.ndarray:
        """(B, count) uint64: numbers 0 … count - 1 of every window."""
        return mix_in_place(self._states[use][:, None] ^ self._numbers[:count])

    def at(self, use: int, rows: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """Single draws, of windows `rows`."""
        return mix_in_place(self._states[use][rows] ^ self._numbers[numbers])


@lru_cache(maxsize=8)
def _begun(seed: int) -> np.ndarray:
    return absorb(absorb(4, np.array(USES)[:, None]), seed)


@lru_cache(maxsize=8)
def _mixed(count: int) -> np.ndarray:
    return mix(np.arange(count, dtype=np.uint64) + GOLDEN)


def tokens(marks: np.ndarray, draws: Draws, targets: int) -> np.ndarray:
    """(B, K) positions, ascending: K of the tokens of each row, drawn without replacement.

    `marks` (B, T) is True where a token is never asked for; where a row has fewer than K others, marks fill the rest.
    """
    B, T = marks.shape
    draw = draws.all(MASK, T)
    draw >>= np.uint64(1)
    draw.ravel()[flat(marks)] |= LAST
    # The K-th smallest draw as a limit takes half the time of sorting indices. Two equal draws of 63 bits, one of them
    # the limit, are one token too many: seen here, never yet met.
    limit = np.partition(draw, targets - 1, axis=1)[:, targets - 1, None]
    chosen = flat(draw <= limit)
    if len(chosen) > B * targets:
        return np.sort(np.argsort(draw, axis=1, kind="stable")[:, :targets], axis=1)
    return chosen.reshape(B, targets) - np.arange(0, B * T, T)[:, None]


def units(begins: np.ndarray, marks: np.ndarray, draws: Draws, targets: int) -> tuple[np.ndarray, np.ndarray]:
    """K tokens of each row in whole units: their positions, ascending, and where the unit of each begins, both (B, K).

    `begins` (B, T) is True where a unit begins, as one does after a mark in any case. The units are laid in a circle in
    random order, and K tokens in a row are taken from a random token on. So each token is asked for with probability
    K / n of a row's n tokens, whatever the lengths, and at most two units are cut: the first and the last. (To take
    units in random order until the next does not fit, as BERT's code does, is biased towards short ones.)
    """
    B, T = marks.shape
    row = np.arange(0, B * T, T)
    heads = _heads(begins, marks)
    edges = flat(heads | marks)  # where a unit, or a mark, begins
    length = np.empty(B * T, np.int64)
    length[edges] = gaps(edges, B * T)

    # The random token comes first, with the rest of its unit; then the other units by their draws, whose low bits are
    # their positions. K units are enough.
    first, head = _first(marks, edges, draws)
    skipped = first - head
    low = np.uint64((1 << T.bit_length()) - 1)
    draw = draws.all(MASK, T)
    draw &= ~low
    draw |= _lasts(T)  # without that bit: the unit of the random token alone
    draw |= heads.astype(np.uint64) - np.uint64(1)  # NOWHERE but on heads
    some = heads.ravel()[head]  # a row may be all marks
    draw.ravel()[head[some]] = (head - row)[some]
    drawn = np.sort(np.partition(draw, targets - 1, axis=1)[:, :targets], axis=1)

    unit = np.minimum(drawn & low, np.uint64(T - 1)).astype(np.int64) + row[:, None]  # in the order of the circle
    taken = np.where(drawn == NOWHERE, 0, length[unit])
    taken[:, 0] -= skipped
    left = targets - taken.cumsum(axis=1)  # negative after the unit that is cut
    again = np.minimum(np.maximum(left[:, -1], 0), skipped)  # the circle closes where it began
    taken = np.maximum(taken + np.minimum(left, 0), 0)
    begin = unit.copy()
    begin[:, 0] += skipped
    head = head[:, None]
    stretches = ((begin, head), (unit, head), (taken, again[:, None]))
    return _listed(*(np.concatenate(pair, axis=1).ravel() for pair in stretches), marks, targets)


def _heads(begins: np.ndarray, marks: np.ndarray) -> np.ndarray:
    """(B, T) True on the first token of every unit."""
    heads = begins.copy()
    heads[:, 0] = True
    heads[:, 1:] |= marks[:, :-1]
    heads &= ~marks
    return heads


def flat(at: np.ndarray) -> np.ndarray:
    """The flat positions of what is True."""
    return at.ravel().nonzero()[0]


@lru_cache(maxsize=64)
def places(count: int) -> np.ndarray:
    """0 … count - 1, int32, made once."""
    made = np.arange(count, dtype=np.int32)
    made.flags.writeable = False
    return made


@lru_cache(maxsize=8)
def _lasts(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.uint64) | LAST


def gaps(at: np.ndarray, end: int) -> np.ndarray:
    """From each of the ascending positions to the next, from the last to `end`."""
    gaps = np.empty_like(at)
    np.subtract(at[1:], at[:-1], out=gaps[:-1])
    gaps[-1:] = end - at[-1:]
    return gaps


def _first(marks: np.ndarray, edges: np.ndarray, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
    """A random token of each row and where its unit begins, flat positions (B,); of a row of marks its first."""
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
    """Stretches of `taken` tokens from `begin` on, flat positions, each of the unit at `unit`, row by row, as `units`
    gives them.

    Marks fill up the rows that have fewer than K tokens.
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
    """(B, T) True where a span begins: every row cut into runs of units, geometric in length.

    Lengths, in units, are 1 … `longest` with weights (1 - p)^(length - 1): at p = 0.2 and 10 they are 3.8 in the mean
    (Joshi et al. 2020, "SpanBERT", arXiv:1907.10529, section 3.1). A span ends with its document.
    """
    B, T = marks.shape
    heads = flat(_heads(begins, marks))
    offsets = heads.searchsorted(np.arange(0, B * T + 1, T))
    counts = offsets[1:] - offsets[:-1]
    lengths, mean = _lengths(p, longest)
    likely = int(1.3 * T / mean) + 8  # spans fill a row, but for one row in ten thousand
    for wanted in (min(likely, T), T):
        bits = draws.all(SPAN, -(-wanted // 4)).astype("<u8", copy=False).view("<u2")  # four lengths from each draw
        starts = lengths[bits].cumsum(axis=1)  # by number of the unit in its row
        if (starts[:, -1] >= counts).all():
            break
    found = np.zeros(B * T, bool)
    found[heads[offsets[:-1][counts > 0]]] = True
    found[heads[(starts + offsets[:-1, None])[starts < counts[:, None]]]] = True
    return found.reshape(B, T)


@lru_cache(maxsize=8)
def _lengths(p: float, longest: int) -> tuple[np.ndarray, float]:
    """The length that each 16-bit number stands for, (65536,) int64, and their mean."""
    weights = (1 - p) ** np.arange(longest)
    last = np.rint(np.cumsum(weights) / weights.sum() * 65536).astype(np.int64)
    lengths = np.repeat(np.arange(1, longest + 1), np.diff(last, prepend=0))
    return lengths, float(lengths.mean())
