"""The batch of each step: fetched, copied to the device, and agreed on among the ranks."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from pretrain.order.phases import locate
from pretrain.processes.prefetch import Workers
from pretrain.training import loader
from pretrain.training.engine.engine import Engine
from pretrain.training.engine.ranks import on_cuda
from pretrain.training.engine.transfers import Uploads
from pretrain.training.inputs import Inputs
from pretrain.training.loader import Batches, MicroBatch


@contextmanager
def forked(inputs: Inputs) -> Iterator[tuple[Batches, Workers[MicroBatch]]]:
    """The micro-batches of this rank, and the processes that compute them ahead, which are forked now.

    Fork them before CUDA and the connections to other ranks start threads. On CUDA there is at least one process, so
    that the GPU does not wait while this process makes a batch.
    """
    cfg, data = inputs.cfg, inputs.cfg.data
    batches = Batches(inputs.data, inputs.objectives, cfg.engine.micro_batch, inputs.world.rank, inputs.world.size)
    count = max(1, data.workers) if on_cuda() else data.workers
    with loader.fork(batches, count, data.prefetch, data.read_ahead) as workers:
        yield batches, workers


@dataclass(frozen=True)
class GlobalBatch:
    """The batch of a step: the micro-batches of this rank, on its device, and the facts that hold for all ranks."""

    micro_batches: list[MicroBatch]
    filled: dict[str, int]  # the slots of each part of the loss
    digest: str
    wait_s: float  # seconds that this rank waited for it and its device had nothing to compute


class Feed:
    """Gives the batch of one step after another, from `first_step` on. A batch is copied while the device computes."""

    def __init__(self, engine: Engine, batches: Batches, workers: Workers[MicroBatch], first_step: int):
        self._engine, self._batches, self._step = engine, batches, first_step
        self._end = sum(phase.steps for phase in batches.phases)
        self._steps = loader.steps(batches, first_step, workers)
        self._uploads = Uploads(engine.device)

    def following(self, wishes: Sequence[bool] = ()) -> tuple[GlobalBatch | None, list[int]]:
        """The batch of the next step, or None after the last one, and the sums of `wishes` over the ranks.

        A collective on CPU tensors. A digest has 62 bits. Its two halves are summed apart, so that the sums over any
        number of ranks stay below 2^63.
        """
        began = time.perf_counter()
        micro_batches = next(self._steps) if self._step < self._end else None
        wait_s = time.perf_counter() - began if self._uploads.device_waits() else 0.0
        slots, digest = {}, 0
        if micro_batches is not None:
            objective = self._batches.objectives[locate(self._step, self._batches.phases).number]
            slots = {part: sum(micro.counts[part] for micro in micro_batches) for part in objective.parts}
            digest = sum(micro.digest for micro in micro_batches) % 2**62
            self._step += 1
            micro_batches = [replace(micro, batch=self._uploads(micro.batch)) for micro in micro_batches]
        numbers = torch.tensor([*wishes, *slots.values(), digest >> 31, digest & (2**31 - 1)])
        *sums, high, low = self._engine.total(numbers).tolist()
        agreed = sums[: len(wishes)]
        if micro_batches is None:
            return None, agreed
        filled = {part: max(1, count) for part, count in zip(slots, sums[len(wishes) :], strict=True)}  # may be empty
        return GlobalBatch(micro_batches, filled, f"{((high << 31) + low) % 2**62:016x}", wait_s), agreed
