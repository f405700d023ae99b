"""Find out whether everything runs on a GPU, and write what was found as JSON, part by part.

    python benchmarks/gpu/works.py --out benchmarks/results/gpu-works.json

Parts, each of which may fail without the others:

    floors     the rate of a large bf16 product and of a copy
    attention  every way of `attend` in bf16 beside a dense mask in fp32: outputs, gradients, time
    training   50 steps of an encoder and a decoder in a plain process and through `deepspeed` on one rank: fp32 and
               bf16, ZeRO 1 to 3, AdamW and Muon, blocks compiled or not. The losses of a run must agree with those of
               the plain process with the same precision and optimizer; TF32 is off
    kills      `kill -9` after at least 12 steps and a second start, with and without engine.deterministic, of a decoder
               in a plain process and an encoder at ZeRO 2. All steps must equal those of an unkilled run to the last
               bit; a third run says whether two unkilled runs are equal
    waits      the lines of the code at which the host waits for the GPU, as PyTorch reports them: in a step there must
               be none
    tests      the project's own tests of the model, of leaks and of exports, with CUDA

The models have 6 layers of width 384 and train 16 packed windows of 256 tokens a step, of made-up documents. Up to
`--at_once` runs share the GPU, so their times say little. `predicted` is what was expected before the first run.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)  # so that no file of this folder shadows a library

from benchmarks.gpu import common  # noqa: E402
from benchmarks.train import BERT, FORCED, GPT, free_port  # noqa: E402

STEPS, BATCH, T, VOCABULARY = 50, 16, 256, 8064
SHAPES = {"decoder": GPT, "encoder": BERT}
PARTS = ("floors", "attention", "training", "kills", "waits", "tests")
# How far the loss of any step may be from that of the plain process, in nats. Kernels that add in another order differ
# in the last bits, and the difference grows with every step; a compiled block rounds to bf16 less often.
TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2, "compiled": 5e-2}
SCRIPT = str(ROOT / "launch/pretrain.py")
LIMIT_S = {"attention": 60, "run": 150, "tests": 110}
KILLED_AFTER, SAVED_EVERY, KILL_STEPS = 12, 5, 60
# A run in which PyTorch warns where an operation waits for the GPU, and the modules that may have no such line.
WATCHED = """
import sys, torch
if torch.cuda.is_available():
    torch.cuda.set_sync_debug_mode("warn")
