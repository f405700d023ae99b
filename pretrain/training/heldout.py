"""Held-out loss on text the run has never seen: the same windows and masks at every evaluation, in every run.

The windows are spread over the whole held-out side by a keyed permutation: those of a larger `max_tokens` contain those
of a smaller one. Every token of the held-out text is scored at most once, so that bits per byte divide by exactly the
raw text that the targets cover. Runs on windows of whole documents are scored on such windows.

Beside each loss stands the no-context loss: the entropy of the distribution of the scored targets. No predictor that
ignores the context can score below it, so the gain over it is what a model makes of the context. For this to hold,
masked models are shown [MASK] in the place of every target, whatever they train with (`Objective.heldout`).

The standard error of a loss is that of the mean over windows, taken as independent samples of text. Windows of one long
document are not quite independent, so it is a little too small where few documents are held out.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from pretrain.config import Config
from pretrain.errors import ConfigError
from pretrain.hashing import CHOICE, permute
from pretrain.objectives import OBJECTIVES
from pretrain.objectives.batch import Batch
from pretrain.order.packed import BLOCK_WINDOWS, PackedWindows
from pretrain.order.phases import Phase
from pretrain.order.stream import Windows
from pretrain.processes.signals import Interrupt
from pretrain.shards import Shards
from pretrain.training.engine.engine import Engine
from pretrain.training.engine.ranks import World
from pretrain.training.watch.log import duration
from pretrain.training.watch.metrics import flat_steps
from pretrain.training.watch.observer import Findings, Moment

EVALUATION_SEED = 15  # fixed, so that two runs of different seeds are scored alike
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


Sides = dict[str, "HeldOut"]  # held-out windows by the name of their corpus


class HeldOut:
    """The held-out windows of a run: up to `max_tokens`, spread over the held-out side."""

    def __init__(
        self,
        shards: Shards,
        objective: Config,
        seq_len: int,
        max_tokens: int,
        token_bytes: np.ndarray | None,
        packed: bool,
    ):
        """`objective`: the section of a run that trains with it. `packed`: windows of whole documents."""
        kind = OBJECTIVES[objective.kind]
        self.objective = kind(kind.heldout(objective), shards.specials, shards.vocab_size, seq_len, EVALUATION_SEED)
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
        else:
            starts = np.minimum(numbers * T, max(0, tokens - T))
        batch = self.objective.batch(self.windows.rows(starts, T, self.objective.wants_words), numbers)
        weights = np.ones(batch.targets.shape, np.float32) if batch.weights is None else batch.weights
        if not self.packed:
            seen = (numbers * T - starts)[:, None]  # targets that an earlier window scores
            position = np.arange(T)[None] if batch.target_index is None else batch.target_index
            weights = weights * (position >= seen)
        return batch.weighted(weights)

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
                nll, likeliest = engine(self.objective, batch, each=True)
                weights, targets = torch.from_numpy(batch.weights).double(), torch.from_numpy(batch.targets).long()
                right = (likeliest.cpu() == targets) * weights
                nbytes = 0.0
                if self.token_bytes is not None:
                    nbytes = float((torch.from_numpy(self.token_bytes[batch.targets]) * weights).sum())
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
            yield batch.weighted(batch.weights * (at < count)[:, None])


class HeldOutLoss:
    """The observer that scores the held-out text of every corpus.

    Its windows are as long as those of the step before it, and it scores what that step learnt. It does not take the
    last phase's: a model knows nothing of positions that it has not trained yet, and the curve of a length curriculum
    would stand still until its end.
    """

    name = "heldout"

    def __init__(
        self, run: Path, every_steps: int, phases: list[Phase], at_once: list[int], sides: list[Sides], world: World
    ):
        """`sides`: for each phase the held-out windows of every corpus by name; `at_once`: windows of a micro-batch."""
        self.every_steps = every_steps
        self._run, self._phases, self._at_once, self._sides, self._world = run, phases, at_once, sides, world

    def measure(self, engine: Engine, moment: Moment, interrupt: Interrupt) -> Findings | None:
        """The scores of each corpus, and under "" those of the mixture of the last step's phase."""
        started = time.perf_counter()
        each = {}
        for name, corpus in self._sides[moment.phase].items():
            scores = corpus.score(engine, self._world, self._at_once[moment.phase], interrupt)
            if scores is None:
                return None
            each[name] = scores
        mixture = together(list(each.values()), self._phases[moment.phase].weights(list(each)))
        ruined = f"the held-out loss at step {moment.step} is not finite: its weights are ruined"
        found, took = {**each, "": mixture}, duration(time.perf_counter() - started)
        return Findings(
            values={
                (f"heldout/{name}/" if name else "heldout/") + key: value
                for name, scores in found.items()
                for key, value in scores.values().items()
            },
            records={name: scores.record() for name, scores in found.items()},
            summary=_summary(found),
            lines=self._lines(found, moment, took) if self._world.speaks else [],
            ruined="" if math.isfinite(mixture.loss) else ruined,
        )

    def _lines(self, found: dict[str, Scores], moment: Moment, took: str) -> list[str]:
        lines = [f"held-out at step {moment.step}: {_shown(found[''], took)}"]
        names = [name for name in found if name]
        lines += [f"  {name.ljust(max(map(len, names)))}  {_shown(found[name])}" for name in names]
        if math.isfinite(found[""].loss) and not found[""].learnt:
            flat = flat_steps(self._run)
            if flat or moment.last:
                lines.append(_unlearnt(found[""], flat))
        return lines


def _summary(found: dict[str, Scores]) -> dict:
    """The entries of summary.json."""
    mixture = found[""]
    summary = {
        "heldout_loss": mixture.loss,
        "heldout_accuracy": mixture.accuracy,
        "heldout_bits_per_byte": mixture.bits_per_byte,
        "heldout_targets": mixture.targets,
        "heldout_standard_error": mixture.standard_error,  # of heldout_loss, over windows
        "no_context_loss": mixture.no_context_loss,  # the least of a predictor that ignores context, on these targets
        "heldout_gain": mixture.gain,  # over it
    }
    each = {name: scores.values() for name, scores in found.items() if name}
    return summary | ({"heldout": each} if each else {})


def _unlearnt(scores: Scores, flat: int) -> str:
    """In plain words that a model makes nothing of context; `flat`: steps in which its training loss did not fall."""
    lines = [
        "warning: this model predicts held-out text no better than token frequencies do",
        f"loss {scores.loss:.4f}; without any context {scores.no_context_loss:.4f} can be reached",
        f"the training loss has not fallen in the last {flat:,} steps" if flat else "",
        "train longer, try another optim.lr, or see what it reads: python launch/explain.py RUN --step N --sample 0",
    ]
    return "\n  ".join(filter(None, lines))


def _shown(scores: Scores, *notes: str) -> str:
    """`loss 3.8412 ± 0.0123  gain 2.1588  accuracy 0.3331  (12,345 targets, 0m02s)`."""
    values = scores.values()
    error = f" ± {values['standard_error']:.4f}" if "standard_error" in values else ""
    shown = (f"{key} {values[key]:.4f}" for key in ("gain", "accuracy", "bits_per_byte") if key in values)
    said = ", ".join([f"{scores.targets:,} targets", *notes])
    return "  ".join([f"loss {scores.loss:.4f}{error}", *shown, f"({said})"])


def entropy(frequencies: np.ndarray) -> float:
    """Entropy in nats of a distribution (V,) over tokens: no model of single tokens can score below it."""
    p = frequencies[frequencies > 0]
    return float(-(p * np.log(p)).sum())
