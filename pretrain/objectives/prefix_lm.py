"""Prefix language modelling: read the beginning of each document from both sides, and predict the rest."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from pretrain.hashing import PREFIX, fraction, hash64
from pretrain.objectives.batch import Batch
from pretrain.objectives.causal_lm import CausalLM
from pretrain.objectives.objective import ObjectiveConfig
from pretrain.order.rows import Rows
from pretrain.tokenizer import Tokenizer

if TYPE_CHECKING:
    from pretrain.model.attention import Layout

HELD_OUT_SHARE = 0.5  # the share of each document that is its prefix in held-out text, in all runs


class PrefixLMConfig(ObjectiveConfig):
    """Prefix language modelling: read the beginning of each document from both sides, and predict the rest."""

    kind: Literal["prefix_lm"]
    """The name of the objective."""
    shortest: float = Field(0.0, ge=0, le=1)
    """The least share of a document, or of its part in a window, that is its prefix."""
    longest: float = Field(1.0, ge=0, le=1)
    """The largest share. The share of each document is drawn evenly between the two."""

    @model_validator(mode="after")
    def _ordered(self) -> "PrefixLMConfig":
        if self.shortest > self.longest:
            raise ValueError(f"objective.shortest = {self.shortest} is more than objective.longest = {self.longest}")
        return self


@dataclass(frozen=True)
class PrefixBatch(Batch):
    """A batch in which all tokens of a document see its prefix."""

    prefix: Any  # (B, T) bool: the tokens of a prefix


class PrefixLM(CausalLM):
    """Predict the tokens after the prefix of each document (Raffel et al. 2019, arXiv:1910.10683, section 3.2.1).

    Tokens of the prefix see each other on both sides, and are no targets, because the model can see them. The other
    tokens see the prefix and the tokens before them. The length of a prefix is a hash of the seed and the place of the
    document in the run.
    """

    Config = PrefixLMConfig
    asked = f"the next token after the first {HELD_OUT_SHARE:.0%} of a document"

    def __init__(self, config: PrefixLMConfig, specials: dict[str, int], vocab_size: int, seq_len: int, seed: int):
        super().__init__(config, specials, vocab_size, seq_len, seed)
        self.seed = seed

    @classmethod
    def heldout(cls, config: PrefixLMConfig) -> PrefixLMConfig:
        return PrefixLMConfig(kind="prefix_lm", shortest=HELD_OUT_SHARE, longest=HELD_OUT_SHARE)

    def batch(self, rows: Rows, keys: np.ndarray) -> Batch:
        """T targets a window. Those that the model can see, and places without text, have weight 0."""
        causal = super().batch(rows, keys)
        row, number, lengths = documents_of(causal)
        share = fraction(hash64(PREFIX, self.seed, keys[row], number))
        share = self.config.shortest + share * (self.config.longest - self.config.shortest)
        size = (share * lengths).astype(np.int32).repeat(lengths).reshape(causal.inputs.shape)  # (B, T)
        # The input after a target is the target, so a target is visible unless the prefix ends at or before it.
        asked = (causal.position_ids >= size - 1).astype(np.float32)
        weights = asked if causal.weights is None else asked * causal.weights
        return PrefixBatch(**{**vars(causal), "weights": weights}, prefix=causal.position_ids < size)

    def layout(self, batch: Batch) -> "Layout":
        from pretrain.model.attention import Layout

        assert isinstance(batch, PrefixBatch)
        return Layout(batch.segments, batch.position_ids, True, batch.prefix, batch.offsets)

    def marked(self, window: Batch, tokenizer: Tokenizer) -> tuple[list[str], str]:
        assert isinstance(window, PrefixBatch)
        shown = [tokenizer.token_text(token) for token in window.inputs[0].tolist()]
        shown = [f"«{text}»" if seen else text for text, seen in zip(shown, window.prefix[0], strict=True)]
        return shown, f"{window.filled()} targets: the tokens after each prefix «…»"


def documents_of(batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The documents of a batch in order: the window of each, its number in the window, and its tokens, each (n,)."""
    T = batch.position_ids.shape[1]
    starts = np.flatnonzero(batch.position_ids.ravel() == 0)
    row = starts // T
    first = starts.searchsorted(np.arange(0, batch.position_ids.size, T))  # the first document of each window
    lengths = np.diff(starts, append=batch.position_ids.size)
    return row, np.arange(len(starts)) - first[row], lengths
