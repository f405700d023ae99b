"""Functions for weights and gradients that both engines use in a step."""

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from pretrain.training.optim.optimizer import Optimizer

# The kind and the name of a saved tensor, and the run of its flat numbers that is wanted → these numbers, in fp32.
Load = Callable[[str, str, slice], Tensor]


def named(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Each weight of the model once, with its name in the model: without the Learner's prefix."""
    return ((name.removeprefix("model."), p) for name, p in module.named_parameters())


def clipped(weights: Iterable[nn.Parameter], clip: float) -> Tensor:
    """Scale the gradients to a global norm of at most `clip`. Returns the norm before.

    The device decides whether they are scaled, so the host does not wait for the norm. Gradients that are short enough
    are multiplied by 1, which changes no bit and takes 2 ms for 15 M weights on a CPU.
    """
    gradients = [p.grad for p in weights if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    if math.isfinite(clip):
        scale = torch.where(norm.double() > clip, clip / (norm + 1e-6), torch.ones_like(norm))
        torch._foreach_mul_(gradients, scale)
    return norm


def applies(optimizer: torch.optim.Optimizer, rules: Optimizer, norm: Tensor) -> bool:
    """Whether `optimizer` is to be called for a gradient with this norm. A gradient that is not finite is skipped.

    An optimizer that can skip a step itself is always called, and told by `found_inf`, as torch's GradScaler tells it:
    it reads that on the device. For any other the host waits until the norm is computed.
    """
    finite = norm.isfinite()
    if not rules.skips:
        return bool(finite)
    optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
    return True


def weighted(sums: dict[str, Tensor], scales: dict[str, float]) -> Tensor:
    """The loss whose gradient is taken: the sum of each part times its scale."""
    return torch.stack([sums[name] * scale for name, scale in scales.items()]).sum()


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of each group: `lr` times the factor `rate` of the group, if it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("rate", 1.0)
