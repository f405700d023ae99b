"""The whole state of an engine, as a checkpoint would have it."""

import math

import torch
from torch import Tensor

from pretrain.training.engine.engine import Engine
from pretrain.training.engine.gather import Key, Wanted


def state_of(engine: Engine, kinds: tuple[str, ...] = ()) -> dict[Key, Tensor]:
    """Every tensor of `kinds` (all if empty) on every rank; a collective."""
    shapes, found = engine.shapes(), {}
    world = getattr(engine, "world", None)
    keys = [(kind, name) for kind in kinds or engine.kinds for name in shapes]
    for rank in range(world.size if world else 1):
        into = {key: torch.full((math.prod(shapes[key[1]]),), torch.nan) for key in keys}
        engine.gather([Wanted(*key, rank) for key in keys], into)
        if rank == (world.rank if world else 0):
            found = {key: tensor.view(shapes[key[1]]) for key, tensor in into.items()}
    return found


def loader(state: dict[Key, Tensor]):
    """The function `load` with which an engine restores `state`."""
    return lambda kind, name, run: state[kind, name].view(-1)[run]
