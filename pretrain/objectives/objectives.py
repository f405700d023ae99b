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
from pretrain.hashing import RANDOM_TOKEN, REPLACE
from pretrain.model.transformer import Transformer
from pretrain.objectives import masking
from pretrain.order.packed import BEGINS, FREE, GOES_ON


@dataclass(frozen=True)
class Batch:
    """One micro-batch, in int32: half the bytes to make and to move. Slot k of window b asks for targets[b, k]."""

    inputs: Tensor  # (B, T)
    targets: Tensor  # (B, K)
    target_index: Tensor | None  # (B, K), ascending: where the targets stand; None: K = T, slot k is position k
    weights: Tensor | None  # (B, K) float32, 0 for an empty slot; None: every slot is filled
    segments: Tensor | None  # (B, T): number of the document inside the window; None: each window holds one document
    position_ids: Tensor  # (B, T): restarting at every document

    def to(self, device: torch.device) -> "Batch":
        return Batch(**{name: None if x is None else x.to(device, non_blocking=True) for name, x in self._items()})

    def filled(self) -> int:
        """Number of slots that count."""
        return self.targets.numel() if self.weights is None else int((self.weights > 0).sum())

    def rows(self, chosen: slice) -> "Batch":
        return Batch(**{name: None if x is None else x[chosen] for name, x in self._items()})

    def _items(self):
        return [(field.name, getattr(self, field.name)) for field in fields(self)]


class SpanConfig(Config):
    """Runs of units masked together: their length is geometric (Joshi et al. 2020, arXiv:1907.10529, section 3.1)."""

    p: float = Field(0.2, gt=0, lt=1)  # of a span to end after each unit; 3.8 units in the mean at 0.2 and 10
    longest: int = Field(10, gt=0, le=1000)


