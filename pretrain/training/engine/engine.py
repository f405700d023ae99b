"""The two things that can execute a step, behind one interface: DeepSpeed over ranks, and plain torch for one rank.

    sums = engine(objective, batch)  summed loss of a micro-batch, by the name of each part
    engine.backward(sums, scales)  accumulate the gradients of Σ scale · sum, summed over ranks
    engine.step(lr)               clip, update, clear; returns the norm before clipping, as a tensor on the device
    engine.gather(wanted, into)   copy whole fp32 tensors of the state, each to the rank that wants it
    engine.restore(load, …)       set the whole state

A step is skipped when its gradient is not finite, and then its norm is not finite either. On a GPU these calls only
launch work: they do not wait until it is done, except for `step` of ZeRO 1 to 3 and of an optimizer that cannot skip a
step itself. The engines are in local.py and deepspeed.py, their configuration is in config.py, the memory that they
need in footprint.py, and ranks.py connects the ranks.
"""

import torch

from pretrain.training.engine.config import EngineConfig
from pretrain.training.engine.deepspeed import DeepSpeedEngine
from pretrain.training.engine.local import LocalEngine
from pretrain.training.engine.ranks import World

Engine = LocalEngine | DeepSpeedEngine


def engine_for(config: EngineConfig, world: World) -> type[Engine]:
    """The class of the engine that executes the steps.

    One rank runs on plain torch, which does the same arithmetic with fewer copies. A launched rank that is alone runs
    on DeepSpeed if ZeRO 2, ZeRO 3 or keys of engine.deepspeed are set, because they ask for it (to offload, say).
    """
    wanted = config.zero_stage >= 2 or bool(config.deepspeed)
    return DeepSpeedEngine if world.size > 1 or (world.launched and wanted) else LocalEngine


def seed_everything(seed: int) -> None:
    """Seed the random generators that dropout uses, on every device of this process."""
    torch.manual_seed(seed)
