"""Measure the time that a run spends outside of its steps, using the commands that a user types; write it as JSON.

    python benchmarks/launch.py corpora/en.jsonl.zst --out benchmarks/results/launch.json

A vocabulary of 8,064 entries is trained on the first `--megabytes` of the text, and shards are built. Decoders of two
sizes train on them with one thread a rank: as a plain process, and under `deepspeed` on one rank and on two (ZeRO 1).
Each round starts a run, kills it with kill -9 as soon as the checkpoint of step SAVED is complete, and starts it again.
The figures, in seconds:

    start       from the command to the end of the first step
    again       from kill -9, followed at once by the same command, to the end of its first step
    evaluate    from the end of a step with an evaluation (EVALUATED held-out tokens, and the preview) to the beginning
                of the next step
    step        one step
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # so that no file of this folder shadows a library

from benchmarks.measuring import ONE_THREAD, documents, machine, versions, write_recipe  # noqa: E402

T, WINDOWS, VOCABULARY = 128, 8, 8064
SAVED, EVALUATED_AT, STEPS = 4, 7, 9
EVALUATED = 1 << 14
MODELS = {  # layers, width, heads
    "1.4 M weights": (2, 128, 4),
    "29 M weights": (8, 512, 8),
}
LAUNCHED = {"plain": 0, "deepspeed, one rank": 1, "deepspeed, two ranks": 2}


def prepare(text: Path, folder: Path, megabytes: float) -> None:
    from pretrain import shards, tokenizer

    with open(folder / "text.txt", "w", encoding="utf-8") as file:
        for document in documents(text, megabytes):
            file.write("\n".join(line for line in document.split("\n") if line.strip()) + "\n\n")
    corpus, made = str(write_recipe(folder, "text.txt")), str(folder / "tokenizer")
    tokenizer.run(tokenizer.TokenizerConfig(corpus=corpus, out=made, kind="byte", vocab_size=VOCABULARY, plot=False))
    shards.run(shards.ShardsConfig(corpus=corpus, tokenizer=made, out=str(folder / "shards")))


def configuration(folder: Path, out: Path, shape: tuple[int, int, int], ranks: int) -> Path:
    layers, width, heads = shape
    values = {
        "out": str(out),
        "seed": 1,
        "data": {"shards": str(folder / "shards"), "tokenizer": str(folder / "tokenizer")},
        "model": {"causal": True, "layers": layers, "width": width, "heads": heads, "mlp_width": 4 * width}
        | {"max_positions": T, "norm": "layernorm", "norm_position": "pre", "norm_eps": 1e-5, "positions": "learned"}
        | {"mlp": "gelu", "bias": True},
        "objective": {"kind": "causal_lm"},
        "optim": {"lr": 1e-4},
        "phases": [{"steps": STEPS, "seq_len": T, "batch_tokens": WINDOWS * T}],
        "engine": {"micro_batch": WINDOWS // max(1, ranks)},
        "checkpoint": {"every_s": 0, "every_steps": SAVED},
        "evaluate": {"every_steps": EVALUATED_AT, "max_tokens": EVALUATED},
    }
    path = out.with_suffix(".yaml")
    path.write_text(json.dumps(values))
    return path


class Run:
    """A training command, with the time at which each line of its metrics.jsonl appeared."""

    def __init__(self, config: Path, out: Path, ranks: int, log: Path, kept: int = 0, checkout: Path = ROOT):
        """Start the command of a checkout. `kept`: the number of steps that an earlier command recorded."""
        script = str(checkout / "launch" / "pretrain.py")
        launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", str(ranks), script]
        command = [*(launcher if ranks else [sys.executable, script]), str(config)]
        environment = os.environ | ONE_THREAD | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"  # the launcher starts `python`
        self.metrics, self.before = out / "metrics.jsonl", _inode(out / "metrics.jsonl")
        self.log, self.kept = log, kept
        with open(log, "w") as file:
            self.process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
        self.came: dict[int, tuple[float, float]] = {}  # by step: when its line appeared, and its seconds

    def wait(self, step: int) -> float:
        """Wait until this command has recorded `step` (0: any step), and return the time at which it did."""
        while not (self.came if step == 0 else step in self.came):
            if self.process.poll() is not None and not self._read():
                raise SystemExit(f"ended before step {step}:\n{self.log.read_text()}")
            self._read()
            time.sleep(0.001)
        return self.came[step or min(self.came)][0]

    def _read(self) -> bool:
        """Note the time of all new lines; return whether there were any."""
        if _inode(self.metrics) in (None, self.before):  # a run that continues writes the file anew
            return False
        now, found = time.perf_counter(), False
        text = self.metrics.read_text()
        for line in text[: text.rfind("\n") + 1].splitlines():
            report = json.loads(line)
            if report["step"] not in self.came and report["step"] > self.kept:
                self.came[report["step"]], found = (now, report["step_s"]), True
        return found

    def stall(self, step: int) -> float:
        """Seconds between the end of `step` and the beginning of the next step."""
        return self.came[step + 1][0] - self.came[step + 1][1] - self.came[step][0]

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for rank in Path("/proc").iterdir():  # `deepspeed` gives its ranks a session of their own
            if rank.name.isdigit() and str(self.metrics.parent.with_suffix(".yaml")) in _command(rank):
                os.kill(int(rank.name), signal.SIGKILL)


def _inode(path: Path) -> int | None:
    return path.stat().st_ino if path.exists() else None


def _command(process: Path) -> str:
    try:
        return (process / "cmdline").read_text(errors="replace")
    except OSError:
        return ""


def measure(folder: Path, shape: tuple[int, int, int], ranks: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        out = Path(scratch) / "run"
        config, log = configuration(folder, out, shape, ranks), Path(scratch) / "log"
        began = time.perf_counter()
        run = Run(config, out, ranks, log)
        started = run.wait(1) - began
        while not (out / f"checkpoints/step_{SAVED:08d}").exists():
            time.sleep(0.001)
        killed = time.perf_counter()
        run.kill()
        again = Run(config, out, ranks, log, kept=SAVED)
        resumed = again.wait(0) - killed
        again.wait(STEPS)
        again.process.wait()
        return {
            "start_s": started,
            "again_s": resumed,
            "evaluate_s": again.stall(EVALUATED_AT),
            "step_s": statistics.median(took for _, took in again.came.values()),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--megabytes", type=float, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    head = {"command": " ".join(["python benchmarks/launch.py", *sys.argv[1:]]), "date": str(date.today())}
    head |= {"machine": machine(), "versions": versions("torch", "deepspeed"), "rounds": arguments.rounds}
    head["load_average_before"] = [round(load, 1) for load in os.getloadavg()]
    head["figures"] = "[median, least, most] over rounds, in seconds of wall time"
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        prepare(arguments.text, Path(scratch), arguments.megabytes)
        rounds = [
            {
                f"{model}, {how}": measure(Path(scratch), MODELS[model], ranks)
                for model in arguments.models
                for how, ranks in LAUNCHED.items()
            }
            for _ in range(arguments.rounds)
        ]
    for name in rounds[0]:
        found = {figure: [round_[name][figure] for round_ in rounds] for figure in rounds[0][name]}
        results[name] = {
            figure: [round(f(values), 3) for f in (statistics.median, min, max)] for figure, values in found.items()
        }
        print(name, results[name], flush=True)
    arguments.out.write_text(json.dumps({**head, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
