"""Agreement among the ranks outside of the training steps: at the start, and while a checkpoint is saved.

It uses a gloo group of its own with its own time limit, because a save may take longer than a step may.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pretrain.errors import PretrainError, UserError
from pretrain.training.engine.ranks import World, failures_said, new_group


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
