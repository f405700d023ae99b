"""Causal language modelling: predict every token from those before it in its document."""

from typing import Literal

import numpy as np

from pretrain.config import Config
from pretrain.objectives.batch import Batch, documents
from pretrain.objectives.objective import Ask, Objective
from pretrain.order.rows import Rows
from pretrain.tokenizer import Tokenizer

GIVEN_TOKENS = 48  # of a preview: its cost does not depend on the window's length
CONTINUED_TOKENS = 16


class CausalLMConfig(Config):
    kind: Literal["causal_lm"]


class CausalLM(Objective):
    """Predict every token from those before it in its document.

    A document begins at the end mark that closes its predecessor: that mark is the predecessor's last target and the
    first input of the next document. The mark is a constant, so every position is a target, the end of a document is
    learned, and nothing leaks from one document into the next.
    """

    Config = CausalLMConfig
    causal = True
    asked = "the next token"

    def __init__(self, config: CausalLMConfig, specials: dict[str, int], vocab_size: int, seq_len: int, seed: int):
        self.end = specials["eod" if "eod" in specials else "sep"]
        self.targets = seq_len

    def batch(self, rows: Rows, keys: np.ndarray) -> Batch:
        """T inputs and T targets a window: the tokens before, and the tokens. Free places have weight 0."""
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
        """The beginning of each window, at most half of it, continued greedily."""
        given = np.stack([self._given(window) for window in windows])
        count = min(CONTINUED_TOKENS, windows[0].inputs.shape[1] + 1 - given.shape[1])
        tokens = np.concatenate([given, np.repeat(given[:, :1], count, axis=1)], axis=1)
        for at in range(given.shape[1], tokens.shape[1]):
            before = tokens[:, :-1]
            rows = Rows(tokens[:, 1:], before, before == self.end)  # later tokens are not seen: attention is causal
            tokens[:, at] = ask(self.batch(rows, np.arange(len(tokens))))[:, at - 1]
        return tokens[:, given.shape[1] :].astype(np.int64)

    def preview_text(self, window: Batch, predicted: np.ndarray, tokenizer: Tokenizer) -> str:
        """The beginning of the window, and how the model goes on."""
        given = self._given(window)[1:].tolist()
        return f"{tokenizer.decode(given)} **▸** {tokenizer.decode(predicted.tolist())}"

    def marked(self, window: Batch, tokenizer: Tokenizer) -> tuple[list[str], str]:
        shown = [tokenizer.token_text(token) for token in window.inputs[0].tolist()]
        return shown, f"{window.filled()} targets: every token's successor"

    def _given(self, window: Batch) -> np.ndarray:
        """(1 + n,): a token, then the beginning of a window."""
        return window.inputs[0, : 1 + min(GIVEN_TOKENS, window.inputs.shape[1] // 2)]
