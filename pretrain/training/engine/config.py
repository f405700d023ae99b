"""The section `engine` of a run's configuration, and DeepSpeed's own configuration, which is derived from it."""

import difflib
import math
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import model_validator

from pretrain.config import Config, free

# Keys of DeepSpeed's configuration that engine.deepspeed may not set, and why.
REFUSED = {
    "train_batch_size": "it follows from phases: batch_tokens",
    "train_micro_batch_size_per_gpu": "it follows from engine.micro_batch",
    "gradient_accumulation_steps": "it follows from phases: batch_tokens and engine.micro_batch",
    "managed_gradient_accumulation": "the training loop accumulates",
    "gradient_clipping": "it follows from optim.clip",
    "steps_per_print": "log_every says how often a line is printed",
    "optimizer": "the optimizer is AdamW, with the settings of optim",
    "scheduler": "the learning rate follows from optim and phases",
    "zero_force_ds_cpu_optimizer": "the optimizer is torch's AdamW, offloaded or not",
    "zero_optimization.stage": "it follows from engine.zero_stage",
    "zero_optimization.offload_optimizer.device": "only cpu is supported",  # unless it is cpu
    "zero_optimization.offload_param.device": "only cpu is supported",
    "zero_optimization.offload_optimizer.super_offload": "its moments are not in checkpoints",
    "zero_optimization.zenflow": "it keeps gradients that are not in checkpoints",
    # Measured with DeepSpeed 0.19.8 at stage 2: a run that went on from a checkpoint had other weights after one step.
    "zero_optimization.round_robin_gradients": "a run does not continue from its checkpoints with it",
    "bf16.enabled": "it follows from engine.precision",
    "bf16.bf16_master_weights_and_grads": "checkpoints hold fp32 masters",
    "bf16.bf16_optimizer_states": "checkpoints hold fp32 moments",
    "data_types.grad_accum_dtype": "gradients are summed in fp32",
    "torch_autocast.enabled": "it follows from engine.precision",
    "torch_autocast.dtype": "it follows from engine.precision",
    **dict.fromkeys(("fp16", "amp"), "engine.precision is fp32, bf16 or autocast"),
    **dict.fromkeys(
        ("tensor_parallel", "sequence_parallel_size", "elasticity", "pipeline"),
        "each rank trains the whole model on windows of its own",
    ),
    **dict.fromkeys(
        ("data_efficiency", "curriculum_learning", "progressive_layer_drop", "compression_training"),
        "it would change which data or which layers a step trains",
    ),
}
# Sections of its configuration with keys of their own.
SECTIONS = sorted({name.rpartition(".")[0] for name in REFUSED if "." in name})
# Names that DeepSpeed reads at the top of its configuration; it passes over any other without a word.
KNOWN = (
    *("zero_optimization", "bf16", "fp16", "data_types", "torch_autocast", "communication_data_type"),
    *("prescale_gradients", "gradient_predivide_factor", "sparse_gradients", "zero_allow_untested_optimizer"),
    *("wall_clock_breakdown", "memory_breakdown", "dump_state", "flops_profiler", "comms_logger", "tensorboard"),
    *("wandb", "csv_monitor", "comet", "aio", "activation_checkpointing", "compile", "checkpoint", "autotuning"),
)


class EngineConfig(Config):
    precision: Literal["fp32", "bf16", "autocast"] = free("fp32")  # bf16: bf16 weights, fp32 masters and sums
    zero_stage: Literal[0, 1, 2, 3] = free(1)
    micro_batch: int = free(gt=0)  # windows of the longest phase a rank takes at once; of shorter ones as many more
    timeout_s: int = free(600, gt=0)  # how long a rank waits for the others
    deterministic: bool = free(False)  # CUDA: only kernels that repeat bit by bit
    deepspeed: dict[str, Any] = free({})  # further keys of DeepSpeed's own configuration

    @model_validator(mode="after")
    def _sound(self) -> "EngineConfig":
        if self.precision == "bf16" and self.zero_stage == 0:
            # Stage 0 decays every weight once at construction and counts one Adam step too many.
            raise ValueError("engine.precision = bf16 needs engine.zero_stage = 1, 2 or 3, found 0")
        for name in SECTIONS:
            section = self.deepspeed
            for key in name.split("."):
                section = section.get(key, {})
                if not isinstance(section, dict) and not (section is None and "." in name):  # null: no offloading
                    raise ValueError(f"engine.deepspeed.{name} = {section!r:.200} is not a mapping of keys to values")
                section = section or {}
        for key, value in dotted(self.deepspeed):
            for part in (key[:depth] for depth in range(1, len(key) + 1)):
                name = ".".join(part)
                if name in REFUSED and not (part[-1] == "device" and value in ("cpu", "none", None)):
                    raise ValueError(f"engine.deepspeed may not set {name}: {REFUSED[name]}")
        for key in self.deepspeed:
            near = [] if key in KNOWN else difflib.get_close_matches(key, [*KNOWN, *REFUSED], n=1, cutoff=0.8)
            if near:
                raise ValueError(f"engine.deepspeed.{key} is no key of DeepSpeed's: did you mean {near[0]}?")
        return self


def deepspeed_config(engine: EngineConfig, clip: float) -> dict:
    """DeepSpeed's JSON for these settings.

    We own the accumulation boundary (`managed_gradient_accumulation`): with DeepSpeed's, a step off its own count
    silently trains nothing. `gradient_clipping` is always written: absent it means 1.0, and 0 means none: `clip` is
    inf, or the engine clips, as at stage 0.
    """
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": engine.micro_batch,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": clip if math.isfinite(clip) and engine.zero_stage else 0.0,
        "zero_optimization": {"stage": engine.zero_stage},
        "zero_force_ds_cpu_optimizer": False,  # ours is torch's AdamW, which works on offloaded moments as well
        "steps_per_print": 2**31,
    }
    if engine.zero_stage in (1, 2):
        # DeepSpeed sums over all ranks either way; told to scatter, it copies all gradients out of its buffer and back.
        config["zero_optimization"]["reduce_scatter"] = False
    match engine.precision:
        case "bf16":  # without grad_accum_dtype micro-batches would accumulate in bf16
            config |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
        case "autocast":
            config |= {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
    return _merged(config, engine.deepspeed)


def _merged(ours: dict, theirs: dict) -> dict:
    """`ours` with the keys of `theirs` added, section by section."""
    both = {key: _merged(ours[key], theirs[key]) for key in ours.keys() & theirs.keys() if isinstance(ours[key], dict)}
    return {**ours, **theirs, **both}


def dotted(section: dict, above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The keys of a nested mapping, each as the names on the way to it, with its value."""
    for name, value in section.items():
        if isinstance(value, dict) and value:
            yield from dotted(value, (*above, str(name)))
        else:
            yield (*above, str(name)), value
