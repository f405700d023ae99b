"""The memory, the speed and the command of a run, computed before it starts. The speeds are estimates.

A plan of memory counts tensors. The context of the driver, the fragments of an allocator and the batch are not in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pretrain.model.config import ModelConfig
from pretrain.model.electra import generator_config
from pretrain.model.encoder_decoder import decoder_config
from pretrain.model.models import parameters_of
from pretrain.model.projection import CHUNK
from pretrain.model.transformer import MLPS
from pretrain.order.phases import Phase
from pretrain.training.config import RunConfig
from pretrain.training.engine.config import EngineConfig
from pretrain.training.engine.footprint import buffer_bytes, state_bytes
from pretrain.training.engine.ranks import World
from pretrain.training.loader import windows_at_once
from pretrain.training.optim import OPTIMIZERS
from pretrain.training.watch.log import PEAK_FLOPS


class Gpu(NamedTuple):
    gb: int  # decimal
    peak_flops: float  # dense, in bf16 with sums in fp32


# From the vendor's data sheets. PEAK_FLOPS has no RTX 4090: the names of slower cards begin in the same way.
GPUS = {
    "A100-80GB": Gpu(80, PEAK_FLOPS["A100"]),
    "H100": Gpu(80, PEAK_FLOPS["H100"]),
    "H200": Gpu(141, PEAK_FLOPS["H200"]),
    "RTX 4090": Gpu(24, 165.2e12),
}
A_NODE = 8  # GPUs
# The shares of the bf16 peak that are assumed: a wide model's, a narrow one's, and the widths from which they are so.
#
#   wide    LLaMA 7B: 82,432 hours of A100 for 10^12 tokens (Touvron et al. 2023, arXiv:2302.13971, table 15) are 0.46.
#   narrow  GPT-2's shape without a compiler: forward and backward of 278,000 tokens a second in windows of 512 tokens
#           on one H200 are 0.22, and 236,000 in windows of 2,048 are 0.23 (KempnerForge, pull request 207).
WIDE, WIDE_MFU = 2048, 0.4
NARROW, NARROW_MFU = 768, 0.2


@dataclass(frozen=True)
class Memory:
    """The bytes that one rank needs on its device."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    backward_buffers: int  # of DeepSpeed, at the end of a backward pass
    step_buffers: int  # in the optimizer's step, when no activation is left

    @property
    def peak(self) -> int:
        state = self.weights + self.gradients + self.optimizer
        return state + max(self.activations + self.backward_buffers, self.step_buffers)


def memory(run: RunConfig, vocab_size: int, targets: list[int], engine: EngineConfig, world: World) -> Memory:
    """The memory of each of the ranks of `world` on a GPU. `targets`: slots of a window, for each phase."""
    parameters = parameters_of(run.model, vocab_size)
    rule = OPTIMIZERS[run.optim.kind](run.optim)
    state = state_bytes(parameters, len(rule.states), engine, world, gpu=True)
    backward, step = buffer_bytes(parameters, engine, world, rule.whole)
    kept = max(
        activation_bytes(
            run.model,
            vocab_size,
            phase.seq_len,
            slots,
            windows_at_once(phase, run.phases, engine.micro_batch),
            2 if engine.precision == "bf16" else 4,
            engine.recompute_every,
        )
        for phase, slots in zip(run.phases, targets, strict=True)
    )
    return Memory(state.weights, state.gradients, state.optimizer, kept, backward, step)


