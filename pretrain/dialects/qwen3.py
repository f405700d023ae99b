"""Qwen3, a decoder (Qwen team 2025, arXiv:2505.09388), as `Qwen3ForCausalLM` of transformers has it."""

from pretrain.dialects import cards
from pretrain.dialects.dialect import Dialect, decoder_marks, grouped_config, grouped_shape
from pretrain.dialects.llama import NAMES
from pretrain.dialects.names import Names
from pretrain.model.config import ModelConfig


class Qwen3(Dialect):
    """`Qwen3ForCausalLM`."""

    name = "qwen3"
    model_type = "qwen3"
    auto_class = "AutoModelForCausalLM"
    pipeline = "text-generation"
    card = cards.decoder("A Qwen3 decoder")
    wanted = {
        "causal": True,
        "norm": "rmsnorm",
        "norm_position": "pre",
        "positions": "rope",
        "mlp": "swiglu",
        "bias": False,
        "qk_norm": True,
        "transform_head": False,
    }
    free = {"kv_heads", "head_width", "tie_embeddings", "rope_scaling"}
    names = Names(
        NAMES.outside,
        NAMES.layer,
        NAMES.inside | {"attention.q_norm": "self_attn.q_norm", "attention.k_norm": "self_attn.k_norm"},
    )

    def config(self, model: ModelConfig, vocab_size: int, specials: dict[str, int]) -> dict:
        """The contents of config.json."""
        own: dict[str, object] = {"architectures": ["Qwen3ForCausalLM"], "model_type": self.model_type}
        own |= {"head_dim": model.E, "use_sliding_window": False}
        return grouped_config(model, vocab_size) | own | decoder_marks(specials)

    def shape(self, config: dict) -> dict:
        return grouped_shape(config) | {"head_width": config["head_dim"]}
