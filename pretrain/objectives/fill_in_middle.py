"""Fill in the middle: a decoder learns to write the part that is missing between a prefix and a suffix."""

from typing import Literal

import numpy as np
from pydantic import Field

from pretrain.errors import ConfigError
from pretrain.hashing import MIDDLE, fraction, hash64
from pretrain.objectives.batch import Batch, joined
from pretrain.objectives.causal_lm import CausalLM
from pretrain.objectives.objective import Ask, ObjectiveConfig
from pretrain.objectives.prefix_lm import documents_of
from pretrain.order.rows import Rows
from pretrain.tokenizer import Tokenizer

MARKS = 3  # places that the marks of a document take
LEAST = 3  # tokens of text that a document must keep to be rearranged
SHOWN = 16  # the most tokens of each piece in a preview


class FillInMiddleConfig(ObjectiveConfig):
    """Fill in the middle: predict every token, after some documents are rearranged as prefix, suffix, middle."""

    kind: Literal["fill_in_middle"]
    """The name of the objective."""
    rate: float = Field(0.5, ge=0, le=1)
    """The share of documents that are rearranged. The others stay as they are."""
    spm_rate: float = Field(0.5, ge=0, le=1)
    """The share of these that begin with the suffix (SPM). The others begin with the prefix (PSM)."""
    targets: Literal["all", "middle"] = "all"
    """The targets in documents that are rearranged: all tokens, or those of the middle."""
    prefix_mark: str = "<fim_prefix>"
    """The special token before a prefix. It must be one of the tokenizer's `special_tokens`, like the other two."""
    suffix_mark: str = "<fim_suffix>"
    """The special token before a suffix."""
    middle_mark: str = "<fim_middle>"
    """The special token before a middle."""


