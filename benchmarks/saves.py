"""Measure how long a save stops the training, and how long its files take, in two checkouts; write it as JSON.

    git worktree add ../before COMMIT
    python benchmarks/saves.py ../before . --out benchmarks/results/saves.json

A run with the shape of GPT-2 small (124 M weights and AdamW's two moments in fp32, 1.5 GB) is saved every EVERY steps,
as a plain process, and under `deepspeed` on two ranks with ZeRO 1, with one thread a rank. The checkouts take turns.
The figures are seconds of wall time, the median, the least and the most over all saves or steps:

    stall       between steps, from the step that is saved to the step after the checkpoint is complete
    complete    from the end of the step until the checkpoint is complete
    step        one step while no checkpoint is written
    meanwhile   one step while a checkpoint is written
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # so that no file of this folder shadows a library

from benchmarks import launch  # noqa: E402
from benchmarks.before import commit  # noqa: E402
from benchmarks.measuring import machine, versions  # noqa: E402

T, WINDOWS, ENTRIES = 64, 2, 50_304
EVERY, SAVES = 4, 2  # steps from one save to the next; saves that are measured in a run
MODEL = {"causal": True, "layers": 12, "width": 768, "heads": 12, "mlp_width": 3072, "max_positions": 1024}
MODEL |= {"norm": "layernorm", "norm_position": "pre", "norm_eps": 1e-5, "positions": "learned", "mlp": "gelu_tanh"}
MODEL |= {"bias": True, "vocab_multiple": ENTRIES}
LAUNCHED = {"plain": 0, "deepspeed, two ranks": 2}


class Watched(launch.Run):
    """A training command, with the time at which each of its checkpoints appeared."""

    complete: dict[int, float]

    def watch(self, out: Path) -> None:
        """Wait until all saves are complete and two more steps are done."""
        self.complete = {}
        saved = [EVERY * number for number in range(1, SAVES + 1)]
        after = 0
        while not after or max(self.came) < after + 2:
            if self.process.poll() is not None:
                raise SystemExit(f"ended too early:\n{self.log.read_text()}")
            for step in saved:
                if step not in self.complete and (out / f"checkpoints/step_{step:08d}").exists():
                    self.complete[step] = time.perf_counter()
            self._read()
            after = after or (max(self.came) if len(self.complete) == SAVES else 0)
            time.sleep(0.001)

    def figures(self) -> dict[str, list[float]]:
        """The seconds of each save, and of each step."""
        found: dict[str, list[float]] = {"stall_s": [], "complete_s": [], "step_s": [], "meanwhile_s": []}
        for step, complete in self.complete.items():
            last = max(number for number, (came, _) in self.came.items() if came <= complete) + 1
            stalls = [self.stall(number) for number in range(step, last + 1) if number + 1 in self.came]
            found["stall_s"].append(sum(stalls))
            found["complete_s"].append(complete - self.came[step][0])
        for came, took in self.came.values():
            writing = [self.came[step][0] < came - took / 2 < complete for step, complete in self.complete.items()]
            found["meanwhile_s" if any(writing) else "step_s"].append(took)
        del found["step_s"][0]
        return found


def prepare(folder: Path) -> None:
    """Build shards of the sample text."""
    from pretrain import shards, tokenizer

    corpus, made = str(ROOT / "data/sample/recipe.yaml"), str(folder / "tokenizer")
    tokenizer.run(tokenizer.TokenizerConfig(corpus=corpus, out=made, kind="byte", vocab_size=4096, plot=False))
    shards.run(shards.ShardsConfig(corpus=corpus, tokenizer=made, out=str(folder / "shards")))


def configuration(folder: Path, out: Path, ranks: int) -> Path:
    values = {
        "out": str(out),
        "seed": 1,
        "data": {"shards": str(folder / "shards"), "tokenizer": str(folder / "tokenizer")},
        "model": MODEL,
        "objective": {"kind": "causal_lm"},
        "optim": {"lr": 1e-4},
        "phases": [{"steps": 1000, "seq_len": T, "batch_tokens": WINDOWS * T}],
        "engine": {"micro_batch": WINDOWS // max(1, ranks), "zero_stage": 1},
        "checkpoint": {"every_s": 0, "every_steps": EVERY, "keep": 1},
        "log_every": EVERY,
    }
    path = out.with_suffix(".yaml")
    path.write_text(json.dumps(values))
    return path


def measure(folder: Path, checkout: Path, ranks: int) -> dict[str, list[float]]:
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        out = Path(scratch) / "run"
        config = configuration(folder, out, ranks)
        run = Watched(config, out, ranks, Path(scratch) / "log", checkout=checkout)
        try:
            run.watch(out)
        finally:
            run.kill()
        return run.figures()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="a checkout")
    parser.add_argument("after", type=Path, help="another checkout")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    checkouts = {name: getattr(arguments, name).resolve() for name in ("before", "after")}
    head = {"command": f"python benchmarks/saves.py BEFORE AFTER --rounds {arguments.rounds}"}
    head |= {"date": str(date.today()), "commits": {name: commit(folder) for name, folder in checkouts.items()}}
    head |= {"machine": machine(), "versions": versions("torch", "deepspeed"), "rounds": arguments.rounds}
    head["load_average_before"] = [round(load, 1) for load in os.getloadavg()]
    head["figures"] = "[median, least, most], in seconds of wall time"
    found: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        prepare(Path(scratch))
        for _ in range(arguments.rounds):
            for how, ranks in LAUNCHED.items():
                for name, checkout in checkouts.items():
                    entry = found.setdefault(f"{how}, {name}", {})
                    for figure, values in measure(Path(scratch), checkout, ranks).items():
                        entry.setdefault(figure, []).extend(values)
                    print(
                        f"{how}, {name}",
                        {key: [round(v, 2) for v in values] for key, values in entry.items()},
                        flush=True,
                    )
    results = {
        name: {
            figure: [round(f(values), 3) for f in (statistics.median, min, max)] if values else None
            for figure, values in entry.items()
        }
        for name, entry in found.items()
    }
    if arguments.out:
        arguments.out.write_text(json.dumps({**head, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
