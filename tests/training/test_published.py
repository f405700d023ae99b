"""A run begins from a Hugging Face folder that stock transformers has written."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain import config, export, shards, tokenizer
from pretrain.dialects import DIALECTS
from pretrain.errors import ConfigError
from pretrain.model.attention import Crossing, Layout
from pretrain.model.config import ModelConfig
from pretrain.model.init import initialise
from pretrain.model.models import model_of
from pretrain.model.transformer import Transformer
from pretrain.objectives.masked_lm import MaskedLMConfig
from pretrain.shards import Shards
from pretrain.tokenizer import TokenizerConfig, open_tokenizer
from pretrain.training.config import RunConfig
from pretrain.training.heldout import HeldOut
from pretrain.training.published import fill, shape_of
from pretrain.training.run import run
from tests.conftest import run_values

transformers = pytest.importorskip("transformers", reason="needs pip install '.[export]'")

MASKED = MaskedLMConfig(kind="masked_lm")
SHAPE = {"layers": 3, "width": 32, "heads": 4, "mlp_width": 24, "max_positions": 64, "norm_eps": 1e-6, "dropout": 0.0}
COMPOSED = {"generator": {"layers": 1, "width": 8, "heads": 2, "mlp_width": 8}, "decoder_layers": 2}
FREE = {"kv_heads": 2, "head_width": 16, "window": 4, "bias": True, "logit_cap": 7.0, "mlp": "gelu_tanh"}


def published(name: str, vocabulary: Path, out: Path) -> tuple[Path, torch.nn.Module]:
    """A folder of a dialect with random weights and a copy of a tokenizer, and the model that transformers saved."""
    dialect, opened = DIALECTS[name], open_tokenizer(vocabulary)
    values = {**SHAPE, "bias": False, "mlp": "gelu", **dialect.wanted}
    values |= {key: COMPOSED[key] for key in COMPOSED if key in dialect.free}
    for key in sorted(dialect.free & FREE.keys()):
        try:
            if not dialect.objections(ModelConfig(**{**values, key: FREE[key]})):
                values[key] = FREE[key]
        except ValueError:
            continue
    settings = dialect.config(ModelConfig(**values), opened.vocab_size, opened.specials)
    torch.manual_seed(3)
    model = getattr(transformers, settings["architectures"][0])(transformers.AutoConfig.for_model(**settings))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    model.eval().save_pretrained(out)
    shutil.copy(vocabulary / "tokenizer.json", out)
    return out, model


@pytest.mark.parametrize("name", DIALECTS)
def test_a_model_that_begins_from_a_folder_computes_what_transformers_computes(name, prepared, tmp_path):
    kind = "bert" if DIALECTS[name].needs else "byte"
    folder, theirs = published(name, prepared.tokenizer[kind], tmp_path / "hf")
    given = {"generator": COMPOSED["generator"]} if name == "electra" else {}  # a folder does not have it
    model = ModelConfig(**shape_of(str(folder), given))
    assert DIALECTS[name].objections(model) == []
    ours = model_of(model, theirs.config.vocab_size).eval()
    initialise(ours, 1)
    lacking = fill(ours, str(folder), open_tokenizer(prepared.tokenizer[kind]))
    assert bool(lacking) == bool(given) and all(key.startswith("generator.") for key in lacking)
    ids = torch.randint(5, theirs.config.vocab_size, (2, 20))
    every = torch.zeros(2, 20, dtype=torch.int)
    with torch.no_grad():
        found, more = ours(ids, Layout(None, torch.arange(20).expand(2, -1), model.causal)), {}
        if model.decoder_layers:
            more = {"decoder_input_ids": ids.flip(1)}
            layout = Layout(None, torch.arange(20).expand(2, -1), True)
            found = ours.decode(ids.flip(1), layout, found, Crossing(every, every))
        torch.testing.assert_close(ours.logits(found), theirs(ids, **more).logits, rtol=0, atol=1e-4)


def test_a_run_continues_a_folder_resumes_and_goes_the_other_way(prepared, tmp_path):
    """A decoder is trained on as a decoder, and becomes an encoder of the same weights with masks of its own."""
    folder, _ = published("eurobert", prepared.tokenizer["bert"], tmp_path / "hf")
    values = run_values(prepared, tmp_path / "run", model={}, checkpoint={"every_steps": 2})
    values["model"] = {"init_from": str(folder), "dropout": 0.1}
    summary = run(config.build(RunConfig, values, "test"))
    assert summary["steps"] == 12
    stored = (tmp_path / "run/config.yaml").read_text()
    assert "layers: 3" in stored and "dropout: 0.1" in stored
    values["phases"] = [*values["phases"], {"steps": 2, "seq_len": 32, "batch_tokens": 256, "lr": 1e-3}]
    assert run(config.build(RunConfig, values, "test"))["steps"] == 14, "resumed"

    values = run_values(prepared, tmp_path / "other")
    values |= {"model": {"init_from": str(folder), "causal": True}, "objective": {"kind": "causal_lm"}}
    assert run(config.build(RunConfig, values, "test"))["steps"] == 12


def test_a_folder_with_short_windows_goes_on_with_longer_ones(prepared, tmp_path):
    """Stock transformers with the same YaRN gives our logits, and our model is read back from its folder."""
    folder, _ = published("llama", prepared.tokenizer["byte"], tmp_path / "short")
    scaling = {"kind": "yarn", "original_positions": 64}
    model = ModelConfig(**shape_of(str(folder), {"max_positions": 256, "rope_scaling": scaling, "rope_theta": 5e4}))
    tokenizer = open_tokenizer(prepared.tokenizer["byte"])
    settings = DIALECTS["llama"].config(model, tokenizer.vocab_size, tokenizer.specials)
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder, config=transformers.LlamaConfig(**settings)).eval()
    plain = model.model_copy(update={"rope_scaling": None})
    ids, found = torch.randint(5, tokenizer.vocab_size, (1, 200)), []
    for shape in (model, plain):
        ours = Transformer(shape, tokenizer.vocab_size).eval()
        assert fill(ours, str(folder), tokenizer) == []
        with torch.no_grad():
            found.append(ours.logits(ours(ids, Layout(None, torch.arange(200)[None], True))))
    with torch.no_grad():
        torch.testing.assert_close(found[0], theirs(ids).logits, rtol=0, atol=1e-4)
    assert float((found[1] - found[0]).abs().max()) > 0.01
    theirs.save_pretrained(tmp_path / "long")
    assert ModelConfig(**shape_of(str(tmp_path / "long"), {})) == model


def test_a_token_that_the_folder_lacks_begins_as_the_mean_of_its_pieces(prepared, tmp_path):
    folder, theirs = published("bert", prepared.tokenizer["bert"], tmp_path / "hf")
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"quuxify the zorblatt {n}" for n in range(200)), encoding="utf-8")
    parent = open_tokenizer(prepared.tokenizer["bert"])
    tokenizer.run(
        TokenizerConfig(
            corpus=str(text), out=str(tmp_path / "larger"), extend=str(parent.folder),
            vocab_size=parent.vocab_size + 40, plot=False,
        )
    )  # fmt: skip
    larger = open_tokenizer(tmp_path / "larger")
    assert larger.vocab_size > parent.vocab_size
    ours = Transformer(ModelConfig(**shape_of(str(folder), {})), larger.vocab_size)
    initialise(ours, 1)
    assert fill(ours, str(folder), larger) == []
    rows = theirs.get_input_embeddings().weight
    assert torch.equal(ours.embed.weight[: parent.vocab_size], rows)
    new = max(range(parent.vocab_size, larger.vocab_size), key=lambda token: len(larger.decode([token])))
    pieces = [token for token in parent.encode_batch([larger.decode([new])])[0].tolist() if token not in (2, 3)]
    assert len(pieces) > 1
    torch.testing.assert_close(ours.embed.weight[new], rows[pieces].mean(0))


def test_what_does_not_fit_is_refused_with_the_reason(prepared, tmp_path):
    folder, _ = published("llama", prepared.tokenizer["byte"], tmp_path / "hf")
    with pytest.raises(ConfigError, match=r"model\.width = 64: the folder has 32"):
        shape_of(str(folder), {"width": 64})
    ours = Transformer(ModelConfig(**shape_of(str(folder), {})), 2048)
    with pytest.raises(ConfigError, match=r"tokens of .* have another id in the vocabulary of this run"):
        fill(ours, str(folder), open_tokenizer(prepared.tokenizer["bert"]))
    with pytest.raises(ConfigError, match=r"model\.init_from = .*nowhere: there is no such folder"):
        shape_of(str(tmp_path / "nowhere"), {})
    values = json.loads((folder / "config.json").read_text())
    values["rope_parameters"] = {**values["rope_parameters"], "rope_type": "linear", "factor": 2.0}
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"config\.json: rope_parameters is .*linear"):
        shape_of(str(folder), {})
    values["model_type"] = "bart"
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="model_type is bart; known are bert, "):
        shape_of(str(folder), {})


def test_the_loss_of_each_corpus_is_known_before_and_after_also_of_one_that_is_only_scored(prepared, tmp_path, capsys):
    """Forgetting in nats: the old text has weight 0. The first scores are those of the folder in transformers."""
    folder, theirs = published("bert", prepared.tokenizer["bert"], tmp_path / "hf")
    values = run_values(prepared, tmp_path / "run")
    text = "\n\n".join(f"the law of chapter {n} is the law" for n in range(400))
    (tmp_path / "new.txt").write_text(text, encoding="utf-8")
    recipe = "name: new\nheldout_fraction: 0.2\nsources: [{name: new, language: en, files: [new.txt]}]\n"
    (tmp_path / "recipe.yaml").write_text(recipe, encoding="utf-8")
    made = {"corpus": str(tmp_path / "recipe.yaml"), "out": str(tmp_path / "new")}
    shards.run(shards.ShardsConfig(tokenizer=values["data"]["tokenizer"], **made))
    values["model"] = {"init_from": str(folder)}
    values["data"] = {
        "tokenizer": values["data"]["tokenizer"],
        "corpora": [
            {"name": "new", "shards": str(tmp_path / "new"), "weight": 1},
            {"name": "old", "shards": values["data"]["shards"], "weight": 0},
        ],
    }
    summary = run(config.build(RunConfig, values, "test"))
    said = capsys.readouterr().out
    for name in ("new", "old"):
        scores = summary["heldout"][name]
        assert scores["loss_change"] == scores["loss"] - scores["loss_before"] != 0
        assert f"{name}  {scores['loss_before']:.4f} → {scores['loss']:.4f} ({scores['loss_change']:+.4f})" in said
    assert summary["heldout"]["new"]["loss_change"] < summary["heldout"]["old"]["loss_change"]
    assert summary["heldout_loss_before"] == summary["heldout"]["new"]["loss_before"], "weight 0 has no part in it"

    old = Shards(prepared.shards["bert"], "heldout")
    side = HeldOut(old, MASKED, 32, values["evaluate"]["max_tokens"], None, packed=False)
    assert summary["heldout"]["old"]["loss_before"] == pytest.approx(slow_loss(theirs, side), abs=1e-4)


def test_sentences_are_as_similar_after_a_run_that_learns_nothing_and_its_export(prepared, tmp_path):
    """An encoder of sentences keeps its embeddings on the way through a run: cosines of mean-pooled hidden states."""
    folder, _ = published("bert", prepared.tokenizer["bert"], tmp_path / "hf")
    values = run_values(prepared, tmp_path / "run", optim={"lr": 1e-12}, evaluate={"max_tokens": 64})
    values |= {"model": {"init_from": str(folder)}, "phases": [{"steps": 1, "seq_len": 32, "batch_tokens": 64}]}
    run(config.build(RunConfig, values, "test"))
    out = str(tmp_path / "out")
    export.run(export.ExportConfig(checkpoint=str(tmp_path / "run"), dialect="bert", out=out))
    texts = [
        "In the beginning was the word.",
        "床前明月光，疑是地上霜。",
        "the word",
        "And the light shineth in darkness",
    ]
    batch = transformers.AutoTokenizer.from_pretrained(out)(texts, padding=True, return_tensors="pt")
    mask, cosines = batch["attention_mask"][..., None], []
    for place in (folder, out):
        with torch.no_grad():
            hidden = transformers.AutoModel.from_pretrained(place).eval()(**batch).last_hidden_state
        embeddings = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))
        cosines.append(embeddings @ embeddings.T)
    torch.testing.assert_close(cosines[0], cosines[1], rtol=0, atol=1e-5)
    assert cosines[0].min() < 0.95


def slow_loss(model: torch.nn.Module, side: HeldOut) -> float:
    """The mean loss of a model of transformers, which is given the documents of each window one by one."""
    batch, total, count = side.batch(side.numbers), 0.0, 0.0
    segments = np.zeros_like(batch.inputs) if batch.segments is None else batch.segments
    for row in range(len(batch.inputs)):
        index, weights = batch.target_index[row], batch.weights[row]
        for segment in np.unique(segments[row]):
            at = np.flatnonzero(segments[row] == segment)
            with torch.no_grad():
                said = model(torch.from_numpy(batch.inputs[row, at].astype(np.int64))[None]).logits[0].log_softmax(-1)
            for slot in np.flatnonzero((segments[row, index] == segment) & (weights > 0)):
                total -= float(said[index[slot] - at[0], int(batch.targets[row, slot])])
                count += 1
    return total / count
