"""Windows of whole documents: packed by best fit, block by block, when a window is asked for.

A block is `block_tokens` successive tokens of the stream, as for windows of the stream, and is read once an epoch. The
documents that begin in it are put into windows of T tokens, the longest first, each into the window with the least
space that still holds it (best-fit decreasing; Johnson 1973, Near-optimal bin packing algorithms; for language models
Ding et al. 2024, arXiv:2404.10830). A document of more than T tokens is cut into parts of T tokens and a rest. Space
that remains is padding.

A document of at most 1/64 of the block's tokens is never cut by the end of a block: the block in which it begins has
all of it. So a block may have up to 1/64 more or fewer tokens than its section of the stream. This does not depend on
T, so phases with different T repeat nothing. A longer document goes on in the next block, cut at a multiple of 1/64 of
a block.

Every block has the same number of windows, so the place of a window is a function of its number alone. Nothing is
listed or stored: each process that reads from a block packs it, in 0.1 to 1 ms. If the parts do not all fit, whole
documents are placed first, and some of the other parts are cut to fill the space that remains. The number of windows is
measured on up to 64 blocks: it is the smallest number with which at most 1 in 200 of the documents that would fit into
a window is cut. `order.py` mixes the windows of 16 blocks, so that the parts of one long document do not follow one
another. As a consequence every process that makes batches packs nearly every block, which limits a job of any size to
about 100 M tokens a second.
"""

from bisect import bisect_left, insort
from collections.abc import Callable
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import TypeVar

import numpy as np

from pretrain.hashing import PACK, hash64
from pretrain.order.rows import Rows
from pretrain.order.stream import WindowPart, Windows, WordStarts
from pretrain.shards import Shards

BLOCK_WINDOWS = 64  # the windows that a block has space for by default: 1.5 % of it is padding
LEAST_WINDOWS = 16  # 6 % of such a block is padding
MOST_WINDOWS = 1 << 14  # 32 packed blocks of this many windows of 512 tokens take 1.3 GB
MEASURED = 64  # blocks on which the number of windows is measured
CUT = 0.005  # at most this share of the documents that would fit into a window may be cut
KEPT = 32  # packed blocks in memory: 16 are read from at a time
NUMBER_BITS = 20  # bits for the number of a window in its block
GOES_ON, BEGINS, FREE = range(3)  # a later token of a part, the first token of a part, no token
Place = TypeVar("Place", int, np.ndarray)


