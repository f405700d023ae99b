"""The learning rate as a pure function of the step, and what all optimizers are told."""

import math
from collections.abc import Callable

from pydantic import Field

from pretrain.config import Config, past
from pretrain.order.phases import Phase


class OptimConfig(Config):
    """The keys of the section `optim` that every optimizer has; each optimizer adds its own."""

    lr: float = past(gt=0, lt=1e9)  # the peak
    warmup_steps: int = past(0, ge=0, lt=2**40)
    floor: float = past(0.0, ge=0, le=1)  # of the peak: where a decay ends
    weight_decay: float = Field(0.1, ge=0)
    clip: float | None = Field(1.0, gt=0)  # largest global gradient norm; null: gradients are not clipped


SHAPES: dict[str, Callable[[float], float]] = {  # share of the decay that is over → share of the rate that is left
    "1-sqrt": lambda share: 1 - share**0.5,
    "cosine": lambda share: (1 + math.cos(math.pi * share)) / 2,
    "linear": lambda share: 1 - share,
}


def lr_at(step: int, optim: OptimConfig, phases: list[Phase], anew: int = 0) -> float:
    """Learning rate of optimizer step `step` (0-based): a pure function, so resuming needs no scheduler state.

    A phase begins at the rate `from` where the one before it ended, the first phase at 0, and goes to its own `lr`.
    Without one, that is `optim.lr` in the first phase and in a phase with `warmup_steps`; any other phase stays at
    `from`, so that nothing jumps back to the peak after a decay. In the phase's step n (0-based), one of:

        warm-up, n < warmup_steps             from + (lr - from) · (n + 1) / warmup_steps
        flat                                  lr
        decay, the last decay_steps of them   end + (top - end) · shape((m + 1) / (decay_steps + 1))

    m counts the steps of the decay from 0, and `top` is what the rate would be at m = 0 without a decay: a decay that
    comes in the middle of a warm-up falls from where that stands. `end` is optim.floor · lr (or `top`, if that is
    less), with the last `lr` a phase went to, and it is where the next phase begins. `shape` is 1 - sqrt(x),
    (1 + cos(π·x)) / 2 or 1 - x. `warmup_steps` is that of the phase; in the first phase optim.warmup_steps stands for
    it, and if that is longer than the phase, the warm-up goes on in the next. After the last step the rate stays.

    `anew`: the step at which a branch began the optimizer anew, or 0. Of the steps from there on, step n (0-based) has
    (n + 1) / optim.warmup_steps of the rate above, for the first optim.warmup_steps of them.

    Source of 1-sqrt: Hägele et al. 2024, arXiv:2405.18392, section 3.
    """
    rate = _rate(step, optim, phases)
    if anew and 0 <= step - anew < optim.warmup_steps:
        rate *= (step - anew + 1) / optim.warmup_steps
    return rate


def _rate(step: int, optim: OptimConfig, phases: list[Phase]) -> float:
    """`lr_at` without `anew`."""
    begin, ended, peak, warm_up = 0, 0.0, optim.lr, None
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


def _rate_within(step: int, phase: Phase, end: int, warm_up: tuple, peak: float, floor: float) -> float:
    """The rate at a step of the phase whose steps are before `end`; at `end` and later, where the phase ends."""

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


def check_schedule(optim: OptimConfig, phases: list[Phase]) -> None:
    """Raise ValueError naming the settings when a phase would train with a learning rate of 0."""
    begin = 0
    for number, phase in enumerate(phases):
        if number and _rate(begin, optim, phases) == 0:
            raise ValueError(
                f"phases.{number} would train with a learning rate of 0, where the phase before it ended (optim.floor "
                f"= {optim.floor:g}): give phases.{number} an lr, or warmup_steps, in which it returns to optim.lr"
            )
        begin += phase.steps


def schedule_notes(optim: OptimConfig, phases: list[Phase]) -> list[str]:
    """Lines about a warm-up that does not reach its peak, which is legal but seldom meant."""
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
