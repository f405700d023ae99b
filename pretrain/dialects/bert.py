"""BERT, the classic encoder (Devlin et al. 2018, arXiv:1810.04805), as `BertForMaskedLM` of transformers has it.

BERT has two parts that our model does not have. Its embeddings of segment types are written as zeros. Its pooler is
left out of the file, so transformers starts it at random and says so.
"""

from typing import TYPE_CHECKING, ClassVar

from pretrain.dialects import cards
from pretrain.dialects.dialect import FP32, Dialect, even_heads, ungrouped_heads
from pretrain.dialects.names import Names
from pretrain.model.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

CARD = cards.encoder(
    "A BERT encoder",
    """\
**The pooler was not trained** and is not in the file. Classes that use it, such as `BertForSequenceClassification`,
start it at random and say so; fine-tuning trains it.""",
    """\
**Segment types were not trained.** Both embeddings are zero. The model tells a second text (`token_type_ids` 1) from
the first only after fine-tuning has trained them.""",
    """\
**Dropout** is as in pre-training, {dropout:g}. Fine-tuning on little data may need more:
`from_pretrained(folder, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)`.""",
)

SEGMENT_TYPES = 2


class Bert(Dialect):
    """`BertForMaskedLM`."""

    name = "bert"
    model_type = "bert"
    architecture: ClassVar[str] = "BertForMaskedLM"
    segments: ClassVar[str] = "bert.embeddings.token_type_embeddings.weight"
    needs = ("cls", "sep", "mask")
    auto_class = "AutoModelForMaskedLM"
    pipeline = "fill-mask"
    card = CARD
    wanted = {
        "causal": False,
        "norm": "layernorm",
        "norm_position": "post",
        "norm_eps": 1e-12,  # the head's norm has it whatever config.json says
        "embed_norm": True,
        "positions": "learned",
        "mlp": "gelu",  # the exact GELU, computed with erf
        "bias": True,
        "transform_head": True,
    }
    free = {"kv_heads", "head_width"}
    names = Names(
        outside={
            "embed": "bert.embeddings.word_embeddings",
            "embed_position": "bert.embeddings.position_embeddings",
            "embed_norm": "bert.embeddings.LayerNorm",
            "head.dense": "cls.predictions.transform.dense",
            "head.norm": "cls.predictions.transform.LayerNorm",
            "head.decoder": "cls.predictions",  # only the bias: the weight is the word embedding
        },
        layer="bert.encoder.layer",
        inside={
            "attention.q": "attention.self.query",
            "attention.k": "attention.self.key",
            "attention.v": "attention.self.value",
            "attention.out": "attention.output.dense",
            "attention_norm": "attention.output.LayerNorm",
            "mlp.up": "intermediate.dense",
            "mlp.down": "output.dense",
            "mlp_norm": "output.LayerNorm",
        },
    )

    def further_objections(self, model: ModelConfig) -> list[str]:
        return ungrouped_heads(model, self.name) + even_heads(model, self.name)

    def config(self, model: ModelConfig, vocab_size: int, specials: dict[str, int]) -> dict:
        """The contents of config.json."""
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "vocab_size": vocab_size,
            "hidden_size": model.width,
            "num_hidden_layers": model.layers,
            "num_attention_heads": model.heads,
            "intermediate_size": model.mlp_width,
            "hidden_act": "gelu",
            "hidden_dropout_prob": model.dropout,
            "attention_probs_dropout_prob": model.dropout,
            "max_position_embeddings": model.max_positions,
            "position_embedding_type": "absolute",  # only transformers 4 reads it
            "type_vocab_size": SEGMENT_TYPES,
            "initializer_range": model.init_std,
            "layer_norm_eps": model.norm_eps,
            "tie_word_embeddings": True,
            "pad_token_id": specials["pad"],
            **FP32,
        }

    def shape(self, config: dict) -> dict:
        return {
            "layers": config["num_hidden_layers"],
            "width": config["hidden_size"],
            "heads": config["num_attention_heads"],
            "mlp_width": config["intermediate_size"],
            "max_positions": config["max_position_embeddings"],
            "dropout": config["hidden_dropout_prob"],
            "init_std": config["initializer_range"],
        }

    def weights(self, model: ModelConfig, ours: "dict[str, Tensor]") -> "dict[str, Tensor]":
        """Our tensors under BERT's names, and embeddings of segment types that are zero."""
        theirs = super().weights(model, ours)
        theirs[self.segments] = ours["embed.weight"].new_zeros(SEGMENT_TYPES, model.D)
        return theirs

    def from_weights(
        self, model: ModelConfig, theirs: "dict[str, Tensor]", rows: dict[str, int]
    ) -> "dict[str, Tensor]":
        """The inverse of `weights`. The embedding of the first segment type is added to every position."""
        ours = super().from_weights(model, theirs, rows)
        if self.segments in theirs:
            ours["embed_position.weight"] = ours["embed_position.weight"] + theirs[self.segments][0]
        return ours
