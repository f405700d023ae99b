"""Where a run begins: at its newest checkpoint, at a checkpoint of the run that it branches off, or from scratch."""

from dataclasses import dataclass

import torch

from pretrain import config
from pretrain.config import Config, short
from pretrain.errors import ConfigError, ResumeError
from pretrain.order import branch
from pretrain.order.branch import BranchConfig
from pretrain.order.phases import done_in, locate
from pretrain.storage.index import INDEX, RECORDED
from pretrain.training import checkpoint
from pretrain.training.checkpoint import Checkpoint, Load, TrainState
from pretrain.training.config import RunConfig, TrainingPhase
from pretrain.training.engine.peers import Peers
from pretrain.training.engine.ranks import check_agreement
from pretrain.training.inputs import Inputs
from pretrain.training.optim import Optimizer
from pretrain.training.optim.schedule import OptimConfig, lr_at

# Keys of `model` that a branch may change if positions are rope: they change the rotations, and no weight.
ROTATIONS = ("max_positions", "rope_theta", "local_rope_theta", "rope_scaling")


@dataclass(frozen=True)
class Start:
    """The state in which a run begins, and the checkpoint that it begins from."""

    state: TrainState
    checkpoint: Checkpoint | None = None  # None: the run begins from scratch
    branches: bool = False  # whether the checkpoint is of another run

    @property
    def fingerprint(self) -> str:
        return self.checkpoint.index["fingerprint"] if self.checkpoint else "none"

    def tensors(self, optimizer: Optimizer) -> Load | None:
        """The function that returns each tensor to begin with: from the checkpoint, or the optimizer's first state."""
        if self.checkpoint is None:
            return None
        load = self.checkpoint.tensors()
        if self.state.adam_began != self.state.step:
            return load

        def fresh(kind: str, name: str, run: slice | None = None) -> torch.Tensor:
            weight = load("weights", name, run)
            return weight if kind == "weights" else optimizer.first_state(weight)[kind]

        return fresh

    def identity(self) -> dict:
        """The entries in the index of checkpoints about the parent of a branch: its fingerprint and its folder."""
        if self.branches and self.checkpoint:
            return {"parent": self.fingerprint, RECORDED: {"parent": str(self.checkpoint.folder)}}
        if self.checkpoint and "parent" in self.checkpoint.index:
            index = self.checkpoint.index
            return {"parent": index["parent"], RECORDED: {"parent": index.get(RECORDED, {}).get("parent")}}
        return {}


def find_start(inputs: Inputs, peers: Peers) -> Start:
    """Find where the run begins; a collective.

    Raises ResumeError when a checkpoint does not fit the run, or when the ranks read different files.
    """
    with peers.one_fate():
        start = _start(inputs)
    shards = " ".join(corpus.train.fingerprint for corpus in inputs.data.corpora)
    said = {"checkpoint": start.fingerprint, "shards": shards, "configuration": config.dump(inputs.cfg)}
    check_agreement(inputs.world, said)
    return start


def _start(inputs: Inputs) -> Start:
    """The run's own checkpoint, else the checkpoint that it branches off, else a start from scratch."""
    found = _own_checkpoint(inputs)
    if found is not None:
        return Start(found.state, found)
    begin = inputs.cfg.branch_from
    if begin is None:
        return Start(TrainState())
    parent = _parent(inputs, begin)
    fresh = begin.optimizer == "fresh"
    state = TrainState(parent.state.step, adam_began=parent.state.step) if fresh else parent.state
    return Start(state, parent, branches=True)


def _own_checkpoint(inputs: Inputs) -> Checkpoint | None:
    """The newest checkpoint of this run, if there is one. Raises ResumeError if the run may not continue it."""
    cfg, world, folder, tokenizer = inputs.cfg, inputs.world, inputs.folder, inputs.tokenizer
    newest = checkpoint.newest(folder, world.speaks)
    if newest is None:
        return None
    found = Checkpoint(newest, world.rank, world.size)
    old, state = _named(_configuration(found), cfg), found.state
    lines = config.resume_conflicts(old, cfg)
    lines += past_conflicts((old.optim, old.phases), (cfg.optim, cfg.phases), state.step, state.adam_began)
    lines += inputs.data.conflicts(found.index, old.phases[: len(done_in(old.phases, state.step))])
    if found.index["tokenizer"] != tokenizer.fingerprint:
        began = f"tokenizer: this run began with {found.index['tokenizer'][:12]}…"
        lines.append(f"{began}, {cfg.data.tokenizer} is {tokenizer.fingerprint[:12]}…")
    if lines:
        raise ResumeError(
            f"{folder} was begun with other settings and cannot be continued with these",
            *lines,
            "set them back; append a phase to go on otherwise; or choose another out= for a new run",
        )
    return found


