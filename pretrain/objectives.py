"""What a model learns to predict: rows of ids in, a Batch with listed targets out, and the loss on it.

An objective is a class with `lead` (tokens wanted from before a window), `targets` (slots K a window) and `batch`.
The loss is the sum over filled slots; who calls divides by the number of filled slots of the *global* batch, so the
mean does not depend on micro-batch, accumulation or ranks.
"""

from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from pretrain.config import Config
from pretrain.errors import ConfigError
from pretrain.model import Transformer
from pretrain.windows import MASK, RANDOM_TOKEN, REPLACE, hash64


@dataclass(frozen=True)
class Batch:
    """One micro-batch. Targets are listed: slot k of window b asks for targets[b, k] at target_index[b, k]."""

    inputs: Tensor  # (B, T) int64
    targets: Tensor  # (B, K) int64
    target_index: Tensor | None  # (B, K) int64; None: K = T, slot k is position k
    weights: Tensor | None  # (B, K) float32, 0 for an empty slot; None: every slot is filled
    segments: Tensor  # (B, T) int64: number of the document inside the window
    position_ids: Tensor  # (B, T) int64: restarting at every document

    def to(self, device: torch.device) -> "Batch":
        return Batch(**{name: None if x is None else x.to(device, non_blocking=True) for name, x in self._items()})

    def filled(self) -> int:
        """Number of slots that count."""
        return self.targets.numel() if self.weights is None else int((self.weights > 0).sum())

    def rows(self, chosen: slice) -> "Batch":
        return Batch(**{name: None if x is None else x[chosen] for name, x in self._items()})

    def _items(self):
        return [(field.name, getattr(self, field.name)) for field in fields(self)]


class MaskedLMConfig(Config):
    kind: Literal["masked_lm"]
    mask_ratio: float = Field(0.15, gt=0, lt=1)  # of a window's tokens: K = round(mask_ratio · T)
    mask_share: float = Field(0.8, ge=0, le=1)  # of the targets: replaced by [MASK]
    random_share: float = Field(0.1, ge=0, le=1)  # replaced by a random token; the rest stays

    @model_validator(mode="after")
    def _shares(self) -> "MaskedLMConfig":
        if self.mask_share + self.random_share > 1:
            raise ValueError(
                f"objective.mask_share = {self.mask_share} and objective.random_share = {self.random_share} "
                "are more than 1 together"
            )
        return self


class CausalLMConfig(Config):
    kind: Literal["causal_lm"]


ObjectiveConfig = MaskedLMConfig | CausalLMConfig


