"""The job of the training loop: batches, model, engine and observers, built from the inputs of a run and its start."""

import math
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from pretrain import config
from pretrain.errors import ResumeError
from pretrain.hashing import INIT, hash64
from pretrain.model.init import initialise
from pretrain.model.models import model_of
from pretrain.model.transformer import Transformer
from pretrain.objectives.learner import Learner
from pretrain.order.phases import Phase
from pretrain.processes.prefetch import Workers
from pretrain.storage.files import finished
from pretrain.training import checkpoint
from pretrain.training.config import RunConfig
from pretrain.training.engine.blocks import check_compiler, compile_notes, set_up_blocks
from pretrain.training.engine.deepspeed import DeepSpeedEngine
from pretrain.training.engine.engine import Engine, engine_for
from pretrain.training.engine.footprint import check_memory
from pretrain.training.engine.peers import Peers
from pretrain.training.engine.ranks import device_of
from pretrain.training.exports import Exports
from pretrain.training.heldout import HeldOut, HeldOutLoss, Sides
from pretrain.training.history import history_of
from pretrain.training.inputs import Inputs
from pretrain.training.loader import Batches, MicroBatch
from pretrain.training.optim.schedule import schedule_notes
from pretrain.training.previews import Previews
from pretrain.training.published import fill
from pretrain.training.resume import Start, branch_notes
from pretrain.training.saving import Writer
from pretrain.training.trainer import Intervals, Job
from pretrain.training.watch.log import say
from pretrain.training.watch.observer import Observer

SEEN_S = 90  # seconds after which every node must see a file that rank 0 has written


def build_job(inputs: Inputs, batches: Batches, workers: Workers[MicroBatch], peers: Peers, start: Start) -> Job:
    """Build everything that the training loop needs, make the folder of the run, and print both; a collective.

    `workers` compute the `batches` ahead. A branch saves its first checkpoint. Raises ConfigError when a corpus would
    be read more often than its max_epochs, or when the run needs more memory than there is.
    """
    cfg, world, folder, text = inputs.cfg, inputs.world, inputs.folder, config.dump(inputs.cfg)
    inputs.data.check_epochs()
    batches.check(begun=_phases_over(cfg.phases, start.state.step))
    with peers.one_fate():
        check_memory(cfg.model, inputs.vocab_size, len(inputs.optimizer.states), cfg.engine, world)
    model = model_of(cfg.model, inputs.vocab_size)
    flops = [
        model.flops_per_token(phase.seq_len, objective.targets)
        for phase, objective in zip(cfg.phases, inputs.objectives, strict=True)
    ]
    with peers.one_fate():
        if cfg.engine.compile:
            check_compiler(cfg.engine.compile, device_of(world))
    engine = _engine(inputs, model, batches, start)
    with peers.one_fate():
        if world.speaks:
            _begin(folder, text, start)
    with peers.one_fate():
        _check_shared(folder / checkpoint.CONFIG, text)
    every = cfg.checkpoint
    heldout, *others = _observers(inputs, batches.at_once)
    job = Job(
        folder=folder,
        seed=cfg.seed,
        phases=cfg.phases,
        optim=cfg.optim,
        intervals=Intervals(cfg.log_every, every.every_steps, every.every_s, every.keep, every.keep_every),
        engine=engine,
        world=world,
        peers=peers,
        batches=batches,
        workers=workers,
        observers=[heldout, *others],
        first=[heldout] if cfg.model.init_from else [],
        exports=Exports(folder, cfg.export.dialect, cfg.export.every_steps, peers) if cfg.export else None,
        dropout=cfg.model.dropout > 0,
        flops_per_token=flops,
        low_precision=cfg.engine.precision != "fp32",
        identity=_identity(inputs) | start.identity(),
        history=history_of(start, inputs.data, _executed(engine, cfg), cfg.engine.precision, engine.device, peers),
        writer=Writer(folder, engine, peers, text),
        begun=cfg.begun,
        config_yaml=text,
    )
    if world.speaks:
        _announce(inputs, job, start)
    if start.branches:  # with a checkpoint of its own, the branch no longer needs the files of its parent
        job.writer.save(start.state, job.identity_at(start.state.step) if world.speaks else {})
    return job


