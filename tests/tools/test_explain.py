"""Compare the command's account of the documents and tokens of a step with the batches that training gets."""

import contextlib
import io
import itertools
import json
import re
import subprocess
import sys
from collections import defaultdict

import numpy as np
import pytest
import yaml

from pretrain import config, shards
from pretrain.corpus import open_corpus
from pretrain.order.run_data import open_run_data
from pretrain.shards import Shards
from pretrain.tokenizer import open_tokenizer
from pretrain.tools import explain
from pretrain.training import loader
from pretrain.training.config import RunConfig
from pretrain.training.watch.log import StepReport
from tests.conftest import ROOT, run_values
from tests.helpers.batches import steps_of

PHASES = [
    {"steps": 9, "seq_len": 16, "batch_tokens": 128},
    {"steps": 40, "seq_len": 32, "batch_tokens": 256},
]


@pytest.fixture(
    scope="module", params=itertools.product(("masked_lm", "causal_lm"), ("stream", "documents")), ids="-".join
)
def plan(request, prepared, tmp_path_factory):
    """A configuration file, and its configuration: several epochs of a small corpus, in two phases."""
    path = tmp_path_factory.mktemp("explain") / "run.yaml"
    kind, windows = request.param
    values = run_values(prepared, path.parent / "run", kind, phases=PHASES)
    values["data"] |= {"windows": windows, "block_tokens": 32 if windows == "stream" else 1024}
    path.write_text(yaml.safe_dump(values))
    return path, config.load(RunConfig, path).resolved()


@pytest.fixture(scope="module")
def said(plan):
    """The printed answers about every step, numbered as metrics.jsonl numbers them."""
    path, run = plan
    return {step: answered(path, "--step", str(step)) for step in range(1, run.steps + 1)}


