"""The contract of an optimizer. One module has everything about it, and one line in `OPTIMIZERS` makes it known."""

from typing import TYPE_CHECKING, ClassVar

from pretrain.training.optim.schedule import OptimConfig

if TYPE_CHECKING:
    import torch
    from torch import nn


class Optimizer:
    """An optimizer with its settings: which weights form a group, and what it keeps for each weight.

    Engines and checkpoints ask it for the names of its state and for the state before the first step. A subclass
    imports no torch at its top, because configurations are read without torch.
    """

    Config: ClassVar[type[OptimConfig]]  # the section `optim` of a run, with `kind: Literal[…]`
    states: ClassVar[tuple[str, ...]]  # names of the tensors that it keeps for each weight, of the weight's shape

    def __init__(self, config: OptimConfig):
        self.config = config

    def build(self, module: "nn.Module") -> "torch.optim.Optimizer":
        """The optimizer of torch over the weights of `module`."""
        raise NotImplementedError

    def first_state(self, weight: "torch.Tensor") -> "dict[str, torch.Tensor]":
        """Everything that torch's optimizer keeps for a weight before its first step."""
        raise NotImplementedError

    def count_steps(self, state: "dict[str, torch.Tensor]", steps: int) -> None:
        """Tell a restored state that `steps` steps were applied before it was saved, if that matters to it."""


def decayed_groups(module: "nn.Module", weight_decay: float) -> list[dict]:
    """The usual two groups of weights: matrices, which decay, and vectors (norms, biases), which do not."""
    weights = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in weights if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in weights if p.ndim < 2], "weight_decay": 0.0},
    ]
