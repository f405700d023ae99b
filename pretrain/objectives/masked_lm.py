"""Masked language modelling: predict replaced tokens from the text on both sides of them."""

from collections import Counter
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from pretrain.config import Config
from pretrain.errors import ConfigError
from pretrain.hashing import RANDOM_TOKEN, REPLACE, fraction
from pretrain.objectives import masking
from pretrain.objectives.batch import Batch, documents, joined
from pretrain.objectives.objective import Ask, Objective, ObjectiveConfig
from pretrain.order.rows import Rows
from pretrain.tokenizer import Tokenizer
from pretrain.tokenizer.kinds import ROLES

# The share of tokens that is masked in held-out text, in all runs (as in ModernBERT), so that their scores compare.
HELD_OUT_RATIO = 0.15


class SpanConfig(Config):
    """Spans of units that are masked together, with geometric lengths (Joshi et al. 2020, arXiv:1907.10529)."""

    p: float = Field(0.2, gt=0, lt=1)
    """The probability that a span ends after each unit. With 0.2 and a `longest` of 10 the mean is 3.8 units."""
    longest: int = Field(10, gt=0, le=1000)
    """The most units of a span."""


class MaskedLMConfig(ObjectiveConfig):
    """Masked language modelling: predict replaced tokens from both sides."""

    kind: Literal["masked_lm"]
    """The name of the objective."""
    mask_ratio: float = Field(0.15, gt=0, lt=1)
    """The share of a window's tokens that are targets: K = round(mask_ratio · T)."""
    mask_share: float = Field(0.8, ge=0, le=1)
    """The share of the targets that are replaced by [MASK]."""
    random_share: float = Field(0.1, ge=0, le=1)
    """The share of the targets that are replaced by a random token. The remaining targets stay as they are."""
    unit: Literal["token", "word"] = "token"
    """The unit that is masked as a whole. For Chinese words run the stage `words` first."""
    span: SpanConfig | None = None
    """Mask spans of several units; null: mask single units."""

    @model_validator(mode="after")
    def _shares(self) -> "MaskedLMConfig":
        if self.mask_share + self.random_share > 1:
            raise ValueError(
                f"objective.mask_share = {self.mask_share} and objective.random_share = {self.random_share} "
                "are more than 1 together"
            )
        return self


