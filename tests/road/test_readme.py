"""The commands of the pages run as printed in a fresh copy of the checkout, and the README has the right figures."""

import importlib
import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from pretrain import config
from pretrain.tools.demo import DemoConfig, show, summarise
from pretrain.training.watch import metrics
from tests.conftest import ROOT
from tests.helpers.scripts import run

# Overrides that make the commands short. `make demo` runs them in full.
SHORT = {
    "configs/sample/encoder.yaml": [
        *("phases.0.steps=4", "phases.1.steps=4", "phases.1.decay_steps=4", "evaluate.max_tokens=2048", "log_every=4"),
    ],
    "configs/sample/decoder.yaml": [
        *("phases.0.steps=8", "phases.0.decay_steps=4", "evaluate.max_tokens=2048", "log_every=4"),
    ],
    "configs/small/encoder.yaml": [
        *("phases.0.steps=2", "phases.1.steps=2", "phases.1.decay_steps=2", "evaluate.max_tokens=2048"),
    ],
    "configs/small/decoder.yaml": ["phases.0.steps=2", "phases.0.decay_steps=1", "evaluate.max_tokens=2048"],
    # The tutorial draws the pictures of configs/small/tokenizer-bert.yaml.
    "configs/sample/tokenizer-bert.yaml": ["plot=false"],
    "configs/sample/tokenizer-byte.yaml": ["plot=false"],
    "configs/small/tokenizer-byte.yaml": ["plot=false"],
    "configs/small/clean.yaml": ["workers=1"],
    "launch/finetune.py": ["labels=64", "epochs=1", "learning_rates=[1e-3]", "dev_seeds=[0]", "test_seeds=[10]"],
    "launch/generate.py": ["max_new_tokens=4"],
}


@dataclass(frozen=True)
class Fence:
    """A fenced block of code on a page."""

    language: str
    title: str
    text: str

    @property
    def lines(self) -> list[str]:
        """The lines without comments, because comments are in the language of the page."""
        kept = [re.sub(r"(^|\s+)#.*", "", line) for line in self.text.splitlines()]
        return [line for line in kept if line.strip()]


