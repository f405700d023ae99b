"""Hybrid of masked and causal language modelling: one model learns to read both ways and to write."""

from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from pretrain.errors import ConfigError
from pretrain.hashing import DIRECTION, RANDOM_TOKEN, REPLACE, fraction, hash64
from pretrain.objectives import masking
from pretrain.objectives.batch import Batch, joined
from pretrain.objectives.causal_lm import CausalLM
from pretrain.objectives.masked_lm import HELD_OUT_RATIO, special_ids
from pretrain.objectives.objective import Ask, ObjectiveConfig
from pretrain.objectives.prefix_lm import PrefixBatch
from pretrain.order.rows import Rows
from pretrain.tokenizer import Tokenizer
from pretrain.tokenizer.kinds import ROLES

if TYPE_CHECKING:
    from pretrain.model.attention import Layout


class HybridConfig(ObjectiveConfig):
    """Masked and causal language modelling in one run, so that one model is an encoder and a decoder."""

    kind: Literal["hybrid"]
    """The name of the objective."""
    masked_share: float = Field(0.5, ge=0, le=1)
    """The share of windows in which the model sees both sides and predicts masked tokens. In the others it predicts
    every token from those before it."""
    mask_ratio: float = Field(0.15, gt=0, lt=1)
    """The share of the tokens of a masked window that are targets."""
    mask_share: float = Field(0.8, ge=0, le=1)
    """The share of these targets that are shown as [MASK]. A half of the rest are shown as a random token."""


class Hybrid(CausalLM):
    """Masked next-token prediction and causal language modelling (Charpentier & Samuel 2024, arXiv:2410.24159).

    In both, the output at a token predicts the token after it. In a masked window that token is shown as [MASK], and
    every token sees its whole document. Whether a window is masked is a hash of the seed and its place in the run.
    """

    Config = HybridConfig
    causal = None
    asked = "tokens shown as the mask, 15 % of the text, predicted by the token before them"

    def __init__(self, config: HybridConfig, specials: dict[str, int], vocab_size: int, seq_len: int, seed: int):
        super().__init__(config, specials, vocab_size, seq_len, seed)
        if "mask" not in specials:
            raise ConfigError(
                "objective hybrid needs a vocabulary with a mask token",
                f"this tokenizer has only: {', '.join(role for role in specials if role in ROLES)}",
                "use a tokenizer of kind bert, or objective.kind=causal_lm",
            )
        self.seed, self.mask = seed, specials["mask"]
        self.masked_targets = max(1, round(config.mask_ratio * seq_len))
        self.special = special_ids(specials, vocab_size)
        self.plain = np.flatnonzero(~self.special).astype(np.int32)  # the ids that a random token may have

    @classmethod
    def heldout(cls, config: HybridConfig) -> HybridConfig:
        """Every window is masked, 15 % of its tokens, and all of them are shown as [MASK]."""
        return HybridConfig(kind="hybrid", masked_share=1, mask_ratio=HELD_OUT_RATIO, mask_share=1)

    def batch(self, rows: Rows, keys: np.ndarray) -> Batch:
        """T targets a window. In masked windows only the masked tokens have a weight."""
        causal = super().batch(rows, keys)
        B, T = causal.inputs.shape
        both = fraction(hash64(DIRECTION, self.seed, keys)) < self.config.masked_share  # (B,)
        # A target is masked where it is the next input of the same document.
        never = self.special[causal.targets]
        never[:, -1] = True
        never[:, :-1] |= causal.position_ids[:, 1:] == 0
        if causal.weights is not None:
            never |= causal.weights == 0
        draws = masking.Draws(self.seed, keys, T)
        chosen = np.zeros((B, T), bool)
        np.put_along_axis(chosen, masking.tokens(never, draws, self.masked_targets), True, axis=1)
        chosen &= ~never & both[:, None]

        inputs = causal.inputs.copy()
        row, at = chosen.nonzero()
        share = fraction(draws.at(REPLACE, row, at))
        other = self.plain[(draws.at(RANDOM_TOKEN, row, at) % np.uint64(len(self.plain))).astype(np.int64)]
        shown = np.where(share < self.config.mask_share, np.int32(self.mask), causal.targets[row, at])
        inputs[row, at + 1] = np.where(share >= (1 + self.config.mask_share) / 2, other, shown)
        text = np.ones((B, T), np.float32) if causal.weights is None else causal.weights
        weights = np.where(both[:, None], chosen, text).astype(np.float32)
        seen = np.broadcast_to(both[:, None], (B, T)).copy()
        return PrefixBatch(inputs, causal.targets, None, weights, causal.segments, causal.position_ids, seen)

    def layout(self, batch: Batch) -> "Layout":
        """In masked windows every token is seen by all tokens of its document."""
        from pretrain.model.attention import Layout

        assert isinstance(batch, PrefixBatch)
        return Layout(batch.segments, batch.position_ids, True, batch.prefix, batch.offsets)

    def preview(self, windows: list[Batch], ask: Ask) -> np.ndarray:
        """The likeliest token at every place, (B, T)."""
        return ask(joined(windows))["likeliest"]

    def preview_text(self, window: Batch, predicted: np.ndarray, tokenizer: Tokenizer) -> str:
        """The text of the window, with every target as [guess] or [guess ≠ truth]."""
        assert window.weights is not None
        shown = [tokenizer.token_text(token) for token in window.targets[0].tolist()]
        for at in np.flatnonzero(window.weights[0]).tolist():
            guess = tokenizer.token_text(int(predicted[at]))
            shown[at] = f"**[{guess}]**" if guess == shown[at] else f"**[{guess} ≠ {shown[at]}]**"
        return " ".join(shown)

    def marked(self, window: Batch, tokenizer: Tokenizer) -> tuple[list[str], str]:
        assert isinstance(window, PrefixBatch)
        shown = [tokenizer.token_text(token) for token in window.inputs[0].tolist()]
        how = (
            "masked tokens, each predicted by the token before it" if window.prefix[0, 0] else "every token's successor"
        )
        return shown, f"{window.filled()} targets: {how}"
