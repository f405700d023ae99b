"""AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101)."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from pretrain.training.optim.optimizer import Optimizer, decayed_groups
from pretrain.training.optim.schedule import OptimConfig

if TYPE_CHECKING:
    import torch
    from torch import nn

Beta = Annotated[float, Field(ge=0, lt=1)]


class AdamWConfig(OptimConfig):
    kind: Literal["adamw"] = "adamw"
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: float = Field(1e-8, ge=1e-30)  # in fp32 a smaller one is next to nothing, and 0 / 0 is not a number


class AdamW(Optimizer):
    """torch's fused AdamW. It decays matrices and leaves vectors (norms, biases) alone."""

    Config = AdamWConfig
    config: AdamWConfig
    states = ("exp_avg", "exp_avg_sq")

    def build(self, module: "nn.Module") -> "torch.optim.Optimizer":
        import torch

        groups, config = decayed_groups(module, self.config.weight_decay), self.config
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)

    def first_state(self, weight: "torch.Tensor") -> "dict[str, torch.Tensor]":
        import torch

        step = torch.zeros((), device=weight.device)  # where a fused AdamW has it
        return {"step": step, **{name: torch.zeros_like(weight) for name in self.states}}

    def count_steps(self, state: "dict[str, torch.Tensor]", steps: int) -> None:
        state["step"].fill_(steps)
