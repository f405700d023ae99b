"""Micro-batches made from windows and phases, without a run folder."""

from collections.abc import Mapping, Sequence

from pretrain.config import Config
from pretrain.objectives import OBJECTIVES
from pretrain.order import branch
from pretrain.order.order import Order
from pretrain.order.phases import Phase
from pretrain.order.run_data import RunData
from pretrain.order.stream import Windows
from pretrain.training.loader import Batches


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
    return Batches(RunData([], order, list(phases), skips), made, micro_batch, rank, world, begun)
