"""Continuations are those of stock transformers, repeat with the seed, and are published before they are printed."""

import io
import json
import shutil
import sys

import pytest
import torch

from pretrain.config import build as build_config
from pretrain.config import load
from pretrain.errors import ConfigError, TaskError
from pretrain.huggingface import identity
from pretrain.prompting import generate
from pretrain.prompting.generate import GenerateConfig
from tests.conftest import ROOT
from tests.helpers.folders import changed, edit


def test_settings_that_fail_only_when_text_is_written_are_refused(decoder, tmp_path):
    broken = changed(edit("generation_config.json", eos_token_id="x"))(decoder, tmp_path / "d")
    with pytest.raises(TaskError, match=r"cannot (continue text with|open the model of) .*\n  it says: "):
        generate.run(GenerateConfig(model=str(broken), prompts=["x"], max_new_tokens=2))


def test_a_folder_without_a_decoder_generates_nothing(encoder, decoder, tmp_path):
    """An encoder, classifiers of both kinds, one whose config says it is a decoder, and an unknown architecture."""
    from transformers import AutoModelForSequenceClassification

    classifiers = {base: tmp_path / f"classifier-{base.name}" for base in (encoder, decoder)}
    for base, folder in classifiers.items():
        AutoModelForSequenceClassification.from_pretrained(base, num_labels=2).save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(base / name, folder / name)
    lying = shutil.copytree(classifiers[encoder], tmp_path / "lying")
    edit("config.json", architectures=["BertLMHeadModel"], is_decoder=True)(lying)
    for folder, said in {
        encoder: "holds BertForMaskedLM, and generate needs a decoder",
        classifiers[encoder]: "holds BertForSequenceClassification, and",
        classifiers[decoder]: "holds Qwen3ForSequenceClassification, and",
        lying: "as BertLMHeadModel: [0-9]+ missing",
        changed(edit("config.json", architectures=5))(decoder, tmp_path / "odd"): "holds 5, and",
    }.items():
        with pytest.raises(TaskError, match=said):
            generate.run(GenerateConfig(model=str(folder), prompts=["x"], max_new_tokens=2))


def test_a_continuation_is_what_generate_gives_for_the_prompt_after_eod(decoder, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prompt = "春 <eod> In"
    config = GenerateConfig(model=str(decoder), prompts=[prompt], max_new_tokens=12, temperature=0)
    (found,) = generate.run(config)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(decoder), AutoTokenizer.from_pretrained(decoder)
    ids = [1, *tokenizer(prompt, add_special_tokens=False, split_special_tokens=True)["input_ids"]]
    assert len(ids) == 1 + len(prompt.encode())  # <eod> inside a prompt is text
    greedy = list(ids)
    for _ in range(12):
        with torch.no_grad():
            greedy.append(int(model(torch.tensor([greedy])).logits[0, -1].argmax()))
        if greedy[-1] == 1:
            break
    assert found == tokenizer.decode(greedy[len(ids) :], skip_special_tokens=True)
    assert prompt in capsys.readouterr().out


def test_sampling_repeats_with_the_seed_whatever_the_other_prompts(decoder):
    def at(seed: int, *prompts: str) -> list[str]:
        return generate.run(
            GenerateConfig(model=str(decoder), prompts=prompts, seed=seed, max_new_tokens=16, temperature=2)
        )

    both = at(1, "In the beginning", "床前明月光，")
    assert both == at(1, "In the beginning", "床前明月光，")
    assert both[1:] == at(1, "床前明月光，")
    assert both != at(2, "In the beginning", "床前明月光，")


class Stream(io.StringIO):
    """Calls `written` at every write."""

    def __init__(self, written):
        super().__init__()
        self._written = written

    def write(self, text: str) -> int:
        self._written()
        return super().write(text)


def test_continuations_are_published_when_out_is_given(decoder, tmp_path, monkeypatch):
    """They are published before they are printed, because printing fails if the reader of a pipe is gone."""
    out, shown = tmp_path / "out", []
    monkeypatch.setattr(sys, "stdout", Stream(lambda: shown.append((out / "index.json").exists())))
    found = generate.run(GenerateConfig(model=str(decoder), prompts=["a", "春"], out=str(out), max_new_tokens=4))
    assert shown and all(shown)
    lines = [json.loads(line) for line in (out / "generations.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines == [{"prompt": p, "continuation": c} for p, c in zip(["a", "春"], found, strict=True)]
    assert json.loads((out / "index.json").read_text())["base"] == identity(str(decoder))


def test_a_continuation_that_does_not_fit_the_model_is_refused(decoder):
    with pytest.raises(TaskError, match=r"longer than the 64 positions(.|\n)*61 tokens"):
        generate.run(GenerateConfig(model=str(decoder), prompts=["x" * 60], max_new_tokens=4))


def test_the_sample_prompts_load():
    assert load(GenerateConfig, ROOT / "configs/sample/generate.yaml").prompts[2:] == ["床前明月光，", "春"]


BAD_PROMPTS = {
    "the model as out": ({"out": "./m"}, "would replace a folder that is read"),
    "a temperature that float32 has not": ({"temperature": 1e-300}, "temperature = 1e-300: set 0"),
    "a seed of 80 bits": ({"seed": 2**80}, "seed = "),
    "a seed below 0": ({"seed": -1}, "seed = -1"),
    "half of an emoji": ({"prompts": ["a", "b\ud83d"]}, r"prompts: 'b\\ud83d' has a NUL or half of a surrogate pair"),
}


@pytest.mark.parametrize("case", BAD_PROMPTS)
def test_a_configuration_that_cannot_generate_is_refused(case):
    changes, said = BAD_PROMPTS[case]
    with pytest.raises(ConfigError, match=said):
        build_config(GenerateConfig, {"model": "m", "prompts": ["x"]} | changes, "test")


def test_the_coldest_temperature_and_the_hottest_give_text(decoder):
    greedy, cold, _ = (
        generate.run(GenerateConfig(model=str(decoder), prompts=["x"], max_new_tokens=3, temperature=temperature))
        for temperature in (0, 1e-6, 1e6)
    )
    assert cold == greedy


def test_an_out_that_cannot_be_written_is_refused_before_anything_is_generated(decoder, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("")
    with pytest.raises(TaskError, match="holds something else"):
        generate.run(GenerateConfig(model=str(decoder), prompts=["x"], out=str(tmp_path / "out"), max_new_tokens=2))
    assert capsys.readouterr().out == ""
