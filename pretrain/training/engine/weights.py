"""Functions for weights and gradients that both engines use in a step."""

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

# The kind and the name of a saved tensor, and the run of its flat numbers that is wanted → these numbers, in fp32.
Load = Callable[[str, str, slice], Tensor]


def named(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Each weight of the model once, with its name in the model: without the Learner's prefix."""
    return ((name.removeprefix("model."), p) for name, p in module.named_parameters())


def clipped(weights: Iterable[nn.Parameter], clip: float) -> float | None:
    """Scale the gradients to a global norm of at most `clip`. Return the norm before; None if it is not finite."""
    weights = list(weights)
    norm = nn.utils.get_total_norm([p.grad for p in weights if p.grad is not None])
    length = float(norm)
    if not math.isfinite(length):
        return None
    if length > clip:
        nn.utils.clip_grads_with_norm_(weights, clip, norm)
    return length


def weighted(sums: dict[str, Tensor], scales: dict[str, float]) -> Tensor:
    """The loss whose gradient is taken: the sum of each part times its scale."""
    return torch.stack([sums[name] * scale for name, scale in scales.items()]).sum()


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of each group: `lr` times the factor `rate` of the group, if it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("rate", 1.0)
