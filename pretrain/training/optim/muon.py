"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) and NorMuon (Li et al. 2025, arXiv:2510.05491)."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from pretrain.training.optim.adamw import Adam, AdamConfig, Beta

if TYPE_CHECKING:
    import torch
    from torch import nn

SMALL_RATE = 2e-3  # a smaller rate is usual for AdamW, and slow for Muon


class MuonConfig(AdamConfig):
    """Muon for matrices between hidden values, AdamW for everything else, and the learning rate."""

    kind: Literal["muon"]
    """The name of the optimizer. `lr` is the rate of Muon's matrices; 0.02 is usual."""
    adam_lr: float = Field(3e-3, gt=0, lt=1e9)
    """The peak rate of AdamW's weights: embeddings, head, norms and biases. It follows the schedule of `lr`."""
    momentum: Beta = 0.95
    """The share of the momentum that is kept in a step at the peak of the learning rate."""
    momentum_floor: Beta = 0.85
    """The share of the momentum that is kept at a learning rate of 0. Between both rates it changes in proportion, so
    the momentum is warmed up and cooled down with the rate."""
    row_beta: Beta | None = 0.95
    """The decay rate of the mean square of each row of an update, by which NorMuon divides it; null: plain Muon."""
    weight_decay: float = Field(0.1, ge=0)
    """Decoupled weight decay of Muon's matrices, of the numbers that an update makes smaller anyway. AdamW's weights do
    not decay."""

    @model_validator(mode="after")
    def _rising(self) -> "MuonConfig":
        if self.momentum_floor > self.momentum:
            raise ValueError(
                f"optim.momentum_floor = {self.momentum_floor} is above optim.momentum = {self.momentum}: the momentum "
                "would fall as the learning rate rises; set momentum_floor to at most momentum"
            )
        return self

    def notes(self) -> list[str]:
        if self.lr >= SMALL_RATE:
            return []
        return [
            f"note: optim.lr = {self.lr:g} is small for muon, whose matrices usually learn at 0.005 to 0.03; the rate "
            f"of its other weights is optim.adam_lr = {self.adam_lr:g}"
        ]


class Muon(Adam):
    """Muon or NorMuon for the matrices between hidden values, and AdamW for all other weights.

    `weight_decay` is of Muon's matrices only, and cautious: a number decays in a step that makes it smaller anyway
    (Chen et al. 2025, arXiv:2510.12402). The gradient is clipped, never the orthogonalised update.
    """

    Config = MuonConfig
    config: MuonConfig
    skips = True
    whole = True

    def build(self, module: "nn.Module") -> "torch.optim.Optimizer":
        from pretrain.model.weights import weights_of
        from pretrain.training.optim.orthogonal import MuonWithAdamW

        config, roles = self.config, weights_of(module)
        groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
        for name, weight in module.named_parameters():
            if weight.requires_grad:
                role = roles[name]
                rate = role.muon_rate if role.hidden else role.rate * config.adam_lr / config.lr
                groups.setdefault((role.hidden, rate), []).append(weight)
        return MuonWithAdamW(
            [
                {"params": groups[hidden, rate], "hidden": hidden, "rate": rate}
                | {"weight_decay": config.weight_decay / rate if hidden else 0.0}
                for hidden, rate in sorted(groups, reverse=True)
            ],
            config,
        )
