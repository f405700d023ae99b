"""The order of a run: step → samples → corpus, epoch and stream position, and back, all in O(1) and without state.

    sample i of a phase ──mixture──▶ corpus, and which of the windows that the phase draws from it
      ──pools──▶ block of that corpus's order, and window of the block ──permutation of the epoch──▶ stream position

A block is the unit that an epoch reads once. Every phase begins, in each corpus, at the first block that no earlier
phase has touched, so phases of other sequence lengths and mixtures repeat nothing within an epoch.

If the windows of a block followed one another, a step would read a few long sections of text. So the blocks of an epoch
are divided into pools, and a pool's windows are taken in turns: one window of each block, then another window of each
block, and so on. A pool has at least as many blocks as a step has windows of the corpus, so a step reads from as many
places of the corpus as it has windows, whatever `block_tokens` is. A phase that ends inside a pool leaves the rest of
the pool unread in this epoch: less than a quarter of the corpus, or less than twice the blocks of a step if that is
more.

Windows of packed documents come from larger blocks, and a whole block must be packed to read one of its windows. So the
windows of 16 successive blocks of the phase, over all its corpora, are in one random order. The mixture of such a phase
is exact to one block after every 16 blocks. The mixture of windows of the stream is exact to one window after every
sample.

No pool depends on the number of steps of its phase, so a phase may be lengthened while it runs.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pretrain.hashing import PACK, permute, unpermute
from pretrain.order.mixture import Mixture
from pretrain.order.packed import PackedWindows
from pretrain.order.phases import Phase, locate
from pretrain.order.rows import Rows, joined
from pretrain.order.stream import Windows

CHUNK = 8192  # samples placed at once: a sample costs 150 µs alone, 0.3 µs in a chunk, 0.5 µs in a chunk with pools
CHUNKS_KEPT = 4
# The most blocks of a pool, unless a step needs more. A pool is read at random places, but each of its pages comes from
# the disk only once if memory holds the pool: 64 MiB with blocks of 8,192 tokens.
POOL = 4096
PACKED_POOL = 16  # blocks of packed documents: the parts of a long document are in one block, but belong in many steps
VERSION = 2  # of this order; version 1 read windows that are shorter than a block one block after another
CORPUS_BIT = 52  # the corpus stands above this bit of a key, and the place below it: 4.5e15 tokens of each corpus


class Samples(NamedTuple):
    """Successive samples of a phase, each array (B,) int64."""

    corpora: np.ndarray  # the number of the corpus
    keys: np.ndarray  # the corpus, and the place in its order: the key of every random bit that the sample needs
    starts: np.ndarray  # the window's position in the corpus's stream; for a packed window see PackedWindows


@dataclass(frozen=True, order=True)
class Reading:
    """Successive tokens of a corpus's stream that are read in one window of the run.

    A window of the stream is one reading. A packed window has one reading for each part of a document in it.
    """

    step: int
    sample: int  # the number of the window in its phase
    at: int  # the place in the window where the tokens begin
    corpus: str
    epoch: int
    start: int  # the stream position of the first token
    tokens: int


def pool_of(blocks: int, windows: int) -> int:
    """The blocks of a pool, for a corpus of `blocks` blocks that has `windows` windows in a step.

    At least one block for each window of a step. Otherwise an eighth of the corpus, so that a phase that ends inside a
    pool leaves little unread, but at most POOL.
    """
    return max(1, windows, min(POOL, blocks // 8))


@dataclass(frozen=True)
class Pools:
    """The windows that a phase draws from a corpus, numbered from 0, and their places in the corpus's order.

    The phase begins at block `first` of the order. The blocks of each epoch from there on are divided into pools of
    `pool` blocks. The last pool of an epoch has up to twice as many. The windows of a pool are taken in turns.
    """

    windows: Windows
    first: int
    seq_len: int
    pool: int

    def windows_at(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The block (B,) in the order of each of the windows `numbers` (B,), and the window's number in it (B,)."""
        each = self.windows.per_block(self.seq_len)
        if each == 1:
            return self.first + numbers, np.zeros_like(numbers)
        epochs, numbers = np.divmod(numbers + self._begun * each, self.windows.blocks * each)
        heads, sizes = self._pool(epochs, numbers // each)
        turns, rest = np.divmod(numbers - heads * each, sizes)
        blocks = self._epoch_begin + epochs * self.windows.blocks + heads + rest
        return blocks, self.windows.in_turn(blocks, turns, each)

    def numbers(self, blocks: np.ndarray, which: np.ndarray) -> np.ndarray:
        """The inverse of `windows_at`: the numbers (B,) of the windows `which` (B,) of `blocks` (B,) of the order."""
        each = self.windows.per_block(self.seq_len)
        turns = self.windows.turns_of(blocks, which, each)
        epochs, places = np.divmod(blocks - self._epoch_begin, self.windows.blocks)
        heads, sizes = self._pool(epochs, places)
        before = epochs * self.windows.blocks + heads - self._begun
        return before * each + turns * sizes + places - heads

    def touched(self, count: int) -> int:
        """The number of blocks, counted from `first`, up to the last block that the first `count` windows touch."""
        if not count:
            return 0
        each = self.windows.per_block(self.seq_len)
        epochs, numbers = np.divmod(np.array([count - 1]) + self._begun * each, self.windows.blocks * each)
        heads, sizes = self._pool(epochs, numbers // each)
        ends = heads + np.minimum(sizes, numbers - heads * each + 1)
        return int((epochs * self.windows.blocks + ends - self._begun)[0])

    @property
    def _begun(self) -> int:
        """The number of blocks that earlier phases have touched in the epoch in which this phase begins."""
        return self.first % self.windows.blocks

    @property
    def _epoch_begin(self) -> int:
        """The first block, in the order, of the epoch in which this phase begins."""
        return self.first - self._begun

    def _pool(self, epochs: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The first block (B,) and the number of blocks (B,) of the pools that hold the blocks at `places` (B,) of
        `epochs` (B,). Epochs are counted from the one in which the phase begins."""
        begin, blocks = np.where(epochs == 0, self._begun, 0), self.windows.blocks
        last = np.maximum(1, (blocks - begin) // self.pool) - 1
        pools = np.minimum((places - begin) // self.pool, last)
        heads = begin + pools * self.pool
        return heads, np.where(pools == last, blocks - heads, self.pool)


class Order:
    """The text of every sample of a run. The number of a corpus is its position in `corpora`."""

    def __init__(self, corpora: dict[str, Windows], phases: Sequence[Phase]):
        """A phase without a mixture needs exactly one corpus."""
        self.corpora, self.phases, self.names = corpora, phases, list(corpora)
        self.windows = list(corpora.values())
        assert [windows.corpus for windows in self.windows] == list(range(len(corpora)))
        (self.block_tokens,) = {windows.block_tokens for windows in self.windows}
        self.packed = isinstance(self.windows[0], PackedWindows)
        self.per_block = [[windows.per_block(phase.seq_len) for windows in self.windows] for phase in phases]
        # A mixture deals out single windows of the stream, but whole packed blocks: a block has the same number of
        # tokens in every corpus, but not the same number of windows.
        self.dealt = self.per_block if self.packed else [[1] * len(corpora)] * len(phases)
        self.mixtures = [
            Mixture(phase.weights(self.names), tuple(counts)) for phase, counts in zip(phases, self.dealt, strict=True)
        ]
        self.pools: list[list[Pools]] = []  # [phase][corpus]
        self.first_blocks = np.zeros((len(phases) + 1, len(corpora)), np.int64)
        for number in range(len(phases)):
            self.pools.append(self._pools(number))
            touched = [pools.touched(count) for pools, count in zip(self.pools[-1], self._ended(number), strict=True)]
            self.first_blocks[number + 1] = self.first_blocks[number] + touched
        self._chunks: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def samples(self, phase: int, first: int, count: int) -> Samples:
        """Samples first … first + count - 1 of phase number `phase`."""
        parts = []
        assert first >= 0 and first + count <= self.phases[phase].samples, (first, count, self.phases[phase].samples)
        while count:
            chunk, at = divmod(first, CHUNK)
            parts.append(self._chunk(phase, chunk)[:, at : at + count])
            first, count = first + parts[-1].shape[1], count - parts[-1].shape[1]
        return Samples(*(parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)))

    def rows(self, samples: Samples, seq_len: int, words: bool = False) -> Rows:
        """The tokens of samples, in windows of `seq_len`, with `words` also the beginnings of words in them."""
        corpora = np.unique(samples.corpora) if len(self.windows) > 1 else np.zeros(1, np.int64)
        if len(corpora) == 1:
            return self.windows[corpora[0]].rows(samples.starts, seq_len, words)
        parts = []
        for corpus in corpora:
            mine = np.flatnonzero(samples.corpora == corpus)
            parts.append((mine, self.windows[corpus].rows(samples.starts[mine], seq_len, words)))
        return joined(parts)

    def ahead(self, samples: Samples, seq_len: int) -> None:
        """Ask the system to read samples from the disk that will be needed soon."""
        for number in np.unique(samples.corpora):
            self.windows[number].ahead(samples.starts[samples.corpora == number], seq_len)

    def step(self, step: int) -> list[Reading]:
        """All readings of optimizer step `step` (0-based), in the order of the global batch."""
        position = locate(step, self.phases)
        phase = position.phase
        found = self.samples(position.number, position.first_sample, phase.batch)
        return [
            Reading(
                step=step,
                sample=position.first_sample + n,
                at=part.at,
                corpus=self.names[corpus],
                epoch=(key & (1 << CORPUS_BIT) - 1) // self.block_tokens // self.windows[corpus].blocks,
                start=part.start,
                tokens=part.tokens,
            )
            for n, (corpus, key, start) in enumerate(zip(*(column.tolist() for column in found), strict=True))
            for part in self.windows[corpus].parts(start, phase.seq_len)
        ]

    def readings(self, corpus: str, first: int, last: int) -> list[Reading]:
        """All readings of the run that hold one of the stream positions first … last - 1 of a corpus, by step.

        The inverse of `step`. The cost depends only on the epochs of the run and on the number of windows that hold the
        positions.
        """
        number = self.names.index(corpus)
        windows, begins = self.windows[number], self.first_blocks[:, number]
        steps_before = np.cumsum([0] + [phase.steps for phase in self.phases])
        found = []
        for epoch in range(-(-int(begins[-1]) // windows.blocks)):
            for seq_len in sorted({phase.seq_len for phase in self.phases}):
                starts = windows.grid(first, last, seq_len, epoch)
                places = windows.places_of(starts, epoch)
                # The phase of each window. A phase that does not read the corpus begins where the next phase begins.
                of_phase = np.searchsorted(begins, places // self.block_tokens, side="right") - 1
                for p, phase in enumerate(self.phases):
                    mine = of_phase == p
                    if phase.seq_len != seq_len or not mine.any():
                        continue
                    samples = self._samples_at(p, number, places[mine])
                    for sample, start in zip(samples.tolist(), starts[mine].tolist(), strict=True):
                        if sample < phase.samples:  # the last pool of a phase may be left unfinished
                            step = int(steps_before[p]) + sample // phase.batch
                            found += [
                                Reading(step, sample, part.at, corpus, epoch, part.start, part.tokens)
                                for part in windows.parts(start, seq_len)
                                if part.start < last and part.start + part.tokens > first
                            ]
        return sorted(found)

    def windows_drawn(self, phase: int) -> np.ndarray:
        """The number of windows that phase number `phase` draws from each corpus, (C,) int64."""
        samples, mixture = self.phases[phase].samples, self.mixtures[phase]
        if not self.packed:
            return mixture.counts(samples)
        finished, first = self._last_pool(phase)
        others = self.samples(phase, first, samples - first).corpora
        return mixture.counts(finished) * self.dealt[phase] + np.bincount(others, minlength=len(self.names))

    def drawn(self, phase: int) -> np.ndarray:
        """The tokens that phase number `phase` reads from each corpus, (C,) int64. The windows of packed blocks that
        remain unfinished count with the mean tokens of a window."""
        return self.windows_drawn(phase) * self.block_tokens // self.per_block[phase]

    def places(self, phase: int) -> tuple[np.ndarray, np.ndarray]:
        """The windows that the first step of a phase has from each corpus, and the blocks they come from, both (C,)."""
        found = self.samples(phase, 0, self.phases[phase].batch)
        blocks = (found.keys & (1 << CORPUS_BIT) - 1) // self.block_tokens
        corpora = np.unique(np.stack([found.corpora, blocks]), axis=1)[0]  # the corpus of each block
        counts, places = (np.bincount(each, minlength=len(self.names)) for each in (found.corpora, corpora))
        return counts, np.minimum(places, [windows.blocks for windows in self.windows])  # a step may end an epoch

    def padding(self, phase: int) -> np.ndarray:
        """The share of padding in the windows that phase number `phase` reads from each corpus, (C,) float64."""
        return 1 - self.block_tokens / (np.array(self.per_block[phase]) * self.phases[phase].seq_len)

    def epochs(self) -> np.ndarray:
        """The epochs of each corpus that the run reads, (C,) float64: the end of the run in the corpus's order."""
        last = len(self.phases) - 1
        ends = self.first_blocks[last] + self.windows_drawn(last) / self.per_block[last]
        return ends / np.array([windows.blocks for windows in self.windows])

    def _pools(self, phase: int) -> list[Pools]:
        """The pools of each corpus in phase number `phase`."""
        batch, weights = self.phases[phase].batch, self.mixtures[phase].weights
        of_step = -(-batch * weights // weights.sum())
        return [
            Pools(windows, int(first), self.phases[phase].seq_len, 1 if self.packed else pool_of(windows.blocks, count))
            for windows, first, count in zip(self.windows, self.first_blocks[phase], of_step.tolist(), strict=True)
        ]

    def _ended(self, phase: int) -> list[int]:
        """The number of windows of each corpus, (C,), up to the last window that the phase draws."""
        samples, mixture = self.phases[phase].samples, self.mixtures[phase]
        if not self.packed:
            return mixture.counts(samples).tolist()
        _, first = self._last_pool(phase)
        items, _ = mixture.items_of(self._shuffled(phase, np.arange(first, samples), permute))
        return (mixture.counts(int(items.max()) + 1) * self.dealt[phase]).tolist()

    def _chunk(self, phase: int, chunk: int) -> np.ndarray:
        """(3, at most CHUNK) int64: the columns of `Samples` for chunk number `chunk`.

        Recent chunks are kept, because loaders ask for successive samples.
        """
        found = self._chunks.get((phase, chunk))
        if found is None:
            end = min((chunk + 1) * CHUNK, self.phases[phase].samples)
            found = self._chunks[phase, chunk] = self._place(phase, np.arange(chunk * CHUNK, end))
            if len(self._chunks) > CHUNKS_KEPT:
                self._chunks.popitem(last=False)
        return found

    def _place(self, phase: int, samples: np.ndarray) -> np.ndarray:
        """(3, B) int64: the columns of `Samples` for `samples` (B,) of phase number `phase`."""
        items, parts = self.mixtures[phase].items_of(self._shuffled(phase, samples, permute))
        corpora, dealt = self.mixtures[phase].draw(items)
        places, starts = np.empty_like(corpora), np.empty_like(corpora)
        for number, (windows, pools) in enumerate(zip(self.windows, self.pools[phase], strict=True)):
            mine = corpora == number if len(self.windows) > 1 else slice(None)
            blocks, which = pools.windows_at(dealt[mine] * self.dealt[phase][number] + parts[mine])
            places[mine] = blocks * self.block_tokens + which * windows.apart(pools.seq_len)
            starts[mine] = windows.starts(places[mine])
        return np.stack([corpora, places | corpora << CORPUS_BIT, starts])

    def _samples_at(self, phase: int, corpus: int, places: np.ndarray) -> np.ndarray:
        """The inverse of `_place`: the samples (B,) of phase number `phase` at `places` (B,) of a corpus's order.

        A number from the phase's count of samples on is a window of its last pool that the phase leaves unread.
        """
        mixture = self.mixtures[phase]
        blocks, rest = np.divmod(places, self.block_tokens)
        which = rest // self.windows[corpus].apart(self.phases[phase].seq_len)
        dealt, within = np.divmod(self.pools[phase][corpus].numbers(blocks, which), self.dealt[phase][corpus])
        return self._shuffled(phase, mixture.first_samples(mixture.items(corpus, dealt)) + within, unpermute)

    def _last_pool(self, phase: int) -> tuple[int, int]:
        """The first block of the last pool of packed blocks that a phase draws from, and its first sample."""
        mixture, pool = self.mixtures[phase], self._packed_pool(phase)
        (item,), _ = mixture.items_of(np.array([self.phases[phase].samples - 1]))
        first = int(item) // pool * pool
        return first, int(mixture.first_samples(np.array([first]))[0])

    def _packed_pool(self, phase: int) -> int:
        """The number of packed blocks whose windows are in one random order: at most a quarter of an epoch of each
        corpus."""
        weights = self.mixtures[phase].weights
        epochs = [w.blocks * weights.sum() // weight for w, weight in zip(self.windows, weights, strict=True) if weight]
        return max(1, min(PACKED_POOL, int(min(epochs)) // 4))

    def _shuffled(self, phase: int, samples: np.ndarray, move: Callable[..., np.ndarray]) -> np.ndarray:
        """Shuffle packed windows among the successive blocks of a pool; `move` is `permute` or its inverse
        `unpermute`."""
        if not self.packed:
            return samples
        mixture, found, size = self.mixtures[phase], np.empty_like(samples), self._packed_pool(phase)
        pools = mixture.items_of(samples)[0] // size
        for pool in np.unique(pools).tolist():
            here = pools == pool
            first, last = mixture.first_samples(np.array([pool, pool + 1]) * size).tolist()
            found[here] = first + move(samples[here] - first, last - first, self.windows[0].seed, PACK, phase, pool)
        return found
