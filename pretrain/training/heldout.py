"""Held-out loss on text that the run never trains on: the same windows and masks at every evaluation, in every run.

A keyed permutation spreads the windows over the whole held-out side, and a larger `max_tokens` only adds windows. Every
token of the held-out text is scored at most once, so bits per byte are divided by exactly the raw text that the targets
cover. A run that trains on windows of whole documents is scored on such windows.

Each loss is reported with the no-context loss: the entropy of the distribution of the scored targets. No predictor that
ignores the context can score below it, so the gain over it measures how much a model uses the context. For this to
hold, masked models see [MASK] in the place of every target, whatever they train with (`Objective.heldout`). In
replaced-token detection a predictor knows which token is shown: there it is the loss of one that counts (`counted`).

The standard error of a loss is that of the mean over windows, taken as independent samples of text. Windows of one long
document are not quite independent, so it is a little too small where few documents are held out.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from pretrain.errors import ConfigError
from pretrain.hashing import CHOICE, permute
from pretrain.objectives import OBJECTIVES
from pretrain.objectives.batch import Batch
from pretrain.objectives.objective import Objective, ObjectiveConfig
from pretrain.order.packed import BLOCK_WINDOWS, PackedWindows
from pretrain.order.phases import Phase
from pretrain.order.stream import Windows
from pretrain.processes.signals import Interrupt
from pretrain.shards import Shards
from pretrain.training.engine.engine import Engine
from pretrain.training.engine.ranks import World
from pretrain.training.watch.log import duration
from pretrain.training.watch.metrics import evaluations, flat_steps
from pretrain.training.watch.observer import Findings, Moment

EVALUATION_SEED = 15  # fixed, so that runs of different seeds are scored on the same windows and masks
# A model has learnt to use the context if its gain is more than this share of the no-context loss, and more than this
# many standard errors.
LEARNT = 0.02
STANDARD_ERRORS = 3


@dataclass(frozen=True)
class Scores:
    """Held-out results. Losses and their standard error are in nats per target."""

    loss: float
    standard_error: float | None  # of `loss`, over windows; None: there is only one window
    accuracy: float  # the share of targets that are the likeliest token of the model
    targets: int
    bytes_per_target: float | None  # bytes of raw text; None: not defined for this tokenizer
    # (1, V): the share of each id among the targets. If a predictor without context is told something of a target, such
    # as the token that may be replaced: (G, C), the share of each of G things told and C targets.
    frequencies: np.ndarray = field(compare=False, repr=False)

    @property
    def bits_per_byte(self) -> float | None:
        return self.loss / math.log(2) / self.bytes_per_target if self.bytes_per_target else None

    @property
    def no_context_loss(self) -> float:
        """The least loss that a predictor can have on these targets if it ignores the context.

        If it is told something of each target, this is the loss of one that has counted the other targets: with few
        of each thing told, the entropy would be far too low.
        """
        return entropy(self.frequencies) if len(self.frequencies) == 1 else counted(self.frequencies * self.targets)

    @property
    def gain(self) -> float:
        """The nats per target by which the model is better than the no-context loss."""
        return self.no_context_loss - self.loss

    @property
    def learnt(self) -> bool:
        """Whether the gain is larger than chance or rounding would give.

        The frequencies are fitted to the targets: with K different ids among N targets the no-context loss is too low
        by about (K - 1) / 2N nats (Miller 1955). This amount is added to the gain.
        """
        fitted = (np.count_nonzero(self.frequencies) - 1) / (2 * self.targets) if len(self.frequencies) == 1 else 0
        least = max(LEARNT * self.no_context_loss, STANDARD_ERRORS * (self.standard_error or 0))
        return bool(self.gain + fitted > least)

    def values(self) -> dict[str, float]:
        """The values for TensorBoard by the name of their series, without those that are not defined."""
        return {name: value for name in VALUES if (value := getattr(self, name)) is not None}

    def record(self) -> dict[str, float | int | bool | None]:
        """The values for a line of evaluations.jsonl."""
        return {name: getattr(self, name) for name in (*VALUES, "targets", "learnt")}


VALUES = ("loss", "standard_error", "no_context_loss", "gain", "accuracy", "bits_per_byte")


def together(scores: list[Scores], weights: tuple[int, ...]) -> Scores:
    """The scores of a text that mixes the corpora by `weights`, the weights of a phase's mixture.

    The amount of held-out text does not weigh the corpora. So the held-out loss is of the same mixture as the training
    loss, and it does not move when a corpus holds out more text.
    """
    drawn = [(score, weight / sum(weights)) for score, weight in zip(scores, weights, strict=True) if weight]
    errors = [part * score.standard_error for score, part in drawn if score.standard_error is not None]
    sizes = [part * score.bytes_per_target for score, part in drawn if score.bytes_per_target]
    frequencies = np.zeros_like(drawn[0][0].frequencies)
    for score, part in drawn:
        frequencies += part * score.frequencies
    return Scores(
        loss=sum(part * score.loss for score, part in drawn),
        standard_error=math.hypot(*errors) if len(errors) == len(drawn) else None,
        accuracy=sum(part * score.accuracy for score, part in drawn),
        targets=sum(score.targets for score, _ in drawn),
        bytes_per_target=sum(sizes) if len(sizes) == len(drawn) else None,
        frequencies=frequencies,
    )


class Scorer(Protocol):
    """The part of an engine that scoring needs."""

    def train(self, training: bool) -> None: ...

    def __call__(self, objective: Objective, batch: Batch, each: bool = False) -> Any: ...

    def total(self, values: torch.Tensor) -> torch.Tensor: ...


Sides = dict[str, "HeldOut"]  # the held-out windows of each corpus by its name


class HeldOut:
    """The held-out windows of a corpus: up to `max_tokens` tokens, spread over its held-out side."""

    windows: Windows | PackedWindows

    def __init__(
        self,
        shards: Shards,
        objective: ObjectiveConfig,
        seq_len: int,
        max_tokens: int,
        token_bytes: np.ndarray | None,
        packed: bool,
        special_tokens: dict[str, int] | None = None,
    ):
        """`objective`: the section of a run's configuration. `packed`: whether windows hold whole documents.

        `special_tokens`: the ids of the tokenizer's further special tokens, by their text.
        """
        kind, specials = OBJECTIVES[objective.kind], shards.specials | (special_tokens or {})
        self.objective = kind(kind.heldout(objective), specials, shards.vocab_size, seq_len, EVALUATION_SEED)
        self.seq_len, self.token_bytes, self.packed = seq_len, token_bytes, packed
        whole = shards.tokens // seq_len
        if packed:  # blocks of at most 64 windows, each of which leaves out less than a window
            blocks = -(-whole // BLOCK_WINDOWS)
            found = PackedWindows(shards, whole // blocks * seq_len, EVALUATION_SEED)
            self.windows, every = found, found.blocks * found.per_block(seq_len)
        else:
            self.windows = Windows(shards, seq_len, EVALUATION_SEED)
            every = -(-shards.tokens // seq_len)
        count = max(1, min(every, max_tokens // seq_len))
        self.spread = permute(np.arange(count), every, EVALUATION_SEED, CHOICE)
        self.numbers = np.sort(self.spread)  # (N,): the numbers of the windows that are scored

    def batch(self, numbers: np.ndarray) -> Batch:
        """Windows `numbers` (B,) of the held-out side.

        If the last window of a stream is short, it begins earlier, and only its new tokens count.
        """
        T, tokens = self.seq_len, self.windows.shards.tokens
        if isinstance(self.windows, PackedWindows):
            blocks, parts = np.divmod(numbers, self.windows.per_block(T))
            starts = self.windows.starts(blocks * self.windows.block_tokens + parts)
        else:
            starts = np.minimum(numbers * T, max(0, tokens - T))
        batch = self.objective.batch(self.windows.rows(starts, T, self.objective.wants_words), numbers)
        weights = np.ones(batch.targets.shape, np.float32) if batch.weights is None else batch.weights
        if not self.packed:
            seen = (numbers * T - starts)[:, None]  # an earlier window scores these targets
            position = np.arange(T)[None] if batch.target_index is None else batch.target_index
            weights = weights * (position >= seen)
        return batch.weighted(weights)

    def score(
        self, engine: Scorer, world: World, micro_batch: int, interrupt: Interrupt | None = None
    ) -> Scores | None:
        """The scores of all windows, divided among the ranks; a collective. Leaves the module in training mode.

        Returns None as soon as `interrupt` asks a rank to stop: the ranks agree on that before each batch.
        """
        shards = self.windows.shards
        sums = torch.zeros(8, dtype=torch.float64)
        told, kinds = self.objective.outcomes
        counts = torch.zeros(told * kinds, dtype=torch.float64)  # targets by id
        engine.train(False)
        with torch.no_grad():
            for batch in self._of_rank(world, micro_batch):
                if interrupt and engine.total(torch.tensor([float(interrupt.asked)])).item():
                    engine.train(True)
                    return None
                found = {name: value.cpu() for name, value in engine(self.objective, batch, each=True).items()}
                weights = torch.from_numpy(batch.weights).double()
                targets = found.get("targets", torch.from_numpy(batch.targets)).long()
                right = (found["likeliest"] == targets) * weights
                nbytes = 0.0
                if self.token_bytes is not None and told == 1:
                    nbytes = float((torch.from_numpy(self.token_bytes[batch.targets]) * weights).sum())
                numbers = targets if told == 1 else found["seen"] * kinds + targets
                counts.index_add_(0, numbers.flatten(), weights.flatten())
                loss, asked = (found["nll"].double() * weights).sum(1), weights.sum(1)  # sums of each window
                summed = (loss, right, asked, asked > 0, loss * loss, loss * asked, asked * asked)
                sums += torch.tensor([*(float(each.sum()) for each in summed), nbytes])
        engine.train(True)
        sums, counts = engine.total(torch.cat([sums, counts])).double().cpu().split([len(sums), len(counts)])
        loss, right, targets, windows, squared, crossed, sizes, nbytes = sums.tolist()
        if not targets:  # with a tiny `max_tokens` the only window may hold nothing but special tokens
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
            frequencies=(counts / targets).view(told, kinds).numpy(),
        )

    def _of_rank(self, world: World, micro_batch: int) -> Iterator[Batch]:
        """The batches of this rank. All ranks get equally many (ZeRO 3 needs it); surplus windows have weight 0."""
        count = len(self.numbers)
        micro_batch = min(micro_batch, -(-count // world.size))  # no batch is larger than a rank's share
        for round_ in range(-(-count // (micro_batch * world.size))):
            at = (round_ * world.size + world.rank) * micro_batch + np.arange(micro_batch)
            batch = self.batch(self.numbers[np.minimum(at, count - 1)])
            assert batch.weights is not None, "`batch` gives every slot a weight"
            yield batch.weighted(batch.weights * (at < count)[:, None])


class HeldOutLoss:
    """The observer that scores the held-out text of every corpus.

    It uses the window length and the objective of the phase of the last step, not those of the last phase of the run.
    A model knows nothing of positions that it has not trained yet, so the curve of a length curriculum would stay flat
    until the last phase.
    """

    name = "heldout"

    def __init__(
        self, run: Path, every_steps: int, phases: Sequence[Phase], at_once: list[int], sides: list[Sides], world: World
    ):
        """`sides`: the held-out windows of every corpus, for each phase. `at_once`: the windows of a micro-batch."""
        self.every_steps = every_steps
        self._run, self._phases, self._at_once, self._sides, self._world = run, phases, at_once, sides, world

    def measure(self, engine: Engine, moment: Moment, interrupt: Interrupt) -> Findings | None:
        """The scores of each corpus, and under the name "" the scores of the phase's mixture."""
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
        before = _before(self._run, found) if moment.last and self._world.speaks else {}
        return Findings(
            values={
                (f"heldout/{name}/" if name else "heldout/") + key: value
                for name, scores in found.items()
                for key, value in scores.values().items()
            },
            records={name: scores.record() for name, scores in found.items()},
            summary=_summary(found, before),
            lines=self._lines(found, moment, took) + _changes(found, before) if self._world.speaks else [],
            ruined="" if math.isfinite(mixture.loss) else ruined,
        )

    def _lines(self, found: dict[str, Scores], moment: Moment, took: str) -> list[str]:
        """The lines of the log, with a warning if the model does not use the context."""
        lines = [f"held-out at step {moment.step}: {_shown(found[''], took)}"]
        names = [name for name in found if name]
        lines += [f"  {name.ljust(max(map(len, names)))}  {_shown(found[name])}" for name in names]
        if math.isfinite(found[""].loss) and not found[""].learnt:
            flat = flat_steps(self._run)
            if flat or moment.last:
                lines.append(_unlearnt(found[""], flat))
        return lines


