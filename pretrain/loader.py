"""Micro-batches of one rank, in order, from any step on: content depends on nothing but (shards, seed, step).

Workers only compute ahead. Rank, micro-batch, worker count and prefetch depth cut the same samples differently.
"""

import hashlib
import signal
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch.utils.data import DataLoader, Dataset

from pretrain.errors import ConfigError, PretrainError
from pretrain.interrupt import SIGNALS
from pretrain.objectives import OBJECTIVES, Batch, Objective, ObjectiveConfig
from pretrain.optim import Phase
from pretrain.windows import Windows

PREFETCH = 4  # micro-batches a worker computes ahead


@dataclass(frozen=True)
class Position:
    """Where a step stands: its phase, the phase's first block of the run, its first sample within the phase."""

    phase: Phase
    first_block: int
    first_sample: int


def locate(step: int, phases: list[Phase], block_tokens: int) -> Position:
    """Position of optimizer step `step` (0-based). A phase begins at the first block no earlier phase has touched."""
    first_block = 0
    for phase in phases:
        if step < phase.steps:
            return Position(phase, first_block, step * phase.batch)
        step -= phase.steps
        first_block += -(-phase.steps * phase.batch_tokens // block_tokens)
    raise AssertionError("the step lies past the last phase")


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


class Batches(Dataset):
    """Item i is micro-batch i of this rank, counted from step 0 of the run."""

    def __init__(
        self,
        windows: Windows,
        objective: ObjectiveConfig,
        phases: list[Phase],
        seed: int,
        micro_batch: int,
        rank: int,
        world: int,
        begun: int = 0,
    ):
        """`begun` leading phases are over: they need not divide among the ranks of today."""
        self.windows, self.phases, self.rank = windows, phases, rank
        shards = windows.shards
        build = OBJECTIVES[objective.kind]
        self.objectives: dict[int, Objective] = {
            phase.seq_len: build(objective, shards.specials, shards.vocab_size, phase.seq_len, seed) for phase in phases
        }
        self.at_once = [windows_at_once(phase, phases, micro_batch) for phase in phases]
        self.rounds = [
            accumulation(phase, n, world) if number >= begun else 1
            for number, (phase, n) in enumerate(zip(phases, self.at_once, strict=True))
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
        begun = 0  # steps of earlier phases
        for phase, rounds, at_once in zip(self.phases, self.rounds, self.at_once, strict=True):
            if item < phase.steps * rounds:
                position = locate(begun + item // rounds, self.phases, self.windows.block_tokens)
                first = position.first_sample + (self.rank * rounds + item % rounds) * at_once
                return self.take(np.arange(first, first + at_once), phase, position.first_block)
            item, begun = item - phase.steps * rounds, begun + phase.steps
        raise IndexError("past the last step")

    def take(self, samples: np.ndarray, phase: Phase, first_block: int) -> MicroBatch:
        """Any samples (B,) of a phase, by number."""
        objective = self.objectives[phase.seq_len]
        places = self.windows.places(samples, phase.seq_len, first_block)
        ids = self.windows.rows(self.windows.starts(places), phase.seq_len, objective.lead)
        batch = objective.batch(ids, places)
        return MicroBatch(batch, int(samples[0]), batch.filled(), digest(batch, samples))


def digest(batch: Batch, samples: np.ndarray) -> int:
    """63-bit sum over rows of a hash of (sample, inputs, targets): adds up over micro-batches and ranks."""
    total = 0
    inputs, targets = batch.inputs.numpy(), batch.targets.numpy()
    for row, sample in enumerate(samples.tolist()):
        text = b"".join((sample.to_bytes(8, "little"), inputs[row].tobytes(), targets[row].tobytes()))
        total += int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
    return total % 2**63


def _leave_signals_to_the_rank(_: int) -> None:
    """A signal to the process group reaches workers too; one that died of it would end the rank before it has saved."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def steps(batches: Batches, first_step: int, workers: int) -> Iterator[list[MicroBatch]]:
    """The micro-batches of each step from `first_step` on, in lists, computed ahead by `workers` processes."""
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=range(batches.first_item(first_step), len(batches)),
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        worker_init_fn=_leave_signals_to_the_rank,
        # Forked, whatever the process's default: they need no second import, and a kill leaves no named semaphores.
        multiprocessing_context="fork" if workers else None,
    )
    items = iter(loader)
    for phase, rounds in zip(batches.phases, batches.rounds, strict=True):
        skipped = min(first_step, phase.steps)
        first_step -= skipped
        for _ in range(phase.steps - skipped):
            try:
                taken = [next(items) for _ in range(rounds)]
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise
                raise PretrainError(f"a process of data.workers died: {error}; was it out of memory?") from None
            yield taken
