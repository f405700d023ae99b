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

from pretrain.hashing import DROPOUT, hash64
from pretrain.order.phases import Phase, locate, tokens_after
from pretrain.processes.prefetch import Workers
from pretrain.processes.signals import Interrupt
from pretrain.storage.index import RECORDED
from pretrain.training import loader
from pretrain.training.checkpoint import TrainState
from pretrain.training.engine.engine import Engine, seed_everything
from pretrain.training.engine.peers import Peers
from pretrain.training.engine.ranks import World
from pretrain.training.engine.transfers import Download
from pretrain.training.exports import Exports
from pretrain.training.feed import Feed
from pretrain.training.history import History
from pretrain.training.loader import MicroBatch
from pretrain.training.optim.schedule import OptimConfig, lr_at
from pretrain.training.saves import Saves
from pretrain.training.saving import Writer
from pretrain.training.watch.log import Interval, StepReport, log_line, memory_gib, peak_flops, say
from pretrain.training.watch.metrics import Metrics
from pretrain.training.watch.observer import Findings, Moment, Observer


@dataclass(frozen=True)
class Intervals:
    """The intervals of a run in optimizer steps. 0 means never, except at the end of the run."""

    log: int
    checkpoint: int
    checkpoint_s: float  # in seconds since the last checkpoint
    keep: int  # the number of newest checkpoints that are kept
    keep_every: int

    def save_due(self, step: int) -> bool:
        """Whether `step` is saved whatever the clock says."""
        return _due(step, self.checkpoint) or _due(step, self.keep_every)


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
    workers: Workers[MicroBatch]
    observers: list[Observer]  # they measure in this order
    first: list[Observer]  # those that also measure the weights before the first step
    exports: Exports | None  # None: training exports nothing
    dropout: bool  # whether a step draws random numbers
    flops_per_token: list[float]  # a number for each phase
    low_precision: bool  # whether matrix products are in bf16, as the listed peaks assume
    identity: dict[str, Any]  # the entries about the run in the index of a checkpoint
    history: History  # the entries that depend on the step and the machine
    writer: Writer  # of checkpoints
    begun: int  # the step of the checkpoint at which a branch began; 0: the run is no branch
    config_yaml: str

    @property
    def steps(self) -> int:
        return sum(phase.steps for phase in self.phases)

    def identity_at(self, step: int) -> dict[str, Any]:
        """The entries about the run in the index of the checkpoint of `step`."""
        return self.identity | {RECORDED: self.identity.get(RECORDED, {}) | self.history.at(step)}


@dataclass(frozen=True)
class Launched:
    """A step that was launched and is not read yet. A GPU may still be computing it."""

    lr: float
    filled: dict[str, int]  # the slots of each part of the loss, of all ranks
    digest: str
    figures: Download  # the sum of each part of the loss on this rank, and the norm of the gradient
    began: float
    data_wait_s: float


