"""T5 1.1 (Raffel et al. 2019, arXiv:1910.10683; Shazeer 2020, arXiv:2002.05202), an encoder and a decoder.

It is `T5ForConditionalGeneration` of transformers with the gated feed-forward network and outputs that are not scaled.
"""

from typing import TYPE_CHECKING

from pretrain.dialects import cards
from pretrain.dialects.dialect import FP32, Dialect, end_mark, ungrouped_heads
from pretrain.dialects.names import Modules, Names
from pretrain.model.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

BUCKETS, FARTHEST = 32, 128  # kinds of distances, and the largest that is told apart, as in `RelativeBias`


def _inside(mlp: int, others: dict[Modules, str]) -> dict[Modules, str]:
    """The names inside of a block whose part number `mlp` is the feed-forward network."""
    attention: dict[Modules, str] = {
        f"attention.{ours}": f"layer.0.SelfAttention.{theirs}" for ours, theirs in zip(OURS, THEIRS, strict=True)
    }
    return (
        attention
        | others
        | {
            "attention_norm": "layer.0.layer_norm",
            "mlp.gate": f"layer.{mlp}.DenseReluDense.wi_0",
            "mlp.up": f"layer.{mlp}.DenseReluDense.wi_1",
            "mlp.down": f"layer.{mlp}.DenseReluDense.wo",
            "mlp_norm": f"layer.{mlp}.layer_norm",
        }
    )


OURS, THEIRS = ("q", "k", "v", "out"), ("q", "k", "v", "o")
CROSS: dict[Modules, str] = {
    **{f"cross.{ours}": f"layer.1.EncDecAttention.{theirs}" for ours, theirs in zip(OURS, THEIRS, strict=True)},
    "cross_norm": "layer.1.layer_norm",
}
BIAS = "block.0.layer.0.SelfAttention.relative_attention_bias"
DECODER = Names(
    outside={"position_bias.table": f"decoder.{BIAS}", "final_norm": "decoder.final_layer_norm"},
    layer="decoder.block",
    inside=_inside(2, CROSS),
)


class T5(Dialect):
    """`T5ForConditionalGeneration`."""

    name = "t5"
    model_type = "t5"
    auto_class = "AutoModelForSeq2SeqLM"
    pipeline = "text2text-generation"
    card = cards.text_to_text("A T5 encoder and decoder")
    wanted = {
        "causal": False,
        "norm": "rmsnorm",
        "norm_position": "pre",
        "positions": "relative",
        "mlp": "geglu_tanh",
        "bias": False,
        "transform_head": False,
    }
    free = {"kv_heads", "head_width", "tie_embeddings", "decoder_layers"}
    names = Names(
        outside={
            "embed": "shared",
            "position_bias.table": f"encoder.{BIAS}",
            "final_norm": "encoder.final_layer_norm",
            "head.decoder": "lm_head",
        },
        layer="encoder.block",
        inside=_inside(1, {}),
    )

    def further_objections(self, model: ModelConfig) -> list[str]:
        lines = ungrouped_heads(model, self.name)
        if not model.decoder_layers:
            lines.append("model.decoder_layers = null: t5 has a decoder")
        elif model.decoder_layers > model.layers:  # `generate` of 4.57.6 and 5.24.0 ends with an IndexError
            lines.append(
                f"model.decoder_layers = {model.decoder_layers}: when a t5 writes, transformers remembers keys and "
                f"values of as many layers as the encoder has, {model.layers}"
            )
        return lines

    def config(self, model: ModelConfig, vocab_size: int, specials: dict[str, int]) -> dict:
        """The contents of config.json. The head is always in the file, whether or not it is the token embedding."""
        return {
            "architectures": ["T5ForConditionalGeneration"],
            "model_type": self.model_type,
            "is_encoder_decoder": True,
            "vocab_size": vocab_size,
            "d_model": model.width,
            "d_kv": model.E,
            "d_ff": model.mlp_width,
            "num_layers": model.layers,
            "num_decoder_layers": model.decoder_layers,
            "num_heads": model.heads,
            "relative_attention_num_buckets": BUCKETS,
            "relative_attention_max_distance": FARTHEST,
            "dropout_rate": model.dropout,
            "layer_norm_epsilon": model.norm_eps,
            "feed_forward_proj": "gated-gelu",
            "n_positions": model.max_positions,
            "tie_word_embeddings": False,  # with true, outputs are scaled as in T5 1.0
            "scale_decoder_outputs": False,
            "decoder_start_token_id": specials["pad"],
            "pad_token_id": specials["pad"],
            "eos_token_id": end_mark(specials),
            **FP32,
        }

    def shape(self, config: dict) -> dict:
        return {
            "layers": config["num_layers"],
            "decoder_layers": config["num_decoder_layers"],
            "width": config["d_model"],
            "heads": config["num_heads"],
            "head_width": config["d_kv"],
            "mlp_width": config["d_ff"],
            "max_positions": config.get("n_positions", 512),
            "norm_eps": config["layer_norm_epsilon"],
            "dropout": config["dropout_rate"],
            "tie_embeddings": False,
        }

    def aside(self, config: dict) -> set[str]:
        """transformers 5 says by another key whether outputs are scaled, and always that the head is tied."""
        return {"tie_word_embeddings"} if "scale_decoder_outputs" in config else set()

    def weights(self, model: ModelConfig, ours: "dict[str, Tensor]") -> "dict[str, Tensor]":
        encoder = {name: tensor for name, tensor in ours.items() if not name.startswith("decoder.")}
        decoder = {name.removeprefix("decoder."): ours[name] for name in ours.keys() - encoder.keys()}
        if model.tie_embeddings:
            encoder["head.decoder.weight"] = ours["embed.weight"].clone()
        assert model.decoder_layers is not None
        return self.names.theirs(encoder, model.layers) | DECODER.theirs(decoder, model.decoder_layers)

    def from_weights(
        self, model: ModelConfig, theirs: "dict[str, Tensor]", rows: dict[str, int]
    ) -> "dict[str, Tensor]":
        assert model.decoder_layers is not None
        if "lm_head.weight" not in theirs:  # tied, and so not in the file
            theirs = {**theirs, "lm_head.weight": theirs["shared.weight"]}
        encoder = self.names.ours(theirs, model.layers, rows)
        if model.tie_embeddings:
            encoder.pop("head.decoder.weight", None)
        decoder = DECODER.ours(theirs, model.decoder_layers, rows)
        return encoder | {f"decoder.{name}": tensor for name, tensor in decoder.items()}
