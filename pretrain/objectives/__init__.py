"""The objectives of training: each is one module here and one line in `OBJECTIVES`."""

from pretrain.objectives.causal_lm import CausalLM
from pretrain.objectives.fill_in_middle import FillInMiddle
from pretrain.objectives.hybrid import Hybrid
from pretrain.objectives.masked_lm import MaskedLM
from pretrain.objectives.objective import Objective
from pretrain.objectives.prefix_lm import PrefixLM
from pretrain.objectives.replaced_token_detection import ReplacedTokenDetection
from pretrain.objectives.span_corruption import SpanCorruption

OBJECTIVES: dict[str, type[Objective]] = {
    "masked_lm": MaskedLM,
    "causal_lm": CausalLM,
    "prefix_lm": PrefixLM,
    "fill_in_middle": FillInMiddle,
    "hybrid": Hybrid,
    "replaced_token_detection": ReplacedTokenDetection,
    "span_corruption": SpanCorruption,
}

__all__ = ["OBJECTIVES", "Objective"]
