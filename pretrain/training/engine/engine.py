"""The two things that can execute a step, behind one interface: DeepSpeed over ranks, and plain torch for one rank.

    loss = engine(batch)          summed loss of a micro-batch
    engine.backward(loss, scale)  accumulate gradients of scale · loss, summed over ranks
    engine.step(lr)               clip, update, clear; the norm before clipping, or None: not finite, step skipped
    engine.whole(kind, name)      one whole fp32 tensor of the portable state; engine.restore(…) takes all of it back

How ranks find each other is in ranks.py, the configuration of both engines in config.py. Facts about DeepSpeed
0.19.8 quoted in comments were measured.
"""

import copy
import math
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.errors import ConfigError
from pretrain.objectives.objectives import Batch
from pretrain.processes import memory
from pretrain.training.engine.config import EngineConfig, deepspeed_config, dotted
from pretrain.training.engine.ranks import World, device_of, new_group, on_cuda

STATES = ("exp_avg", "exp_avg_sq")  # what AdamW keeps for each weight
SMALL = 1 << 16  # numbers of a gradient that is summed over ranks together with others
Optimizer = Callable[[nn.Module], torch.optim.Optimizer]


def engine_for(config: EngineConfig, world: World) -> "type[Engine]":
    """Which engine executes the steps.

    One rank has nothing to share: plain torch does the same arithmetic with fewer copies. Whoever launches one rank
    with ZeRO 2 or 3 or with keys of engine.deepspeed wants DeepSpeed (for offloading, say), and gets it.
    """
    wanted = config.zero_stage >= 2 or bool(config.deepspeed)
    return DeepSpeedEngine if world.size > 1 or (world.launched and wanted) else LocalEngine


def state_bytes(parameters: int, config: EngineConfig, world: World) -> tuple[int, int]:
    """The least memory that a model of so many weights takes on a rank's device and, where that is a GPU, in the
    machine's for each rank: weights, gradients, AdamW's moments and fp32 masters, without any activations."""
    shared = 1 / world.size
    low = config.precision == "bf16"
    weights, sums = (2 if low else 4), 4  # bytes a weight; gradients are summed in fp32
    masters_and_moments = 12.0 if low else 8.0
    if engine_for(config, world) is DeepSpeedEngine:
        if config.zero_stage:
            masters_and_moments = 12.0 * shared  # of fp32 weights too, each rank has a copy of its part
        sums *= shared if config.zero_stage >= 2 else 1
        weights *= shared if config.zero_stage == 3 else 1
    on_device, on_host = weights + sums + masters_and_moments, 0.0
    if on_cuda():
        offloaded = config.deepspeed.get("zero_optimization") or {}
        for key, part in (("offload_optimizer", masters_and_moments), ("offload_param", weights)):
            if (offloaded.get(key) or {}).get("device") == "cpu":
                on_device, on_host = on_device - part, on_host + part
        on_host = max(on_host, 4.0)  # the model is made there
    return int(parameters * on_device), int(parameters * on_host)


def check_memory(parameters: int, config: EngineConfig, world: World) -> None:
    """Raise ConfigError when the model cannot fit: before anything of it is allocated."""
    on_device, on_host = state_bytes(parameters, config, world)
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)  # ranks of this machine
    if on_cuda():
        needs = [("the GPU", on_device, torch.cuda.get_device_properties(world.local_rank).total_memory)]
        needs.append((f"the machine, for {here} ranks" if here > 1 else "the machine", on_host * here, memory.limit()))
    else:
        ranks = f", for {here} ranks" if here > 1 else ""
        needs = [(f"this machine or process{ranks}", on_device * here, memory.limit())]
    for where, wanted, there in needs:
        if wanted > there:
            stage = f", engine.zero_stage = {config.zero_stage} on {world.size} ranks" if world.size > 1 else ""
            raise ConfigError(
                f"the model is larger than the memory of {where}",
                f"{parameters:,} weights take at least {wanted / 1e9:,.1f} GB in {config.precision}{stage} (weights, "
                f"gradients, AdamW's moments), and there are {there / 1e9:,.1f} GB",
                "take a smaller model, or more ranks with engine.zero_stage 3; on GPUs engine.precision = bf16, and "
                "engine.deepspeed.zero_optimization.offload_optimizer",
            )


