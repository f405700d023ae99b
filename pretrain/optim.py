"""AdamW with the usual two groups, and the learning rate as a pure function of the step."""

import torch
from pydantic import Field
from torch import nn

from pretrain.config import Config
from pretrain.phases import Phase


class OptimConfig(Config):
    lr: float = Field(gt=0)  # the peak
    warmup_steps: int = Field(0, ge=0)
    floor: float = Field(0.0, ge=0, le=1)  # of the peak: where a decay ends
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    clip: float = Field(1.0, gt=0)  # largest global gradient norm


def lr_at(step: int, optim: OptimConfig, phases: list[Phase]) -> float:
    """Learning rate for optimizer step `step` (0-based): linear warm-up, flat, and 1-sqrt decay to `floor · lr`.

    Pure, so resuming needs no scheduler state. A phase that follows a decayed one starts at the peak again. Past the
    last step the rate stays where it ended. Source: Hägele et al. 2024, arXiv:2405.18392, section 3.
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    begin = 0
    for phase in phases:
        end = begin + phase.steps
        if step < end or phase is phases[-1]:
            into_decay = min(step, end) - (end - phase.decay_steps)
            if phase.decay_steps and into_decay >= 0:
                share = (into_decay + 1) / (phase.decay_steps + 1) if step < end else 1.0
                return optim.lr * (optim.floor + (1 - optim.floor) * (1 - share**0.5))
            return optim.lr
        begin = end
    raise AssertionError("a run has at least one phase")


def adamw(module: nn.Module, config: OptimConfig, fused: bool) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) that decays matrices and leaves vectors (norms, biases) alone."""
    weights = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in weights if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in weights if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)
