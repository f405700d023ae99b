"""Apply the modules and changes of the pages about extending to a copy of the checkout, and run their commands."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pretrain.training.watch.metrics import reports
from tests.conftest import ROOT
from tests.helpers.scripts import run

BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
# These commands run before those of the pages and make what the sample configurations read.
PREPARE = (
    "python launch/tokenizer.py configs/sample/tokenizer-byte.yaml vocab_size=1024 plot=false",
    "python launch/shards.py configs/sample/shards-byte.yaml",
)
# Overrides that make the commands of the pages short.
SHORT = {
    "launch/pretrain.py": [
        "phases=[{steps: 4, seq_len: 32, batch_tokens: 256}]",
        *("evaluate.max_tokens=512", "model.layers=1", "engine.micro_batch=4", "log_every=1"),
    ],
    "launch/clean.py": ["plot=false"],
}


def pages(language: str = "en") -> list[Path]:
    return sorted((ROOT / "docs" / language / "extend").glob("*.md"))


def blocks(page: Path) -> list[tuple[str, str, str]]:
    """Return language, title and text of every fenced block of a page."""
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def extended(checkout: Path) -> Path:
    """Copy the checkout and apply everything that the pages add."""
    for name in ("launch", "configs", "data", "pretrain"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    for page in pages():
        for kind, title, text in blocks(page):
            if kind == "python":
                assert not (checkout / title).exists(), title
                (checkout / title).write_text(text, encoding="utf-8")
            elif kind == "diff":
                path = checkout / title
                path.write_text(patched(path.read_text(encoding="utf-8"), text, title), encoding="utf-8")
    return checkout


def patched(source: str, diff: str, title: str) -> str:
    """Apply the hunks of a diff to `source`. Hunks are separated by `@@`."""
    for hunk in diff.split("@@\n"):
        lines = hunk.splitlines(keepends=True)
        before = "".join(line[1:] for line in lines if line[0] in " -")
        after = "".join(line[1:] for line in lines if line[0] in " +")
        assert source.count(before) == 1, f"{title} does not have exactly once:\n{before}"
        source = source.replace(before, after)
    return source


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """The extended checkout after all commands of the pages have run."""
    made = extended(tmp_path_factory.mktemp("extended") / "checkout")
    shown = [text for page in pages() for kind, _, text in blocks(page) if kind == "sh"]
    run(made, [*PREPARE, *"".join(shown).splitlines()], SHORT)
    return made


def test_both_languages_show_the_same_code():
    for english, chinese in zip(pages("en"), pages("zh"), strict=True):
        assert blocks(english) == blocks(chinese), english.name


def test_the_objective_of_the_page_trains(checkout):
    summary = json.loads((checkout / "runs/suffix/summary.json").read_text())
    assert summary["steps"] == 4
    assert "suffix_lm" in (checkout / "runs/suffix/config.yaml").read_text()


def test_the_optimizer_of_the_page_saves_its_own_state(checkout):
    (newest,) = (checkout / "runs/sgd/checkpoints").iterdir()
    assert {path.name for path in newest.glob("*.safetensors")} == {
        *("weights.safetensors", "momentum_buffer.safetensors")
    }


def test_the_optimizer_of_the_page_resumes_bit_by_bit_and_moves_between_stages_and_ranks(checkout):
    """Steps 5 to 8: in one run, continued by one process, and continued by two ranks at ZeRO 1 and then at ZeRO 3."""
    command = "launch/pretrain.py configs/sample/decoder.yaml optim='{kind: sgd, lr: 0.1, warmup_steps: 40}'"
    straight, resumed, moved = (checkout / f"runs/sgd-{name}" for name in ("straight", "resumed", "moved"))
    for copy in (resumed, moved):
        shutil.copytree(checkout / "runs/sgd", copy)
    to_8 = {"launch/pretrain.py": [*SHORT["launch/pretrain.py"], "phases.0.steps=8"]}
    run(checkout, [f"python {command} out={folder}" for folder in (straight, resumed)], to_8)
    moves = {"engine.zero_stage=1": ["phases.0.steps=6"], "engine.zero_stage=3": ["phases.0.steps=8"]}
    said = run(
        checkout, [f"deepspeed --num_accelerators 2 {command} out={moved} {move}" for move in moves], SHORT | moves
    )
    assert all(f"DeepSpeed ZeRO {stage}, 2 x cpu" in said for stage in (1, 3))
    losses, by_one, by_two = ([report.loss for report in reports(folder)] for folder in (straight, resumed, moved))
    assert len(losses) == 8 and by_one == losses
    assert by_two == pytest.approx(losses, abs=1e-4)
    momenta, by_one, by_two = (
        load_file(folder / "checkpoints/step_00000008/momentum_buffer.safetensors")
        for folder in (straight, resumed, moved)
    )
    assert momenta.keys() == by_one.keys() == by_two.keys()
    for name, momentum in momenta.items():
        assert torch.equal(by_one[name], momentum), name
        torch.testing.assert_close(by_two[name], momentum, atol=1e-5, rtol=0)


def test_the_evaluation_of_the_page_is_recorded_when_it_is_due(checkout):
    folder = checkout / "runs/repetition"
    accumulator = EventAccumulator(str(folder / "tensorboard"))
    accumulator.Reload()
    points = accumulator.Scalars("heldout/repetition_gain")
    assert [point.step for point in points] == [2, 4]
    gain = json.loads((folder / "summary.json").read_text())["repetition_gain"]
    assert gain == pytest.approx(points[-1].value, abs=1e-6)
    assert abs(gain) < 0.5, "four steps teach nobody to look back"


def test_the_dialect_of_the_page_is_opened_by_transformers(checkout):
    config = json.loads((checkout / "runs/mistral-hf/config.json").read_text())
    assert config["architectures"] == ["MistralForCausalLM"]
    assert (checkout / "runs/mistral-hf/index.json").is_file()  # export writes it only if logits and ids are equal


def test_the_cleaning_step_of_the_page_takes_out_page_numbers(checkout):
    report = json.loads((checkout / "runs/clean/report.json").read_text(encoding="utf-8"))
    assert all("page_numbers" in [step["step"] for step in source["steps"]] for source in report["sources"])
    program = (
        "from pretrain.cleaning.pipeline import StepsConfig, steps\n"
        "alone = dict.fromkeys(StepsConfig.model_fields, 'false') | {'page_numbers': 'true'}\n"
        "[step] = steps(StepsConfig.model_validate(alone), 'en')\n"
        "print(step.apply('one\\n- 12 -\\nin 1984\\n').text)"
    )
    found = subprocess.run([sys.executable, "-c", program], cwd=checkout, capture_output=True, text=True, check=True)
    assert found.stdout == "one\nin 1984\n\n"
