"""Race recipes of training: how few tokens does each need to reach the held-out loss of the reference?

    python benchmarks/converge.py FOLDER TEXT --races decoder-2x128 encoder-2x128 [--seeds 5] [--out FILE.json]

FOLDER keeps vocabularies, shards and runs. All recipes of a race share the text, the vocabulary, the shards, the
held-out windows and the size of the model (layers x width, about as many weights). The first recipe of a race is the
reference: it takes all tokens of the race. The others take shares of them, each with a schedule of its own that ends
there: a point in the middle of a schedule is no result of a shorter run. Each run is one `launch/pretrain.py` on one
thread; its CPU seconds are those of the whole command, and scoring held-out text is counted.

A share wins if the mean loss of its seeds is below that of the reference. z is the difference in standard errors of
both means; above 1.64 it is below by more than chance in 19 of 20 cases. A run whose result is there is not run again.
"""

import argparse
import json
import math
import shutil
import statistics
import sys
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # so that no file of this folder shadows a library

from benchmarks.measuring import ONE_THREAD, documents, machine, process, versions, write_recipe  # noqa: E402

ENTRIES = 8192
SIZES = {"2x128": {"layers": 2, "width": 128}, "4x256": {"layers": 4, "width": 256}}
TOKENS = {"decoder": 819_200, "encoder": 2_048_000}

GPT2 = {"causal": True, "norm": "layernorm", "norm_position": "pre", "norm_eps": 1e-5, "positions": "learned"}
GPT2 |= {"mlp": "gelu", "bias": True}
QWEN3 = {"causal": True, "norm": "rmsnorm", "norm_position": "pre", "norm_eps": 1e-6, "positions": "rope"}
QWEN3 |= {"mlp": "swiglu", "bias": False, "qk_norm": True}
BERT = {"causal": False, "norm": "layernorm", "norm_position": "post", "norm_eps": 1e-12, "positions": "learned"}
BERT |= {"mlp": "gelu", "bias": True, "transform_head": True}
MODERNBERT = {"causal": False, "norm": "layernorm", "norm_position": "pre", "embed_norm": True, "first_norm": False}
MODERNBERT |= {"norm_eps": 1e-5, "positions": "rope", "mlp": "geglu", "bias": False, "transform_head": True}
GATED = ("swiglu", "geglu")  # with a third matrix: 3 times the width has as many weights as 4 times without it


@dataclass(frozen=True)
class Phase:
    """A phase as shares: of the run's tokens, and of its own steps for the decay at its end."""

    share: float
    seq_len: int
    decay: float = 0.0
    shape: str = "1-sqrt"
    objective: dict[str, Any] | None = None


