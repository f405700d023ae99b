"""A pre-training run: its configuration, every check that can be made before a step is paid for, and resume."""

import json
import math
import os
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from pretrain import config, export
from pretrain.errors import ConfigError, ResumeError, Stopped
from pretrain.hashing import INIT, hash64
from pretrain.model.transformer import Transformer, initialise, parameters_of
from pretrain.objectives.objectives import Learner
from pretrain.order import branch, run_data
from pretrain.order.order import Order
from pretrain.order.phases import Phase, done_in, tokens_after
from pretrain.order.run_data import Corpus
from pretrain.processes import memory
from pretrain.storage.files import finished, is_used, write_json
from pretrain.storage.index import INDEX, RECORDED
from pretrain.storage.locks import locked
from pretrain.storage.publish import check_output
from pretrain.tokenizer import Tokenizer, open_tokenizer
from pretrain.training import checkpoint, loader
from pretrain.training.checkpoint import Checkpoint, TrainState
from pretrain.training.config import RunConfig
from pretrain.training.engine.engine import DeepSpeedEngine, Engine, check_memory, engine_for
from pretrain.training.engine.peers import Peers
from pretrain.training.engine.ranks import World, check_agreement, device_of, failures_said, find_world, join, on_cuda
from pretrain.training.heldout import HeldOut, Scores
from pretrain.training.optim.optim import adamw, past_conflicts, schedule_notes
from pretrain.training.trainer import Intervals, Job, train
from pretrain.training.watch.metrics import JSONL, reports, say

SUMMARY = "summary.json"
Load = Callable[[str, str], torch.Tensor]  # of a checkpoint: the kind and name of a tensor → the tensor
SEEN_S = 90  # after which every node must see what rank 0 has written
LAST_STEPS = 20  # over which the last training loss of a summary is averaged


def run(cfg: RunConfig) -> dict:
    """Train `cfg`, or continue it from its newest checkpoint. Returns the summary.

    DeepSpeed executes the steps of several ranks, plain torch those of one (`engine_for`). Raises ConfigError,
    ShardError, TokenizerError, ResumeError or ExportError before the first step, and Stopped when a signal ends the run
    before its last evaluation.
    """
    started = time.monotonic()
    world = find_world()
    cfg = cfg.resolved()
    folder = Path(cfg.out)
    _check_output(folder)
    tokenizer = open_tokenizer(cfg.data.tokenizer)
    if cfg.export:
        export.check(cfg.model, cfg.export.dialect, tokenizer.kind)
    corpora = run_data.open_corpora(cfg.data, tokenizer)
    run_data.check_sizes(corpora, cfg.block_tokens, max(phase.seq_len for phase in cfg.phases))
    parameters = parameters_of(cfg.model, corpora[0].train.vocab_size)
    check_memory(parameters, cfg.engine, world)
    whole_words = cfg.objective.kind == "masked_lm" and cfg.objective.unit == "word"
    plan = run_data.order(cfg.data, corpora, branch.reading(cfg.phases, cfg.skips), cfg.seed, whole_words)
    identity = {
        "settings": config.frozen(cfg),
        **run_data.identity(corpora, plan),
        "tokenizer": tokenizer.fingerprint,
        "vocab_size": corpora[0].train.vocab_size,
    }
    if not on_cuda():
        memory.keep_tensors()
    if engine_for(cfg.engine, world) is DeepSpeedEngine:
        join(world, cfg.engine.timeout_s)
    peers = Peers(world, cfg.checkpoint.timeout_s)
    with failures_said(world), ExitStack() as lock:  # held from the first look at checkpoints until all is written
        with peers.one_fate():
            if world.speaks:
                lock.enter_context(locked(folder, "pretrain", ConfigError))
        return _train(cfg, peers, tokenizer, corpora, plan, identity, started)


