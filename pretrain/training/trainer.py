"""The training loop. Everything that happens in a step is written out in the loop."""

import math
import time
from collections.abc import Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pretrain.errors import PretrainError
from pretrain.hashing import DROPOUT, hash64
from pretrain.objectives.objective import Objective
from pretrain.order.phases import Phase, locate, tokens_after
from pretrain.processes.signals import Interrupt
from pretrain.storage.index import RECORDED
from pretrain.training import checkpoint, loader
from pretrain.training.checkpoint import TrainState
from pretrain.training.engine.engine import Engine, seed_everything
from pretrain.training.engine.peers import Peers
from pretrain.training.engine.ranks import World
from pretrain.training.exports import Exports
from pretrain.training.history import History
from pretrain.training.loader import MicroBatch
from pretrain.training.optim.schedule import OptimConfig, lr_at
from pretrain.training.watch.log import Interval, StepReport, log_line, memory_gib, peak_flops, say
from pretrain.training.watch.metrics import Metrics
from pretrain.training.watch.observer import Findings, Moment, Observer

RUINED_IN_A_ROW = 20  # after this many steps in a row without a finite loss and gradient a run gives up


@dataclass(frozen=True)
class Intervals:
    """The intervals of a run in optimizer steps. 0 means never, except at the end of the run."""

    log: int
    checkpoint: int
    checkpoint_s: float  # in seconds since the last checkpoint
    keep: int  # the number of newest checkpoints that are kept
    keep_every: int


@dataclass(frozen=True)
class Job:
    """Everything that `train` needs. build.py builds it."""

    folder: Path
    seed: int
    phases: Sequence[Phase]
    optim: OptimConfig
    intervals: Intervals
    engine: Engine
    world: World
    peers: Peers
    batches: loader.Batches
    workers: int
    prefetch: int
    read_ahead: bool
    observers: list[Observer]  # they measure in this order
    first: list[Observer]  # those that also measure the weights before the first step
    exports: Exports | None  # None: training exports nothing
    dropout: bool  # whether a step draws random numbers
    flops_per_token: list[float]  # a number for each phase
    low_precision: bool  # whether matrix products are in bf16, as the listed peaks assume
    identity: dict[str, Any]  # the entries about the run in the index of a checkpoint
    history: History  # the entries that depend on the step and the machine
    begun: int  # the step of the checkpoint at which a branch began; 0: the run is no branch
    config_yaml: str

    @property
    def steps(self) -> int:
        return sum(phase.steps for phase in self.phases)

    def save(self, state: TrainState) -> Path:
        """Publish the checkpoint of `state`; a collective. Returns its folder."""
        identity = self.identity
        if self.world.speaks:
            identity = identity | {RECORDED: identity.get(RECORDED, {}) | self.history.at(state.step)}
        return checkpoint.publish(self.folder, state, self.engine, self.peers, self.config_yaml, identity)


