"""Windows of whole documents: packed by best fit, block by block, when a window is asked for.

A block is a stretch of `block_tokens` of the stream, as it is for windows of the plain stream, and read once an epoch.
The documents that begin in it are laid into windows of T tokens, the longest first, each into the window with the
least space that still holds it (best-fit decreasing; Johnson 1973, Near-optimal bin packing algorithms; for language
models Ding et al. 2024, arXiv:2404.10830). A document of more than T tokens is cut into parts of T and a rest. Space
that is left is padding.

Where a block ends, a document is finished that has at most 1/64 of the block's tokens: so much a block may have more
or less than its part of the stream, whatever T is, and phases of several T repeat nothing. A longer one goes on in the
next block, cut at a multiple of that length.

Every block has the same number of windows: so the place of a window is a function of its number alone, nothing is
listed or stored, and a block is packed in 0.1 to 1 ms by whoever reads from it. Where parts do not fit, whole documents
are laid first, and of the others some are cut into the space that is left. The number is measured on up to 64 blocks:
the least with which at most 1 in 200 documents is cut that would fit into a window. `order.py` mixes the windows
of 16 blocks, so that the parts of one long document do not follow one another; for it every process that makes batches
packs nearly every block, which keeps a job of any size below some 100 M tokens a second.
"""

from bisect import bisect_left, insort
from collections.abc import Callable
from functools import cached_property, lru_cache
from itertools import pairwise

import numpy as np

from pretrain.hashing import PACK, hash64
from pretrain.order.rows import Rows
from pretrain.order.stream import WindowPart, Windows, WordStarts
from pretrain.shards import Shards

BLOCK_WINDOWS = 64  # that a block has space for unless the user says: 1.5 % of it is padding,
LEAST_WINDOWS = 16  # and of these 6 %
MOST_WINDOWS = 1 << 14  # 32 packed blocks of as many windows of 512 are 1.3 GB
MEASURED = 64  # blocks
CUT = 0.005  # of the documents in them that would fit into a window, at most, that may be cut
KEPT = 32  # blocks, those packed last: 16 are read from at a time
NUMBER_BITS = 20  # of the number of a window in its block
GOES_ON, BEGINS, FREE = range(3)  # a token in a part of a document, its first token, no token


