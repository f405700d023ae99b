"""A pre-training run: read, check everything before the first step, find where to begin, build, train, summarise."""

import time

from pretrain.errors import Stopped
from pretrain.training import loader
from pretrain.training.build import build_job
from pretrain.training.config import RunConfig
from pretrain.training.engine.footprint import check_memory
from pretrain.training.engine.peers import connected
from pretrain.training.engine.ranks import on_cuda
from pretrain.training.inputs import open_inputs
from pretrain.training.resume import find_start
from pretrain.training.summary import summarise, summary_of_finished
from pretrain.training.trainer import train


def run(cfg: RunConfig) -> dict:
    """Train `cfg`, or continue it from its newest checkpoint. Returns the summary.

    DeepSpeed executes the steps of several ranks, and plain torch the steps of one rank (`engine_for`). Raises
    ConfigError, ShardError, TokenizerError, ResumeError or ExportError before the first step, and Stopped when a signal
    ends the run before its last evaluation.
    """
    started = time.monotonic()
    inputs = open_inputs(cfg)
    cfg, world, data = inputs.cfg, inputs.world, inputs.cfg.data
    batches = loader.Batches(inputs.data, inputs.objectives, cfg.engine.micro_batch, world.rank, world.size)
    # Forked before CUDA and the connections to other ranks start threads. A GPU has at least one: it would wait while
    # this process makes a batch.
    count = max(1, data.workers) if on_cuda() else data.workers
    with loader.fork(batches, count, data.prefetch, data.read_ahead) as workers:
        check_memory(cfg.model, inputs.vocab_size, len(inputs.optimizer.states), cfg.engine, world)
        with connected(world, inputs.folder, cfg.engine, cfg.checkpoint.timeout_s) as peers:
            start = find_start(inputs, peers)
            summary = summary_of_finished(inputs, start)
            if summary:
                return summary
            job = build_job(inputs, batches, workers, peers, start)
            state, found = train(job, start.state)
            if found is None:
                raise Stopped(f"stopped at step {state.step} of {job.steps}; start again to continue")
            return summarise(job, state, found, started)