def train(job: Job, state: TrainState) -> tuple[TrainState, list[Findings] | None]:
    """Train from `state` to the last step, or until interrupted.

    Returns the state of the run, and the findings of its observers at the end; None: it was interrupted before. A
    checkpoint is saved before observers measure. Raises PretrainError when the weights are ruined.

    The loss of a step is the mean over the targets of its global batch: Σ loss / N. N is summed over the ranks before
    the first backward pass, so micro-batches and ranks with fewer filled slots weigh less. An objective whose loss has
    several parts has an N for each, and its loss is the weighted sum of their means.
    """
    engine, world = job.engine, job.world
    tokens = tokens_after(state.step, job.phases)
    line = state.step // job.intervals.log * job.intervals.log  # the step of the last line of the log
    scored = min(state.step, job.steps - 1)  # a run that was killed before its summary is scored again
    records = (job.folder, state.step, tokens, line, scored, job.config_yaml, job.begun)
    metrics = Metrics(*records) if world.speaks else None
    interval = Interval(metrics.before if metrics else [])
    saves, exports = Saves(job, state), job.exports
    found = None
    stop = False
    engine.train(True)
    batches = loader.steps(job.batches, state.step, job.workers, job.prefetch, job.read_ahead)
    with Interrupt(watch_launcher=world.launched) as interrupt, closing(metrics) if metrics else nullcontext():
        # A step is saved before observers measure. If the last attempt ended in between, they measure it now.
        due = observers_due(job, state.step) if job.begun < state.step < job.steps else []
        due = due if state.step else job.first
        if due and job.peers.any(metrics is not None and not metrics.scored):
            stop = look(job, due, state, tokens, metrics, interrupt) is None
        if exports and state.step < job.steps and not stop:
            exports.catch_up(state.step, job.begun, interrupt)
        while state.step < job.steps and not stop:
            started = time.perf_counter()
            micro_batches = next(batches)
            data_wait_s = time.perf_counter() - started

            position = locate(state.step, job.phases)
            phase, objective = position.phase, job.batches.objectives[position.number]
            lr = lr_at(state.step, job.optim, job.phases, state.adam_began)
            filled, digest = _agreed(engine, objective, micro_batches)
            scales = {part: weight / filled[part] for part, weight in objective.parts.items()}
            sums = torch.zeros(len(scales), dtype=torch.float64, device=engine.device)
            for micro in micro_batches:
                if job.dropout:
                    seed_everything(int(hash64(DROPOUT, job.seed, state.step, micro.first_sample) >> np.uint64(1)))
                losses = engine(objective, micro.batch)
                engine.backward(losses, scales)
                sums += torch.stack([losses[part].detach().double() for part in scales])
            grad_norm = engine.step(lr)
            wishes = torch.tensor([interrupt.asked, saves.overdue], dtype=torch.float64)
            *totals, asked, overdue = engine.total(torch.cat([sums.cpu(), wishes])).tolist()
            parts = {part: total / filled[part] for part, total in zip(scales, totals, strict=True)}
            loss = sum(weight * parts[part] for part, weight in objective.parts.items())

            state = state.next(applied=grad_norm is not None)
            tokens += phase.batch_tokens
            report = StepReport(
                step=state.step,
                loss=loss if math.isfinite(loss) else None,
                lr=lr,
                grad_norm=grad_norm,
                digest=digest,
                tokens=tokens,
                step_s=time.perf_counter() - started,
                data_wait_s=data_wait_s,
                parts=parts if len(parts) > 1 and math.isfinite(loss) else {},
            )
            interval.add(report)
            last = state.step == job.steps
            if metrics:
                metrics.record(report)
                if last or state.step % job.intervals.log == 0:
                    _log(job, state, tokens, interval, metrics)
                    interval = Interval()

            saves.note(report)
            # After a skipped step do one more: if that is finite, it can be saved.
            stop = bool(asked) and (last or saves.ruined != 1)
            if last or stop or overdue or saves.due_at(state.step):
                saves.wanted = True
            if exports and exports.due_at(state.step):
                saves.wanted = exports.wanted = True
            if saves.wanted and report.finite:
                saves.save(state, metrics)
            due = observers_due(job, state.step)
            if due and not stop and not last:
                stop = look(job, due, state, tokens, metrics, interrupt) is None
                if stop and report.finite and saves.step < state.step:
                    saves.save(state, metrics)
            if exports and exports.wanted and saves.step == state.step and not stop and not last:
                exports.make(state.step, interrupt)
        if state.step == job.steps:
            found = look(job, job.observers, state, tokens, metrics, interrupt)
            if found is not None:
                saves.end(state, found, metrics)
                if exports and (exports.wanted or exports.due_at(state.step)):
                    exports.make(state.step, interrupt)
        if found is None and world.speaks:
            reason = interrupt.reason if interrupt.asked else "another rank was asked to"
            say(f"stopped at step {state.step} ({reason}): {saves.said(state)}")
        job.peers.any(False)  # a launcher ends all ranks when one ends: wait until rank 0 has printed
    return state, found


def _agreed(engine: Engine, objective: Objective, micro_batches: list[MicroBatch]) -> tuple[dict[str, int], str]:
    """The slots of each part of the loss and the digest of the global batch, summed over the ranks; a collective.

    A digest has 62 bits. Its two halves are summed apart, so that the sums over any number of ranks stay below 2^63.
    """
    digests = sum(micro.digest for micro in micro_batches) % 2**62
    slots = [sum(micro.counts[part] for micro in micro_batches) for part in objective.parts]
    *slots, high, low = engine.total(torch.tensor([*slots, digests >> 31, digests & (2**31 - 1)])).tolist()
    filled = {part: max(1, count) for part, count in zip(objective.parts, slots, strict=True)}  # a batch may be empty
    return filled, f"{((high << 31) + low) % 2**62:016x}"


def observers_due(job: Job, step: int) -> list[Observer]:
    """The observers that measure after `step`."""
    return [observer for observer in job.observers if _due(step, observer.every_steps)]


def look(
    job: Job,
    observers: list[Observer],
    state: TrainState,
    tokens: int,
    metrics: Metrics | None,
    interrupt: Interrupt,
) -> list[Findings] | None:
    """Let observers measure, and record their findings; a collective. None: a rank was asked to stop."""
    every = []
    # The first scores are compared with the last ones, so they are of the windows of the last phase.
    phase = locate(state.step - 1, job.phases).number if state.step else len(job.phases) - 1
    moment = Moment(state.step, phase, state.step == job.steps)
    for observer in observers:
        found = observer.measure(job.engine, moment, interrupt)
        if found is None:
            return None
        every.append(found)
        if metrics:
            metrics.found(found, state.step, tokens)
            for line in found.lines:
                say(line)
    return every


