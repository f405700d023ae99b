"""The loop. What happens in a step is written in the step."""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pretrain import checkpoint, loader
from pretrain.checkpoint import TrainState
from pretrain.engine import Engine, seed_everything
from pretrain.errors import PretrainError
from pretrain.evaluate import HeldOut, Scores, together
from pretrain.interrupt import Interrupt
from pretrain.metrics import Metrics, StepReport, duration, log_line, memory_gib, peak_flops
from pretrain.optim import OptimConfig, lr_at
from pretrain.permutation import DROPOUT, hash64
from pretrain.phases import Phase, locate, tokens_after
from pretrain.ranks import World
from pretrain.samples import sample_text
from pretrain.tokenizer import Tokenizer

SKIPS_IN_A_ROW = 20  # steps without a finite gradient after which a run is given up


@dataclass(frozen=True)
class Intervals:
    """In optimizer steps; 0: only at the end."""

    log: int
    evaluate: int
    checkpoint: int
    keep: int  # checkpoints


@dataclass(frozen=True)
class Job:
    """Everything `train` needs, built by run.py."""

    folder: Path
    seed: int
    phases: list[Phase]
    optim: OptimConfig
    intervals: Intervals
    engine: Engine
    world: World
    batches: loader.Batches
    workers: int
    prefetch: int
    read_ahead: bool
    heldout: dict[int, dict[str, HeldOut]]  # by sequence length and corpus
    micro_batch: int
    tokenizer: Tokenizer
    flops_per_token: dict[int, float]  # by sequence length
    low_precision: bool  # matrices in bf16: only then do the listed peaks apply
    identity: dict  # what a checkpoint's index says about its run
    config_yaml: str

    @property
    def steps(self) -> int:
        return sum(phase.steps for phase in self.phases)


def train(job: Job, state: TrainState) -> tuple[TrainState, dict[str, Scores] | None]:
    """Train from `state` to the last step, or until interrupted; a checkpoint is there in either case.

    Returns where the run stands, and the held-out scores of its end (None when interrupted).

    The mean loss of a step is over the targets of its global batch: Σ loss / N, with N summed over ranks before the
    first backward, so micro-batches and ranks with fewer filled slots weigh less.
    """
    engine, world = job.engine, job.world
    tokens = tokens_after(state.step, job.phases)
    metrics = Metrics(job.folder, state.step, tokens, job.config_yaml) if world.speaks else None
    peak = peak_flops(engine.device) if job.low_precision else None
    skips = 0
    scores = evaluate(job, state, tokens, metrics) if state.step == job.steps else None  # killed before its summary
    engine.train(True)
    batches = loader.steps(job.batches, state.step, job.workers, job.prefetch, job.read_ahead)
    since = _Interval()
    with Interrupt(watch_launcher=world.launched) as interrupt:
        while state.step < job.steps:
            started = time.perf_counter()
            micro_batches = next(batches)
            data_wait_s = time.perf_counter() - started

            phase = locate(state.step, job.phases).phase
            lr = lr_at(state.step, job.optim, job.phases)
            digests = sum(micro.digest for micro in micro_batches) % 2**62  # two ranks' sum stays below 2^63
            agreed = torch.tensor([sum(micro.filled for micro in micro_batches), digests >> 31, digests & (2**31 - 1)])
            filled, high, low = engine.total(agreed).tolist()
            filled = max(1, filled)  # a batch may be one window, and that one empty
            loss_sum = torch.zeros((), dtype=torch.float64, device=engine.device)
            for micro in micro_batches:
                seed_everything(int(hash64(DROPOUT, job.seed, state.step, micro.first_sample) >> np.uint64(1)))
                loss = engine(micro.batch)
                engine.backward(loss, 1.0 / filled)
                loss_sum += loss.detach().double()
            grad_norm = engine.step(lr)
            loss_sum, stop = engine.total(torch.stack([loss_sum.cpu(), torch.tensor(float(interrupt.asked))])).tolist()

            skips = skips + 1 if grad_norm is None else 0
            state = TrainState(state.step + 1, state.steps_applied + (grad_norm is not None))
            tokens += phase.batch_tokens
            report = StepReport(
                step=state.step,
                loss=loss_sum / filled,
                lr=lr,
                grad_norm=grad_norm,
                digest=f"{((high << 31) + low) % 2**62:016x}",
                tokens=tokens,
                step_s=time.perf_counter() - started,
                data_wait_s=data_wait_s,
            )
            since.add(report, phase.batch_tokens)
            last = state.step == job.steps
            if metrics:
                metrics.record(report)
                if last or state.step % job.intervals.log == 0:
                    flops = job.flops_per_token[phase.seq_len]
                    values = since.values(report, flops / peak / world.size if peak else None)
                    values["memory/gib"] = memory_gib(engine.device)
                    metrics.scalars(values, state.step, tokens)
                    print(log_line(state.step, job.steps, values, since.step_s * (job.steps - state.step)), flush=True)
                    since = _Interval()
            if skips == SKIPS_IN_A_ROW:
                raise PretrainError(
                    f"no finite gradient in {skips} steps in a row, the last of them step {state.step}; "
                    f"the newest checkpoint in {job.folder} is from before"
                )
            if last or _due(state.step, job.intervals.evaluate):
                scores = evaluate(job, state, tokens, metrics)
                since = _Interval()
            if last or stop or _due(state.step, job.intervals.checkpoint):
                checkpoint.publish(job.folder, state, engine, world, job.config_yaml, job.identity)
                if metrics:
                    checkpoint.prune(job.folder, job.intervals.keep)
                since = _Interval()
            if stop and not last:
                if metrics:
                    print(f"stopped at step {state.step} ({interrupt.reason if interrupt.asked else 'asked'}): saved")
                break
    if metrics:
        metrics.close()
    return state, scores if state.step == job.steps else None


