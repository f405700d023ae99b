"""LAMB (You et al. 2019, arXiv:1904.00962, algorithm 2), for large batches."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from pretrain.training.optim.adamw import Adam, AdamConfig, Beta
from pretrain.training.optim.optimizer import decayed_groups

if TYPE_CHECKING:
    import torch
    from torch import nn


class LambConfig(AdamConfig):
    """LAMB and the learning rate."""

    kind: Literal["lamb"]
    """The name of the optimizer."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """The decay rates of the running means of the gradient and of its square."""
    eps: float = Field(1e-6, ge=1e-30)
    """The number that is added to the root of the second moment, so that no step divides by zero."""


class Lamb(Adam):
    """LAMB: the step of a matrix is as long as the matrix, times the rate. Vectors are AdamW's, and do not decay."""

    Config = LambConfig
    config: LambConfig
    whole = True

    def build(self, module: "nn.Module") -> "torch.optim.Optimizer":
        from pretrain.training.optim import scaled

        groups, config = decayed_groups(module, self.config.weight_decay), self.config
        for group in groups:  # the decay is a part of a step whose length the matrix says, not the rate
            group["weight_decay"] *= group["rate"]
        return scaled.Lamb(groups, config.lr, config.betas, config.eps)