class MaskedLMConfig(Config):
    kind: Literal["masked_lm"]
    mask_ratio: float = Field(0.15, gt=0, lt=1)  # of a window's tokens: K = round(mask_ratio · T)
    mask_share: float = Field(0.8, ge=0, le=1)  # of the targets: replaced by [MASK]
    random_share: float = Field(0.1, ge=0, le=1)  # replaced by a random token; the rest stays
    unit: Literal["token", "word"] = "token"  # what is masked as a whole; Chinese words need the stage `words`
    span: SpanConfig | None = None  # mask spans of several units

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

    Exactly K = round(mask_ratio · T) of the tokens that hold text are asked for, each with the same probability, alone
    or in words or spans (masking.py); what is drawn is a hash of (seed, place of the window in the run), so the next
    epoch draws anew. The window's first and last position become [CLS] and [SEP] unless they are: a cut document loses
    at most 2 tokens a window. So do the first and the last of every part of a document in a packed window. A window of
    almost nothing but marks leaves slots empty (weight 0), and one with padding as many as its share of it.

    A word or a span is shown as [MASK], as random tokens or as it is in one piece: one draw for all of its tokens, as
    SpanBERT has it. (BERT's own whole-word code draws for each token, which shows the model words half masked.)
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
        if seq_len < 3:
            raise ConfigError(
                f"seq_len = {seq_len} leaves nothing to mask",
                "a window of objective masked_lm has [CLS] and [SEP] in it, and text between them",
                "set seq_len to at least 3",
            )
        self.config, self.specials, self.seed = config, specials, seed
        self.wants_words = config.unit == "word"
        self.targets = max(1, round(config.mask_ratio * seq_len))
        self.special = np.zeros(vocab_size, bool)
        self.special[list(specials.values())] = True
        self.plain = np.flatnonzero(~self.special).astype(np.int32)  # what a random token may be

    def batch(
        self, ids: np.ndarray, keys: np.ndarray, words: np.ndarray | None = None, laid: np.ndarray | None = None
    ) -> Batch:
        """Rows (B, T), the key (B,) of each, if `wants_words` where words begin (B, T), and of packed windows how they
        are laid out (B, T) → Batch. A pure function of these and the seed.
        """
        inputs = ids.astype(np.int32)
        if laid is None:
            inputs[:, 0] = self.specials["cls"]
            inputs[:, -1] = self.specials["sep"]
            marks = never = np.take(self.special, inputs)
        else:
            free = laid == FREE
            inputs[_last(laid)] = self.specials["sep"]
            inputs[laid == BEGINS] = self.specials["cls"]
            marks = np.take(self.special, inputs)
            # A free place is drawn like a token and its slot left empty: so tokens beside padding are not drawn more.
            never = marks & ~free
        draws = masking.Draws(self.seed, keys, inputs.shape[1])
        chosen, unit = self._chosen(never, draws, words)
        at = chosen + np.arange(0, inputs.size, inputs.shape[1])[:, None]
        targets = inputs.ravel()[at]
        filled = ~marks.ravel()[at]
        inputs.ravel()[at] = self._shown(targets, filled, chosen, unit, draws)
        segments, position_ids = layout(inputs == self.specials["cls"]) if laid is None else layout(_firsts(laid))
        return Batch(
            inputs=torch.from_numpy(inputs),
            targets=torch.from_numpy(targets),
            target_index=torch.from_numpy(chosen.astype(np.int32)),
            weights=torch.from_numpy(filled.astype(np.float32)),
            segments=None if segments is None else torch.from_numpy(segments),
            position_ids=torch.from_numpy(position_ids),
        )

    def _chosen(self, marks: np.ndarray, draws: masking.Draws, words: np.ndarray | None):
        """The positions asked for and the first position of the unit of each, both (B, K)."""
        assert self.wants_words == (words is not None), "words are given where, and only where, they are wanted"
        span = self.config.span
        if words is None and span is None:
            chosen = masking.tokens(marks, draws, self.targets)
            return chosen, chosen
        begins = ~marks if words is None else words
        if span is not None:
            begins = masking.spans(begins, marks, draws, span.p, span.longest)
        return masking.units(begins, marks, draws, self.targets)

    def _shown(
        self, targets: np.ndarray, filled: np.ndarray, chosen: np.ndarray, unit: np.ndarray, draws: masking.Draws
    ):
        """What stands in the place of the targets, (B, K)."""
        config = self.config
        rows = np.arange(len(unit))[:, None]
        share = (draws.at(REPLACE, rows, unit) >> np.uint64(11)) * 2.0**-53  # [0, 1)
        masked = filled & (share < config.mask_share)
        random = filled & (share >= config.mask_share) & (share < config.mask_share + config.random_share)
        shown = np.where(masked, np.int32(self.specials["mask"]), targets)
        at = masking.flat(random)
        other = draws.at(RANDOM_TOKEN, at // self.targets, chosen.ravel()[at]) % np.uint64(len(self.plain))
        shown.ravel()[at] = self.plain[other.astype(np.int64)]
        return shown


class CausalLM:
    """Predict every token from those before it in its document.

    A document begins at the end mark that closes its predecessor: that mark is the predecessor's last target and the
    first input of the next, a constant, so every position is a target, the end is learned and nothing leaks.
    """

    causal = True
    lead = 1
    wants_words = False

    def __init__(self, config: CausalLMConfig, specials: dict[str, int], vocab_size: int, seq_len: int, seed: int):
        self.end = specials["eod" if "eod" in specials else "sep"]
        self.targets = seq_len

    def batch(
        self, ids: np.ndarray, keys: np.ndarray, words: np.ndarray | None = None, laid: np.ndarray | None = None
    ) -> Batch:
        """Rows (B, T + 1), the first id being the one before the window → Batch of T inputs and T targets.

        Inputs and targets are views of one array. Of packed windows, rows (B, 2, T) are what precedes each id and the
        ids, and `laid` (B, T) is how they are laid out: what is free has weight 0.
        """
        ids = np.ascontiguousarray(ids, np.int32)
        if laid is None:
            inputs, targets, weights = ids[:, :-1], ids[:, 1:], None
            segments, position_ids = layout(inputs == self.end)
        else:
            inputs, targets = ids[:, 0], ids[:, 1]
            weights = torch.from_numpy((laid != FREE).astype(np.float32))
            segments, position_ids = layout(_firsts(laid))
        return Batch(
            inputs=torch.from_numpy(inputs),
            targets=torch.from_numpy(targets),
            target_index=None,
            weights=weights,
            segments=None if segments is None else torch.from_numpy(segments),
            position_ids=torch.from_numpy(position_ids),
        )


OBJECTIVES = {"masked_lm": MaskedLM, "causal_lm": CausalLM}
Objective = MaskedLM | CausalLM


def _firsts(laid: np.ndarray) -> np.ndarray:
    """(B, T) layout of packed windows → True where a part of a document begins, or the free space."""
    free = laid == FREE
    firsts = laid == BEGINS
    firsts[:, 0] |= free[:, 0]
    firsts[:, 1:] |= free[:, 1:] & ~free[:, :-1]
    return firsts


def _last(laid: np.ndarray) -> np.ndarray:
    """(B, T) layout of packed windows → True at the last token of every part of a document."""
    last = laid != FREE
    last[:, :-1] &= laid[:, 1:] != GOES_ON
    return last


def layout(starts: np.ndarray) -> tuple[np.ndarray | None, np.ndarray]:
    """(B, T) bool, True where a document starts → its number and the positions inside it, both (B, T) int32.

    What stands before the first start of a row is a document too: the rest of one cut by the window. There are no
    numbers (None) where every row is one document. That is known here, on the host, so no device is asked for it.
    """
    B, T = starts.shape
    begins = starts.copy()
    begins[:, 0] = True
    at = masking.flat(begins).astype(np.int32)  # few, so that what follows copies long runs
    if len(at) == B:
        return None, np.tile(masking.places(T), (B, 1))
    first = at.searchsorted(masking.places(B * T + 1)[::T])  # of each row, among all
    lengths = masking.gaps(at, B * T)
    number = masking.places(len(at)) - (first[:-1] - starts[:, 0]).astype(np.int32).repeat(first[1:] - first[:-1])
    position_ids = masking.places(B * T) - at.repeat(lengths)
    return number.repeat(lengths).reshape(B, T), position_ids.reshape(B, T)


class Learner(nn.Module):
    """A model with its loss: what an engine wraps. `forward(batch)` is Σ weight · nll over the slots, in fp32."""

    def __init__(self, model: Transformer):
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, each: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """The summed loss; or, with `each`, per slot the nll (nats, fp32) and the likeliest token, both (B, K)."""
        hidden = self.model(batch.inputs, batch.segments, batch.position_ids)
        if batch.target_index is not None:
            index = batch.target_index.long()[..., None].expand(-1, -1, hidden.shape[-1])
            hidden = hidden.gather(1, index)  # (B, K, D)
        logits = self.model.logits(hidden).float()
        targets = batch.targets.long()
        nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
        if each:
            return nll, logits.argmax(-1)
        return nll.sum() if batch.weights is None else (nll * batch.weights).sum()
