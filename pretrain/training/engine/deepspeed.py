"""The engine for any number of ranks: DeepSpeed. The facts about DeepSpeed 0.19.8 in the comments were measured."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.errors import ConfigError
from pretrain.objectives.batch import Batch
from pretrain.objectives.objective import Objective
from pretrain.training.engine.config import EngineConfig, deepspeed_config, dotted
from pretrain.training.engine.ranks import World, device_of, new_group, on_cuda
from pretrain.training.engine.weights import clipped, named, set_lr, weighted
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

    def step(self, lr: float) -> float | None:
        set_lr(self.engine.optimizer, lr)
        if self.stage == 0:
            if self.world.size > 1:
                _sum_over_ranks([p.grad for p in self.module.parameters() if p.grad is not None])
            norm = clipped(self.module.parameters(), self.clip)
            if norm is None:
                self.engine.zero_grad()
            else:
                self.engine.step()
            return norm
        self.engine.step()
        return float(self.engine.get_global_grad_norm()) if self.engine.was_step_applied() else None

    def total(self, values: Tensor) -> Tensor:
        """Sum a small CPU tensor over the ranks, without waiting for the accelerator's stream."""
        if self.world.size > 1:
            torch.distributed.all_reduce(values, group=self._control)
        return values

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """As LocalEngine.shapes. At ZeRO 3 `p.shape` is only the shape of this rank's part."""
        return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in self._weights.items()}

    def whole(self, kind: str, name: str) -> Tensor:
        """As LocalEngine.whole. A collective: every rank must ask for the same tensors in the same order."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        p = self._weights[name]
        if self.stage == 0:
            tensor = p.detach() if kind == "weights" else self.engine.optimizer.state[p][kind]
        else:
            tensor = safe_get_full_fp32_param(p) if kind == "weights" else safe_get_full_optimizer_state(p, kind)
        return tensor.float().cpu()

    def restore(
        self, load: Callable[[str, str], Tensor], steps_applied: int, objective: Objective, batch: Batch
    ) -> None:
        """As LocalEngine.restore. The module must have held these weights when the engine was built.

        DeepSpeed made its bf16 weights from the module's weights then. This method sets the fp32 masters and the state
        of the optimizer.
        """
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if self.stage == 3:
            # The first step at stage 3 traces the order of weights and gathers them differently from all later steps:
            # under autocast with several micro-batches in another precision. So the first step changes nothing.
            self.backward(self(objective, batch), dict.fromkeys(objective.parts, 0.0))
            self.step(0.0)

        inner = self._inner
        with torch.no_grad():
            for name, p in named(self.module):
                for kind in self.kinds:
                    value = load(kind, name).to(self.device)
                    if self.stage == 3:
                        self._set_part(p, value, kind)
                    elif self.stage == 0:
                        (p if kind == "weights" else inner.state[p][kind]).copy_(value)
                    elif kind == "weights":
                        safe_set_full_fp32_param(p, value)
                    else:
                        safe_set_full_optimizer_state(p, value, kind)
        for state in inner.state.values():
            self.rules.count_steps(state, steps_applied)

    @property
    def _inner(self) -> torch.optim.Optimizer:
        return self.engine.optimizer if self.stage == 0 else self.engine.optimizer.optimizer

    def _begin(self) -> None:
        """Give the optimizer its first state now. At stages 1 and 2 also link each state to its weight.

        DeepSpeed 0.19.8 would link them after the first step of the first parameter *group*. The second group has no
        state at that time, and its state could then never be read.
        """
        if self.stage == 3:
            held = self.engine.optimizer.fp32_partitioned_groups_flat
        else:
            held = [p for group in self._inner.param_groups for p in group["params"]]
        for p in held:
            self._inner.state[p] = self.rules.first_state(p)
        if self.stage in (1, 2):
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()
        if self.stage > 0 and self.rules.whole:
            self._inner.place(self._parts(), self.world.rank)  # type: ignore[attr-defined]

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

    def _set_part(self, p: nn.Parameter, value: Tensor, kind: str) -> None:
        """Stage 3: set this rank's part of a whole value. The last part is padded; the full-value setter cannot."""
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        size = p.ds_tensor.numel()  # type: ignore[attr-defined]  # DeepSpeed adds it to every weight
        flat = nn.functional.pad(value.flatten(), (0, size * self.world.size - value.numel()))
        part = flat[self.world.rank * size :][:size]
        if kind == "weights":
            safe_set_local_fp32_param(p, part)
        else:
            safe_set_local_optimizer_state(p, part, kind)


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
