"""Measure memory and steps of runs on one GPU beside their plans, and write both as JSON.

    python benchmarks/gpu/plans.py presets large long --out benchmarks/results/gpu-plans.json

Groups of runs:

    presets  twelve runs with the shapes, optimizers, windows and micro-batches of configs/presets; nothing is compiled.
             `ZeRO` runs are trained by DeepSpeed with one rank, the others by plain torch
    large    decoders of 1 and 7 billion parameters with windows of 4,096 tokens and compiled blocks
    long     the shape of ModernBERT-base, whose layers are local (64 tokens on each side) but for every third, and the
             shape of Qwen3-0.6B, with windows of 8,192 and 32,768 tokens and compiled blocks. On CUDA the program
             chooses the kernel of attention itself, so the runs reach all its ways: a window with one document takes
             the fused kernel of scaled_dot_product_attention in global layers, and the kernel for documents of several
             lengths (varlen) in local layers; packed windows take varlen in all layers. With dropout, global layers
             take a dense mask and local layers blocks of queries. FlexAttention is not offered

All runs are in bf16 and have two micro-batches a step, and no dropout unless they are named so. The data are made up,
with 32,768 entries for decoders and 30,522 for encoders: packed documents of 250 tokens in the median, or `one
document` a window. One run after another has the GPU to itself. fp8 is not measured, because the program does not offer
it.

    memory   the plan (pretrain/training/plan.py) beside the most bytes of tensors that exist at once (decimal GB). The
             plan knows neither a compiler nor dense masks
    step_ms  what follows from the assumed share of the peak (the same file), and from FLOPs and bytes (common.py),
             beside the median of the turns. An optimizer on the CPU takes no time in these plans
    ms       of a step by class of kernel, counted and profiled, and the class that takes most beyond its count.
             Attention is counted for the tokens that are seen, at the rate of FlashAttention-2: a dense mask takes more
    mfu      the share of the peak in the vendor's data sheet, where attention is counted in full, as in the log of a
             run; `mfu_seen` counts it for the tokens that are seen: not those of other documents, nor later ones in a
             decoder. Neither counts what is recomputed

`ratio` is measured over planned. The file is written after every run, and a run that fails is in `failed`.
"""

import argparse
import json
import statistics
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)  # so that no file of this folder shadows a library

import numpy as np  # noqa: E402
import yaml  # noqa: E402

from benchmarks.gpu import common, contest, speed  # noqa: E402
from benchmarks.train import FORCED, free_port  # noqa: E402

ENTRIES = {"byte": 32_768, "bert": 30_522}
STEPS, WARM, TURNS = 10**5, 3, 3
LIMIT_S = 240  # of one run; the weights of 7 B parameters are drawn on the CPU
GPU = "H200"
MATERIAL = 7_000_000  # tokens: a hundredth of the documents, which are held out, hold the longest window
MEDIAN, LONGEST = 250, 32_768  # tokens of packed documents, and of documents that fill a window
TOY = 128  # at toy size windows are so many times as short


VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    "all layers global": {"window": None},
    "local layers": {"window": 64, "global_every": 3},
    "dropout 0.1": {"dropout": 0.1},
}


class Planned(NamedTuple):
    """A run: the preset, its ZeRO stage through DeepSpeed (None: plain torch), and what is different."""

    preset: str
    stage: int | None = None
    recompute_every: int = 0
    offloaded: bool = False
    T: int | None = None  # with compiled blocks; None: that of the preset, and nothing is compiled
    micro_tokens: int = 32_768  # of a micro-batch, if T is given
    whole: bool = False  # one document fills a window
    variant: str = ""

    @property
    def name(self) -> str:
        parts = [self.preset, "plain" if self.stage is None else f"ZeRO {self.stage}"]
        if self.T:
            parts = [
                self.preset,
                f"T {self.T}",
                f"{self.micro_tokens} at once",
                "one document" if self.whole else "packed",
            ]
        parts += {0: [], 1: ["recomputed"]}.get(self.recompute_every, [f"1 of {self.recompute_every} recomputed"])
        return ", ".join(parts + ["offloaded"] * self.offloaded + [self.variant] * bool(self.variant))

    @property
    def kind(self) -> str:
        """`whole` or `packed`."""
        return "whole" if self.whole else "packed"


