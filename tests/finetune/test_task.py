"""Tasks: bad lines are refused with their file and line, and a choice of examples keeps the shares of the classes."""

import json
import re
from collections import Counter

import pytest

from pretrain.errors import TaskError
from pretrain.finetune.task import Example, class_lines, read_task, stratified
from pretrain.huggingface import identity
from tests.helpers.folders import write_task


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
