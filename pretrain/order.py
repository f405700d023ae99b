"""The order of a run: step → samples → corpus, epoch and stream position, and back, all in O(1) and without state.

    sample i of a phase ──▶ block of the phase, and part of it ──mixture──▶ corpus, its k-th block in the phase
      ──▶ block (blocks of earlier phases + k) of that corpus's order ──permutation of the epoch──▶ stream position

What is mixed is blocks, not windows: a block is the unit that an epoch visits once, so phases of other sequence
lengths and other mixtures still repeat nothing within an epoch of any corpus, and every phase begins, in each corpus,
at the first block that no earlier phase has touched: a function of the earlier phases alone.

Where documents are packed blocks are larger: there the windows of 16 successive blocks of a phase, all corpora's, are
in one random order. The mixture is exact, within a block, where such 16 end; between, a step has its shares by chance.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pretrain.mixture import Mixture
from pretrain.packing import PackedWindows
from pretrain.permutation import PACK, permute, unpermute
from pretrain.phases import Phase, locate
from pretrain.windows import Windows

CHUNK = 8192  # samples placed at once: alone a sample costs 150 µs, in a chunk 0.1 µs
CHUNKS_KEPT = 4
POOL = 16  # blocks: the parts of a long document are in one, and must not come in one step
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


class Order:
    """Which text every sample of a run is. The number of a corpus is its place in `corpora`."""

    def __init__(self, corpora: dict[str, Windows], phases: list[Phase]):
        """A phase without a mixture draws from the one corpus there is."""
        self.corpora, self.phases, self.names = corpora, phases, list(corpora)
        self.windows = list(corpora.values())
        assert [windows.corpus for windows in self.windows] == list(range(len(corpora)))
        (self.block_tokens,) = {windows.block_tokens for windows in self.windows}
        self.pool = POOL if isinstance(self.windows[0], PackedWindows) else 1
        self.per_block = [[windows.per_block(phase.seq_len) for windows in self.windows] for phase in phases]
        self.mixtures = [
            Mixture(phase.weights(self.names), tuple(counts))
            for phase, counts in zip(phases, self.per_block, strict=True)
        ]
        taken = [mixture.counts(self._blocks(phase)) for phase, mixture in enumerate(self.mixtures)]
        self.first_blocks = np.cumsum([np.zeros(len(corpora), np.int64), *taken], axis=0)  # (phases + 1, C)
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

    def rows(self, samples: Samples, seq_len: int, lead: int) -> np.ndarray:
        """The ids of samples as `Windows.rows` gives them, or, packed, as `PackedWindows.rows` does."""
        return self._each(samples, lambda windows, starts: windows.rows(starts, seq_len, lead))

    def layout(self, samples: Samples, seq_len: int) -> np.ndarray | None:
        """(B, seq_len) int8: how packed windows are laid out; None for windows of the plain stream."""
        if self.pool == 1:
            return None
        return self._each(samples, lambda windows, starts: windows.layout(starts, seq_len))

    def words(self, samples: Samples, seq_len: int) -> np.ndarray:
        """(B, seq_len) bool: where words begin in them."""
        return self._each(samples, lambda windows, starts: windows.words(starts, seq_len))

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
                    items = self.mixtures[p].items(number, blocks[mine] - begins[p])
                    samples = self.mixtures[p].first_samples(items) + parts[mine] // windows.apart(seq_len)
                    samples = self._shuffled(p, samples, unpermute)
                    for sample, start in zip(samples.tolist(), starts[mine].tolist(), strict=True):
                        if sample < phase.samples:  # the last block of a phase may be left unfinished
                            step = int(steps_before[p]) + sample // phase.batch
                            for part in windows.parts(start, seq_len):
                                if part.start < last and part.start + part.tokens > first:
                                    found.append(Reading(step, sample, part.at, corpus, epoch, part.start, part.tokens))
        return sorted(found)

    def drawn(self, phase: int) -> np.ndarray:
        """Tokens of its stream that the phase of that number takes from each corpus, (C,) int64: of packed blocks that
        are left unfinished as many as their windows hold in the mean."""
        mixture = self.mixtures[phase]
        finished = (self._blocks(phase) - 1) // self.pool * self.pool
        first = int(mixture.first_samples(finished))
        others = self.samples(phase, first, self.phases[phase].samples - first).corpora
        windows = mixture.counts(finished) * self.per_block[phase] + np.bincount(others, minlength=len(self.names))
        return windows * self.block_tokens // self.per_block[phase]

    def padding(self, phase: int) -> np.ndarray:
        """The share of padding in the windows that the phase of that number takes from each corpus, (C,) float64."""
        return 1 - self.block_tokens / (np.array(self.per_block[phase]) * self.phases[phase].seq_len)

    def epochs(self) -> np.ndarray:
        """How often the run goes through each corpus, (C,) float64: blocks it touches of those an epoch has."""
        return self.first_blocks[-1] / np.array([windows.blocks for windows in self.windows])

    def _blocks(self, phase: int) -> int:
        """How many blocks of all corpora the phase touches."""
        (last,), _ = self.mixtures[phase].items_of(np.array([self.phases[phase].samples - 1]))
        return int(last) + 1

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
        seq_len = self.phases[phase].seq_len
        items, parts = self.mixtures[phase].items_of(self._shuffled(phase, samples, permute))
        corpora, blocks = self.mixtures[phase].draw(items)
        apart = self.windows[0].apart(seq_len)
        places = (self.first_blocks[phase][corpora] + blocks) * self.block_tokens + parts * apart
        starts = np.empty_like(places)
        for number, windows in enumerate(self.windows):
            mine = corpora == number
            starts[mine] = windows.starts(places[mine])
        return np.stack([corpora, places | corpora << CORPUS_BIT, starts])

    def _shuffled(self, phase: int, samples: np.ndarray, move: Callable[..., np.ndarray]) -> np.ndarray:
        """Packed windows of POOL successive blocks of a phase are in one random order; `move`: permute or unpermute."""
        if self.pool == 1:
            return samples
        mixture, blocks, found = self.mixtures[phase], self._blocks(phase), np.empty_like(samples)
        pools = mixture.items_of(samples)[0] // self.pool
        for pool in np.unique(pools).tolist():
            here = pools == pool
            ends = np.array([pool * self.pool, min((pool + 1) * self.pool, blocks)])
            first, last = mixture.first_samples(ends).tolist()
            found[here] = first + move(samples[here] - first, last - first, self.windows[0].seed, PACK, phase, pool)
        return found

    def _each(self, samples: Samples, read: Callable[[Windows, np.ndarray], np.ndarray]) -> np.ndarray:
        """What `read` finds in each corpus, put together in the order of the samples."""
        numbers = np.unique(samples.corpora) if len(self.windows) > 1 else np.zeros(1, np.int64)
        if len(numbers) == 1:
            return read(self.windows[numbers[0]], samples.starts)
        found = None
        for number in numbers:
            mine = samples.corpora == number
            part = read(self.windows[number], samples.starts[mine])
            if found is None:
                found = np.empty((len(samples.starts), *part.shape[1:]), part.dtype)
            found[mine] = part
        return found