def _train(
    cfg: RunConfig,
    peers: Peers,
    tokenizer: Tokenizer,
    corpora: list[Corpus],
    plan: Order,
    identity: dict,
    started: float,
) -> dict:
    """The part of `run` for which the folder is locked: from the look at its checkpoints to the summary."""
    world, folder = peers.world, Path(cfg.out)
    with peers.one_fate():
        found = _checkpoint_of(cfg, folder, corpora, plan, world)
        parent = _parent_of(cfg, tokenizer, world) if found is None and cfg.branch_from else None
    source = found or parent
    begin = source.index["fingerprint"] if source else "none"
    read = " ".join(corpus.train.fingerprint for corpus in corpora)
    check_agreement(world, {"checkpoint": begin, "shards": read, "configuration": config.dump(cfg)})
    state = source.state if source else TrainState()
    if parent and cfg.branch_from.optimizer == "fresh":
        state = TrainState(state.step, adam_began=state.step)
    identity = {**identity, **_descent(parent, found)}
    summary = _summary_of(folder, cfg.steps, world.speaks)
    if state.step == cfg.steps and summary:
        if world.speaks:
            say(f"{folder}: all {cfg.steps} steps are done; append a phase to go on")
        return summary

    run_data.check_epochs(corpora, plan)
    batches = loader.Batches(
        plan.corpora,
        cfg.objective,
        cfg.phases,
        cfg.seed,
        cfg.engine.micro_batch,
        world.rank,
        world.size,
        begun=_phases_over(cfg.phases, state.step),
        skips=cfg.skips,
    )
    token_bytes = tokenizer.token_bytes() if tokenizer.counts_bytes else None
    heldout = {
        phase.seq_len: {
            corpus.name: HeldOut(
                corpus.heldout,
                cfg.objective,
                phase.seq_len,
                cfg.evaluate.max_tokens,
                token_bytes,
                packed=cfg.data.windows == "documents",
            )
            for corpus in corpora
        }
        for phase in cfg.phases
    }

    text = config.dump(cfg)
    model = Transformer(cfg.model, identity["vocab_size"])
    parameters = sum(p.numel() for p in model.parameters())
    flops = {n: model.flops_per_token(n, objective.targets) for n, objective in batches.objectives.items()}
    engine = _engine(cfg, world, model, corpora, batches, source, state)
    with peers.one_fate():
        if world.speaks:
            _begin(folder, text, state)
    with peers.one_fate():
        _check_shared(folder / checkpoint.CONFIG, text)
    every = cfg.checkpoint
    job = Job(
        folder=folder,
        seed=cfg.seed,
        phases=cfg.phases,
        optim=cfg.optim,
        intervals=Intervals(
            log=cfg.log_every,
            evaluate=cfg.evaluate.every_steps,
            checkpoint=every.every_steps,
            checkpoint_s=every.every_s,
            keep=every.keep,
            keep_every=every.keep_every,
        ),
        engine=engine,
        world=world,
        peers=peers,
        batches=batches,
        workers=cfg.data.workers,
        prefetch=cfg.data.prefetch,
        read_ahead=cfg.data.read_ahead,
        heldout=heldout,
        micro_batch=cfg.engine.micro_batch,
        dropout=cfg.model.dropout > 0,
        tokenizer=tokenizer,
        flops_per_token=flops,
        low_precision=cfg.engine.precision != "fp32",
        identity=identity,
        begun=cfg.begun,
        config_yaml=text,
    )
    if world.speaks:
        what = f"{cfg.objective.kind}, {parameters:,} parameters, {cfg.steps} steps"
        where = f"{engine.name}, {world.size} x {engine.device.type}, {cfg.engine.precision}"
        notes = schedule_notes(cfg.optim, cfg.phases)
        begin = f"continuing after step {state.step}" if found else "from scratch"
        if parent:
            begin = f"branching after step {state.step} of {parent.folder}, AdamW {cfg.branch_from.optimizer}"
            notes += _differences(cfg, parent)
        for first, last in cfg.skips:
            notes.append(f"what steps {first} to {last} of the parent read is skipped")
        if not (every.every_s or every.every_steps or every.keep_every):
            notes.append("saved only at its end: checkpoint.every_s, every_steps and keep_every are all 0")
        say("\n".join([f"{folder}: {what}; {where}; {begin}", *run_data.plan_lines(plan), *notes]))
    if parent:  # from here on the parent may be removed, or remove its older checkpoints
        checkpoint.publish(folder, state, engine, peers, text, identity)
    state, scores = train(job, state)
    if scores is None:
        raise Stopped(f"stopped at step {state.step} of {cfg.steps}; start again to continue")
    summary = _summarise(job, state, scores)
    summary |= {"parameters": parameters, "seconds": round(time.monotonic() - started, 1)}  # of the last attempt
    if world.speaks:
        with checkpoint.explained(folder / SUMMARY):
            write_json(folder / SUMMARY, summary)
    return summary


