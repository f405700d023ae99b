"""A pre-training run: read, check everything before the first step, find where to begin, train, summarise."""

import json
import math
import os
import socket
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pretrain import config
from pretrain.dialects import check_expressible
from pretrain.errors import ConfigError, ResumeError, Stopped
from pretrain.hashing import INIT, hash64
from pretrain.model.init import initialise
from pretrain.model.transformer import Transformer
from pretrain.objectives import Objective
from pretrain.objectives.learner import Learner
from pretrain.order.phases import Phase, tokens_after
from pretrain.order.run_data import RunData, open_run_data
from pretrain.processes import memory
from pretrain.storage.files import finished, is_used, write_json
from pretrain.storage.locks import locked
from pretrain.storage.publish import check_output
from pretrain.tokenizer import Tokenizer, open_tokenizer
from pretrain.training import checkpoint
from pretrain.training.config import RunConfig
from pretrain.training.engine.deepspeed import DeepSpeedEngine
from pretrain.training.engine.engine import Engine, check_memory, engine_for
from pretrain.training.engine.peers import Peers
from pretrain.training.engine.ranks import World, check_agreement, device_of, failures_said, find_world, join, on_cuda
from pretrain.training.heldout import HeldOut, HeldOutLoss, Sides
from pretrain.training.loader import Batches
from pretrain.training.optim import OPTIMIZERS, Optimizer
from pretrain.training.optim.schedule import schedule_notes
from pretrain.training.previews import Previews
from pretrain.training.resume import Start, branch_notes, find_start
from pretrain.training.trainer import Intervals, Job, train
from pretrain.training.watch.log import say
from pretrain.training.watch.metrics import JSONL, reports
from pretrain.training.watch.observer import Findings, Observer

SUMMARY = "summary.json"
SEEN_S = 90  # seconds after which every node must see a file that rank 0 has written
LAST_STEPS = 20  # the last training loss of a summary is the mean over this many steps


def run(cfg: RunConfig) -> dict:
    """Train `cfg`, or continue it from its newest checkpoint. Returns the summary.

    DeepSpeed executes the steps of several ranks, and plain torch the steps of one rank (`engine_for`). Raises
    ConfigError, ShardError, TokenizerError, ResumeError or ExportError before the first step, and Stopped when a signal
    ends the run before its last evaluation.
    """
    started = time.monotonic()
    world, cfg = find_world(), cfg.resolved()
    folder = Path(cfg.out)

    _check_output(folder)
    tokenizer, objectives, data = _read(cfg)
    optimizer = OPTIMIZERS[cfg.optim.kind](cfg.optim)
    check_memory(cfg.model, data.corpora[0].train.vocab_size, len(optimizer.states), cfg.engine, world)

    peers = _connect(cfg, world)
    with failures_said(world), ExitStack() as lock:  # locked before checkpoints are read, until all is written
        with peers.one_fate():
            if world.speaks:
                lock.enter_context(locked(folder, "pretrain", ConfigError))
        start = find_start(cfg, tokenizer, data, peers)
        _check_agreement(cfg, world, data, start)
        summary = _summary_of(folder, cfg.steps, world.speaks)
        if start.state.step == cfg.steps and summary:
            if world.speaks:
                say(f"{folder}: all {cfg.steps} steps are done; append a phase to go on")
            return summary
        data.check_epochs()

        job = _job(cfg, peers, tokenizer, objectives, data, optimizer, start)
        _announce(cfg, job, data, start)
        if start.branches:  # with a checkpoint of its own, the branch no longer needs the files of its parent
            checkpoint.publish(folder, start.state, job.engine, peers, job.config_yaml, job.identity)
        state, found = train(job, start.state)
        if found is None:
            raise Stopped(f"stopped at step {state.step} of {cfg.steps}; start again to continue")
        return _summarise(job, state, found, started)


def _read(cfg: RunConfig) -> tuple[Tokenizer, list[Objective], RunData]:
    """Open everything that the run reads, and report mistakes before anything is allocated."""
    tokenizer = open_tokenizer(cfg.data.tokenizer)
    if cfg.export:
        check_expressible(cfg.model, cfg.export.dialect, tokenizer.kind)
    data = open_run_data(cfg.data, cfg.phases, cfg.seed, tokenizer, cfg.skips, cfg.words)
    return tokenizer, cfg.objectives(tokenizer), data


def _connect(cfg: RunConfig, world: World) -> Peers:
    """Connect to the other ranks, if there are any."""
    if not on_cuda():
        memory.keep_tensors()
    if engine_for(cfg.engine, world) is DeepSpeedEngine:
        join(world, cfg.engine.timeout_s)
    return Peers(world, cfg.checkpoint.timeout_s)


