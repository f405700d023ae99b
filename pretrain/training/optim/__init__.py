"""The optimizers: each is one module here and one line in `OPTIMIZERS`."""

from pretrain.training.optim.adamw import AdamW
from pretrain.training.optim.lamb import Lamb
from pretrain.training.optim.muon import Muon
from pretrain.training.optim.optimizer import Optimizer

OPTIMIZERS: dict[str, type[Optimizer]] = {"adamw": AdamW, "lamb": Lamb, "muon": Muon}

__all__ = ["OPTIMIZERS", "Optimizer"]
