"""The step of Muon and NorMuon: updates of matrices are made orthogonal. Other weights are AdamW's."""

from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pretrain.training.optim.parts import Held, Placed, by_matrix

if TYPE_CHECKING:
    from pretrain.training.optim.muon import MuonConfig

# Coefficients of five steps, for matrices that were divided by 1.02 times their norm. Source: Amsel et al. 2025,
# arXiv:2505.16932 (Polar Express), as modded-nanogpt computed them.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
SMALL = 1e-10  # keeps a row of zeros from dividing by zero


def orthogonal(matrices: Tensor) -> Tensor:
    """(k, m, n) → about U Vᵀ of each matrix U S Vᵀ: its singular values become about 1.

    On CUDA it computes in bfloat16, which the iteration tolerates, elsewhere in fp32.
    """
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return (x.mT if tall else x).float()


class MuonWithAdamW(Placed, torch.optim.AdamW):
    """Muon for groups with `hidden`, and torch's fused AdamW for the others."""

    def __init__(self, groups: list[dict[str, Any]], config: "MuonConfig"):
        super().__init__(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
        self._rules = config

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["hidden"]]
        try:
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            if group["hidden"]:
                self._step([p for p in group["params"] if p.grad is not None], group)

    def _step(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        rules, lr = self._rules, group["lr"]
        share = min(1.0, lr / group["rate"] / rules.lr)  # of the peak
        kept = rules.momentum_floor + (rules.momentum - rules.momentum_floor) * share
        every = []
        for number, p in enumerate(weights):
            assert p.grad is not None
            momentum = self.state[p]["exp_avg"]
            gradient = self._unless_skipped(p.grad, momentum)
            momentum.lerp_(gradient, 1 - kept)
            update = gradient.lerp(momentum, kept).flatten()  # Nesterov's
            every.append(Held(update, self.state[p]["exp_avg_sq"].view(-1), self.parts_of(p, number)))
        by_matrix(every, self._rank, self._updates)
        for p, held in zip(weights, every, strict=True):
            update = held.values.view_as(p)
            update = self._unless_skipped(update, 0.0)
            p.sub_(p * (update * p > 0), alpha=lr * group["weight_decay"]).sub_(update, alpha=lr)

    def _updates(self, matrices: list[Tensor], squares: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Orthogonal updates of `matrices` (m, n), whose rows have the mean squares `squares` (m,).

        Matrices of one shape are computed together.
        """
        found: dict[int, tuple[Tensor, Tensor]] = {}
        order = sorted(range(len(matrices)), key=lambda number: tuple(matrices[number].shape))
        for _, group in groupby(order, key=lambda number: matrices[number].shape):
            numbers = list(group)
            x, rows = torch.stack([matrices[n] for n in numbers]), torch.stack([squares[n] for n in numbers])
            x, rows = self._even(orthogonal(x), rows)
            x *= max(1.0, x.shape[-2] / x.shape[-1]) ** 0.5
            found |= {n: (one, row) for n, one, row in zip(numbers, x, rows, strict=True)}
        return [found[n][0] for n in range(len(matrices))], [found[n][1] for n in range(len(matrices))]

    def _even(self, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Divide the rows of (k, m, n) by the root of the running mean (k, m) of their squares, and keep the norm."""
        beta = self._rules.row_beta
        if beta is None:
            return x, rows
        rows = rows.lerp(self._unless_skipped(x.square().mean(-1), rows), 1 - beta)
        even = x / (rows.sqrt() + SMALL)[..., None]
        return even * (x.norm(dim=(-2, -1), keepdim=True) / even.norm(dim=(-2, -1), keepdim=True).clamp(SMALL)), rows

    def _unless_skipped(self, new: Tensor, old: Tensor | float) -> Tensor:
        """`new`, or `old` in a step that changes nothing, because its gradient is not finite."""
        found_inf = getattr(self, "found_inf", None)
        return new if found_inf is None else torch.where(found_inf > 0, old, new)
