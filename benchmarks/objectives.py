"""Train a small model of every objective and every dialect on `data/sample`, with the commands that a user types.

    python benchmarks/objectives.py FOLDER [--rows NAME ...] [--parts train export resume] [--forked] [--out FILE.json]

FOLDER keeps vocabularies, shards and runs. Each row of ROWS has three parts:

    train    `launch/pretrain.py` with a configuration of configs/sample and a few other keys, on one thread. The
             held-out loss is compared with the no-context loss, below which no model that ignores the context can be.
    export   `launch/export.py` in each dialect of the row. The certificate says how far logits of transformers differ.
    resume   twelve steps on two ranks, with ZeRO 1 and with ZeRO 3: a run without a break, and a run of which all ranks
             are killed with kill -9 after the checkpoint of step 6 was published, and which is then started again.
             Loss, gradient norm and batch digest of all twelve steps must be equal to the last bit. `deepspeed` starts
             the ranks. With --forked they are forked from a process that has imported torch, as in the tests: six
             starts of `deepspeed` took 200 seconds on two busy cores.

The results are written after every part. A part whose result is there is not run again.
"""

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # so that no file of this folder shadows a library

from benchmarks.measuring import ONE_THREAD, machine, process, versions  # noqa: E402
from tests.helpers import ranks  # noqa: E402

os.environ |= ONE_THREAD | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # the launcher starts `python`
PARTS = ("train", "export", "resume")
STAGES = (1, 3)  # of ZeRO
SAVED, STEPS = 6, 12  # of the runs that are killed
GIVEN_UP_S = 600
SHAPES = {  # keys of `model` by dialect, beside those of the row's configuration
    "llama": "qk_norm=false",
    "nanochat": "norm_weights=false embed_norm=true mlp=relu2 qk_norm_after_rope=true",
    "gpt2": "norm=layernorm norm_eps=1e-5 positions=learned mlp=gelu bias=true qk_norm=false kv_heads=null",
    "modernbert_decoder": "norm=layernorm norm_eps=1e-5 embed_norm=true first_norm=false mlp=geglu transform_head=true "
    "qk_norm=false kv_heads=null",
    "eurobert": "norm=rmsnorm embed_norm=false first_norm=true mlp=swiglu transform_head=false",
}
HYBRID = "norm=layernorm embed_norm=true first_norm=false mlp=geglu transform_head=true"
SHORT = {  # phases of runs that learn from the context in fewer steps than their configuration has
    "encoder": "[{steps: 400, seq_len: 16, batch_tokens: 1024}, "
    "{steps: 100, seq_len: 64, batch_tokens: 1024, decay_steps: 100}]",
    "decoder": "[{steps: 150, seq_len: 128, batch_tokens: 2048, decay_steps: 50}]",
    "hybrid": "[{steps: 500, seq_len: 64, batch_tokens: 1024, decay_steps: 200}]",
}


@dataclass(frozen=True)
class Row:
    """One run: its objective, the configuration, other keys, and the dialects that it is exported in."""

    objective: str
    config: str
    dialects: tuple[str, ...]
    keys: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.objective}-{self.dialects[0]}"


def row(objective: str, config: str, *dialects: str, phases: str = "", shape: str = "") -> Row:
    """A row whose first dialect is that of the run. `phases` names phases of SHORT; without it the configuration's."""
    keys = [f"export.dialect={dialects[0]}"] if shape else []
    keys += [f"model.{key}" for key in shape.split()]
    keys += [f"phases={SHORT[phases]}"] if phases else []
    return Row(objective, config, dialects, tuple(keys))


ROWS = [
    row("masked_lm", "encoder", "modernbert", phases="encoder"),
    row("masked_lm", "encoder", "eurobert", phases="encoder", shape=SHAPES["eurobert"]),
    row("masked_lm", "bert", "bert"),
    row("causal_lm", "decoder", "qwen3", phases="decoder"),
    *(
        row("causal_lm", "decoder", name, phases="decoder", shape=SHAPES[name])
        for name in ("llama", "gpt2", "nanochat")
    ),
    row("causal_lm", "decoder", "modernbert_decoder", phases="decoder", shape=SHAPES["modernbert_decoder"]),
    row("prefix_lm", "prefix-lm", "qwen3", phases="decoder"),
    row("prefix_lm", "prefix-lm", "llama", phases="decoder", shape=SHAPES["llama"]),
    row("fill_in_middle", "fill-in-middle", "qwen3", phases="decoder"),
    row("fill_in_middle", "fill-in-middle", "llama", phases="decoder", shape=SHAPES["llama"]),
    row("hybrid", "hybrid", "llama", "eurobert", phases="hybrid"),
    row("hybrid", "hybrid", "modernbert_decoder", "modernbert", phases="hybrid", shape=HYBRID),
    row("replaced_token_detection", "electra", "electra"),
    row("span_corruption", "t5", "t5"),
]
VOCABULARIES = {  # name → kind, and a further key of the vocabulary
    "bert": ("bert",),
    "byte": ("byte",),
    "fim": ("byte", "special_tokens=[<fim_prefix>, <fim_suffix>, <fim_middle>]"),
    "t5": ("byte", "sentinels=100"),
}