def _engine(inputs: Inputs, model: Transformer, batches: Batches, start: Start) -> Engine:
    """The engine with fresh weights, or with the weights and the optimizer's state of a checkpoint."""
    cfg, world = inputs.cfg, inputs.world
    if cfg.engine.precision == "fp32" and device_of(world).type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32: factors have 10 bits after the point, sums have fp32's 23
    if cfg.engine.deterministic and device_of(world).type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    load = start.tensors(inputs.optimizer)
    if load:
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(load("weights", name))
    else:
        initialise(model, int(hash64(INIT, cfg.seed) >> np.uint64(1)), torch.from_numpy(inputs.data.unigram()))
        if cfg.model.init_from:
            fresh = fill(model, cfg.model.init_from, inputs.tokenizer)
            if fresh and world.speaks:
                say(f"note: {cfg.model.init_from} has no {', '.join(fresh)}: drawn from the seed")
    set_up_blocks(model, cfg.engine)
    kind = engine_for(cfg.engine, world)
    engine = kind(Learner(model), inputs.optimizer, cfg.engine, cfg.optim.clip or math.inf, world)
    if load:
        step = min(start.state.step, cfg.steps - 1)  # finished phases may not divide among the ranks of today
        objective = batches.objectives[_phases_over(cfg.phases, step)]
        engine.restore(load, start.state.steps_applied, objective, batches[batches.first_item(step)].batch)
    return engine


def _phases_over(phases: Sequence[Phase], step: int) -> int:
    """The number of phases that lie wholly before `step`."""
    return int((np.cumsum([phase.steps for phase in phases]) <= step).sum())


def _observers(inputs: Inputs, at_once: list[int]) -> list[Observer]:
    """The observers that measure the model at intervals and at the end of the run. The first is the held-out loss."""
    cfg, world, tokenizer = inputs.cfg, inputs.world, inputs.tokenizer
    token_bytes = tokenizer.token_bytes() if tokenizer.counts_bytes else None
    settings = (cfg.evaluate.max_tokens, token_bytes, cfg.data.windows == "documents", tokenizer.special_tokens)
    made: dict[str, Sides] = {}  # phases with equal windows and objective share one
    sides = []
    for number, phase in enumerate(cfg.phases):
        objective = cfg.objective_of(number)
        key = f"{phase.seq_len} {objective}"
        if key not in made:
            made[key] = {
                corpus.name: HeldOut(corpus.heldout, objective, phase.seq_len, *settings)
                for corpus in inputs.data.corpora
            }
        sides.append(made[key])
    every = cfg.evaluate.every_steps
    return [
        HeldOutLoss(inputs.folder, every, cfg.phases, at_once, sides, world),
        Previews(every, cfg.phases, sides, world, tokenizer),
    ]


def _identity(inputs: Inputs) -> dict:
    """The entries about the run in the index of a checkpoint."""
    return {
        "settings": config.frozen(inputs.cfg),
        **inputs.data.identity(),
        "tokenizer": inputs.tokenizer.fingerprint,
        "vocab_size": inputs.vocab_size,
    }


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


def _executed(engine: Engine, cfg: RunConfig) -> str:
    """The name of the engine, with the compiler of its blocks."""
    return f"{engine.name}, compiled by {cfg.engine.compile}" if cfg.engine.compile else engine.name


def _announce(inputs: Inputs, job: Job, start: Start) -> None:
    """Print the model, the engine, where the run begins, the table of its data, and notes on unusual settings."""
    cfg = inputs.cfg
    parameters = sum(math.prod(shape) for shape in job.engine.shapes().values())
    kinds = list(dict.fromkeys(cfg.objective_of(number).kind for number in range(len(cfg.phases))))
    model = f"{', then '.join(kinds)}, {parameters:,} parameters, {cfg.steps} steps"
    where = f"{_executed(job.engine, cfg)}, {job.world.size} x {job.engine.device.type}, {cfg.engine.precision}"
    notes = cfg.optim.notes() + schedule_notes(cfg.optim, cfg.phases)
    begin = f"from the weights of {cfg.model.init_from}" if cfg.model.init_from else "from scratch"
    begin = f"continuing after step {start.state.step}" if start.checkpoint else begin
    if start.branches and start.checkpoint and cfg.branch_from:
        parent, kept = start.checkpoint.folder, cfg.branch_from.optimizer
        begin = f"branching after step {start.state.step} of {parent}, state of the optimizer: {kept}"
        notes += branch_notes(cfg, start.checkpoint)
    notes += compile_notes(cfg.engine, isinstance(job.engine, DeepSpeedEngine))
    for first, last in cfg.skips:
        notes.append(f"the data that steps {first} to {last} of the parent read are skipped")
    every = cfg.checkpoint
    if not (every.every_s or every.every_steps or every.keep_every):
        notes.append("saved only at its end: checkpoint.every_s, every_steps and keep_every are all 0")
    say("\n".join([f"{job.folder}: {model}; {where}; {begin}", *inputs.data.table(), *notes]))
