"""Phases: the sections of a run one after another, and the position of a step in them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, model_validator

from pretrain.config import Config
from pretrain.order.mixture import RESOLUTION

MOST_STEPS = 10**10  # a run must have fewer steps
Weight = Annotated[int, Field(ge=1)]


class Phase(Config):
    """A section of the run with its own length of windows, batch size, learning rate and mixture. Most runs have one
    phase."""

    steps: int = Field(gt=0, lt=MOST_STEPS)
    """The optimizer steps of the phase."""
    seq_len: int = Field(gt=1, le=2**40)
    """The tokens of a window."""
    batch_tokens: int = Field(gt=0, le=2**40)
    """The input tokens of an optimizer step, over all ranks: a multiple of `seq_len`."""
    lr: float | None = Field(None, gt=0, lt=1e9)
    """The learning rate that the phase warms up to. By default the first phase takes `optim.lr`, and a later phase
    keeps the rate at which the phase before it ended."""
    warmup_steps: int | None = Field(None, ge=0)
    """The number of first steps in which the learning rate moves to `lr`, or to `optim.lr` if the phase has no `lr`. By
    default the first phase takes `optim.warmup_steps`."""
    decay_steps: int = Field(0, ge=0)
    """The number of last steps in which the learning rate falls to its floor."""
    decay: Literal["1-sqrt", "cosine", "linear"] = "1-sqrt"
    """The shape of the fall over `decay_steps`."""
    mixture: dict[str, Weight] | None = None
    """The shares of the tokens that come from each corpus of `data.corpora`, as whole numbers: `{en: 7, zh: 3}`.
    Corpora that are not named are not read. By default the weights in `data.corpora` hold."""

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
                f"phases: batch_tokens = {self.batch_tokens} is not a multiple of seq_len = {self.seq_len}: "
                f"take {nearest}"
            )
        if self.mixture is not None:
            check_weights("phases: mixture", self.mixture)
        return self

    @property
    def batch(self) -> int:
        """The windows of an optimizer step."""
        return self.batch_tokens // self.seq_len

    @property
    def samples(self) -> int:
        """The windows of the phase."""
        return self.steps * self.batch

    def weights(self, names: list[str]) -> tuple[int, ...]:
        """The weight of each corpus of the run. A phase without a mixture must have one corpus, with weight 1."""
        assert self.mixture or len(names) == 1, names
        return tuple((self.mixture or {names[0]: 1}).get(name, 0) for name in names)


def check_weights(where: str, weights: dict[str, int]) -> None:
    """Raise ValueError if there is no weight, or if the weights in lowest terms add up to more than RESOLUTION."""
    if not weights:
        raise ValueError(f"{where} is empty: give at least one corpus a weight")
    total, common = sum(weights.values()), math.gcd(*weights.values())
    if total // common > RESOLUTION:
        said = ", ".join(f"{name}: {weight}" for name, weight in weights.items())
        nearest = {name: max(1, round(weight * RESOLUTION / total)) for name, weight in weights.items()}
        over = sum(nearest.values()) - RESOLUTION
        nearest[max(nearest, key=lambda name: nearest[name])] -= max(0, over)
        near = ", ".join(f"{name}: {weight}" for name, weight in nearest.items())
        raise ValueError(
            f"{where} = {{{said}}} adds up to {total // common} in lowest terms, the most is {RESOLUTION}: "
            f"for example {{{near}}}"
        )


@dataclass(frozen=True)
class Position:
    """The position of a step: the number of its phase, the phase, and the step's first sample in the phase."""

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
    """The input tokens of the first `step` steps."""
    tokens = 0
    for phase in phases:
        taken = min(step, phase.steps)
        tokens, step = tokens + taken * phase.batch_tokens, step - taken
    return tokens


def done_in(phases: Sequence[Phase], step: int) -> list[int]:
    """The number of the first `step` steps of a run in each phase that has begun by then."""
    found = []
    for phase in phases:
        if step > 0:
            found.append(min(step, phase.steps))
        step -= phase.steps
    return found
