"""The contract of a dialect: an architecture of transformers in which a model can be exported."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from pretrain.config import Config
from pretrain.dialects.names import Names
from pretrain.errors import ConfigError
from pretrain.model.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

# Keys of the section `model` that every dialect can express: sizes, numbers of config.json, where weights come from.
SIZES = {
    *("layers", "width", "heads", "mlp_width", "max_positions", "norm_eps", "dropout"),
    *("init_std", "width_base", "depth_base", "vocab_multiple", "init_from"),
}
# These change nothing without a window, and without rope; a dialect has them if it has these.
DEPENDENT = {"global_every", "local_rope_theta", "rope_theta"}


class Dialect(ABC):
    """The rules that turn our model into a model of transformers. One module defines all of them.

    A dialect must import neither torch nor transformers at the top of its module, because a run asks its dialect before
    it loads either. A key of the section `model` that is neither `wanted` nor `free` must have its default.
    """

    name: ClassVar[str]  # as in `DIALECTS` and in messages
    model_type: ClassVar[str]  # the name of the architecture in config.json
    needs: ClassVar[tuple[str, ...]] = ()  # the roles of special tokens that the tokenizer must have
    auto_class: ClassVar[str]  # the class of transformers that opens the exported model
    pipeline: ClassVar[str]  # the task under which the Hugging Face hub lists it
    card: ClassVar[str]  # the dialect's text of the model card, with the fields of export/card.py in braces
    wanted: ClassVar[dict[str, object]]  # the values that the dialect requires, by key of the section `model`
    free: ClassVar[set[str]]  # the keys that may have any value, besides the sizes
    names: ClassVar[Names]  # the names of its weights

    def objections(self, model: ModelConfig) -> list[str]:
        """A line such as `model.norm = rmsnorm: bert has layernorm` for each key that the dialect cannot express."""
        defaults = {key: field.default for key, field in ModelConfig.model_fields.items()} | {"embed_norm": False}
        wanted = defaults | self.wanted
        found = {key: getattr(model, key) for key in wanted} | {"embed_norm": model.normalizes_embeddings}
        compared = wanted.keys() - self.free - SIZES.difference(self.wanted) - DEPENDENT
        if model.embed_norm is None and found["norm_position"] != wanted["norm_position"]:
            compared -= {"embed_norm"}  # it follows from the other key
        lines = [
            f"model.{key} = {_as_yaml(found[key])}: {self.name} has {_as_yaml(wanted[key])}"
            for key in wanted
            if key in compared and found[key] != wanted[key]
        ]
        return lines + self.further_objections(model)

    def further_objections(self, model: ModelConfig) -> list[str]:
        """Lines about keys that `free` has, for values that the dialect cannot express."""
        return []

    @abstractmethod
    def config(self, model: ModelConfig, vocab_size: int, specials: dict[str, int]) -> dict:
        """The contents of config.json. `specials`: ids of special tokens by role."""

    def shape(self, config: dict) -> dict:
        """The values of the section `model` that are not `wanted`, from a config.json: the inverse of `config`.

        `config` has all keys, also those with the defaults of transformers.
        """
        raise ConfigError(f"a folder of dialect {self.name} cannot be read", "the dialect does not define `shape`")

    def aside(self, config: dict) -> set[str]:
        """The keys of a config.json that say nothing of the model beside its other keys."""
        return set()

    def weights(self, model: ModelConfig, ours: "dict[str, Tensor]") -> "dict[str, Tensor]":
        """Our tensors under the names of transformers."""
        return self.names.theirs(ours, model.layers)

    def from_weights(
        self, model: ModelConfig, theirs: "dict[str, Tensor]", rows: dict[str, int]
    ) -> "dict[str, Tensor]":
        """The inverse of `weights`. `rows`: the first dimension of each of our tensors, by name."""
        return self.names.ours(theirs, model.layers, rows)


def even_heads(model: ModelConfig, name: str) -> list[str]:
    """A line if the heads of a model are not as wide as its width divided by their number."""
    if model.E * model.heads == model.width:
        return []
    return [f"model.head_width = {model.E}: {name} has model.width / model.heads, {model.width} / {model.heads}"]


def ungrouped_heads(model: ModelConfig, name: str) -> list[str]:
    """A line if the heads of keys and values are fewer than those of queries."""
    if model.heads == model.KV:
        return []
    return [f"model.kv_heads = {model.kv_heads}: {name} has as many as model.heads, {model.heads}"]


def divided_width(model: ModelConfig, name: str) -> list[str]:
    """A line if the width does not divide by the number of heads, which transformers checks for any width of a head."""
    if model.width % model.heads == 0:
        return []
    return [f"model.width = {model.width}: {name} needs a multiple of model.heads, {model.heads}"]


def end_mark(specials: dict[str, int]) -> int:
    """The id of the mark that ends a document."""
    return specials["eod"] if "eod" in specials else specials["sep"]


def decoder_marks(specials: dict[str, int]) -> dict:
    """The special tokens of a decoder in config.json. Documents begin and end with the same mark."""
    return {"bos_token_id": end_mark(specials), "eos_token_id": end_mark(specials), "pad_token_id": specials["pad"]}


def grouped_config(model: ModelConfig, vocab_size: int) -> dict:
    """The keys of config.json that Llama and its relatives name alike, for a model without biases in attention."""
    rotations: dict[str, object] = {"rope_type": "default", "rope_theta": model.rope_theta}
    scaling = model.rope_scaling
    if scaling:
        rotations |= {"rope_type": scaling.kind, "factor": model.max_positions / scaling.original_positions}
        rotations |= {"original_max_position_embeddings": scaling.original_positions}
    return {
        "vocab_size": vocab_size,
        "hidden_size": model.width,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.KV,
        "intermediate_size": model.mlp_width,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_positions,
        "rope_parameters": rotations,
        "rope_theta": model.rope_theta,  # transformers 4 reads it here
        **({"rope_scaling": rotations} if scaling else {}),  # and the rest here
        "rms_norm_eps": model.norm_eps,
        "attention_bias": False,
        "attention_dropout": model.dropout,  # ours also drops after the two branches, where these have no dropout
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tie_embeddings,
        **FP32,
    }


def grouped_shape(config: dict) -> dict:
    """The values of the section `model` that Llama and its relatives name alike in config.json."""
    rotations = config["rope_parameters"]
    original = rotations.get("original_max_position_embeddings")
    return {
        "layers": config["num_hidden_layers"],
        "width": config["hidden_size"],
        "heads": config["num_attention_heads"],
        "kv_heads": config["num_key_value_heads"],
        "mlp_width": config["intermediate_size"],
        "max_positions": config["max_position_embeddings"],
        "norm_eps": config["rms_norm_eps"],
        "rope_theta": rotations["rope_theta"],
        "rope_scaling": {"kind": "yarn", "original_positions": original} if rotations["rope_type"] == "yarn" else None,
        "tie_embeddings": config["tie_word_embeddings"],
        "dropout": config["attention_dropout"],
        "init_std": config["initializer_range"],
    }


FP32 = {"dtype": "float32", "torch_dtype": "float32"}  # transformers 4 has the second name


def _as_yaml(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, Config):
        return str(value.model_dump(mode="json"))
    return str(value).lower() if isinstance(value, bool) else str(value)
