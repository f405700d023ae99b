"""A tiny BERT made by hand, tasks whose answer is one word, and stock transformers and peft opening what comes out."""

import io
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from pretrain.config import build as build_config
from pretrain.config import load
from pretrain.errors import ConfigError, TaskError
from pretrain.finetune import FinetuneConfig, compare, run, scores, train
from pretrain.finetune.task import Example, class_lines, read_task, stratified
from pretrain.huggingface import identity
from pretrain.prompting import generate
from pretrain.prompting.generate import GenerateConfig
from pretrain.storage.index import write_index
from tests.helpers.entries import entries

ROOT = Path(__file__).resolve().parents[2]
FILLERS = ["the", "a", "old", "young", "river", "stone", "sings", "walks", "under", "over", "with", "and", "[SEP]"]
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
POSITIONS = 24


def examples(count: int, seed: int, pairs: bool = False) -> list[dict]:
    """Texts of 2 to 30 words; `sun` or `moon` somewhere among the first ten decides the label."""
    draw = random.Random(seed)
    made = []
    for i in range(count):
        word, label = (("sun", "light"), ("moon", "dark"))[i % 2]
        words = draw.choices(FILLERS, k=draw.choice([1, 4, 9, 9, 29]))
        words.insert(draw.randrange(min(10, len(words) + 1)), word)
        made.append({"text": " ".join(words), "label": label} | ({"text_pair": "old stone"} if pairs else {}))
    return made