RUNS: dict[str, tuple[Planned, ...]] = {
    "presets": (
        Planned("decoder-20m"),
        Planned("gpt2-124m"),
        Planned("gpt2-124m", stage=1),
        Planned("gpt2-124m", stage=2),
        Planned("gpt2-124m", stage=3),
        Planned("gpt2-124m", recompute_every=1),
        Planned("modernbert-base"),
        Planned("qwen3-0.6b"),
        Planned("qwen3-0.6b", stage=2, offloaded=True),
        Planned("llama-1b"),
        Planned("llama-1b", stage=3, recompute_every=1),
        Planned("llama-7b", recompute_every=1),  # about 125 of 141 GB
    ),
    # The most valuable first: a call may end before all are measured.
    "large": (
        Planned("llama-1b", T=4096, micro_tokens=16_384),
        Planned("llama-7b", T=4096, micro_tokens=8192, recompute_every=1),
        Planned("llama-1b", T=4096, micro_tokens=16_384, whole=True),
        Planned("llama-1b", T=4096, micro_tokens=32_768),
        Planned("llama-7b", T=4096, micro_tokens=4096, recompute_every=2),  # about 133 GB
    ),
    "long": (
        *(
            Planned(preset, T=T, whole=whole)
            for T in (8192, 32_768)
            for preset in ("modernbert-base", "qwen3-0.6b")
            for whole in (False, True)
        ),
        Planned("modernbert-base", T=32_768, whole=True, variant="all layers global"),
        Planned("qwen3-0.6b", T=32_768, whole=True, variant="local layers"),
        Planned("modernbert-base", T=8192, variant="dropout 0.1"),
    ),
}
ONCE = ("head and loss", "optimizer")  # classes of kernels that recomputing does not repeat
SMALL = {"layers": 2, "width": 64, "heads": 2, "head_width": None, "kv_heads": None, "mlp_width": 128}