@dataclass(frozen=True)
class Recipe:
    """The shape, the optimizer and the schedule of a run, whatever its tokens."""

    dialect: str
    model: dict[str, Any]
    optim: dict[str, Any]
    phases: tuple[Phase, ...]
    warmup: float  # the share of the steps
    batch_tokens: int
    shares: tuple[float, ...]  # of the tokens of the race that it is given, one run each
    objective: dict[str, Any] = field(default_factory=dict)

    def configuration(self, layers: int, width: int, tokens: int) -> dict[str, Any]:
        """The sections of a run but for `data`. A head is 64 wide, and 32 in the smallest decoder."""
        steps = tokens / self.batch_tokens
        model = self.model | {"layers": layers, "width": width, "max_positions": 128}
        model = {"heads": width // (32 if model["causal"] and width == 128 else 64)} | model
        model["mlp_width"] = width * (3 if model["mlp"] in GATED else 4)
        kind = "causal_lm" if model["causal"] else "masked_lm"
        phases = []
        for phase in self.phases:
            count = round(steps * phase.share)
            phases.append({"steps": count, "seq_len": phase.seq_len, "batch_tokens": self.batch_tokens})
            if phase.decay:
                phases[-1] |= {"decay_steps": round(count * phase.decay), "decay": phase.shape}
            if phase.objective:
                phases[-1]["objective"] = phase.objective
        longest = max(phase.seq_len for phase in self.phases)
        return {
            "model": model,
            "objective": {"kind": kind, **self.objective},
            "optim": {"warmup_steps": round(steps * self.warmup), **self.optim},
            "phases": phases,
            "engine": {"micro_batch": min(1024, self.batch_tokens) // longest, "zero_stage": 0},
            "evaluate": {"max_tokens": 131_072},
            "checkpoint": {"every_s": 0},
            "export": {"dialect": self.dialect},
        }


CAUSAL = {"kind": "hybrid", "masked_share": 0.0}  # every window is causal
CAUSAL_FIRST = (Phase(0.3, 64, objective=CAUSAL), Phase(0.7, 64, 0.7, "linear"))
MUON = {"kind": "muon", "lr": 0.01, "adam_lr": 6e-3, "betas": [0.9, 0.98]}

RECIPES: dict[str, dict[str, Recipe]] = {
    "decoder": {
        # github.com/karpathy/nanoGPT, train.py: its betas, weight decay, cosine to a tenth, clipping at 1. Rates of
        # 7.5e-4, 3e-3 and 6e-3, and twice the batch, were worse.
        "nanoGPT": Recipe(
            "gpt2",
            GPT2,
            {"lr": 1.5e-3, "betas": [0.9, 0.95], "weight_decay": 0.1, "floor": 0.1},
            (Phase(1.0, 128, 0.95, "cosine"),),
            warmup=0.05,
            batch_tokens=1024,
            shares=(1.0,),
        ),
        "qwen3, AdamW": Recipe(
            "qwen3",
            QWEN3,
            {"lr": 3e-3, "betas": [0.9, 0.95], "weight_decay": 0.1},
            (Phase(1.0, 128, 0.5, "linear"),),
            warmup=0.1,
            batch_tokens=1024,
            shares=(0.5,),
        ),
        "qwen3, NorMuon": Recipe(
            "qwen3",
            QWEN3,
            {"kind": "muon", "lr": 0.01, "adam_lr": 0.024},
            (Phase(1.0, 128, 0.5, "linear"),),
            warmup=0.05,
            batch_tokens=1024,
            shares=(0.5, 0.4, 0.3),
        ),
    },
    "encoder": {
        # github.com/huggingface/transformers, run_mlm.py: 15 % of the tokens in 80/10/10, linear decay.
        "run_mlm": Recipe(
            "bert",
            BERT,
            {"lr": 1e-3, "betas": [0.9, 0.999], "weight_decay": 0.0},
            (Phase(1.0, 64, 0.95, "linear"),),
            warmup=0.05,
            batch_tokens=1024,
            shares=(1.0,),
        ),
        "modernbert, AdamW, causal first": Recipe(
            "modernbert",
            MODERNBERT,
            {"lr": 2e-3, "betas": [0.9, 0.98], "weight_decay": 0.01},
            CAUSAL_FIRST,
            warmup=0.05,
            batch_tokens=1024,
            shares=(0.3,),
            objective={"mask_ratio": 0.3},
        ),
        "modernbert, NorMuon, short windows first": Recipe(
            "modernbert",
            MODERNBERT,
            MUON,
            (Phase(0.75, 16), Phase(0.25, 64, 1.0)),
            warmup=0.05,
            batch_tokens=1024,
            shares=(0.3,),
            objective={"mask_ratio": 0.3},
        ),
        "modernbert, NorMuon, causal first": Recipe(
            "modernbert",
            MODERNBERT,
            MUON,
            CAUSAL_FIRST,
            warmup=0.05,
            batch_tokens=1024,
            shares=(0.3, 0.2, 0.1),
            objective={"mask_ratio": 0.3},
        ),
    },
}
RACES = {f"{kind}-{size}": (kind, size) for kind in RECIPES for size in SIZES}


def prepare(text: Path, folder: Path, megabytes: float) -> None:
    """Make the vocabularies and the shards of both kinds that are not there."""
    if not (folder / "recipe.yaml").exists():
        with open(folder / "text.txt", "w", encoding="utf-8") as file:
            for document in documents(text, megabytes):
                file.write("\n".join(line for line in document.split("\n") if line.strip()) + "\n\n")
        write_recipe(folder, "text.txt")
    for kind in ("byte", "bert"):
        made = {"corpus": str(folder / "recipe.yaml")}
        for stage, more in {
            "tokenizer": {"kind": kind, "vocab_size": ENTRIES, "plot": False},
            "shards": {"tokenizer": str(folder / f"tokenizer-{kind}")},
        }.items():
            out = folder / f"{stage}-{kind}"
            if not out.exists():
                config = folder / f"{stage}-{kind}.yaml"
                config.write_text(json.dumps(made | more | {"out": str(out)}))
                process([sys.executable, str(ROOT / f"launch/{stage}.py"), str(config)], ONE_THREAD)


def run(folder: Path, race: str, name: str, share: float, seed: int, recipe: Recipe) -> dict[str, Any]:
    """Train once and return its figures."""
    kind, size = RACES[race]
    form = "byte" if kind == "decoder" else "bert"
    out = folder / "runs" / f"{race}-{name}-{share:g}-{seed}".replace(" ", "_").replace(",", "")
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(exist_ok=True)
    data = {"shards": str(folder / f"shards-{form}"), "tokenizer": str(folder / f"tokenizer-{form}")}
    if kind == "encoder":
        data["block_tokens"] = 64
    config = recipe.configuration(**SIZES[size], tokens=round(TOKENS[kind] * share))
    path = out.with_suffix(".yaml")
    path.write_text(json.dumps({"out": str(out), "seed": seed, "data": data, **config}))
    cost = process([sys.executable, str(ROOT / "launch/pretrain.py"), str(path)], ONE_THREAD)
    summary = json.loads((out / "summary.json").read_text())
    shutil.rmtree(out)
    found = {"seed": seed, "tokens": summary["tokens"], "loss": round(summary["heldout_loss"], 4)}
    found |= {"parameters": summary["parameters"], "no_context_loss": round(summary["no_context_loss"], 4)}
    return found | {"cpu_s": round(cost["cpu_s"], 1)}


def compared(runs: dict[str, dict[str, list[dict]]]) -> dict[str, dict[str, dict]]:
    """For each recipe and share: means and standard deviations over seeds, and the comparison with the reference."""
    reference = [one["loss"] for one in next(iter(runs.values()))["1"]]
    table: dict[str, dict[str, dict]] = {}
    for name, by_share in runs.items():
        for share, found in by_share.items():
            losses = [one["loss"] for one in found]
            entry: dict[str, Any] = {"seeds": len(losses), "tokens": found[0]["tokens"]}
            entry |= {key: round(statistics.mean(one[key] for one in found), 4) for key in ("loss", "cpu_s")}
            if min(len(losses), len(reference)) > 1:
                entry["deviation"] = round(statistics.stdev(losses), 4)
                error = math.hypot(*(statistics.stdev(side) / math.sqrt(len(side)) for side in (losses, reference)))
                below = statistics.mean(reference) - statistics.mean(losses)
                entry |= {"below_reference": round(below, 4), "z": round(below / error, 1) if below else 0.0}
            table.setdefault(name, {})[share] = entry
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--races", nargs="+", choices=list(RACES), default=list(RACES))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--megabytes", type=float, default=10)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/converge.json")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    prepare(arguments.text, folder, arguments.megabytes)
    result = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"races": {}}
    for race in arguments.races:
        recipes = RECIPES[RACES[race][0]]
        runs: dict[str, dict[str, list[dict]]] = result["races"].get(race, {}).get("runs", {})
        for seed in range(1, arguments.seeds + 1):
            for name in recipes:
                for share in recipes[name].shares:
                    done = runs.setdefault(name, {}).setdefault(f"{share:g}", [])
                    if seed in [one["seed"] for one in done]:
                        continue
                    done.append(run(folder, race, name, share, seed, recipes[name]))
                    print(f"{race}, {name}, {share:g} of the tokens: {done[-1]}", flush=True)
                    result |= {"date": str(date.today()), "machine": machine(), "versions": versions("torch")}
                    command = f"python benchmarks/converge.py FOLDER {arguments.text.name} --races {race}"
                    entry = {"command": command, "text": arguments.text.name, "runs": runs, "compared": compared(runs)}
                    result["races"][race] = entry
                    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
