"""Replaced-token detection: a small generator fills in masked tokens, and the model says which tokens are replaced."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from pretrain.hashing import GENERATED, fraction
from pretrain.objectives import masking
from pretrain.objectives.batch import Batch, joined
from pretrain.objectives.masked_lm import MaskedLM, MaskedLMConfig, SpanConfig, check_maskable
from pretrain.objectives.objective import Ask, Objective, ObjectiveConfig
from pretrain.order.rows import Rows
from pretrain.tokenizer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from pretrain.model.transformer import Transformer


class ReplacedTokenDetectionConfig(ObjectiveConfig):
    """Replaced-token detection with a generator, whose shape is `model.generator`."""

    kind: Literal["replaced_token_detection"]
    """The name of the objective."""
    mask_ratio: float = Field(0.15, gt=0, lt=1)
    """The share of a window's tokens that the generator fills in."""
    unit: Literal["token", "word"] = "token"
    """The unit that is masked as a whole. For Chinese words run the stage `words` first."""
    span: SpanConfig | None = None
    """Mask spans of several units; null: mask single units."""
    detection_weight: float = Field(50.0, gt=0)
    """The weight of the mean loss of the detection, beside 1 for that of the generator."""


BELOW_ONE = 1 - 2.0**-24  # the largest number below 1 that fp32 has


@dataclass(frozen=True)
class ReplacedBatch(Batch):
    """A batch whose targets are the true tokens, and whose slots are all places of text.

    The generator sees `inputs`, in which the chosen tokens are masked.
    """

    chosen: Any  # (B, K), ascending: the positions of the masked tokens
    masked: Any  # (B, K) float32, 0 for an empty slot
    draws: Any  # (B, K) float32 in [0, 1): the generator draws the token of each slot with it


