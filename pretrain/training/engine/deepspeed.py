"""The engine for any number of ranks: DeepSpeed. The facts about DeepSpeed 0.19.8 in the comments were measured."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.errors import ConfigError
from pretrain.objectives.batch import Batch
from pretrain.objectives.objective import Objective
from pretrain.training.engine.blocks import keep_hooks_out_of_graphs
from pretrain.training.engine.config import EngineConfig, deepspeed_config, dotted
from pretrain.training.engine.gather import Key, Wanted, copy_parts, copy_whole
from pretrain.training.engine.ranks import World, device_of, new_group, on_cuda
from pretrain.training.engine.weights import Load, applies, clipped, named, set_lr, weighted
from pretrain.training.optim.optimizer import Optimizer
from pretrain.training.optim.parts import Part

SMALL = 1 << 16  # gradients with fewer numbers than this are summed over ranks together


class DeepSpeedEngine:
    """DeepSpeed ZeRO 0–3 over any number of ranks. Call `join` first.

    At stage 0 DeepSpeed only runs the forward and the backward pass. This class sums the gradients in place: DeepSpeed
    would copy all of them into one buffer and back, which takes two to four times as long (gloo, two ranks, 14 M
    weights). It also clips them, and skips a step whose gradient is not finite.
    """

    def __init__(self, module: nn.Module, optimizer: Optimizer, config: EngineConfig, clip: float, world: World):
        import deepspeed
        from deepspeed.runtime.zero.utils import is_zero_supported_optimizer

        self.device = device_of(world)
        self.world = world
        self.module = module.to(self.device)
        built = optimizer.build(module)
        untested = config.zero_stage > 0 and not is_zero_supported_optimizer(built)
        settings = deepspeed_config(config, clip, untested)
        try:
            self.engine, *_ = deepspeed.initialize(model=self.module, optimizer=built, config=settings)
        except Exception as error:
            if not config.deepspeed or isinstance(error, (MemoryError, torch.OutOfMemoryError)):
                raise
            keys = ", ".join(".".join(key) for key, _ in dotted(config.deepspeed))
            raise ConfigError(
                "DeepSpeed cannot start with the keys of engine.deepspeed",
                f"it was given {keys}, and says {type(error).__name__}: {error}",
                "leave out or correct the keys that it names",
            ) from error
        self.rules, self.kinds = optimizer, ("weights", *optimizer.states)
        self.stage, self.clip = config.zero_stage, clip
        self.name = f"DeepSpeed ZeRO {self.stage}"
        self._weights = dict(named(self.module))
        if self.stage == 3 and config.compile:
            keep_hooks_out_of_graphs(self.module)
        if self.stage == 0:
            self.engine.enable_backward_allreduce = False
        self._begin()
        self._control = new_group(config.timeout_s) if on_cuda() else None

    def train(self, training: bool) -> None:
        self.engine.train(training)

    def __call__(self, objective: Objective, batch: Batch, each: bool = False) -> Any:
        return self.engine(objective, batch.to(self.device), each)

    def backward(self, sums: dict[str, Tensor], scales: dict[str, float]) -> None:
        if self.stage > 0:  # DeepSpeed divides by the number of ranks; at stage 0 this class only sums
            scales = {name: scale * self.world.size for name, scale in scales.items()}
        self.engine.backward(weighted(sums, scales))

    def step(self, lr: float) -> Tensor:
        set_lr(self.engine.optimizer, lr)
        if self.stage == 0:
            if self.world.size > 1:
                _sum_over_ranks([p.grad for p in self.module.parameters() if p.grad is not None])
            norm = clipped(self.module.parameters(), self.clip)
            if applies(self._inner, self.rules, norm):
                self.engine.step()
            else:
                self.engine.zero_grad()
            return norm
        self.engine.step()  # DeepSpeed waits for the norm, because it decides on the host whether it skips the step
        found = self.engine.get_global_grad_norm() if self.engine.was_step_applied() else math.inf
        return torch.as_tensor(found, dtype=torch.float64, device=self.device)

    def total(self, values: Tensor) -> Tensor:
        """Sum a small CPU tensor over the ranks, without waiting for the accelerator's stream."""
        if self.world.size > 1:
            torch.distributed.all_reduce(values, group=self._control)
        return values

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """As LocalEngine.shapes. At ZeRO 3 `p.shape` is only the shape of this rank's part."""
        return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in self._weights.items()}

    def gather(self, wanted: Sequence[Wanted], into: Mapping[Key, Tensor]) -> None:
        """As LocalEngine.gather. A collective: every rank must want the same tensors for the same ranks."""
        if self.stage == 0:
            copy_whole(wanted, into, self._held, self.world.rank)
        else:
            copy_parts(wanted, into, self._held, self._runs, self.world.rank)

    def restore(self, load: Load, steps_applied: int, objective: Objective, batch: Batch) -> None:
        """As LocalEngine.restore. The module must have held these weights when the engine was built.

        DeepSpeed made its bf16 weights from the module's weights then. This method sets the fp32 masters and the state
        of the optimizer. Each rank loads only the numbers that it holds.
        """
        if self.stage == 3:
            # The first step at stage 3 traces the order of weights and gathers them differently from all later steps:
            # under autocast with several micro-batches in another precision. So the first step changes nothing.
            self.backward(self(objective, batch), dict.fromkeys(objective.parts, 0.0))
            self.step(0.0)

        with torch.no_grad():
            for name in self._weights:
                for kind in self.kinds:
                    held = self._held(kind, name)
                    if held.numel():
                        run = self._runs[name][self.world.rank] if self.stage else slice(0, held.numel())
                        held.copy_(load(kind, name, run))
        for state in self._inner.state.values():
            self.rules.count_steps(state, steps_applied)

    def _held(self, kind: str, name: str) -> Tensor:
        """The numbers that this rank holds of a tensor, flat: of an fp32 weight, or of the optimizer's state for it."""
        if self.stage == 0:
            p = self._weights[name]
            return (p.detach() if kind == "weights" else self._inner.state[p][kind]).view(-1)
        if name not in self._places:
            return self._none
        flat, place = self._places[name]
        return (flat.detach() if kind == "weights" else self._inner.state[flat][kind])[place]

    @property
    def _inner(self) -> torch.optim.Optimizer:
        return self.engine.optimizer if self.stage == 0 else self.engine.optimizer.optimizer

    def _begin(self) -> None:
        """Give the optimizer its first state now, so that a checkpoint can be restored before the first step."""
        if self.stage == 3:
            held = self.engine.optimizer.fp32_partitioned_groups_flat
        else:
            held = [p for group in self._inner.param_groups for p in group["params"]]
        for p in held:
            self._inner.state[p] = self.rules.first_state(p)
        if self.stage > 0:
            self._place(self._parts())

    def _place(self, parts: dict[Tensor, list[list[Part]]]) -> None:
        """Note which numbers of each weight every rank holds, and where they lie in the flat tensors of this rank."""
        if self.rules.whole:
            self._inner.place(parts, self.world.rank)  # type: ignore[attr-defined]
        names = list(self._weights)
        self._places: dict[str, tuple[Tensor, slice]] = {}
        self._runs = {name: [slice(0, 0)] * self.world.size for name in names}
        for flat, ranks in parts.items():
            self._none = flat.detach()[:0]
            for rank, part in ((rank, part) for rank, held in enumerate(ranks) for part in held):
                self._runs[names[part.weight]][rank] = slice(part.start, part.start + part.size)
                if rank == self.world.rank:
                    self._places[names[part.weight]] = flat, slice(part.at, part.at + part.size)

    def _parts(self) -> dict[Tensor, list[list[Part]]]:
        """The parts of weights in each flat tensor of the optimizer, of every rank; a collective."""
        numbers = {p: number for number, p in enumerate(self.module.parameters())}
        if self.stage == 3:
            zero = self.engine.optimizer
            held = [
                (flat, _sharded(weights, numbers, self.world.rank))
                for flat, weights in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True)
            ]
        else:
            held = [
                (group["params"][0], [_linked(p, numbers[p]) for p in numbers if _group(p) == index])
                for index, group in enumerate(self._inner.param_groups)
            ]
        every: list = [None] * self.world.size
        torch.distributed.all_gather_object(every, [parts for _, parts in held])
        return {flat: [found[index] for found in every] for index, (flat, _) in enumerate(held)}