def values_of(one: Planned, folder: Path, toy: bool) -> dict[str, Any]:
    """The configuration of a run: that of its preset, with other data, one phase and its own section `engine`."""
    values = yaml.safe_load((ROOT / f"configs/presets/{one.preset}.yaml").read_text())
    vocabulary = "byte" if values["model"]["causal"] else "bert"
    T = one.T or max(phase["seq_len"] for phase in values["phases"])
    micro = one.micro_tokens // T if one.T else values["engine"]["micro_batch"]
    if toy:
        T, micro = max(32, T // TOY), 2
    zero = {"offload_optimizer": {"device": "cpu"}} if one.offloaded else {}
    forced = {} if one.stage is None else FORCED | ({"zero_optimization": zero} if zero else {})
    engine = {"precision": "bf16", "micro_batch": micro, "recompute_every": one.recompute_every}
    values["model"] |= {"dropout": 0.0} | ({"max_positions": T} if one.T or toy else {}) | (SMALL if toy else {})
    if one.T:
        engine |= {"compile": "aot_eager" if toy else "inductor"}
        values["model"] |= {"vocab_multiple": 64} | VARIANTS[one.variant]
    if toy and values["model"].get("window"):
        values["model"]["window"] = 16
    return values | {
        "out": str(folder / one.name.replace(", ", "-").replace(" ", "_")),
        "data": {
            "shards": str(folder / f"{one.kind}-{vocabulary}"),
            "tokenizer": str(folder / f"tokenizer-{vocabulary}"),
        }
        | {"windows": "documents", "workers": 2},
        "phases": [{"steps": STEPS, "seq_len": T, "batch_tokens": 2 * micro * T}],
        "engine": engine | {"zero_stage": one.stage or 1, "deepspeed": forced},
        "checkpoint": {"every_s": 0},
        "evaluate": {"every_steps": 0},
        "export": None,
    }


def documents(whole: bool, toy: bool) -> np.ndarray:
    """The lengths of the documents that the runs read."""
    tokens, median, longest = (60_000, 20, LONGEST // TOY) if toy else (MATERIAL, MEDIAN, LONGEST)
    return np.full(tokens // longest, longest) if whole else common.drawn_lengths(tokens, median)


def seen(lengths: np.ndarray, T: int, causal: bool, window: int | None) -> float:
    """The tokens that a token of these documents sees, itself too, in the mean. Documents of more than T are cut."""
    parts = np.concatenate((np.full((lengths // T).sum(), T), lengths % T))
    far = np.minimum(np.maximum(parts - 1, 0), T if window is None else window)
    side = far * (far + 1) // 2 + np.maximum(parts - 1 - far, 0) * far  # of all tokens together, to the left
    return float((parts + side * (1 if causal else 2)).sum() / parts.sum())


def plan(one: Planned, values: dict[str, Any], toy: bool) -> dict[str, Any]:
    """The planned memory in GB by its parts, and the planned milliseconds of a step."""
    from pretrain.training.config import RunConfig
    from pretrain.training.engine.ranks import World
    from pretrain.training.plan import memory, tokens_per_s

    run = RunConfig(**values)
    entries = 1100 if toy else ENTRIES["byte" if run.model.causal else "bert"]
    phase, share = run.phases[0], getattr(run.objective, "mask_ratio", 1)
    targets, tokens = round(share * phase.seq_len), phase.batch_tokens
    found = memory(run, entries, [targets], run.engine, World(0, 1, launched=one.stage is not None))
    micro = run.engine.micro_batch * phase.seq_len
    lengths, layers = documents(one.whole, toy), [run.model.window_of(layer) for layer in range(run.model.layers)]
    in_layer = {window: seen(lengths, phase.seq_len, run.model.causal, window) for window in set(layers)}
    counted = common.predicted(
        values["model"],
        entries,
        phase.seq_len,
        targets,
        (tokens, micro),
        speed.COMPILED if run.engine.compile else speed.EAGER,
        speed.OUR_LOGIT,
        sum(in_layer[window] for window in layers),
    )
    again = 1 / run.engine.recompute_every if run.engine.recompute_every else 0.0  # the share of a second forward pass
    work = 1 + again / 3  # a backward pass is twice as much as a forward pass
    micros = {kind: us * (1 if kind in ONCE else work) for kind, us in counted["us_a_token"].items()}
    assumed = tokens_per_s(GPU, counted["flops_a_token"], run.model) / work
    rates = {"assumed share of the peak": assumed, "counted": 1e6 / sum(micros.values())}
    return {
        "gb": {part: round(size / 1e9, 3) for part, size in vars(found).items()} | {"peak": round(found.peak / 1e9, 3)},
        "step_ms": {way: round(1e3 * tokens / rate, 4) for way, rate in rates.items()},
        "ms": {kind: round(us * tokens / 1e3, 4) for kind, us in micros.items()},
        "weights": counted["weights"],
        "tokens_a_step": tokens,
        "flops_a_token": counted["flops_a_token"],
        "seen_flops_a_token": counted["seen_flops_a_token"],
    }


def measure(one: Planned, folder: Path, put: Callable[..., None], device: str, args: argparse.Namespace) -> None:
    """Run one of them, a few turns of steps, and put what was planned and measured beside each other."""
    from pretrain.training.watch.log import PEAK_FLOPS

    values = values_of(one, folder, args.toy)
    planned = plan(one, values, args.toy)
    put({"planned": planned}, "runs", one.name)
    path = Path(values["out"] + ".yaml")
    path.write_text(json.dumps(values))
    logs = Path(tempfile.mkdtemp(dir=folder))  # with a short name: that of a socket has a limit
    rank = {} if one.stage is None else {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_SIZE": "1"}
    rank |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())} if rank else {}
    command = [sys.executable, str(Path(__file__)), "ours", str(logs / "socket"), one.name, str(path)]
    running = contest.Contest({one.name: command}, common.environment(args.toy, **rank), logs)
    watch = threading.Timer(LIMIT_S, running.processes[one.name].kill)
    watch.start()
    try:
        running.warm(WARM)
        reports = [report for _ in range(TURNS) for _, report in running.turn("measure", args.steps)]
        profiles = [report["ms_a_step"] for _, report in running.turn("profile", 2)]
    finally:
        late = watch.finished.is_set()
        watch.cancel()
        for process in running.processes.values():
            process.kill()  # it would save a checkpoint, which is as large as its state
        running.end()
    if running.failed:
        put(f"after {LIMIT_S} s: " * late + running.failed[one.name], "failed", one.name)
    if not reports:
        return
    step_ms = statistics.median(report["step_ms"] for report in reports)
    tokens = planned["tokens_a_step"]
    measured = {"step_ms": round(step_ms, 2), "turns_ms": [round(report["step_ms"], 2) for report in reports]}
    measured |= {"tokens_per_s": round(1e3 * tokens / step_ms)}
    ratio = {f"step, {way}": round(step_ms / ms, 3) for way, ms in planned["step_ms"].items()}
    if "peak_gib" in reports[0]:
        gb = max(report["peak_gib"] for report in reports) * 2**30 / 1e9
        measured["gb"] = round(gb, 3)
        ratio["memory"] = round(gb / planned["gb"]["peak"], 3)
    for profile in profiles:
        measured["ms"] = {kind: round(ms, 3) for kind, ms in profile.items()}
        measured["most_beyond_its_count"] = max(profile, key=lambda kind: profile[kind] - planned["ms"].get(kind, 0.0))
    peak = next((peak for known, peak in PEAK_FLOPS.items() if known in device), None)
    for share, flops in {"mfu": "flops_a_token", "mfu_seen": "seen_flops_a_token"}.items() if peak else ():
        measured[share] = round(tokens * planned[flops] / (step_ms / 1e3) / peak, 4)
    put({"planned": planned, "measured": measured, "ratio": ratio}, "runs", one.name)


def group_of(group: str, folder: Path, result: common.Result, args: argparse.Namespace) -> None:
    """Plan, or measure, the runs of a group."""

    def put(value: Any, *keys: str) -> None:
        result.put(value, group, *keys)

    put(common.facts("plans.py", args.toy), "run")
    chosen = [one for one in RUNS[group] if not args.only or one.name in args.only]
    if args.plan:
        for one in chosen:
            put({"planned": plan(one, values_of(one, folder, args.toy), args.toy)}, "runs", one.name)
        return
    put(common.measured_floors(args.toy), "floors")
    for one in chosen:
        result.found[group].get("failed", {}).pop(one.name, None)
        try:
            measure(one, folder, put, result.found[group]["run"]["device"], args)
        except Exception:  # the other runs go on
            put(traceback.format_exc()[-1500:], "failed", one.name)
    put(common.smi(), "gpu_after")


def main() -> None:
    if sys.argv[1:2] == ["ours"]:
        return contest.ours(*sys.argv[2:])
    names = [one.name for runs in RUNS.values() for one in runs]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="+", choices=list(RUNS))
    parser.add_argument("--only", nargs="+", choices=names, help="measure only these runs")
    parser.add_argument("--steps", type=int, default=5, help="of a turn")
    parser.add_argument("--plan", action="store_true", help="write the plans, and run nothing")
    parser.add_argument("--toy", action="store_true", help="tiny models on the CPU, to try this program")
    parser.add_argument("--out", type=Path, required=True, help="runs in this file that are not measured now stay")
    args = parser.parse_args()
    result = common.Result(args.out)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for kind, entries in {} if args.plan else ENTRIES.items():
            place = common.make_tokenizer(folder, kind, 1100 if args.toy else entries)
            for whole in (False, True):
                common.make_shards(
                    folder / f"{'whole' if whole else 'packed'}-{kind}", place, documents(whole, args.toy)
                )
        for group in args.groups:
            group_of(group, folder, result, args)


if __name__ == "__main__":
    main()
