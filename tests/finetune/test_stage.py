"""A tiny BERT made by hand, tasks whose answer is one word, and stock transformers and peft opening what comes out."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from pretrain.config import build as build_config
from pretrain.config import load
from pretrain.errors import ConfigError, TaskError
from pretrain.finetune import FinetuneConfig, compare, run, train
from pretrain.finetune.task import Example, read_task
from pretrain.huggingface import identity
from pretrain.prompting import generate
from pretrain.prompting.generate import GenerateConfig
from tests.conftest import ROOT
from tests.helpers.entries import entries
from tests.helpers.folders import POSITIONS, TINY, examples, settings

LORA = {"method": "lora", "learning_rates": [1e-2], "test_seeds": [10], "epochs": 8}


@pytest.fixture(scope="module")
def full(encoder, task, tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("runs") / "full"
    return out, run(settings(encoder, task, out))


@pytest.fixture(scope="module")
def lora(encoder, task, tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("runs") / "lora"
    return out, run(settings(encoder, task, out, **LORA))


def answers_one_by_one(model, tokenizer, folder: Path) -> list[str]:
    """The labels of test.jsonl, one text at a time, so that neither padding nor order can matter."""
    model.eval()
    found = []
    for line in (folder / "test.jsonl").read_text().splitlines():
        encoded = tokenizer(
            json.loads(line)["text"],
            split_special_tokens=True,
            truncation=True,
            max_length=POSITIONS,
            return_tensors="pt",
        )
        with torch.no_grad():
            found.append(model.config.id2label[int(model(**encoded).logits.argmax())])
    return found


def predicted(out: Path) -> list[str]:
    return [json.loads(line)["predicted"] for line in (out / "predictions.jsonl").read_text().splitlines()]


def assert_equal_folders(one: Path, other: Path) -> None:
    first, second = (json.loads((folder / "index.json").read_text()) for folder in (one, other))
    assert first["files"] == second["files"]
    assert first["fingerprint"] == second["fingerprint"]


def from_card(out: Path, base: Path) -> dict:
    """Execute the python block of the published README.md and return its variables."""
    code = (out / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names = {"folder": str(out), "base_folder": str(base)}
    exec(code, names)
    return names


# The rows


def test_long_texts_are_cut_and_counted_and_marks_inside_texts_are_text(encoder):
    tokenizer = train.open_tokenizer(str(encoder), 8)
    texts = ["the sun [SEP] sings", "a " * 6, "a " * 7]
    rows, truncated = train.encode([Example(text, None, "light", 0) for text in texts], ["dark", "light"], tokenizer, 8)
    assert truncated == 1
    assert [len(row["input_ids"]) for row in rows] == [8, 8, 8]
    assert (
        tokenizer.decode(rows[0]["input_ids"], clean_up_tokenization_spaces=False)
        == "[CLS] the sun [ sep ] sings [SEP]"
    )
    assert {row["labels"] for row in rows} == {1}


def test_a_pair_is_one_row_with_two_segment_types(encoder):
    tokenizer = train.open_tokenizer(str(encoder), POSITIONS)
    (row,), _ = train.encode([Example("the sun", "old", "a", 0)], ["a"], tokenizer, POSITIONS)
    assert tokenizer.decode(row["input_ids"]) == "[CLS] the sun [SEP] old [SEP]"
    assert row["token_type_ids"] == [0, 0, 0, 0, 1, 1]


# The model


def start(encoder: Path, **changes) -> train.FinetuneStart:
    values = {
        "folder": str(encoder),
        "labels": ["a", "b", "c"],
        "init": "pretrained",
        "dropout": None,
        "lora_rank": None,
    }
    return train.FinetuneStart(**values | changes)


def test_a_pretrained_start_has_the_weights_of_the_folder_and_a_head_drawn_from_the_seed(encoder):
    from transformers import AutoModelForMaskedLM

    stored = AutoModelForMaskedLM.from_pretrained(encoder).bert.state_dict()
    one, same, other = (train.build(start(encoder), seed) for seed in (1, 1, 2))
    for name, weight in stored.items():
        assert torch.equal(one.bert.state_dict()[name], weight), name
    assert torch.equal(one.classifier.weight, same.classifier.weight)
    assert not torch.equal(one.classifier.weight, other.classifier.weight)


def test_the_random_twin_has_the_same_shapes_and_none_of_the_pretrained_matrices(encoder):
    pretrained = train.build(start(encoder), 1).state_dict()
    twin, other = (train.build(start(encoder, init="random"), seed).state_dict() for seed in (1, 2))
    assert {name: weight.shape for name, weight in twin.items()} == {n: w.shape for n, w in pretrained.items()}
    inner = [name for name, weight in twin.items() if name.startswith("bert.encoder") and weight.dim() == 2]
    assert len(inner) == 12
    for name in inner:
        assert not torch.equal(twin[name], pretrained[name]), name
        assert not torch.equal(twin[name], other[name]), name


def test_a_dropout_that_is_given_replaces_the_folder_s(encoder):
    assert train.build(start(encoder), 0).bert.embeddings.dropout.p == 0.0
    model = train.build(start(encoder, dropout=0.25), 0)
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.25}


def test_weights_that_are_not_the_model_s_are_refused(encoder, tmp_path):
    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(encoder, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    del weights["bert.encoder.layer.1.output.dense.weight"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TaskError, match=r"1 missing, the first is bert\.encoder\.layer\.1\.output\.dense\.weight"):
        train.build(start(broken), 0)


# The stage


def test_full_learns_and_the_published_folder_answers_as_it_reported(full, encoder, task):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    out, report = full
    model = AutoModelForSequenceClassification.from_pretrained(out)
    found = answers_one_by_one(model, AutoTokenizer.from_pretrained(out), task)
    gold = [json.loads(line)["label"] for line in (task / "test.jsonl").read_text().splitlines()]
    assert found == predicted(out)
    (published,) = [entry for entry in report["test"]["by_seed"] if entry["seed"] == report["published_seed"]]
    assert sum(a == b for a, b in zip(found, gold, strict=True)) / len(gold) == published["accuracy"]
    assert report["test"]["accuracy"] > 0.9
    assert model.config.id2label == {0: "dark", 1: "light"}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (encoder / name).read_bytes(), "the files that were certified"


def test_the_report_says_what_was_tried_used_and_cut(full, task):
    out, report = full
    stored = json.loads((out / "report.json").read_text())
    assert stored == {key: value for key, value in json.loads(json.dumps(report)).items() if key != "seconds"}
    assert stored["examples"] == {"available": 160, "train": 120, "dev": 40, "test": 60}
    assert [tried["learning_rate"] for tried in stored["dev"]] == [1e-6, 5e-3]
    assert stored["learning_rate"] == 5e-3
    assert stored["published_seed"] == max(stored["test"]["by_seed"], key=lambda entry: entry["dev"])["seed"]
    longer = [line for line in examples(60, 3) if len(line["text"].replace("[SEP]", "[ SEP ]").split()) > POSITIONS - 2]
    assert stored["truncated"]["test"] == len(longer) > 0
    low, high = stored["test"]["interval95"]
    assert low < stored["test"]["accuracy"] <= high
    assert stored["baselines"]["majority"] == 0.5
    assert stored["weights"]["trained"] == stored["weights"]["all"]


def test_the_index_names_the_base_and_the_task_and_its_fingerprint_ignores_time_and_place(full, encoder, task):
    index = json.loads((full[0] / "index.json").read_text())
    assert index["base"] == identity(str(encoder))
    assert set(index["task"]) == {"train.jsonl", "dev.jsonl", "test.jsonl"}
    assert index["recorded"]["seconds"] == full[1]["seconds"]
    assert {"model", "task", "out"}.isdisjoint(index["options"])


def test_the_same_configuration_gives_the_same_folder_in_another_process(lora, encoder, task, tmp_path):
    """Through launch/finetune.py, with another hash seed (the writer of adapter_config.json has sets inside)."""
    config = settings(encoder, task, tmp_path / "again", **LORA)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump()), encoding="utf-8")
    env = os.environ | {"PYTHONHASHSEED": "5", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, ROOT / "launch/finetune.py", path]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert "95 % interval" in done.stdout
    assert_equal_folders(lora[0], tmp_path / "again")


def test_a_single_rate_is_trained_for_the_test_seeds_only_and_twins_are_compared(encoder, task, tmp_path, capsys):
    """At a rate that changes nothing, the pre-trained model is not better than its random twin."""
    torch.rand(3)  # as if something else had been done before
    twin = run(settings(encoder, task, tmp_path / "random", init="random", **TINY))
    said = capsys.readouterr()
    assert "fine-tuning: 2/2 steps" in said.err, "one training of 16 examples in batches of 8"
    assert twin["dev"] == [] and twin["twins"] == []
    for line in (
        "  light        8       20       30",
        "cut to max_length: ",
        "worse than naive Bayes",
        "drawn at random",
    ):
        assert line in said.out, line
    report = run(settings(encoder, task, tmp_path / "a", **TINY | {"dev_seeds": [0]}))
    out = capsys.readouterr().out
    assert "this and its random twin random: " in out and "no gain from pre-training is shown" in out
    assert report["twins"][0]["said"] in report["said"] and report["head"] == "new"
    (tmp_path / "elsewhere").mkdir()
    again = run(settings(encoder, task, tmp_path / "elsewhere" / "a", **TINY | {"dev_seeds": [0]}))
    assert again["twins"] == []
    assert_equal_folders(tmp_path / "a", tmp_path / "elsewhere" / "a")


def test_a_chosen_rate_at_the_edge_of_those_tried_is_said(full):
    assert "the chosen rate 0.005 is the largest tried: a larger one may be better" in full[1]["said"]


def test_twins_are_told_apart_by_their_intervals():
    def result(low: float, high: float) -> dict:
        return {"accuracy": (low + high) / 2, "interval95": [low, high]}

    assert "helped" in compare.verdict_of(result(0.7, 0.8), result(0.5, 0.6))
    assert "harmed" in compare.verdict_of(result(0.4, 0.45), result(0.5, 0.6))
    assert "no gain" in compare.verdict_of(result(0.55, 0.7), result(0.5, 0.6))


@pytest.mark.parametrize("damage", [{"options": [1]}, {"options": None}, {"test": {"accuracy": "x"}}, {"test": []}])
def test_a_damaged_neighbour_costs_no_result(tmp_path, damage):
    index = {"stage": "finetune", "task": 1, "base": 2, "options": dict.fromkeys(compare.SAME) | {"init": "random"}}
    ours = index | {"options": index["options"] | {"init": "pretrained"}}
    result = {"accuracy": 0.5, "interval95": [0.4, 0.6]}
    report = {"init": "pretrained", "test": result}
    (tmp_path / "twin").mkdir()
    (tmp_path / "twin/index.json").write_text(json.dumps({"fingerprint": "a", **index}))
    (tmp_path / "twin/report.json").write_text(json.dumps({"test": result}))
    assert len(compare.compared(tmp_path / "a", ours, report)) == 1
    for name, content in (("index", index | {"fingerprint": "a"}), ("report", {"test": result})):
        (tmp_path / f"twin/{name}.json").write_text(json.dumps(content | damage))
    assert compare.compared(tmp_path / "a", ours, report) == []


def test_a_head_is_continued_for_its_own_labels_and_refused_for_others(full, encoder):
    out, _ = full
    stored = train.build(start(out, labels=["dark", "light"]), 3)
    assert train.check(start(out, labels=["dark", "light"]))["head"] == "continued"
    assert torch.equal(stored.classifier.weight, train.build(start(out, labels=["dark", "light"]), 4).classifier.weight)
    for labels in (["cat", "dog"], ["light", "dark"], ["a", "b", "c"]):
        with pytest.raises(
            TaskError, match=rf"a head for 2 labels: dark, light\n  the task has {len(labels)} labels: "
        ):
            train.check(start(out, labels=labels))
    assert train.check(start(out, init="random"))["head"] == "new"


def test_adapters_larger_than_every_layer_are_refused(encoder):
    assert train.check(start(encoder, lora_rank=32))["weights"]["trained"] > 0
    with pytest.raises(TaskError, match=r"lora_rank = 33 is larger than every layer(.|\n)*at most 32"):
        train.check(start(encoder, lora_rank=33))


def test_lora_trains_adapters_head_and_pooler_and_leaves_the_base_bit_identical(lora, encoder):
    from transformers import AutoModelForMaskedLM

    out, report = lora
    model = from_card(out, encoder)["model"]
    base = AutoModelForMaskedLM.from_pretrained(encoder).bert.state_dict()
    trained, frozen = {}, {}
    for name, weight in model.state_dict().items():
        name = name.removeprefix("base_model.model.")
        (trained if "lora_" in name or ".modules_to_save." in name else frozen)[name] = weight
    for name, weight in base.items():
        name = "bert." + name
        found = frozen[name] if name in frozen else frozen[".base_layer.".join(name.rsplit(".", 1))]
        assert torch.equal(found, weight), name
    adapted = {name.split(".lora_B")[0] for name in trained if ".lora_B." in name}
    assert len(adapted) == 2 * 6  # query, key, value, output, and the two of the feed-forward, in each of 2 layers
    assert all(weight.abs().sum() > 0 for name, weight in trained.items() if ".lora_B." in name)
    heads = {name.split(".modules_to_save")[0] for name in trained if ".modules_to_save." in name}
    assert heads == {"classifier", "bert.pooler.dense"} or heads == {"classifier", "bert.pooler"}
    assert report["weights"]["trained"] == sum(weight.numel() for weight in trained.values())


def test_lora_answers_as_it_reported_when_opened_by_its_card_or_by_peft_alone(lora, encoder, task):
    from peft import AutoPeftModelForSequenceClassification

    out, report = lora
    opened = from_card(out, encoder)
    assert answers_one_by_one(opened["model"], opened["tokenizer"], task) == predicted(out)
    assert report["test"]["accuracy"] > 0.9
    alone = AutoPeftModelForSequenceClassification.from_pretrained(out, num_labels=2)
    alone.config.id2label = opened["model"].config.id2label
    assert answers_one_by_one(alone, opened["tokenizer"], task) == predicted(out)


def test_the_card_of_a_full_folder_opens_it(full, encoder, task):
    opened = from_card(full[0], encoder)
    assert answers_one_by_one(opened["model"], opened["tokenizer"], task) == predicted(full[0])


def test_a_published_folder_continues_no_text(full, lora):
    for folder, said in ((full[0], "holds BertForSequenceClassification, and"), (lora[0], "holds an adapter")):
        with pytest.raises(TaskError, match=said):
            generate.run(GenerateConfig(model=str(folder), prompts=["x"], max_new_tokens=2))


BAD_RUNS = {
    "no model": ({"model": "nowhere"}, "nowhere: there is no such folder"),
    "a model folder without config.json": ({"model": "."}, "it has no config.json"),
    "max_length beyond the model": (
        {"max_length": POSITIONS + 1},
        f"max_length = {POSITIONS + 1}, but the model takes",
    ),
    "more labels than examples": ({"labels": 161}, "train.jsonl has 160"),
}


@pytest.mark.parametrize("case", BAD_RUNS)
def test_a_run_that_fails_leaves_nothing_behind(case, encoder, task, tmp_path, monkeypatch):
    changes, said = BAD_RUNS[case]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TaskError, match=said):
        run(settings(encoder, task, tmp_path / "runs/out", **changes))
    assert entries(tmp_path) in ([], ["runs"])


def test_a_run_that_fails_while_training_leaves_the_earlier_result_alone(encoder, task, full, tmp_path):
    out = shutil.copytree(full[0], tmp_path / "out")
    broken = shutil.copytree(encoder, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")  # a file of no tensors
    with pytest.raises(TaskError, match="lacks weights of its model"):
        run(settings(broken, task, out, replace=True))
    assert entries(tmp_path) == ["broken", "out"]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        path.name: path.read_bytes() for path in full[0].iterdir()
    }


def test_a_training_that_diverges_is_refused_with_its_rate(encoder, task, tmp_path):
    with pytest.raises(TaskError, match=r"diverged at learning rate 1e\+30\n  seed 10: .*\n  take that rate out"):
        run(settings(encoder, task, tmp_path / "out", learning_rates=[1e30], labels=16, epochs=1))
    assert not (tmp_path / "out").exists()


def test_damaged_weights_are_refused_with_what_transformers_says(encoder, tmp_path):
    broken = shutil.copytree(encoder, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(TaskError, match=r"cannot open the model of .*broken\n  it says: "):
        train.build(start(broken), 0)


BAD_CONFIGS = {
    "a random base for adapters": ({"init": "random", "method": "lora"}, "init = random contradicts method = lora"),
    "a test seed that chose the rate": (
        {"test_seeds": [0]},
        r"dev_seeds and test_seeds = \[0, 0\]: a value occurs twice",
    ),
    "a rate of 0": ({"learning_rates": [0.0]}, "greater than 0"),
    "the model as out": ({"out": "model"}, "out = model would replace a folder that is read"),
    "a test seed below 0": ({"test_seeds": [-1]}, "test_seeds.0 = -1"),
    "a dev seed that NumPy does not take": ({"dev_seeds": [2**32]}, "dev_seeds.0 = 4294967296"),
    "rates to compare and no seed": ({"dev_seeds": []}, "dev_seeds is missing"),
    "a misspelt key": ({"learning_rate": 1e-3}, "did you mean learning_rates"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_contradictory_configuration_is_refused(case):
    changes, said = BAD_CONFIGS[case]
    values = settings(Path("model"), Path("task"), Path("out")).model_dump()
    with pytest.raises(ConfigError, match=said):
        build_config(FinetuneConfig, values | changes, "test")


def test_importing_the_stage_imports_no_other_module_of_ours_and_neither_torch_nor_transformers():
    code = "import sys, pretrain.finetune; print(*sorted(sys.modules))"
    found = set(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout.split())
    assert {"torch", "transformers", "peft"}.isdisjoint(found)
    ours = {name.split(".")[1] for name in found if name.startswith("pretrain.")}
    assert ours <= {"finetune", "errors", "config", "storage", "display", "huggingface"}


@pytest.mark.parametrize("path", sorted((ROOT / "configs/sample").glob("finetune-*.yaml")), ids=lambda path: path.stem)
def test_every_sample_configuration_fits_its_sample_task(path):
    config = load(FinetuneConfig, path)
    _, method, language = path.stem.split("-")
    assert config.out == f"runs/demo/finetune/{language}-{method}"
    assert (config.method, config.init) == {
        "full": ("full", "pretrained"), "lora": ("lora", "pretrained"), "random": ("full", "random"),
    }[method]  # fmt: skip
    task = read_task(ROOT / config.task)
    assert config.labels is None or config.labels <= len(task.train)


@pytest.mark.parametrize(("name", "kind"), [("finetune", FinetuneConfig), ("generate", GenerateConfig)])
def test_the_commented_configuration_has_every_key(name, kind):
    path = ROOT / "configs" / "small" / f"{name}.yaml"
    assert set(yaml.safe_load(path.read_text(encoding="utf-8"))) == set(kind.model_fields)
    load(kind, path)