class LocalEngine:
    """One process, plain torch, and the reference that DeepSpeed is compared with.

    The optimizer updates `masters`, which are fp32. They are the module itself, except for `precision` bf16: then the
    module is a copy in bf16, made again after each step, and the masters' gradients are the fp32 sums of its own.
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
        self.optimizer = optimizer(self.masters)
        self._weights = dict(_named(self.masters))
        _begin_adamw(self.optimizer, self.masters.parameters())
        self.clip, self.precision = clip, config.precision

    def train(self, training: bool) -> None:
        self.module.train(training)

    def __call__(self, batch: Batch, each: bool = False) -> Any:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "autocast"):
            return self.module(batch.to(self.device), each)

    def backward(self, loss: Tensor, scale: float) -> None:
        (loss * scale).backward()

    def step(self, lr: float) -> float | None:
        norm = _clipped(self._weights.values(), self.clip)
        if norm is not None:
            _set_lr(self.optimizer, lr)
            self.optimizer.step()
            self._copy_masters()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _copy_masters(self) -> None:
        """Make the module's bf16 weights from the masters, where these are not the module's own."""
        if self.masters is not self.module:
            with torch.no_grad():
                torch._foreach_copy_(list(self.module.parameters()), list(self.masters.parameters()))

    def total(self, values: Tensor) -> Tensor:
        """Sum over ranks of a small tensor; here the tensor itself."""
        return values

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every whole weight by its name, in the model's order."""
        return {name: tuple(p.shape) for name, p in self._weights.items()}

    def whole(self, kind: str, name: str) -> Tensor:
        """One whole fp32 tensor on the CPU: the weight of that name (`kind` "weights"), or a moment (one of STATES)."""
        p = self._weights[name]
        return (p.detach() if kind == "weights" else self.optimizer.state[p][kind]).float().cpu()

    def restore(self, load: Callable[[str, str], Tensor], steps_applied: int, batch: Batch) -> None:
        """Take over a saved state: `load(kind, name)` gives each whole fp32 tensor; `batch` is any valid one."""
        with torch.no_grad():
            for name, p in self._weights.items():
                p.copy_(load("weights", name))
                for kind in STATES:
                    self.optimizer.state[p][kind].copy_(load(kind, name))
                self.optimizer.state[p]["step"].fill_(steps_applied)
        self._copy_masters()


class DeepSpeedEngine:
    """DeepSpeed ZeRO 0–3 over any number of ranks. `join` must have been called.

    At stage 0 DeepSpeed only runs forward and backward. We sum the gradients, in place: DeepSpeed copies all of them
    into one buffer and back, which takes two to four times as long (gloo, two ranks, 14 M weights). We also clip, and
    skip what is not finite.
    """

    def __init__(self, module: nn.Module, optimizer: Optimizer, config: EngineConfig, clip: float, world: World):
        import deepspeed

        self.device = device_of(world)
        self.world = world
        self.module = module.to(self.device)
        settings = deepspeed_config(config, clip)
        try:
            self.engine, *_ = deepspeed.initialize(model=self.module, optimizer=optimizer(module), config=settings)
        except Exception as error:
            if not config.deepspeed or isinstance(error, (MemoryError, torch.OutOfMemoryError)):
                raise
            keys = ", ".join(".".join(key) for key, _ in dotted(config.deepspeed))
            raise ConfigError(
                "DeepSpeed cannot start with the keys of engine.deepspeed",
                f"it was given {keys}, and says {type(error).__name__}: {error}",
                "leave out or correct what it names",
            ) from error
        self.stage, self.clip = config.zero_stage, clip
        self.name = f"DeepSpeed ZeRO {self.stage}"
        self._weights = dict(_named(self.module))
        if self.stage == 0:
            self.engine.enable_backward_allreduce = False
        self._begin()
        self._control = new_group(config.timeout_s) if on_cuda() else None

    def train(self, training: bool) -> None:
        self.engine.train(training)

    def __call__(self, batch: Batch, each: bool = False) -> Any:
        return self.engine(batch.to(self.device), each)

    def backward(self, loss: Tensor, scale: float) -> None:
        averaged = self.stage > 0  # by DeepSpeed, over ranks, where we sum
        self.engine.backward(loss * (scale * self.world.size if averaged else scale))

    def step(self, lr: float) -> float | None:
        _set_lr(self.engine.optimizer, lr)
        if self.stage == 0:
            if self.world.size > 1:
                _sum_over_ranks([p.grad for p in self.module.parameters() if p.grad is not None])
            norm = _clipped(self.module.parameters(), self.clip)
            if norm is None:
                self.engine.zero_grad()
            else:
                self.engine.step()
            return norm
        self.engine.step()
        return float(self.engine.get_global_grad_norm()) if self.engine.was_step_applied() else None

    def total(self, values: Tensor) -> Tensor:
        """Sum over ranks of a small CPU tensor, off the accelerator's stream."""
        if self.world.size > 1:
            torch.distributed.all_reduce(values, group=self._control)
        return values

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """As LocalEngine.shapes; at ZeRO 3 a weight itself has only the shape of this rank's part."""
        return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in self._weights.items()}

    def whole(self, kind: str, name: str) -> Tensor:
        """As LocalEngine.whole; a collective: every rank asks for the same tensors in the same order."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        p = self._weights[name]
        if self.stage == 0:
            tensor = p.detach() if kind == "weights" else self.engine.optimizer.state[p][kind]
        else:
            tensor = safe_get_full_fp32_param(p) if kind == "weights" else safe_get_full_optimizer_state(p, kind)
        return tensor.float().cpu()

    def restore(self, load: Callable[[str, str], Tensor], steps_applied: int, batch: Batch) -> None:
        """As LocalEngine.restore; the module must have held these weights when the engine was built.

        DeepSpeed has made its bf16 weights from the module's; what is set here are the fp32 masters and the moments.
        """
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if self.stage == 3:
            # Its first step traces the order of weights and gathers them otherwise than all later ones: under
            # autocast with several micro-batches in another precision. So that one is spent on nothing.
            self.backward(self(batch), 0.0)
            self.step(0.0)

        inner = self._inner
        with torch.no_grad():
            for name, p in _named(self.module):
                for kind in ("weights", *STATES):
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
            state["step"].fill_(steps_applied)

    @property
    def _inner(self) -> torch.optim.AdamW:
        return self.engine.optimizer if self.stage == 0 else self.engine.optimizer.optimizer

    def _begin(self) -> None:
        """Give AdamW its state now; at stages 1 and 2 also link it to the weights it belongs to.

        DeepSpeed 0.19.8 does that itself after the first step of the first parameter *group*, when the second group
        has no state yet: its moments could then never be read.
        """
        if self.stage == 3:
            _begin_adamw(self._inner, self.engine.optimizer.fp32_partitioned_groups_flat)
            return
        _begin_adamw(self._inner, (p for group in self._inner.param_groups for p in group["params"]))
        if self.stage:
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _set_part(self, p: nn.Parameter, value: Tensor, kind: str) -> None:
        """Stage 3: this rank's part of a whole value, the last part padded (the full-value setter cannot pad)."""
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        size = p.ds_tensor.numel()
        flat = nn.functional.pad(value.flatten(), (0, size * self.world.size - value.numel()))
        part = flat[self.world.rank * size :][:size]
        if kind == "weights":
            safe_set_local_fp32_param(p, part)
        else:
            safe_set_local_optimizer_state(p, part, kind)