def _sharded(weights: list[nn.Parameter], numbers: dict[nn.Parameter, int], rank: int) -> list[Part]:
    """Stage 3: this rank's parts of `weights` in a flat tensor. All ranks have as many numbers; the end is padded."""
    parts, at = [], 0
    for p in weights:
        size = p.ds_tensor.numel()  # type: ignore[attr-defined]  # DeepSpeed adds it to every weight
        start = rank * size
        if start < p.ds_numel:  # type: ignore[attr-defined]
            shape = tuple(p.ds_shape)  # type: ignore[attr-defined]
            parts.append(Part(numbers[p], shape, start, min(size, p.ds_numel - start), at))  # type: ignore[attr-defined]
        at += size
    return parts


def _group(p: nn.Parameter) -> int | None:
    """Stages 1 and 2: the group of the optimizer in whose flat tensor this rank has a part of `p`, if it has one."""
    return p._hp_mapping.param_group_index if p._hp_mapping else None  # type: ignore[attr-defined]


def _linked(p: nn.Parameter, number: int) -> Part:
    """Stages 1 and 2: this rank's part of `p`, as DeepSpeed links it to the optimizer's flat tensor."""
    weight, flat = p._hp_mapping.lp_fragment_address, p._hp_mapping.hp_fragment_address  # type: ignore[attr-defined]
    return Part(number, tuple(p.shape), weight.start, weight.numel, flat.start)


def _sum_over_ranks(gradients: list[Tensor]) -> None:
    """All-reduce `gradients` in place. The small ones, which are many but hold few numbers, are sent as one tensor."""
    small = [gradient for gradient in gradients if gradient.numel() < SMALL]
    large = [gradient for gradient in gradients if gradient.numel() >= SMALL]
    together = torch.cat([gradient.flatten() for gradient in small]) if small else None
    sent = large if together is None else [*large, together]
    for work in [torch.distributed.all_reduce(tensor, async_op=True) for tensor in sent]:
        work.wait()
    if together is not None:
        parts = together.split([gradient.numel() for gradient in small])
        torch._foreach_copy_(small, [part.view_as(to) for part, to in zip(parts, small, strict=True)])
