"""Count the activations that a training step keeps, with and without recomputation, and write them as JSON.

    python benchmarks/activations.py --out benchmarks/results/activations.json

The model has the shape of configs/presets/gpt2-124m.yaml, in fp32 and without dropout. A step is the forward and the
backward pass of causal language modelling on 4 windows of 1,024 tokens, each of which holds one document. Nothing is
computed: torch's fake tensors have sizes, and no numbers. The programs of a CPU are taken, which is where fake tensors
are said to be.

    kept   bytes that the forward pass saves for the backward pass, without the weights (saved_tensors_hooks)
    peak   the most bytes of tensors that exist at once in the step, without weights and their gradients
"""

import argparse
import json
import sys
import weakref
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # so that no file of this folder shadows a library

import torch  # noqa: E402
import yaml  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_iter  # noqa: E402

from benchmarks.measuring import versions  # noqa: E402
from pretrain.model.attention import Layout  # noqa: E402
from pretrain.model.config import ModelConfig  # noqa: E402
from pretrain.model.models import model_of  # noqa: E402
from pretrain.training.engine.blocks import set_up_blocks  # noqa: E402
from pretrain.training.engine.config import EngineConfig  # noqa: E402

WINDOWS, T, VOCABULARY = 4, 1024, 50_257


class Existing(TorchDispatchMode):
    """Counts the bytes of the tensors that exist, and the most there were. Those that `known` names do not count."""

    def __init__(self, known: set[int]):
        super().__init__()
        self.sizes = dict.fromkeys(known, 0)
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_iter(made):
            if isinstance(tensor, torch.Tensor):
                self.note(tensor.untyped_storage())
        return made

    def note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, key)

    def forget(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


def step(recompute_every: int) -> dict[str, int]:
    """The bytes that a step keeps, and its peak."""
    shape = yaml.safe_load((ROOT / "configs/presets/gpt2-124m.yaml").read_text())["model"] | {"dropout": 0.0}
    with FakeTensorMode():
        model = model_of(ModelConfig(**shape), VOCABULARY)
        set_up_blocks(model, EngineConfig(micro_batch=WINDOWS, recompute_every=recompute_every))
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        ids = torch.zeros(WINDOWS, T, dtype=torch.int64)
        layout = Layout(None, torch.arange(T).expand(WINDOWS, T), model.config.causal)
        weights = {storage(x) for p in model.parameters() for x in (p, p.grad)}
        kept: dict[int, int] = {}

        def keep(x: torch.Tensor) -> torch.Tensor:
            if storage(x) not in weights:
                kept[storage(x)] = x.untyped_storage().nbytes()
            return x

        with Existing(weights) as existing:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                loss = model.loss(model(ids, layout), ids, None)
            held = sum(kept.values())
            loss.backward()
    return {"kept": held, "peak": existing.peak}


def storage(x: torch.Tensor) -> int:
    return x.untyped_storage()._cdata


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    found = {
        "command": " ".join(["python benchmarks/activations.py", *sys.argv[1:]]),
        "date": str(date.today()),
        "versions": versions("torch"),
        "windows": WINDOWS,
        "tokens_a_window": T,
        "bytes_by_recompute_every": {every: step(every) for every in (0, 4, 3, 2, 1)},
    }
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
