"""The contract of an objective: one module defines it, and one line in `OBJECTIVES` makes it known."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import Field

from pretrain.config import Config
from pretrain.model.config import Composition
from pretrain.objectives.batch import Batch
from pretrain.order.rows import Rows
from pretrain.tokenizer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from pretrain.model.attention import Layout
    from pretrain.model.transformer import Transformer

# Ask the model: a batch → the arrays that `Objective.score` gives.
Ask = Callable[[Batch], dict[str, np.ndarray]]


class ObjectiveConfig(Config):
    """The objective: what the model learns to predict."""

    kind: str
    """The name of the objective."""
    z_loss: float = Field(0.0, ge=0)
    """The weight of (log Z)² in the training loss of a token, where Z is the sum of the exponentials of its logits. It
    keeps logits from drifting, and 1e-4 is usual. Held-out losses are without it."""


class Objective(ABC):
    """An objective for windows of one length. It turns rows of tokens into a batch that lists the targets.

    A subclass sets the class variables, takes the arguments of `__init__`, and defines `batch` and the texts. It must
    not import torch at the top of its module, because configurations are read without torch; `loss` and `score` may.

    A loss has one or more parts. Each is a sum over slots of a batch. The caller divides it by the number of its slots
    in the *global* batch, so the mean does not depend on micro-batches, accumulation or ranks.
    """

    Config: ClassVar[type[ObjectiveConfig]]  # the section `objective` of a run; it defines `kind: Literal[…]`
    composition: ClassVar[Composition] = "one"  # the Transformers of the model, as in `ModelConfig.composition`
    # Whether a token sees only itself and the tokens before it; None: it differs between windows.
    causal: ClassVar[bool | None]
    asked: ClassVar[str]  # the meaning of a target, in the words of the model card
    without_context: ClassVar[str] = "the entropy of the targets: a predictor that ignores the context cannot be better"
    parts: dict[str, float] = {"loss": 1.0}  # the names of the parts, and the weight of the mean of each
    targets: int  # K, the number of slots of a window: fixed, so that every batch has one shape
    outcomes: tuple[int, int]  # (G, C), usually (1, V): see `Scores.frequencies` in heldout.py
    wants_words: bool = False  # whether `batch` needs the positions where words begin: `needs_words` of its settings

    def __init__(self, config: Any, specials: dict[str, int], vocab_size: int, seq_len: int, seed: int):
        """`specials`: ids of special tokens by role, and of the tokenizer's further special tokens by their text.

        Raises ConfigError when vocabulary or length do not fit.
        """
        self.config, self.outcomes = config, (1, vocab_size)

    @classmethod
    def needs_words(cls, config: Any) -> bool:
        """Whether a run with these settings must open the word starts of its shards."""
        return False

    @classmethod
    def heldout(cls, config: Any) -> ObjectiveConfig:
        """The settings for scoring held-out text. They are the same for all runs, so that their scores compare."""
        return config

    @abstractmethod
    def batch(self, rows: Rows, keys: np.ndarray) -> Batch:
        """The batch of these rows: a pure function of the rows, the key of each row (B,), and the seed."""

    def layout(self, batch: Batch) -> "Layout":
        """Which tokens of a batch of tensors see each other."""
        from pretrain.model.attention import Layout

        assert self.causal is not None, "an objective of both directions defines its layout"
        return Layout(batch.segments, batch.position_ids, self.causal, begins=batch.offsets)

    def counts(self, batch: Batch) -> dict[str, int]:
        """The number of slots that count in each part of the loss."""
        return {"loss": batch.filled()}

    def loss(self, model: "Transformer", batch: Batch) -> "dict[str, Tensor]":
        """Each part of the loss, summed over the slots of a batch of tensors: Σ weight · nll, in nats, fp32."""
        from pretrain.objectives import learner

        rows = learner.target_rows(model, batch, self.layout(batch))
        return {"loss": model.loss(rows, batch.targets, batch.weights, self.config.z_loss)}

    def score(self, model: "Transformer", batch: Batch) -> "dict[str, Tensor]":
        """The `nll` (nats, fp32) and the `likeliest` token of every slot of a batch of tensors, both (B, K).

        If the model makes the targets, they are here as `targets`, and the token that is shown in the place of each as
        `seen`.
        """
        from pretrain.objectives import learner

        nll, likeliest = model.score(learner.target_rows(model, batch, self.layout(batch)), batch.targets)
        return {"nll": nll, "likeliest": likeliest}

    def places(self, batch: Batch) -> np.ndarray:
        """(B, S): the place in the window of each of the `inputs`."""
        return np.broadcast_to(np.arange(batch.inputs.shape[1]), batch.inputs.shape)

    @abstractmethod
    def preview(self, windows: list[Batch], ask: Ask) -> np.ndarray:
        """The tokens (B, n) that the model predicts for a preview. Each of the B windows is a batch of one window.

        `ask` is a collective, so a subclass must call it equally often whatever the windows hold.
        """

    @abstractmethod
    def preview_text(self, window: Batch, predicted: np.ndarray, tokenizer: Tokenizer) -> str:
        """Markdown that shows a window and the (n,) tokens that `preview` returned for it."""

    @abstractmethod
    def marked(self, window: Batch, tokenizer: Tokenizer) -> tuple[list[str], str]:
        """The text of each token of a window, with the targets marked, and a line that counts the targets."""
