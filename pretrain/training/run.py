"""A pre-training run: read, check everything before the first step, find where to begin, build, train, summarise."""

import time

from pretrain.errors import Stopped
from pretrain.training.build import build_job
from pretrain.training.config import RunConfig
from pretrain.training.engine.peers import connected
from pretrain.training.feed import forked
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
    cfg = inputs.cfg
    with (
        forked(inputs) as (batches, workers),
        connected(inputs.world, inputs.folder, cfg.engine, cfg.checkpoint.timeout_s) as peers,
    ):
        start = find_start(inputs, peers)
        summary = summary_of_finished(inputs, start)
        if summary:
            return summary
        job = build_job(inputs, batches, workers, peers, start)
        state, found = train(job, start.state)
        if found is None:
            raise Stopped(f"stopped at step {state.step} of {job.steps}; start again to continue")
        return summarise(job, state, found, started)
