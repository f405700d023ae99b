"""Qwen3, a decoder (Qwen team 2025, arXiv:2505.09388), as `Qwen3ForCausalLM` of transformers has it."""

from torch import Tensor

from pretrain.dialects.naming import differences, rename
from pretrain.model.transformer import ModelConfig

TOKENIZER_KIND = "byte"

WANTED = {
    "causal": True,
    "norm": "rmsnorm",
    "norm_position": "pre",
    "positions": "rope",
    "mlp": "swiglu",
    "bias": False,
    "qk_norm": True,
    "transform_head": False,
}

OUTSIDE = {"embed": "model.embed_tokens", "final_norm": "model.norm", "head.decoder": "lm_head"}
INSIDE = {  # of each layer
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "attention_norm": "input_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
    "mlp_norm": "post_attention_layernorm",
}


def objections(model: ModelConfig) -> list[str]:
    """Why this model is no Qwen3, one line per key; empty if it is one."""
    return differences(model, "qwen3", WANTED)


def config(model: ModelConfig, vocab_size: int, specials: dict[str, int]) -> dict:
    """What config.json says. Documents begin and end at the same mark."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": vocab_size,
        "hidden_size": model.width,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.KV,
        "head_dim": model.E,
        "intermediate_size": model.mlp_width,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_positions,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "rope_theta": model.rope_theta,  # its place in transformers 4
        "rms_norm_eps": model.norm_eps,
        "attention_bias": False,
        "attention_dropout": model.dropout,  # Qwen3 has none elsewhere; ours also drops after the two branches
        "use_sliding_window": False,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tie_embeddings,
        "bos_token_id": specials["eod"],
        "eos_token_id": specials["eod"],
        "pad_token_id": specials["pad"],
        "dtype": "float32",
        "torch_dtype": "float32",  # its name in transformers 4
    }


def weights(model: ModelConfig, ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under Qwen3's names."""
    return rename(ours, model.layers, OUTSIDE, "model.layers", INSIDE)
