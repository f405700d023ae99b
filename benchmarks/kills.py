"""Kill small runs of two ranks with kill -9 at random points; compare their results with those of an unkilled run.

    python benchmarks/kills.py [--points 50] [--seed 0] [--out benchmarks/results/kills.json]

A run has 20 steps in two phases. It saves every 2 steps and evaluates every 4. It is killed five times, each time at a
point drawn from the seed: while it starts or restores, at a step (which may be the switch of phases), while it writes a
checkpoint, or during an evaluation. Some kills hit both ranks, some only one; the other rank must then end by itself.
After the fifth kill the run continues to its end. Its result must equal the unkilled run's to the last bit: every line
of metrics.jsonl (loss, learning rate, gradient norm, batch digest) and the checksum of every file of the last
checkpoint. Half of the runs use ZeRO 1, half ZeRO 3.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}

from benchmarks.measuring import machine, versions  # noqa: E402
from pretrain.storage.index import read_index  # noqa: E402
from pretrain.training import checkpoint  # noqa: E402
from pretrain.training.watch import metrics  # noqa: E402
from tests.helpers import cases, ranks  # noqa: E402
from tests.helpers.ranks import Ranks, on_ranks  # noqa: E402

STAGES = (1, 3)
KILLS = 5  # in one run
STEPS, SAVE, EVALUATE = 20, 2, 4
PHASES = [
    {"steps": STEPS // 2, "seq_len": 16, "batch_tokens": 256},
    {"steps": STEPS // 2, "seq_len": 32, "batch_tokens": 256, "decay_steps": STEPS // 4},
]
PLACES = ("start", "step", "save", "evaluation")
GIVEN_UP_S = 900  # the time limit for a start; long, because the cores may be busy
WAIT_S = 30  # engine.timeout_s: a rank waits this long for another that was killed before the two connected


@dataclass(frozen=True)
class Point:
    """Where to kill a run: the place, its step, the delay after reaching it in seconds, and the ranks to kill."""

    place: str
    step: int
    delay_s: float
    ranks: tuple[int, ...]


def points(stage: int, run: int, seed: int) -> list[Point]:
    """Draw the kill points of one run in the order of its steps. Every place occurs at least once."""
    draw = random.Random(f"{seed} {stage} {run}")
    places = [*PLACES, draw.choice(PLACES[1:])]
    draw.shuffle(places)
    found = []
    for number, place in enumerate(places):
        low, high = number * STEPS // KILLS + 1, (number + 1) * STEPS // KILLS
        every = {"save": SAVE, "evaluation": EVALUATE}.get(place, 1)
        steps = [step for step in range(low, high + 1) if step % every == 0]
        step = draw.choice(steps) if steps else -(-low // every) * every
        delay = draw.uniform(0, {"start": 1.5, "step": 0.03, "save": 0.004, "evaluation": 0.05}[place])
        found.append(Point(place, step, delay, draw.choice([(0, 1), (0, 1), (0,), (1,)])))
    return found


def values(folder: Path, out: Path, stage: int) -> dict:
    """The configuration of a small decoder. It uses dropout, so resuming must also restore the dropout masks."""
    return {
        "out": str(out),
        "seed": 7,
        "data": {"shards": str(folder / "shards"), "tokenizer": str(folder / "tokenizer"), "block_tokens": 1024},
        "model": {
            **{"causal": True, "layers": 2, "width": 64, "heads": 2, "mlp_width": 128, "max_positions": 64},
            **{"norm": "rmsnorm", "norm_position": "pre", "norm_eps": 1e-6, "positions": "rope", "mlp": "gelu"},
            **{"bias": False, "dropout": 0.1},
        },
        "objective": {"kind": "causal_lm"},
        "optim": {"lr": 3e-3, "warmup_steps": 5},
        "phases": PHASES,
        "engine": {"micro_batch": 2, "zero_stage": stage, "timeout_s": WAIT_S},
        "evaluate": {"every_steps": EVALUATE, "max_tokens": 1024},
        "checkpoint": {"every_steps": SAVE, "every_s": 0, "keep": 2},
        "log_every": 5,
    }


def kill(run: dict, point: Point, log: Path) -> str:
    """Start or continue a run and kill it at a point. Return the place that was hit, or "over" if the run had ended."""
    out = Path(run["out"])
    started = Ranks(2, cases.train, run, log=log)
    deadline = time.monotonic() + GIVEN_UP_S
    while not _reached(out, point) and started.processes[0].is_alive():
        assert time.monotonic() < deadline, started.logs()
        time.sleep(0.0003)
    time.sleep(point.delay_s)
    alive = [started.processes[rank].is_alive() for rank in point.ranks]
    saving = any((out / "checkpoints").glob(".step_*"))
    for rank in point.ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(started.processes[rank].pid, signal.SIGKILL)
    for process in started.processes:
        process.join(GIVEN_UP_S)
        assert not process.is_alive(), f"the other rank did not end\n{started.logs()}"
    started.kill()
    if not all(alive):
        return "over"
    return "save" if saving else _hit(out, log)


def _reached(out: Path, point: Point) -> bool:
    saved = out / f"checkpoints/step_{point.step:08d}"
    if point.place == "start":
        return True
    if point.place == "save":
        return saved.with_name(f".{saved.name}.tmp").exists() or saved.exists()
    return (metrics.last_step(out) or 0) >= point.step


def _hit(out: Path, log: Path) -> str:
    """Deduce from the log and the checkpoints where a run was when it was killed outside of a save."""
    said = log.with_suffix(".0.log").read_text()
    step = metrics.last_step(out) or 0
    if "from scratch" not in said and "continuing after" not in said:
        return "start"
    return "evaluation" if step and step % EVALUATE == 0 and f"held-out at step {step}:" not in said else "step"


def end(out: Path) -> dict:
    """The results of a run that must be equal to the last bit."""
    steps = [(r.step, r.loss, r.lr, r.grad_norm, r.digest, r.tokens) for r in metrics.reports(out)]
    newest = checkpoint.newest(out)
    return {"steps": steps, "checkpoint": newest.name, "files": read_index(newest, RuntimeError, "")["files"]}


def prepare(folder: Path) -> None:
    """Train a vocabulary on the English sample and build its shards."""
    from pretrain import shards, tokenizer

    source = f"{{name: en, language: en, files: [{ROOT / 'data/sample/en.txt'}]}}"
    (folder / "recipe.yaml").write_text(f"name: en\nheldout_fraction: 0.05\nsources: [{source}]\n", encoding="utf-8")
    corpus, made = str(folder / "recipe.yaml"), str(folder / "tokenizer")
    tokenizer.run(tokenizer.TokenizerConfig(corpus=corpus, out=made, kind="byte", vocab_size=1024, plot=False))
    shards.run(shards.ShardsConfig(corpus=corpus, tokenizer=made, out=str(folder / "shards")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/kills.json")
    arguments = parser.parse_args()
    ranks.TIMEOUT_S = GIVEN_UP_S
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        straight = {}
        for stage in STAGES:
            run = values(folder, folder / f"straight-{stage}", stage)
            on_ranks(2, cases.train, run, log=folder / f"straight-{stage}.log")
            straight[stage] = end(Path(run["out"]))
        for number in range(arguments.points // KILLS):
            stage = STAGES[number % len(STAGES)]
            run = values(folder, folder / f"run-{number}", stage)
            drawn = points(stage, number, arguments.seed)
            hits = [kill(run, point, folder / f"run-{number}-{index}.log") for index, point in enumerate(drawn)]
            on_ranks(2, cases.train, run, log=folder / f"run-{number}-end.log")
            same = end(Path(run["out"])) == straight[stage]
            rows.append({"stage": stage, "points": [vars(point) for point in drawn], "hits": hits, "same": same})
            print(
                f"run {number:>2}  ZeRO {stage}  {'same' if same else 'OTHER'}  killed in: {', '.join(hits)}",
                flush=True,
            )
            shutil.rmtree(run["out"])
            found = summed(rows)
            command = f"python benchmarks/kills.py --points {arguments.points} --seed {arguments.seed}"
            head = {"command": command, "machine": machine(), "versions": versions("torch", "deepspeed")}
            arguments.out.write_text(json.dumps({**head, **found, "runs": rows}, indent=1) + "\n", encoding="utf-8")
    print("{same} of {kills} kills ended in the same bits: {hit}".format(**found))
    sys.exit(found["same"] != found["kills"])


def summed(rows: list[dict]) -> dict:
    """Count the kills, the places they hit, and the kills of runs that ended in the same bits."""
    hit = Counter(place for row in rows for place in row["hits"] if place != "over")
    same = sum(place != "over" for row in rows if row["same"] for place in row["hits"])
    return {"kills": sum(hit.values()), "same": same, "hit": dict(hit)}


if __name__ == "__main__":
    main()
