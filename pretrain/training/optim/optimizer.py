"""The contract of an optimizer: one module defines it, and one line in `OPTIMIZERS` makes it known."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from pretrain.training.optim.schedule import OptimConfig

if TYPE_CHECKING:
    import torch
    from torch import nn


class Optimizer(ABC):
    """An optimizer with its settings. It defines the groups of weights, and the state that it keeps for each weight.

    Engines and checkpoints ask it for the names of its state and for the state before the first step. A subclass
    must import torch inside its methods, because configurations are read without torch.
    """

    Config: ClassVar[type[OptimConfig]]  # the section `optim` of a run; it defines `kind: Literal[…]`
    states: ClassVar[tuple[str, ...]]  # names of its tensors for each weight; each tensor has the weight's shape
    # Whether PyTorch's optimizer changes nothing in a step in which its attribute `found_inf` is a tensor with a 1, as
    # fused optimizers of PyTorch do. With any other the host waits until it knows that the gradient is finite.
    skips: bool = False
    whole: bool = False  # whether its rule needs whole weights; PyTorch's optimizer is then one of class `Placed`

    def __init__(self, config: OptimConfig):
        self.config = config

    @abstractmethod
    def build(self, module: "nn.Module") -> "torch.optim.Optimizer":
        """PyTorch's optimizer over the weights of `module`.

        At ZeRO 1 to 3 it updates flat parts of the weights, so its rule must treat every element alone, or `whole` is
        set and it is told which weights these parts are of (parts.py).
        """

    @abstractmethod
    def first_state(self, weight: "torch.Tensor") -> "dict[str, torch.Tensor]":
        """The whole state that PyTorch's optimizer has for a weight before the first step."""

    def count_steps(self, state: "dict[str, torch.Tensor]", steps: int) -> None:
        """Set the step counter of a restored state: `steps` steps were applied before the save.

        An optimizer of PyTorch that counts its steps has the counter in a tensor `step`.
        """
        if "step" in state:
            state["step"].fill_(steps)


def decayed_groups(module: "nn.Module", weight_decay: float) -> "list[dict[str, Any]]":
    """The usual groups: matrices decay, vectors (norms and biases) do not. The model's table of weights says which.

    Each group has the factor `rate`, by which the engine multiplies the learning rate of a step. Weight decay does not
    shrink with it: the product of both is the run's.
    """
    from pretrain.model.weights import weights_of

    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    roles = weights_of(module)
    for name, weight in module.named_parameters():
        if weight.requires_grad:
            groups.setdefault((roles[name].decays, roles[name].rate), []).append(weight)
    return [
        {"params": groups[decays, rate], "weight_decay": weight_decay / rate if decays else 0.0, "rate": rate}
        for decays, rate in sorted(groups, reverse=True)
    ]