def write_task(folder: Path, **splits: list[dict] | str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in splits.items():
        text = (
            lines if isinstance(lines, str) else "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        )
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tasks") / "sun_moon"
    return write_task(folder, train=examples(160, 1), dev=examples(40, 2), test=examples(60, 3))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    """BertForMaskedLM, 2 layers x 32, without pooler; a WordPiece vocabulary of the words above."""
    from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "encoder"
    vocabulary = [*SPECIALS, *sorted({*FILLERS, "sun", "moon", "[", "]", "sep"} - {"[SEP]"})]
    engine = Tokenizer(models.WordPiece({token: i for i, token in enumerate(vocabulary)}, unk_token="[UNK]"))
    engine.normalizer, engine.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    engine.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(folder)
    BertTokenizerFast(tokenizer_object=engine, model_max_length=POSITIONS).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> Path:
    """Qwen3ForCausalLM, 2 layers x 32, over bytes; a text begins with <eod>."""
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("models") / "decoder"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    engine = Tokenizer(models.BPE({token: i for i, token in enumerate(["<pad>", "<eod>", *alphabet])}, []))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    engine.post_processor = processors.TemplateProcessing(single="<eod> $A", special_tokens=[("<eod>", 1)])
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=258, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        intermediate_size=64, max_position_embeddings=64, bos_token_id=1, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=engine, bos_token="<eod>", eos_token="<eod>", pad_token="<pad>", padding_side="left"
    )
    tokenizer.save_pretrained(folder)
    return folder


def settings(encoder: Path, task: Path, out: Path, **changes) -> FinetuneConfig:
    values = {
        "model": str(encoder), "task": str(task), "out": str(out), "method": "full", "labels": 120, "epochs": 5,
        "batch": 8, "learning_rates": [1e-6, 5e-3], "dev_seeds": [0], "test_seeds": [10, 11], "max_length": POSITIONS,
    }  # fmt: skip
    return FinetuneConfig(**values | changes)


LORA = {"method": "lora", "learning_rates": [1e-2], "test_seeds": [10], "epochs": 8}


TINY = {"labels": 16, "epochs": 1, "learning_rates": [1e-6], "dev_seeds": [], "test_seeds": [1]}


@pytest.fixture(scope="module")
def full(encoder, task, tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("runs") / "full"
    return out, run(settings(encoder, task, out))


@pytest.fixture(scope="module")
def lora(encoder, task, tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("runs") / "lora"
    return out, run(settings(encoder, task, out, **LORA))


def answers_one_by_one(model, tokenizer, folder: Path) -> list[str]:
    """Labels for test.jsonl, one text at a time: no padding, no order to confuse."""
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


# The task


def test_a_task_has_the_sorted_labels_of_train_and_keeps_pairs_and_lines(tmp_path):
    pairs = [
        {"text": "你好", "text_pair": "再见", "label": "b", "score": 3.5},
        {"text": "x", "text_pair": "y", "label": "a"},
    ]
    task = read_task(write_task(tmp_path / "t", train=pairs, dev=pairs[:1], test="\n" + json.dumps(pairs[1]) + "\n\n"))
    assert task.labels == ["a", "b"]
    assert task.train[0] == Example("你好", "再见", "b", 1)
    assert task.test == [Example("x", "y", "a", 2)]


GOOD = '{"text": "x", "label": "a"}\n{"text": "y", "label": "b"}\n'
BAD_TASKS = {
    "missing file": (None, ["lacks dev.jsonl", "add it"]),
    "empty file": ("\n", ["holds no example", "dev.jsonl"]),
    "bad JSON": (GOOD + '{"text": "x", label}', ["not valid JSON", "dev.jsonl, line 3, column 15", "label}"]),
    "not an object": ("[1]", ["JSON object", "line 1", "[1]"]),
    "missing label": (GOOD + '{"text": "x"}', ["no label", "dev.jsonl, line 3", "found the keys: text"]),
    "missing text": ('{"label": "a"}', ["no text", "line 1"]),
    "a number as label": ('{"text": "x", "label": 1}', ["label must be a string", "line 1", "found: 1"]),
    "empty text": ('{"text": " ", "label": "a"}', ["text must be a string that is not empty", "line 1"]),
    "unknown label": (
        GOOD + '\n{"text": "x", "label": "c"}',
        ["'c' never occurs in train", "line 4", "train has: a, b"],
    ),
    "a pair among texts": ('{"text": "x", "text_pair": "y", "label": "a"}', ["text_pair", "line 1"]),
    "half of an emoji as text": (
        GOOD + r'{"text": "bad \ud83d", "label": "a"}',
        ["text is not valid Unicode", "dev.jsonl, line 3", "character 5", r"'\ud83d'"],
    ),
    "half of an emoji as label": (r'{"text": "x", "label": "a\udc00"}', ["label is not valid Unicode", "line 1"]),
    "deep nesting": (GOOD + "[" * 200_000, ["not valid JSON", "dev.jsonl, line 3: it is nested too deeply"]),
    "a number of 6,000 digits": (
        '{"text": "x", "label": "a", "id": ' + "9" * 6000 + "}",
        ["not valid JSON", "dev.jsonl, line 1: a number in it has more than 4,300 digits"],
    ),
    "a label with a space": ('{"text": "x", "label": "a "}', ["'a ' never occurs in train", "write it as there: 'a'"]),
}


@pytest.mark.parametrize("case", BAD_TASKS)
def test_a_bad_task_is_refused_with_file_and_line(case, tmp_path):
    dev, fragments = BAD_TASKS[case]
    folder = write_task(tmp_path / "t", train=GOOD, test=GOOD, **({} if dev is None else {"dev": dev}))
    with pytest.raises(TaskError) as caught:
        read_task(folder)
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_text_that_is_not_utf8_is_refused_with_its_line(tmp_path):
    folder = write_task(tmp_path / "t", train=GOOD, dev=GOOD, test=GOOD)
    (folder / "test.jsonl").write_bytes(GOOD.encode() + '{"text": "汉", "label": "a"}'.encode("gb18030"))
    with pytest.raises(TaskError, match=r"UTF-8\n.*test\.jsonl, line 3, byte 11 of the line: 0xba\n  convert it"):
        read_task(folder)


def test_a_single_class_and_a_missing_folder_are_refused(tmp_path):
    one = GOOD.splitlines()[0]
    with pytest.raises(TaskError, match=r"two classes\n.*train\.jsonl has only 'a'"):
        read_task(write_task(tmp_path / "t", train=one, dev=one, test=one))
    with pytest.raises(TaskError, match="no such task folder"):
        read_task(tmp_path / "nowhere")


@pytest.mark.parametrize("other", ["a ", "A", "\u3000a", "\uff21"])
def test_labels_that_differ_in_spaces_or_capitals_alone_are_refused_with_both_lines(other, tmp_path):
    twice = GOOD + json.dumps({"text": "z", "label": other}) + "\n"
    with pytest.raises(TaskError, match=r"differ only in(.|\n)*train\.jsonl, line 1: 'a'\n.*train\.jsonl, line 3: '"):
        read_task(write_task(tmp_path / "t", train=twice, dev=GOOD, test=GOOD))


@pytest.mark.parametrize(("one", "other"), [("caf\u00e9", "cafe\u0301"), ("new york", "new \xa0york")])
def test_one_label_in_two_unicode_forms_is_refused(one, other, tmp_path):
    both = "".join(json.dumps({"text": "x", "label": label}) + "\n" for label in (one, other, "b"))
    with pytest.raises(TaskError, match=f"{re.escape(ascii(one))}\n.*{re.escape(ascii(other))}"):
        read_task(write_task(tmp_path / "t", train=both, dev=GOOD, test=GOOD))


@pytest.mark.parametrize("name", ["x" * 300, "nul\0inside"])
def test_a_name_that_no_file_system_takes_is_refused(name, tmp_path):
    with pytest.raises(TaskError, match=r"cannot be read|no such task folder"):
        read_task(tmp_path / name)
    with pytest.raises(TaskError, match=r"cannot be opened|no such folder"):
        identity(str(tmp_path / name))


def test_the_classes_are_listed_with_their_counts_the_largest_first():
    task = {"train": "aab", "dev": "b", "test": ""}
    texts = {split: [Example("x", None, label, 1) for label in labels] for split, labels in task.items()}
    lines = class_lines(texts)
    assert [line.split() for line in lines] == [
        ["class", "train", "dev", "test"], ["a", "2", "0", "0"], ["b", "1", "1", "0"],
    ]  # fmt: skip
    assert class_lines(texts, shown=1)[-1] == "  and 1 smaller classes"


def test_a_stratified_choice_keeps_shares_has_every_class_and_grows_by_addition():
    pool = [Example(f"text {i}", None, "abbbcccccd"[i % 10] if i else "rare", i) for i in range(200)]
    chosen = {count: stratified(pool, count, seed=4) for count in (5, 50, 51, 100, 200)}
    assert Counter(e.label for e in chosen[5]).keys() == {"a", "b", "c", "d", "rare"}
    assert Counter(e.label for e in chosen[100]) == {"a": 9, "b": 30, "c": 50, "d": 10, "rare": 1}
    assert set(chosen[50]) < set(chosen[51])
    assert chosen[200] == pool
    assert stratified(pool, 50, seed=5) != chosen[50]
    assert set(stratified(pool[::-1], 50, seed=4)) == set(chosen[50])


def test_more_labels_than_examples_or_fewer_than_classes_are_refused():
    pool = [Example("x", None, label, 1) for label in "ab"]
    with pytest.raises(TaskError, match=r"labels = 3, but train\.jsonl has 2"):
        stratified(pool, 3, 0)
    with pytest.raises(TaskError, match="less than one example for each of 2 classes"):
        stratified(pool, 1, 0)


# The scores


def slow_naive_bayes(train: list[Example], test: list[Example], units) -> float:
    """By the definition: products of (count + 1) / (grams of the class + vocabulary), one gram at a time, as logs."""

    def bag(example: Example) -> list[tuple]:
        found = []
        for text in [example.text] + ([example.text_pair] if example.text_pair else []):
            cut = units(text)
            found += [(unit,) for unit in cut] + [(cut[i], cut[i + 1]) for i in range(len(cut) - 1)]
        return found

    counts = {label: Counter() for label in sorted({e.label for e in train})}
    for example in train:
        counts[example.label].update(bag(example))
    vocabulary = {gram for counter in counts.values() for gram in counter}
    right = 0
    for example in test:
        best, answer = -math.inf, None
        for label, counter in counts.items():
            score = math.log(sum(e.label == label for e in train) / len(train))
            for gram in bag(example):
                if gram in vocabulary:
                    score += math.log((counter[gram] + 1) / (counter.total() + len(vocabulary)))
            if score > best:
                best, answer = score, label
        right += answer == example.label
    return right / len(test)


@pytest.mark.parametrize(("words", "joint", "units"), [("abcdefgh!", " ", str.split), ("天地人日月山水。", "", list)])
def test_naive_bayes_agrees_with_its_definition(words, joint, units):
    draw = random.Random(7)

    def made(count: int) -> list[Example]:
        texts = [[joint.join(draw.choices(words, k=draw.randint(1, 6))) for _ in "12"] for _ in range(count)]
        return [Example(one, two, "xyz"[(one.count(words[0]) + draw.randint(0, 1)) % 3], 0) for one, two in texts]

    train_set, test_set = made(120), made(150)
    assert scores.naive_bayes(train_set, test_set) == slow_naive_bayes(train_set, test_set, units)


def test_naive_bayes_reads_chinese_by_character_and_beats_the_majority_there():
    task = [
        Example(text, None, label, 0) for text, label in (("春眠不觉晓", "春"), ("春色满园", "春"), ("秋风起", "秋"))
    ]
    assert scores.han_share(task) == 1.0
    new = [Example("一夜秋雨", None, "秋", 0), Example("早春", None, "春", 0)]
    assert scores.majority(task, new) == 0.5
    assert scores.naive_bayes(task, new) == 1.0


def test_t_quantiles_are_those_of_the_tables():
    table = {1: 12.706, 2: 4.303, 4: 2.776, 10: 2.228, 11: 2.201, 20: 2.086, 30: 2.042, 100: 1.984}
    assert {df: round(scores.t975(df), 3) for df in table} == table


def test_the_interval_adds_seed_and_test_errors_in_quadrature():
    # s = 0.02, so 4.3027 * 0.02 / sqrt(3) = 0.04968; p = 822 / 1004, so 1.96 * sqrt(p * (1 - p) / 1004) = 0.02383
    low, high = scores.interval95([0.80, 0.82, 0.84], 1000)
    assert (low, high) == pytest.approx((0.82 - 0.05510, 0.82 + 0.05510), abs=1e-5)


def test_the_interval_of_one_seed_is_the_test_set_s_and_a_perfect_score_has_one():
    assert scores.interval95([0.5], 96) == pytest.approx((0.402, 0.598), abs=1e-4)  # 1.96 * sqrt(0.25 / 100)
    low, high = scores.interval95([1.0, 1.0], 100)
    assert high == 1.0
    assert 0.96 < low < 0.98  # the "rule of three" says 0.97


def test_the_interval_covers_the_truth_about_95_times_in_100():
    """Right answers drawn for one test set and noise for each seed; over many repetitions the truth 0.7 is inside."""
    draw = np.random.default_rng(0)
    hits = 0
    for _ in range(1000):
        test_set = 0.7 + draw.normal(0, math.sqrt(0.7 * 0.3 / 400))
        low, high = scores.interval95([test_set + draw.normal(0, 0.02) for _ in range(4)], 400)
        hits += low <= 0.7 <= high
    assert 0.93 <= hits / 1000 <= 0.99


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
    """The pre-trained model cannot differ from its random twin at a rate that changes nothing."""
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


def test_a_base_that_our_export_made_is_known_by_its_fingerprint(encoder, tmp_path):
    ours = shutil.copytree(encoder, tmp_path / "ours")
    index = write_index(ours, {"stage": "export"})
    assert identity(str(ours)) == index["fingerprint"]
    (ours / "model.safetensors").write_bytes(b"shorter")
    with pytest.raises(TaskError, match="truncated"):
        identity(str(ours))


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


# The door


def changed(change):
    """A maker of a copy of a model folder with a file changed by `change(folder)`."""

    def make(folder: Path, to: Path) -> Path:
        change(shutil.copytree(folder, to))
        return to

    return make


def edit(name: str, **values):
    def change(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")

    return change


def flip(folder: Path) -> None:
    """A bit in the middle of the weights of a folder that one of our stages published."""
    write_index(folder, {"stage": "export"})
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[len(data) // 2] ^= 16
    (folder / "model.safetensors").write_bytes(data)


def cut_index(folder: Path) -> None:
    write_index(folder, {"stage": "export"})
    (folder / "index.json").write_bytes((folder / "index.json").read_bytes()[:-9])


def without(*names: str):
    return lambda folder: [(folder / name).unlink() for name in names]


BAD_FOLDERS = {
    "a flipped bit": (flip, "altered after it was made\n  model.safetensors: altered"),
    "a torn index": (cut_index, "index.json is damaged"),
    "code in config.json": (edit("config.json", auto_map={"AutoConfig": "evil.C"}), "asks to run code of its own"),
    "code for the tokenizer": (edit("tokenizer_config.json", auto_map={"AutoTokenizer": ["e.T", None]}), "asks to run"),
    "attention from a hub": (edit("config.json", attn_implementation="someone/kernel"), "asks to run code"),
    "settings that are no JSON": (lambda folder: (folder / "config.json").write_text("{"), "cannot be read as JSON"),
    "an unknown architecture": (edit("config.json", model_type="none"), "cannot open the configuration of"),
    "a setting of the wrong type": (edit("config.json", vocab_size=[1]), "cannot open the "),
    "another width": (edit("config.json", intermediate_size=96), "of another shape than config.json says"),
    "endless layers": (edit("config.json", num_hidden_layers=2**60), "more layers than the folder has weights"),
    "pickled weights": (lambda folder: (folder / "model.safetensors").rename(folder / "x.bin"), "weights are pickles"),
    "an adapter": (lambda folder: (folder / "adapter_config.json").write_text("{}"), "this folder holds an adapter"),
    "no tokenizer": (without("tokenizer.json", "tokenizer_config.json"), "has no tokenizer|open the tokenizer"),
    "no vocabulary": (without("tokenizer.json"), "has no tokenizer|open the tokenizer"),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_a_folder_that_is_altered_or_asks_for_code_or_lacks_parts_is_refused(case, encoder, decoder, task, tmp_path):
    change, said = BAD_FOLDERS[case]
    with pytest.raises(TaskError, match=said):
        run(settings(changed(change)(encoder, tmp_path / "e"), task, tmp_path / "out", **TINY))
    with pytest.raises(TaskError, match=said):
        generate.run(GenerateConfig(model=str(changed(change)(decoder, tmp_path / "d")), prompts=["x"]))
    assert not (tmp_path / "out").exists()


def test_settings_that_fail_only_when_text_is_written_are_refused(decoder, tmp_path):
    broken = changed(edit("generation_config.json", eos_token_id="x"))(decoder, tmp_path / "d")
    with pytest.raises(TaskError, match=r"cannot (continue text with|open the model of) .*\n  it says: "):
        generate.run(GenerateConfig(model=str(broken), prompts=["x"], max_new_tokens=2))


def test_the_tokenizer_of_another_model_is_refused(encoder, decoder, tmp_path):
    swapped = shutil.copytree(encoder, tmp_path / "swapped")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(decoder / name, swapped / name)
    with pytest.raises(TaskError, match=r"the tokenizer of another model\n  its ids go up to 257"):
        train.open_tokenizer(str(swapped), 8)


def test_what_is_no_decoder_generates_nothing(encoder, decoder, full, lora, tmp_path):
    """An encoder, a classifier, one whose config says it is a decoder, an adapter, and what nobody knows."""
    from transformers import AutoModelForSequenceClassification

    classifier, lying = tmp_path / "classifier", tmp_path / "lying"
    AutoModelForSequenceClassification.from_pretrained(decoder, num_labels=2).save_pretrained(classifier)
    shutil.copytree(full[0], lying, ignore=shutil.ignore_patterns("index.json"))
    edit("config.json", architectures=["BertLMHeadModel"], is_decoder=True)(lying)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(decoder / name, classifier / name)
    for folder, said in {
        encoder: "holds BertForMaskedLM, and generate needs a decoder",
        full[0]: "holds BertForSequenceClassification, and",
        classifier: "holds Qwen3ForSequenceClassification, and",
        lying: "as BertLMHeadModel: [0-9]+ missing",
        lora[0]: "holds an adapter",
        changed(edit("config.json", architectures=5))(decoder, tmp_path / "odd"): "holds 5, and",
    }.items():
        with pytest.raises(TaskError, match=said):
            generate.run(GenerateConfig(model=str(folder), prompts=["x"], max_new_tokens=2))


@pytest.mark.parametrize("name", ["transformers", "peft"])
def test_a_missing_library_is_an_error_that_says_what_to_install(name, encoder, monkeypatch, tmp_path, task):
    monkeypatch.setitem(sys.modules, name, None)  # what makes `import` fail as if it were not installed
    with pytest.raises(TaskError, match=rf"this stage needs {name}\n(.|\n)*pip install '\.\[finetune\]'"):
        run(settings(encoder, task, tmp_path / "out"))


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


# Prompts


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
    """Before they are printed: who reads the terminal may be gone."""
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
