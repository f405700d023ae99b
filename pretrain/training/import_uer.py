"""Import a BERT of UER-py or TencentPretrain as a Hugging Face folder, which `model.init_from` and `finetune` open.

    weights: models/google_zh_model.bin       what their trainer saved
    config: models/bert/base_config.json      its shape
    vocab: models/google_zh_vocab.txt
    out: runs/google_zh

Their LayerNorm divides by the standard deviation of a sample, with D - 1 in the denominator, and BERT's by that with D.
The imported weights of norms are therefore theirs times √((D - 1) / D), and the folder computes what their code
computes. Their own conversion script leaves this out: at width 768 each norm is then too large by 0.065 %.

Their row 0 of segment types stands for padding. The first text has row 1, which is row 0 in the folder.
"""

import json
import math
import pickle
import re
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.config import StageConfig
from pretrain.dialects import DIALECTS
from pretrain.errors import ConfigError
from pretrain.model.config import ModelConfig
from pretrain.storage.files import write_json
from pretrain.storage.index import write_index
from pretrain.storage.publish import publish
from pretrain.tokenizer.adopt import opened
from pretrain.tokenizer.kinds import SPECIALS, template

if TYPE_CHECKING:
    from torch import Tensor

# Keys of their config that decide the arithmetic, each with the values that BERT has. A key that is absent has them.
BERT = {
    "encoder": ("transformer",),
    "mask": ("fully_visible",),
    "hidden_act": ("gelu",),
    "feed_forward": ("dense",),
    "layernorm": ("normal",),
    "layernorm_positioning": ("post",),
    "decoder": (None,),
    **dict.fromkeys(
        (
            *("relative_position_embedding", "rotary_position_embedding", "alibi_position_embedding"),
            *("factorized_embedding_parameterization", "parameter_sharing", "has_residual_attention"),
            *("remove_embedding_layernorm", "remove_transformer_bias", "remove_attention_scale"),
            "layer_number_scale",
        ),
        (False, None),
    ),
}
SIZES = ("layers_num", "hidden_size", "heads_num", "feedforward_size")

# Names of UER-py before July 2023, and today's.
OLDER = {
    r"^target\.mlm_linear_": "target.mlm.linear_",
    r"^target\.layer_norm\.": "target.mlm.layer_norm.",
    r"^target\.(nsp|sp)_linear_": "target.sp.linear_",
}
# Their names and BERT's. `(\d+)` is the number of a layer.
NAMES = {
    r"embedding\.word\.embedding": "bert.embeddings.word_embeddings",
    r"embedding\.pos\.embedding": "bert.embeddings.position_embeddings",
    r"embedding\.seg\.embedding": "bert.embeddings.token_type_embeddings",
    r"embedding\.layer_norm": "bert.embeddings.LayerNorm",
    r"encoder\.transformer\.(\d+)\.self_attn\.linear_layers\.0": r"bert.encoder.layer.\1.attention.self.query",
    r"encoder\.transformer\.(\d+)\.self_attn\.linear_layers\.1": r"bert.encoder.layer.\1.attention.self.key",
    r"encoder\.transformer\.(\d+)\.self_attn\.linear_layers\.2": r"bert.encoder.layer.\1.attention.self.value",
    r"encoder\.transformer\.(\d+)\.self_attn\.final_linear": r"bert.encoder.layer.\1.attention.output.dense",
    r"encoder\.transformer\.(\d+)\.layer_norm_1": r"bert.encoder.layer.\1.attention.output.LayerNorm",
    r"encoder\.transformer\.(\d+)\.feed_forward\.linear_1": r"bert.encoder.layer.\1.intermediate.dense",
    r"encoder\.transformer\.(\d+)\.feed_forward\.linear_2": r"bert.encoder.layer.\1.output.dense",
    r"encoder\.transformer\.(\d+)\.layer_norm_2": r"bert.encoder.layer.\1.output.LayerNorm",
    r"target\.mlm\.linear_1": "cls.predictions.transform.dense",
    r"target\.mlm\.layer_norm": "cls.predictions.transform.LayerNorm",
    r"target\.mlm\.linear_2": "cls.predictions",
    r"target\.sp\.linear_1": "bert.pooler.dense",
    r"target\.sp\.linear_2": "cls.seq_relationship",
}
ENDINGS = {"weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias"}
WORDS, PLACES = "bert.embeddings.word_embeddings.weight", "bert.embeddings.position_embeddings.weight"
SEGMENTS, HEAD = "bert.embeddings.token_type_embeddings.weight", "cls.predictions.weight"


class ImportConfig(StageConfig):
    """The configuration of the stage `import_uer`."""

    weights: str
    """The `.bin` file of UER-py or TencentPretrain."""
    config: str
    """The JSON file with the model's shape, such as models/bert/base_config.json."""
    vocab: str
    """The model's vocab.txt."""
    lowercase: bool = True
    """Whether texts are lower-cased and lose their accents, as their option `--do_lower_case` does by default."""
    out: str
    """The folder that the model is published in."""