def prepare() -> list[str]:
    """Train the vocabularies and build the shards of the sample that are not there. Return the commands for all."""
    commands = []
    for name, (kind, *further) in VOCABULARIES.items():
        made = {stage: f"runs/demo/{stage}-{name}" for stage in ("tokenizer", "shards")}
        keys = {stage: [f"out={folder}"] for stage, folder in made.items()}
        keys["tokenizer"] += further
        keys["shards"] += [f"tokenizer={made['tokenizer']}"]
        for stage, folder in made.items():
            words = [f"configs/sample/{stage}-{kind}.yaml", *keys[stage]]
            commands.append(_said(stage, words))
            if not Path(folder).exists():
                process(_python(stage, words), {})
    return commands


def _python(stage: str, words: list[str]) -> list[str]:
    return [sys.executable, f"launch/{stage}.py", *words]


def _said(stage: str, words: list[str]) -> str:
    return shlex.join(["python", f"launch/{stage}.py", *words])


def train(one: Row) -> dict:
    """Train a row from its beginning and return the figures of its summary, with the CPU seconds of the process."""
    out = f"runs/objectives/{one.name}"
    shutil.rmtree(out, ignore_errors=True)
    words = [f"configs/sample/{one.config}.yaml", f"out={out}", *one.keys]
    cost = process(_python("pretrain", words), {})
    summary = json.loads(Path(out, "summary.json").read_text())
    kept = (
        "parameters",
        "steps",
        "tokens",
        "heldout_loss",
        "heldout_standard_error",
        "no_context_loss",
        "heldout_gain",
    )
    figures = {key: summary[key] for key in (*kept, "seconds")}
    costs = {key: round(cost[key], 1) for key in ("cpu_s", "cpu_s_of_others")}
    return {"command": _said("pretrain", words), **figures, **costs}


def export(one: Row) -> dict:
    """Export the run of a row in each of its dialects and return the figures of the certificates by dialect."""
    found = {}
    for dialect in one.dialects:
        out = f"runs/objectives/{one.name}-as-{dialect}"
        keys = [f"checkpoint=runs/objectives/{one.name}", f"dialect={dialect}", f"out={out}"]
        words = ["configs/sample/export-decoder.yaml", *keys]
        process(_python("export", words), {})
        certificate = json.loads(Path(out, "index.json").read_text())["recorded"]["certificate"]
        kept = {key: certificate[key] for key in ("logits", "texts", "max_logit_diff")}
        found[dialect] = {"command": _said("export", words), **kept}
    return found


class Launched:
    """Two ranks of a command under `deepspeed`, on a port that nobody else uses."""

    def __init__(self, words: list[str], log: Path):
        launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", "2"]
        self.words = words
        with open(log, "w") as file:
            command = [*launcher, "--master_port", str(ranks.free_port()), *words]
            self.process = subprocess.Popen(command, stdout=file, stderr=file)

    def over(self) -> bool:
        return self.process.poll() is not None

    def kill(self) -> None:
        """End the launcher and both ranks, which have a session of their own, with kill -9."""
        while alive := [number for number in _processes_here(self.words[2]) if number != os.getpid()]:
            for number in alive:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)
            self.over()
        self.process.wait()

    def finish(self) -> None:
        if status := self.process.wait(GIVEN_UP_S):
            raise SystemExit(f"{shlex.join(self.words)} ended with {status}")


class Forked:
    """Two ranks of the same command, forked from a process that has imported torch and DeepSpeed."""

    def __init__(self, words: list[str], log: Path):
        from pretrain import config
        from pretrain.training.config import RunConfig
        from pretrain.training.run import run

        log.write_text("")
        self.ranks = ranks.Ranks(2, run, config.load(RunConfig, words[1], words[2:]), log=log.with_suffix(""))
        self.log = log

    def over(self) -> bool:
        return not all(process.is_alive() for process in self.ranks.processes)

    def kill(self) -> None:
        self.ranks.kill()

    def finish(self) -> None:
        try:
            self.ranks.results()
        except AssertionError as error:
            raise SystemExit(str(error)) from None
        self.log.write_text(self.ranks.logs())


def _processes_here(word: str) -> list[int]:
    """The processes that work in this folder and have `word` on their command line."""
    found = []
    for path in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if path.name.isdigit() and word.encode() in (path / "cmdline").read_bytes().split(b"\0"):
                found += [int(path.name)] if (path / "cwd").readlink() == Path.cwd() else []
    return found