def _summarise(job: Job, state: TrainState, scores: dict[str, Scores]) -> dict:
    """The end of a run in numbers: nats per target, the last loss over 20 steps; only rank 0 knows the losses."""
    together = scores[""]
    recorded = reports(job.folder) if job.world.speaks else []
    first = job.begun + 1
    if job.world.speaks and not any(report.step == first for report in recorded):
        say(f"warning: {job.folder / JSONL} lacks step {first}: first_loss in {SUMMARY} is null")
    last_losses = [report.loss for report in recorded[-LAST_STEPS:] if report.loss is not None]
    summary = {
        "steps": state.step,
        "steps_skipped": state.skipped,
        "tokens": tokens_after(state.step, job.phases),
        "first_loss": next((report.loss for report in recorded if report.step == first), None),
        "last_loss": float(np.mean(last_losses)) if last_losses else None,
        "heldout_loss": together.loss,
        "heldout_accuracy": together.accuracy,
        "heldout_bits_per_byte": together.bits_per_byte,
        "heldout_targets": together.targets,
        "heldout_standard_error": together.standard_error,  # of heldout_loss, over windows
        "no_context_loss": together.no_context_loss,  # the least of a predictor that ignores context, on these targets
        "heldout_gain": together.gain,  # over it
        "checkpoint": str(checkpoint.newest(job.folder, job.world.speaks)),
    }
    each = {name: found.values() for name, found in scores.items() if name}
    return summary | ({"heldout": each} if each else {})


def _engine(
    cfg: RunConfig,
    world: World,
    model: Transformer,
    corpora: list[Corpus],
    batches: loader.Batches,
    found: Checkpoint | None,
    state: TrainState,
) -> Engine:
    """The engine with fresh weights, or with those and the optimizer state of a checkpoint; the latter only if Adam has
    not just begun anew."""
    if cfg.engine.deterministic and device_of(world).type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    load = found.tensors() if found else None
    if load:
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(load("weights", name))
    else:
        weights = cfg.phases[0].weights([corpus.name for corpus in corpora])
        counts = run_data.unigram([corpus.train for corpus in corpora], weights)
        initialise(model, int(hash64(INIT, cfg.seed) >> np.uint64(1)), torch.from_numpy(counts))
    kind = engine_for(cfg.engine, world)
    engine = kind(Learner(model), lambda m: adamw(m, cfg.optim), cfg.engine, cfg.optim.clip or math.inf, world)
    if load:
        step = min(state.step, cfg.steps - 1)  # phases that are over may not divide among the ranks of today
        load = _without_moments(load) if state.adam_began == state.step else load
        engine.restore(load, state.steps_applied, batches[batches.first_item(step)].batch)
    return engine


def _without_moments(load: Load) -> Load:
    """`load` with moments of 0, for an Adam that begins anew."""
    return lambda kind, name: load(kind, name) if kind == "weights" else torch.zeros_like(load("weights", name))


def _phases_over(phases: list[Phase], step: int) -> int:
    """How many leading phases lie wholly before `step`."""
    return int((np.cumsum([phase.steps for phase in phases]) <= step).sum())


def _begin(folder: Path, text: str, state: TrainState) -> None:
    """Make the run folder with its configuration, and sweep it. Raises ResumeError when it cannot be written."""
    with checkpoint.explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with finished(folder / checkpoint.CONFIG) as file:
            file.write(text.encode())
    checkpoint.sweep(folder, state)


def _check_shared(path: Path, text: str) -> None:
    """Raise ResumeError unless this rank can read what rank 0 has written: each rank will write parts of checkpoints.

    Another node may see the file a while later (NFS keeps the names in a folder for up to a minute).
    """
    deadline = time.monotonic() + SEEN_S
    while not (path.is_file() and path.read_text(encoding="utf-8") == text):
        if time.monotonic() > deadline:
            raise ResumeError(
                "the ranks do not see the same run",
                f"on {socket.gethostname()} {path.absolute()} is not what rank 0 has written there",
                "out must be on a file system that all nodes share",
            )
        time.sleep(0.1)


