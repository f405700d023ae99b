"""How the blocks of a model are executed: compiled, and with activations that the backward pass recomputes."""

import os
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from pretrain.errors import ConfigError
from pretrain.model.transformer import Block
from pretrain.training.engine.config import EngineConfig

# The graphs that torch may make of one function before it gives up and runs it uncompiled. All blocks share them: one
# for each kind of layer, shape of a batch, and mode (training or scoring). torch's default, 8, is too few for that.
GRAPHS = 1024
DISABLING = ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE")  # with 1, torch.compile returns its argument


def set_up_blocks(model: nn.Module, config: EngineConfig) -> None:
    """Let the blocks of a model be compiled and recomputed as `config` says. The names of its weights stay.

    Every block is compiled on its own, when it is first called, and blocks of one kind share a graph. Sizes are fixed
    in a graph (`dynamic=False`), because they are fixed in a phase: a phase with other windows makes other graphs.
    """
    for blocks in _stacks(model):
        for number, block in enumerate(blocks):
            block.recomputed = config.recompute_every > 0 and number % config.recompute_every == 0
            if config.compile:
                block.compile(backend=config.compile, dynamic=False)
    if config.compile:
        limits = torch._dynamo.config
        limits.recompile_limit = limits.accumulated_recompile_limit = GRAPHS


def keep_hooks_out_of_graphs(model: nn.Module) -> None:
    """Let the hooks around the forward pass of every module run uncompiled.

    At ZeRO 3 DeepSpeed gathers and frees weights in such hooks. A compiled hook would be compiled once more for each
    module, because DeepSpeed counts the modules that are running.
    """
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for number, hook in hooks.items():
                hooks[number] = torch.compiler.disable(hook)


def _stacks(model: nn.Module) -> Iterator[list[Block]]:
    """The blocks of each Transformer that a model is composed of, in order."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            yield [block for block in module if isinstance(block, Block)]


def compile_notes(config: EngineConfig, deepspeed: bool) -> list[str]:
    """The warning that ZeRO 3 cuts compiled blocks into pieces. `deepspeed`: whether DeepSpeed executes the steps."""
    if not (config.compile and deepspeed and config.zero_stage == 3):
        return []
    return [
        "warning: at ZeRO 3 the graphs of compiled blocks are fragmented, because DeepSpeed gathers the weights of a "
        "block layer by layer: take engine.zero_stage 1 or 2 if memory allows it"
    ]


def check_compiler(backend: str, device: torch.device) -> None:
    """Raise ConfigError unless torch can compile on this machine. A function of one line is compiled to see it."""
    for name in DISABLING:
        if os.environ.get(name) == "1":
            raise ConfigError(
                f"engine.compile = {backend} would compile nothing",
                f"the environment variable {name} is 1, so torch compiles no function",
                f"start the run with env -u {name} …, or leave engine.compile out",
            )
    try:
        torch.compile(_sample, backend=backend)(torch.ones(2, device=device))
    except Exception as error:  # whatever it is, no block could be compiled
        found = f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]
        cpu = "install a C++ compiler (apt install g++, conda install gxx), or name one with the variable CXX"
        cuda = "install Triton of the version that this PyTorch asks for, and a C compiler (apt install gcc)"
        raise ConfigError(
            f"engine.compile = {backend} cannot compile on this machine",
            found,
            f"{cuda if device.type == 'cuda' else cpu}; or leave engine.compile out",
        ) from error


def _sample(x: Tensor) -> Tensor:
    return x.sin() + 1
