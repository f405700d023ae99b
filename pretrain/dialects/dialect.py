"""The contract of a dialect: an architecture of transformers in which a model can be exported."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from pretrain.model.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor


class Dialect(ABC):
    """The rules that turn our model into a model of transformers. One module defines all of them.

    A dialect must import neither torch nor transformers at the top of its module, because a run asks its dialect before
    it loads either.
    """

    tokenizer_kind: ClassVar[str]  # the kind of tokenizer that the exported model has
    auto_class: ClassVar[str]  # the class of transformers that opens the exported model
    pipeline: ClassVar[str]  # the task under which the Hugging Face hub lists it
    card: ClassVar[str]  # the dialect's text of the model card, with the fields of export/card.py in braces
    wanted: ClassVar[dict[str, object]]  # the values that the dialect requires, by key of the section `model`

    @abstractmethod
    def objections(self, model: ModelConfig) -> list[str]:
        """A line such as `model.norm = rmsnorm: bert has layernorm` for each key that the dialect cannot express."""

    @abstractmethod
    def config(self, model: ModelConfig, vocab_size: int, specials: dict[str, int]) -> dict:
        """The contents of config.json. `specials`: ids of special tokens by role."""

    @abstractmethod
    def weights(self, model: ModelConfig, ours: "dict[str, Tensor]") -> "dict[str, Tensor]":
        """Our tensors under the names of transformers."""