def activation_bytes(
    config: ModelConfig, vocab_size: int, T: int, targets: int, windows: int, size: int, recompute_every: int = 0
) -> int:
    """The most bytes of activations in a step, where a number has `size` bytes and no block is compiled.

    Attention is counted as a fused kernel has it, which keeps queries, keys, values and outputs. `targets` of every T
    tokens meet the head; a decoder that reads an encoder writes `targets` tokens.
    """
    tokens, rows = windows * T, windows * targets
    kept = tokens * _stack(config, recompute_every, size)
    reads = config  # by whose width the head reads
    if config.decoder_layers:
        decoder = decoder_config(config)
        crossed = size * decoder.heads * decoder.E
        kept += rows * (
            _stack(decoder, recompute_every, size) + decoder.layers * (2 * size * config.width + 2 * crossed)
        )
        kept += tokens * decoder.layers * 2 * crossed
    if config.positions == "relative":  # the numbers that are added to the scores, and their gradient
        kept += 2 * size * windows * config.heads * (T**2 + (targets**2 if config.decoder_layers else 0))
    if config.generator:
        reads = generator_config(config)
        kept += tokens * _stack(reads, recompute_every, size)
    kept += rows * size * reads.D * (5 if reads.transform_head else 2)
    entries = reads.rows_of(vocab_size)
    at_once = _projection(entries, reads.D, rows, size)
    if recompute_every:  # a block with the gradients inside of it, and the gradient of embeddings that are tied
        again = tokens * (_block(config, size) + 2 * size * config.mlp_width)
        at_once = max(at_once, again + (size * entries * reads.D if reads.tie_embeddings else 0))
    return int(kept + at_once)


def _projection(entries: int, D: int, rows: int, size: int) -> int:
    """The bytes of the logits of one chunk, and of the gradient of the matrix (entries, D), whose sum is in fp32."""
    logits, gradient = min(CHUNK, rows * entries), 4 * entries * D
    if rows * entries > CHUNK:  # the slopes of a chunk stay until those of the next one are there
        return (12 if size == 4 else 14) * logits + gradient
    return max(8 * logits, (4 + size) * logits + gradient + (gradient // 2 if size < 4 else 0))


def _stack(config: ModelConfig, recompute_every: int, size: int) -> int:
    """The bytes that all blocks keep for a token."""
    blocks = range(config.layers)
    recomputed = sum(number % recompute_every == 0 for number in blocks) if recompute_every else 0
    return (config.layers - recomputed) * _block(config, size) + recomputed * size * config.width


def _block(config: ModelConfig, size: int) -> int:
    """The bytes that a block keeps for a token: inputs of norms, products and the activation, and masks of dropout."""
    across, gated = config.heads * config.E, MLPS[config.mlp][0]
    numbers = 4 * config.width + 4 * across + (4 if gated else 2) * config.mlp_width
    numbers += across + config.KV * config.E if config.qk_norm else 0
    return size * numbers + (2 * config.width if config.dropout else 0) + 4 * config.heads


def assumed_mfu(config: ModelConfig) -> float:
    """The share of a GPU's bf16 peak that we assume. A still narrower model has less, in proportion to its width.

    Products grow with the square of the width, and all other kernels move bytes in proportion to it.
    """
    return WIDE_MFU if config.width >= WIDE else NARROW_MFU * min(1.0, config.width / NARROW)


def tokens_per_s(gpu: str, flops_per_token: float, config: ModelConfig) -> float:
    """The estimated tokens a second of one GPU: its bf16 peak, times the assumed share, over the FLOPs of a token."""
    return GPUS[gpu].peak_flops * assumed_mfu(config) / flops_per_token


def fitting_micro_batch(phases: Sequence[Phase], micro_batch: int, ranks: int) -> int | None:
    """The largest micro-batch up to `micro_batch` with which all phases divide among the ranks; None: there is none."""
    for size in range(micro_batch, 0, -1):
        if all(phase.batch % (windows_at_once(phase, phases, size) * ranks) == 0 for phase in phases):
            return size
    return None


def command(path: str, run: RunConfig, ranks: int, engine: EngineConfig) -> str:
    """The line that starts the run in `path` on `ranks` GPUs with the section `engine`."""
    several = f"--num_gpus {ranks}" if ranks <= A_NODE else "--hostfile launch/hostfile.example"
    launcher = "python" if ranks == 1 else f"deepspeed {several}"
    keys = ("zero_stage", "micro_batch")
    changed = [
        f"engine.{key}={getattr(engine, key)}" for key in keys if getattr(engine, key) != getattr(run.engine, key)
    ]
    return " ".join([launcher, "launch/pretrain.py", path, *changed])