def answered(*arguments) -> str:
    """Run the command, which must succeed, and return its output."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert explain.main([str(argument) for argument in arguments]) == 0
    return out.getvalue()


def batches(run: RunConfig) -> loader.Batches:
    tokenizer = open_tokenizer(run.data.tokenizer)
    data = open_run_data(run.data, run.phases, run.seed, tokenizer)
    return loader.Batches(data, run.objectives(tokenizer), micro_batch=1)


STRETCH = re.compile(
    r"^ +(\d+) to (\d+) +document ([\d,]+) \((?:whole|from ([\d,]+) of [\d,]+)\)  (\S+, line \d+)", re.M
)


def stretches(text: str) -> list[list[tuple[int, int, int, int, str]]]:
    """(first, last, document, offset, origin) of every stretch, in a list for each sample of a printed step."""
    return [
        [
            (int(first), int(last) + 1, number(document), number(offset or "0"), origin)
            for first, last, document, offset, origin in STRETCH.findall(part)
        ]
        for part in text.split("\nsample ")[1:]
    ]


def number(text: str) -> int:
    return int(text.replace(",", ""))


def test_the_documents_of_a_step_are_those_that_training_reads(plan, said):
    _, run = plan
    held, lead = Shards(run.data.shards), int(run.model.causal)
    for step, micro_batches in enumerate(steps_of(batches(run), 0, 0), 1):
        rows = [micro.batch.rows(slice(n, n + 1)) for micro in micro_batches for n in range(len(micro.batch.inputs))]
        for window, batch in zip(stretches(said[step]), rows, strict=True):
            parts = [held.document(document)[at : at + b - a] for a, b, document, at, _ in window]
            ids = np.concatenate([np.zeros(0, int), *parts])
            if lead:
                assert np.array_equal(ids, batch.targets[0][: len(ids)])
            else:  # masked inputs are not the stored ids, and some ids have become [CLS] or [SEP]
                seen = batch.inputs[0].copy()
                seen[batch.target_index[0]] = batch.targets[0]
                text = ~np.isin(seen[: len(ids)], [held.specials["cls"], held.specials["sep"]])
                assert np.array_equal(ids[text], seen[: len(ids)][text])
            assert len(ids) == run.phases[step > PHASES[0]["steps"]].seq_len or run.data.windows == "documents"


def test_a_document_is_where_its_origin_says(plan, said, prepared):
    _, run = plan
    tokenizer, held = open_tokenizer(run.data.tokenizer), Shards(run.data.shards)
    texts = {document.where: document.text for document in open_corpus(prepared.corpus).documents(("train",))}
    found = {
        (document, origin) for text in said.values() for window in stretches(text) for *_, document, _, origin in window
    }
    assert len(found) > 15
    for document, origin in found:
        (ids,) = tokenizer.encode_batch([texts[origin]])
        assert np.array_equal(held.document(document), ids), origin


def test_the_steps_of_a_document_are_all_the_steps_that_read_it(plan, said):
    path, _ = plan
    seen = defaultdict(set)
    for step, text in said.items():
        for sample, window in enumerate(stretches(text)):
            for first, last, _, offset, origin in window:
                seen[origin].add((step, sample, offset, offset + last - first - 1))
    for origin in sorted(seen)[::7]:
        text = answered(path, "--document", origin)
        rows = re.findall(r"step +([\d,]+)  sample +([\d,]+)  epoch \d  its tokens ([\d,]+) to ([\d,]+)", text)
        assert {tuple(map(number, row)) for row in rows} == seen[origin]
        windows, steps = len({row[:2] for row in rows}), len({row[0] for row in rows})
        assert f"{windows} window{'s' * (windows > 1)} in {steps} step{'s' * (steps > 1)}" in text


def test_a_sample_is_shown_as_the_model_sees_it(plan):
    path, run = plan
    tokenizer = open_tokenizer(run.data.tokenizer)
    *_, micro_batches = steps_of(batches(run), run.steps - 1, 0)
    for sample in (0, 5):
        text, batch = answered(path, "--step", run.steps, "--sample", sample), micro_batches[sample].batch
        inputs = batch.inputs[0].tolist()
        segments = re.findall(r"^segment \d+: .*\n((?:(?!\n(?:segment|\d+ targets)).*\n?)*)", text, re.M)
        assert len(segments) == (1 if batch.segments is None else len(set(batch.segments[0].tolist())))
        shown = re.sub(r"⟨(\S+) → \S+⟩", r"\1", text)
        assert " ".join(map(tokenizer.token_text, inputs[1:6])) in shown
        if not run.model.causal:
            truths = [tokenizer.token_text(truth) for truth in batch.targets[0].tolist()]
            assert re.findall(r"⟨\S+ → (\S+)⟩", text) == truths
            masked = inputs.count(tokenizer.specials["mask"])
            assert f"{len(truths)} targets of 32 tokens" in text and (f"{masked} [MASK]" in text or not masked)


def test_a_run_says_which_of_them_are_done(plan, tmp_path):
    path, _ = plan
    (tmp_path / "config.yaml").write_bytes(path.read_bytes())
    origin = stretches(answered(path, "--step", "3"))[0][0][-1]
    assert "done" not in answered(path, "--document", origin) and "to come" not in answered(path, "--document", origin)
    lines = [vars(StepReport(step, 1.0, 1e-3, 1.0, "0", 256 * step, 0.1, 0.0)) for step in (1, 2, 3, 4)]
    recorded = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(recorded + '\0\0\n{"step": 5, "lo')  # torn by kill -9
    rows = re.findall(r"step +(\d+) .*(done|to come)", answered(tmp_path, "--document", origin))
    assert {"done", "to come"} == {state for _, state in rows}
    assert all((state == "done") == (int(step) <= 4) for step, state in rows)


def test_the_lengths_are_those_of_the_documents(plan):
    path, run = plan
    text = answered(path, "--lengths")
    for side in ("train", "heldout"):
        held = Shards(run.data.shards, side)
        lengths = np.array([len(held.document(n)) for n in range(held.documents)])
        part = text[text.index(f"{side}: ") :]
        assert part.startswith(f"{side}: {len(lengths):,} documents, {lengths.sum():,} tokens")
        rows = re.findall(r"^ +([\d,]+)-([\d,]+) +([\d,]+) ", part.split("shares of")[0], re.M)
        assert sum(number(count) for *_, count in rows) == len(lengths)
        for low, high, count in rows:
            assert number(count) == ((lengths >= number(low)) & (lengths <= number(high))).sum()
        assert f"longer than a window of 32: {(lengths > 32).mean():.1%} of documents" in part


def test_each_corpus_of_a_mixture_is_named_with_its_share(prepared, tmp_path):
    other = tmp_path / "other"
    recipe = tmp_path / "zh.yaml"
    source = {"name": "zh", "language": "zh", "files": [str(prepared.corpus.parent / "zh.txt")]}
    recipe.write_text(yaml.safe_dump({"name": "zh", "heldout_fraction": 0.1, "sources": [source]}))
    shards.run(shards.ShardsConfig(corpus=str(recipe), tokenizer=str(prepared.tokenizer["bert"]), out=str(other)))
    values = run_values(prepared, tmp_path / "run", phases=[{"steps": 4, "seq_len": 32, "batch_tokens": 320}])
    listed = [("all", prepared.shards["bert"], 7), ("zh", other, 3)]
    values["data"] = {
        "corpora": [{"name": name, "shards": str(folder), "weight": weight} for name, folder, weight in listed],
        "tokenizer": str(prepared.tokenizer["bert"]),
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    text = answered(tmp_path / "run.yaml", "--step", "2")
    assert "all: 224 tokens, 70.0% (of the mixture: 70.0%)" in text and "zh: 96 tokens, 30.0%" in text
    zh = next(part for part in text.split("\nsample ") if ": zh, epoch" in part)
    origin = stretches("\nsample " + zh)[0][0][-1]
    steps = answered(tmp_path / "run.yaml", "--document", origin)
    assert "zh, document" in steps and "step         2" in steps


WRONG = {
    "past the end": (["--step", "50"], ["there is no such step", "--step 50", "has steps 1 to 49"]),
    "before the beginning": (["--step", "0"], ["there is no such step"]),
    "no such sample": (["--step", "1", "--sample", "8"], ["--sample 8", "a step has 0 to 7"]),
    "a line without a document": (
        ["--document", "en.txt, line 2"],
        ["no document comes from there", "'en.txt, line 2'"],
    ),
    "no line number": (["--document", "en.txt, line ²"], ["no document comes from there", "'en.txt, line ²'"]),
    "an endless line number": (["--document", f"en.txt, line {'9' * 5000}"], ["no document comes from there"]),
    "no place": (["--document", "somewhere"], ["no document comes from there", "write it as --step does"]),
}


@pytest.mark.parametrize(("question", "fragments"), WRONG.values(), ids=WRONG)
def test_a_question_without_an_answer_says_why(plan, capsys, question, fragments):
    assert explain.main([str(plan[0]), *question]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and all(fragment in said for fragment in fragments), said


REFUSED = {
    "a window that does not divide the block": (
        ["phases.1.seq_len=48", "phases.1.batch_tokens=480"],
        "is not a multiple of phases: seq_len = 48",
    ),
    "too few windows to pack": (
        ["data.windows=documents", "data.block_tokens=256"],
        "data.block_tokens = 256 has space for 8 windows of phases: seq_len = 32",
    ),
    "too many windows to pack": (
        ["data.windows=documents", "data.block_tokens=1048576"],
        "data.block_tokens = 1048576 has space for 65536 windows of phases: seq_len = 16, and data.windows = documents "
        "packs 16 to 16384 together: set it to 2048 (it is fixed when a run begins)",
    ),
    "a mixture of nothing": (["phases.1.mixture={en: 1}"], "phases: mixture names corpora"),
    "no phase": (["phases=[]"], "phases = []"),
    "a seed below 0": (["seed=-1"], "seed = '-1'"),
    "a misspelt key": (["sed=7"], "unknown key sed: did you mean seed?"),
    "a block longer than the corpus": (["data.block_tokens=262144"], "data.block_tokens = 262,144"),
}


@pytest.mark.parametrize(("overrides", "fragment"), REFUSED.values(), ids=REFUSED)
def test_what_would_not_train_is_refused(plan, capsys, overrides, fragment):
    assert explain.main([str(plan[0]), "--step", "20", *overrides]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and fragment in said.err and not said.out, said


def test_a_held_out_document_is_said_to_be_one(plan, prepared, capsys):
    held = next(document.where for document in open_corpus(prepared.corpus).documents(("heldout",)))
    assert explain.main([str(plan[0]), "--document", held]) == 2
    assert f"{held} is held out: no step trains on it" in capsys.readouterr().err


def test_the_documents_of_a_step_need_no_torch(plan):
    code = (
        "import sys; from pretrain.tools.explain import main\n"
        f"assert main([{str(plan[0])!r}, '--step', '20']) == 0\n"
        "print(sorted({'torch', 'deepspeed', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    script = [sys.executable, "launch/explain.py", str(plan[0]), "--step", "20"]
    assert subprocess.run(script, cwd=ROOT, capture_output=True, text=True).stdout == answered(plan[0], "--step", "20")
