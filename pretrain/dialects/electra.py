"""ELECTRA (Clark et al. 2020, arXiv:2003.10555), as `ElectraForPreTraining` of transformers has it.

The folder holds the discriminator. The generator is not exported: it has done its work.
"""

from typing import TYPE_CHECKING

from pretrain.dialects import cards
from pretrain.dialects.bert import Bert
from pretrain.dialects.names import Names
from pretrain.model.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

CARD = cards.detector(
    "An ELECTRA encoder",
    """\
**Segment types were not trained.** Both embeddings are zero. The model tells a second text (`token_type_ids` 1) from
the first only after fine-tuning has trained them.""",
    """\
**Dropout** is as in pre-training, {dropout:g}. Fine-tuning on little data may need more:
`from_pretrained(folder, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)`.""",
)


class Electra(Bert):
    """`ElectraForPreTraining`."""

    name = "electra"
    model_type = "electra"
    architecture = "ElectraForPreTraining"
    auto_class = "AutoModelForPreTraining"
    pipeline = "feature-extraction"
    card = CARD
    wanted = Bert.wanted | {"transform_head": False}
    free = Bert.free | {"embed_width", "generator"}
    segments = "electra.embeddings.token_type_embeddings.weight"
    names = Names(
        outside={
            "embed": "electra.embeddings.word_embeddings",
            "embed_position": "electra.embeddings.position_embeddings",
            "embed_norm": "electra.embeddings.LayerNorm",
            "embed_project": "electra.embeddings_project",
            "head.dense": "discriminator_predictions.dense",
            "head.replaced": "discriminator_predictions.dense_prediction",
        },
        layer="electra.encoder.layer",
        inside=Bert.names.inside,
    )

    def config(self, model: ModelConfig, vocab_size: int, specials: dict[str, int]) -> dict:
        """The contents of config.json."""
        return super().config(model, vocab_size, specials) | {"embedding_size": model.D}

    def shape(self, config: dict) -> dict:
        return super().shape(config) | {"embed_width": config["embedding_size"]}

    def further_objections(self, model: ModelConfig) -> list[str]:
        lines = super().further_objections(model)
        return (
            lines
            if model.generator
            else [*lines, "model.generator = null: electra has a discriminator, trained with one"]
        )

    def weights(self, model: ModelConfig, ours: "dict[str, Tensor]") -> "dict[str, Tensor]":
        """Our tensors without those of the generator."""
        kept = {name: tensor for name, tensor in ours.items() if not name.startswith("generator.")}
        return super().weights(model, kept)
