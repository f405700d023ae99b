"""Compare the training steps of two checkouts of this project, step by step in turn, and write the ratios as JSON.

    git worktree add ../before COMMIT
    python benchmarks/before.py ../before . --out benchmarks/results/before.json

Each checkout has a process of its own, with one thread. Both take one step of the same model on the same batch in turn,
round after round. A ratio is the CPU time of the step before, divided by that after: above 1 the later one is quicker.
The figures are the median and the quartiles over rounds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

DECODER = {"causal": True, "layers": 4, "width": 128, "heads": 4, "mlp_width": 384, "max_positions": 1024}
DECODER |= {"norm": "rmsnorm", "norm_position": "pre", "norm_eps": 1e-6, "positions": "rope", "mlp": "swiglu"}
DECODER |= {"bias": False, "qk_norm": True}
ENCODER = {"causal": False, "layers": 4, "width": 128, "heads": 4, "mlp_width": 512, "max_positions": 1024}
ENCODER |= {"norm": "layernorm", "norm_position": "post", "norm_eps": 1e-12, "positions": "learned", "mlp": "gelu"}
ENCODER |= {"bias": True, "transform_head": True}
WARM = 3  # rounds that do not count
END = {True: 2, False: 3}  # the end mark of a decoder's and of an encoder's stream
SPECIALS = {True: {"pad": 0, "unk": 1, "eod": 2}, False: {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}}

# By name: the model, its entries, tokens of a window, windows of a step, tokens of a document (0: one fills a window)
CASES: dict[str, tuple[dict, int, int, int, int]] = {
    "decoder": (DECODER, 8192, 128, 8, 0),
    "decoder, 50,304 entries": (DECODER, 50_304, 256, 2, 0),
    "decoder, packed, 1,024 tokens": (DECODER, 8192, 1024, 2, 170),
    "encoder": (ENCODER, 8192, 128, 8, 0),
    "encoder, packed, 512 tokens": (ENCODER, 8192, 512, 4, 170),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path, help="a checkout")
    parser.add_argument("after", type=Path, help="another checkout")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from benchmarks.measuring import machine, versions

    found = {}
    for name in CASES:
        sides = [_started(checkout, name) for checkout in (args.before, args.after)]
        times = [[_step(side) for side in sides] for _ in range(WARM + args.rounds)][WARM:]
        for side in sides:
            side.kill()
        ratios = sorted(before / after for before, after in times)
        quartiles = statistics.quantiles(ratios, n=4)
        milliseconds = [round(1e3 * statistics.median(column), 1) for column in zip(*times, strict=True)]
        found[name] = {"ratio": round(statistics.median(ratios), 3), "quartiles": [round(q, 3) for q in quartiles]}
        found[name] |= {"before_ms": milliseconds[0], "after_ms": milliseconds[1]}
        print(f"{name}: {found[name]}", flush=True)
    commits = {name: commit(getattr(args, name)) for name in ("before", "after")}
    command = f"python benchmarks/before.py BEFORE AFTER --rounds {args.rounds}"
    about = {"date": str(date.today()), "command": command, "commits": commits}
    result = {**about, "machine": machine(), "versions": versions("torch"), "steps": found}
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def commit(checkout: Path) -> str:
    command = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _started(checkout: Path, name: str) -> subprocess.Popen:
    """A process that takes a step of the case `name` for each line that it is sent."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(checkout.resolve())}
    command = [sys.executable, "-P", __file__, "--steps", name]
    return subprocess.Popen(command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def _step(side: subprocess.Popen) -> float:
    """The CPU seconds of one more step."""
    assert side.stdin is not None and side.stdout is not None
    side.stdin.write("\n")
    side.stdin.flush()
    return float(side.stdout.readline())


def take_steps(name: str) -> None:
    """Take a step for each line of standard input, and print its CPU seconds."""
    import numpy as np
    import torch

    import pretrain
    from pretrain.model.config import ModelConfig
    from pretrain.model.init import initialise
    from pretrain.model.transformer import Transformer
    from pretrain.objectives import OBJECTIVES
    from pretrain.objectives.learner import Learner
    from pretrain.order.rows import of_stream
    from pretrain.training.engine.config import EngineConfig
    from pretrain.training.engine.local import LocalEngine
    from pretrain.training.engine.ranks import World
    from pretrain.training.optim.adamw import AdamW, AdamWConfig

    assert str(Path(pretrain.__file__).parent.parent) == os.environ["PYTHONPATH"], "this is another checkout"
    torch.set_num_threads(1)
    values, entries, T, B, length = CASES[name]
    causal = values["causal"]
    kind = "causal_lm" if causal else "masked_lm"
    objective: Any = OBJECTIVES[kind](OBJECTIVES[kind].Config(kind=kind), SPECIALS[causal], entries, T, 1)
    ids = np.random.default_rng(0).integers(5, entries, (B, T + 1)).astype(np.int32)
    if length:
        ids[:, ::length] = END[causal]
    batch = objective.batch(of_stream(ids, END[causal]), np.arange(B))
    model = Transformer(ModelConfig(**values), entries)
    initialise(model, 1)
    engine: Any = LocalEngine(Learner(model), AdamW(AdamWConfig(lr=1e-3)), EngineConfig(micro_batch=B), 1.0, World())
    engine.train(True)
    for _ in sys.stdin:
        began = time.process_time()
        loss = engine(objective, batch)
        scale = 1 / batch.filled()  # a loss has named parts in later versions
        engine.backward(loss, {"loss": scale} if isinstance(loss, dict) else scale)
        engine.step(1e-3)
        print(time.process_time() - began, flush=True)


if __name__ == "__main__":
    take_steps(sys.argv[2]) if sys.argv[1:2] == ["--steps"] else main()
