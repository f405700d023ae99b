"""Run all stages, each by the command that a user would type, and print one table of the results.

Stages share nothing but the folders that they write.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from pydantic import Field

from pretrain.config import Config, read_values
from pretrain.display import tables
from pretrain.errors import PretrainError, UserError
from pretrain.finetune.compare import verdict_of
from pretrain.storage.files import write_json
from pretrain.storage.index import INDEX


class ModelRoad(Config):
    """One model: its pre-training and its export."""

    run: str
    """The configuration file of `launch/pretrain.py`."""
    export: str
    """The configuration file of `launch/export.py`."""


class DemoConfig(Config):
    """The configuration of `launch/demo.py`: the configuration files of all stages."""

    ranks: int = Field(gt=0)
    """The number of processes that pre-train together."""
    summary: str
    """The JSON file that the summary is written to."""
    tokenizers: list[str]
    """The configuration files of `launch/tokenizer.py`, in order."""
    shards: list[str]
    """The configuration files of `launch/shards.py`, in order."""
    encoder: ModelRoad
    """The encoder: its pre-training and its export."""
    decoder: ModelRoad
    """The decoder: its pre-training and its export."""
    finetune: list[str]
    """The configuration files of `launch/finetune.py`, in order."""
    generate: str
    """The configuration file of `launch/generate.py`."""


def run(config: DemoConfig) -> dict:
    """Run every stage and write `config.summary`. Raises PretrainError naming the first command that fails.

    The commands name the scripts of `launch/`, so the demo runs in the folder of the repository. Raises UserError if it
    is started elsewhere.
    """
    if not Path("launch").is_dir():
        remedy = "change to that folder, which has README.md, and start again"
        raise UserError("the demo runs in the folder of the repository", f"there is no launch/ in {Path.cwd()}", remedy)
    seconds: dict[str, float] = {}
    started = time.monotonic()
    for script, path in _stages(config):
        name = f"{Path(script).stem} {Path(path).stem}"
        begun = time.monotonic()
        _execute(_command(script, path, config.ranks), config.ranks)
        seconds[name] = round(time.monotonic() - begun, 1)
    summary = summarise(config, seconds, time.monotonic() - started)
    write_json(Path(config.summary), summary)
    show(summary)
    print(f"written to {config.summary}")
    return summary


def summarise(config: DemoConfig, stage_s: dict[str, float], total_s: float) -> dict:
    """Collect the results of all stages: reports, scores, paths, and the wall time of each stage in seconds."""
    reports = ((out, _json(Path(out) / "report.json")) for out in map(_out, config.finetune))
    finetuned = {Path(out).name: {"path": out, **report} for out, report in reports}
    return {
        "seconds": {"total": round(total_s, 1), "stages": stage_s},
        "tokenizer": {Path(out).name: _tokenizer(out) for out in map(_out, config.tokenizers)},
        "shards": {Path(out).name: _shards(out) for out in map(_out, config.shards)},
        "encoder": _model(config.encoder),
        "decoder": _model(config.decoder),
        "finetune": finetuned,
        "gains": _gains(finetuned),
    }


def _stages(config: DemoConfig) -> list[tuple[str, str]]:
    """(script, configuration) of every stage in order."""
    models = (config.encoder, config.decoder)
    return [
        *(("launch/tokenizer.py", path) for path in config.tokenizers),
        *(("launch/shards.py", path) for path in config.shards),
        *(("launch/pretrain.py", model.run) for model in models),
        *(("launch/export.py", model.export) for model in models),
        *(("launch/finetune.py", path) for path in config.finetune),
        ("launch/generate.py", config.generate),
    ]


def _command(script: str, path: str, ranks: int) -> list[str]:
    if script == "launch/pretrain.py":
        return ["deepspeed", "--num_accelerators", str(ranks), script, path]
    return ["python", script, path]


def _execute(command: list[str], ranks: int) -> None:
    """Echo and run one command as typed in an activated environment, on the CPU."""
    print(f"\n$ {' '.join(command)}", flush=True)
    here = Path(sys.executable).parent
    env = {**os.environ, "PATH": f"{here}{os.pathsep}{os.environ.get('PATH', '')}"}
    env |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    threads = max(1, (os.cpu_count() or 1) // ranks) if command[0] == "deepspeed" else os.cpu_count() or 1
    env.setdefault("OMP_NUM_THREADS", str(threads))  # more threads than cores would spin and slow each other down
    status = subprocess.run([here / command[0], *command[1:]], env=env).returncode
    if status:
        raise PretrainError(f"exit status {status} from: {' '.join(command)}")


def _out(path: str) -> str:
    return read_values(Path(path).read_text(encoding="utf-8"))["out"]


def _json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def _tokenizer(out: str) -> dict:
    report = _json(Path(out) / "report.json")
    overall = report["heldout"]["overall"]
    keys = ("characters_per_token", "bytes_per_token", "unknown_rate")
    return {"path": out, "vocab_size": report["vocab_size"], **{key: overall[key] for key in keys}}


def _shards(out: str) -> dict:
    sides = _json(Path(out) / INDEX)["sides"]
    return {"path": out, **{side: {key: sides[side][key] for key in ("documents", "tokens")} for side in sides}}


def _model(model: ModelRoad) -> dict:
    run_folder, export_folder = _out(model.run), _out(model.export)
    certificate = _json(Path(export_folder) / INDEX)["recorded"]["certificate"]
    return {
        "run": run_folder,
        "export": export_folder,
        **_json(Path(run_folder) / "summary.json"),
        "max_logit_diff": certificate["max_logit_diff"],
    }


def _gains(finetuned: dict[str, dict]) -> dict[str, str]:
    """For each pre-trained result, its distances from its random twin and from naive Bayes, with verdicts.

    A twin is the folder of the same task (the name up to the first dash) whose report says init: random.
    """
    gains = {}
    for name, found in finetuned.items():
        task = name.split("-")[0]
        twins = [other for key, other in finetuned.items() if key.split("-")[0] == task and other["init"] == "random"]
        if found["init"] == "random" or not twins:
            continue
        test, twin = found["test"], twins[0]["test"]
        bayes = found["baselines"]["naive_bayes"]
        over_bayes = "beyond" if test["interval95"][0] > bayes else "NOT beyond"
        over_twin = 100 * (test["accuracy"] - twin["accuracy"])
        gains[name] = (
            f"{over_twin:+.1f} points over its random twin, {verdict_of(test, twin)}; "
            f"{100 * (test['accuracy'] - bayes):+.1f} over naive Bayes, {over_bayes} the 95 % interval"
        )
    return gains


def show(summary: dict) -> None:
    """Print the summary as one table."""
    tables.show(("stage", "what", "value"), _rows(summary), title="The whole road", left=range(3))


def _rows(summary: dict) -> list[tuple[str, str, str]]:
    rows = []
    for name, found in summary["tokenizer"].items():
        rows.append((name, "vocabulary", f"{found['vocab_size']:,}"))
        per_token = f"{found['characters_per_token']:.2f}, {found['unknown_rate']:.2%}"
        rows.append(("", "characters per token, unknown", per_token))
    for name, found in summary["shards"].items():
        for side in ("train", "heldout"):
            documents, tokens = found[side]["documents"], found[side]["tokens"]
            rows.append((name if side == "train" else "", side, f"{documents:,} documents, {tokens:,} tokens"))
    for name in ("encoder", "decoder"):
        found = summary[name]
        rows.append((name, "parameters, steps", f"{found['parameters']:,}, {found['steps']:,}"))
        rows.append(("", "training loss, first → last", f"{found['first_loss']:.3f} → {found['last_loss']:.3f}"))
        loss = f"{found['heldout_loss']:.3f} ± {found['heldout_standard_error']:.3f}"
        held = f"{loss} (without context: {found['no_context_loss']:.3f}, gain {found['heldout_gain']:.3f})"
        rows.append(("", "held-out loss, nats", held))
        if found["heldout_bits_per_byte"] is None:
            rows.append(("", "held-out masked accuracy", f"{found['heldout_accuracy']:.1%}"))
        else:
            rows.append(("", "held-out bits per byte", f"{found['heldout_bits_per_byte']:.3f}"))
        rows.append(("", "export, largest logit difference", f"{found['max_logit_diff']:.1e}"))
    for name, found in summary["finetune"].items():
        rows.append((name, "test accuracy", _accuracy(found)))
    rows += [("", f"{name} gains", verdict) for name, verdict in summary["gains"].items()]
    times = summary["seconds"]
    rows += [("seconds" if not n else "", stage, f"{s:.0f}") for n, (stage, s) in enumerate(times["stages"].items())]
    return [*rows, ("", "total", f"{times['total']:.0f}")]


def _accuracy(found: dict) -> str:
    low, high = found["test"]["interval95"]
    baselines = found["baselines"]
    return (
        f"{found['test']['accuracy']:.1%} (95 %: {low:.1%} to {high:.1%}); "
        f"majority {baselines['majority']:.1%}, naive Bayes (1- and 2-grams) {baselines['naive_bayes']:.1%}"
    )