def resume(one: Row, start: type[Launched] | type[Forked]) -> dict:
    """Kill a short version of the run on two ranks, for each ZeRO stage, and compare it with one without a break."""
    found = {}
    for stage in STAGES:
        lines = {}
        for how in ("straight", "killed"):
            out = Path(f"runs/objectives/{one.name}-zero{stage}-{how}")
            log = out.with_suffix(".log")
            shutil.rmtree(out, ignore_errors=True)
            out.parent.mkdir(parents=True, exist_ok=True)
            words = _short(one, stage, out)
            if how == "killed":
                _kill_after_checkpoint(start(words, log), out)
            start(words, log).finish()
            assert (how == "killed") == (f"continuing after step {SAVED}" in log.read_text()), log
            lines[how] = _lines(out)
        same = lines["straight"] == lines["killed"] and len(lines["killed"]) == STEPS
        command = shlex.join(["deepspeed", "--num_accelerators", "2", *words])
        how = start.__name__.lower()
        found[str(stage)] = {"command": command, "ranks": how, "steps": STEPS, "killed_after": SAVED, "same": same}
    return found


def _short(one: Row, stage: int, out: Path) -> list[str]:
    phases = f"phases=[{{steps: {STEPS}, seq_len: 64, batch_tokens: 1024, decay_steps: 4}}]"
    keys = [key for key in one.keys if not key.startswith("phases=")]
    keys += [phases, "optim.warmup_steps=4", "engine.micro_batch=4", f"engine.zero_stage={stage}"]
    keys += [f"checkpoint.every_steps={SAVED}", "checkpoint.every_s=0", "evaluate.max_tokens=1024"]
    return ["launch/pretrain.py", f"configs/sample/{one.config}.yaml", f"out={out}", *keys]


def _kill_after_checkpoint(started: Launched | Forked, out: Path) -> None:
    """Kill a run as soon as the checkpoint of step SAVED is there."""
    saved, deadline = out / f"checkpoints/step_{SAVED:08d}", time.monotonic() + GIVEN_UP_S
    while not saved.exists():
        if started.over() or time.monotonic() > deadline:
            raise SystemExit(f"{out} ended without a checkpoint of step {SAVED}")
        time.sleep(0.001)
    started.kill()
    newest = max(path.name for path in saved.parent.glob("step_*"))
    if newest != saved.name:
        raise SystemExit(f"{out} had already saved {newest} when it was killed")


def _lines(out: Path) -> list[tuple]:
    """Step, loss, gradient norm and digest of every recorded step. The text of a float in JSON keeps all its bits."""
    reports = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [tuple(report[key] for key in ("step", "loss", "grad_norm", "digest")) for report in reports]


def main() -> None:
    names = [one.name for one in ROWS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for vocabularies, shards and runs; outside of the repository")
    parser.add_argument("--rows", nargs="+", choices=names, default=names)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--forked", action="store_true", help="fork the ranks of `resume` instead of launching them")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/objectives-cpu.json")
    arguments = parser.parse_args()
    results = arguments.out.resolve()
    rows = {one.name: {"objective": one.objective, "dialects": list(one.dialects)} for one in ROWS}
    rows |= json.loads(results.read_text())["rows"] if results.exists() else {}
    arguments.folder.mkdir(parents=True, exist_ok=True)
    os.chdir(arguments.folder)  # the commands name the files of a checkout
    for name in ("configs", "data", "launch"):
        if not Path(name).exists():
            Path(name).symlink_to(ROOT / name)
    head = {"command": "python benchmarks/objectives.py FOLDER", "date": str(date.today()), "machine": machine()}
    head |= {"versions": versions("torch", "deepspeed", "transformers"), "prepared by": prepare()}
    start = Forked if arguments.forked else Launched
    ranks.TIMEOUT_S = GIVEN_UP_S
    measure = {"train": train, "export": export, "resume": lambda one: resume(one, start)}
    failed = 0
    for one in ROWS:
        found = rows[one.name]
        for part in (part for part in arguments.parts if one.name in arguments.rows and part not in found):
            began = time.monotonic()
            try:
                found[part] = measure[part](one)
            except SystemExit as error:
                failed += 1
                print(f"{one.name} {part}: {error}", flush=True)
                continue
            print(f"{one.name} {part}, {time.monotonic() - began:.0f} s: {_brief(part, found[part])}", flush=True)
            results.write_text(json.dumps({**head, "rows": rows}, indent=1, ensure_ascii=False) + "\n")
    sys.exit(failed > 0)


def _brief(part: str, found: dict) -> str:
    if part == "train":
        return f"loss {found['heldout_loss']:.3f}, gain {found['heldout_gain']:.3f}, {found['cpu_s']} CPU s"
    key = "max_logit_diff" if part == "export" else "same"
    return ", ".join(f"{name} {one[key]}" for name, one in found.items())


if __name__ == "__main__":
    main()
