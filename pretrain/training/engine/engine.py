"""The two things that can execute a step, behind one interface: DeepSpeed over ranks, and plain torch for one rank.

    sums = engine(objective, batch)  summed loss of a micro-batch, by the name of each part
    engine.backward(sums, scales)  accumulate the gradients of Σ scale · sum, summed over ranks
    engine.step(lr)               clip, update, clear; returns the norm before clipping, or None for a skipped step
    engine.gather(wanted, into)   copy whole fp32 tensors of the state, each to the rank that wants it
    engine.restore(load, …)       set the whole state

A step is skipped when its gradient is not finite. The engines are in local.py and deepspeed.py, their configuration is
in config.py, and ranks.py connects the ranks.
"""

import os

import torch

from pretrain.errors import ConfigError
from pretrain.model.config import ModelConfig
from pretrain.model.models import parameters_of
from pretrain.processes import memory
from pretrain.training.engine.config import EngineConfig
from pretrain.training.engine.deepspeed import DeepSpeedEngine
from pretrain.training.engine.local import LocalEngine
from pretrain.training.engine.ranks import World, on_cuda

Engine = LocalEngine | DeepSpeedEngine


def engine_for(config: EngineConfig, world: World) -> type[Engine]:
    """The class of the engine that executes the steps.

    One rank runs on plain torch, which does the same arithmetic with fewer copies. A launched rank that is alone runs
    on DeepSpeed if ZeRO 2, ZeRO 3 or keys of engine.deepspeed are set, because they ask for it (to offload, say).
    """
    wanted = config.zero_stage >= 2 or bool(config.deepspeed)
    return DeepSpeedEngine if world.size > 1 or (world.launched and wanted) else LocalEngine


def state_bytes(parameters: int, states: int, config: EngineConfig, world: World) -> tuple[int, int]:
    """The least bytes that each rank needs on its device and, besides, in the memory of its machine.

    Counted are weights, gradients, fp32 masters and the `states` tensors that the optimizer keeps for each weight, but
    no activations. In the memory of the machine is what is offloaded, and the copy of the state that a save writes.
    """
    shared = 1 / world.size
    low = config.precision == "bf16"
    weights, sums = (2.0 if low else 4.0), 4.0  # bytes for each weight; gradients are summed in fp32
    kept = 4.0 * states
    masters_and_moments = 4.0 + kept if low else kept
    if engine_for(config, world) is DeepSpeedEngine:
        if config.zero_stage:
            masters_and_moments = (4.0 + kept) * shared  # each rank has a copy of its part of fp32 weights too
        sums *= shared if config.zero_stage >= 2 else 1
        weights *= shared if config.zero_stage == 3 else 1
    on_device, on_host = weights + sums + masters_and_moments, (4.0 + kept) * shared
    if on_cuda():
        offloaded = config.deepspeed.get("zero_optimization") or {}
        for key, part in (("offload_optimizer", masters_and_moments), ("offload_param", weights)):
            if (offloaded.get(key) or {}).get("device") == "cpu":
                on_device, on_host = on_device - part, on_host + part
        on_host = max(on_host, 4.0)  # the model is built in the memory of the machine
    return int(parameters * on_device), int(parameters * on_host)


def check_memory(model: ModelConfig, vocab_size: int, states: int, config: EngineConfig, world: World) -> None:
    """Raise ConfigError when the model cannot fit into memory, before any of it is allocated."""
    parameters = parameters_of(model, vocab_size)
    on_device, on_host = state_bytes(parameters, states, config, world)
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)  # ranks on this machine
    ranks = f", for {here} ranks" if here > 1 else ""
    state, copy = "weights, gradients, the optimizer's state", "the copy that a save writes"
    if on_cuda():
        needs = [("the GPU", on_device, torch.cuda.get_device_properties(world.local_rank).total_memory, state)]
        needs.append((f"the machine{ranks}", on_host * here, memory.limit(), f"what is offloaded, {copy}"))
    else:
        wanted = (on_device + on_host) * here
        needs = [(f"this machine or process{ranks}", wanted, memory.limit(), f"{state}, {copy}")]
    for where, wanted, there, what in needs:
        if wanted > there:
            stage = f", engine.zero_stage = {config.zero_stage} on {world.size} ranks" if world.size > 1 else ""
            raise ConfigError(
                f"the model is larger than the memory of {where}",
                f"{parameters:,} weights take at least {wanted / 1e9:,.1f} GB in {config.precision}{stage} ({what}), "
                f"and there are {there / 1e9:,.1f} GB",
                "take a smaller model, or more ranks with engine.zero_stage 3; on GPUs engine.precision = bf16, and "
                "engine.deepspeed.zero_optimization.offload_optimizer",
            )


def seed_everything(seed: int) -> None:
    """Seed the random generators that dropout uses, on every device of this process."""
    torch.manual_seed(seed)
