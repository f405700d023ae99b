"""Phases: the stretches of a run, and where a step stands in them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, model_validator

from pretrain.config import Config
from pretrain.order.mixture import RESOLUTION

MOST_STEPS = 10**10  # of a run
Weight = Annotated[int, Field(ge=1)]


class Phase(Config):
    """A stretch of the run. Most runs are one phase."""

    steps: int = Field(gt=0, lt=MOST_STEPS)
    seq_len: int = Field(gt=1, le=2**40)  # tokens a window
    batch_tokens: int = Field(gt=0, le=2**40)  # input tokens an optimizer step, over all ranks
    # The learning rate; optim.lr_at has the rule in full. None: the rate goes on where the phase before ended, and in
    # the first phase optim.lr and optim.warmup_steps stand for these two.
    lr: float | None = Field(None, gt=0, lt=1e9)
    warmup_steps: int | None = Field(None, ge=0)  # the first steps, in which it goes to `lr`, or else to optim.lr
    decay_steps: int = Field(0, ge=0)  # the last steps, in which it falls to the floor
    decay: Literal["1-sqrt", "cosine", "linear"] = "1-sqrt"
    # Parts of the tokens that come from each corpus of data.corpora, as whole numbers: {en: 7, zh: 3}. None: the
    # weights given there. A corpus that is not named is not drawn from.
    mixture: dict[str, Weight] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "Phase":
        if self.decay_steps > self.steps:
            raise ValueError(f"phases: decay_steps = {self.decay_steps} is more than steps = {self.steps}")
        if (self.warmup_steps or 0) + self.decay_steps > self.steps:
            raise ValueError(
                f"phases: warmup_steps = {self.warmup_steps} and decay_steps = {self.decay_steps} are more than "
                f"steps = {self.steps} together"
            )
        if self.decay != "1-sqrt" and not self.decay_steps:
            raise ValueError(f"phases: decay = {self.decay} does nothing without decay_steps")
        if self.batch_tokens % self.seq_len:
            below = self.batch_tokens // self.seq_len * self.seq_len
            nearest = " or ".join(f"{n}" for n in (below, below + self.seq_len) if n)
            raise ValueError(
                f"phases: batch_tokens = {self.batch_tokens} is not whole windows of seq_len = {self.seq_len}: "
                f"take {nearest}"
            )
        if self.mixture is not None:
            check_weights("phases: mixture", self.mixture)
        return self

    @property
    def batch(self) -> int:
        """Windows an optimizer step."""
        return self.batch_tokens // self.seq_len

    @property
    def samples(self) -> int:
        return self.steps * self.batch

    def weights(self, names: list[str]) -> tuple[int, ...]:
        """The weight of each of a run's corpora; without a mixture there is one corpus, and it has all."""
        assert self.mixture or len(names) == 1, names
        return tuple((self.mixture or {names[0]: 1}).get(name, 0) for name in names)


def check_weights(where: str, weights: dict[str, int]) -> None:
    """Raise ValueError unless there is a weight, and the weights in lowest terms add up to at most RESOLUTION."""
    if not weights:
        raise ValueError(f"{where} is empty: give at least one corpus a weight")
    total, common = sum(weights.values()), math.gcd(*weights.values())
    if total // common > RESOLUTION:
        said = ", ".join(f"{name}: {weight}" for name, weight in weights.items())
        nearest = {name: max(1, round(weight * RESOLUTION / total)) for name, weight in weights.items()}
        over = sum(nearest.values()) - RESOLUTION
        nearest[max(nearest, key=nearest.get)] -= max(0, over)
        near = ", ".join(f"{name}: {weight}" for name, weight in nearest.items())
        raise ValueError(
            f"{where} = {{{said}}} adds up to {total // common} in lowest terms, the most is {RESOLUTION}: "
            f"for example {{{near}}}"
        )


@dataclass(frozen=True)
class Position:
    """Where a step stands: the number of its phase, the phase, its first sample within the phase."""

    number: int
    phase: Phase
    first_sample: int


def locate(step: int, phases: Sequence[Phase]) -> Position:
    """Position of optimizer step `step` (0-based)."""
    for number, phase in enumerate(phases):
        if step < phase.steps:
            return Position(number, phase, step * phase.batch)
        step -= phase.steps
    raise AssertionError("the step lies past the last phase")


def tokens_after(step: int, phases: Sequence[Phase]) -> int:
    """Input tokens behind a run that has done `step` steps."""
    tokens = 0
    for phase in phases:
        taken = min(step, phase.steps)
        tokens, step = tokens + taken * phase.batch_tokens, step - taken
    return tokens


def done_in(phases: Sequence[Phase], step: int) -> list[int]:
    """How many of the first `step` steps of a run lie in each phase that has begun by then."""
    found = []
    for phase in phases:
        if step > 0:
            found.append(min(step, phase.steps))
        step -= phase.steps
    return found
