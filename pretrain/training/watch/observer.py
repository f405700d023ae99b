"""The contract of observers: held-out loss, previews, and everything else that is measured at intervals.

The training loop calls each observer of a list when it is due, and records its findings. So an evaluation is added
without a change of the loop.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from pretrain.processes.signals import Interrupt

if TYPE_CHECKING:
    from pretrain.training.engine.engine import Engine


@dataclass(frozen=True)
class Moment:
    """The step after which observers measure."""

    step: int
    phase: int  # the number of the phase that the step belongs to
    last: bool  # whether it is the last step of the run


@dataclass(frozen=True)
class Findings:
    """The results of an observer."""

    values: dict[str, float] = field(default_factory=dict)  # points of TensorBoard's series, by name
    texts: dict[str, str] = field(default_factory=dict)  # Markdown for TensorBoard, by name
    records: dict[str, dict[str, Any]] = field(default_factory=dict)  # lines of evaluations.jsonl, by corpus
    summary: dict[str, Any] = field(default_factory=dict)  # entries of summary.json, used at the end of the run
    lines: list[str] = field(default_factory=list)  # lines for the log
    ruined: str = ""  # the reason if the weights are ruined, else empty


class Observer(Protocol):
    """An object that measures the model after every `every_steps` steps and at the end of the run."""

    name: str
    every_steps: int  # 0: only at the end of the run

    def measure(self, engine: "Engine", moment: Moment, interrupt: Interrupt) -> Findings | None:
        """Measure the model; a collective. None when a rank is asked to stop meanwhile."""
