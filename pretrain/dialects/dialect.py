"""The contract of a dialect: a model of transformers that our model can be written as."""

from typing import TYPE_CHECKING, ClassVar

from pretrain.model.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor


class Dialect:
    """How our model is written as a model of transformers. One module has everything about it.

    A dialect imports neither torch nor transformers at its top: training asks it before it starts.
    """

    tokenizer_kind: ClassVar[str]  # the kind of our tokenizers that it goes with
    auto_class: ClassVar[str]  # the class of transformers that opens it
    pipeline: ClassVar[str]  # the task under which the hub lists it
    card: ClassVar[str]  # the model card's part about this dialect, with the fields of export/card.py in braces
    wanted: ClassVar[dict[str, object]]  # the values that it insists on, by key of the section `model`

    def objections(self, model: ModelConfig) -> list[str]:
        """Why the dialect cannot express this model: a line `model.norm = rmsnorm: bert has layernorm` for each key."""
        raise NotImplementedError

    def config(self, model: ModelConfig, vocab_size: int, specials: dict[str, int]) -> dict:
        """The contents of config.json. `specials`: ids of special tokens by role."""
        raise NotImplementedError

    def weights(self, model: ModelConfig, ours: "dict[str, Tensor]") -> "dict[str, Tensor]":
        """Our tensors under the names of transformers."""
        raise NotImplementedError