class ReplacedTokenDetection(Objective):
    """Say of every token whether a generator has replaced it (Clark et al. 2020, arXiv:2003.10555, section 2).

    The generator is trained as a masked language model on K tokens of a window, all of which it sees as [MASK]. Each is
    then replaced by a token that is drawn from its distribution. A token that happens to be the true one counts as not
    replaced. The number that a token is drawn with is a hash of the seed and the place of the window in the run, so a
    step depends on nothing but the shards, the seed and the weights. No gradient goes through the draw.
    """

    Config = ReplacedTokenDetectionConfig
    composition = "generator"
    causal = False
    asked = "all tokens, of which the generator has replaced some: is this one replaced?"
    without_context = "the loss of a predictor that is told each token and has counted how often it is a replaced one"

    def __init__(
        self,
        config: ReplacedTokenDetectionConfig,
        specials: dict[str, int],
        vocab_size: int,
        seq_len: int,
        seed: int,
    ):
        super().__init__(config, specials, vocab_size, seq_len, seed)
        check_maskable(config.kind, specials, seq_len)
        keys = {"mask_ratio": config.mask_ratio, "unit": config.unit, "span": config.span}
        masked = MaskedLMConfig(kind="masked_lm", mask_share=1, random_share=0, **keys)
        self.generator = MaskedLM(masked, specials, vocab_size, seq_len, seed)
        self.seed, self.wants_words = seed, self.generator.wants_words
        self.parts = {"generator": 1.0, "detection": config.detection_weight}
        self.targets = self.generator.targets  # rows of the generator that are projected onto the vocabulary
        self.outcomes = (vocab_size, 2)

    @classmethod
    def needs_words(cls, config: ReplacedTokenDetectionConfig) -> bool:
        return config.unit == "word"

    @classmethod
    def heldout(cls, config: ReplacedTokenDetectionConfig) -> ReplacedTokenDetectionConfig:
        """As many tokens are filled in as in training, one by one.

        The scores of two runs do not compare in any case, because each has its own generator. With another ratio the
        model would expect more or fewer tokens to be replaced than are.
        """
        return ReplacedTokenDetectionConfig(kind=config.kind, mask_ratio=config.mask_ratio)

    def batch(self, rows: Rows, keys: np.ndarray) -> ReplacedBatch:
        """T slots a window, of which those without text have weight 0."""
        masked = self.generator.batch(rows, keys)
        assert masked.target_index is not None, "a masked batch lists its targets"
        at = masked.target_index + np.arange(0, masked.inputs.size, masked.inputs.shape[1])[:, None]
        true = masked.inputs.copy()
        true.ravel()[at] = masked.targets
        draws = masking.Draws(self.seed, keys, masked.inputs.shape[1])
        row = np.arange(len(at))[:, None]
        return ReplacedBatch(
            inputs=masked.inputs,
            targets=true,
            target_index=None,
            weights=np.ones(true.shape, np.float32) if rows.text is None else rows.text.astype(np.float32),
            segments=masked.segments,
            position_ids=masked.position_ids,
            chosen=masked.target_index,
            masked=masked.weights,
            draws=np.minimum(fraction(draws.at(GENERATED, row, masked.target_index)), BELOW_ONE).astype(np.float32),
        )

    def counts(self, batch: Batch) -> dict[str, int]:
        assert isinstance(batch, ReplacedBatch)
        return {"generator": int((batch.masked > 0).sum()), "detection": batch.filled()}

    def loss(self, model: "Transformer", batch: Batch) -> "dict[str, Tensor]":
        """The nll of the generator's targets, and the binary cross-entropy over all tokens, both in nats."""
        generated, shown = self._filled_in(model, batch)
        replaced = shown != batch.targets
        detected = model.head(model(shown, self.layout(batch)), replaced, batch.weights)
        return {"generator": generated, "detection": detected}

    def score(self, model: "Transformer", batch: Batch) -> "dict[str, Tensor]":
        """Of the detection. `targets` is 1 for a replaced token, and `seen` is the token that is shown, all (B, T)."""
        _, shown = self._filled_in(model, batch)
        replaced = (shown != batch.targets).long()
        nll, likeliest = model.head(model(shown, self.layout(batch)), replaced, each=True)
        return {"nll": nll, "likeliest": likeliest, "targets": replaced, "seen": shown}

    def _filled_in(self, model: Any, batch: Batch) -> "tuple[Tensor, Tensor]":
        """The summed loss of the generator, and the ids (B, T) in which its draws stand in place of the masks."""
        from pretrain.objectives import learner

        assert isinstance(batch, ReplacedBatch)
        chosen, true = batch.chosen.long(), batch.targets.long()
        rows = learner.rows_at(model.generator(batch.inputs, self.layout(batch)), chosen)
        wanted = true.gather(1, chosen)
        loss, drawn = model.generator.drawn(rows, wanted, batch.masked, batch.draws, self.config.z_loss)
        return loss, true.scatter(1, chosen, drawn.where(batch.masked > 0, wanted))

    def preview(self, windows: list[Batch], ask: Ask) -> np.ndarray:
        """The tokens that the model was shown, and for each 1 if it takes it for replaced, (B, 2T)."""
        found = ask(joined(windows))
        return np.concatenate([found["seen"], found["likeliest"]], axis=1)

    def preview_text(self, window: Batch, predicted: np.ndarray, tokenizer: Tokenizer) -> str:
        """The text as it was shown: **[found ≠ truth]**, ~~[missed ≠ truth]~~, and [suspected] without reason."""
        shown, suspected = np.split(predicted, 2)
        texts = []
        for token, truth, said in zip(shown.tolist(), window.targets[0].tolist(), suspected.tolist(), strict=True):
            text = tokenizer.token_text(token)
            if token != truth:
                text = f"[{text} ≠ {tokenizer.token_text(truth)}]"
                text = f"**{text}**" if said else f"~~{text}~~"
            elif said:
                text = f"[{text}]"
            texts.append(text)
        return " ".join(texts)

    def marked(self, window: Batch, tokenizer: Tokenizer) -> tuple[list[str], str]:
        """Tokens that the generator fills in are written ⟨token⟩."""
        assert isinstance(window, ReplacedBatch)
        shown = [tokenizer.token_text(token) for token in window.targets[0].tolist()]
        at = window.chosen[0][window.masked[0] > 0].tolist()
        for place in at:
            shown[place] = f"⟨{shown[place]}⟩"
        return shown, f"{len(at)} tokens that the generator fills in, of {window.filled()} that are judged"