def _parent(inputs: Inputs, begin: BranchConfig) -> Checkpoint:
    """The checkpoint at which a branch begins. Raises ResumeError unless it exists and has the model of the branch."""
    cfg, world, tokenizer, run = inputs.cfg, inputs.world, inputs.tokenizer, begin.folder.parent.parent
    if run.resolve() == inputs.folder.resolve():
        raise ConfigError("a branch needs a folder of its own", f"out and branch_from.run are both {run}")
    if not (begin.folder / INDEX).is_file():
        there = ", ".join(f"{step:,}" for step in checkpoint.steps_of(run)) or "no checkpoint"
        remedy = "take one of these steps; checkpoint.keep_every keeps more of a run"
        raise ResumeError(f"there is no checkpoint to branch from: {begin.folder}", f"{run} has {there}", remedy)
    parent = Checkpoint(begin.folder, world.rank, world.size)
    old = _configuration(parent)
    kept = old.model
    if kept.positions == "rope":
        kept = kept.model_copy(update={key: getattr(cfg.model, key) for key in ROTATIONS})
    lines = config.resume_conflicts(kept, cfg.model, "model.")
    if parent.index["tokenizer"] != tokenizer.fingerprint:
        theirs, ours = parent.index["tokenizer"][:12], tokenizer.fingerprint[:12]
        lines.append(f"tokenizer: {theirs}… → {ours}…, {tokenizer.folder}")
    if lines:
        raise ResumeError("a branch keeps the model and the tokenizer of its parent", *lines, "set them back")
    if begin.optimizer == "keep" and old.optim.kind != cfg.optim.kind:
        raise ResumeError(
            "a branch cannot keep the state of another optimizer",
            f"optim.kind: {old.optim.kind} → {cfg.optim.kind}",
            "set it back, or set branch_from.optimizer to fresh",
        )
    branch.check_skips(begin, old.branch_from)
    return parent


def branch_notes(cfg: RunConfig, parent: Checkpoint) -> list[str]:
    """Lines about the settings of a branch that differ from those of its parent and change the training."""
    old = _named(_configuration(parent), cfg)
    lines = [line for line in config.resume_conflicts(old, cfg) if not line.startswith("branch_from")]
    lines += past_conflicts((old.optim, old.phases), (cfg.optim, cfg.phases), old.steps)
    return [f"  other than in the parent: {line}" for line in lines]


def _configuration(found: Checkpoint) -> RunConfig:
    """The configuration of the run that made a checkpoint."""
    source = f"{found.folder}/{checkpoint.CONFIG}"
    return config.build(RunConfig, config.parse(found.config_text, source), source)


def _named(old: RunConfig, cfg: RunConfig) -> RunConfig:
    """`old`. If its one corpus has no name but has one in `cfg`, it gets that name."""
    return old.named(cfg.data.corpora[0].name) if cfg.data.corpora and not old.data.corpora else old


# The keys of a phase that its learning rate depends on, and the keys that its batches depend on.
RATE_KEYS = ("steps", "lr", "warmup_steps", "decay_steps", "decay")
DATA_KEYS = ("seq_len", "batch_tokens", "mixture", "objective")


def past_conflicts(
    old: tuple[OptimConfig, list[TrainingPhase]], new: tuple[OptimConfig, list[TrainingPhase]], step: int, anew: int = 0
) -> list[str]:
    """Lines `key: old → new` for the settings that would change one of the first `step` steps.

    Compared are the samples, the batch, the objective and the learning rate of those steps. A phase that is running may
    become longer, or get a decay that begins later. The list is empty if no step would change.
    """
    if old == new:
        return []
    (old_optim, old_phases), (new_optim, new_phases) = old, new
    was, would_be = done_in(old_phases, step), done_in(new_phases, step)
    lines = []
    for number, (phase, done) in enumerate(zip(old_phases, was, strict=False)):
        if number >= len(new_phases):
            lines.append(f"phases.{number}: {done:,} of its steps are done → no such phase")
            continue
        keys = DATA_KEYS if number >= len(would_be) or done == would_be[number] else ("steps", *DATA_KEYS)
        lines += _changed(f"phases.{number}", phase, new_phases[number], keys)
    if lines:
        return lines
    for past_step in range(step):
        rate, instead = lr_at(past_step, old_optim, old_phases, anew), lr_at(past_step, new_optim, new_phases, anew)
        if rate != instead:
            lines = _changed("optim", old_optim, new_optim, ("lr", "warmup_steps", "floor"))
            for number in range(locate(past_step, old_phases).number + 1):
                lines += _changed(f"phases.{number}", old_phases[number], new_phases[number], RATE_KEYS)
            return [*lines, f"step {past_step + 1:,} was made with a learning rate of {rate:.3g}, not of {instead:.3g}"]
    return []


def _changed(where: str, old: Config, new: Config, keys: tuple[str, ...]) -> list[str]:
    """A line `where.key: old → new` for each of `keys` with another value."""
    pairs = ((key, getattr(old, key), getattr(new, key)) for key in keys)
    return [f"{where}.{key}: {short(a)} → {short(b)}" for key, a, b in pairs if a != b]
