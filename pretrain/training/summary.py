"""The summary of a run: its losses and the last findings of its observers, in summary.json."""

import json
import math
import time
from typing import Any

import numpy as np

from pretrain.order.phases import tokens_after
from pretrain.storage.files import write_json
from pretrain.training import checkpoint
from pretrain.training.checkpoint import TrainState
from pretrain.training.inputs import Inputs
from pretrain.training.resume import Start
from pretrain.training.trainer import Job
from pretrain.training.watch.log import say
from pretrain.training.watch.metrics import JSONL, reports
from pretrain.training.watch.observer import Findings

SUMMARY = "summary.json"
LAST_STEPS = 20  # the last training loss of a summary is the mean over this many steps


def summary_of_finished(inputs: Inputs, start: Start) -> dict | None:
    """The summary of a run that has done all its steps; None if steps are left, or if the summary is missing.

    A summary of fewer steps is ignored.
    """
    folder, steps, speak = inputs.folder, inputs.cfg.steps, inputs.world.speaks
    path = folder / SUMMARY
    try:
        summary = json.loads(path.read_bytes())
        found = summary if summary["steps"] == steps == start.state.step else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        if speak:
            say(f"warning: {path} is damaged; it is written again at the end of the run")
        return None
    if found and speak:
        say(f"{folder}: all {steps} steps are done; append a phase to go on")
    return found


def summarise(job: Job, state: TrainState, found: list[Findings], started: float) -> dict:
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
