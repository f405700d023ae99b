"""The model that a configuration describes, and the number of its weights."""

import torch

from pretrain.errors import ConfigError
from pretrain.model.config import Composition, ModelConfig
from pretrain.model.electra import Electra
from pretrain.model.encoder_decoder import EncoderDecoder
from pretrain.model.transformer import Transformer

COMPOSED: dict[Composition, type[Transformer]] = {
    "one": Transformer,
    "generator": Electra,
    "encoder_decoder": EncoderDecoder,
}


def model_of(config: ModelConfig, vocab_size: int) -> Transformer:
    """One Transformer, or what is composed of two."""
    return COMPOSED[config.composition](config, vocab_size)


def parameters_of(config: ModelConfig, vocab_size: int) -> int:
    """The number of weights of such a model, without making it. Raises ConfigError when a tensor would be too large."""

    def counted(layers: int) -> int:
        with torch.device("meta"):
            model = model_of(config.model_copy(update={"layers": layers}), vocab_size)
        return sum(p.numel() for p in model.parameters())

    try:
        one, two = counted(1), counted(2)
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:  # on "meta" only sizes can be wrong
        sizes = ("width", "heads", "kv_heads", "head_width", "mlp_width", "max_positions")
        said = ", ".join(f"model.{name} = {getattr(config, name)}" for name in sizes if getattr(config, name))
        reason = str(error).split("\n", 1)[0][:200]
        raise ConfigError("a tensor of this model would be too large to exist", said, reason) from None
    return one + (two - one) * (config.layers - 1)
