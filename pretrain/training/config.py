"""The configuration of a pre-training run, and every check of it that needs no file. It imports no torch."""

from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from pretrain.config import Config, chosen, free, past
from pretrain.dialects import DialectName
from pretrain.errors import ConfigError
from pretrain.model.config import ModelConfig
from pretrain.objectives import OBJECTIVES
from pretrain.objectives.objective import Objective, ObjectiveConfig
from pretrain.order import branch
from pretrain.order.branch import BranchConfig, Skips
from pretrain.order.config import DataConfig, block_tokens_of, check_phases, mixed
from pretrain.order.phases import Phase
from pretrain.tokenizer import Tokenizer
from pretrain.training.engine.config import EngineConfig
from pretrain.training.optim import OPTIMIZERS
from pretrain.training.optim.schedule import OptimConfig, check_schedule

if TYPE_CHECKING:
    ObjectiveSection = ObjectiveConfig
    OptimSection = OptimConfig
else:
    ObjectiveSection = chosen(OBJECTIVES)
    OptimSection = chosen(OPTIMIZERS)
NEEDED = {  # the model that an objective needs, by the objective's composition
    "one": "one Transformer (no model.generator, no model.decoder_layers)",
    "generator": "a discriminator with a model.generator",
    "encoder_decoder": "an encoder with a decoder (model.decoder_layers)",
}
USUAL_OPTIMIZER = "adamw"


class TrainingPhase(Phase):
    """A phase of the order, with the objective that is trained in it."""

    objective: ObjectiveSection | None = None
    """The objective of this phase; null: the run's objective. If both have the same kind, keys that are absent here
    are taken from the run's objective; else they have their defaults."""


class EvaluateConfig(Config):
    """When the held-out loss is measured, and on how much text. It is always measured at the end of a run."""

    every_steps: int = free(0, ge=0)
    """Optimizer steps from one evaluation to the next; 0: evaluate only at the end."""
    max_tokens: int = free(1 << 20, gt=0)
    """The most held-out tokens that are scored of each corpus, in windows spread over its whole held-out side. More
    tokens cost time and give a smaller standard error."""


class CheckpointConfig(Config):
    """When a run is saved. It is always saved at its end and when it is asked to stop.

    A checkpoint is written while the training goes on.
    """

    every_s: float = free(900, ge=0)
    """Seconds from the beginning of one save to the next, by the clock of rank 0; 0: the clock starts no save."""
    every_steps: int = free(0, ge=0)
    """Optimizer steps from one checkpoint to the next; 0: the count of steps starts no save."""
    keep: int = free(2, gt=0)
    """How many of the newest checkpoints are kept. A checkpoint counts once it is complete and a finite step or
    evaluation follows it."""
    keep_every: int = free(0, ge=0)
    """Save a checkpoint at each multiple of this many steps and never remove it, so that runs can branch off there;
    0: remove all old ones."""
    timeout_s: int = free(3600, gt=0)
    """Seconds that a rank waits for the others while a checkpoint is written. Raise it for slow disks."""


class ExportTarget(Config):
    """The format in which the trained model will be handed over, and when it is exported while it trains."""

    dialect: DialectName = free()
    """The architecture of Hugging Face that the model must fit. A run with a model that does not fit does not start."""
    every_steps: int = free(0, ge=0)
    """Optimizer steps from one export to the next, each to `OUT/exports/step_…`; 0: training exports nothing. The
    step is saved too, and training waits until the export is proven. One that fails gives a warning."""


