"""The module that an engine wraps: a model and its objective. Also the functions that all losses share."""

import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.model.attention import Layout
from pretrain.model.transformer import Transformer
from pretrain.objectives.batch import Batch
from pretrain.objectives.objective import Objective


class Learner(nn.Module):
    """A model that computes the loss of an objective, which may differ from one phase to the next."""

    def __init__(self, model: Transformer):
        super().__init__()
        self.model = model

    def forward(self, objective: Objective, batch: Batch, each: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """`objective.loss` of a batch of tensors, or `objective.score` if `each` is true."""
        return objective.score(self.model, batch) if each else objective.loss(self.model, batch)


def logits(model: Transformer, batch: Batch, causal: bool) -> Tensor:
    """(B, K, V) fp32: the logits at every target slot. Only these rows are projected onto the vocabulary."""
    hidden = model(batch.inputs, Layout(batch.segments, batch.position_ids, causal))
    if batch.target_index is not None:
        index = batch.target_index.long()[..., None].expand(-1, -1, hidden.shape[-1])
        hidden = hidden.gather(1, index)  # (B, K, D)
    return model.logits(hidden).float()


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """(B, K): the negative log-likelihood in nats of `targets` (B, K) under `logits` (B, K, V)."""
    targets = targets.long()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
