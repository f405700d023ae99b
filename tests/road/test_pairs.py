"""Labelled pairs on the whole road: JSON lines, shards, training together with text, and a T5 folder that answers."""

import json
import random
from pathlib import Path

import pytest
import transformers
import yaml

from pretrain import config
from pretrain.corpus import SIDES
from pretrain.corpus.sides import side_of
from pretrain.errors import ConfigError, ShardError, TokenizerError
from pretrain.export import stage as export
from pretrain.shards import Shards, ShardsConfig, reshard
from pretrain.shards import run as make_shards
from pretrain.tokenizer import TokenizerConfig, open_tokenizer
from pretrain.tokenizer import run as make_tokenizer
from pretrain.tools import explain
from pretrain.training.config import RunConfig
from pretrain.training.run import run as train

WORDS = ["light", "earth", "water", "heaven", "night", "day", "fruit", "seed", "tree", "herb"]
KINDS = {"byte": 560, "bert": 120}
T5 = {"layers": 1, "decoder_layers": 1, "width": 32, "heads": 2, "mlp_width": 64, "max_positions": 32}
T5 |= {"causal": False, "norm": "rmsnorm", "norm_position": "pre", "norm_eps": 1e-6, "positions": "relative"}
T5 |= {"mlp": "geglu_tanh", "bias": False, "tie_embeddings": False}


def pairs() -> list[tuple[str, str]]:
    """The output is the first words of the input. The string of the mark is text like any other."""
    rng = random.Random(1)
    found = [rng.sample(WORDS, 4) for _ in range(300)] + [["<output>", "of", "a", "mark"]]
    return [(" ".join(words), " ".join(words[:2])) for words in found]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a recipe of pairs and text, and for each kind a tokenizer with marks, and shards."""
    root = tmp_path_factory.mktemp("pairs")
    lines = [json.dumps({"input": given, "output": wanted}) + "\n" for given, wanted in pairs()]
    (root / "pairs.jsonl").write_text("".join(lines))
    rng = random.Random(2)
    (root / "text.txt").write_text("\n\n".join(" ".join(rng.choices(WORDS, k=20)) for _ in range(60)))
    asked = {"name": "asked", "files": ["pairs.jsonl"], "field": "input", "output_field": "output"}
    recipe = {"name": "made", "heldout_fraction": 0.2, "sources": [asked, {"name": "text", "files": ["text.txt"]}]}
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for kind, size in KINDS.items():
        keys = {
            "kind": kind,
            "vocab_size": size,
            "special_tokens": ["<output>", "<answer>"],
            "sentinels": 4,
            "plot": False,
        }
        make_tokenizer(TokenizerConfig(corpus=str(root), out=str(root / kind), **keys))
        make_shards(ShardsConfig(corpus=str(root), tokenizer=str(root / kind), out=str(root / f"shards-{kind}")))
    return root


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_of_shards_is_the_input_the_mark_and_the_output(made, kind):
    tokenizer, mark = open_tokenizer(made / kind), open_tokenizer(made / kind).special_tokens["<output>"]
    for side in SIDES:
        shards = Shards(made / f"shards-{kind}", side)
        wanted = [pair for pair in pairs() if side_of(pair[0], 0.2) == side]
        assert len(wanted) > 30
        count = 0
        for given, answer in (tokenizer.encode_batch(list(pair)) for pair in wanted):
            answer = answer[1:] if kind == "bert" else answer
            expected = [*given[:-1].tolist(), mark, *answer.tolist()]
            assert shards.document(count).tolist() == expected
            assert expected.count(mark) == 1 and tokenizer.end not in expected[:-1]
            count += 1
        assert shards.documents > count and not (shards.document(count) == mark).any(), "text follows"
        raw = sum(len(f"{given}\n{answer}") for given, answer in wanted)
        assert shards.sidecar(0, "raw")[:count].sum() == raw
        assert shards.unigram()[mark] == count


def test_joined_sets_keep_the_mark_of_their_pairs(made, tmp_path):
    """A run asks the index for the mark. Two sets with different marks are not joined."""
    first, other = made / "shards-bert", tmp_path / "other"
    joined = reshard.run(reshard.ReshardConfig(parts=[{"shards": str(first)}], out=str(tmp_path / "joined")))
    assert joined["pair_mark"] == "<output>"
    make_shards(ShardsConfig(corpus=str(made), tokenizer=str(made / "bert"), out=str(other), pair_mark="<answer>"))
    parts = [{"shards": str(first), "fraction": 0.5}, {"shards": str(other), "fraction": 0.5}]
    with pytest.raises(ShardError, match="different marks") as caught:
        reshard.run(reshard.ReshardConfig(parts=parts, out=str(tmp_path / "both")))
    assert f"{other}: pair_mark = <answer>" in caught.value.details


def test_a_tokenizer_without_the_mark_is_refused_with_its_name(made, tmp_path):
    values = {"corpus": str(made), "tokenizer": str(made / "byte"), "out": str(tmp_path / "shards")}
    with pytest.raises(TokenizerError, match="need a mark") as error:
        make_shards(ShardsConfig(**values, pair_mark="<reply>"))
    assert "special_tokens: [<reply>]" in str(error.value) and "source 'asked'" in str(error.value)


def test_pairs_and_text_train_together_and_the_exported_model_answers(made, tmp_path, capsys):
    run = {
        "out": str(tmp_path / "run"),
        "seed": 1,
        "data": {"shards": str(made / "shards-byte"), "tokenizer": str(made / "byte"), "windows": "documents"},
        "model": T5,
        "objective": {"kind": "span_corruption", "target_tokens": 24},
        "optim": {"lr": 3e-3, "warmup_steps": 2},
        "phases": [{"steps": 8, "seq_len": 32, "batch_tokens": 256}],
        "engine": {"micro_batch": 8},
        "evaluate": {"max_tokens": 512},
        "log_every": 4,
    }
    other = {**run, "objective": {"kind": "span_corruption", "pair_mark": "<answer>"}}
    with pytest.raises(ConfigError, match="another mark") as error:
        train(config.build(RunConfig, other, "test"))
    assert "set objective.pair_mark to <output>" in str(error.value)
    summary = train(config.build(RunConfig, run, "test"))
    assert summary["steps"] == 8 and summary["last_loss"] < summary["first_loss"]
    capsys.readouterr()
    assert explain.main([run["out"], "--step", "1", "--sample", "0"]) == 0
    said = capsys.readouterr().out
    assert "which the decoder writes" in said and "pairs.jsonl, line" in said and "<output>" not in said
    out = tmp_path / "t5"
    export.run(export.ExportConfig(checkpoint=run["out"], dialect="t5", out=str(out)))
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(out)
    prompt = transformers.AutoTokenizer.from_pretrained(out)("light earth water heaven", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=5)[0].tolist()
    assert answer[0] == model.config.decoder_start_token_id and len(answer) > 1