class RunConfig(Config):
    """The configuration of a pre-training run: one YAML file."""

    out: str = free()
    """The folder of the run. A run that is started again continues from the newest checkpoint in it."""
    seed: int = Field(ge=0, lt=2**63)
    """The seed of the first weights, the order of the data, the masks and dropout."""
    data: DataConfig
    model: ModelConfig
    objective: ObjectiveSection
    """The objective: what the model learns to predict. A phase may name another."""
    optim: OptimSection
    """The optimizer and the learning rate."""
    phases: list[TrainingPhase] = past(min_length=1)
    """The phases of the run, in order. Appending a phase continues a finished run."""
    branch_from: BranchConfig | None = None
    """The checkpoint of another run at which this run begins; null: begin from fresh weights."""
    engine: EngineConfig = free()
    evaluate: EvaluateConfig = free(EvaluateConfig())
    checkpoint: CheckpointConfig = free(CheckpointConfig())
    log_every: int = free(10, gt=0)
    """Optimizer steps from one line of the log to the next."""
    export: ExportTarget | None = free(None)
    """The format of the export, which is checked before the first step; null: check nothing."""

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, values: Any) -> Any:
        """Fill in the default optimizer, and the keys that the objective of a phase takes from the run's objective."""
        if not isinstance(values, dict):
            return values
        found = dict(values)
        model = found.get("model")
        if isinstance(model, dict) and model.get("init_from") and "layers" not in model:
            from pretrain.training.published import shape_of

            found["model"] = shape_of(str(model["init_from"]), model)
        if isinstance(found.get("optim"), dict):
            found["optim"] = {"kind": USUAL_OPTIMIZER, **found["optim"]}
        ours, phases = found.get("objective"), found.get("phases")
        if isinstance(ours, dict) and isinstance(phases, list):
            found["phases"] = [_with_objective(phase, ours) for phase in phases]
        return found

    @model_validator(mode="after")
    def _agree(self) -> "RunConfig":
        """Check settings that depend on each other across sections; each error names both."""
        check_phases(self.phases, self.data)
        check_schedule(self.optim, self.phases)
        if self.branch_from:
            branch.check(self.branch_from, self.phases)
        for name in ("width_base", "depth_base"):
            if getattr(self.model, name) and self.optim.kind == "lamb":
                raise ValueError(f"model.{name} is for adamw and muon: with optim.kind = lamb leave it out")
        last = self.objective_of(len(self.phases) - 1)
        wants_causal = OBJECTIVES[last.kind].causal
        if wants_causal is not None and self.model.causal != wants_causal:
            of = f"phases.{len(self.phases) - 1}.objective" if self.phases[-1].objective else "objective"
            raise ValueError(f"{of}.kind = {last.kind} needs model.causal = {str(wants_causal).lower()}")
        for number in range(len(self.phases)):
            kind = self.objective_of(number).kind
            asked, found = OBJECTIVES[kind].composition, self.model.composition
            if asked != found:
                of = f"phases.{number}.objective" if self.phases[number].objective else "objective"
                raise ValueError(f"{of}.kind = {kind} needs {NEEDED[asked]}; the model is {NEEDED[found]}")
        for phase in self.phases:
            if phase.seq_len > self.model.max_positions:
                raise ValueError(
                    f"phases: seq_len = {phase.seq_len} is longer than model.max_positions = {self.model.max_positions}"
                )
        return self

    def resolved(self) -> "RunConfig":
        """The same run with `data.block_tokens`, every mixture and the step of a branch written out.

        Checkpoints store this form, and a resumed run is compared in this form.
        """
        section = self.data.model_copy(update={"block_tokens": self.block_tokens})
        begin = self.branch_from and self.branch_from.resolved()
        phases = [
            phase.model_copy(update={"objective": None}) if phase.objective == self.objective else phase
            for phase in mixed(self.phases, self.data)
        ]
        return self.model_copy(update={"data": section, "phases": phases, "branch_from": begin})

    def named(self, name: str) -> "RunConfig":
        """The same run with a name for its one corpus, so that a run of data.shards can continue with data.corpora."""
        return self.model_copy(
            update={"phases": [phase.model_copy(update={"mixture": {name: 1}}) for phase in self.phases]}
        )

    def objective_of(self, number: int) -> ObjectiveConfig:
        """The section `objective` that applies in phase `number`."""
        return self.phases[number].objective or self.objective

    def objectives(self, tokenizer: Tokenizer) -> list[Objective]:
        """The objective of each phase. Raises ConfigError when the vocabulary or the window length does not suit it."""
        found, specials = [], tokenizer.specials | tokenizer.special_tokens
        for number, phase in enumerate(self.phases):
            section = self.objective_of(number)
            kind = OBJECTIVES[section.kind]
            settings = (specials, tokenizer.vocab_size, phase.seq_len, self.seed)
            found.append(kind(section, *settings))
            try:
                scored = kind(kind.heldout(section), *settings)
            except ConfigError as error:
                said = [str(line).strip() for line in str(error).splitlines()]
                raise ConfigError(f"held-out text could not be scored: {said[0]}", *said[1:]) from None
            written = max(found[-1].targets, scored.targets)
            if self.model.decoder_layers and self.model.positions == "learned" and written > self.model.max_positions:
                raise ConfigError(
                    f"the decoder has no positions for what it writes of a window of {phase.seq_len} tokens",
                    f"it writes up to {written} tokens, and model.max_positions = {self.model.max_positions}",
                    "raise model.max_positions, or lower objective.target_tokens",
                )
        return found

    @property
    def words(self) -> bool:
        """Whether any objective of the run needs the positions where words begin."""
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
    """The phase with the keys that its objective takes from the run's objective, where both have the same kind."""
    theirs = phase.get("objective") if isinstance(phase, dict) else None
    if not isinstance(theirs, dict) or theirs.get("kind", ours.get("kind")) != ours.get("kind"):
        return phase
    return {**phase, "objective": {**ours, **theirs}}
