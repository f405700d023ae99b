"""Dialects: the architectures of transformers in which a model can be exported.

A dialect is one module here and one line in `DIALECTS`.
"""

import importlib.util
from typing import TYPE_CHECKING, Literal

from pretrain.dialects.bert import Bert
from pretrain.dialects.dialect import Dialect
from pretrain.dialects.qwen3 import Qwen3
from pretrain.errors import ExportError
from pretrain.model.config import ModelConfig

DIALECTS: dict[str, Dialect] = {"bert": Bert(), "qwen3": Qwen3()}

if TYPE_CHECKING:
    DialectName = str
else:
    DialectName = Literal[tuple(DIALECTS)]


def check_expressible(model: ModelConfig, name: str, tokenizer_kind: str) -> None:
    """Raise ExportError unless `model` can be exported in dialect `name`, with a tokenizer of this kind."""
    dialect = DIALECTS[name]
    lines = dialect.objections(model)
    if tokenizer_kind != dialect.tokenizer_kind:
        lines.append(f"the tokenizer is of kind {tokenizer_kind}: {name} has {dialect.tokenizer_kind}")
    if lines:
        raise ExportError(f"this model cannot be exported as {name}", *lines)
    if importlib.util.find_spec("transformers") is None:
        raise ExportError("export needs transformers", "pip install '.[export]'")
