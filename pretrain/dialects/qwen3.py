"""Qwen3, a decoder (Qwen team 2025, arXiv:2505.09388), as `Qwen3ForCausalLM` of transformers has it."""

from pretrain.dialects import cards
from pretrain.dialects.dialect import FP32, Dialect, end_mark, grouped_shape, rope_keys
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
    free = {"kv_heads", "head_width", "tie_embeddings"}
    names = Names(
        NAMES.outside,
        NAMES.layer,
        NAMES.inside | {"attention.q_norm": "self_attn.q_norm", "attention.k_norm": "self_attn.k_norm"},
    )

    def config(self, model: ModelConfig, vocab_size: int, specials: dict[str, int]) -> dict:
        """The contents of config.json. Documents begin and end with the same mark."""
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": self.model_type,
            "vocab_size": vocab_size,
            "hidden_size": model.width,
            "num_hidden_layers": model.layers,
            "num_attention_heads": model.heads,
            "num_key_value_heads": model.KV,
            "head_dim": model.E,
            "intermediate_size": model.mlp_width,
            "hidden_act": "silu",
            "max_position_embeddings": model.max_positions,
            **rope_keys(model.rope_theta),
            "rms_norm_eps": model.norm_eps,
            "attention_bias": False,
            "attention_dropout": model.dropout,  # ours also drops after the two branches, where Qwen3 has no dropout
            "use_sliding_window": False,
            "initializer_range": model.init_std,
            "tie_word_embeddings": model.tie_embeddings,
            "bos_token_id": end_mark(specials),
            "eos_token_id": end_mark(specials),
            "pad_token_id": specials["pad"],
            **FP32,
        }

    def shape(self, config: dict) -> dict:
        return grouped_shape(config) | {"head_width": config["head_dim"]}
