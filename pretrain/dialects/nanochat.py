"""nanochat (Karpathy 2025), a decoder, as `NanoChatForCausalLM` of transformers 5 has it.

It squares ReLU, has norms without weights, norms queries and keys after RoPE, and bounds its logits.
"""

from typing import TYPE_CHECKING

from pretrain.dialects import cards
from pretrain.dialects.dialect import Dialect, decoder_marks, even_heads, grouped_config, grouped_shape
from pretrain.dialects.names import Names
from pretrain.model.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor


class NanoChat(Dialect):
    """`NanoChatForCausalLM`."""

    name = "nanochat"
    model_type = "nanochat"
    auto_class = "AutoModelForCausalLM"
    pipeline = "text-generation"
    card = cards.decoder("A nanochat decoder")
    wanted = {
        "causal": True,
        "norm": "rmsnorm",
        "norm_weights": False,
        "norm_position": "pre",
        "embed_norm": True,
        "positions": "rope",
        "mlp": "relu2",
        "bias": False,
        "qk_norm": True,
        "qk_norm_after_rope": True,
        "transform_head": False,
    }
    free = {"kv_heads", "head_width", "tie_embeddings", "logit_cap", "rope_scaling"}
    names = Names(
        outside={"embed": "model.embed_tokens", "head.decoder": "lm_head"},
        layer="model.layers",
        inside={
            "attention.q": "self_attn.q_proj",
            "attention.k": "self_attn.k_proj",
            "attention.v": "self_attn.v_proj",
            "attention.out": "self_attn.o_proj",
            "mlp.up": "mlp.fc1",
            "mlp.down": "mlp.fc2",
        },
    )

    def further_objections(self, model: ModelConfig) -> list[str]:
        return even_heads(model, self.name)

    def config(self, model: ModelConfig, vocab_size: int, specials: dict[str, int]) -> dict:
        """The contents of config.json."""
        own: dict[str, object] = {"architectures": ["NanoChatForCausalLM"], "model_type": self.model_type}
        own |= {"hidden_act": "relu2", "final_logit_softcapping": model.logit_cap}
        return grouped_config(model, vocab_size) | own | decoder_marks(specials)

    def shape(self, config: dict) -> dict:
        return grouped_shape(config) | {"logit_cap": config["final_logit_softcapping"]}

    def weights(self, model: ModelConfig, ours: "dict[str, Tensor]") -> "dict[str, Tensor]":
        """Our tensors under nanochat's names."""
        return _turned_back(super().weights(model, ours), model)

    def from_weights(
        self, model: ModelConfig, theirs: "dict[str, Tensor]", rows: dict[str, int]
    ) -> "dict[str, Tensor]":
        """The inverse of `weights`."""
        return super().from_weights(model, _turned_back(theirs, model), rows)


def _turned_back(tensors: "dict[str, Tensor]", model: ModelConfig) -> "dict[str, Tensor]":
    """The tensors with the halves of each head of queries and keys exchanged.

    nanochat rotates in the other direction. A rotation of (a, b) is the opposite rotation of (b, a).
    """
    return {
        name: tensor.view(-1, 2, model.E // 2, tensor.shape[-1]).flip(1).reshape(tensor.shape)
        if name.endswith(("q_proj.weight", "k_proj.weight"))
        else tensor
        for name, tensor in tensors.items()
    }
