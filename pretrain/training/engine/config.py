"""The section `engine` of a run's configuration, and the configuration of DeepSpeed that is derived from it."""

import difflib
import math
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import model_validator

from pretrain.config import Config, free

# The keys of DeepSpeed's configuration that engine.deepspeed may not set, and why.
REFUSED = {
    "train_batch_size": "it follows from phases: batch_tokens",
    "train_micro_batch_size_per_gpu": "it follows from engine.micro_batch",
    "gradient_accumulation_steps": "it follows from phases: batch_tokens and engine.micro_batch",
    "managed_gradient_accumulation": "the training loop accumulates",
    "gradient_clipping": "it follows from optim.clip",
    "steps_per_print": "log_every says how often a line is printed",
    "optimizer": "it follows from optim",
    "scheduler": "the learning rate follows from optim and phases",
    "zero_force_ds_cpu_optimizer": "the optimizer is PyTorch's, offloaded or not",
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
    "activation_checkpointing": "DeepSpeed reads it for functions of its own only; engine.recompute_every does it",
    "compile": "DeepSpeed reads it in a call that is never made; engine.compile compiles the blocks",
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
# The sections that these keys are in.
SECTIONS = sorted({name.rpartition(".")[0] for name in REFUSED if "." in name})
# The names that DeepSpeed reads at the top level of its configuration. It ignores every other name silently.
KNOWN = (
    *("zero_optimization", "bf16", "fp16", "data_types", "torch_autocast", "communication_data_type"),
    *("prescale_gradients", "gradient_predivide_factor", "sparse_gradients", "zero_allow_untested_optimizer"),
    *("wall_clock_breakdown", "memory_breakdown", "dump_state", "flops_profiler", "comms_logger", "tensorboard"),
    *("wandb", "csv_monitor", "comet", "aio", "checkpoint", "autotuning", "timers"),
)


class EngineConfig(Config):
    """How the steps are executed. All of these keys may change when a run resumes."""

    precision: Literal["fp32", "bf16", "autocast"] = free("fp32")
    """fp32, where GPUs multiply matrices in TF32; bf16: weights in bf16, with master weights and sums of gradients in
    fp32; autocast: weights in fp32, matrix products in bf16. bf16 and autocast are faster on GPUs."""
    zero_stage: Literal[0, 1, 2, 3] = free(1)
    """The ZeRO stage of DeepSpeed. The ranks share nothing at 0, the optimizer's state from 1 on, the gradients from 2
    on, and the weights at 3. Raise it when the model does not fit into the memory of a rank."""
    micro_batch: int = free(gt=0)
    """Windows that a rank computes at once, in the phase with the longest windows. Other phases take about as many
    tokens at once. Lower it when memory runs out: the batch of a step stays the same."""
    compile: Literal["inductor", "aot_eager"] | None = free(None)
    """The backend of torch.compile for the blocks of the model; null: nothing is compiled. inductor: kernels that
    are made for these blocks. Measure whether steps are quicker. The first ones take longer, losses differ by rounding,
    and dropout draws other numbers. aot_eager: graphs of the same kernels, for looking for an error."""
    recompute_every: int = free(0, ge=0)
    """The backward pass recomputes the activations of the first block and every n-th after it, so they are not kept
    (activation checkpointing, gradient checkpointing); 0: all are kept. 1, every block, takes the least memory. It
    takes time and changes no result."""
    timeout_s: int = free(600, gt=0)
    """Seconds that a rank waits for another rank before the run ends with an error."""
    deterministic: bool = free(False)
    """Whether CUDA uses only kernels that give the same bits every time. They are slower."""
    deepspeed: dict[str, Any] = free({})
    """Further keys of DeepSpeed's own configuration, such as zero_optimization.offload_optimizer. Keys that follow from
    this configuration are refused."""

    @model_validator(mode="after")
    def _sound(self) -> "EngineConfig":
        if self.precision == "bf16" and self.zero_stage == 0:
            # DeepSpeed's stage 0 decays every weight once at construction and counts one Adam step too many.
            raise ValueError("engine.precision = bf16 needs engine.zero_stage = 1, 2 or 3, found 0")
        for name in SECTIONS:
            section: Any = self.deepspeed
            for key in name.split("."):
                section = section.get(key, {})
                if not isinstance(section, dict) and not (section is None and "." in name):  # null: no offloading
                    raise ValueError(f"engine.deepspeed.{name} = {section!r:.200} is not a mapping of keys to values")
                section = section or {}
        for path, value in dotted(self.deepspeed):
            for part in (path[:depth] for depth in range(1, len(path) + 1)):
                name = ".".join(part)
                if name in REFUSED and not (part[-1] == "device" and value in ("cpu", "none", None)):
                    raise ValueError(f"engine.deepspeed may not set {name}: {REFUSED[name]}")
        for key in self.deepspeed:
            near = [] if key in KNOWN else difflib.get_close_matches(key, [*KNOWN, *REFUSED], n=1, cutoff=0.8)
            if near:
                raise ValueError(f"engine.deepspeed.{key} is no key of DeepSpeed's: did you mean {near[0]}?")
        return self


def deepspeed_config(engine: EngineConfig, clip: float, untested: bool = False) -> dict[str, Any]:
    """DeepSpeed's JSON for these settings. `untested`: whether DeepSpeed does not list the optimizer for ZeRO.

    We own the accumulation boundary (`managed_gradient_accumulation`): with DeepSpeed's own count, a step that is off
    that count silently trains nothing. We always write `gradient_clipping`, because DeepSpeed clips at 1.0 where the
    key is absent. 0 turns its clipping off: `clip` is inf, or the engine clips itself, as at stage 0.
    """
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": engine.micro_batch,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": clip if math.isfinite(clip) and engine.zero_stage else 0.0,
        "zero_optimization": {"stage": engine.zero_stage},
        "zero_force_ds_cpu_optimizer": False,  # the optimizer is PyTorch's, which also works on offloaded state
        "steps_per_print": 2**31,
        # By default DeepSpeed measures samples a second: it then waits for the GPU before every forward pass.
        "timers": {"throughput": {"enabled": False}},
    }
    if engine.zero_stage in (1, 2):
        # DeepSpeed sums over all ranks either way. With reduce_scatter it also copies all gradients out of its buffer
        # and back.
        config["zero_optimization"]["reduce_scatter"] = False
    if untested:
        config["zero_allow_untested_optimizer"] = True
    match engine.precision:
        case "bf16":  # without grad_accum_dtype the gradients of micro-batches would be summed in bf16
            config |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
        case "autocast":
            config |= {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
    return _merged(config, engine.deepspeed)


def _merged(ours: dict, theirs: dict) -> dict:
    """`ours` with the keys of `theirs` added, section by section."""
    both = {key: _merged(ours[key], theirs[key]) for key in ours.keys() & theirs.keys() if isinstance(ours[key], dict)}
    return {**ours, **theirs, **both}


def dotted(section: dict, above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every key of a nested mapping, as the tuple of names that leads to it, with its value."""
    for name, value in section.items():
        if isinstance(value, dict) and value:
            yield from dotted(value, (*above, str(name)))
        else:
            yield (*above, str(name)), value