def _summary_of(folder: Path, steps: int, speak: bool) -> dict | None:
    """The summary of a run that has done all its `steps`, if it was written; an older end's does not count."""
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
    """Raise ConfigError unless `folder` is new, empty or a run's."""
    check_output(folder, ConfigError)
    if folder.is_symlink() and not folder.exists():
        found = f"{folder} is a link to {os.readlink(folder)}, which is not there"
        raise ConfigError("the output folder cannot be made", found, "make that folder, or choose another out=")
    if folder.exists() and is_used(folder) and not (folder / "config.yaml").is_file():
        raise ConfigError(
            "the output folder holds something else", f"{folder} has files but no config.yaml", "choose another out="
        )


def _parent_of(cfg: RunConfig, tokenizer: Tokenizer, world: World) -> Checkpoint:
    """The checkpoint at which a branch begins. Raises ResumeError unless it is there and has the branch's model."""
    begin = cfg.branch_from
    run = begin.folder.parent.parent
    if run.resolve() == Path(cfg.out).resolve():
        raise ConfigError("a branch needs a folder of its own", f"out and branch_from.run are both {run}")
    if not (begin.folder / INDEX).is_file():
        there = ", ".join(f"{step:,}" for step in checkpoint.steps_of(run)) or "no checkpoint"
        remedy = "take one of these steps; checkpoint.keep_every keeps more of a run"
        raise ResumeError(f"there is no checkpoint to branch from: {begin.folder}", f"{run} has {there}", remedy)
    parent = Checkpoint(begin.folder, world.rank, world.size)
    old = _configuration(parent)
    lines = config.resume_conflicts(old.model, cfg.model, "model.")
    if parent.index["tokenizer"] != tokenizer.fingerprint:
        theirs, ours = parent.index["tokenizer"][:12], tokenizer.fingerprint[:12]
        lines.append(f"tokenizer: {theirs}… → {ours}…, {tokenizer.folder}")
    if lines:
        raise ResumeError("a branch keeps the model and the tokenizer of its parent", *lines, "set them back")
    branch.check_skips(begin, old.branch_from)
    return parent


def _configuration(found: Checkpoint) -> RunConfig:
    """The configuration a checkpoint was made with."""
    source = f"{found.folder}/{checkpoint.CONFIG}"
    return config.build(RunConfig, config.parse(found.config_text, source), source)


def _differences(cfg: RunConfig, parent: Checkpoint) -> list[str]:
    """Lines about the settings of a branch by which its parent would have gone another way."""
    old = _configuration(parent)
    if cfg.data.corpora and not old.data.corpora:
        old = old.named(cfg.data.corpora[0].name)
    lines = [line for line in config.resume_conflicts(old, cfg) if not line.startswith("branch_from")]
    lines += past_conflicts((old.optim, old.phases), (cfg.optim, cfg.phases), old.steps)
    return [f"  other than in the parent: {line}" for line in lines]


def _descent(parent: Checkpoint | None, found: Checkpoint | None) -> dict:
    """The entry about the parent in the index of a branch's checkpoints: its fingerprint, and where it was."""
    if parent:
        return {"parent": parent.index["fingerprint"], RECORDED: {"parent": str(parent.folder)}}
    if found and "parent" in found.index:
        recorded = found.index.get(RECORDED, {})
        return {"parent": found.index["parent"], RECORDED: {"parent": recorded.get("parent")}}
    return {}


def _checkpoint_of(cfg: RunConfig, folder: Path, corpora: list[Corpus], plan: Order, world: World) -> Checkpoint | None:
    """The newest checkpoint of this run, if there is one and it may be continued with `cfg`."""
    newest = checkpoint.newest(folder, world.speaks)
    if newest is None:
        return None
    found = Checkpoint(newest, world.rank, world.size)
    old = _configuration(found)
    if cfg.data.corpora and not old.data.corpora:
        old = old.named(cfg.data.corpora[0].name)
    begun = len(done_in(old.phases, found.state.step))
    lines = config.resume_conflicts(old, cfg)
    state = found.state
    lines += past_conflicts((old.optim, old.phases), (cfg.optim, cfg.phases), state.step, state.adam_began)
    lines += run_data.conflicts(found.index, old.phases[:begun], corpora, plan)
    tokenizer = corpora[0].tokenizer
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
