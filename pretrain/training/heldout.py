"""Held-out loss on text the run has never seen: the same windows and masks at every evaluation, in every run.

The windows are spread over the whole held-out side by a keyed permutation: those of a larger `max_tokens` contain those
of a smaller one. Every token of the held-out text is scored at most once, so that bits per byte divide by exactly the
raw text that the targets cover. Runs on windows of whole documents are scored on such windows.

Beside each loss stands the no-context loss: the entropy of the distribution of the scored targets. No predictor that
ignores the context can score below it, so the gain over it is what a model makes of the context. For this to hold,
masked models are shown [MASK] in the place of every target: where some are shown as they are, as in training, a model
may copy them. They are asked for 15 % of the tokens whatever they train with (as ModernBERT does), so that runs stay
comparable.

The standard error of a loss is that of the mean over windows, taken as independent samples of text. Windows of one long
document are not quite independent, so it is a little too small where few documents are held out.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from pretrain.errors import ConfigError
from pretrain.hashing import CHOICE, permute
from pretrain.objectives.objectives import OBJECTIVES, Batch, MaskedLMConfig, ObjectiveConfig
from pretrain.order.packed import BLOCK_WINDOWS, PackedWindows
from pretrain.order.stream import Windows
from pretrain.processes.signals import Interrupt
from pretrain.shards import Shards
from pretrain.training.engine.engine import Engine
from pretrain.training.engine.ranks import World

EVALUATION_SEED = 15  # fixed, so that two runs of different seeds are scored alike
MASK_RATIO = 0.15
LEARNT = 0.02  # of the no-context loss: a gain of less is no sign that a model uses the context
STANDARD_ERRORS = 3  # nor is a gain of less of these


@dataclass(frozen=True)
class Scores:
    """Held-out results. Losses and their standard error in nats per target; accuracy of the likeliest token."""

    loss: float
    standard_error: float | None  # of `loss`, over windows; None: there is only one
    accuracy: float
    targets: int
    bytes_per_target: float | None  # of raw text; None: not defined for this tokenizer
    frequencies: np.ndarray = field(compare=False, repr=False)  # (V,) of each id among the targets

    @property
    def bits_per_byte(self) -> float | None:
        return self.loss / math.log(2) / self.bytes_per_target if self.bytes_per_target else None

    @property
    def no_context_loss(self) -> float:
        """The least loss on these targets of a predictor that ignores the context."""
        return entropy(self.frequencies)

    @property
    def gain(self) -> float:
        """By how many nats per target the model is better than that."""
        return self.no_context_loss - self.loss

    @property
    def learnt(self) -> bool:
        """Whether the gain is more than chance or a rounding would give.

        The frequencies fit their own targets: with K different ids among N targets the no-context loss is too low by
        about (K - 1) / 2N nats (Miller 1955), which is not held against the model.
        """
        fitted = (np.count_nonzero(self.frequencies) - 1) / (2 * self.targets)
        least = max(LEARNT * self.no_context_loss, STANDARD_ERRORS * (self.standard_error or 0))
        return bool(self.gain + fitted > least)

    def values(self) -> dict[str, float]:
        """The series of TensorBoard by name: what is defined."""
        return {name: value for name in VALUES if (value := getattr(self, name)) is not None}

    def record(self) -> dict[str, float | int | bool | None]:
        """As a line of a file has it."""
        return {name: getattr(self, name) for name in (*VALUES, "targets", "learnt")}


VALUES = ("loss", "standard_error", "no_context_loss", "gain", "accuracy", "bits_per_byte")


def together(scores: list[Scores], weights: tuple[int, ...]) -> Scores:
    """The scores of a text mixed of corpora by `weights`: those of a phase's mixture.

    Not weighted by the held-out text there is: with the weights of the mixture the held-out loss is of the same text as
    the training loss, and it stays put when a corpus holds out more.
    """
    drawn = [(score, weight / sum(weights)) for score, weight in zip(scores, weights, strict=True) if weight]
    errors = [score.standard_error for score, _ in drawn]
    defined = all(score.bytes_per_target for score, _ in drawn)
    return Scores(
        loss=sum(part * score.loss for score, part in drawn),
        standard_error=None if None in errors else math.hypot(*(part * score.standard_error for score, part in drawn)),
        accuracy=sum(part * score.accuracy for score, part in drawn),
        targets=sum(score.targets for score, _ in drawn),
        bytes_per_target=sum(part * score.bytes_per_target for score, part in drawn) if defined else None,
        frequencies=sum(part * score.frequencies for score, part in drawn),
    )


class HeldOut:
    """The held-out windows of a run: up to `max_tokens`, spread over the held-out side."""

    def __init__(
        self,
        shards: Shards,
        objective: ObjectiveConfig,
        seq_len: int,
        max_tokens: int,
        token_bytes: np.ndarray | None,
        packed: bool,
    ):
        """`packed`: windows of whole documents."""
        if objective.kind == "masked_lm":
            objective = MaskedLMConfig(kind="masked_lm", mask_ratio=MASK_RATIO, mask_share=1, random_share=0)
        self.objective = OBJECTIVES[objective.kind](
            objective, shards.specials, shards.vocab_size, seq_len, EVALUATION_SEED
        )
        self.seq_len, self.token_bytes, self.packed = seq_len, token_bytes, packed
        whole = shards.tokens // seq_len
        if packed:  # blocks of at most 64 windows that leave out less than a window for each of them
            blocks = -(-whole // BLOCK_WINDOWS)
            self.windows = PackedWindows(shards, whole // blocks * seq_len, EVALUATION_SEED)
            every = self.windows.blocks * self.windows.per_block(seq_len)
        else:
            self.windows = Windows(shards, seq_len, EVALUATION_SEED)
            every = -(-shards.tokens // seq_len)
        count = max(1, min(every, max_tokens // seq_len))
        self.spread = permute(np.arange(count), every, EVALUATION_SEED, CHOICE)
        self.numbers = np.sort(self.spread)  # (N,) of the windows that are scored, among all of the side

    def batch(self, numbers: np.ndarray) -> Batch:
        """Windows `numbers` (B,) of the held-out side; the last of a stream, where it is short, begins earlier and
        counts only its new tokens."""
        T, tokens = self.seq_len, self.windows.shards.tokens
        if self.packed:
            blocks, parts = np.divmod(numbers, self.windows.per_block(T))
            starts = self.windows.starts(blocks * self.windows.block_tokens + parts)
            rows, laid = self.windows.rows(starts, T, self.objective.lead), self.windows.layout(starts, T)
            batch = self.objective.batch(rows, numbers, laid=laid)
            return batch if batch.weights is not None else _weighted(batch, torch.ones(batch.targets.shape))
        starts = np.minimum(numbers * T, max(0, tokens - T))
        batch = self.objective.batch(self.windows.rows(starts, T, self.objective.lead), numbers)
        seen = torch.from_numpy(numbers * T - starts)[:, None]  # targets that an earlier window scores
        position = torch.arange(T)[None] if batch.target_index is None else batch.target_index
        weights = torch.ones(batch.targets.shape) if batch.weights is None else batch.weights
        return _weighted(batch, weights * (position >= seen))

    def score(
        self, engine: Engine, world: World, micro_batch: int, interrupt: Interrupt | None = None
    ) -> Scores | None:
        """Loss over all windows, divided among the ranks; a collective. Leaves the module in training mode.

        With an `interrupt`, None as soon as a rank is asked to stop: the ranks agree on that before each batch.
        """
        shards = self.windows.shards
        sums = torch.zeros(8, dtype=torch.float64)
        counts = torch.zeros(shards.vocab_size, dtype=torch.float64)  # of each id among the targets
        engine.train(False)
        with torch.no_grad():
            for batch in self._of_rank(world, micro_batch):
                if interrupt and engine.total(torch.tensor([float(interrupt.asked)])).item():
                    engine.train(True)
                    return None
                nll, likeliest = engine(batch, each=True)
                weights, targets = batch.weights.double(), batch.targets.long()
                right = (likeliest.cpu() == batch.targets) * weights
                nbytes = 0.0
                if self.token_bytes is not None:
                    nbytes = float((torch.from_numpy(self.token_bytes[targets.numpy()]) * weights).sum())
                counts.index_add_(0, targets.flatten(), weights.flatten())
                loss, asked = (nll.cpu().double() * weights).sum(1), weights.sum(1)  # of each window
                found = (loss, right, asked, asked > 0, loss * loss, loss * asked, asked * asked)
                sums += torch.tensor([*(float(each.sum()) for each in found), nbytes])
        engine.train(True)
        sums, counts = engine.total(torch.cat([sums, counts])).double().cpu().split([len(sums), len(counts)])
        loss, right, targets, windows, squared, crossed, sizes, nbytes = sums.tolist()
        if not targets:  # the one window of a tiny `max_tokens` may have nothing but marks
            raise ConfigError(
                "the held-out windows have no token to score",
                f"{shards.folder}: nothing is masked in {len(self.numbers)} windows of {self.seq_len} tokens",
                "raise max_tokens, the held-out tokens that are scored",
            )
        mean = loss / targets
        spread = max(0.0, squared - 2 * mean * crossed + mean * mean * sizes)  # Σ (loss - mean · targets)² of windows
        return Scores(
            loss=mean,
            standard_error=math.sqrt(spread * windows / (windows - 1)) / targets if windows > 1 else None,
            accuracy=right / targets,
            targets=round(targets),
            bytes_per_target=nbytes / targets if nbytes else None,
            frequencies=(counts / targets).numpy(),
        )

    def _of_rank(self, world: World, micro_batch: int) -> Iterator[Batch]:
        """This rank's windows. Every rank gets as many batches (ZeRO 3 needs it); the surplus has weight 0."""
        count = len(self.numbers)
        micro_batch = min(micro_batch, -(-count // world.size))  # no rank forwards more than there is
        for round_ in range(-(-count // (micro_batch * world.size))):
            at = (round_ * world.size + world.rank) * micro_batch + np.arange(micro_batch)
            batch = self.batch(self.numbers[np.minimum(at, count - 1)])
            yield _weighted(batch, batch.weights * torch.from_numpy(at < count)[:, None])


def _weighted(batch: Batch, weights: torch.Tensor) -> Batch:
    return Batch(**{**vars(batch), "weights": weights})


def entropy(frequencies: np.ndarray) -> float:
    """Entropy in nats of a distribution (V,) over tokens: no model of single tokens can score below it."""
    p = frequencies[frequencies > 0]
    return float(-(p * np.log(p)).sum())
