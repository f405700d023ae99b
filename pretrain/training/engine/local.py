"""The engine for one rank: plain torch."""

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.errors import ConfigError
from pretrain.objectives.batch import Batch
from pretrain.objectives.objective import Objective
from pretrain.training.engine.config import EngineConfig, dotted
from pretrain.training.engine.gather import Key, Wanted, copy_whole
from pretrain.training.engine.ranks import World, device_of
from pretrain.training.engine.weights import Load, applies, clipped, named, set_lr, weighted
from pretrain.training.optim.optimizer import Optimizer


class LocalEngine:
    """One process and plain torch. Tests compare DeepSpeed with this engine.

    The optimizer updates `masters`, a module in fp32. With `precision` bf16 the trained module is a bf16 copy of
    `masters`, which is made again after each step; its gradients are summed in fp32 into those of `masters`. With other
    precisions `masters` is the trained module itself.
    """

    name = "plain torch"

    def __init__(self, module: nn.Module, optimizer: Optimizer, config: EngineConfig, clip: float, world: World):
        if config.deepspeed:
            raise ConfigError(
                "engine.deepspeed is for DeepSpeed, and a plain process trains without it",
                f"it would ignore {', '.join('.'.join(key) for key, _ in dotted(config.deepspeed))}",
                "start it with: deepspeed --num_accelerators 1 launch/pretrain.py …, or say engine.deepspeed={}",
            )
        self.device = device_of(world)
        self.module = self.masters = module.to(self.device)
        if config.precision == "bf16":
            self.masters = copy.deepcopy(module)
            self.module.bfloat16()
            for p, master in zip(self.module.parameters(), self.masters.parameters(), strict=True):
                p.register_post_accumulate_grad_hook(partial(_add_gradient, master))
        self.rules, self.kinds = optimizer, ("weights", *optimizer.states)
        self.optimizer = optimizer.build(self.masters)
        self._weights = dict(named(self.masters))
        for p in self.masters.parameters():
            self.optimizer.state[p] = optimizer.first_state(p)
        self.clip, self.precision = clip, config.precision

    def train(self, training: bool) -> None:
        self.module.train(training)

    def __call__(self, objective: Objective, batch: Batch, each: bool = False) -> Any:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "autocast"):
            return self.module(objective, batch.to(self.device), each)

    def backward(self, sums: dict[str, Tensor], scales: dict[str, float]) -> None:
        weighted(sums, scales).backward()

    def step(self, lr: float) -> Tensor:
        norm = clipped(self._weights.values(), self.clip)
        set_lr(self.optimizer, lr)
        if applies(self.optimizer, self.rules, norm):
            self.optimizer.step()
            self._copy_masters()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _copy_masters(self) -> None:
        """Copy the masters into the module's bf16 weights, if they are two modules."""
        if self.masters is not self.module:
            with torch.no_grad():
                torch._foreach_copy_(list(self.module.parameters()), list(self.masters.parameters()))

    def total(self, values: Tensor) -> Tensor:
        """Sum a small CPU tensor over the ranks; with one rank it stays as it is."""
        return values

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each whole weight by name, in the order of the model."""
        return {name: tuple(p.shape) for name, p in self._weights.items()}

    def gather(self, wanted: Sequence[Wanted], into: Mapping[Key, Tensor]) -> None:
        """Copy whole tensors into the flat fp32 tensors of `into`, each on the rank that wants it."""
        copy_whole(wanted, into, self._held, 0)

    def restore(self, load: Load, steps_applied: int, objective: Objective, batch: Batch) -> None:
        """Set a saved state. `batch` may be any valid batch."""
        with torch.no_grad():
            for name, p in self._weights.items():
                for kind in self.kinds:
                    held = self._held(kind, name)
                    held.copy_(load(kind, name, slice(0, held.numel())))
                self.rules.count_steps(self.optimizer.state[p], steps_applied)
        self._copy_masters()

    def _held(self, kind: str, name: str) -> Tensor:
        """The flat weight `name`, or the state of the optimizer for it."""
        p = self._weights[name]
        return (p.detach() if kind == "weights" else self.optimizer.state[p][kind]).view(-1)


def _add_gradient(master: nn.Parameter, p: nn.Parameter) -> None:
    """Add the gradient of one backward pass to the fp32 sum in `master`, and free the gradient."""
    gradient, p.grad = p.grad, None
    assert gradient is not None, "the hook runs after the gradient is accumulated"
    master.grad = gradient.float() if master.grad is None else master.grad.add_(gradient)