def _before(run: Path, found: dict[str, Scores]) -> dict[str, float]:
    """The loss of each corpus before the first step of a run that began from published weights, else empty.

    Scores of other targets are left out: a phase that was appended later may have other windows.
    """
    first = evaluations(run, 0)
    same = (name for name, scores in found.items() if first.get(name, {}).get("targets") == scores.targets)
    return {name: loss for name in same if (loss := first[name]["loss"]) is not None}


def _changes(found: dict[str, Scores], before: dict[str, float]) -> list[str]:
    """Lines `old  2.1034 → 2.4410 (+0.3376)`: what training has made better, and what the model has forgotten."""
    if not before:
        return []
    width = max(len(name) for name in found)
    rows = [
        f"  {name.ljust(width)}  {loss:.4f} → {found[name].loss:.4f} ({found[name].loss - loss:+.4f})"
        for name, loss in sorted(before.items())
        if name or len(found) == 1
    ]
    return ["held-out loss in nats before the first step → now", *rows]


def _summary(found: dict[str, Scores], before: dict[str, float]) -> dict:
    """The entries of summary.json. `before`: the losses before the first step, of the corpora for which it is known."""
    mixture = found[""]
    summary = {
        "heldout_loss": mixture.loss,
        "heldout_accuracy": mixture.accuracy,
        "heldout_bits_per_byte": mixture.bits_per_byte,
        "heldout_targets": mixture.targets,
        "heldout_standard_error": mixture.standard_error,  # of heldout_loss, over windows
        "no_context_loss": mixture.no_context_loss,  # the least loss of a predictor that ignores the context
        "heldout_gain": mixture.gain,  # no_context_loss - heldout_loss
    }
    each = {name: scores.values() for name, scores in found.items() if name}
    for name, loss in before.items():
        change = {"loss_before": loss, "loss_change": found[name].loss - loss}
        if name:
            each[name] |= change
        else:
            summary |= {f"heldout_{key}": value for key, value in change.items()}
    return summary | ({"heldout": each} if each else {})


