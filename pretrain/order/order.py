"""The order of a run: step → samples → corpus, epoch and stream position, and back, all in O(1) and without state.

    sample i of a phase ──mixture──▶ corpus, and which of the windows that the phase draws from it
      ──pools──▶ block of that corpus's order, and window of the block ──permutation of the epoch──▶ stream position

A block is the unit that an epoch reads once. Every phase begins, in each corpus, at the first block that no earlier
phase has touched, so phases of other sequence lengths and mixtures repeat nothing within an epoch.

A block that holds several windows would fill a step with one stretch of text. So the blocks of an epoch are divided
into pools, and a pool's windows are taken in turns: one window of each block, then another window of each, and so on.
A pool has at least as many blocks as a step has windows of the corpus: a step reads from as many places of the corpus
as it has windows, whatever `block_tokens` is. A phase that ends inside a pool leaves the rest of the pool unread in
this epoch: less than a quarter of the corpus, or twice the blocks of a step where these are more.

Windows of packed documents come from larger blocks, which must be packed to read one window of them. There the windows
of 16 successive blocks of the phase, of all its corpora, are in one random order. The mixture of such a phase is exact,
within a block, where 16 blocks end. The mixture of windows of the stream is exact, within a window, after every sample.

No pool depends on the number of steps of its phase: a phase may be lengthened while it runs.
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

CHUNK = 8192  # samples placed at once: alone a sample costs 150 µs, in a chunk 0.3 µs, 0.5 with pools
CHUNKS_KEPT = 4
# Blocks: the most a pool has where a step needs no more. Its windows are read at random places, as all are where blocks
# are as long as windows; but the pages of a pool come from the disk once if memory holds it: 64 MiB at 8,192 tokens.
POOL = 4096
PACKED_POOL = 16  # blocks of packed documents: the parts of a long one are in one block, and must not come in one step
VERSION = 2  # of this order. Version 1 read windows that are shorter than a block one block after another
CORPUS_BIT = 52  # above the bits of a place, for 4.5e15 tokens of each corpus


class Samples(NamedTuple):
    """Successive samples of a phase, each array (B,) int64."""

    corpora: np.ndarray  # number of the corpus
    keys: np.ndarray  # what every random bit of the sample hangs on: its place in the corpus's order, and the corpus
    starts: np.ndarray  # the window: its position in the corpus's stream, or what names it where documents are packed


@dataclass(frozen=True, order=True)
class Reading:
    """A stretch of a corpus's stream in a window of the run, which is sample `sample` of its phase.

    A window of the plain stream is one stretch, a packed window as many as there are documents in it.
    """

    step: int
    sample: int
    at: int  # place in the window where it begins
    corpus: str
    epoch: int
    start: int  # stream position
    tokens: int


def pool_of(blocks: int, windows: int) -> int:
    """Blocks of a pool in a corpus that has so many `blocks`, and so many `windows` in a step.

    No fewer than a step has windows. Else an eighth of the corpus, so that a phase that ends inside a pool leaves
    little unread, and at most POOL.
    """
    return max(1, windows, min(POOL, blocks // 8))


@dataclass(frozen=True)
class Pools:
    """The windows that a phase draws from a corpus, numbered from 0, and where the corpus's order has them.

    The phase begins at block `first` of the order. Of every epoch the blocks from there on are divided into pools of
    `pool` blocks, the last pool of an epoch with up to twice as many. Windows of a pool are taken in turns.
    """

    windows: Windows
    first: int
    seq_len: int
    pool: int

    def windows_at(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The block (B,) of the order that each of the windows `numbers` (B,) is in, and which it is there (B,)."""
        each = self.windows.per_block(self.seq_len)
        if each == 1:
            return self.first + numbers, np.zeros_like(numbers)
        epochs, numbers = np.divmod(numbers + self._begun * each, self.windows.blocks * each)
        heads, sizes = self._pool(epochs, numbers // each)
        turns, rest = np.divmod(numbers - heads * each, sizes)
        blocks = self._epoch_begin + epochs * self.windows.blocks + heads + rest
        return blocks, self.windows.in_turn(blocks, turns, each)

    def numbers(self, blocks: np.ndarray, which: np.ndarray) -> np.ndarray:
        """The inverse: the numbers (B,) of the windows `which` (B,) of `blocks` (B,) of the order."""
        each = self.windows.per_block(self.seq_len)
        turns = self.windows.turns_of(blocks, which, each)
        epochs, places = np.divmod(blocks - self._epoch_begin, self.windows.blocks)
        heads, sizes = self._pool(epochs, places)
        before = epochs * self.windows.blocks + heads - self._begun
        return before * each + turns * sizes + places - heads

    def touched(self, count: int) -> int:
        """How many blocks from `first` on the first `count` windows are in, and those before them."""
        if not count:
            return 0
        each = self.windows.per_block(self.seq_len)
        epochs, numbers = np.divmod(np.array([count - 1]) + self._begun * each, self.windows.blocks * each)
        heads, sizes = self._pool(epochs, numbers // each)
        ends = heads + np.minimum(sizes, numbers - heads * each + 1)
        return int((epochs * self.windows.blocks + ends - self._begun)[0])

    @property
    def _begun(self) -> int:
        """Blocks that earlier phases have touched of the epoch in which this one begins."""
        return self.first % self.windows.blocks

    @property
    def _epoch_begin(self) -> int:
        """The first block of that epoch in the order."""
        return self.first - self._begun

    def _pool(self, epochs: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the pools begin that have the blocks at `places` (B,) of `epochs` (B,), counted from the one in which
        the phase begins; and how many blocks they have."""
        begin, blocks = np.where(epochs == 0, self._begun, 0), self.windows.blocks
        last = np.maximum(1, (blocks - begin) // self.pool) - 1
        pools = np.minimum((places - begin) // self.pool, last)
        heads = begin + pools * self.pool
        return heads, np.where(pools == last, blocks - heads, self.pool)


class Order:
    """Which text every sample of a run is. The number of a corpus is its place in `corpora`."""

    def __init__(self, corpora: dict[str, Windows], phases: Sequence[Phase]):
        """A phase without a mixture draws from the one corpus there is."""
        self.corpora, self.phases, self.names = corpora, phases, list(corpora)
        self.windows = list(corpora.values())
        assert [windows.corpus for windows in self.windows] == list(range(len(corpora)))
        (self.block_tokens,) = {windows.block_tokens for windows in self.windows}
        self.packed = isinstance(self.windows[0], PackedWindows)
        self.per_block = [[windows.per_block(phase.seq_len) for windows in self.windows] for phase in phases]
        # What a mixture deals out is windows; of packed ones whole blocks, since these differ in how many they have.
        self.dealt = self.per_block if self.packed else [[1] * len(corpora)] * len(phases)
        self.mixtures = [
            Mixture(phase.weights(self.names), tuple(counts)) for phase, counts in zip(phases, self.dealt, strict=True)
        ]
        self.pools: list[list[Pools]] = []  # of each phase and corpus
        self.first_blocks = np.zeros((len(phases) + 1, len(corpora)), np.int64)
        for number in range(len(phases)):
            self.pools.append(self._pools(number))
            touched = [pools.touched(count) for pools, count in zip(self.pools[-1], self._ended(number), strict=True)]
            self.first_blocks[number + 1] = self.first_blocks[number] + touched
        self._chunks: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def samples(self, phase: int, first: int, count: int) -> Samples:
        """Samples first … first + count - 1 of the phase of that number."""
        parts = []
        assert first >= 0 and first + count <= self.phases[phase].samples, (first, count, self.phases[phase].samples)
        while count:
            chunk, at = divmod(first, CHUNK)
            parts.append(self._chunk(phase, chunk)[:, at : at + count])
            first, count = first + parts[-1].shape[1], count - parts[-1].shape[1]
        return Samples(*(parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)))

    def rows(self, samples: Samples, seq_len: int, words: bool = False) -> Rows:
        """The tokens of samples, in windows of `seq_len`; with `words` also where words begin in them."""
        corpora = np.unique(samples.corpora) if len(self.windows) > 1 else np.zeros(1, np.int64)
        if len(corpora) == 1:
            return self.windows[corpora[0]].rows(samples.starts, seq_len, words)
        parts = []
        for corpus in corpora:
            mine = np.flatnonzero(samples.corpora == corpus)
            parts.append((mine, self.windows[corpus].rows(samples.starts[mine], seq_len, words)))
        return joined(parts)

    def ahead(self, samples: Samples, seq_len: int) -> None:
        """Have the system begin to read samples that will be asked for."""
        for number in np.unique(samples.corpora):
            self.windows[number].ahead(samples.starts[samples.corpora == number], seq_len)

    def step(self, step: int) -> list[Reading]:
        """What optimizer step `step` (0-based) reads, in the order of the global batch."""
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
        """Every stretch of the run that holds one of the stream positions first … last - 1 of a corpus, by step.

        The inverse of `step`; the cost grows with the epochs of the run and the windows of the stretch, nothing else.
        """
        number = self.names.index(corpus)
        windows, begins = self.windows[number], self.first_blocks[:, number]
        steps_before = np.cumsum([0] + [phase.steps for phase in self.phases])
        found = []
        for epoch in range(-(-int(begins[-1]) // windows.blocks)):
            for seq_len in sorted({phase.seq_len for phase in self.phases}):
                starts = windows.grid(first, last, seq_len, epoch)
                places = windows.places_of(starts, epoch)
                blocks, parts = np.divmod(places, self.block_tokens)
                of_phase = np.searchsorted(begins, blocks, side="right") - 1  # skips phases that draw nothing of it
                for p, phase in enumerate(self.phases):
                    mine = np.flatnonzero(of_phase == p) if phase.seq_len == seq_len else ()
                    if not len(mine):
                        continue
                    numbers = self.pools[p][number].numbers(blocks[mine], parts[mine] // windows.apart(seq_len))
                    dealt, rest = np.divmod(numbers, self.dealt[p][number])
                    samples = self.mixtures[p].first_samples(self.mixtures[p].items(number, dealt)) + rest
                    samples = self._shuffled(p, samples, unpermute)
                    for sample, start in zip(samples.tolist(), starts[mine].tolist(), strict=True):
                        if sample < phase.samples:  # the last pool of a phase may be left unfinished
                            step = int(steps_before[p]) + sample // phase.batch
                            for part in windows.parts(start, seq_len):
                                if part.start < last and part.start + part.tokens > first:
                                    found.append(Reading(step, sample, part.at, corpus, epoch, part.start, part.tokens))
        return sorted(found)

    def drawn(self, phase: int) -> np.ndarray:
        """Tokens of its stream that the phase of that number takes from each corpus, (C,) int64: of packed blocks that
        are left unfinished as many as their windows hold in the mean."""
        return self._windows(phase) * self.block_tokens // self.per_block[phase]

    def places(self, phase: int) -> tuple[np.ndarray, np.ndarray]:
        """How many windows the first step of a phase has from each corpus, and from how many blocks, both (C,)."""
        found = self.samples(phase, 0, self.phases[phase].batch)
        blocks = (found.keys & (1 << CORPUS_BIT) - 1) // self.block_tokens
        corpora = np.unique(np.stack([found.corpora, blocks]), axis=1)[0]  # of each of the blocks
        counts, places = (np.bincount(each, minlength=len(self.names)) for each in (found.corpora, corpora))
        return counts, np.minimum(places, [windows.blocks for windows in self.windows])  # a step may end an epoch

    def padding(self, phase: int) -> np.ndarray:
        """The share of padding in the windows that the phase of that number takes from each corpus, (C,) float64."""
        return 1 - self.block_tokens / (np.array(self.per_block[phase]) * self.phases[phase].seq_len)

    def epochs(self) -> np.ndarray:
        """How often the run goes through each corpus, (C,) float64: where its order ends, in epochs."""
        last = len(self.phases) - 1
        ends = self.first_blocks[last] + self._windows(last) / self.per_block[last]
        return ends / np.array([windows.blocks for windows in self.windows])

    def _pools(self, phase: int) -> list["Pools"]:
        """How the phase of that number takes windows from each corpus."""
        batch, weights = self.phases[phase].batch, self.mixtures[phase].weights
        of_step = -(-batch * weights // weights.sum())
        return [
            Pools(windows, int(first), self.phases[phase].seq_len, 1 if self.packed else pool_of(windows.blocks, count))
            for windows, first, count in zip(self.windows, self.first_blocks[phase], of_step.tolist(), strict=True)
        ]

    def _windows(self, phase: int) -> np.ndarray:
        """How many windows the phase draws from each corpus, (C,) int64."""
        samples, mixture = self.phases[phase].samples, self.mixtures[phase]
        if not self.packed:
            return mixture.counts(samples)
        finished, first = self._last_pool(phase)
        others = self.samples(phase, first, samples - first).corpora
        return mixture.counts(finished) * self.dealt[phase] + np.bincount(others, minlength=len(self.names))

    def _ended(self, phase: int) -> list[int]:
        """Behind which window of each corpus, (C,), the phase has drawn nothing."""
        samples, mixture = self.phases[phase].samples, self.mixtures[phase]
        if not self.packed:
            return mixture.counts(samples).tolist()
        _, first = self._last_pool(phase)
        items, _ = mixture.items_of(self._shuffled(phase, np.arange(first, samples), permute))
        return (mixture.counts(int(items.max()) + 1) * self.dealt[phase]).tolist()

    def _chunk(self, phase: int, chunk: int) -> np.ndarray:
        """(3, at most CHUNK) int64: the columns of `Samples`. Kept, since loaders ask for successive samples."""
        found = self._chunks.get((phase, chunk))
        if found is None:
            end = min((chunk + 1) * CHUNK, self.phases[phase].samples)
            found = self._chunks[phase, chunk] = self._place(phase, np.arange(chunk * CHUNK, end))
            if len(self._chunks) > CHUNKS_KEPT:
                self._chunks.popitem(last=False)
        return found

    def _place(self, phase: int, samples: np.ndarray) -> np.ndarray:
        items, parts = self.mixtures[phase].items_of(self._shuffled(phase, samples, permute))
        corpora, dealt = self.mixtures[phase].draw(items)
        places, starts = np.empty_like(corpora), np.empty_like(corpora)
        for number, (windows, pools) in enumerate(zip(self.windows, self.pools[phase], strict=True)):
            mine = corpora == number if len(self.windows) > 1 else slice(None)
            blocks, which = pools.windows_at(dealt[mine] * self.dealt[phase][number] + parts[mine])
            places[mine] = blocks * self.block_tokens + which * windows.apart(pools.seq_len)
            starts[mine] = windows.starts(places[mine])
        return np.stack([corpora, places | corpora << CORPUS_BIT, starts])

    def _last_pool(self, phase: int) -> tuple[int, int]:
        """The first block of the last pool of packed blocks that a phase draws from, and its first sample."""
        mixture, pool = self.mixtures[phase], self._packed_pool(phase)
        (item,), _ = mixture.items_of(np.array([self.phases[phase].samples - 1]))
        first = int(item) // pool * pool
        return first, int(mixture.first_samples(first))

    def _packed_pool(self, phase: int) -> int:
        """Blocks whose packed windows are in one random order: at most a quarter of an epoch of each corpus."""
        weights = self.mixtures[phase].weights
        epochs = [w.blocks * weights.sum() // weight for w, weight in zip(self.windows, weights, strict=True) if weight]
        return max(1, min(PACKED_POOL, int(min(epochs)) // 4))

    def _shuffled(self, phase: int, samples: np.ndarray, move: Callable[..., np.ndarray]) -> np.ndarray:
        """Packed windows of successive blocks of a phase are in one random order; `move`: permute or unpermute."""
        if not self.packed:
            return samples
        mixture, found, size = self.mixtures[phase], np.empty_like(samples), self._packed_pool(phase)
        pools = mixture.items_of(samples)[0] // size
        for pool in np.unique(pools).tolist():
            here = pools == pool
            first, last = mixture.first_samples(np.array([pool, pool + 1]) * size).tolist()
            found[here] = first + move(samples[here] - first, last - first, self.windows[0].seed, PACK, phase, pool)
        return found
