"""Llama, a decoder, and EuroBERT, an encoder: the same weights with causal attention and without.

They are `LlamaForCausalLM` (Touvron et al. 2023, arXiv:2302.13971) and `EuroBertForMaskedLM` (Boizard et al. 2025,
arXiv:2503.05500) of transformers. A model that was trained with both objectives can be exported as either.
"""

from pretrain.dialects import cards
from pretrain.dialects.dialect import Dialect, decoder_marks, divided_width, grouped_config, grouped_shape
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
    """The rules that hold for the encoder and the decoder alike."""

    names = NAMES

    def shape(self, config: dict) -> dict:
        own = {"head_width": config["head_dim"]} | ({"bias": config["attention_bias"]} if "bias" in self.free else {})
        return grouped_shape(config) | own

    def further_objections(self, model: ModelConfig) -> list[str]:
        return divided_width(model, self.name)

    def config(self, model: ModelConfig, vocab_size: int, specials: dict[str, int]) -> dict:
        """The contents of config.json, without the names of the architecture and the special tokens."""
        biases = {"attention_bias": model.bias, "mlp_bias": model.bias}
        return grouped_config(model, vocab_size) | {"head_dim": model.E} | biases


class Llama(_Either):
    """`LlamaForCausalLM`."""

    name = "llama"
    model_type = "llama"
    auto_class = "AutoModelForCausalLM"
    pipeline = "text-generation"
    card = cards.decoder("A Llama decoder")
    wanted = WANTED | {"causal": True}
    free = {"kv_heads", "head_width", "bias", "tie_embeddings", "rope_scaling"}

    def config(self, model: ModelConfig, vocab_size: int, specials: dict[str, int]) -> dict:
        """The contents of config.json."""
        own = {"architectures": ["LlamaForCausalLM"], "model_type": self.model_type}
        return super().config(model, vocab_size, specials) | own | decoder_marks(specials)


class EuroBert(_Either):
    """`EuroBertForMaskedLM`."""

    name = "eurobert"
    model_type = "eurobert"
    needs = ("cls", "sep", "mask")
    auto_class = "AutoModelForMaskedLM"
    pipeline = "fill-mask"
    card = cards.encoder("A EuroBERT encoder", POOLING)
    wanted = WANTED | {"causal": False, "bias": False}  # with biases its head would have one too
    free = {"kv_heads", "head_width", "tie_embeddings", "rope_scaling"}

    def config(self, model: ModelConfig, vocab_size: int, specials: dict[str, int]) -> dict:
        """The contents of config.json."""
        own: dict[str, object] = {"architectures": ["EuroBertForMaskedLM"], "model_type": self.model_type}
        marks = {"bos_token_id": specials["cls"], "eos_token_id": specials["sep"], "mask_token_id": specials["mask"]}
        own |= {"pad_token_id": specials["pad"], "classifier_pooling": "mean"}
        return super().config(model, vocab_size, specials) | own | marks