from pretrain.cli import main
sys.exit(main("pretrain"))
"""
IN_STEPS = ("trainer.py", "feed.py", "transfers.py", "local.py", "weights.py", "model/", "objectives/", "optim/")
TESTS = ["tests/model", "tests/objectives", "tests/road/test_leaks.py", "tests/export"]


class Run(NamedTuple):
    """A run of pretrain: which model, and which keys of `engine` and `optim`."""

    family: str
    engine: dict[str, Any]
    optim: dict[str, Any] = {}
    stage: int | None = None  # through deepspeed at this ZeRO stage; None: in a plain process
    steps: int = STEPS
    save: int = 0

    @property
    def name(self) -> str:
        parts = [self.family, self.engine["precision"], self.optim.get("kind", "adamw")]
        parts += ["plain" if self.stage is None else f"ZeRO {self.stage}"]
        return ", ".join(parts + (["compiled"] if self.engine.get("compile") else []))

    @property
    def reference(self) -> str:
        """The name of the run whose losses this one must have."""
        plain = self._replace(stage=None, engine={"precision": self.engine["precision"]})
        return plain.name


def training_runs(toy: bool) -> list[Run]:
    """Muon only with the decoder: the matrices of both models have the same shapes."""
    muon, backend = {"kind": "muon", "lr": 0.02}, "aot_eager" if toy else "inductor"
    found = []
    for family in SHAPES:
        for precision, optim in (("fp32", {}), ("bf16", {}), *([("bf16", muon)] if family == "decoder" else [])):
            found += [Run(family, {"precision": precision}, optim, stage) for stage in (None, 1, 2, 3)]
        found += [Run(family, {"precision": "bf16", "compile": backend}, {}, stage) for stage in (None, 1, 3)]
    if toy:
        wanted = "decoder, bf16, muon, plain", "decoder, bf16, muon, ZeRO 3", "encoder, fp32, adamw, ZeRO 2"
        found = [run for run in found if run.name in (*wanted, "encoder, fp32, adamw, plain")]
    return found


# Runs


class Started:
    """A run that was started as a user starts it."""

    def __init__(self, run: Run, out: Path, folder: Path, toy: bool, program: tuple[str, ...] = (SCRIPT,)):
        self.out, self.log = out, out.with_suffix(".log")
        self.patience = 4 if toy else 1
        kind = "byte" if run.family == "decoder" else "bert"
        engine = {"micro_batch": BATCH // 2, "zero_stage": 1} | run.engine
        engine |= {} if run.stage is None else {"zero_stage": run.stage, "deepspeed": FORCED}
        data = {"shards": str(folder / f"shards-{kind}"), "tokenizer": str(folder / f"tokenizer-{kind}")}
        values = {
            "out": str(out),
            "seed": 1,
            "data": data | {"windows": "documents"},
            "model": SHAPES[run.family] | ({"layers": 2, "width": 48} if toy else {}) | {"vocab_multiple": 64},
            "objective": {"kind": "causal_lm" if kind == "byte" else "masked_lm"},
            "optim": {"kind": "adamw", "lr": 1e-3, "warmup_steps": 10} | run.optim,
            "phases": [{"steps": run.steps, "seq_len": 64 if toy else T, "batch_tokens": BATCH * (64 if toy else T)}],
            "engine": engine,
            "evaluate": {"max_tokens": 4096},
            "checkpoint": {"every_s": 0, "every_steps": run.save},
            "log_every": 10,
        }
        out.with_suffix(".yaml").write_text(json.dumps(values))
        script = [*program, str(out.with_suffix(".yaml"))]
        launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "1"]
        launcher += ["--master_port", str(free_port())]
        command = [*([sys.executable] if run.stage is None else launcher), *script]
        with open(self.log, "a") as log:
            environment = common.environment(toy, NVIDIA_TF32_OVERRIDE="0")
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=ROOT)

    def steps(self) -> list[dict]:
        return common.lines_of(self.out / "metrics.jsonl")

    def ended(self) -> int | None:
        """The exit status; None: it was killed because its time was over."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(LIMIT_S["run"] * self.patience)
        self.kill()
        return None

    def kill(self) -> None:
        """End the launcher and all ranks with kill -9."""
        import psutil

        with contextlib.suppress(psutil.NoSuchProcess):
            for process in [*psutil.Process(self.process.pid).children(recursive=True), self.process]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
        self.process.wait()


def together(work: Callable[[Any], dict], items: list, at_once: int) -> Iterator[tuple[Any, dict]]:
    """Yield every item with `work(item)`, in the order in which they end."""
    with ThreadPoolExecutor(at_once) as pool:
        futures = {pool.submit(work, item): item for item in items}
        for future in as_completed(futures):
            yield futures[future], future.result()