def _check_agreement(cfg: RunConfig, world: World, data: RunData, start: Start) -> None:
    """Raise ResumeError unless all ranks read the same configuration, shards and checkpoint."""
    shards = " ".join(corpus.train.fingerprint for corpus in data.corpora)
    said = {"checkpoint": start.fingerprint, "shards": shards, "configuration": config.dump(cfg)}
    check_agreement(world, said)


def _job(
    cfg: RunConfig,
    peers: Peers,
    tokenizer: Tokenizer,
    objectives: list[Objective],
    data: RunData,
    optimizer: Optimizer,
    start: Start,
) -> Job:
    """Build everything that the training loop needs, and make the folder of the run; a collective."""
    world, folder, text = peers.world, Path(cfg.out), config.dump(cfg)
    begun = _phases_over(cfg.phases, start.state.step)
    batches = Batches(data, objectives, cfg.engine.micro_batch, world.rank, world.size, begun)
    model = Transformer(cfg.model, data.corpora[0].train.vocab_size)
    flops = [
        model.flops_per_token(phase.seq_len, objective.targets)
        for phase, objective in zip(cfg.phases, objectives, strict=True)
    ]
    engine = _engine(cfg, world, model, data, batches, optimizer, start)
    with peers.one_fate():
        if world.speaks:
            _begin(folder, text, start)
    with peers.one_fate():
        _check_shared(folder / checkpoint.CONFIG, text)
    every = cfg.checkpoint
    return Job(
        folder=folder,
        seed=cfg.seed,
        phases=cfg.phases,
        optim=cfg.optim,
        intervals=Intervals(cfg.log_every, every.every_steps, every.every_s, every.keep, every.keep_every),
        engine=engine,
        world=world,
        peers=peers,
        batches=batches,
        workers=cfg.data.workers,
        prefetch=cfg.data.prefetch,
        read_ahead=cfg.data.read_ahead,
        observers=_observers(cfg, world, tokenizer, data, batches.at_once),
        dropout=cfg.model.dropout > 0,
        flops_per_token=flops,
        low_precision=cfg.engine.precision != "fp32",
        identity=_identity(cfg, tokenizer, data) | start.identity(),
        begun=cfg.begun,
        config_yaml=text,
    )


def _identity(cfg: RunConfig, tokenizer: Tokenizer, data: RunData) -> dict:
    """The entries about the run in the index of a checkpoint."""
    return {
        "settings": config.frozen(cfg),
        **data.identity(),
        "tokenizer": tokenizer.fingerprint,
        "vocab_size": data.corpora[0].train.vocab_size,
    }


def _observers(cfg: RunConfig, world: World, tokenizer: Tokenizer, data: RunData, at_once: list[int]) -> list[Observer]:
    """The observers that measure the model at intervals and at the end of the run."""
    token_bytes = tokenizer.token_bytes() if tokenizer.counts_bytes else None
    packed = cfg.data.windows == "documents"
    made: dict[str, Sides] = {}  # phases with equal windows and objective share one
    sides = []
    for number, phase in enumerate(cfg.phases):
        objective = cfg.objective_of(number)
        key = f"{phase.seq_len} {objective}"
        if key not in made:
            made[key] = {
                corpus.name: HeldOut(
                    corpus.heldout, objective, phase.seq_len, cfg.evaluate.max_tokens, token_bytes, packed
                )
                for corpus in data.corpora
            }
        sides.append(made[key])
    every = cfg.evaluate.every_steps
    return [
        HeldOutLoss(Path(cfg.out), every, cfg.phases, at_once, sides, world),
        Previews(every, cfg.phases, sides, world, tokenizer),
    ]


def _engine(
    cfg: RunConfig,
    world: World,
    model: Transformer,
    data: RunData,
    batches: Batches,
    optimizer: Optimizer,
    start: Start,
) -> Engine:
    """The engine with fresh weights, or with the weights and the optimizer's state of a checkpoint."""
    if cfg.engine.deterministic and device_of(world).type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    load = start.tensors(optimizer)
    if load:
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(load("weights", name))
    else:
        initialise(model, int(hash64(INIT, cfg.seed) >> np.uint64(1)), torch.from_numpy(data.unigram()))
    kind = engine_for(cfg.engine, world)
    engine = kind(Learner(model), optimizer, cfg.engine, cfg.optim.clip or math.inf, world)
    if load:
        step = min(start.state.step, cfg.steps - 1)  # finished phases may not divide among the ranks of today
        objective = batches.objectives[_phases_over(cfg.phases, step)]
        engine.restore(load, start.state.steps_applied, objective, batches[batches.first_item(step)].batch)
    return engine


def _phases_over(phases: Sequence[Phase], step: int) -> int:
    """The number of phases that lie wholly before `step`."""
    return int((np.cumsum([phase.steps for phase in phases]) <= step).sum())


