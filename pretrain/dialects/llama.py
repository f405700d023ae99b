"""Llama, a decoder, and EuroBERT, an encoder: the same weights with causal attention and without.

They are `LlamaForCausalLM` (Touvron et al. 2023, arXiv:2302.13971) and `EuroBertForMaskedLM` (Boizard et al. 2025,
arXiv:2503.05500) of transformers. A model that was trained with both objectives can be exported as either.
"""

from pretrain.dialects import cards
from pretrain.dialects.dialect import FP32, Dialect, divided_width, end_mark, grouped_shape, rope_keys
from pretrain.dialects.modernbert import POOLING
from pretrain.dialects.names import Names
from pretrain.model.config import ModelConfig

WANTED = {
    "norm": "rmsnorm",
    "norm_position": "pre",
    "positions": "rope",
    "mlp": "swiglu",
    "transform_head": False,
}
NAMES = Names(
    outside={"embed": "model.embed_tokens", "final_norm": "model.norm", "head.decoder": "lm_head"},
    layer="model.layers",
    inside={
        "attention.q": "self_attn.q_proj",
        "attention.k": "self_attn.k_proj",
        "attention.v": "self_attn.v_proj",
        "attention.out": "self_attn.o_proj",
        "attention_norm": "input_layernorm",
        "mlp.gate": "mlp.gate_proj",
        "mlp.up": "mlp.up_proj",
        "mlp.down": "mlp.down_proj",
        "mlp_norm": "post_attention_layernorm",
    },
)


class _Either(Dialect):
    """What the encoder and the decoder have in common."""

    names = NAMES

    def shape(self, config: dict) -> dict:
        own = {"head_width": config["head_dim"]} | ({"bias": config["attention_bias"]} if "bias" in self.free else {})
        return grouped_shape(config) | own

    def further_objections(self, model: ModelConfig) -> list[str]:
        return divided_width(model, self.name)

    def config(self, model: ModelConfig, vocab_size: int, specials: dict[str, int]) -> dict:
        """The contents of config.json, without the names of the architecture and the special tokens."""
        return {
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
            "attention_bias": model.bias,
            "mlp_bias": model.bias,
            "attention_dropout": model.dropout,  # ours also drops after the two branches, where Llama has no dropout
            "initializer_range": model.init_std,
            "tie_word_embeddings": model.tie_embeddings,
            "pad_token_id": specials["pad"],
            **FP32,
        }


class Llama(_Either):
    """`LlamaForCausalLM`."""

    name = "llama"
    model_type = "llama"
    auto_class = "AutoModelForCausalLM"
    pipeline = "text-generation"
    card = cards.decoder("A Llama decoder")
    wanted = WANTED | {"causal": True}
    free = {"kv_heads", "head_width", "bias", "tie_embeddings"}

    def config(self, model: ModelConfig, vocab_size: int, specials: dict[str, int]) -> dict:
        """The contents of config.json. Documents begin and end with the same mark."""
        own = {"architectures": ["LlamaForCausalLM"], "model_type": self.model_type}
        marks = {"bos_token_id": end_mark(specials), "eos_token_id": end_mark(specials)}
        return own | super().config(model, vocab_size, specials) | marks


class EuroBert(_Either):
    """`EuroBertForMaskedLM`."""

    name = "eurobert"
    model_type = "eurobert"
    needs = ("cls", "sep", "mask")
    auto_class = "AutoModelForMaskedLM"
    pipeline = "fill-mask"
    card = cards.encoder("A EuroBERT encoder", POOLING)
    wanted = WANTED | {"causal": False, "bias": False}  # with biases its head would have one too
    free = {"kv_heads", "head_width", "tie_embeddings"}

    def config(self, model: ModelConfig, vocab_size: int, specials: dict[str, int]) -> dict:
        """The contents of config.json."""
        own = {"architectures": ["EuroBertForMaskedLM"], "model_type": self.model_type}
        marks = {"bos_token_id": specials["cls"], "eos_token_id": specials["sep"], "mask_token_id": specials["mask"]}
        return own | super().config(model, vocab_size, specials) | marks | {"classifier_pooling": "mean"}
