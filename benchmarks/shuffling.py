"""Measure how the block size of the order affects a run's held-out loss, and write the losses as JSON.

    python benchmarks/shuffling.py --out benchmarks/results/shuffling.json

A vocabulary of kind byte is trained on the sample text, and shards are built. A small decoder is trained on 64 windows
of 32 tokens a step, once for every block size (`data.block_tokens`) and seed, and scored on the whole held-out side.
With blocks of 32 tokens all windows are in one random order. Runs whose windows grow longer need larger blocks.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # so that no file of this folder shadows a library

import yaml  # noqa: E402

from benchmarks.measuring import ONE_THREAD, machine, versions  # noqa: E402

WINDOW, BATCH = 32, 64
BLOCKS = (32, 1024, 8192)
SAMPLE = ROOT / "configs/sample"


def launch(stage: str, config: Path, *overrides: str) -> None:
    command = [sys.executable, str(ROOT / "launch" / f"{stage}.py"), str(config), *overrides]
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | ONE_THREAD, stdout=subprocess.DEVNULL)


def heldout_loss(folder: Path, block: int, seed: int, steps: int) -> float:
    out = folder / f"{block}-{seed}"
    changed = yaml.safe_load((SAMPLE / "decoder.yaml").read_text())
    changed["out"], changed["seed"] = str(out), seed
    changed["data"] = {"shards": str(folder / "shards"), "tokenizer": str(folder / "tokenizer"), "block_tokens": block}
    changed["model"] |= {"width": 64, "head_width": 16, "mlp_width": 192, "max_positions": WINDOW}
    tokens = WINDOW * BATCH
    changed["phases"] = [{"steps": steps, "seq_len": WINDOW, "batch_tokens": tokens, "decay_steps": steps // 2}]
    changed["engine"] |= {"micro_batch": BATCH}
    changed["evaluate"], changed["checkpoint"] = {"every_steps": 0, "max_tokens": 1 << 30}, {"every_steps": 0}
    config = folder / f"{block}-{seed}.yaml"
    config.write_text(yaml.safe_dump(changed))
    launch("pretrain", config)
    return json.loads((out / "summary.json").read_text())["heldout_loss"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    losses: dict[int, list[float]] = {block: [] for block in BLOCKS}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for stage in ("tokenizer", "shards"):
            given = [f"tokenizer={folder / 'tokenizer'}"] if stage == "shards" else ["plot=false"]
            launch(stage, SAMPLE / f"{stage}-byte.yaml", f"out={folder / stage}", *given)
        tokens = json.loads((folder / "shards/index.json").read_text())["sides"]["train"]["tokens"]
        for seed in range(1, arguments.seeds + 1):
            for block in BLOCKS:
                losses[block].append(heldout_loss(folder, block, seed, arguments.steps))
                print(f"seed {seed}, blocks of {block:,}: {losses[block][-1]:.4f}", flush=True)
    means = {block: statistics.mean(found) for block, found in losses.items()}
    spread = {block: statistics.stdev(found) for block, found in losses.items()}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    found = {
        "command": "python benchmarks/shuffling.py " + " ".join(sys.argv[1:]),
        "date": f"{date.today()}",
        "commit": commit.stdout.strip(),
        "machine": machine(),
        "versions": versions("torch"),
        "text": f"data/sample, {tokens:,} tokens",
        "windows": f"{BATCH} of {WINDOW} tokens a step, {arguments.steps} steps",
        "heldout_loss": {f"{block}": [round(loss, 4) for loss in found] for block, found in losses.items()},
        "mean": {f"{block}": round(mean, 4) for block, mean in means.items()},
        "standard_deviation_over_seeds": {f"{block}": round(deviation, 4) for block, deviation in spread.items()},
    }
    arguments.out.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(found["mean"]), json.dumps(found["standard_deviation_over_seeds"]))


if __name__ == "__main__":
    main()