def run(config: ImportConfig) -> dict:
    """Publish `config.out`, and return its index. Raises ConfigError or TokenizerError if the files are not a BERT."""
    from safetensors.torch import save_file

    model = shape_of(Path(config.config))
    engine = opened(config.vocab, config.lowercase, config.lowercase).engine
    known = engine.get_vocab()
    specials = {role: known[token] for role, token in SPECIALS["bert"].items()}
    engine.post_processor = template("bert", {role: (SPECIALS["bert"][role], n) for role, n in specials.items()})
    engine.encode_special_tokens = False
    tensors = converted(Path(config.weights), model, engine.get_vocab_size())
    with publish(Path(config.out), "import_uer", ConfigError, config) as folder:
        write_json(folder / "config.json", DIALECTS["bert"].config(model, engine.get_vocab_size(), specials))
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "tokenizer.json").write_text(engine.to_str(pretty=True) + "\n", encoding="utf-8")
        tokens = (engine.id_to_token(number) for number in range(engine.get_vocab_size()))
        (folder / "vocab.txt").write_bytes("".join(f"{token}\n" for token in tokens).encode("utf-8"))
        settings: dict[str, object] = {f"{role}_token": token for role, token in SPECIALS["bert"].items()}
        settings |= {"tokenizer_class": "BertTokenizer", "model_max_length": model.max_positions}
        settings |= {"do_lower_case": config.lowercase, "strip_accents": config.lowercase}
        write_json(folder / "tokenizer_config.json", settings | {"tokenize_chinese_chars": True})
        index = write_index(folder, {"stage": "import_uer"})
    count = sum(tensor.numel() for tensor in tensors.values())
    print(f"{config.out}: {count:,} weights of {model.layers} layers of width {model.width}", flush=True)
    print(f"  its vocabulary for shards: tokenizer adopt={config.out}; its weights: model.init_from={config.out}")
    return index


def shape_of(path: Path) -> ModelConfig:
    """The shape that a config file of theirs says. Raises ConfigError unless it is a BERT."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        sizes = [int(said[key]) for key in SIZES]
    except OSError as error:
        raise ConfigError("the config cannot be read", f"config = {path}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError) as error:
        found = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ConfigError("the config is no JSON file of UER-py or TencentPretrain", f"{path}: {found}") from None
    other = [f"{key} is {said[key]!r}" for key, fitting in BERT.items() if said.get(key, fitting[0]) not in fitting]
    if set(embedding := said.get("embedding", ["word", "pos", "seg"])) != {"word", "pos", "seg"}:
        other.append(f"embedding is {embedding!r}")
    if said.get("emb_size", said["hidden_size"]) != said["hidden_size"]:
        other.append(f"emb_size is {said['emb_size']}, hidden_size {said['hidden_size']}")
    if other:
        raise ConfigError("this model is no BERT", *(f"{path}: {one}" for one in other), "only a BERT can be imported")
    shape = dict(zip(("layers", "width", "heads", "mlp_width"), sizes, strict=True))
    shape |= {"max_positions": said.get("max_seq_length", 512), "dropout": said.get("dropout", 0.1)}
    return ModelConfig(**DIALECTS["bert"].wanted | shape)


def converted(path: Path, model: ModelConfig, vocab_size: int) -> "dict[str, Tensor]":
    """The weights in a file of theirs under BERT's names. Raises ConfigError if one is missing or has another shape."""
    found = {}
    for name, tensor in _state(path).items():
        for older, newer in OLDER.items():
            name = re.sub(older, newer, name)
        stem, _, ending = name.rpartition(".")
        for theirs, ours in NAMES.items():
            if ending in ENDINGS and (match := re.fullmatch(theirs, stem)):
                found[f"{match.expand(ours)}.{ENDINGS[ending]}"] = tensor.float().clone()
    if SEGMENTS in found:
        found[SEGMENTS] = found[SEGMENTS][1:].clone()
    width = model.width
    for name in found:
        if name.endswith("LayerNorm.weight"):
            found[name] *= math.sqrt((width - 1) / width)
    head = found.pop(HEAD, None)
    wanted = _shapes(model, vocab_size)
    faults = [f"{name}: {list(found[name].shape) if name in found else 'missing'}, should be {list(shape)}"
              for name, shape in wanted.items() if name not in found or tuple(found[name].shape) != shape]  # fmt: skip
    if faults:
        more = [f"and {len(faults) - 4} more"] if len(faults) > 4 else []
        raise ConfigError("the weights are not those of this config and vocabulary", str(path), *faults[:4], *more)
    if head is not None and not head.equal(found[WORDS]):
        untied = "target.mlm.linear_2.weight differs from embedding.word.embedding.weight"
        raise ConfigError(
            "the head has an embedding of its own, and a BERT's is tied", untied, "train it with tie_weights"
        )
    return {name: tensor.contiguous() for name, tensor in found.items()}


def _state(path: Path) -> "dict[str, Tensor]":
    """The tensors in a file of torch.save. No code in it is run."""
    import torch

    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ConfigError("the weights cannot be read", f"weights = {path}: {error.strerror}") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        said = str(error).splitlines()[0][:160]
        raise ConfigError("the weights are no file of tensors that torch.save wrote", f"{path}: {said}") from None
    if not isinstance(found, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in found.values()):
        raise ConfigError("the weights are no state of a model", f"{path} holds something else than named tensors")
    return found


def _shapes(model: ModelConfig, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """The shapes of the weights that a BERT needs. The pooler and the head of sentence pairs may be missing."""
    D, inner = model.width, model.mlp_width
    shapes: dict[str, tuple[int, ...]] = {WORDS: (vocab_size, D), PLACES: (model.max_positions, D), SEGMENTS: (2, D)}
    matrices = {"cls.predictions.transform.dense": (D, D)}
    norms = ["bert.embeddings.LayerNorm", "cls.predictions.transform.LayerNorm"]
    for n in range(model.layers):
        layer = f"bert.encoder.layer.{n}."
        square = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
        matrices |= {layer + name: (D, D) for name in square}
        matrices |= {f"{layer}intermediate.dense": (inner, D), f"{layer}output.dense": (D, inner)}
        norms += [f"{layer}attention.output.LayerNorm", f"{layer}output.LayerNorm"]
    for name, (rows, columns) in matrices.items():
        shapes |= {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
    shapes |= {f"{name}.{ending}": (D,) for name in norms for ending in ("weight", "bias")}
    return shapes | {"cls.predictions.bias": (vocab_size,)}
