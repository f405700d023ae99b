"""The memory that an engine needs for a model, computed before any of it is allocated."""

import os
from dataclasses import dataclass

import torch

from pretrain.errors import ConfigError
from pretrain.model.config import ModelConfig
from pretrain.model.models import parameters_of
from pretrain.processes import memory
from pretrain.training.engine.config import EngineConfig
from pretrain.training.engine.engine import engine_for
from pretrain.training.engine.local import LocalEngine
from pretrain.training.engine.ranks import World, on_cuda

# Defaults of DeepSpeed 0.19.8 for keys of zero_optimization, in numbers of a tensor.
REDUCE_BUCKET, LIVE_WEIGHTS = 500_000_000, 1_000_000_000


@dataclass(frozen=True)
class StateBytes:
    """The bytes of the training state of one rank, without activations. All but `host` are on its device."""

    weights: int
    gradients: int  # summed in fp32
    optimizer: int  # its fp32 masters and the tensors that it keeps for each weight
    host: int  # in the memory of the machine: everything that is offloaded, and the copy that a save writes

    @property
    def device(self) -> int:
        return self.weights + self.gradients + self.optimizer


def state_bytes(parameters: int, states: int, config: EngineConfig, world: World, gpu: bool) -> StateBytes:
    """The state that each rank keeps while it trains. `states`: tensors that the optimizer keeps for each weight.

    `gpu`: whether the device has a memory of its own.
    """
    shared = 1 / world.size
    low = config.precision == "bf16"
    weights, gradients = (2.0 if low else 4.0), 4.0  # bytes for each weight
    kept = 4.0 * states
    optimizer = 4.0 + kept if low else kept
    if engine_for(config, world) is not LocalEngine:
        if config.zero_stage:
            optimizer = (4.0 + kept) * shared  # each rank has a copy of its part of fp32 weights too
        gradients *= shared if config.zero_stage >= 2 else 1
        weights *= shared if config.zero_stage == 3 else 1
    host = (4.0 + kept) * shared
    if gpu:
        if _on_cpu(config, "offload_optimizer"):  # which also sums the gradients
            gradients, optimizer, host = 0.0, 0.0, host + optimizer + gradients
        if _on_cpu(config, "offload_param"):
            weights, host = 0.0, host + weights
        host = max(host, 4.0)  # the model is built in the memory of the machine
    return StateBytes(*(int(parameters * each) for each in (weights, gradients, optimizer, host)))


def buffer_bytes(parameters: int, config: EngineConfig, world: World, whole: bool) -> tuple[int, int]:
    """The bytes beside the state and the activations at the end of a backward pass, and in the optimizer's step.

    They are those of DeepSpeed 0.19.8, read in its source and measured with real ranks (tests/training/test_plan.py).
    At ZeRO 3 all weights are counted as gathered, up to the most that DeepSpeed keeps; fewer may exist at once.
    `whole`: whether the rule of the optimizer needs whole weights, as Muon's does.
    """
    part, low = parameters / world.size, config.precision == "bf16"
    size = 2 if low else 4
    rule = 16 * part if whole else 0.0
    stage = config.zero_stage
    if engine_for(config, world) is LocalEngine or stage == 0:
        return 0, int(rule)
    zero = config.deepspeed.get("zero_optimization") or {}
    bucket = int(zero.get("reduce_bucket_size", REDUCE_BUCKET))
    doubled = 2 if stage < 3 and zero.get("overlap_comm") else 1
    staged = (4 if stage == 1 else size) * bucket * doubled if zero.get("contiguous_gradients", True) else 0
    if (
        stage == 1 and low and not _on_cpu(config, "offload_optimizer")
    ):  # bf16 gradients stay until the end of a step, which sums over ranks in two whole copies
        return 2 * parameters, int(2 * parameters + max(6.0 * parameters, rule))
    if stage == 1:
        return staged, int(staged + 8 * part + rule)
    if stage == 2:
        return int(staged + (0 if low else 4 * part)), int((0 if low else 4 * part) + rule)
    live = min(parameters, int(zero.get("stage3_max_live_parameters", LIVE_WEIGHTS)))
    group = int(zero.get("zero_hpz_partition_size", 1))  # each group of so many ranks has all weights once more
    kept = staged + size * live + (size * parameters / group if group > 1 else 0)
    return int(kept + 2 * size * min(parameters, bucket)), int(kept + 4 * part + 1.5 * rule)


def _on_cpu(config: EngineConfig, key: str) -> bool:
    """Whether DeepSpeed offloads to the CPU: `offload_optimizer` or `offload_param`."""
    return ((config.deepspeed.get("zero_optimization") or {}).get(key) or {}).get("device") == "cpu"


def check_memory(model: ModelConfig, vocab_size: int, states: int, config: EngineConfig, world: World) -> None:
    """Raise ConfigError when the model cannot fit into memory, before any of it is allocated."""
    parameters = parameters_of(model, vocab_size)
    state = state_bytes(parameters, states, config, world, on_cuda())
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)  # ranks on this machine
    ranks = f", for {here} ranks" if here > 1 else ""
    kept, copy = "weights, gradients, the optimizer's state", "the copy that a save writes"
    if on_cuda():
        needs = [("the GPU", state.device, torch.cuda.get_device_properties(world.local_rank).total_memory, kept)]
        needs.append((f"the machine{ranks}", state.host * here, memory.limit(), f"what is offloaded, {copy}"))
    else:
        wanted = (state.device + state.host) * here
        needs = [(f"this machine or process{ranks}", wanted, memory.limit(), f"{kept}, {copy}")]
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
