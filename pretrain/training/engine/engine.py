"""The two things that can execute a step, behind one interface: DeepSpeed over ranks, and plain torch for one rank.

    loss = engine(objective, batch)  summed loss of a micro-batch
    engine.backward(loss, scale)  accumulate gradients of scale · loss, summed over ranks
    engine.step(lr)               clip, update, clear; the norm before clipping, or None: not finite, step skipped
    engine.whole(kind, name)      one whole fp32 tensor of the portable state; engine.restore(…) takes all of it back

The engines are local.py and deepspeed.py. How ranks find each other is in ranks.py, the configuration of both in
config.py.
"""

import os

import torch

from pretrain.errors import ConfigError
from pretrain.processes import memory
from pretrain.training.engine.config import EngineConfig
from pretrain.training.engine.deepspeed import DeepSpeedEngine
from pretrain.training.engine.local import LocalEngine
from pretrain.training.engine.ranks import World, on_cuda

Engine = LocalEngine | DeepSpeedEngine


def engine_for(config: EngineConfig, world: World) -> type[Engine]:
    """Which engine executes the steps.

    One rank has nothing to share: plain torch does the same arithmetic with fewer copies. Whoever launches one rank
    with ZeRO 2 or 3 or with keys of engine.deepspeed wants DeepSpeed (for offloading, say), and gets it.
    """
    wanted = config.zero_stage >= 2 or bool(config.deepspeed)
    return DeepSpeedEngine if world.size > 1 or (world.launched and wanted) else LocalEngine


def state_bytes(parameters: int, states: int, config: EngineConfig, world: World) -> tuple[int, int]:
    """The least memory that a model of so many weights takes on a rank's device and, where that is a GPU, in the
    machine's for each rank: weights, gradients, fp32 masters and the `states` that the optimizer keeps for each weight,
    without any activations."""
    shared = 1 / world.size
    low = config.precision == "bf16"
    weights, sums = (2 if low else 4), 4  # bytes a weight; gradients are summed in fp32
    kept = 4.0 * states
    masters_and_moments = 4.0 + kept if low else kept
    if engine_for(config, world) is DeepSpeedEngine:
        if config.zero_stage:
            masters_and_moments = (4.0 + kept) * shared  # of fp32 weights too, each rank has a copy of its part
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


def check_memory(parameters: int, states: int, config: EngineConfig, world: World) -> None:
    """Raise ConfigError when the model cannot fit: before anything of it is allocated."""
    on_device, on_host = state_bytes(parameters, states, config, world)
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
                f"gradients, the optimizer's state), and there are {there / 1e9:,.1f} GB",
                "take a smaller model, or more ranks with engine.zero_stage 3; on GPUs engine.precision = bf16, and "
                "engine.deepspeed.zero_optimization.offload_optimizer",
            )


def seed_everything(seed: int) -> None:
    """Seed the generators that dropout draws from, on every device of this process."""
    torch.manual_seed(seed)
