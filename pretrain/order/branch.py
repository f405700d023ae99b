"""A branch: a new run, in a folder of its own, that begins at a checkpoint of another run, its parent.

    branch_from: {run: runs/wiki, step: 40000, optimizer: keep, skip_steps: [41200, 41260]}

A branch rescues a run that went wrong: it goes back to an earlier checkpoint and continues from there with another
learning rate, with a fresh optimizer state, or without the data of some steps. Steps keep the parent's numbers: the
first step of this branch is 40,001, its `phases` cover the steps of the parent as well, and its metrics.jsonl begins
with its own first step. A branch first saves the checkpoint at which it begins in its own folder, and never reads the
parent again.

The model and the tokenizer are the parent's. All other settings may differ, and the differences are printed.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from pretrain.config import Config, free
from pretrain.errors import ResumeError
from pretrain.order.phases import MOST_STEPS, Phase, locate

NAME = "step_{:08d}"  # the folder of a checkpoint
StepNumber = Annotated[int, Field(ge=1, lt=MOST_STEPS)]  # as in metrics.jsonl: the first step of a run is step 1
Skips = Sequence[tuple[int, int]]


class BranchConfig(Config):
    """The checkpoint of another run at which this run begins."""

    run: str = free()
    """The folder of the parent run, or the folder of one of its checkpoints."""
    step: StepNumber | None = None
    """The step of the checkpoint. It may be left out if `run` is a checkpoint."""
    optimizer: Literal["keep", "fresh"] = "keep"
    """`keep` takes over the optimizer's state from the checkpoint. `fresh` begins with an empty state and warms up over
    `optim.warmup_steps`."""
    skip_steps: list[tuple[StepNumber, StepNumber]] = []
    """Ranges of steps `[a, b]` of the parent. The data that it read in steps a to b are not read, and each later step
    of the phase reads the data that come after. A branch of a branch lists all ranges, the oldest first, each in the
    step numbers of the run it was made for."""

    @field_validator("skip_steps", mode="before")
    @classmethod
    def _one_range_or_several(cls, value: Any) -> Any:
        """[a, b] means [[a, b]]."""
        return (
            [value] if isinstance(value, (list, tuple)) and value and not isinstance(value[0], (list, tuple)) else value
        )

    @model_validator(mode="after")
    def _sound(self) -> "BranchConfig":
        name = Path(self.run).name
        named = int(name[5:]) if name.startswith("step_") and name[5:].isdecimal() else None
        if self.step is None and named is None:
            raise ValueError(f"branch_from.step is missing: say at which checkpoint of {self.run} the branch begins")
        if None not in (self.step, named) and self.step != named:
            raise ValueError(f"branch_from.step = {self.step}, but branch_from.run is the checkpoint {name}")
        for first, last in self.skip_steps:
            if first > last:
                raise ValueError(f"branch_from.skip_steps = [{first}, {last}]: the first step comes after the last")
        return self

    @property
    def at(self) -> int:
        """The number of steps done at the checkpoint where the branch begins."""
        return self.step if self.step is not None else int(Path(self.run).name[5:])

    @property
    def folder(self) -> Path:
        """The folder of the checkpoint where the branch begins."""
        run = Path(self.run)
        return run if run.name == NAME.format(self.at) else run / "checkpoints" / NAME.format(self.at)

    def resolved(self) -> "BranchConfig":
        """The same branch with its step written out."""
        return self.model_copy(update={"step": self.at})


def check(branch: BranchConfig, phases: Sequence[Phase]) -> None:
    """Raise ValueError unless the branch begins within `phases`, and each range of skipped steps lies in one phase."""
    steps = sum(phase.steps for phase in phases)
    if branch.at >= steps:
        raise ValueError(
            f"branch_from.step = {branch.at}, but phases end after {steps} steps: the phases of a branch cover the "
            "steps of its parent and then its own steps, so add steps"
        )
    for first, last in branch.skip_steps:
        if last > steps or locate(first - 1, phases).number != locate(last - 1, phases).number:
            raise ValueError(
                f"branch_from.skip_steps = [{first}, {last}] does not lie in one phase: give one range for each phase"
            )


def check_skips(branch: BranchConfig, parent: BranchConfig | None) -> None:
    """Check that the branch continues the data of its parent.

    Raises ResumeError unless the ranges begin with all ranges that the parent has already skipped, and all further
    ranges lie behind the checkpoint.
    """
    done = [skip for skip in parent.skip_steps if skip[0] <= branch.at] if parent else []
    ranges = branch.skip_steps
    if ranges[: len(done)] != done:
        wanted = [list(skip) for skip in [*done, *(skip for skip in ranges if skip not in done)]]
        raise ResumeError(
            "the parent has itself skipped the data of some steps, and the branch must too",
            f"branch_from.skip_steps begins with {[list(skip) for skip in done]}: take {wanted}",
        )
    for first, last in ranges[len(done) :]:
        if first <= branch.at:
            raise ResumeError(
                f"branch_from.skip_steps = [{first}, {last}]: the branch begins after step {branch.at}, and the model "
                f"has already been trained on the data of step {first}",
                f"branch from a checkpoint before step {first}, or skip later steps",
            )


def reading(phases: Sequence[Phase], skips: Skips) -> list[Phase]:
    """The phases of the order of the data: each phase is longer by the number of its skipped steps."""
    more = [0] * len(phases)
    for first, last in skips:
        more[locate(first - 1, phases).number] += last - first + 1
    return [
        phase.model_copy(update={"steps": phase.steps + extra}) if extra else phase
        for phase, extra in zip(phases, more, strict=True)
    ]


def reads(step: int, phases: Sequence[Phase], skips: Skips) -> int:
    """The step in `reading(phases, skips)` with the data that step `step` reads; both are 0-based."""
    if not skips:
        return step
    number = locate(step, phases).number
    begin, shift = _begin(number, phases), 0
    for first, last in skips:
        if locate(first - 1, phases).number < number:
            shift += last - first + 1
    for first, last in reversed(skips):
        if begin < first <= begin + phases[number].steps and step >= first - 1:
            step += last - first + 1
    return step + shift


def read_by(data_step: int, phases: Sequence[Phase], skips: Skips) -> int | None:
    """The step (0-based) that reads the data of step `data_step` of `reading(phases, skips)`; None if no step does."""
    number = locate(data_step, reading(phases, skips)).number
    begin = _begin(number, phases)
    step = data_step
    for first, last in skips:
        if locate(first - 1, phases).number < number:
            step -= last - first + 1
    for first, last in skips:
        if begin < first <= begin + phases[number].steps:
            if first - 1 <= step < last:
                return None
            step -= last - first + 1 if step >= last else 0
    return step


def _begin(number: int, phases: Sequence[Phase]) -> int:
    """The first step (0-based) of phase `number`."""
    return sum(phase.steps for phase in phases[:number])