class PackedWindows(Windows):
    """Windows that hold whole documents, and parts of documents that are longer than a window.

    The `start` of a packed window is the stream position of its block, shifted left by NUMBER_BITS, plus the window's
    number in the block.
    """

    def __init__(self, shards: Shards, block_tokens: int, seed: int, words: WordStarts | None = None, corpus: int = 0):
        super().__init__(shards, block_tokens, seed, words, corpus)
        assert shards.tokens < 1 << 63 - NUMBER_BITS, shards.tokens
        self.unit = max(1, block_tokens // BLOCK_WINDOWS)  # tokens; the end of a block cuts documents only at multiples
        self.padding = shards.specials.get("pad", self.end)
        self._windows_per_block = lru_cache(self._measure_windows)
        self._block = lru_cache(KEPT)(self._pack_block)

    def per_block(self, seq_len: int) -> int:
        """The number of windows of `seq_len` tokens that a block is packed into. `seq_len` divides `block_tokens`."""
        return self._windows_per_block(seq_len)

    def _measure_windows(self, seq_len: int) -> int:
        """`per_block`, measured: the smallest number of windows that cuts at most the share CUT of the documents."""
        found = -(-(self.block_tokens + self.unit - 1) // seq_len)
        blocks = [self._parts_of(start, seq_len)[1:] for start in self._measured_blocks()]
        documents = sum(int(whole.sum()) for _, whole in blocks)
        used = [best_fit(lengths, seq_len)[2] for lengths, _ in blocks]  # windows if nothing is cut
        blocks = [parts for parts, windows in zip(blocks, used, strict=True) if windows > found]

        def enough(windows: int) -> bool:
            return sum(_cut(*parts, seq_len, windows) for parts in blocks) <= CUT * documents

        # Bisection, not counting up: documents a little longer than half a window need twice the windows.
        counts = range(found, max(found, *used))
        found += bisect_left(counts, True, key=enough)
        assert found <= min(self.block_tokens, 1 << NUMBER_BITS), found
        return found

    def waste(self, seq_len: int) -> tuple[float, float]:
        """The measured cost of packing: the share of padding in the windows, and the share of documents that are cut
        although they would fit into a window."""
        count, fit, cut = self.per_block(seq_len), 0, 0
        for start in self._measured_blocks():
            begins, ends = self.shards.spans(start, start + self.block_tokens)
            here = int(((begins >= start) & (ends - begins <= seq_len)).sum())
            _, lengths, whole = self._parts_of(start, seq_len)
            fit += here
            cut += here - int(whole.sum())  # by the end of the block
            cut += _cut(lengths, whole, seq_len, count)  # by packing
        return 1 - self.block_tokens / (count * seq_len), cut / max(1, fit)

    def apart(self, seq_len: int) -> int:
        """The distance in the order between the places of two successive windows of a block."""
        return 1

    def in_turn(self, blocks: np.ndarray, turns: np.ndarray, each: int) -> np.ndarray:
        return turns  # `Order` shuffles packed windows among several blocks instead

    def turns_of(self, blocks: np.ndarray, which: np.ndarray, each: int) -> np.ndarray:
        return which

    def starts(self, places: np.ndarray) -> np.ndarray:
        """The windows (B,) at `places` (B,) of the order, each by its `start`."""
        number = places % self.block_tokens
        return super().starts(places - number) << NUMBER_BITS | number

    def places_of(self, starts: np.ndarray, epoch: int) -> np.ndarray:
        """The inverse of `starts`: the places (B,) in the order of `epoch` of the windows `starts` (B,).

        A window that the epoch omits has the place -1.
        """
        block, number = _block_and_number(starts)
        places = super().places_of(block, epoch)
        return np.where(places < 0, places, places + number)

    def grid(self, first: int, last: int, seq_len: int, epoch: int) -> np.ndarray:
        """The windows of `seq_len` in `epoch` that hold one of the stream positions first … last - 1."""
        begin, found = self._offset(epoch), [np.zeros(0, np.int64)]
        lowest = max(0, (first - self.unit + 1 - begin) // self.block_tokens)
        highest = min(self.blocks - 1, (last - 1 - begin) // self.block_tokens)
        for number in range(lowest, highest + 1) if first < last else ():
            start = begin + number * self.block_tokens
            block = self._block(start, seq_len)
            here = (block.begins < last) & (block.begins + block.lengths > first)
            found.append(start << NUMBER_BITS | np.unique(block.windows[here]))
        return np.concatenate(found)

    def parts(self, start: int, seq_len: int) -> list[WindowPart]:
        """The parts of documents in the window `start`, from left to right. Places behind the last part are free."""
        start, number = _block_and_number(start)
        block = self._block(start, seq_len)
        here = block.windows == number
        columns = (column[here].tolist() for column in (block.places, block.begins, block.lengths))
        return sorted(WindowPart(*part) for part in zip(*columns, strict=True))

    def ahead(self, starts: np.ndarray, seq_len: int) -> None:
        self.shards.ahead(np.unique(starts >> NUMBER_BITS), self.block_tokens)

    def rows(self, starts: np.ndarray, seq_len: int, words: bool = False) -> Rows:
        """The windows `starts` (B,), each of `seq_len` places, with `words` also the beginnings of words in them."""
        pairs = self._each(starts, seq_len, lambda block: block.pairs)
        kinds = self._each(starts, seq_len, lambda block: block.kinds)
        begins = self.words(starts, seq_len) if words else None
        return Rows(pairs[:, 1], pairs[:, 0], kinds == BEGINS, kinds != FREE, begins)

    def words(self, starts: np.ndarray, seq_len: int) -> np.ndarray:
        """(B, seq_len) bool: True where a word begins in the windows `starts` (B,), and at every free place."""
        return self._each(starts, seq_len, lambda block: block.words)

    def _measured_blocks(self) -> list[int]:
        """The stream positions of up to 64 blocks."""
        numbers: np.ndarray = np.arange(min(self.blocks, MEASURED))
        if self.blocks > MEASURED:
            numbers = hash64(PACK, self.seed, self.corpus, numbers) % np.uint64(self.blocks)
        return (self._offset(0) + numbers.astype(np.int64) * self.block_tokens).tolist()

    def _each(self, starts: np.ndarray, seq_len: int, array: Callable[["_Block"], np.ndarray]) -> np.ndarray:
        """(B, …): call `array(block)` once for each block involved, and take the rows of the requested windows."""
        blocks, numbers = _block_and_number(starts)
        order = blocks.argsort(kind="stable")
        blocks, numbers = blocks[order], numbers[order]
        edges = [0, *(np.flatnonzero(np.diff(blocks)) + 1).tolist(), len(blocks)]
        rows = None
        for first, last in pairwise(edges):
            of_block = array(self._block(int(blocks[first]), seq_len))
            if rows is None:
                rows = np.empty((len(starts), *of_block.shape[1:]), of_block.dtype)
            of_block.take(numbers[first:last], axis=0, out=rows[first:last], mode="clip")  # other modes copy twice
        found = np.empty_like(rows)
        found[order] = rows
        return found

    def _parts_of(self, start: int, seq_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The parts of documents in the block at `start`: their stream positions and lengths, both (n,) int64, and
        whether each is a whole document, (n,) bool."""
        end, unit = start + self.block_tokens, self.unit
        begins, ends = self.shards.spans(start, end)
        first = begins + np.maximum(0, -(-(start - begins) // unit)) * unit
        last = np.minimum(ends, begins - (begins - np.minimum(ends, end)) // unit * unit)
        counts = -(-np.maximum(0, last - first) // seq_len)
        found = np.repeat(first, counts) + _runs(np.zeros_like(counts), counts) * seq_len
        lengths = np.minimum(np.repeat(last, counts) - found, seq_len)
        return found, lengths, lengths == np.repeat(ends - begins, counts)

    def _pack_block(self, start: int, seq_len: int) -> "_Block":
        count = self.per_block(seq_len)
        windows, places, begins, lengths = pack(*self._parts_of(start, seq_len), seq_len, count)
        return _Block(self, start, seq_len, count, windows, places, begins, lengths)


class _Block:
    """A packed block: n parts in W windows of T places. Each array is made when it is first asked for, and kept."""

    def __init__(
        self,
        source: PackedWindows,
        start: int,
        seq_len: int,
        count: int,
        windows: np.ndarray,
        places: np.ndarray,
        begins: np.ndarray,
        lengths: np.ndarray,
    ):
        """Part i has lengths[i] tokens, from stream position begins[i] on, at place places[i] of window windows[i]."""
        self.windows, self.places, self.begins, self.lengths = windows, places, begins, lengths
        self._source, self._start, self._shape = source, start, (count, seq_len)
        self._size = int((begins + lengths).max()) - start  # tokens of the stream that the block reads
        # Window by window, from left to right: the parts of the window, then the free space behind them.
        free = seq_len - np.bincount(windows, lengths, count).astype(np.int64)
        self._heads = windows * seq_len + places
        heads = np.concatenate([self._heads, np.arange(1, count + 1) * seq_len - free])
        order = heads.argsort(kind="stable")
        self._lengths = np.concatenate([lengths, free])[order]
        self._begins = np.concatenate([begins - start, np.full(count, self._size)])[order]

    @cached_property
    def kinds(self) -> np.ndarray:
        """(W, T) int8: GOES_ON, BEGINS or FREE for each place."""
        kinds = np.where(self._begins < self._size, GOES_ON, FREE).astype(np.int8)
        found = np.repeat(kinds, self._lengths)
        found[self._heads] = BEGINS
        return found.reshape(self._shape)

    @cached_property
    def pairs(self) -> np.ndarray:
        """(W, 2, T) int32: the token before each token in the stream, and the token itself."""
        (stream,) = self._source.tokens(np.array([self._start]), self._size)
        return np.stack([self._laid(part, self._source.padding) for part in (stream[:-1], stream[1:])], axis=1)

    @cached_property
    def words(self) -> np.ndarray:
        """(W, T) bool: True where a word begins, and at every free place."""
        assert self._source.word_starts is not None, "this set was opened without its words"
        return self._laid(self._source.word_starts.gather(np.array([self._start]), self._size)[0], True)

    def _laid(self, stream: np.ndarray, free: int | bool) -> np.ndarray:
        """(W, T): the block's stream in the order of its windows, with the value `free` at free places."""
        found = np.concatenate([stream, np.full(self._shape[1], free, stream.dtype)])
        return found[_runs(self._begins, self._lengths)].reshape(self._shape)


def best_fit(
    lengths: np.ndarray, seq_len: int, windows: int | None = None, first: np.ndarray | bool = False
) -> tuple[np.ndarray, np.ndarray, int]:
    """Put parts of 1 to `seq_len` tokens into at most `windows` windows by best-fit decreasing. Parts that are `first`
    (n,) come before all other parts.

    Returns the window (n,) of each part, -1 if no window had space; the place (n,) in the window where the part begins;
    and the number of windows used.
    """
    order = np.argsort(-lengths - seq_len * np.asarray(first, np.int64), kind="stable").tolist()
    sizes = lengths.tolist()
    windows = len(sizes) if windows is None else windows
    window, place = [-1] * len(sizes), [0] * len(sizes)
    bits = windows.bit_length()
    free: list[int] = []  # space << bits | window, for all windows in use, ascending
    used = 0
    for part in order:
        size = sizes[part]
        at = bisect_left(free, size << bits)
        if at < len(free):
            found = free.pop(at)
        elif used < windows:
            found = seq_len << bits | used
            used += 1
        else:
            continue
        space = found >> bits
        window[part], place[part] = found - (space << bits), seq_len - space
        if space > size:
            insort(free, found - (size << bits))
    return np.array(window, np.int64), np.array(place, np.int64), used


def pack(
    begins: np.ndarray, lengths: np.ndarray, whole: np.ndarray, seq_len: int, windows: int
) -> tuple[np.ndarray, ...]:
    """Put parts, each given by its stream position, into `windows` windows that have space for all their tokens.

    Returns (window, place, begin, length) of m ≥ n parts, each (m,). A part that fits into no window is cut, each time
    into the largest space that remains. Parts that are `whole` (n,) documents are cut only if none of the others can be
    cut instead.
    """
    window, place = _placed(lengths, whole, seq_len, windows)
    found = np.stack([window, place, begins, lengths])  # (4, n)
    fits = window >= 0
    if fits.all():
        return tuple(found)
    space = seq_len - np.bincount(window[fits], lengths[fits], windows).astype(np.int64)
    cut = []
    for begin, length in found[2:, ~fits].T.tolist():
        while length:
            chosen = int(space.argmax())
            left = int(space[chosen])
            taken = min(length, left)
            assert taken, "the windows have no space for all tokens"
            cut.append((chosen, seq_len - left, begin, taken))
            space[chosen] = left - taken
            begin, length = begin + taken, length - taken
    return tuple(np.concatenate([found[:, fits], np.array(cut).T], axis=1))


def _placed(lengths: np.ndarray, whole: np.ndarray, seq_len: int, windows: int) -> tuple[np.ndarray, np.ndarray]:
    """The window (n,) of each part, -1 if no window has space, and the place (n,) of the part in its window.

    If the parts do not all fit in order of their length, whole documents are placed before the others.
    """
    window, place, _ = best_fit(lengths, seq_len, windows)
    if (window < 0).any() and not whole.all():
        window, place, _ = best_fit(lengths, seq_len, windows, whole)
    return window, place


def _cut(lengths: np.ndarray, whole: np.ndarray, seq_len: int, windows: int) -> int:
    """The number of whole documents that fit into no window."""
    return int((_placed(lengths, whole, seq_len, windows)[0][whole] < 0).sum())


def _runs(begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """For each i in turn the lengths[i] numbers begins[i], begins[i] + 1, …, as one int64 array."""
    ends = np.cumsum(lengths)
    return np.repeat(begins - ends + lengths, lengths) + np.arange(ends[-1] if len(ends) else 0)


def _block_and_number(starts: Place) -> tuple[Place, Place]:
    """The stream position of a window's block, and the window's number in the block."""
    return starts >> NUMBER_BITS, starts & (1 << NUMBER_BITS) - 1
