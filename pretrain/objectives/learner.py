"""The module that an engine wraps: a model and its objective. Also the rows that all losses share."""

from typing import Any

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

    def forward(self, objective: Objective, batch: Batch, each: bool = False) -> Any:
        """`objective.loss` of a batch of tensors, or `objective.score` if `each` is true."""
        return objective.score(self.model, batch) if each else objective.loss(self.model, batch)


def target_rows(model: Transformer, batch: Batch, layout: Layout) -> Tensor:
    """(B, K, D): the hidden state at every target slot. Only these rows are projected onto the vocabulary."""
    hidden = model(batch.inputs, layout)
    return hidden if batch.target_index is None else rows_at(hidden, batch.target_index)


def rows_at(hidden: Tensor, positions: Tensor) -> Tensor:
    """The rows of hidden states (B, T, D) at `positions` (B, K): (B, K, D)."""
    return hidden.gather(1, positions.long()[..., None].expand(-1, -1, hidden.shape[-1]))
