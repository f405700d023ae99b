"""Adam whose step is scaled weight by weight: StableAdamW and LAMB."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from pretrain.training.optim.parts import Part, Placed, sums

TINY = torch.finfo(torch.float32).tiny  # the square of a smaller `eps` would be 0


class ScaledAdam(Placed, torch.optim.Optimizer):
    """Adam with a number for each weight by which its learning rate is multiplied."""

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if weights:
                self._step(weights, group)

    def _step(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        parts = [self.parts_of(p, number) for number, p in enumerate(weights)]
        updates = [self._update(p, group) for p in weights]
        scales = self.scales(weights, updates, parts, group)
        for p, update, ranks in zip(weights, updates, parts, strict=True):
            flat = update.view(-1)
            for part in ranks[self._rank]:
                flat[part.at : part.at + part.size] *= scales[part.weight].to(flat.dtype)
            p.sub_(update, alpha=group["lr"])

    def _update(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        """The step of AdamW with weight decay, before it is multiplied by the learning rate."""
        state, (beta, beta_sq) = self.state[p], group["betas"]
        assert p.grad is not None
        state["step"] += 1
        steps = float(state["step"])
        mean = state["exp_avg"].lerp_(p.grad, 1 - beta)
        square = state["exp_avg_sq"].mul_(beta_sq).addcmul_(p.grad, p.grad, value=1 - beta_sq)
        root = (square / (1 - beta_sq**steps)).sqrt_().add_(group["eps"])
        return (mean / (1 - beta**steps)).div_(root).add_(p, alpha=group["weight_decay"])

    @abstractmethod
    def scales(
        self, weights: list[Tensor], updates: list[Tensor], parts: list[list[list[Part]]], group: dict[str, Any]
    ) -> dict[int, Tensor]:
        """The number for each weight, by its number in `parts`."""


class StableAdamW(ScaledAdam):
    """Steps are divided by the root mean square of gradient over root of the second moment, where that is above 1."""

    def scales(self, weights, updates, parts, group):
        ratios = []
        for p in weights:
            state = self.state[p]
            square = state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))
            ratios.append((p.grad.square() / square.clamp(min=max(group["eps"] ** 2, TINY))).flatten())
        sizes = {part.weight: part.numbers for ranks in parts for held in ranks for part in held}
        found = sums(ratios, parts, self._rank)
        return {weight: 1 / (total / sizes[weight]).sqrt().clamp(min=1) for weight, total in found.items()}


class Lamb(ScaledAdam):
    """Steps of matrices are as long as the matrix, times the learning rate."""

    def scales(self, weights, updates, parts, group):
        lengths = sums([p.square().flatten() for p in weights], parts, self._rank)
        steps = sums([update.square().flatten() for update in updates], parts, self._rank)
        shapes = {part.weight: part.shape for ranks in parts for held in ranks for part in held}
        found = {}
        for weight, length in lengths.items():
            step, one = steps[weight], torch.ones_like(length)
            usable = (length > 0) & (step > 0)
            found[weight] = torch.where(usable, (length / step).sqrt(), one) if len(shapes[weight]) > 1 else one
        return found