def trained(run: Run, folder: Path, toy: bool) -> dict:
    """Train to the end: the status, and the losses of all steps."""
    began = time.perf_counter()
    started = Started(run, folder / "runs" / run.name.replace(", ", "-").replace(" ", "_"), folder, toy)
    status = started.ended()
    steps = started.steps()
    found: dict[str, Any] = {"status": status, "seconds": round(time.perf_counter() - began, 1), "steps": len(steps)}
    if status or len(steps) < run.steps:
        return found | {"output": common.tail(started.log)}
    middle = sorted(step["step_s"] for step in steps)[len(steps) // 2]
    return found | {"losses": [step["loss"] for step in steps], "step_ms": round(1e3 * middle, 2)}


def training(folder: Path, result: common.Result, toy: bool, at_once: int) -> None:
    losses: dict[str, list] = {}
    runs = training_runs(toy)
    for run, found in together(lambda run: trained(run, folder, toy), runs, at_once):
        losses[run.name] = found.pop("losses", [])
        if losses[run.name]:
            found |= {"first_loss": losses[run.name][0], "last_loss": losses[run.name][-1]}
        result.put(found, "training", run.name)
    for run in runs:
        pair = losses[run.name], losses[run.reference]
        if run.name == run.reference or not all(pair) or None in pair[0] + pair[1]:
            continue
        tolerance = TOLERANCE["compiled" if run.engine.get("compile") else run.engine["precision"]]
        apart = max(abs(a - b) for a, b in zip(*pair, strict=True))
        found = {"reference": run.reference, "predicted": f"at most {tolerance}", "measured": apart}
        result.put(found | {"agrees": apart <= tolerance}, "agreement", run.name)


# Kills


def records(started: Started) -> list[tuple]:
    """Of every step what must be equal to the last bit."""
    return [(step["step"], step["loss"], step["grad_norm"], step["lr"], step["digest"]) for step in started.steps()]


def killed(asked: tuple[str, int | None, bool], folder: Path, toy: bool) -> dict:
    """Three runs at once: two that nobody kills, and one that is killed and started again."""
    family, stage, deterministic = asked
    run = Run(
        family, {"precision": "bf16", "deterministic": deterministic}, {}, stage, 24 if toy else KILL_STEPS, SAVED_EVERY
    )
    place = folder / "kills" / f"{family}-{stage}-{deterministic}"
    place.mkdir(parents=True)
    *unkilled, victim = (Started(run, place / name, folder, toy) for name in ("first", "second", "victim"))
    deadline = time.monotonic() + LIMIT_S["run"] * victim.patience
    while len(victim.steps()) < KILLED_AFTER and victim.process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    victim.kill()
    at = len(victim.steps())
    statuses = [started.ended() for started in unkilled]
    again = Started(run, victim.out, folder, toy)
    statuses.append(again.ended())
    first, second, resumed = (records(started) for started in (*unkilled, again))
    found: dict[str, Any] = {"statuses": statuses, "killed_after_steps": at, "steps": len(resumed)}
    if any(statuses) or not 0 < at < run.steps or len(first) != run.steps:
        bad = next((one for one, status in zip((*unkilled, again), statuses, strict=True) if status), again)
        return found | {"output": common.tail(bad.log)}
    return found | {
        "resumed_equals_unkilled": {"predicted": True if deterministic else "not known", "measured": resumed == first},
        "two_unkilled_are_equal": {"predicted": True if deterministic else "not known", "measured": first == second},
        "first_step_that_differs": next((a[0] for a, b in zip(first, resumed, strict=False) if a != b), None),
        "largest_difference_of_losses": max(abs(a[1] - b[1]) for a, b in zip(first, resumed, strict=False)),
    }


def kills(folder: Path, result: common.Result, toy: bool, at_once: int) -> None:
    ways = (("decoder", None), ("encoder", 2))
    asked: list = [(*way, sure) for sure in (True, False) for way in ways][1 if toy else 0 :: 4 if toy else 1]
    for (family, stage, sure), found in together(lambda one: killed(one, folder, toy), asked, max(1, at_once // 3)):
        how = "plain" if stage is None else f"ZeRO {stage}"
        result.put(found, "kills", f"{family}, {how}{', deterministic' if sure else ''}")


# Waits


def waits(folder: Path, toy: bool) -> dict[str, dict]:
    """The lines of the package at which a plain process waited for the GPU, with each optimizer."""
    found = {}
    for family, optim in (("decoder", {}), ("decoder", {"kind": "muon", "lr": 0.02}), ("encoder", {})):
        run = Run(family, {"precision": "bf16"}, optim, steps=12)
        place = folder / "waits" / run.name.replace(", ", "-")
        place.parent.mkdir(exist_ok=True)
        started = Started(run, place, folder, toy, ("-c", WATCHED))
        status, said = started.ended(), started.log.read_text(errors="replace")
        lines = sorted(set(re.findall(r"pretrain/(\S+\.py:\d+): UserWarning: called a synchronizing", said)))
        in_steps = [line for line in lines if any(part in line for part in IN_STEPS)]
        found[run.name] = {"status": status, "predicted": [], "measured": in_steps, "elsewhere": lines}
        if status:
            found[run.name]["output"] = common.tail(started.log)
    return found


# Attention


def attention(toy: bool) -> dict[str, dict]:
    """Each way beside the dense mask in fp32, for each kind of layout: errors of outputs and gradients, and time."""
    import torch
    import torch.nn.functional as F

    from pretrain.model.attention import Layout, attend

    device = torch.device("cpu" if toy else "cuda")
    B, H, length, E = (2, 2, 96, 16) if toy else (8, 12, 1024, 64)
    draw = torch.Generator().manual_seed(0)
    begins = torch.rand(B, length, generator=draw) < 4 / length
    place = torch.arange(length).expand(B, length)
    since = torch.where(begins, place, 0).cummax(1).values
    segments, positions = begins.cumsum(1).to(device), (place - since).to(device)
    found = {}
    for packed in (True, False):
        for kind in ("full", "causal", "prefix"):
            for window in (None, 16 if toy else 128):
                numbers, ids = (segments, positions) if packed else (None, place.to(device))
                prefix = ids < length // 8 if kind == "prefix" else None
                heads = [torch.randn(B, H, length, E, generator=draw).bfloat16().float().to(device) for _ in range(3)]
                slope = torch.randn(B, H, length, E, generator=draw).to(device)

                def layout(numbers=numbers, ids=ids, prefix=prefix, kind=kind):
                    return Layout(numbers, ids, kind != "full", prefix)

                def dense(q, k, v, window=window, layout=layout):
                    return F.scaled_dot_product_attention(q, k, v, attn_mask=layout().mask(window, q.dtype))

                def ours(q, k, v, window=window, layout=layout):
                    return attend(q, k, v, layout(), window, 0.0)

                exact = _gradients(dense, heads, slope)
                name = f"{'packed' if packed else 'one document'}, {kind}, {f'window {window}' if window else 'global'}"
                for way, work in (("attend", ours), ("dense mask", dense)):
                    found[f"{name}, {way}"] = _compared(work, [x.bfloat16() for x in heads], slope, exact, device)
    return found


def _gradients(work: Callable, heads: list, slope: Any) -> list:
    import torch

    inputs = [x.detach().requires_grad_() for x in heads]
    out = work(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, slope.to(out.dtype))]


def _compared(work: Callable, heads: list, slope: Any, exact: list, device: Any) -> dict:
    """bf16 has 8 bits: an output is a mean of numbers near 1, a gradient a sum of products."""
    try:
        made = _gradients(work, heads, slope)
        common.settle(device)
        began = time.perf_counter()
        for _ in range(3):
            _gradients(work, heads, slope)
        common.settle(device)
        took = (time.perf_counter() - began) / 3
    except Exception as error:  # whatever it is, the other ways can still be compared
        return {"failed": f"{type(error).__name__}: {error}"[:300]}
    names = ("output", "by_queries", "by_keys", "by_values")
    apart = {
        name: float(f"{((a.float() - b).norm() / b.norm()).item():.3g}")
        for name, a, b in zip(names, made, exact, strict=True)
    }
    return {"predicted": "at most 0.01", "measured": apart, "agrees": max(apart.values()) <= 0.01, "ms": 1e3 * took}


# Tests


def tests(toy: bool) -> dict:
    chosen = ["tests/test_hashing.py"] if toy else TESTS
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *([] if toy else ["-n", "8"]), *chosen]
    cuda = {} if toy else {"CUDA_VISIBLE_DEVICES": "0", "DS_ACCELERATOR": "cuda"}  # tests/conftest.py takes the CPU
    try:
        environment = common.environment(toy, **cuda)
        done = subprocess.run(
            command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S["tests"]
        )
    except subprocess.TimeoutExpired as error:
        return {"status": None, "output": str(error.stdout)[-2000:]}
    lines = done.stdout.splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"status": done.returncode, "predicted": "all pass", "measured": lines[-1:], "failed": failed[:40]}


