"""Who looks at a run: held-out loss, previews, and whatever else is measured at intervals.

An observer is one object in the list of a run. The training loop asks each one that is due, and records what it finds,
so that an evaluation is added without a change of the loop.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from pretrain.processes.signals import Interrupt

if TYPE_CHECKING:
    from pretrain.training.engine.engine import Engine


@dataclass(frozen=True)
class Moment:
    """The step after which observers look."""

    step: int
    phase: int  # its number
    last: bool  # whether the run ends here


@dataclass(frozen=True)
class Findings:
    """What an observer found."""

    values: dict[str, float] = field(default_factory=dict)  # points of TensorBoard's series, by name
    texts: dict[str, str] = field(default_factory=dict)  # Markdown for TensorBoard, by name
    records: dict[str, dict] = field(default_factory=dict)  # lines of evaluations.jsonl, by corpus
    summary: dict[str, Any] = field(default_factory=dict)  # entries of summary.json, if this is the end of the run
    lines: list[str] = field(default_factory=list)  # for the log
    ruined: str = ""  # what shows that the weights are ruined, if something does


class Observer(Protocol):
    name: str
    every_steps: int  # it looks after every so many steps, and at the end of the run; 0: only at the end

    def measure(self, engine: "Engine", moment: Moment, interrupt: Interrupt) -> Findings | None:
        """Look at the model; a collective of all ranks. None when a rank is asked to stop meanwhile."""
