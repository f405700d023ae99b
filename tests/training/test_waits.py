"""The host reads no number of a step from the device before the next step is launched.

On a CPU such a read costs nothing, and on a GPU the host would wait for it. A mode of PyTorch notes every tensor that
depends on the weights, with the step in which it was computed, and every read of one.
"""

import traceback
from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from pretrain.training.engine.deepspeed import DeepSpeedEngine
from pretrain.training.engine.local import LocalEngine
from tests.conftest import run_values
from tests.helpers import cases
from tests.helpers.ranks import on_ranks

STEPS = 8
PHASES = [{"steps": STEPS, "seq_len": 32, "batch_tokens": 256}]
aten = torch.ops.aten
READS = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.unique_consecutive, aten.equal)
METHODS = (Tensor.tolist, Tensor.numpy, Tensor.cpu)


class Reads(TorchDispatchMode):
    """Counts reads of numbers of a step before the next step is launched, by step and line of code."""

    def __init__(self) -> None:
        super().__init__()
        self.early: dict[int, Counter[str]] = {step: Counter() for step in range(1, STEPS + 1)}
        self.late = 0
        self.begun = self.launched = 0  # steps
        self._computed_in: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in READS:
            self.note(args[0])
        found = func(*args, **(kwargs or {}))
        if any(self._on_device(x) for x in tree_leaves([args, kwargs])):
            for x in tree_leaves(found):
                if isinstance(x, Tensor):
                    self._computed_in[x] = self.begun
        return found

    def note(self, read: Tensor) -> None:
        """Note that the host reads a tensor."""
        if self._on_device(read) and self.begun > 0:
            if self.launched > self._computed_in.get(read, 0):
                self.late += 1
            else:
                self.wait()

    def wait(self, *_: object) -> None:
        """Note that the host waits until the device has done everything."""
        if self.begun > 0:
            frames = traceback.extract_stack()
            ours = [f for f in frames if "/pretrain/" in f.filename or "/deepspeed/" in f.filename]
            self.early[self.begun][f"{ours[-1].filename.split('/')[-1]} {ours[-1].name}"] += 1

    def _on_device(self, x: object) -> bool:
        return isinstance(x, torch.nn.Parameter) or (isinstance(x, Tensor) and x in self._computed_in)


class Methods(TorchFunctionMode):
    """Reports methods of tensors that read memory without an operator."""

    def __init__(self, reads: Reads):
        super().__init__()
        self._reads = reads

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in METHODS:
            self._reads.note(args[0])
        return func(*args, **(kwargs or {}))


def reads_of(values: dict) -> tuple[dict[int, Counter[str]], int]:
    """Train, and return the early reads of every step and the number of late ones."""
    reads = Reads()
    for kind in (LocalEngine, DeepSpeedEngine):
        watch(kind, reads)
    with reads, Methods(reads):
        cases.train(values)
    return reads.early, reads.late


def watch(kind: type, reads: Reads) -> None:
    """Let an engine tell `reads` when a step begins and when it is launched. Only in a process of its own."""
    forward, step = kind.__call__, kind.step

    def begin(self, objective, batch, each=False):
        if not each and reads.begun == reads.launched:
            reads.begun += 1
        return forward(self, objective, batch, each)

    def launch(self, lr):
        norm = step(self, lr)
        reads.launched += 1
        return norm

    kind.__call__, kind.step = begin, launch
    if kind is DeepSpeedEngine:
        from deepspeed.accelerator import get_accelerator

        get_accelerator().synchronize = reads.wait


def each_of(runs: list[dict]) -> list[tuple[dict[int, Counter[str]], int]]:
    whole = LocalEngine.__call__, LocalEngine.step, DeepSpeedEngine.__call__, DeepSpeedEngine.step
    found = []
    for values in runs:
        found.append(reads_of(values))
        LocalEngine.__call__, LocalEngine.step, DeepSpeedEngine.__call__, DeepSpeedEngine.step = whole
    return found


def test_no_step_is_read_before_the_next_one_is_launched(prepared, tmp_path):
    """Also with dropout, workers, and a line of the log for every step. A step that is saved is read at once."""
    common = {"phases": PHASES, "log_every": 1, "model": {"dropout": 0.1}, "checkpoint": {"every_s": 0}}
    runs = [
        run_values(prepared, tmp_path / "adamw", **common),
        run_values(prepared, tmp_path / "bf16", "causal_lm", **common, engine={"precision": "bf16"}),
        run_values(prepared, tmp_path / "muon", **common, optim={"kind": "muon"}, data={"workers": 1}),
        run_values(prepared, tmp_path / "saved", **{**common, "checkpoint": {"every_s": 0, "every_steps": 3}}),
    ]
    *plain, saved = on_ranks(1, each_of, runs, log=tmp_path / "local.log", launched=False)[0]
    for early, late in plain:
        assert [step for step in early if early[step]] == [STEPS] and late == STEPS - 1, early
    assert [step for step in saved[0] if saved[0][step]] == [3, 6, STEPS]


def test_only_deepspeed_itself_reads_before_the_next_step_is_launched(prepared, tmp_path):
    stages = (0, 1, 2, 3)
    runs = [
        run_values(prepared, tmp_path / str(stage), phases=PHASES, engine={"zero_stage": stage, "micro_batch": 4})
        for stage in stages
    ]
    for found in on_ranks(2, each_of, runs, log=tmp_path / "two.log"):
        for stage, (early, late) in zip(stages, found, strict=True):
            lines = {line for step in range(1, STEPS) for line in early[step]}
            assert late >= STEPS - 1 and lines <= (READ_BY_DEEPSPEED if stage else set()), (stage, early)


READ_BY_DEEPSPEED = {"utils.py is_invalid_grad_norm"}


@pytest.mark.parametrize("spoiled", ["norm", "list"])
def test_a_read_that_is_added_is_found(spoiled, prepared, tmp_path):
    values = run_values(prepared, tmp_path / "run", phases=PHASES)
    early, _ = on_ranks(1, spoil, values, spoiled, log=tmp_path / "log", launched=False)[0]
    assert all(early[step] for step in early), early


def spoil(values: dict, what: str) -> tuple[dict[int, Counter[str]], int]:
    """Train with an engine that reads a number in every step, and return the reads."""
    step = LocalEngine.step

    def reading(self, lr):
        norm = step(self, lr)
        if what == "norm":
            assert norm > 0
        if what == "list":
            (norm * 2).tolist()
        return norm

    LocalEngine.step = reading
    return reads_of(values)