def train(job: Job, state: TrainState) -> tuple[TrainState, list[Findings] | None]:
    """Train from `state` to the last step, or until interrupted.

    Returns the state of the run, and the findings of its observers at the end; None: it was interrupted before. A
    state is copied for its checkpoint before observers measure, and the checkpoint is written meanwhile; that of the
    last step is complete before. Raises PretrainError when the weights are ruined, and ResumeError when a checkpoint
    cannot be written.

    The loss of a step is the mean over the targets of its global batch: Σ loss / N. N is summed over the ranks before
    the first backward pass, so micro-batches and ranks with fewer filled slots weigh less. An objective whose loss has
    several parts has an N for each, and its loss is the weighted sum of their means.

    Nothing waits for a GPU at the boundary of two steps. While it computes a step, the host gets the batch of the next
    one and launches that, and only then reads the figures of the step. Where the state of a step is saved, measured or
    exported, the step is read at once, and no other is launched before that is done.
    """
    engine, world = job.engine, job.world
    tokens = tokens_after(state.step, job.phases)
    line = state.step // job.intervals.log * job.intervals.log  # the step of the last line of the log
    scored = min(state.step, job.steps - 1)  # a run that was killed before its summary is scored again
    records = (job.folder, state.step, tokens, line, scored, job.config_yaml, job.begun)
    metrics = Metrics(*records) if world.speaks else None
    interval = Interval(metrics.before if metrics else [])
    saves, exports = Saves(job, state, metrics), job.exports
    found = None
    stop = False
    step, unread, read_at = state.step, list[Launched](), 0.0  # `step` is launched, `state` that of the last step read
    engine.train(True)
    feed = Feed(engine, job.batches, job.workers, state.step)
    records_open = closing(metrics) if metrics else nullcontext()
    with Interrupt(watch_launcher=world.launched) as interrupt, records_open, closing(job.writer):
        # A step is saved before observers measure. If the last attempt ended in between, they measure it now.
        due = observers_due(job, state.step) if job.begun < state.step < job.steps else []
        due = due if state.step else job.first
        if due and job.peers.any(metrics is not None and not metrics.scored):
            stop = look(job, due, state, tokens, metrics, interrupt) is None
        if exports and state.step < job.steps and not stop:
            exports.catch_up(state.step, job.begun, interrupt)
        batch, _ = feed.following()
        while step < job.steps and not stop:
            # Launch a step. `step` is its number from 0 on.
            assert batch is not None, "there is a batch for every step"
            began = time.perf_counter()
            objective = job.batches.objectives[locate(step, job.phases).number]
            lr = lr_at(step, job.optim, job.phases, state.adam_began)
            filled, digest = batch.filled, batch.digest
            scales = {part: weight / filled[part] for part, weight in objective.parts.items()}
            sums = torch.zeros(len(scales), dtype=torch.float64, device=engine.device)
            for micro in batch.micro_batches:
                if job.dropout:
                    seed_everything(int(hash64(DROPOUT, job.seed, step, micro.first_sample) >> np.uint64(1)))
                losses = engine(objective, micro.batch)
                engine.backward(losses, scales)
                sums += torch.stack([losses[part].detach().double() for part in scales])
            # The next batch comes before the step of the optimizer, in which DeepSpeed waits for the gradient.
            batch, (asked, overdue, busy, failed) = feed.following([interrupt.asked, *saves.wishes()])
            grad_norm = engine.step(lr)
            figures = Download(torch.cat([sums, grad_norm.double().view(1)]))
            unread.append(Launched(lr, filled, digest, figures, began, data_wait_s=batch.wait_s if batch else 0.0))
            step += 1  # from here on it is the number of steps that are launched

            # Read the step before, and this one too if its state may be saved, measured or exported.
            last, due = step == job.steps, observers_due(job, step)
            exported = exports is not None and exports.due_at(step)
            saved = last or asked or overdue or failed or saves.wanted or job.intervals.save_due(step)
            pauses = bool(saved or due or exported)
            while len(unread) > (0 if pauses else 1):
                launched = unread.pop(0)
                (*totals, norm), at = launched.figures.read()
                step_s, read_at = at - max(launched.began, read_at), at
                position = locate(state.step, job.phases)
                weights = job.batches.objectives[position.number].parts
                totals = engine.total(torch.tensor(totals, dtype=torch.float64)).tolist()
                parts = {part: total / launched.filled[part] for part, total in zip(weights, totals, strict=True)}
                loss = sum(weight * parts[part] for part, weight in weights.items())

                state = state.next(applied=math.isfinite(norm))
                tokens += position.phase.batch_tokens
                report = StepReport(
                    step=state.step,
                    loss=loss if math.isfinite(loss) else None,
                    lr=launched.lr,
                    grad_norm=norm if math.isfinite(norm) else None,
                    digest=launched.digest,
                    tokens=tokens,
                    step_s=step_s,
                    data_wait_s=launched.data_wait_s,
                    parts=parts if len(parts) > 1 and math.isfinite(loss) else {},
                )
                interval.add(report)
                if metrics:
                    metrics.record(report)
                    if state.step == job.steps or state.step % job.intervals.log == 0:
                        _log(job, state, tokens, interval, metrics)
                        interval = Interval()
                saves.note(report)
            saves.advance(busy, failed)
            if not pauses:
                continue

            # After a skipped step do one more: if that is finite, it can be saved.
            stop = bool(asked) and (last or saves.ruined != 1)
            if last or stop or overdue or job.intervals.save_due(step):
                saves.wanted = True
            if exports and exported:
                saves.wanted = exports.wanted = True
            if saves.wanted and report.finite:
                saves.save(state)
            if due and not stop and not last:
                stop = look(job, due, state, tokens, metrics, interrupt) is None
                if stop and report.finite and saves.step < state.step:
                    saves.save(state)
            if exports and exports.wanted and saves.step == state.step and not stop and not last:
                saves.finish()
                exports.make(state.step, interrupt)
        saves.finish()
        if state.step == job.steps:
            found = look(job, job.observers, state, tokens, metrics, interrupt)
            if found is not None:
                saves.end(state, found)
                if exports and (exports.wanted or exports.due_at(state.step)):
                    exports.make(state.step, interrupt)
        if found is None and world.speaks:
            reason = interrupt.reason if interrupt.asked else "another rank was asked to"
            say(f"stopped at step {state.step} ({reason}): {saves.said(state)}")
        job.peers.any(False)  # a launcher ends all ranks when one ends: wait until rank 0 has printed
    return state, found


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


def _due(step: int, every: int) -> bool:
    """Whether `step` is a multiple of `every`; never if `every` is 0."""
    return every > 0 and step % every == 0
