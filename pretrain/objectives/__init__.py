"""The objectives of training: each is one module here and one line in `OBJECTIVES`."""

from pretrain.objectives.causal_lm import CausalLM
from pretrain.objectives.masked_lm import MaskedLM
from pretrain.objectives.objective import Objective

OBJECTIVES: dict[str, type[Objective]] = {"masked_lm": MaskedLM, "causal_lm": CausalLM}

__all__ = ["OBJECTIVES", "Objective"]
