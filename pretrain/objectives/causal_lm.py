"""Causal language modelling: predict every token from the tokens before it in its document."""

from typing import ClassVar, Literal

import numpy as np

from pretrain.objectives.batch import Batch, documents
from pretrain.objectives.objective import Ask, Objective, ObjectiveConfig
from pretrain.order.rows import Rows
from pretrain.tokenizer import Tokenizer

GIVEN_TOKENS = 48  # the most tokens of a window that a preview shows to the model
CONTINUED_TOKENS = 16  # the most tokens that a preview predicts: its cost does not depend on the length of the window


class CausalLMConfig(ObjectiveConfig):
    """Causal language modelling: predict every token from the tokens before it."""

    kind: Literal["causal_lm"]
    """The name of the objective."""


class CausalLM(Objective):
    """Predict every token from the tokens before it in its document.

    The end mark between two documents is the last target of the first document and the first input of the second. So
    every position is a target and the model learns where documents end. Nothing leaks from one document into the next,
    because the mark is always the same token.
    """

    Config: ClassVar[type[ObjectiveConfig]] = CausalLMConfig
    causal: ClassVar[bool | None] = True
    asked = "the next token"

    def __init__(self, config: ObjectiveConfig, specials: dict[str, int], vocab_size: int, seq_len: int, seed: int):
        super().__init__(config, specials, vocab_size, seq_len, seed)
        self.end = specials["eod" if "eod" in specials else "sep"]
        self.targets = seq_len

    def batch(self, rows: Rows, keys: np.ndarray) -> Batch:
        """T targets a window, the tokens, and T inputs, the token before each. Places without text have weight 0."""
        after_end = rows.before == self.end
        if rows.text is not None:
            after_end &= rows.text
        segments, position_ids = documents(rows.part_starts() | after_end)
        return Batch(
            inputs=rows.before,
            targets=rows.ids,
            target_index=None,
            weights=None if rows.text is None else rows.text.astype(np.float32),
            segments=segments,
            position_ids=position_ids,
        )

    def preview(self, windows: list[Batch], ask: Ask) -> np.ndarray:
        """A greedy continuation of the beginning of each window, which is at most half of the window."""
        given = np.stack([self._given(window) for window in windows])
        count = min(CONTINUED_TOKENS, windows[0].inputs.shape[1] + 1 - given.shape[1])
        tokens = np.concatenate([given, np.repeat(given[:, :1], count, axis=1)], axis=1)
        for at in range(given.shape[1], tokens.shape[1]):
            before = tokens[:, :-1]
            rows = Rows(tokens[:, 1:], before, before == self.end)  # attention is causal: no later token is seen
            tokens[:, at] = ask(self.batch(rows, np.arange(len(tokens))))["likeliest"][:, at - 1]
        return tokens[:, given.shape[1] :].astype(np.int64)

    def preview_text(self, window: Batch, predicted: np.ndarray, tokenizer: Tokenizer) -> str:
        """The beginning of the window, and the continuation of the model."""
        given = self._given(window)[1:].tolist()
        return f"{tokenizer.decode(given)} **▸** {tokenizer.decode(predicted.tolist())}"

    def marked(self, window: Batch, tokenizer: Tokenizer) -> tuple[list[str], str]:
        shown = [tokenizer.token_text(token) for token in window.inputs[0].tolist()]
        return shown, f"{window.filled()} targets: every token's successor"

    def _given(self, window: Batch) -> np.ndarray:
        """(1 + n,): the token before a window, then the beginning of the window."""
        return window.inputs[0, : 1 + min(GIVEN_TOKENS, window.inputs.shape[1] // 2)]