class MaskedLM:
    """Predict K masked tokens of a window from both sides (Devlin et al. 2018, arXiv:1810.04805, section 3.1).

    Exactly K = round(mask_ratio · T) positions are drawn without replacement among those that hold text; masks are a
    hash of (seed, place of the window in the run), so the next epoch draws others. The window's first and last
    position become [CLS] and [SEP] unless they are: a cut document loses at most 2 tokens a window. A window of
    almost nothing but marks leaves slots empty (weight 0).
    """

    causal = False
    lead = 0

    def __init__(self, config: MaskedLMConfig, specials: dict[str, int], vocab_size: int, seq_len: int, seed: int):
        if "mask" not in specials:
            raise ConfigError(
                "objective masked_lm needs a vocabulary with a mask token",
                f"this tokenizer has only: {', '.join(specials)}",
                "use a tokenizer of kind bert, or objective.kind=causal_lm",
            )
        self.config, self.specials, self.vocab_size, self.seed = config, specials, vocab_size, seed
        self.targets = max(1, round(config.mask_ratio * seq_len))
        self.plain = np.setdiff1d(np.arange(vocab_size), list(specials.values()))  # what a random token may be

    def batch(self, ids: np.ndarray, keys: np.ndarray) -> Batch:
        """Rows (B, T) and the key (B,) of each → Batch. A pure function of both and the seed."""
        B, T = ids.shape
        special = self.specials
        inputs = ids.astype(np.int64)
        inputs[:, 0] = special["cls"]
        inputs[:, -1] = special["sep"]
        starts = inputs == special["cls"]
        maskable = ~np.isin(inputs, list(special.values()))

        draw = hash64(MASK, self.seed, keys[:, None], np.arange(T)) >> np.uint64(1)
        draw = np.where(maskable, draw, draw | np.uint64(1) << np.uint64(63))  # marks come last
        chosen = np.argpartition(draw, self.targets - 1, axis=1)[:, : self.targets] if self.targets < T else None
        chosen = np.sort(chosen if chosen is not None else np.tile(np.arange(T), (B, 1)), axis=1)
        row = np.arange(B)[:, None]
        filled = maskable[row, chosen]
        targets = inputs[row, chosen]

        share = (hash64(REPLACE, self.seed, keys[:, None], chosen) >> np.uint64(11)) * 2.0**-53  # [0, 1)
        other = hash64(RANDOM_TOKEN, self.seed, keys[:, None], chosen) % np.uint64(len(self.plain))
        config = self.config
        shown = np.where(share < config.mask_share + config.random_share, self.plain[other.astype(np.int64)], targets)
        shown = np.where(share < config.mask_share, special["mask"], shown)
        inputs[row, chosen] = np.where(filled, shown, targets)
        segments, position_ids = layout(starts)
        return Batch(
            inputs=torch.from_numpy(inputs),
            targets=torch.from_numpy(targets),
            target_index=torch.from_numpy(chosen.astype(np.int64)),
            weights=torch.from_numpy(filled.astype(np.float32)),
            segments=torch.from_numpy(segments),
            position_ids=torch.from_numpy(position_ids),
        )


class CausalLM:
    """Predict every token from those before it in its document.

    A document begins at the end mark that closes its predecessor: that mark is the predecessor's last target and the
    first input of the next, a constant, so every position is a target, the end is learned and nothing leaks.
    """

    causal = True
    lead = 1

    def __init__(self, config: CausalLMConfig, specials: dict[str, int], vocab_size: int, seq_len: int, seed: int):
        self.end = specials["eod" if "eod" in specials else "sep"]
        self.targets = seq_len

    def batch(self, ids: np.ndarray, keys: np.ndarray) -> Batch:
        """Rows (B, T + 1), the first id being the one before the window → Batch of T inputs and T targets."""
        ids = ids.astype(np.int64)
        inputs = ids[:, :-1]
        segments, position_ids = layout(inputs == self.end)
        return Batch(
            inputs=torch.from_numpy(np.ascontiguousarray(inputs)),
            targets=torch.from_numpy(np.ascontiguousarray(ids[:, 1:])),
            target_index=None,
            weights=None,
            segments=torch.from_numpy(segments),
            position_ids=torch.from_numpy(position_ids),
        )


OBJECTIVES = {"masked_lm": MaskedLM, "causal_lm": CausalLM}
Objective = MaskedLM | CausalLM


def layout(starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(B, T) bool, True where a document starts → its number and the positions inside it, both (B, T) int64.

    What stands before the first start of a row is a document too: the rest of one cut by the window.
    """
    segments = np.cumsum(starts, axis=1, dtype=np.int64)
    index = np.arange(starts.shape[1], dtype=np.int64)
    return segments, index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)


class Learner(nn.Module):
    """A model with its loss: what an engine wraps. `forward(batch)` is Σ weight · nll over the slots, in fp32."""

    def __init__(self, model: Transformer):
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, each: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """The summed loss; or, with `each`, per slot the nll (nats, fp32) and the likeliest token, both (B, K)."""
        hidden = self.model(batch.inputs, batch.segments, batch.position_ids)
        if batch.target_index is not None:
            hidden = hidden.gather(1, batch.target_index[..., None].expand(-1, -1, hidden.shape[-1]))  # (B, K, D)
        logits = self.model.logits(hidden).float()
        nll = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none").view_as(batch.targets)
        if each:
            return nll, logits.argmax(-1)
        return nll.sum() if batch.weights is None else (nll * batch.weights).sum()
