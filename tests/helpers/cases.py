"""Functions that the ranks of tests run. The children of the forkserver can import this module."""

from pathlib import Path

from safetensors.torch import load_file

from pretrain import config
from pretrain.training import checkpoint
from pretrain.training.config import RunConfig
from pretrain.training.run import run
from pretrain.training.watch import metrics


def train(values: dict) -> dict:
    """Train with a configuration and return the summary."""
    return run(config.build(RunConfig, values, "test"))


def train_each(runs: list[dict]) -> list[dict]:
    """Train with one configuration after another and return the summaries."""
    return [train(values) for values in runs]


def history(out: Path) -> list[tuple]:
    """Return (step, loss, gradient norm, batch digest) of every recorded step, unrounded."""
    return [(r.step, r.loss, r.grad_norm, r.digest) for r in metrics.reports(out)]


def state(out: Path) -> dict:
    """Return every tensor of the newest checkpoint under "kind/name"."""
    folder = checkpoint.newest(out)
    kinds = ("weights", "exp_avg", "exp_avg_sq")
    return {f"{kind}/{name}": t for kind in kinds for name, t in load_file(folder / f"{kind}.safetensors").items()}
