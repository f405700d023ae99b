"""Micro-batches of one rank, in order, from any step on: content depends on nothing but (shards, seed, step).

Workers only compute ahead. Rank, micro-batch, worker count and prefetch depth cut the same samples differently.
"""

from collections.abc import Iterator
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
from pretrain.processes.prefetch import ahead


def windows_at_once(phase: Phase, phases: list[Phase], micro_batch: int) -> int:
    """Windows of a micro-batch in `phase`: `micro_batch` of the longest phase, in others about as many tokens."""
    return micro_batch * max(other.seq_len for other in phases) // phase.seq_len


def accumulation(phase: Phase, micro_batch: int, world: int) -> int:
    """Micro-batches of `micro_batch` windows a rank takes per step.

    Raises ConfigError, with the nearest legal values, when it is not whole.
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
    batch: Batch
    first_sample: int  # of the phase
    filled: int  # slots that count
    digest: int  # sum over samples of a 63-bit hash of what the sample holds: the same however they are cut


class Batches:
    """Item i is micro-batch i of this rank, counted from step 0 of the run."""

    def __init__(
        self,
        data: RunData,
        objectives: list[Objective],
        micro_batch: int,
        rank: int = 0,
        world: int = 1,
        begun: int = 0,
    ):
        """`objectives`: one for each phase. `begun` leading phases are over: they need not divide among the ranks of
        today."""
        self.data, self.objectives, self.phases, self.rank = data, objectives, data.phases, rank
        self.at_once = [windows_at_once(phase, self.phases, micro_batch) for phase in self.phases]
        self.rounds = [
            accumulation(phase, n, world) if number >= begun else 1
            for number, (phase, n) in enumerate(zip(self.phases, self.at_once, strict=True))
        ]

    def first_item(self, step: int) -> int:
        """Number of the first micro-batch of a step."""
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
        """Have the system begin to read micro-batch `item`, if there is one; nothing waits for it."""
        if item < len(self):
            phase, first, count = self._samples(item)
            order = self.data.order
            order.ahead(order.samples(phase, first, count), self.phases[phase].seq_len)

    def _samples(self, item: int) -> tuple[int, int, int]:
        """The number of a micro-batch's phase, its first sample there, and how many it has."""
        begun = 0  # steps of earlier phases
        for phase, rounds, at_once in zip(self.phases, self.rounds, self.at_once, strict=True):
            if item < phase.steps * rounds:
                position = self.data.position(begun + item // rounds)
                return position.number, position.first_sample + (self.rank * rounds + item % rounds) * at_once, at_once
            item, begun = item - phase.steps * rounds, begun + phase.steps
        raise IndexError("past the last step")

    def take(self, phase: int, first: int, count: int) -> MicroBatch:
        """Samples first … first + count - 1 of the phase of that number."""
        objective, order = self.objectives[phase], self.data.order
        samples = order.samples(phase, first, count)
        rows = order.rows(samples, self.phases[phase].seq_len, objective.wants_words)
        batch = objective.batch(rows, samples.keys)
        return MicroBatch(batch, first, batch.filled(), digest(batch, first))


def digest(batch: Batch, first: int) -> int:
    """63-bit sum over rows of a hash of (sample, inputs, targets): adds up over micro-batches and ranks.

    A row is hashed by a random number for each of its places (multilinear; Lemire & Kaser 2014, "Strongly universal
    string hashing is fast") and multiplied by an odd one of its sample's: 1 G tokens a second, where a cryptographic
    hash of each row took 0.13 G.
    """
    inputs, targets = batch.inputs, batch.targets
    if batch.target_index is None and batch.weights is None:  # all but the last of them are inputs
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
    return [(hash64(DIGEST, which, np.arange(n)) | np.uint64(1)).view(np.int64) for which, n in enumerate(lengths)]


def steps(
    batches: Batches, first_step: int, workers: int, prefetch: int = 4, read_ahead: bool = False
) -> Iterator[list[MicroBatch]]:
    """The micro-batches of each step from `first_step` on, in lists.

    `workers` processes compute them, each up to `prefetch` micro-batches ahead; 0 workers: this process does. Whoever
    computes one has the system read its own next one meanwhile, if `read_ahead`. Raises PretrainError when one of the
    processes dies.
    """
    items = range(batches.first_item(first_step), len(batches))
    apart = max(1, workers) if read_ahead else 0
    if workers:
        found = ahead(partial(_of_worker, batches, apart), items, workers, prefetch)
    else:
        found = (_item(batches, apart, item) for item in items)
    for phase, rounds in zip(batches.phases, batches.rounds, strict=True):
        skipped = min(first_step, phase.steps)
        first_step -= skipped
        for _ in range(phase.steps - skipped):
            yield [next(found) for _ in range(rounds)]


def _item(batches: Batches, apart: int, item: int) -> MicroBatch:
    """A micro-batch; the one that comes `apart` behind it is read meanwhile, unless that is 0."""
    if apart:
        batches.ahead(item + apart)
    return batches[item]


def _of_worker(batches: Batches, apart: int, item: int) -> MicroBatch:
    """A micro-batch made in a process of its own."""
    keep_freed()
    return _item(batches, apart, item)