def evaluate(job: Job, state: TrainState, tokens: int, metrics: Metrics | None) -> dict[str, Scores]:
    """Score held-out windows as long as those of the last step, and show samples; a collective.

    Not as long as the last phase's: of positions it has not trained yet a model knows nothing, and the curve of a
    length curriculum would stand still until its end. Returns the scores of each corpus by name, and under "" those of
    the mixture of the last step's phase.
    """
    started = time.perf_counter()
    phase = locate(state.step - 1, job.phases).phase
    heldout = job.heldout[phase.seq_len]
    at_once = loader.windows_at_once(phase, job.phases, job.micro_batch)
    each = {name: corpus.score(job.engine, job.world, at_once) for name, corpus in heldout.items()}
    weights = phase.weights(list(heldout))
    found = {**each, "": together(list(each.values()), weights)}
    drawn = [name for name, weight in zip(heldout, weights, strict=True) if weight]
    samples = {name: sample_text(heldout[name], job.engine, job.tokenizer) for name in drawn}
    if metrics:
        for name, scores in found.items():
            within = f"heldout/{name}/" if name else "heldout/"
            metrics.scalars({within + key: value for key, value in scores.values().items()}, state.step, tokens)
        for name, sample in samples.items():
            metrics.text(f"sample/{name}" if name else "sample", sample, state.step)
        took = duration(time.perf_counter() - started)
        print(f"held-out at step {state.step}: {_shown(found[''], took)}", flush=True)
        for name in filter(None, each):
            print(f"  {name.ljust(max(map(len, each)))}  {_shown(each[name])}", flush=True)
    return found


def _shown(scores: Scores, *notes: str) -> str:
    found = "  ".join(f"{key} {value:.4f}" for key, value in scores.values().items())
    return f"{found}  ({', '.join([f'{scores.targets:,} targets', *notes])})"


class _Interval:
    """Means over the steps since the last line."""

    def __init__(self) -> None:
        self.count = self.tokens = 0
        self.loss = self.seconds = self.waited = 0.0

    def add(self, report: StepReport, tokens: int) -> None:
        self.count, self.tokens = self.count + 1, self.tokens + tokens
        self.loss += report.loss
        self.seconds, self.waited = self.seconds + report.step_s, self.waited + report.data_wait_s

    @property
    def step_s(self) -> float:
        return self.seconds / self.count

    def values(self, report: StepReport, mfu_per_rate: float | None) -> dict[str, float]:
        rate = self.tokens / self.seconds
        values = {
            "train/loss": self.loss / self.count,
            "optim/lr": report.lr,
            "speed/tokens_per_s": rate,
            "speed/data_wait_share": self.waited / self.seconds,
        }
        if report.grad_norm is not None:
            values["optim/grad_norm"] = report.grad_norm
        if mfu_per_rate is not None:
            values["speed/mfu"] = rate * mfu_per_rate
        return values


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
