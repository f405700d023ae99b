"""Search the learning rate of small and large models, with and without the keys that transfer it, and draw the figure.

    python benchmarks/transfer.py FOLDER TEXT [--out benchmarks/results/transfer.json]

FOLDER keeps a vocabulary, shards and runs. Every model is a small decoder that trains on the same tokens, with several
rates. The rows of the figure are the width, from the base to eight times as wide, and the depth, from the base to eight
times as many layers. In the left column the models take over the rate of the base (`model.width_base`,
`model.depth_base`), in the right column they do not. The loss is that of held-out text, with one seed.
A run whose result is there is not run again.
"""

import argparse
import contextlib
import json
import os
import shutil
import sys
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # so that no file of this folder shadows a library

from benchmarks.measuring import ONE_THREAD, documents, machine, process, versions, write_recipe  # noqa: E402

os.environ |= ONE_THREAD
from pretrain.config import load  # noqa: E402
from pretrain.training.config import RunConfig  # noqa: E402
from pretrain.training.run import run  # noqa: E402

ENTRIES, T, BATCH, STEPS = 1024, 128, 1024, 100
BASE_WIDTH, BASE_LAYERS, HEAD = 64, 2, 32
WIDTHS, DEPTHS = (64, 128, 256, 512), (2, 4, 8, 16)
RATES = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032)
SIZES = {"width": WIDTHS, "depth": DEPTHS}


def prepare(text: Path, folder: Path) -> None:
    """Make the vocabulary and the shards if they are not there."""
    if not (folder / "recipe.yaml").exists():
        with open(folder / "text.txt", "w", encoding="utf-8") as file:
            for document in documents(text, 3):
                file.write("\n".join(line for line in document.split("\n") if line.strip()) + "\n\n")
        write_recipe(folder, "text.txt")
    for stage, keys in {
        "tokenizer": {"kind": "byte", "vocab_size": ENTRIES, "plot": False},
        "shards": {"tokenizer": str(folder / "tokenizer")},
    }.items():
        if not (folder / stage).exists():
            config = folder / f"{stage}.yaml"
            config.write_text(json.dumps({"corpus": str(folder / "recipe.yaml"), "out": str(folder / stage), **keys}))
            process([sys.executable, str(ROOT / f"launch/{stage}.py"), str(config)], ONE_THREAD)


def loss(folder: Path, what: str, size: int, keys: bool, rate: float) -> float:
    """The held-out loss of a model of `size`, which takes over the rate of the base if `keys`."""
    width, layers = (size, BASE_LAYERS) if what == "width" else (BASE_WIDTH, size)
    model: dict[str, Any] = {"causal": True, "layers": layers, "width": width, "heads": width // HEAD}
    model |= {"mlp_width": 3 * width, "max_positions": T, "norm": "rmsnorm", "norm_position": "pre", "norm_eps": 1e-6}
    model |= {
        "positions": "rope",
        "mlp": "swiglu",
        "bias": False,
        "qk_norm": True,
        "init_std": 0.1,
        "tie_embeddings": False,
    }
    if keys:
        model |= {"width_base": BASE_WIDTH} if what == "width" else {"depth_base": BASE_LAYERS}
    out = folder / "run"
    shutil.rmtree(out, ignore_errors=True)
    config = {
        "out": str(out),
        "seed": 1,
        "data": {"shards": str(folder / "shards"), "tokenizer": str(folder / "tokenizer")},
        "model": model,
        "objective": {"kind": "causal_lm"},
        "optim": {"lr": rate, "warmup_steps": STEPS // 10, "betas": [0.9, 0.95], "weight_decay": 0.1},
        "phases": [{"steps": STEPS, "seq_len": T, "batch_tokens": BATCH, "decay_steps": STEPS // 2, "decay": "linear"}],
        "engine": {"micro_batch": BATCH // T, "zero_stage": 0},
        "evaluate": {"max_tokens": 32_768},
        "checkpoint": {"every_s": 0},
    }
    path = folder / "run.yaml"
    path.write_text(json.dumps(config))
    with open(folder / "run.log", "w") as log, contextlib.redirect_stdout(log):
        return round(run(load(RunConfig, path))["heldout_loss"], 4)


def draw(runs: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(2, 2, figsize=(9, 7), sharex="row", sharey="row", layout="constrained")
    for row, (what, sizes) in zip(grid, SIZES.items(), strict=True):
        for axes, keys in zip(row, (True, False), strict=True):
            for number, size in enumerate(sizes):
                found = {
                    float(rate): value for rate, value in runs[what][f"{size} {'with' if keys else 'without'}"].items()
                }
                shade = plt.get_cmap("viridis")(0.9 * number / (len(sizes) - 1))
                name = f"width {size}" if what == "width" else f"{size} layers"
                axes.plot(list(found), list(found.values()), marker="o", color=shade, label=name)
                best = min(found, key=lambda rate: found[rate])
                axes.plot([best], [found[best]], marker="*", markersize=14, color=shade)
            axes.set_xscale("log", base=2)
            axes.set_title(f"model.{what}_base = {sizes[0]}" if keys else "without it")
            axes.set_xlabel("learning rate")
            axes.grid(alpha=0.3)
        row[0].set_ylabel("held-out loss, nats")
        row[1].legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/transfer.json")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    prepare(arguments.text, folder)
    result = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"runs": {}}
    head = {"command": f"python benchmarks/transfer.py FOLDER {arguments.text.name}", "date": str(date.today())}
    head |= {"machine": machine(), "versions": versions("torch"), "tokens": STEPS * BATCH}
    for what, sizes in SIZES.items():
        for size in sizes:
            for keys in (True, False):
                name = f"{size} {'with' if keys else 'without'}"
                done = result["runs"].setdefault(what, {}).setdefault(name, {})
                for rate in RATES:
                    if str(rate) not in done:
                        base = result["runs"][what].get(f"{size} with", {})
                        same = size == sizes[0] and str(rate) in base  # of the base itself
                        done[str(rate)] = base[str(rate)] if same else loss(folder, what, size, keys, rate)
                        print(what, name, rate, done[str(rate)], flush=True)
                        result = {**head, "runs": result["runs"]}
                        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    draw(result["runs"], arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