Engine = LocalEngine | DeepSpeedEngine


def seed_everything(seed: int) -> None:
    """Seed the generators that dropout draws from, on every device of this process."""
    torch.manual_seed(seed)


def _named(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The model's weights by name, each once, without the Learner's prefix."""
    return ((name.removeprefix("model."), p) for name, p in module.named_parameters())


def _add_gradient(master: nn.Parameter, p: nn.Parameter) -> None:
    """Add the gradient of one backward pass to the fp32 sum of its master, and free it."""
    gradient, p.grad = p.grad, None
    master.grad = gradient.float() if master.grad is None else master.grad.add_(gradient)


def _clipped(weights: Iterable[nn.Parameter], clip: float) -> float | None:
    """Scale the gradients so that their global norm is at most `clip`. The norm before; None where it is not finite."""
    weights = list(weights)
    norm = nn.utils.get_total_norm([p.grad for p in weights if p.grad is not None])
    length = float(norm)
    if not math.isfinite(length):
        return None
    if length > clip:
        nn.utils.clip_grads_with_norm_(weights, clip, norm)
    return length


def _sum_over_ranks(gradients: list[Tensor]) -> None:
    """All-reduce, in place. The small ones, most of them and little of the whole, travel as one."""
    small = [gradient for gradient in gradients if gradient.numel() < SMALL]
    together = torch.cat([gradient.flatten() for gradient in small]) if small else None
    large = [gradient for gradient in gradients if gradient.numel() >= SMALL]
    for work in [
        torch.distributed.all_reduce(tensor, async_op=True)
        for tensor in (*large, *([] if together is None else [together]))
    ]:
        work.wait()
    if small:
        parts = together.split([gradient.numel() for gradient in small])
        torch._foreach_copy_(small, [part.view_as(to) for part, to in zip(parts, small, strict=True)])


def _begin_adamw(optimizer: torch.optim.AdamW, weights: Iterable[Tensor]) -> None:
    """Create AdamW's state as its first step would, so that a run can be saved, or given a state, before it."""
    for p in weights:
        step = torch.zeros((), device=p.device)  # of a fused AdamW
        optimizer.state[p] = {"step": step, **{kind: torch.zeros_like(p) for kind in STATES}}


def _set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
