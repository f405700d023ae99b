"""A BERT saved by UER-py or TencentPretrain becomes a Hugging Face folder that computes what their code computes.

The state is built by the names that their trainers save. Their arithmetic is written out here, with torch alone.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn.functional import gelu, linear

from pretrain import cli
from pretrain.errors import ConfigError
from pretrain.model.attention import Layout
from pretrain.model.config import ModelConfig
from pretrain.model.transformer import Transformer
from pretrain.tokenizer import TokenizerConfig, open_tokenizer
from pretrain.tokenizer import run as make_tokenizer
from pretrain.training.import_uer import ImportConfig, run
from pretrain.training.published import fill, shape_of

transformers = pytest.importorskip("transformers", reason="needs pip install '.[export]'")

D, LAYERS, HEADS, INNER, PLACES = 32, 2, 4, 48, 64
SHAPE = {
    **{"emb_size": D, "feedforward_size": INNER, "hidden_size": D, "heads_num": HEADS, "layers_num": LAYERS},
    **{"hidden_act": "gelu", "max_seq_length": PLACES, "dropout": 0.1, "embedding": ["word", "pos", "seg"]},
    **{"encoder": "transformer", "mask": "fully_visible", "target": ["mlm", "sp"], "tie_weights": True},
}
OLD_NAMES = {"mlm.linear_": "mlm_linear_", "mlm.layer_norm": "layer_norm", "sp.linear_": "nsp_linear_"}


def state(V: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    matrices = {"target.mlm.linear_1": (D, D), "target.sp.linear_1": (D, D), "target.sp.linear_2": (2, D)}
    norms = ["embedding.layer_norm", "target.mlm.layer_norm"]
    for n in range(LAYERS):
        at = f"encoder.transformer.{n}."
        names = ("linear_layers.0", "linear_layers.1", "linear_layers.2", "final_linear")
        matrices |= {f"{at}self_attn.{name}": (D, D) for name in names}
        matrices |= {f"{at}feed_forward.linear_1": (INNER, D), f"{at}feed_forward.linear_2": (D, INNER)}
        norms += [f"{at}layer_norm_1", f"{at}layer_norm_2"]
    found = {"embedding.word.embedding.weight": (V, D), "embedding.pos.embedding.weight": (PLACES, D)}
    found |= {"embedding.seg.embedding.weight": (3, D), "target.mlm.linear_2.bias": (V,)}
    for name, (rows, columns) in matrices.items():
        found |= {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
    found |= {f"{name}.{kind}": (D,) for name in norms for kind in ("gamma", "beta")}
    tensors = {name: 0.2 * torch.randn(shape) + name.endswith("gamma") for name, shape in found.items()}
    return tensors | {"target.mlm.linear_2.weight": tensors["embedding.word.embedding.weight"]}


def their_logits(w: dict[str, torch.Tensor], ids: torch.Tensor, seg: torch.Tensor) -> torch.Tensor:
    """(B, T, V), as embedding.py, transformer.py, layer_norm.py and mlm_target.py of UER-py compute them."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        scaled = (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6)
        return w[f"{name}.gamma"] * scaled + w[f"{name}.beta"]

    def dense(x: torch.Tensor, name: str) -> torch.Tensor:
        return linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    x = w["embedding.word.embedding.weight"][ids] + w["embedding.seg.embedding.weight"][seg]
    x = norm(x + w["embedding.pos.embedding.weight"][: ids.shape[1]], "embedding.layer_norm")
    hidden_from = (1.0 - (seg > 0).float())[:, None, None] * -10000.0
    for n in range(LAYERS):
        at = f"encoder.transformer.{n}."
        q, k, v = (
            dense(x, f"{at}self_attn.linear_layers.{i}").unflatten(-1, (HEADS, -1)).transpose(1, 2) for i in range(3)
        )
        shares = (q @ k.transpose(-1, -2) / math.sqrt(D // HEADS) + hidden_from).softmax(-1)
        x = norm(
            x + dense((shares @ v).transpose(1, 2).flatten(-2), f"{at}self_attn.final_linear"), f"{at}layer_norm_1"
        )
        inner = gelu(dense(x, f"{at}feed_forward.linear_1"))
        x = norm(x + dense(inner, f"{at}feed_forward.linear_2"), f"{at}layer_norm_2")
    return dense(norm(gelu(dense(x, "target.mlm.linear_1")), "target.mlm.layer_norm"), "target.mlm.linear_2")


def files(folder: Path, tensors: dict, vocabulary: Path, **shape: object) -> ImportConfig:
    folder.mkdir(exist_ok=True)
    torch.save(tensors, folder / "model.bin")
    (folder / "config.json").write_text(json.dumps(SHAPE | shape), encoding="utf-8")
    return ImportConfig(
        weights=str(folder / "model.bin"), config=str(folder / "config.json"),
        vocab=str(vocabulary / "vocab.txt"), out=str(folder / "hf"),
    )  # fmt: skip


@pytest.mark.parametrize("old", [False, True], ids=["names of today", "names before 2023"])
def test_an_imported_folder_has_the_logits_of_their_code_in_transformers_and_here(old, prepared, tmp_path):
    vocabulary = prepared.tokenizer["bert"]
    V = open_tokenizer(vocabulary).vocab_size
    tensors = saved = state(V)
    if old:
        for new_name, old_name in OLD_NAMES.items():
            saved = {name.replace(new_name, old_name): tensor for name, tensor in saved.items()}
    run(files(tmp_path / "uer", saved, vocabulary))
    folder = str(tmp_path / "uer/hf")
    ids, seg = torch.randint(5, V, (2, 20)), torch.ones(2, 20, dtype=torch.long)
    seg[0, 12:], seg[1, 15:] = 2, 0
    theirs, read = their_logits(tensors, ids, seg), seg > 0
    bert, report = transformers.BertForPreTraining.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    with torch.no_grad():
        found = bert.eval()(ids, attention_mask=read.long(), token_type_ids=(seg - 1).clamp(min=0)).prediction_logits
    torch.testing.assert_close(found[read], theirs[read], rtol=0, atol=1e-4)

    make_tokenizer(
        TokenizerConfig(corpus=str(prepared.corpus), adopt=folder, out=str(tmp_path / "adopted"), plot=False)
    )
    ours = Transformer(ModelConfig(**shape_of(folder, {})), V).eval()
    assert fill(ours, folder, open_tokenizer(tmp_path / "adopted")) == []
    with torch.no_grad():
        found = ours.logits(ours(ids, Layout(None, torch.arange(20).expand(2, -1), False)))
    torch.testing.assert_close(found, their_logits(tensors, ids, torch.ones_like(seg)), rtol=0, atol=1e-4)


def test_another_model_or_vocabulary_is_refused_with_the_reason(prepared, tmp_path, capsys):
    vocabulary = prepared.tokenizer["bert"]
    tensors = state(open_tokenizer(vocabulary).vocab_size)
    with pytest.raises(ConfigError, match="mask is 'causal'"):
        run(files(tmp_path / "uer", tensors, vocabulary, mask="causal"))
    with pytest.raises(ConfigError, match=r"word_embeddings\.weight: \[2048, 32\], should be \[2048, 64\]"):
        run(files(tmp_path / "uer", tensors, vocabulary, hidden_size=64, emb_size=64))
    untied = tensors | {"target.mlm.linear_2.weight": tensors["embedding.word.embedding.weight"] + 1}
    with pytest.raises(ConfigError, match="the head has an embedding of its own"):
        run(files(tmp_path / "uer", untied, vocabulary))
    (tmp_path / "config.yaml").write_text(files(tmp_path / "uer", tensors, vocabulary).model_dump_json())
    (tmp_path / "uer/model.bin").write_bytes(b"not a file of torch")
    assert cli.main("import_uer", [str(tmp_path / "config.yaml")]) == 2
    assert "error: the weights are no file of tensors that torch.save wrote" in capsys.readouterr().err