class PackedWindows(Windows):
    """Windows that hold whole documents, and parts of those that are longer.

    What names a window, `start` elsewhere, is the stream position of its block, and behind it the window's number in
    the block, in NUMBER_BITS.
    """

    def __init__(self, shards: Shards, block_tokens: int, seed: int, words: WordStarts | None = None, corpus: int = 0):
        super().__init__(shards, block_tokens, seed, words, corpus)
        assert shards.tokens < 1 << 63 - NUMBER_BITS, shards.tokens
        self.unit = max(1, block_tokens // BLOCK_WINDOWS)  # tokens that are never parted by the end of a block
        self.padding = shards.specials.get("pad", self.end)
        self.per_block = lru_cache(self.per_block)
        self._block = lru_cache(KEPT)(self._block)

    def per_block(self, seq_len: int) -> int:
        """Windows of `seq_len`, a divisor of block_tokens, that a block is packed into."""
        found = -(-(self.block_tokens + self.unit - 1) // seq_len)
        blocks = [self._parts_of(start, seq_len)[1:] for start in self._measured()]
        documents = sum(int(whole.sum()) for _, whole in blocks)
        used = [best_fit(lengths, seq_len)[2] for lengths, _ in blocks]  # with which nothing is cut
        blocks = [parts for parts, windows in zip(blocks, used, strict=True) if windows > found]

        def enough(windows: int) -> bool:
            return sum(_cut(*parts, seq_len, windows) for parts in blocks) <= CUT * documents

        # Halved, not counted up: documents that are a little longer than half a window take twice the windows.
        counts = range(found, max(found, *used))
        found += bisect_left(counts, True, key=enough)
        assert found <= min(self.block_tokens, 1 << NUMBER_BITS), found
        return found

    def waste(self, seq_len: int) -> tuple[float, float]:
        """What packing costs, measured: the share of padding in windows; and of the documents that would fit into one
        the share that is cut."""
        count, fit, cut = self.per_block(seq_len), 0, 0
        for start in self._measured():
            begins, ends = self.shards.spans(start, start + self.block_tokens)
            here = int(((begins >= start) & (ends - begins <= seq_len)).sum())
            _, lengths, whole = self._parts_of(start, seq_len)
            fit += here
            cut += here - int(whole.sum()) + _cut(lengths, whole, seq_len, count)  # by the end of the block, by packing
        return 1 - self.block_tokens / (count * seq_len), cut / max(1, fit)

    def apart(self, seq_len: int) -> int:
        return 1

    def in_turn(self, blocks: np.ndarray, turns: np.ndarray, each: int) -> np.ndarray:
        return turns  # the order shuffles packed windows otherwise

    def turns_of(self, blocks: np.ndarray, which: np.ndarray, each: int) -> np.ndarray:
        return which

    def starts(self, places: np.ndarray) -> np.ndarray:
        """The windows (B,) at `places` (B,) of the order."""
        number = places % self.block_tokens
        return super().starts(places - number) << NUMBER_BITS | number

    def places_of(self, starts: np.ndarray, epoch: int) -> np.ndarray:
        """The inverse: where the order of `epoch` has the windows `starts` (B,); -1 for those it omits."""
        block, number = _block_and_number(starts)
        places = super().places_of(block, epoch)
        return np.where(places < 0, places, places + number)

    def grid(self, first: int, last: int, seq_len: int, epoch: int) -> np.ndarray:
        """The windows of `seq_len` of `epoch` that hold one of the stream positions first … last - 1."""
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
        """What the window `start` holds, from left to right. Behind the last part it is empty."""
        start, number = _block_and_number(start)
        block = self._block(start, seq_len)
        here = block.windows == number
        columns = (column[here].tolist() for column in (block.places, block.begins, block.lengths))
        return sorted(WindowPart(*part) for part in zip(*columns, strict=True))

    def ahead(self, starts: np.ndarray, seq_len: int) -> None:
        self.shards.ahead(np.unique(starts >> NUMBER_BITS), self.block_tokens)

    def rows(self, starts: np.ndarray, seq_len: int, words: bool = False) -> Rows:
        """The windows `starts` (B,), each of `seq_len` places; with `words` also where words begin in them."""
        pairs = self._each(starts, seq_len, lambda block: block.pairs)
        kinds = self._each(starts, seq_len, lambda block: block.kinds)
        begins = self.words(starts, seq_len) if words else None
        return Rows(pairs[:, 1], pairs[:, 0], kinds == BEGINS, kinds != FREE, begins)

    def words(self, starts: np.ndarray, seq_len: int) -> np.ndarray:
        """(B, seq_len) bool: where words begin in the windows `starts` (B,). Free places are words of their own."""
        assert self.word_starts is not None, "this set was opened without its words"
        return self._each(starts, seq_len, lambda block: block.words)

    def _measured(self) -> list[int]:
        """The stream positions of up to 64 blocks."""
        numbers = np.arange(min(self.blocks, MEASURED))
        if self.blocks > MEASURED:
            numbers = hash64(PACK, self.seed, self.corpus, numbers) % np.uint64(self.blocks)
        return (self._offset(0) + numbers.astype(np.int64) * self.block_tokens).tolist()

    def _each(self, starts: np.ndarray, seq_len: int, of: Callable[["_Block"], np.ndarray]) -> np.ndarray:
        """(B, …): of each window what `of` gives for all those of its block."""
        blocks, numbers = _block_and_number(starts)
        order = blocks.argsort(kind="stable")
        blocks, numbers = blocks[order], numbers[order]
        edges = [0, *(np.flatnonzero(np.diff(blocks)) + 1).tolist(), len(blocks)]
        rows = None
        for first, last in pairwise(edges):
            block = of(self._block(int(blocks[first]), seq_len))
            if rows is None:
                rows = np.empty((len(starts), *block.shape[1:]), block.dtype)
            block.take(numbers[first:last], axis=0, out=rows[first:last], mode="clip")  # other modes copy twice
        found = np.empty_like(rows)
        found[order] = rows
        return found

    def _parts_of(self, start: int, seq_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The parts of documents in the block at `start`: stream positions and lengths, both (n,) int64, and which are
        whole documents, (n,) bool."""
        end, unit = start + self.block_tokens, self.unit
        begins, ends = self.shards.spans(start, end)
        first = begins + np.maximum(0, -(-(start - begins) // unit)) * unit
        last = np.minimum(ends, begins - (begins - np.minimum(ends, end)) // unit * unit)
        counts = -(-np.maximum(0, last - first) // seq_len)
        found = np.repeat(first, counts) + _runs(np.zeros_like(counts), counts) * seq_len
        lengths = np.minimum(np.repeat(last, counts) - found, seq_len)
        return found, lengths, lengths == np.repeat(ends - begins, counts)

    def _block(self, start: int, seq_len: int) -> "_Block":
        count = self.per_block(seq_len)
        windows, places, begins, lengths = pack(*self._parts_of(start, seq_len), seq_len, count)
        return _Block(self, start, seq_len, count, windows, places, begins, lengths)


class _Block:
    """A packed block: n parts in W windows of T places. What is asked for is put together once."""

    def __init__(
        self,
        of: PackedWindows,
        start: int,
        seq_len: int,
        count: int,
        windows: np.ndarray,
        places: np.ndarray,
        begins: np.ndarray,
        lengths: np.ndarray,
    ):
        """Part i, of (n,), is lengths[i] tokens from begins[i] of the stream, at places[i] of windows[i]."""
        self.windows, self.places, self.begins, self.lengths = windows, places, begins, lengths
        self._of, self._start, self._shape = of, start, (count, seq_len)
        self._size = int((begins + lengths).max()) - start  # tokens of the stream that are looked at
        # From left to right, window by window: the parts of each, and the free space behind them.
        free = seq_len - np.bincount(windows, lengths, count).astype(np.int64)
        heads = np.concatenate([windows * seq_len + places, np.arange(1, count + 1) * seq_len - free])
        order = heads.argsort(kind="stable")
        self._lengths = np.concatenate([lengths, free])[order]
        self._begins = np.concatenate([begins - start, np.full(count, self._size)])[order]
        self._heads = windows * seq_len + places

    @cached_property
    def kinds(self) -> np.ndarray:
        """(W, T) int8: GOES_ON, BEGINS or FREE for each place."""
        kinds = np.where(self._begins < self._size, GOES_ON, FREE).astype(np.int8)
        found = np.repeat(kinds, self._lengths)
        found[self._heads] = BEGINS
        return found.reshape(self._shape)

    @cached_property
    def pairs(self) -> np.ndarray:
        """(W, 2, T) int32: what precedes each token in the stream, and the token."""
        (stream,) = self._of.tokens(np.array([self._start]), self._size)
        return np.stack([self._laid(part, self._of.padding) for part in (stream[:-1], stream[1:])], axis=1)

    @cached_property
    def words(self) -> np.ndarray:
        """(W, T) bool."""
        return self._laid(self._of.word_starts.gather(np.array([self._start]), self._size)[0], True)

    def _laid(self, stream: np.ndarray, free: int | bool) -> np.ndarray:
        """(W, T): the block's stream as it is laid into windows, and `free` where there is no token."""
        found = np.concatenate([stream, np.full(self._shape[1], free, stream.dtype)])
        return found[_runs(self._begins, self._lengths)].reshape(self._shape)


def best_fit(
    lengths: np.ndarray, seq_len: int, windows: int | None = None, first: np.ndarray | bool = False
) -> tuple[np.ndarray, np.ndarray, int]:
    """Best-fit decreasing of parts of 1 to `seq_len` tokens into windows, of which there are at most `windows`; of all
    those that are `first` (n,), then of the others.

    The window (n,) of each part, -1 where none had space; the place (n,) in it where the part begins; and how many
    windows are used.
    """
    order = np.argsort(-lengths - seq_len * np.asarray(first, np.int64), kind="stable").tolist()
    sizes = lengths.tolist()
    windows = len(sizes) if windows is None else windows
    window, place = [-1] * len(sizes), [0] * len(sizes)
    bits = windows.bit_length()
    free: list[int] = []  # space << bits | window of windows that are in use, ascending
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
    """Parts, each at a stream position, into `windows` windows that have space for all of their tokens.

    (window, place, begin, length), each (m,), m ≥ n: what fits nowhere is cut, each time into the largest space left;
    those that are `whole` (n,) after all others.
    """
    window, place = _placed(lengths, whole, seq_len, windows)
    found = np.stack([window, place, begins, lengths])
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
    """The window (n,) of each part, -1 where none has space, and its place there: all of them, if they all fit."""
    window, place, _ = best_fit(lengths, seq_len, windows)
    if (window < 0).any() and not whole.all():
        window, place, _ = best_fit(lengths, seq_len, windows, whole)
    return window, place


def _cut(lengths: np.ndarray, whole: np.ndarray, seq_len: int, windows: int) -> int:
    """How many whole documents find no window."""
    return int((_placed(lengths, whole, seq_len, windows)[0][whole] < 0).sum())


def _runs(begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """begins[i], begins[i] + 1, … of each run of lengths[i], one run after another, int64."""
    ends = np.cumsum(lengths)
    return np.repeat(begins - ends + lengths, lengths) + np.arange(ends[-1] if len(ends) else 0)


def _block_and_number(starts):
    """The stream position of a window's block, and its number in the block."""
    return starts >> NUMBER_BITS, starts & (1 << NUMBER_BITS) - 1
