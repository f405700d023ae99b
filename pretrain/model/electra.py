"""A discriminator with its generator, for replaced-token detection (Clark et al. 2020, arXiv:2003.10555)."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.model.config import ModelConfig
from pretrain.model.transformer import Transformer
from pretrain.model.weights import Weight, matrix, projection


class Electra(Transformer):
    """The discriminator is a Transformer whose head asks of each token whether it was replaced.

    `generator` is a smaller Transformer with a masked-LM head. Both have the same embeddings (section 3.2), so the
    gradients of both train them.
    """

    def __init__(self, config: ModelConfig, vocab_size: int):
        super().__init__(config, vocab_size)
        self.generator: Any = Transformer(generator_config(config), vocab_size)
        for name in ("embed", "embed_position", "embed_norm"):
            if hasattr(self, name):
                setattr(self.generator, name, getattr(self, name))
        self.generator.head.decoder.weight = self.embed.weight

    def _head(self) -> nn.Module:
        return Detector(self.config)

    def flops_per_token(self, seq_len: int, targets: int) -> float:
        """As in `Transformer`, for both. The discriminator has no head onto the vocabulary."""
        generator = self.generator.flops_per_token(seq_len, targets)
        return super().flops_per_token(seq_len, 0) + 6 * self.config.width**2 + generator


def generator_config(config: ModelConfig) -> ModelConfig:
    """The shape of the generator of a discriminator with shape `config`."""
    assert config.generator is not None
    sizes = {"head_width": None, "kv_heads": None, "embed_width": config.D, "generator": None}
    return config.model_copy(
        update={**sizes, **config.generator.model_dump(), "transform_head": True, "tie_embeddings": True}
    )


class Detector(nn.Module):
    """Hidden rows (…, D) → the logit (…,) of \"this token was replaced\", as `ElectraForPreTraining` has it."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.dense = nn.Linear(config.width, config.width, config.bias)
        self.replaced = nn.Linear(config.width, 1, config.bias)

    def weights(self) -> dict[str, Weight]:
        return {"dense.weight": matrix(self.config), "replaced.weight": projection(self.config)}

    def forward(self, rows: Tensor, labels: Tensor | None = None, weights: Tensor | None = None, **asked: Any) -> Any:
        """Without `labels` (…,) the logits. With them the summed loss in nats, fp32, each row times its weight.

        With `each` the nll and the likelier label (0 or 1) of every row, both in the shape of `labels`.
        """
        logits = self.replaced(F.gelu(self.dense(rows)))[..., 0]
        if labels is None:
            return logits
        nll = F.binary_cross_entropy_with_logits(logits.float(), labels.float(), reduction="none")
        if asked.get("each"):
            return nll, (logits > 0).long()
        return nll.sum() if weights is None else (nll * weights).sum()
