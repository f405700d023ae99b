"""Measure memory and steps of twelve runs on one GPU beside their plans, and write both as JSON.

    python benchmarks/gpu/plans.py --out benchmarks/results/gpu-plans.json

The runs have the shapes, optimizers, windows and micro-batches of configs/presets, in bf16 without dropout, and two
micro-batches a step. The data are made up, with 32,768 entries for decoders and 30,522 for encoders. `ZeRO` runs are
trained by DeepSpeed with one rank, the others by plain torch. One run after another has the GPU to itself.

    memory   the plan (pretrain/training/plan.py) beside the most bytes of tensors that exist at once (decimal GB)
    step_ms  what follows from the assumed share of the peak (the same file), and from FLOPs and bytes (common.py),
             beside the median of the turns. An optimizer on the CPU takes no time in these plans

`ratio` is measured over planned. The file is written after every run, and a run that fails is in `failed`.
"""

import argparse
import json
import statistics
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)  # so that no file of this folder shadows a library

import yaml  # noqa: E402

from benchmarks.gpu import common, contest  # noqa: E402
from benchmarks.train import FORCED, free_port  # noqa: E402

ENTRIES = {"byte": 32_768, "bert": 30_522}
STEPS, WARM, TURNS = 10**5, 3, 3
LIMIT_S = 240  # of one run; the weights of 7 B parameters are drawn on the CPU
GPU = "H200"
PASSES, LOGIT_BYTES = 60, 34  # as in speed.py, without a compiler
MATERIAL = 2_500_000  # tokens, for windows of 4,096


class Planned(NamedTuple):
    """A run: the preset, its ZeRO stage through DeepSpeed (None: plain torch), and what is different."""

    preset: str
    stage: int | None = None
    recomputed: bool = False
    offloaded: bool = False

    @property
    def name(self) -> str:
        parts = [self.preset, "plain" if self.stage is None else f"ZeRO {self.stage}"]
        return ", ".join(parts + ["recomputed"] * self.recomputed + ["offloaded"] * self.offloaded)


RUNS = (
    Planned("decoder-20m"),
    Planned("gpt2-124m"),
    Planned("gpt2-124m", stage=1),
    Planned("gpt2-124m", stage=2),
    Planned("gpt2-124m", stage=3),
    Planned("gpt2-124m", recomputed=True),
    Planned("modernbert-base"),
    Planned("qwen3-0.6b"),
    Planned("qwen3-0.6b", stage=2, offloaded=True),
    Planned("llama-1b"),
    Planned("llama-1b", stage=3, recomputed=True),
    Planned("llama-7b", recomputed=True),  # about 125 of 150 GB
)
SMALL = {"layers": 2, "width": 64, "heads": 2, "head_width": None, "kv_heads": None, "mlp_width": 128}


def values_of(one: Planned, folder: Path, toy: bool) -> dict[str, Any]:
    """The configuration of a run: that of its preset, with other data, one phase and its own section `engine`."""
    values = yaml.safe_load((ROOT / f"configs/presets/{one.preset}.yaml").read_text())
    kind = "byte" if values["model"]["causal"] else "bert"
    micro = 2 if toy else values["engine"]["micro_batch"]
    T = 64 if toy else max(phase["seq_len"] for phase in values["phases"])
    zero = {"offload_optimizer": {"device": "cpu"}} if one.offloaded else {}
    forced = {} if one.stage is None else FORCED | ({"zero_optimization": zero} if zero else {})
    engine = {"precision": "bf16", "micro_batch": micro, "recompute_every": int(one.recomputed)}
    values["model"] |= {"dropout": 0.0} | (SMALL | {"max_positions": T} if toy else {})
    if toy and values["model"].get("window"):
        values["model"]["window"] = 16
    return values | {
        "out": str(folder / one.name.replace(", ", "-").replace(" ", "_")),
        "data": {"shards": str(folder / f"shards-{kind}"), "tokenizer": str(folder / f"tokenizer-{kind}")}
        | {"windows": "documents", "workers": 2},
        "phases": [{"steps": STEPS, "seq_len": T, "batch_tokens": 2 * micro * T}],
        "engine": engine | {"zero_stage": one.stage or 1, "deepspeed": forced},
        "checkpoint": {"every_s": 0},
        "evaluate": {"every_steps": 0},
        "export": None,
    }


