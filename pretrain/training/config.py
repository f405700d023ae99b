"""The configuration of a pre-training run, and every check of it that needs no file. It imports no torch."""

from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from pretrain.config import Config, chosen, free, past
from pretrain.dialects import DialectName
from pretrain.model.config import ModelConfig
from pretrain.objectives import OBJECTIVES, Objective
from pretrain.order import branch
from pretrain.order.branch import BranchConfig, Skips
from pretrain.order.config import DataConfig, block_tokens_of, check_phases, mixed
from pretrain.order.phases import Phase
from pretrain.tokenizer import Tokenizer
from pretrain.training.engine.config import EngineConfig
from pretrain.training.optim import OPTIMIZERS
from pretrain.training.optim.schedule import OptimConfig, check_schedule

if TYPE_CHECKING:
    ObjectiveSection, OptimSection = Config, OptimConfig
else:
    ObjectiveSection, OptimSection = chosen(OBJECTIVES), chosen(OPTIMIZERS)
USUAL_OPTIMIZER = "adamw"


class TrainingPhase(Phase):
    """A phase of the data's order, with what is learnt in it."""

    # What this phase learns, if that is not the run's objective. Of the same kind, keys that are not given here are
    # those of the run's objective; of another kind, they have that kind's defaults.
    objective: ObjectiveSection | None = None


class EvaluateConfig(Config):
    every_steps: int = free(0, ge=0)  # 0: at the end
    max_tokens: int = free(1 << 20, gt=0)  # of each corpus: windows spread over its whole held-out side


class CheckpointConfig(Config):
    """When a run is saved: always at its end, and when it is asked to stop."""

    every_s: float = free(900, ge=0)  # seconds, by the clock of rank 0; 0: not by time
    every_steps: int = free(0, ge=0)  # 0: not by steps
    keep: int = free(2, gt=0)  # newest checkpoints; one that has not proven itself does not count
    keep_every: int = free(0, ge=0)  # steps: what is saved at each multiple is kept for ever; 0: nothing is
    timeout_s: int = free(3600, gt=0)  # how long a rank waits for the others while a checkpoint is written


class ExportTarget(Config):
    dialect: DialectName = free()  # checked before training: a run that cannot be handed over does not start


class RunConfig(Config):
    """What `launch/pretrain.py` reads."""

    out: str = free()
    seed: int = Field(ge=0, lt=2**63)
    data: DataConfig
    model: ModelConfig
    objective: ObjectiveSection
    optim: OptimSection
    phases: list[TrainingPhase] = past(min_length=1)
    branch_from: BranchConfig | None = None  # begin at a checkpoint of another run, see branch.py
    engine: EngineConfig = free()
    evaluate: EvaluateConfig = free(EvaluateConfig())
    checkpoint: CheckpointConfig = free(CheckpointConfig())
    log_every: int = free(10, gt=0)  # steps
    export: ExportTarget | None = free(None)

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, values: Any) -> Any:
        """Fill in what may be left out: the usual optimizer, and of a phase's objective the keys of the run's."""
        if not isinstance(values, dict):
            return values
        found = dict(values)
        if isinstance(found.get("optim"), dict):
            found["optim"] = {"kind": USUAL_OPTIMIZER, **found["optim"]}
        ours, phases = found.get("objective"), found.get("phases")
        if isinstance(ours, dict) and isinstance(phases, list):
            found["phases"] = [_with_objective(phase, ours) for phase in phases]
        return found

    @model_validator(mode="after")
    def _agree(self) -> "RunConfig":
        """Checks that span sections; each names both settings."""
        check_phases(self.phases, self.data)
        check_schedule(self.optim, self.phases)
        if self.branch_from:
            branch.check(self.branch_from, self.phases)
        last = self.objective_of(len(self.phases) - 1)
        wants_causal = OBJECTIVES[last.kind].causal
        if self.model.causal != wants_causal:
            of = f"phases.{len(self.phases) - 1}.objective" if self.phases[-1].objective else "objective"
            raise ValueError(f"{of}.kind = {last.kind} needs model.causal = {str(wants_causal).lower()}")
        for phase in self.phases:
            if phase.seq_len > self.model.max_positions:
                raise ValueError(
                    f"phases: seq_len = {phase.seq_len} is longer than model.max_positions = {self.model.max_positions}"
                )
        return self

    def resolved(self) -> "RunConfig":
        """The same run with `data.block_tokens`, every mixture and the step of a branch written out, as it is saved and
        compared."""
        section = self.data.model_copy(update={"block_tokens": self.block_tokens})
        begin = self.branch_from and self.branch_from.resolved()
        phases = [
            phase.model_copy(update={"objective": None}) if phase.objective == self.objective else phase
            for phase in mixed(self.phases, self.data)
        ]
        return self.model_copy(update={"data": section, "phases": phases, "branch_from": begin})

    def named(self, name: str) -> "RunConfig":
        """The same run with a name for its one corpus: so a run of data.shards goes on with data.corpora."""
        return self.model_copy(
            update={"phases": [phase.model_copy(update={"mixture": {name: 1}}) for phase in self.phases]}
        )

    def objective_of(self, number: int) -> Any:
        """The section `objective` that holds in the phase of that number."""
        return self.phases[number].objective or self.objective

    def objectives(self, tokenizer: Tokenizer) -> list[Objective]:
        """The objective of each phase. Raises ConfigError where the vocabulary or the windows do not suit it."""
        found = []
        for number, phase in enumerate(self.phases):
            section = self.objective_of(number)
            kind = OBJECTIVES[section.kind]
            found.append(kind(section, tokenizer.specials, tokenizer.vocab_size, phase.seq_len, self.seed))
        return found

    @property
    def words(self) -> bool:
        """Whether an objective of the run needs to know where words begin."""
        sections = [self.objective_of(number) for number in range(len(self.phases))]
        return any(OBJECTIVES[section.kind].needs_words(section) for section in sections)

    @property
    def block_tokens(self) -> int:
        return block_tokens_of(self.data, self.phases)

    @property
    def steps(self) -> int:
        return sum(phase.steps for phase in self.phases)

    @property
    def begun(self) -> int:
        """Steps that another run has done before this one branched off it."""
        return self.branch_from.at if self.branch_from else 0

    @property
    def skips(self) -> Skips:
        return self.branch_from.skip_steps if self.branch_from else []


def _with_objective(phase: Any, ours: dict) -> Any:
    """A phase as it was written, its objective completed by the run's."""
    theirs = phase.get("objective") if isinstance(phase, dict) else None
    if not isinstance(theirs, dict) or theirs.get("kind", ours.get("kind")) != ours.get("kind"):
        return phase
    return {**phase, "objective": {**ours, **theirs}}
