"""What a run says while it runs: one aligned line an interval, `metrics.jsonl`, TensorBoard. Rank 0 only.

`metrics.jsonl` has one line for every step, with losses to the last bit and the digest of the batch: two runs are the
same run exactly when these lines agree. TensorBoard gets every series twice: `train/loss` over steps and
`by_tokens/train_loss` over tokens. The latter have event files of their own, because what a restart purges is counted
in the x-axis of the whole file.
"""

import json
import resource
from dataclasses import dataclass
from pathlib import Path

import torch

# Dense bf16 peaks in FLOP/s from the vendors' data sheets; a device not listed has no MFU, never a guess.
# The first name that occurs in the device's counts.
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
    """One optimizer step, as measured."""

    step: int  # steps done, this one included
    loss: float  # mean nats per target of the global batch
    lr: float
    grad_norm: float | None  # before clipping; None: not finite, the step was skipped
    digest: str  # of the global batch
    tokens: int  # of the run so far
    step_s: float
    data_wait_s: float


class Metrics:
    """Writers of one run. `step` is how many steps are already done: later lines of an earlier attempt are removed."""

    def __init__(self, run: Path, step: int, tokens: int, config_yaml: str):
        from torch.utils.tensorboard import SummaryWriter

        self._jsonl_path = run / "metrics.jsonl"
        kept = [line for line in _lines(self._jsonl_path) if json.loads(line)["step"] <= step]
        aside = run / ".metrics.jsonl.tmp"
        aside.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        aside.rename(self._jsonl_path)  # a kill here must not cost the history
        self._jsonl = open(self._jsonl_path, "a", encoding="utf-8")
        self._steps = SummaryWriter(run / "tensorboard", purge_step=step + 1)
        self._tokens = SummaryWriter(run / "tensorboard" / "by_tokens", purge_step=tokens + 1)
        self._steps.add_text("config", f"```yaml\n{config_yaml}```", step)

    def record(self, report: StepReport) -> None:
        """Every step, to metrics.jsonl."""
        self._jsonl.write(json.dumps(vars(report)) + "\n")
        self._jsonl.flush()

    def scalars(self, values: dict[str, float], step: int, tokens: int) -> None:
        for tag, value in values.items():
            self._steps.add_scalar(tag, value, step)
            self._tokens.add_scalar(f"by_tokens/{tag.replace('/', '_')}", value, tokens)
        self._steps.flush()
        self._tokens.flush()

    def text(self, tag: str, text: str, step: int) -> None:
        self._steps.add_text(tag, text, step)

    def close(self) -> None:
        for writer in (self._jsonl, self._steps, self._tokens):
            writer.close()


def reports(run: Path) -> list[StepReport]:
    """The recorded steps of a run."""
    return [StepReport(**json.loads(line)) for line in _lines(run / "metrics.jsonl")]


def peak_flops(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAK_FLOPS.items() if known in name), None)


def memory_gib(device: torch.device) -> float:
    """Largest memory used so far: of the GPU's allocator, or of this process (resident set) on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # kilobytes on Linux


def log_line(step: int, steps: int, values: dict[str, float], eta_s: float) -> str:
    """`step  120/1000  loss 3.412  lr 4.1e-04  grad 0.62  412k tok/s  mfu ?  eta 3m12s`."""
    parts = [f"step {step:>{len(str(steps))}}/{steps}", f"loss {values['train/loss']:.3f}"]
    parts.append(f"lr {values['optim/lr']:.1e}")
    parts.append(f"grad {values['optim/grad_norm']:.2f}" if "optim/grad_norm" in values else "grad not finite: skipped")
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


def _lines(path: Path) -> list[str]:
    """Whole lines of a file that a killed process may have left without its last end of line."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return text[: text.rfind("\n") + 1].splitlines()
