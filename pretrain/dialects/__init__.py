"""Dialects: the architectures of transformers in which a model can be exported.

A dialect is one module here and one line in `DIALECTS`.
"""

import importlib.util
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pretrain.dialects.bert import Bert
from pretrain.dialects.dialect import Dialect
from pretrain.dialects.electra import Electra
from pretrain.dialects.gpt2 import Gpt2
from pretrain.dialects.llama import EuroBert, Llama
from pretrain.dialects.modernbert import ModernBert, ModernBertDecoder
from pretrain.dialects.nanochat import NanoChat
from pretrain.dialects.qwen3 import Qwen3
from pretrain.dialects.t5 import T5
from pretrain.errors import ExportError
from pretrain.model.config import ModelConfig

DIALECTS: dict[str, Dialect] = {
    "bert": Bert(),
    "electra": Electra(),
    "modernbert": ModernBert(),
    "eurobert": EuroBert(),
    "gpt2": Gpt2(),
    "llama": Llama(),
    "qwen3": Qwen3(),
    "nanochat": NanoChat(),
    "modernbert_decoder": ModernBertDecoder(),
    "t5": T5(),
}

if TYPE_CHECKING:
    DialectName = str
else:
    DialectName = Literal[tuple(DIALECTS)]


def check_expressible(model: ModelConfig, name: str, specials: Mapping[str, int]) -> None:
    """Raise ExportError unless `model` can be exported in dialect `name`, with a tokenizer that has `specials`."""
    dialect = DIALECTS[name]
    lines = dialect.objections(model)
    missing = [role for role in dialect.needs if role not in specials]
    if missing:
        lines.append(
            f"the tokenizer has no special token for {', '.join(missing)}: {name} needs {', '.join(dialect.needs)}"
        )
    if lines:
        raise ExportError(f"this model cannot be exported as {name}", *lines)
    if importlib.util.find_spec("transformers") is None:
        raise ExportError("export needs transformers", "pip install '.[export]'")
