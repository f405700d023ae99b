"""Agreement among the ranks outside of the training steps: at the start, and while a checkpoint is saved.

Agreement uses a gloo group of its own with its own time limit, because a save may take longer than a step may.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from pretrain.errors import ConfigError, PretrainError, UserError
from pretrain.processes import memory
from pretrain.storage.locks import locked
from pretrain.training.engine.config import EngineConfig
from pretrain.training.engine.deepspeed import DeepSpeedEngine
from pretrain.training.engine.engine import engine_for
from pretrain.training.engine.ranks import World, failures_said, join, new_group, on_cuda


class Peers:
    """The ranks of `world`, connected by `join`. Every method is a collective.

    A rank that waits longer than `timeout_s` for another raises PretrainError. A plain process is alone, so each method
    returns at once.
    """

    def __init__(self, world: World, timeout_s: float = 3600):
        self.world, self._group = world, new_group(timeout_s)

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank."""
        if self._group is None:
            return flag
        flags = torch.tensor([int(flag)])
        with failures_said(self.world):
            torch.distributed.all_reduce(flags, group=self._group)
        return bool(flags)

    def share(self, value: Any) -> list:
        """The `value` of each rank, in the order of the ranks."""
        if self._group is None:
            return [value]
        found: list[Any] = [None] * self.world.size
        with failures_said(self.world):
            torch.distributed.all_gather_object(found, value, group=self._group)
        return found

    @contextmanager
    def one_fate(self) -> Iterator[None]:
        """If a rank raises in the block, raise the same error on every rank; of several, the one of the lowest rank.

        Without this, a rank that cannot go on would leave the others waiting until their time limit, with no message.
        """
        told: UserError | None = None
        try:
            yield
        except UserError as error:
            told = error
        except Exception as error:
            self.share(PretrainError(f"rank {self.world.rank} failed: {type(error).__name__}: {error}"))
            raise  # a bug shows its traceback on the rank where it happened
        first = next((error for error in self.share(told) if error is not None), None)
        if first is not None:
            raise first from None


@contextmanager
def connected(world: World, folder: Path, engine: EngineConfig, timeout_s: float) -> Iterator[Peers]:
    """Connect to the other ranks, if there are any, and lock the `folder` of the run; a collective.

    A save may take `timeout_s`. Failures from outside in the block become clear errors. Raises ConfigError when ranks
    are missing, or when another process trains in the folder.
    """
    if not on_cuda():
        memory.keep_tensors()
    if engine_for(engine, world) is DeepSpeedEngine:
        join(world, engine.timeout_s)
    peers = Peers(world, timeout_s)
    with failures_said(world), ExitStack() as lock:  # locked before checkpoints are read, until all is written
        with peers.one_fate():
            if world.speaks:
                lock.enter_context(locked(folder, "pretrain", ConfigError))
        yield peers