def main() -> None:
    if sys.argv[1:2] == ["attention"]:
        return print(json.dumps(attention("--toy" in sys.argv)))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--at_once", type=int, default=12)
    parser.add_argument("--toy", action="store_true", help="tiny models on the CPU, to try this program")
    parser.add_argument("--out", type=Path, required=True, help="parts in this file that are not wanted now stay")
    args = parser.parse_args()
    result, toy = common.Result(args.out), args.toy
    result.put(common.facts("works.py", toy), "run")
    for part in args.parts:
        result.found.pop(part, None)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "runs").mkdir()
        if "floors" in args.parts:
            result.put(common.measured_floors(toy), "floors")
        if "attention" in args.parts:
            command = [sys.executable, str(Path(__file__)), "attention", *(["--toy"] if toy else [])]
            done = subprocess.run(command, env=common.environment(toy), capture_output=True, text=True)
            result.put(json.loads(done.stdout) if not done.returncode else {"failed": done.stderr[-2000:]}, "attention")
        if {"training", "kills", "waits"} & set(args.parts):
            for kind in ("byte", "bert"):
                place = common.make_tokenizer(folder, kind, 1100 if toy else VOCABULARY)
                lengths = common.drawn_lengths((100_000 if toy else 500_000), 20 if toy else 80)
                common.make_shards(folder / f"shards-{kind}", place, lengths)
        if "training" in args.parts:
            training(folder, result, toy, args.at_once)
        if "kills" in args.parts:
            kills(folder, result, toy, args.at_once)
        if "waits" in args.parts:
            result.put(waits(folder, toy), "waits")
        if "tests" in args.parts:
            result.put(tests(toy), "tests")
        result.put(common.smi(), "gpu_after")


if __name__ == "__main__":
    main()