def _begin(folder: Path, text: str, start: Start) -> None:
    """Make the run folder with its configuration, and remove remains of killed saves. Raises ResumeError."""
    with checkpoint.explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with finished(folder / checkpoint.CONFIG) as file:
            file.write(text.encode())
    checkpoint.sweep(folder, start.state)


def _check_shared(path: Path, text: str) -> None:
    """Raise ResumeError unless this rank can read the file `path` that rank 0 has written with `text`.

    Every rank will write parts of checkpoints into that folder. Another node may see the file a while later: NFS keeps
    the names in a folder for up to a minute.
    """
    deadline = time.monotonic() + SEEN_S
    while not (path.is_file() and path.read_text(encoding="utf-8") == text):
        if time.monotonic() > deadline:
            raise ResumeError(
                "the ranks do not see the same run",
                f"on {socket.gethostname()} {path.absolute()} differs from the file that rank 0 wrote",
                "out must be on a file system that all nodes share",
            )
        time.sleep(0.1)


def _announce(cfg: RunConfig, job: Job, data: RunData, start: Start) -> None:
    """Print the model, the engine, where the run begins, the table of its data, and notes on unusual settings."""
    if not job.world.speaks:
        return
    parameters = sum(math.prod(shape) for shape in job.engine.shapes().values())
    kinds = list(dict.fromkeys(cfg.objective_of(number).kind for number in range(len(cfg.phases))))
    model = f"{', then '.join(kinds)}, {parameters:,} parameters, {cfg.steps} steps"
    where = f"{job.engine.name}, {job.world.size} x {job.engine.device.type}, {cfg.engine.precision}"
    notes = schedule_notes(cfg.optim, cfg.phases)
    begin = f"continuing after step {start.state.step}" if start.checkpoint else "from scratch"
    if start.branches and start.checkpoint and cfg.branch_from:
        parent, kept = start.checkpoint.folder, cfg.branch_from.optimizer
        begin = f"branching after step {start.state.step} of {parent}, state of the optimizer: {kept}"
        notes += branch_notes(cfg, start.checkpoint)
    for first, last in cfg.skips:
        notes.append(f"the data that steps {first} to {last} of the parent read are skipped")
    every = cfg.checkpoint
    if not (every.every_s or every.every_steps or every.keep_every):
        notes.append("saved only at its end: checkpoint.every_s, every_steps and keep_every are all 0")
    say("\n".join([f"{job.folder}: {model}; {where}; {begin}", *data.table(), *notes]))


def _summarise(job: Job, state: checkpoint.TrainState, found: list[Findings], started: float) -> dict:
    """Write summary.json and return it: the losses, which only rank 0 knows, and the findings of the observers."""
    recorded = reports(job.folder) if job.world.speaks else []
    first = job.begun + 1
    if job.world.speaks and not any(report.step == first for report in recorded):
        say(f"warning: {job.folder / JSONL} lacks step {first}: first_loss in {SUMMARY} is null")
    last_losses = [report.loss for report in recorded[-LAST_STEPS:] if report.loss is not None]
    summary: dict[str, Any] = {
        "steps": state.step,
        "steps_skipped": state.skipped,
        "tokens": tokens_after(state.step, job.phases),
        "first_loss": next((report.loss for report in recorded if report.step == first), None),
        "last_loss": float(np.mean(last_losses)) if last_losses else None,
    }
    for findings in found:
        summary |= findings.summary
    summary |= {
        "checkpoint": str(checkpoint.newest(job.folder, job.world.speaks)),
        "parameters": sum(math.prod(shape) for shape in job.engine.shapes().values()),
        "seconds": round(time.monotonic() - started, 1),  # the time of the last attempt
    }
    if job.world.speaks:
        with checkpoint.explained(job.folder / SUMMARY):
            write_json(job.folder / SUMMARY, summary)
    return summary


def _summary_of(folder: Path, steps: int, speak: bool) -> dict | None:
    """The summary of a run that has done all its `steps`, if it was written. A summary of fewer steps is ignored."""
    path = folder / SUMMARY
    try:
        summary = json.loads(path.read_bytes())
        return summary if summary["steps"] == steps else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        if speak:
            say(f"warning: {path} is damaged; it is written again at the end of the run")
        return None


def _check_output(folder: Path) -> None:
    """Raise ConfigError unless `folder` is new, empty or the folder of a run."""
    check_output(folder, ConfigError)
    if folder.is_symlink() and not folder.exists():
        found = f"{folder} is a link to {os.readlink(folder)}, which is not there"
        raise ConfigError("the output folder cannot be made", found, "make that folder, or choose another out=")
    if folder.exists() and is_used(folder) and not (folder / "config.yaml").is_file():
        raise ConfigError(
            "the output folder holds something else", f"{folder} has files but no config.yaml", "choose another out="
        )
