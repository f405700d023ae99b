"""BERT, the classic encoder (Devlin et al. 2018, arXiv:1810.04805), as `BertForMaskedLM` of transformers has it.

BERT has two parts that our model does not have. Its embeddings of segment types are written as zeros. Its pooler is
left out of the file, so transformers starts it at random and says so.
"""

from typing import TYPE_CHECKING

from pretrain.dialects.dialect import Dialect
from pretrain.dialects.naming import differences, rename
from pretrain.model.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

CARD = """\
{front}
# A BERT encoder

{size}

```python
from transformers import AutoModelForMaskedLM, AutoTokenizer

folder = "path/to/this/folder"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForMaskedLM.from_pretrained(folder)
```

## Good to know

- **The pooler was not trained** and is not in the file. Classes that use it, such as `BertForSequenceClassification`,
  start it at random and say so; fine-tuning trains it.
- **Segment types were not trained.** Both embeddings are zero. The model tells a second text (`token_type_ids` 1) from
  the first only after fine-tuning has trained them.
- **Length.** {length}
  Later positions were never trained.
- **Dropout** is as in pre-training, {dropout:g}. Fine-tuning on little data may need more:
  `from_pretrained(folder, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)`.
- **Marks inside text.** In the corpus the characters `{end}` were text. transformers reads them as the mark, unless you
  call `tokenizer(text, split_special_tokens=True)`. `{mask}` needs the default.
"""

SEGMENT_TYPES = 2

OUTSIDE = {
    "embed": "bert.embeddings.word_embeddings",
    "embed_position": "bert.embeddings.position_embeddings",
    "embed_norm": "bert.embeddings.LayerNorm",
    "head.dense": "cls.predictions.transform.dense",
    "head.norm": "cls.predictions.transform.LayerNorm",
    "head.decoder": "cls.predictions",  # only the bias: the weight is the word embedding
}
INSIDE = {  # the modules of each layer
    "attention.q": "attention.self.query",
    "attention.k": "attention.self.key",
    "attention.v": "attention.self.value",
    "attention.out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "mlp.up": "intermediate.dense",
    "mlp.down": "output.dense",
    "mlp_norm": "output.LayerNorm",
}


class Bert(Dialect):
    """`BertForMaskedLM`."""

    tokenizer_kind = "bert"
    auto_class = "AutoModelForMaskedLM"
    pipeline = "fill-mask"
    card = CARD
    wanted = {
        "causal": False,
        "norm": "layernorm",
        "norm_position": "post",
        "norm_eps": 1e-12,
        "positions": "learned",
        "mlp": "gelu",  # the exact GELU, computed with erf
        "bias": True,
        "qk_norm": False,
        "tie_embeddings": True,
        "transform_head": True,
    }

    def objections(self, model: ModelConfig) -> list[str]:
        """A line for each key with a value that BERT cannot have; no lines if the model is a BERT."""
        lines = differences(model, "bert", self.wanted)
        if model.heads != model.KV:
            lines.append(f"model.kv_heads = {model.kv_heads}: bert has as many as model.heads, {model.heads}")
        if model.E * model.heads != model.width:
            lines.append(
                f"model.head_width = {model.E}: bert has model.width / model.heads, {model.width} / {model.heads}"
            )
        return lines

    def config(self, model: ModelConfig, vocab_size: int, specials: dict[str, int]) -> dict:
        """The contents of config.json."""
        return {
            "architectures": ["BertForMaskedLM"],
            "model_type": "bert",
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
            "dtype": "float32",
            "torch_dtype": "float32",  # the name of `dtype` in transformers 4
        }

    def weights(self, model: ModelConfig, ours: "dict[str, Tensor]") -> "dict[str, Tensor]":
        """Our tensors under BERT's names."""
        theirs = rename(ours, model.layers, OUTSIDE, "bert.encoder.layer", INSIDE)
        theirs["bert.embeddings.token_type_embeddings.weight"] = ours["embed.weight"].new_zeros(
            SEGMENT_TYPES, model.width
        )
        return theirs