class MaskedLM(Objective):
    """Predict K masked tokens of a window from both sides (Devlin et al. 2018, arXiv:1810.04805, section 3.1).

    Exactly K = round(mask_ratio · T) of the tokens of text are targets, each with the same probability, alone or in
    words or spans (masking.py). The draw is a hash of the seed and the place of the window in the run, so the next
    epoch draws other targets. The first and the last position of a window become [CLS] and [SEP], if they are not yet,
    so a document that is cut loses at most 2 tokens a window. So do the first and the last position of every part of a
    document in a packed window. Slots stay empty (weight 0) in a window of almost only special tokens, and
    in a window with padding in proportion to its padding.

    One draw decides whether a word or a span is shown as [MASK], as random tokens or unchanged, as in SpanBERT. (BERT's
    own whole-word code draws for each token, so the model sees words that are half masked.)
    """

    Config = MaskedLMConfig
    causal = False
    asked = "tokens shown as the mask, 15 % of the text"

    def __init__(self, config: MaskedLMConfig, specials: dict[str, int], vocab_size: int, seq_len: int, seed: int):
        check_maskable(config.kind, specials, seq_len)
        super().__init__(config, specials, vocab_size, seq_len, seed)
        self.specials, self.seed = specials, seed
        self.wants_words = self.needs_words(config)
        self.targets = max(1, round(config.mask_ratio * seq_len))
        self.special = special_ids(specials, vocab_size)
        self.plain = np.flatnonzero(~self.special).astype(np.int32)  # the ids that a random token may have

    @classmethod
    def needs_words(cls, config: MaskedLMConfig) -> bool:
        return config.unit == "word"

    @classmethod
    def heldout(cls, config: MaskedLMConfig) -> MaskedLMConfig:
        """15 % of the tokens are targets, one by one, and all of them are shown as [MASK].

        In training some targets are shown unchanged, and a model may copy them. In held-out text such targets would
        allow a predictor without context to score below the entropy of the targets.
        """
        return MaskedLMConfig(kind="masked_lm", mask_ratio=HELD_OUT_RATIO, mask_share=1, random_share=0)

    def batch(self, rows: Rows, keys: np.ndarray) -> Batch:
        inputs = rows.ids.astype(np.int32)
        inputs[rows.part_ends()] = self.specials["sep"]
        inputs[rows.begins] = self.specials["cls"]
        marks = np.take(self.special, inputs)
        # Padding is drawn like a token and its slot stays empty, so tokens beside padding are not drawn more often.
        never = marks if rows.text is None else marks & rows.text
        draws = masking.Draws(self.seed, keys, inputs.shape[1])
        chosen, unit = self._chosen(never, draws, rows.words)
        at = chosen + np.arange(0, inputs.size, inputs.shape[1])[:, None]
        targets = inputs.ravel()[at]
        filled = ~marks.ravel()[at]
        inputs.ravel()[at] = self._shown(targets, filled, chosen, unit, draws)
        segments, position_ids = documents(rows.part_starts())
        return Batch(
            inputs=inputs,
            targets=targets,
            target_index=chosen.astype(np.int32),
            weights=filled.astype(np.float32),
            segments=segments,
            position_ids=position_ids,
        )

    def preview(self, windows: list[Batch], ask: Ask) -> np.ndarray:
        """The likeliest token of every target, (B, K)."""
        return ask(joined(windows))["likeliest"]

    def preview_text(self, window: Batch, predicted: np.ndarray, tokenizer: Tokenizer) -> str:
        """The text of the window, with every target as [guess] or [guess ≠ truth]."""
        shown = [tokenizer.token_text(i) for i in window.inputs[0].tolist()]
        columns = (*_first_targets(window), predicted)
        for at, truth, weight, guess in zip(*(column.tolist() for column in columns), strict=True):
            if weight:
                text = tokenizer.token_text(guess)
                shown[at] = f"**[{text}]**" if guess == truth else f"**[{text} ≠ {tokenizer.token_text(truth)}]**"
        return " ".join(shown)

    def marked(self, window: Batch, tokenizer: Tokenizer) -> tuple[list[str], str]:
        """Targets are written ⟨shown → truth⟩. The line counts the targets by how they are shown."""
        inputs = window.inputs[0].tolist()
        kinds: Counter[str] = Counter()
        shown = [tokenizer.token_text(token) for token in inputs]
        for at, truth, weight in zip(*(column.tolist() for column in _first_targets(window)), strict=True):
            if not weight:
                kinds["empty"] += 1
                continue
            mask = inputs[at] == self.specials["mask"]
            kinds["[MASK]" if mask else "left as it is" if inputs[at] == truth else "another token"] += 1
            shown[at] = f"⟨{shown[at]} → {tokenizer.token_text(truth)}⟩"
        said = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        return shown, f"{kinds.total()} targets of {len(inputs)} tokens: {said}"

    def _chosen(
        self, marks: np.ndarray, draws: masking.Draws, words: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The positions of the targets, and for each the first position of its unit, both (B, K)."""
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
    ) -> np.ndarray:
        """The ids that the model sees in place of the targets, (B, K)."""
        config = self.config
        rows = np.arange(len(unit))[:, None]
        share = fraction(draws.at(REPLACE, rows, unit))
        masked = filled & (share < config.mask_share)
        random = filled & (share >= config.mask_share) & (share < config.mask_share + config.random_share)
        shown = np.where(masked, np.int32(self.specials["mask"]), targets)
        at = masking.flat(random)
        other = draws.at(RANDOM_TOKEN, at // self.targets, chosen.ravel()[at]) % np.uint64(len(self.plain))
        shown.ravel()[at] = self.plain[other.astype(np.int64)]
        return shown


def check_maskable(kind: str, specials: dict[str, int], seq_len: int) -> None:
    """Raise ConfigError if nothing can be masked for objective `kind`."""
    if "mask" not in specials:
        raise ConfigError(
            f"objective {kind} needs a vocabulary with a mask token",
            f"this tokenizer has only: {', '.join(role for role in specials if role in ROLES)}",
            "use a tokenizer of kind bert, or objective.kind=causal_lm with a decoder",
        )
    if seq_len < 3:
        raise ConfigError(
            f"seq_len = {seq_len} leaves nothing to mask",
            f"a window of objective {kind} has [CLS] and [SEP] in it, and text between them",
            "set seq_len to at least 3",
        )


def special_ids(specials: dict[str, int], vocab_size: int) -> np.ndarray:
    """(V,) bool: True for the special tokens that have a role. The others are treated as text."""
    found = np.zeros(vocab_size, bool)
    found[[number for name, number in specials.items() if name in ROLES]] = True
    return found


def _first_targets(window: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The positions of the targets of the first window of a batch, the targets, and their weights, each (K,)."""
    assert window.target_index is not None and window.weights is not None, "a masked batch lists its targets"
    return window.target_index[0], window.targets[0], window.weights[0]
