"""The learning rate as a pure function of the step, and the settings that all optimizers share."""

import math
from collections.abc import Callable, Sequence

from pydantic import Field

from pretrain.config import Config, past
from pretrain.order.phases import Phase


class OptimConfig(Config):
    """The optimizer and the learning rate."""

    # Every optimizer has these keys, and adds its own in a subclass.
    lr: float = past(gt=0, lt=1e9)
    """The peak of the learning rate."""
    warmup_steps: int = past(0, ge=0, lt=2**40)
    """Optimizer steps in which the rate rises from 0 to `lr` at the start of the run."""
    floor: float = past(0.0, ge=0, le=1)
    """The rate at the end of a decay, as a share of the peak."""
    weight_decay: float = Field(0.1, ge=0)
    """Decoupled weight decay of matrices. Vectors (norms and biases) do not decay."""
    clip: float | None = Field(1.0, gt=0)
    """The largest global norm of the gradient; a longer gradient is scaled down to it. null: no clipping."""
    kind: str
    """The name of the optimizer."""

    def notes(self) -> list[str]:
        """Lines about settings that are legal, but seldom intended."""
        return []


# The share of the decay that is over → the share of the rate that is left.
SHAPES: dict[str, Callable[[float], float]] = {
    "1-sqrt": lambda share: 1 - share**0.5,
    "cosine": lambda share: (1 + math.cos(math.pi * share)) / 2,
    "linear": lambda share: 1 - share,
}


def lr_at(step: int, optim: OptimConfig, phases: Sequence[Phase], anew: int = 0) -> float:
    """Learning rate of optimizer step `step` (0-based): a pure function, so resuming needs no scheduler state.

    A phase begins at the rate `from`: the rate at the end of the phase before it, or 0 in the first phase. It goes to
    its own `lr`. If it has none, the first phase and a phase with `warmup_steps` go to `optim.lr`. Any other phase
    stays at `from`, so that no rate jumps back to the peak after a decay. Step n (0-based) of the phase has one of:

        warm-up, n < warmup_steps             from + (lr - from) · (n + 1) / warmup_steps
        flat                                  lr
        decay, the last decay_steps steps     end + (top - end) · shape((m + 1) / (decay_steps + 1))

    m counts the steps of the decay from 0. `top` is the rate that the step m = 0 would have without a decay, so a decay
    in the middle of a warm-up falls from the rate that the warm-up has reached. `end` is optim.floor · lr, or `top` if
    that is less, where `lr` is the last one that a phase went to. The next phase begins at `end`. `shape` is
    1 - sqrt(x), (1 + cos(π·x)) / 2 or 1 - x. `warmup_steps` is a key of the phase; its default in the first phase is
    optim.warmup_steps, and a default that is longer than the phase continues in the next phase. After the last step of
    the run the rate stays.

    `anew`: the step at which a branch began the optimizer anew, or 0. The first optim.warmup_steps steps from there are
    a second warm-up: step n (0-based) of them has the rate above times (n + 1) / optim.warmup_steps.

    Source of 1-sqrt: Hägele et al. 2024, arXiv:2405.18392, section 3.
    """
    rate = _rate(step, optim, phases)
    if anew and 0 <= step - anew < optim.warmup_steps:
        rate *= (step - anew + 1) / optim.warmup_steps
    return rate


def _rate(step: int, optim: OptimConfig, phases: Sequence[Phase]) -> float:
    """`lr_at` without `anew`."""
    begin, ended, peak = 0, 0.0, optim.lr
    warm_up = (0, 0.0, peak, 0)  # (its first step, the rate before it, the rate after it, its steps)
    for number, phase in enumerate(phases):
        end = begin + phase.steps
        if number == 0 or phase.lr is not None or phase.warmup_steps is not None:
            peak = phase.lr or optim.lr
            default = optim.warmup_steps if number == 0 else 0
            warm_up = (begin, ended, peak, default if phase.warmup_steps is None else phase.warmup_steps)
        elif phases[number - 1].decay_steps:
            warm_up = (begin, ended, ended, 0)
        if step < end or number == len(phases) - 1:
            return _rate_within(step, phase, end, warm_up, peak, optim.floor)
        begin, ended = end, _rate_within(end, phase, end, warm_up, peak, optim.floor)
    raise AssertionError("a run has at least one phase")


def _rate_within(
    step: int, phase: Phase, end: int, warm_up: tuple[int, float, float, int], peak: float, floor: float
) -> float:
    """The rate at `step` of a phase that ends before step `end`. From `end` on: the rate at which the phase ends."""

    def without_decay(step: int) -> float:
        begin, low, high, steps = warm_up
        done = step - begin + 1
        return low + (high - low) * done / steps if done <= steps else high

    decay_begins = end - phase.decay_steps
    if not phase.decay_steps or step < decay_begins:
        return without_decay(min(step, end - 1))
    share = (step - decay_begins + 1) / (phase.decay_steps + 1) if step < end else 1.0
    top = without_decay(decay_begins) / peak
    floor = min(top, floor)
    return peak * (floor + (top - floor) * SHAPES[phase.decay](share))


def check_schedule(optim: OptimConfig, phases: Sequence[Phase]) -> None:
    """Raise ValueError, naming the settings, when a phase would train with a learning rate of 0."""
    begin = 0
    for number, phase in enumerate(phases):
        if number and _rate(begin, optim, phases) == 0:
            raise ValueError(
                f"phases.{number} would train with a learning rate of 0, where the phase before it ended (optim.floor "
                f"= {optim.floor:g}): give phases.{number} an lr, or warmup_steps, in which it returns to optim.lr"
            )
        begin += phase.steps


def schedule_notes(optim: OptimConfig, phases: Sequence[Phase]) -> list[str]:
    """Lines about a warm-up that does not reach its peak: it is legal, but seldom intended."""
    if phases[0].warmup_steps is not None or not optim.warmup_steps:
        return []
    begin, steps = 0, sum(phase.steps for phase in phases)
    for number, phase in enumerate(phases):
        begin += phase.steps
        told = number + 1 < len(phases) and (phases[number + 1].lr or phases[number + 1].warmup_steps is not None)
        if phase.decay_steps or told or number + 1 == len(phases):
            whole = begin - phase.decay_steps
            if optim.warmup_steps <= whole:
                return []
            what = "the decay begins" if phase.decay_steps else "the run ends" if begin == steps else "a phase begins"
            highest = _rate(whole - 1, optim, phases) if whole else 0.0
            return [
                f"note: optim.warmup_steps = {optim.warmup_steps:,}, but {what} after {whole:,} steps: the learning "
                f"rate gets to {highest:.2g}, not to {optim.lr:.2g}"
            ]
    return []