def plan(values: dict[str, Any], plain: bool, toy: bool) -> dict[str, Any]:
    """The planned memory in GB by its parts, and the planned milliseconds of a step."""
    from pretrain.training.config import RunConfig
    from pretrain.training.engine.ranks import World
    from pretrain.training.plan import memory, tokens_per_s

    run = RunConfig(**values)
    entries = 1100 if toy else ENTRIES["byte" if run.model.causal else "bert"]
    phase, share = run.phases[0], getattr(run.objective, "mask_ratio", 1)
    targets, tokens = round(share * phase.seq_len), phase.batch_tokens
    found = memory(run, entries, [targets], run.engine, World(0, 1, launched=not plain))
    micro = run.engine.micro_batch * phase.seq_len
    shape = values["model"]
    counted = common.predicted(shape, entries, phase.seq_len, targets, (tokens, micro), PASSES, LOGIT_BYTES)
    work = 4 / 3 if run.engine.recompute_every else 1.0  # a second forward pass beside a forward and a backward pass
    rates = {"assumed share of the peak": tokens_per_s(GPU, counted["flops_a_token"], run.model)}
    rates["counted"] = counted["tokens_per_s"]
    return {
        "gb": {part: round(size / 1e9, 3) for part, size in vars(found).items()} | {"peak": round(found.peak / 1e9, 3)},
        "step_ms": {way: round(1e3 * work * tokens / rate, 4) for way, rate in rates.items()},
        "weights": counted["weights"],
        "tokens_a_step": tokens,
        "flops_a_token": counted["flops_a_token"],
    }


def measure(one: Planned, folder: Path, result: common.Result, args: argparse.Namespace) -> None:
    """Run one of them, a few turns of steps, and put what was planned and measured beside each other."""
    from pretrain.training.watch.log import PEAK_FLOPS

    values = values_of(one, folder, args.toy)
    planned = plan(values, one.stage is None, args.toy)
    result.put({"planned": planned}, "runs", one.name)
    path = Path(values["out"] + ".yaml")
    path.write_text(json.dumps(values))
    logs = Path(values["out"] + "-logs")
    logs.mkdir()
    rank = {} if one.stage is None else {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_SIZE": "1"}
    rank |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())} if rank else {}
    command = [sys.executable, str(Path(__file__)), "ours", str(logs / "socket"), one.name, str(path)]
    running = contest.Contest({one.name: command}, common.environment(args.toy, **rank), logs)
    watch = threading.Timer(LIMIT_S, running.processes[one.name].kill)
    watch.start()
    running.warm(WARM)
    reports = [report for _ in range(TURNS) for _, report in running.turn("measure", args.steps)]
    watch.cancel()
    for process in running.processes.values():
        process.kill()  # it would save a checkpoint, which is as large as its state
    running.end()
    if running.failed:
        result.put(running.failed[one.name], "failed", one.name)
    if not reports:
        return
    step_ms = statistics.median(report["step_ms"] for report in reports)
    measured = {"step_ms": round(step_ms, 2), "turns_ms": [round(report["step_ms"], 2) for report in reports]}
    ratio = {f"step, {way}": round(step_ms / ms, 3) for way, ms in planned["step_ms"].items()}
    if "peak_gib" in reports[0]:
        gb = max(report["peak_gib"] for report in reports) * 2**30 / 1e9
        measured["gb"] = round(gb, 3)
        ratio["memory"] = round(gb / planned["gb"]["peak"], 3)
    device = result.found["run"]["device"]
    peak = next((peak for known, peak in PEAK_FLOPS.items() if known in device), None)
    if peak:
        flops = planned["tokens_a_step"] * planned["flops_a_token"]
        measured["mfu"] = round(flops / (step_ms / 1e3) / peak, 4)
    result.put({"planned": planned, "measured": measured, "ratio": ratio}, "runs", one.name)


def main() -> None:
    if sys.argv[1:2] == ["ours"]:
        return contest.ours(*sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[one.name for one in RUNS], help="measure only these runs")
    parser.add_argument("--steps", type=int, default=5, help="of a turn")
    parser.add_argument("--plan", action="store_true", help="write the plans, and run nothing")
    parser.add_argument("--toy", action="store_true", help="tiny models on the CPU, to try this program")
    parser.add_argument("--out", type=Path, required=True, help="runs in this file that are not measured now stay")
    args = parser.parse_args()
    result = common.Result(args.out)
    result.put(common.facts("plans.py", args.toy), "run")
    chosen = [one for one in RUNS if not args.only or one.name in args.only]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if args.plan:
            for one in chosen:
                result.put(
                    {"planned": plan(values_of(one, folder, args.toy), one.stage is None, args.toy)}, "runs", one.name
                )
            return
        result.put(common.measured_floors(args.toy), "floors")
        for kind, entries in ENTRIES.items():
            place = common.make_tokenizer(folder, kind, 1100 if args.toy else entries)
            lengths = common.drawn_lengths(60_000 if args.toy else MATERIAL, 20 if args.toy else 250)
            common.make_shards(folder / f"shards-{kind}", place, lengths)
        for one in chosen:
            result.found.get("failed", {}).pop(one.name, None)
            measure(one, folder, result, args)
        result.put(common.smi(), "gpu_after")


if __name__ == "__main__":
    main()
