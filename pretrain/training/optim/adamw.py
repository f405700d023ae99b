"""AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), also with the clipping of StableAdamW."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from pretrain.training.optim.optimizer import Optimizer, decayed_groups
from pretrain.training.optim.schedule import OptimConfig

if TYPE_CHECKING:
    import torch
    from torch import nn

Beta = Annotated[float, Field(ge=0, lt=1)]


class AdamConfig(OptimConfig):
    """The keys of every optimizer of Adam's family."""

    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """The decay rates of the running means of the gradient and of its square."""
    eps: float = Field(1e-8, ge=1e-30)  # without it 0 / 0 is not a number, and fp32 loses a smaller one
    """The number that is added to the root of the second moment, so that no step divides by zero."""


class AdamWConfig(AdamConfig):
    """AdamW and the learning rate."""

    kind: Literal["adamw"] = "adamw"
    """The name of the optimizer."""
    clip_updates: bool = False
    """StableAdamW (Wortsman et al. 2023, arXiv:2304.13013, section 3.4): the step of a weight is divided by the root
    mean square of its gradients over the roots of their second moments, where that is above 1. It is slower."""


class Adam(Optimizer):
    """The state that all optimizers of Adam's family keep for a weight."""

    states = ("exp_avg", "exp_avg_sq")

    def first_state(self, weight: "torch.Tensor") -> "dict[str, torch.Tensor]":
        import torch

        # A fused AdamW, which can skip a step itself, counts on the device of the weight. The others read the count in
        # every step, so they have it on the host.
        step = torch.zeros((), device=weight.device if self.skips else None)
        return {"step": step, **{name: torch.zeros_like(weight) for name in self.states}}


class AdamW(Adam):
    """torch's fused AdamW, or StableAdamW. It decays matrices and leaves vectors (norms, biases) alone."""

    Config = AdamWConfig
    config: AdamWConfig

    @property
    def whole(self) -> bool:  # type: ignore[override]
        return self.config.clip_updates

    @property
    def skips(self) -> bool:  # type: ignore[override]
        return not self.config.clip_updates

    def build(self, module: "nn.Module") -> "torch.optim.Optimizer":
        import torch

        groups, config = decayed_groups(module, self.config.weight_decay), self.config
        if config.clip_updates:
            from pretrain.training.optim.scaled import StableAdamW

            return StableAdamW(groups, config.lr, config.betas, config.eps)
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
