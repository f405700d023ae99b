"""The configuration of a pre-training run, and every check of it that needs no file."""

from pydantic import Field, model_validator

from pretrain.config import Config, free, past
from pretrain.model.transformer import ModelConfig
from pretrain.objectives.objectives import OBJECTIVES, CausalLMConfig, MaskedLMConfig
from pretrain.order import branch, run_data
from pretrain.order.branch import BranchConfig
from pretrain.order.phases import Phase
from pretrain.order.run_data import DataConfig
from pretrain.training.engine.config import EngineConfig
from pretrain.training.optim.optim import OptimConfig, check_schedule


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
    dialect: str = free()  # checked before training: a run that cannot be handed over does not start


class RunConfig(Config):
    """What `launch/pretrain.py` reads."""

    out: str = free()
    seed: int = Field(ge=0, lt=2**63)
    data: DataConfig
    model: ModelConfig
    objective: MaskedLMConfig | CausalLMConfig = Field(discriminator="kind")
    optim: OptimConfig
    phases: list[Phase] = past(min_length=1)
    branch_from: BranchConfig | None = None  # begin at a checkpoint of another run, see branch.py
    engine: EngineConfig = free()
    evaluate: EvaluateConfig = free(EvaluateConfig())
    checkpoint: CheckpointConfig = free(CheckpointConfig())
    log_every: int = free(10, gt=0)  # steps
    export: ExportTarget | None = free(None)

    @model_validator(mode="after")
    def _agree(self) -> "RunConfig":
        """Checks that span sections; each names both settings."""
        run_data.check_phases(self.phases, self.data)
        check_schedule(self.optim, self.phases)
        if self.branch_from:
            branch.check(self.branch_from, self.phases)
        wants_causal = OBJECTIVES[self.objective.kind].causal
        if self.model.causal != wants_causal:
            raise ValueError(f"objective.kind = {self.objective.kind} needs model.causal = {str(wants_causal).lower()}")
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
        phases = run_data.mixed(self.phases, self.data)
        return self.model_copy(update={"data": section, "phases": phases, "branch_from": begin})

    def named(self, name: str) -> "RunConfig":
        """The same run with a name for its one corpus: so a run of data.shards goes on with data.corpora."""
        return self.model_copy(
            update={"phases": [phase.model_copy(update={"mixture": {name: 1}}) for phase in self.phases]}
        )

    @property
    def block_tokens(self) -> int:
        return run_data.block_tokens_of(self.data, self.phases)

    @property
    def steps(self) -> int:
        return sum(phase.steps for phase in self.phases)

    @property
    def begun(self) -> int:
        """Steps that another run has done before this one branched off it."""
        return self.branch_from.at if self.branch_from else 0

    @property
    def skips(self) -> branch.Skips:
        return self.branch_from.skip_steps if self.branch_from else []