class FillInMiddle(CausalLM):
    """Predict the next token in documents of which some are rearranged (Bavarian et al. 2022, arXiv:2207.14255).

    A document, or its part in a window, is cut at two places that are drawn evenly, and written as

        PSM   <prefix> prefix <suffix> suffix <middle> middle
        SPM   <prefix> <suffix> suffix <middle> prefix middle

    followed by the end mark if the document ends in the window. The marks take the places of its last three tokens, so
    windows keep their length. The draws are a hash of the seed and the place of the document in the run.
    """

    Config = FillInMiddleConfig
    asked = "the tokens of the middle, after prefix and suffix"

    def __init__(self, config: FillInMiddleConfig, specials: dict[str, int], vocab_size: int, seq_len: int, seed: int):
        super().__init__(config, specials, vocab_size, seq_len, seed)
        self.seed = seed
        names = {role: getattr(config, f"{role}_mark") for role in ("prefix", "suffix", "middle")}
        missing = [f"objective.{role}_mark = {name}" for role, name in names.items() if name not in specials]
        if missing:
            raise ConfigError(
                "objective fill_in_middle needs three marks in the vocabulary",
                f"no special token of this tokenizer: {', '.join(missing)}",
                f"train it with special_tokens: [{', '.join(names.values())}], or name those that it has",
            )
        self.marks = {role: specials[name] for role, name in names.items()}

    @classmethod
    def heldout(cls, config: FillInMiddleConfig) -> FillInMiddleConfig:
        """Every document is rearranged as prefix, suffix, middle, and only the middle is scored."""
        return config.model_copy(update={"rate": 1.0, "spm_rate": 0.0, "targets": "middle"})

    def batch(self, rows: Rows, keys: np.ndarray) -> Batch:
        """T targets a window, as in causal language modelling. Places without text have weight 0."""
        plain = super().batch(rows, keys)
        row, number, lengths = documents_of(plain)
        draws = hash64(MIDDLE, self.seed, keys[row], number, np.arange(4)[:, None])  # (4, n)
        rate, spm_rate = map(fraction, draws[:2])
        last = np.cumsum(lengths) - 1
        targets = plain.targets.ravel()
        ended = targets[last] == self.end
        kept = lengths - ended - MARKS  # tokens of text that stay
        text = True if plain.weights is None else plain.weights.ravel()[last - lengths + 1] > 0
        moved = text & (rate < self.config.rate) & (kept >= LEAST)
        cuts = np.sort((draws[2:] % np.maximum(kept + 1, 1).astype(np.uint64)).astype(np.int64), axis=0)

        each = [x.repeat(lengths) for x in (moved, *cuts, kept, spm_rate < self.config.spm_rate)]
        here, a, b, c, spm = each
        place = plain.position_ids.ravel().astype(np.int64)
        source, mark = self._sources(place, a, b, c, spm)
        source = np.where(place < MARKS + c, source, c + MARKS)  # the end mark stays at its place
        first = np.arange(len(place)) - place
        found = np.where(mark >= 0, mark, targets[np.where(here, first + np.maximum(source, 0), 0)])
        found = np.where(here, found, targets).astype(np.int32).reshape(plain.targets.shape)
        inputs = plain.inputs.copy()
        inputs[:, 1:] = np.where(plain.position_ids[:, 1:] == 0, inputs[:, 1:], found[:, :-1])
        weights = plain.weights
        if self.config.targets == "middle":
            middle = here & (place >= MARKS + c - (b - a)) & (place < MARKS + c)
            asked = (middle | ~here) if self.config.rate < 1 else middle
            asked = asked.astype(np.float32).reshape(inputs.shape)
            weights = asked if weights is None else asked * weights
        return Batch(inputs, found, None, weights, plain.segments, plain.position_ids)

    def _sources(
        self, place: np.ndarray, a: np.ndarray, b: np.ndarray, c: np.ndarray, spm: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """For each place of a document with `c` tokens, cut at `a` and `b`: the number of the token that comes there,
        and the mark, or -1."""
        suffix = np.where(spm, 1, a + 1)  # the place of the mark
        middle = suffix + 1 + c - b
        prefix_from = np.where(spm, middle + 1, 1)
        source = np.where(place > middle, np.where(spm, 0, a) + place - middle - 1, b + place - suffix - 1)
        source = np.where(~spm & (place < suffix), place - prefix_from, source)
        mark = np.where(place == 0, self.marks["prefix"], -1)
        mark = np.where(place == suffix, self.marks["suffix"], mark)
        return source, np.where(place == middle, self.marks["middle"], mark)

    def preview(self, windows: list[Batch], ask: Ask) -> np.ndarray:
        """The likeliest token after the true ones before it, at every place of a window, (B, T)."""
        return ask(joined(windows))["likeliest"]

    def preview_text(self, window: Batch, predicted: np.ndarray, tokenizer: Tokenizer) -> str:
        """The first document of the window: its prefix, the predicted and the true middle, and its suffix."""
        targets, places = window.targets[0], window.position_ids[0]
        document = slice(0, int(np.flatnonzero(places == 0)[1]) if (places == 0).sum() > 1 else len(places))
        ids = targets[document].tolist()
        if self.marks["middle"] not in ids:
            return tokenizer.decode(ids[:SHOWN])
        suffix, middle = ids.index(self.marks["suffix"]), ids.index(self.marks["middle"])
        end = middle + 1 + SHOWN
        before, after = ids[1:suffix][-SHOWN:], ids[suffix + 1 : middle][:SHOWN]
        guess, truth = predicted[document][middle + 1 : end].tolist(), ids[middle + 1 : end]
        shown = [tokenizer.decode(part) for part in (before, guess, truth, after)]
        return f"{shown[0]} **▸** {shown[1]} **≠** {shown[2]} **◂** {shown[3]}"

    def marked(self, window: Batch, tokenizer: Tokenizer) -> tuple[list[str], str]:
        shown = [tokenizer.token_text(token) for token in window.inputs[0].tolist()]
        return shown, f"{window.filled()} targets: every token's successor, in documents of which some are rearranged"