def _unlearnt(scores: Scores, flat: int) -> str:
    """The warning for a model that does not use the context. `flat`: last steps in which its loss did not fall."""
    lines = [
        "warning: this model predicts held-out text no better than token frequencies do",
        f"loss {scores.loss:.4f}; without any context {scores.no_context_loss:.4f} can be reached",
        f"the training loss has not fallen in the last {flat:,} steps" if flat else "",
        "train longer, try another optim.lr, or look at its batches: python launch/explain.py RUN --step N --sample 0",
    ]
    return "\n  ".join(filter(None, lines))


def _shown(scores: Scores, *notes: str) -> str:
    """`loss 3.8412 ± 0.0123  gain 2.1588  accuracy 0.3331  (12,345 targets, 0m02s)`."""
    values = scores.values()
    error = f" ± {values['standard_error']:.4f}" if "standard_error" in values else ""
    shown = (f"{key} {values[key]:.4f}" for key in ("gain", "accuracy", "bits_per_byte") if key in values)
    said = ", ".join([f"{scores.targets:,} targets", *notes])
    return "  ".join([f"loss {scores.loss:.4f}{error}", *shown, f"({said})"])


def counted(counts: np.ndarray) -> float:
    """The mean loss in nats of a predictor that is told g of each target and knows the `counts` (G, C) of the others.

    It adds some targets with the frequencies of all to the others of the same g, and takes the best of a few numbers.
    With infinitely many it is a predictor that is told nothing.
    """
    every = counts.sum(0)
    frequencies, told, found = every / every.sum(), *counts.nonzero()
    number = counts[told, found]
    others, same = (number - 1).clip(min=0), (counts.sum(1)[told] - 1).clip(min=0)
    shares = [(others + more * frequencies[found]) / (same + more) for more in (1, 4, 16, 64, 256)]
    losses = [float(-(number * np.log(share)).sum() / every.sum()) for share in shares]
    return min(*losses, entropy(frequencies))


def entropy(frequencies: np.ndarray) -> float:
    """The entropy in nats of a distribution."""
    p = frequencies[frequencies > 0]
    return float(-(p * np.log(p)).sum())
