"""The README's stage commands, run as printed in a fresh copy of the checkout; what they write is looked at after."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain import config
from pretrain.tools.demo import DemoConfig, show, summarise
from pretrain.training.watch import metrics
from tests.conftest import ROOT
from tests.helpers.ranks import free_port

# Laid over the commands to make them short; the numbers of the full road are `make demo`'s.
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
    "launch/finetune.py": ["labels=64", "epochs=1", "learning_rates=[1e-3]", "dev_seeds=[0]", "test_seeds=[10]"],
    "launch/generate.py": ["max_new_tokens=4"],
}


def blocks(readme: str) -> list[list[str]]:
    """The commands of each ```sh block, comments left out."""
    text = (ROOT / readme).read_text(encoding="utf-8")
    found = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    return [[line for line in block.splitlines() if line.strip() and not line.startswith("#")] for block in found]


def ladder() -> list[str]:
    return block_with("launch/generate.py")


def block_with(script: str) -> list[str]:
    return next(block for block in blocks("README.md") if any(script in line for line in block))


def walk(checkout: Path, commands: list[str]) -> None:
    """Run commands in a copy of the checkout, made short."""
    for name in ("launch", "configs", "data", "pretrain"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    here = Path(sys.executable).parent
    env = {**os.environ, "PATH": f"{here}:{os.environ['PATH']}"}
    for line in commands:
        command = shlex.split(line)
        command += [override for word in command for override in SHORT.get(word, [])]
        if command[0] == "deepspeed":  # its own port is the same for every run, and two test files run at a time
            command[1:1] = ["--master_port", str(free_port())]
        command[0] = str(here / command[0])
        done = subprocess.run(command, cwd=checkout, env=env, text=True, capture_output=True, timeout=300)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr, f"{line}\n{done.stderr}"


def test_both_readmes_give_the_same_commands():
    assert blocks("README.md") == blocks("README.zh-CN.md")
    for name in ("README.md", "README.zh-CN.md"):
        left = re.findall(r"NUMBERS_\w+", (ROOT / name).read_text(encoding="utf-8"))
        assert not left, "a placeholder was not filled"


@pytest.fixture(scope="module")
def walked(tmp_path_factory) -> Path:
    """A copy of the checkout in which every command of the ladder has been run, in order."""
    checkout = tmp_path_factory.mktemp("checkout")
    assert len(ladder()) >= 15
    walk(checkout, ladder())
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


def test_every_command_of_the_demo_is_in_the_ladder():
    from pretrain.tools.demo import _command, _stages

    demo = config.load(DemoConfig, ROOT / "configs/sample/demo.yaml")
    commands = {" ".join(_command(script, path, demo.ranks)) for script, path in _stages(demo)}
    assert commands <= set(ladder())


def test_the_demo_names_the_command_that_failed(tmp_path):
    command = [sys.executable, str(ROOT / "launch/demo.py"), str(ROOT / "configs/sample/demo.yaml")]
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, timeout=120)
    assert done.returncode == 1
    assert "failed: exit status 2 from: python launch/tokenizer.py" in done.stderr and "Traceback" not in done.stderr
