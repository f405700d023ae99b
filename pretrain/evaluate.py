"""Held-out loss on text the run has never seen: the same windows, masks and mask ratio at every evaluation.

Causal models are scored on the held-out stream as it stands, each token once, so that bits per byte divide by exactly
the raw text the targets cover. Masked models are scored at 15 % whatever they train with (as ModernBERT does), so
that runs stay comparable.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from pretrain.engine import Engine
from pretrain.interrupt import Interrupt
from pretrain.objectives import OBJECTIVES, Batch, MaskedLMConfig, ObjectiveConfig
from pretrain.ranks import World
from pretrain.shards import Shards
from pretrain.windows import Windows

EVALUATION_SEED = 15  # fixed, so that two runs of different seeds are scored alike
MASK_RATIO = 0.15


@dataclass(frozen=True)
class Scores:
    """Held-out results. `loss` in nats per target; accuracy of the likeliest token; bits per byte where defined."""

    loss: float
    accuracy: float
    targets: int
    bytes_per_target: float | None  # of raw text

    @property
    def bits_per_byte(self) -> float | None:
        return self.loss / math.log(2) / self.bytes_per_target if self.bytes_per_target else None

    def values(self) -> dict[str, float]:
        found = {"loss": self.loss, "accuracy": self.accuracy}
        return found | ({} if self.bits_per_byte is None else {"bits_per_byte": self.bits_per_byte})


def together(scores: list[Scores], weights: tuple[int, ...]) -> Scores:
    """The scores of a text mixed of corpora by `weights`: those of a phase's mixture.

    Not weighted by the held-out text there is: with the weights of the mixture the held-out loss is of the same text as
    the training loss, and it stays put when a corpus holds out more.
    """
    drawn = [(score, weight / sum(weights)) for score, weight in zip(scores, weights, strict=True) if weight]
    defined = all(score.bytes_per_target for score, _ in drawn)
    return Scores(
        loss=sum(part * score.loss for score, part in drawn),
        accuracy=sum(part * score.accuracy for score, part in drawn),
        targets=sum(score.targets for score, _ in drawn),
        bytes_per_target=sum(part * score.bytes_per_target for score, part in drawn) if defined else None,
    )


class HeldOut:
    """The held-out windows of a run: up to `max_tokens` from the start of the held-out stream."""

    def __init__(
        self, shards: Shards, objective: ObjectiveConfig, seq_len: int, max_tokens: int, token_bytes: np.ndarray | None
    ):
        if objective.kind == "masked_lm":
            objective = MaskedLMConfig(kind="masked_lm", mask_ratio=MASK_RATIO)
        self.windows = Windows(shards, seq_len, EVALUATION_SEED)
        self.objective = OBJECTIVES[objective.kind](
            objective, shards.specials, shards.vocab_size, seq_len, EVALUATION_SEED
        )
        self.seq_len, self.token_bytes = seq_len, token_bytes
        self.tokens = min(shards.tokens, max_tokens)
        self.count = -(-self.tokens // seq_len)

    def batch(self, numbers: np.ndarray) -> Batch:
        """Windows `numbers` (B,) of the held-out stream; the last, where it is short, counts only its new tokens."""
        starts = np.minimum(numbers * self.seq_len, max(0, self.windows.shards.tokens - self.seq_len))
        batch = self.objective.batch(self.windows.rows(starts, self.seq_len, self.objective.lead), numbers)
        seen = torch.from_numpy(numbers * self.seq_len - starts)  # targets an earlier window has scored
        position = torch.arange(self.seq_len)[None] if batch.target_index is None else batch.target_index
        first, last = seen[:, None], torch.from_numpy(self.tokens - starts)[:, None]
        weights = torch.ones(batch.targets.shape) if batch.weights is None else batch.weights
        weights = weights * ((position >= first) & (position < last))
        return Batch(**{**vars(batch), "weights": weights})

    def score(
        self, engine: Engine, world: World, micro_batch: int, interrupt: Interrupt | None = None
    ) -> Scores | None:
        """Loss over all windows, divided among the ranks; a collective. Leaves the module in training mode.

        With an `interrupt`, None as soon as a rank is asked to stop: the ranks agree on that before each batch.
        """
        sums = torch.zeros(4, dtype=torch.float64)  # nll, right, targets, bytes
        engine.train(False)
        with torch.no_grad():
            for batch in self._of_rank(world, micro_batch):
                if interrupt and engine.total(torch.tensor([float(interrupt.asked)])).item():
                    engine.train(True)
                    return None
                nll, likeliest = engine(batch, each=True)
                right = likeliest.cpu() == batch.targets
                weights = batch.weights.double()
                nbytes = 0.0
                if self.token_bytes is not None:
                    nbytes = float((torch.from_numpy(self.token_bytes[batch.targets.numpy()]) * weights).sum())
                nll_sum = float((nll.cpu().double() * weights).sum())
                sums += torch.tensor([nll_sum, float((right * weights).sum()), float(weights.sum()), nbytes])
        engine.train(True)
        nll, right, targets, nbytes = engine.total(sums).tolist()
        return Scores(
            loss=nll / targets,
            accuracy=right / targets,
            targets=round(targets),
            bytes_per_target=nbytes / targets if nbytes else None,
        )

    def _of_rank(self, world: World, micro_batch: int) -> Iterator[Batch]:
        """This rank's windows. Every rank gets as many batches (ZeRO 3 needs it); the surplus has weight 0."""
        rounds = -(-self.count // (micro_batch * world.size))
        for round_ in range(rounds):
            numbers = (round_ * world.size + world.rank) * micro_batch + np.arange(micro_batch)
            batch = self.batch(np.minimum(numbers, self.count - 1))
            yield Batch(**{**vars(batch), "weights": batch.weights * torch.from_numpy(numbers < self.count)[:, None]})


def unigram_entropy(counts: np.ndarray, leave_out: list[int] = ()) -> float:
    """Entropy in nats of the token distribution `counts` (V,): no model of single tokens can score below it.

    Ids in `leave_out` are not counted (marks, where the objective never asks for them).
    """
    counts = counts.astype(np.float64).copy()
    counts[list(leave_out)] = 0
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())
