"""The micro-batches of one rank, in order, from any step on.

The samples of a step depend on the shards, the seed and the step alone. The number of ranks, the micro-batch, the
number of workers and the prefetch depth only divide the same samples differently. Workers only compute ahead.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np

from pretrain.errors import ConfigError
from pretrain.hashing import DIGEST, GOLDEN, hash64
from pretrain.objectives.batch import Batch
from pretrain.objectives.objective import Objective
from pretrain.order.phases import Phase
from pretrain.order.run_data import RunData
from pretrain.processes.memory import keep_freed
from pretrain.processes.prefetch import Workers


def windows_at_once(phase: Phase, phases: Sequence[Phase], micro_batch: int) -> int:
    """Windows of a micro-batch in `phase`: `micro_batch` with the longest windows, else about as many tokens."""
    return micro_batch * max(other.seq_len for other in phases) // phase.seq_len


def accumulation(phase: Phase, micro_batch: int, world: int) -> int:
    """The number of micro-batches of `micro_batch` windows that a rank computes in a step.

    Raises ConfigError, with the nearest legal values, when it is not a whole number.
    """
    per_round = micro_batch * world
    if phase.batch % per_round:
        below = phase.batch // per_round * per_round
        nearest = [n * phase.seq_len for n in (below, below + per_round) if n]
        raise ConfigError(
            f"phases: batch_tokens = {phase.batch_tokens} does not divide among the ranks",
            f"{phase.batch} windows of {phase.seq_len} tokens; engine.micro_batch takes {micro_batch} of them at once, "
            f"on {world} ranks {per_round}",
            f"set batch_tokens to {' or '.join(map(str, nearest))}, or choose another engine.micro_batch",
        )
    return phase.batch // per_round


@dataclass(frozen=True)
class MicroBatch:
    """A batch for one forward pass, with its digest."""

    batch: Batch
    first_sample: int  # the number of its first sample in the phase
    counts: dict[str, int]  # the number of slots of each part of the loss
    digest: int  # the sum of a 63-bit hash of each sample: sums are equal however the samples are divided


class Batches:
    """The micro-batches of this rank: item i is micro-batch i, counted from step 0 of the run."""

    def __init__(
        self,
        data: RunData,
        objectives: list[Objective],
        micro_batch: int,
        rank: int = 0,
        world: int = 1,
    ):
        """`objectives`: one for each phase."""
        self.data, self.objectives, self.phases = data, objectives, data.phases
        self.rank, self.world = rank, world
        self.at_once = [windows_at_once(phase, self.phases, micro_batch) for phase in self.phases]
        self.rounds = [max(1, phase.batch // (n * world)) for phase, n in zip(self.phases, self.at_once, strict=True)]

    def check(self, begun: int = 0) -> None:
        """Raise ConfigError unless the batch of each phase divides among the ranks.

        The first `begun` phases are over: they need not.
        """
        for phase, at_once in list(zip(self.phases, self.at_once, strict=True))[begun:]:
            accumulation(phase, at_once, self.world)

    def first_item(self, step: int) -> int:
        """The number of the first micro-batch of a step."""
        items = 0
        for phase, rounds in zip(self.phases, self.rounds, strict=True):
            taken = min(step, phase.steps)
            items, step = items + taken * rounds, step - taken
        return items

    def __len__(self) -> int:
        return sum(phase.steps * rounds for phase, rounds in zip(self.phases, self.rounds, strict=True))

    def __getitem__(self, item: int) -> MicroBatch:
        return self.take(*self._samples(item))

    def ahead(self, item: int) -> None:
        """Ask the operating system to read micro-batch `item`, if there is one, in the background."""
        if item < len(self):
            phase, first, count = self._samples(item)
            order = self.data.order
            order.ahead(order.samples(phase, first, count), self.phases[phase].seq_len)

    def _samples(self, item: int) -> tuple[int, int, int]:
        """The phase of a micro-batch, the number of its first sample in the phase, and the count of its samples."""
        begun = 0  # steps of earlier phases
        for phase, rounds, at_once in zip(self.phases, self.rounds, self.at_once, strict=True):
            if item < phase.steps * rounds:
                position = self.data.position(begun + item // rounds)
                return position.number, position.first_sample + (self.rank * rounds + item % rounds) * at_once, at_once
            item, begun = item - phase.steps * rounds, begun + phase.steps
        raise IndexError("past the last step")

    def take(self, phase: int, first: int, count: int) -> MicroBatch:
        """The micro-batch of samples first … first + count - 1 of phase number `phase`."""
        objective, order = self.objectives[phase], self.data.order
        samples = order.samples(phase, first, count)
        rows = order.rows(samples, self.phases[phase].seq_len, objective.wants_words)
        batch = objective.batch(rows, samples.keys)
        return MicroBatch(batch, first, objective.counts(batch), digest(batch, first))


def digest(batch: Batch, first: int) -> int:
    """The 63-bit sum over rows of a hash of (sample, inputs, targets). Digests of micro-batches and ranks can be added.

    The hash of a row multiplies each token by a random number of its place (multilinear hashing; Lemire & Kaser 2014,
    "Strongly universal string hashing is fast") and the sum by an odd number of its sample. It takes 1 G tokens a
    second, where a cryptographic hash of each row took 0.13 G.
    """
    inputs, targets = batch.inputs, batch.targets
    if batch.target_index is None and batch.weights is None:  # all targets but the last are inputs
        targets = targets[:, -1:]
    words, marks = _weights(inputs.shape[1], targets.shape[1])
    rows = np.einsum("bt,t->b", inputs, words) + np.einsum("bk,k->b", targets, marks)
    samples = np.arange(first, first + len(rows), dtype=np.uint64)
    samples *= np.uint64(2)
    samples += np.uint64(1)
    samples *= GOLDEN
    return int(np.dot(rows.view(np.uint64), samples)) % 2**63


@lru_cache(maxsize=64)
def _weights(*lengths: int) -> list[np.ndarray]:
    """Random odd numbers for the places of rows: an array of each length."""
    return [(hash64(DIGEST, which, np.arange(n)) | np.uint64(1)).view(np.int64) for which, n in enumerate(lengths)]


def fork(batches: Batches, workers: int, prefetch: int = 4, read_ahead: bool = False) -> Workers[MicroBatch]:
    """The processes for `steps`, forked now.

    `workers` processes compute micro-batches, each up to `prefetch` of them ahead; with 0 workers this process computes
    them. With `read_ahead` the operating system reads the next micro-batch of a process while the process computes one.
    """
    apart = max(1, workers) if read_ahead else 0
    return Workers(partial(_of_worker if workers else _item, batches, apart), workers, prefetch)


def steps(batches: Batches, first_step: int, workers: Workers[MicroBatch]) -> Iterator[list[MicroBatch]]:
    """The micro-batches of each step from `first_step` on, in lists. Raises PretrainError when a worker dies."""
    found = workers.results(range(batches.first_item(first_step), len(batches)))
    for phase, rounds in zip(batches.phases, batches.rounds, strict=True):
        skipped = min(first_step, phase.steps)
        first_step -= skipped
        for _ in range(phase.steps - skipped):
            yield [next(found) for _ in range(rounds)]


def _item(batches: Batches, apart: int, item: int) -> MicroBatch:
    """Micro-batch `item`. Unless `apart` is 0, the system reads micro-batch `item + apart` meanwhile."""
    if apart:
        batches.ahead(item + apart)
    return batches[item]


def _of_worker(batches: Batches, apart: int, item: int) -> MicroBatch:
    """Micro-batch `item`, computed in a worker process."""
    keep_freed()
    return _item(batches, apart, item)