def _log(job: Job, state: TrainState, tokens: int, interval: Interval, metrics: Metrics) -> None:
    """Print one line of the log, and record a point of each of its series."""
    position = locate(state.step - 1, job.phases)
    phase = position.phase
    values = interval.values(job.optim.clip, phase.batch_tokens)
    values["optim/skipped_steps"] = state.skipped
    peak = peak_flops(job.engine.device) if job.low_precision else None
    if peak:
        values["speed/mfu"] = (
            values["speed/tokens_per_s"] * job.flops_per_token[position.number] / peak / job.world.size
        )
    values["memory/gib"] = memory_gib(job.engine.device)
    metrics.scalars(values, state.step, tokens)
    eta_s = interval.step_s * (job.steps - state.step)
    say(log_line(state.step, job.steps, values, eta_s, interval.skipped))


class Saves:
    """Decides which steps are saved, and when older checkpoints are removed.

    A step is saved only if its loss and gradient were finite. A step that is far too long ruins the weights and is
    itself finite; only the next step shows it. So a checkpoint is proven when a finite step or evaluation has followed
    it. Older checkpoints are removed only then, whatever `keep` says.
    """

    def __init__(self, job: Job, state: TrainState):
        self.step = state.step  # the step of the newest checkpoint
        self.wanted = False  # whether a checkpoint is due, and waits for a finite step
        self.ruined = 0  # the number of last steps in a row without a finite loss and gradient
        self._job, self._proven = job, state.step == 0
        self._at = time.monotonic()  # when the newest checkpoint was saved

    @property
    def overdue(self) -> bool:
        """Whether the time between checkpoints is over. The clock of rank 0 decides for all ranks."""
        every_s = self._job.intervals.checkpoint_s
        return self._job.world.speaks and every_s > 0 and time.monotonic() - self._at >= every_s

    def due_at(self, step: int) -> bool:
        return _due(step, self._job.intervals.checkpoint) or _due(step, self._job.intervals.keep_every)

    def note(self, report: StepReport) -> None:
        """Take note of a step. Raises PretrainError after too many steps in a row that were not finite."""
        if report.finite:
            self.ruined = 0
            self._prove()
            return
        self.ruined += 1
        if self.ruined == RUINED_IN_A_ROW:
            first = report.step - self.ruined + 1
            what = f"no finite loss and gradient in {self.ruined} steps in a row, {first} to {report.step}"
            raise PretrainError("\n  ".join((what, *self._remedy())))

    def save(self, state: TrainState, metrics: Metrics | None) -> None:
        """Publish a checkpoint; a collective."""
        if metrics:
            metrics.sync()
        job = self._job
        with job.peers.one_fate():
            job.batches.data.check_unchanged()
        job.save(state)
        self.step, self.wanted, self._proven, self._at = state.step, False, False, time.monotonic()

    def end(self, state: TrainState, found: list[Findings], metrics: Metrics | None) -> None:
        """Take note of the findings after the last step: they prove the weights, or show that they are ruined.

        If the last step was skipped, the weights did not change, and they are saved now that they are proven.
        """
        if faults := [findings.ruined for findings in found if findings.ruined]:
            raise PretrainError("\n  ".join((faults[0], *self._remedy())))
        if self.step < state.step:
            self.save(state, metrics)
        self._prove()

    def said(self, state: TrainState) -> str:
        """A text that says whether the step at which a run stops is saved."""
        if self.step == state.step:
            return "saved"
        return f"not saved, {self.ruined} steps in a row had no finite loss and gradient; {self._remedy()[0]}"

    def _prove(self) -> None:
        """Remove older checkpoints, because the newest one is proven; a collective, as removing may take long."""
        if self._proven:
            return
        self._proven = True
        with self._job.peers.one_fate():
            if self._job.world.speaks:
                checkpoint.prune(self._job.folder, self._job.intervals.keep, self._job.intervals.keep_every)

    def _remedy(self) -> list[str]:
        """Sentences that say which checkpoint to continue from when steps are no longer finite."""
        newest = checkpoint.newest(self._job.folder, speak=False)
        if newest is None:
            return ["no checkpoint was saved before: begin again with a smaller optim.lr and another out="]
        if self._proven:
            again = "if the same steps fail again, begin a new run there: branch_from with skip_steps, or a smaller lr"
            return [f"the newest checkpoint, {newest}, is from before: start again to continue from it", again]
        older = checkpoint.newest(self._job.folder, speak=False, before=self.step)
        doubt = f"the newest checkpoint is {newest}; no finite step has followed it, so its weights may be ruined"
        return [doubt, f"if so, remove it to continue from {older}" if older else "there is no older one"]


def _due(step: int, every: int) -> bool:
    """Whether `step` is a multiple of `every`; never if `every` is 0."""
    return every > 0 and step % every == 0
