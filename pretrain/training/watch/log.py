"""The log of a run: the measurements of each step, and one line for each interval of steps."""

import contextlib
import os
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Dense bf16 peaks in FLOP/s from the vendors' data sheets. A device that is not listed gets no MFU, because we do not
# guess. A device has the peak of the first name that occurs in its own name.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "B200": 2250e12,
}


@dataclass(frozen=True)
class StepReport:
    """The measurements of one optimizer step."""

    step: int  # the number of steps done, this one included
    loss: float | None  # mean nats per target of the global batch; None: not finite
    lr: float
    grad_norm: float | None  # before clipping; None: it was not finite, and the step was skipped
    digest: str  # the digest of the global batch
    tokens: int  # the tokens of the run so far
    step_s: float
    data_wait_s: float
    parts: dict[str, float] = field(default_factory=dict)  # the mean of each part of a loss that has several

    @property
    def finite(self) -> bool:
        return self.loss is not None and self.grad_norm is not None


def say(line: str) -> None:
    """Print a line of the log. If it cannot be written (a full disk, a closed pipe) the run goes on without a log."""
    try:
        print(line, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            found = error.strerror or error
            print(f"warning: the log cannot be written: {found}; the training goes on without it", file=sys.stderr)


def peak_flops(device: "torch.device") -> float | None:
    """The bf16 peak of a device in FLOP/s; None: not known."""
    import torch

    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAK_FLOPS.items() if known in name), None)


def memory_gib(device: "torch.device") -> float:
    """The most memory used so far in GiB: by the GPU's allocator, or by this process (resident set) on a CPU."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # kilobytes on Linux


class Interval:
    """The steps since the last line of the log. The time of evaluations and saves between them is not counted.

    Means of losses and norms are over the finite steps. `before`: steps of this interval that an earlier attempt
    recorded. They count for the means, but not for the speed.
    """

    def __init__(self, before: Sequence[StepReport] = ()):
        self.steps = list(before)
        self._before = len(before)

    def add(self, report: StepReport) -> None:
        self.steps.append(report)

    @property
    def step_s(self) -> float:
        timed = self.steps[self._before :]
        return sum(step.step_s for step in timed) / len(timed)

    @property
    def skipped(self) -> int:
        return sum(step.grad_norm is None for step in self.steps)

    def values(self, clip: float | None, batch_tokens: int) -> dict[str, float]:
        """The values of a line of the log by series. A step has `batch_tokens`; norms above `clip` are clipped."""
        timed = self.steps[self._before :]
        seconds = sum(step.step_s for step in timed)
        values = {
            "optim/lr": timed[-1].lr,
            "speed/tokens_per_s": (timed[-1].tokens - timed[0].tokens + batch_tokens) / seconds,
            "speed/data_wait_share": sum(step.data_wait_s for step in timed) / seconds,
        }
        if losses := [step.loss for step in self.steps if step.loss is not None]:
            values["train/loss"] = sum(losses) / len(losses)
        for part in self.steps[-1].parts:
            means = [step.parts[part] for step in self.steps if part in step.parts]
            values[f"train/{part}"] = sum(means) / len(means)
        if norms := [step.grad_norm for step in self.steps if step.grad_norm is not None]:
            values["optim/grad_norm"] = norms[-1]
            values["optim/grad_norm_max"] = max(norms)
            if clip is not None:
                values["optim/clipped_share"] = sum(norm > clip for norm in norms) / len(norms)
        return values


def log_line(step: int, steps: int, values: dict[str, float], eta_s: float, skipped: int = 0) -> str:
    """`step  120/1000  loss 3.412  lr 4.1e-04  grad 0.62  412k tok/s  mfu ?  eta 3m12s`."""
    parts = [f"step {step:>{len(str(steps))}}/{steps}"]
    parts.append(f"loss {values['train/loss']:.3f}" if "train/loss" in values else "loss not finite")
    parts.append(f"lr {values['optim/lr']:.1e}")
    parts.append(f"grad {values['optim/grad_norm']:.2f}" if "optim/grad_norm" in values else "grad not finite")
    if skipped:
        parts.append(f"skipped {skipped} step{'s'[: skipped != 1]} since the last line")
    parts.append(f"{_short(values['speed/tokens_per_s'])} tok/s")
    parts.append(f"mfu {values['speed/mfu']:.0%}" if "speed/mfu" in values else "mfu ?")
    parts.append(f"wait {values['speed/data_wait_share']:.0%}")
    return "  ".join([*parts, f"eta {duration(eta_s)}"])


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"


def _short(value: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}"
