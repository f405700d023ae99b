"""ModernBERT (Warner et al. 2024, arXiv:2412.13663), an encoder and a decoder with the same weights.

They are `ModernBertForMaskedLM` and `ModernBertDecoderForCausalLM` of transformers. A model that was trained with both
objectives can be exported as either.
"""

from typing import ClassVar

from pretrain.dialects import cards
from pretrain.dialects.dialect import FP32, Dialect, end_mark, even_heads, ungrouped_heads
from pretrain.dialects.names import Modules, Names
from pretrain.model.config import ModelConfig

WANTED = {
    "norm": "layernorm",
    "norm_position": "pre",
    "embed_norm": True,
    "first_norm": False,
    "positions": "rope",
    "mlp": "geglu",
    "transform_head": True,
}
FREE = {"kv_heads", "head_width", "window", "bias", "tie_embeddings"}
OUTSIDE = {
    "embed": "model.embeddings.tok_embeddings",
    "embed_norm": "model.embeddings.norm",
    "final_norm": "model.final_norm",
    "head.decoder": "decoder",
}
INSIDE: dict[Modules, str] = {
    "attention.out": "attn.Wo",
    "attention_norm": "attn_norm",
    ("mlp.gate", "mlp.up"): "mlp.Wi",
    "mlp.down": "mlp.Wo",
    "mlp_norm": "mlp_norm",
}
LOCAL = "**Local layers.** {local}"
POOLING = """\
**Classifiers take the mean of all tokens** (`classifier_pooling` in config.json), because no objective of pre-training
has taught `[CLS]` to stand for the text."""


class _Either(Dialect):
    """The rules that hold for the encoder and the decoder alike."""

    free = FREE
    inside: ClassVar[int]  # the tokens of half of `local_attention` that are not one's neighbours

    def shape(self, config: dict) -> dict:
        types, ropes = config["layer_types"], config["rope_parameters"]
        found = {
            "layers": config["num_hidden_layers"],
            "width": config["hidden_size"],
            "heads": config["num_attention_heads"],
            "mlp_width": config["intermediate_size"],
            "max_positions": config["max_position_embeddings"],
            "norm_eps": config["norm_eps"],
            "rope_theta": ropes["full_attention"]["rope_theta"],
            "bias": config["norm_bias"],
            "tie_embeddings": config["tie_word_embeddings"],
            "dropout": config["attention_dropout"],
            "init_std": config["initializer_range"],
        }
        if "sliding_attention" in types:
            others = [number for number, kind in enumerate(types) if number and kind == "full_attention"]
            found["window"] = config["local_attention"] // 2 - self.inside
            found["global_every"] = others[0] if others else len(types)
            found["local_rope_theta"] = ropes["sliding_attention"]["rope_theta"]
        return found

    def further_objections(self, model: ModelConfig) -> list[str]:
        return ungrouped_heads(model, self.name) + even_heads(model, self.name)

    def config(self, model: ModelConfig, vocab_size: int, specials: dict[str, int]) -> dict:
        """The contents of config.json. It has the layers that are local twice: for transformers 5 and for 4."""
        theta, local_theta = model.rope_theta, model.local_rope_theta or model.rope_theta
        local = ["full_attention" if model.window_of(i) is None else "sliding_attention" for i in range(model.layers)]
        end = end_mark(specials)
        begin = end if model.causal else specials["cls"]
        return {
            "vocab_size": vocab_size,
            "hidden_size": model.width,
            "num_hidden_layers": model.layers,
            "num_attention_heads": model.heads,
            "intermediate_size": model.mlp_width,
            "hidden_activation": "gelu",
            "classifier_activation": "gelu",  # of the head
            "max_position_embeddings": model.max_positions,
            "layer_types": local,
            "global_attn_every_n_layers": model.global_every if model.window else 1,
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": theta},
                "sliding_attention": {"rope_type": "default", "rope_theta": local_theta},
            },
            "global_rope_theta": theta,
            "local_rope_theta": local_theta,
            "norm_eps": model.norm_eps,
            "norm_bias": model.bias,
            "attention_bias": model.bias,
            "mlp_bias": model.bias,
            "classifier_bias": model.bias,
            "decoder_bias": True,
            "embedding_dropout": model.dropout,
            "attention_dropout": model.dropout,
            "mlp_dropout": 0.0,
            "initializer_range": model.init_std,
            "tie_word_embeddings": model.tie_embeddings,
            "pad_token_id": specials["pad"],
            "bos_token_id": begin,
            "cls_token_id": specials.get("cls", begin),
            "eos_token_id": end,
            "sep_token_id": end,
            **FP32,
        }


class ModernBert(_Either):
    """`ModernBertForMaskedLM`."""

    name = "modernbert"
    model_type = "modernbert"
    needs = ("cls", "sep", "mask")
    auto_class = "AutoModelForMaskedLM"
    pipeline = "fill-mask"
    card = cards.encoder("A ModernBERT encoder", POOLING, LOCAL)
    wanted = WANTED | {"causal": False}
    inside = 0
    names = Names(
        outside=OUTSIDE | {"head.dense": "head.dense", "head.norm": "head.norm"},
        layer="model.layers",
        inside={("attention.q", "attention.k", "attention.v"): "attn.Wqkv", **INSIDE},
    )

    def config(self, model: ModelConfig, vocab_size: int, specials: dict[str, int]) -> dict:
        """The contents of config.json. `local_attention` counts the tokens on both sides."""
        own = {"architectures": ["ModernBertForMaskedLM"], "model_type": self.model_type}
        window = {"local_attention": 2 * (model.window + self.inside)} if model.window else {}
        return own | super().config(model, vocab_size, specials) | window | {"classifier_pooling": "mean"}


class ModernBertDecoder(_Either):
    """`ModernBertDecoderForCausalLM`."""

    name = "modernbert_decoder"
    model_type = "modernbert-decoder"
    auto_class = "AutoModelForCausalLM"
    pipeline = "text-generation"
    card = cards.decoder("A ModernBERT decoder", LOCAL)
    wanted = WANTED | {"causal": True}
    inside = 1  # the token itself
    names = Names(
        outside=OUTSIDE | {"head.dense": "lm_head.dense", "head.norm": "lm_head.norm"},
        layer="model.layers",
        inside={
            "attention.q": "attn.q_proj",
            "attention.k": "attn.k_proj",
            "attention.v": "attn.v_proj",
            **INSIDE,
        },
    )

    def config(self, model: ModelConfig, vocab_size: int, specials: dict[str, int]) -> dict:
        """The contents of config.json. A token sees `local_attention` / 2 tokens: itself and those before it."""
        own = {"architectures": ["ModernBertDecoderForCausalLM"], "model_type": self.model_type}
        window = {"local_attention": 2 * (model.window + self.inside)} if model.window else {}
        return own | super().config(model, vocab_size, specials) | window