def fences(page: str) -> list[Fence]:
    """Return the fenced blocks of a page in order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.findall(r'^```(\w*)(?: title="(.*?)")?\n(.*?)^```$', text, re.DOTALL | re.MULTILINE)
    return [Fence(*parts) for parts in found]


def block_with(page: str, script: str) -> list[str]:
    """Return the commands of the first block on a page that calls a script."""
    blocks = (fence.lines for fence in fences(page) if fence.language == "sh" and not fence.title)
    return next(lines for lines in blocks if any(script in line for line in lines))


LADDER = block_with("docs/en/first-hour.md", "launch/generate.py")
TUTORIAL = block_with("docs/en/your-corpus.md", "launch/clean.py")
WALKED = {*LADDER, *TUTORIAL}  # the commands that tests run in order, as printed
ANSWERED = ("launch/explain.py", "launch/check_files.py")  # every call of these scripts on the pages is run


def walk(checkout: Path, commands: list[str]) -> None:
    """Copy the checkout and run the commands in the copy, with the overrides in SHORT."""
    for name in ("launch", "configs", "data", "pretrain"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    run(checkout, commands, SHORT)


DEMO, NUMBERS = (re.compile(rf"<!-- {name} -->\n(.*?)<!-- end -->", re.DOTALL) for name in ("demo", "numbers"))
READMES = {"README.md": "en", "README.zh-CN.md": "zh"}


def figures(text: str) -> list[str]:
    return re.findall(r"\d[\d,.]*(?:e[+-]\d+)?", text)


def figures_of_the_demo(summary: dict) -> list[str]:
    """Return every figure of `make demo` that the README shows, in the order of the README."""
    found = []
    for made in summary["tokenizer"].values():
        found += [f"{made['vocab_size']:,}", f"{made['characters_per_token']:.2f}", f"{made['unknown_rate']:.2%}"]
    for name, last in (("encoder", "heldout_accuracy"), ("decoder", "heldout_bits_per_byte")):
        model = summary[name]
        found += [f"{model['parameters'] / 1e6:.1f}", f"{model['steps']:,}"]
        found += [f"{model[key]:.2f}" for key in ("heldout_loss", "heldout_standard_error", "no_context_loss")]
        found += [f"{model[last]:.1%}" if name == "encoder" else f"{model[last]:.3f}"]
    found += [f"{summary[name]['max_logit_diff']:.1e}" for name in ("encoder", "decoder")]
    for language in ("en", "zh"):
        full, lora, random = (summary["finetune"][f"{language}-{way}"] for way in ("full", "lora", "random"))
        for made in (full, lora):
            found += [f"{value:.1%}" for value in (made["test"]["accuracy"], *made["test"]["interval95"])]
        found += [f"{random['test']['accuracy']:.1%}", f"{full['baselines']['naive_bayes']:.1%}"]
    found.append(f"{summary['seconds']['total']:.0f}")
    return [figure.removesuffix("%") for figure in found]


@pytest.mark.parametrize("readme", READMES)
def test_the_readme_shows_the_figures_of_the_results(readme, monkeypatch):
    text = (ROOT / readme).read_text(encoding="utf-8")
    demo = json.loads((ROOT / "benchmarks/results/demo-cpu.json").read_text(encoding="utf-8"))["summary"]
    assert figures(DEMO.search(text)[1]) == figures_of_the_demo(demo)

    monkeypatch.syspath_prepend(str(ROOT / "docs" / "tables"))
    measured = importlib.import_module("tables").table("summary", READMES[readme])
    assert ratios(NUMBERS.search(text)[1], column=2) == ratios(measured, column=2)


def ratios(table: str, column: int) -> list[str]:
    """Return the cells of one column of a Markdown table, without its head."""
    rows = [line.split("|")[1:-1] for line in table.splitlines() if line.startswith("|")]
    return [row[column].strip() for row in rows[2:]]


@pytest.mark.parametrize("readme", READMES)
def test_the_readme_is_short_and_its_links_lead_somewhere(readme):
    text = (ROOT / readme).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 170
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert link.startswith("https://") or (ROOT / link).exists(), link


def test_the_readme_trains_on_ones_own_text_with_commands_of_the_tutorial():
    assert set(block_with("README.md", "launch/clean.py")) <= set(TUTORIAL)


@pytest.fixture(scope="module")
def walked(tmp_path_factory) -> Path:
    """A copy of the checkout in which every command of the ladder has run in order."""
    checkout = tmp_path_factory.mktemp("checkout")
    assert len(LADDER) >= 15
    walk(checkout, LADDER)
    return checkout


def test_the_ladder_leads_from_text_to_a_fine_tuned_model(walked, monkeypatch, capsys):
    monkeypatch.chdir(walked)
    assert metrics.reports(Path("runs/demo/encoder"))[-1].step == 8, "the overrides made it short"
    summary = summarise(config.load(DemoConfig, "configs/sample/demo.yaml"), {"all": 1.0}, 1.0)
    json.dumps(summary)
    for name in ("encoder", "decoder"):
        assert Path(summary[name]["export"], "config.json").exists() and Path(summary[name]["run"]).exists()
        assert summary[name]["max_logit_diff"] <= 1e-4
        assert summary[name]["no_context_loss"] > 4
    assert summary["decoder"]["heldout_bits_per_byte"] > 0 and summary["encoder"]["heldout_bits_per_byte"] is None
    assert summary["tokenizer"]["tokenizer-byte"]["unknown_rate"] == 0
    show(summary)
    shown = capsys.readouterr().out
    assert "held-out bits per byte" in shown and "export, largest logit difference" in shown


def test_every_question_on_the_pages_is_answered(walked):
    pages = ["README.md", *(str(page.relative_to(ROOT)) for page in (ROOT / "docs" / "en").rglob("*.md"))]
    shown = [fence for page in pages for fence in fences(page) if fence.language == "sh" and not fence.title]
    asked = {line for fence in shown for line in fence.lines if any(script in line for script in ANSWERED)}
    assert len(asked) >= 8
    run(walked, sorted(asked), {})


def test_every_command_of_the_demo_is_in_the_ladder():
    from pretrain.tools.demo import _command, _stages

    demo = config.load(DemoConfig, ROOT / "configs/sample/demo.yaml")
    commands = {" ".join(_command(script, path, demo.ranks)) for script, path in _stages(demo)}
    assert commands <= set(LADDER)


def test_the_demo_names_the_command_that_failed(tmp_path):
    shutil.copytree(ROOT / "launch", tmp_path / "launch")  # without configs/, the first command has no configuration
    command = [sys.executable, str(ROOT / "launch/demo.py"), str(ROOT / "configs/sample/demo.yaml")]
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, timeout=120)
    assert done.returncode == 1
    assert "failed: exit status 2 from: python launch/tokenizer.py" in done.stderr and "Traceback" not in done.stderr
