"""Micro-batches made from windows and phases, without a run folder."""

from collections.abc import Iterator, Mapping, Sequence

from pretrain.config import Config
from pretrain.objectives import OBJECTIVES
from pretrain.order import branch
from pretrain.order.order import Order
from pretrain.order.phases import Phase
from pretrain.order.run_data import RunData
from pretrain.order.stream import Windows
from pretrain.training import loader
from pretrain.training.loader import Batches, MicroBatch


def batches(
    corpora: Mapping[str, Windows],
    objective: Config,
    phases: Sequence[Phase],
    seed: int,
    micro_batch: int,
    rank: int = 0,
    world: int = 1,
    begun: int = 0,
    skips: branch.Skips = (),
) -> Batches:
    """The micro-batches of a rank. `objective` applies to every phase."""
    order = Order(dict(corpora), branch.reading(list(phases), skips))
    shards, kind = order.windows[0].shards, OBJECTIVES[objective.kind]
    made = [kind(objective, shards.specials, shards.vocab_size, phase.seq_len, seed) for phase in phases]
    found = Batches(RunData([], order, list(phases), skips), made, micro_batch, rank, world)
    found.check(begun)
    return found


def steps_of(
    batches: Batches, first_step: int, workers: int = 0, *settings: int, **keys: bool
) -> Iterator[list[MicroBatch]]:
    """The micro-batches of each step from `first_step` on, computed by `workers` processes."""
    return loader.steps(batches, first_step, loader.fork(batches, workers, *settings, **keys))
