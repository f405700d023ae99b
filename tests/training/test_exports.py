"""A run exports while it trains: its losses do not change, and an export that was killed is made again."""

import json
import sys
import time

import pytest

from pretrain.processes.signals import Interrupt
from pretrain.storage.index import INDEX, write_index
from pretrain.tools import check_files
from pretrain.training.checkpoint import folder_of
from pretrain.training.engine.peers import Peers
from pretrain.training.engine.ranks import World
from pretrain.training.exports import Exports
from tests.conftest import run_values
from tests.helpers import cases
from tests.helpers.ranks import Ranks, on_ranks

pytest.importorskip("transformers", reason="needs pip install '.[export]'")

PHASES = [{"steps": 10, "seq_len": 32, "batch_tokens": 256}]


def test_an_export_changes_no_loss_and_is_made_again_after_a_kill(prepared, tmp_path):
    """Two ranks; kill -9 comes in the middle of the export of step 8."""
    values = {
        name: run_values(prepared, tmp_path / name, phases=PHASES, model={"dropout": 0.1}, export=export)
        for name, export in (("without", {"dialect": "bert"}), ("with", {"dialect": "bert", "every_steps": 8}))
    }
    on_ranks(2, cases.train, values["without"], log=tmp_path / "without.log")
    exports = tmp_path / "with/exports"
    with Ranks(2, cases.train, values["with"], log=tmp_path / "killed.log") as ranks:
        deadline = time.monotonic() + 120
        while not list(exports.glob(".step_00000008.tmp/config.json")):
            assert time.monotonic() < deadline, ranks.logs()
            time.sleep(0.02)
    assert not (exports / "step_00000008").exists()

    on_ranks(2, cases.train, values["with"], log=tmp_path / "resumed.log")
    said = (tmp_path / "resumed.0.log").read_text()
    assert "continuing after step 8" in said and "was not made" not in said
    assert f"{exports}/step_00000008: equal to step 8 in transformers" in said
    assert said.index("step_00000008: equal") < said.index("step 10/10"), "the training waited"
    assert sorted(path.name for path in exports.iterdir()) == [".step_00000008.lock", "step_00000008"]
    index = json.loads((exports / "step_00000008/index.json").read_text())
    assert index["checkpoint"] == json.loads((folder_of(tmp_path / "with", 8) / INDEX).read_text())["fingerprint"]
    assert index["recorded"]["certificate"]["max_logit_diff"] <= 1e-4
    assert check_files.published(tmp_path / "with")[-1] == exports / "step_00000008"
    assert check_files.check(exports / "step_00000008") == []
    assert cases.history(tmp_path / "with") == cases.history(tmp_path / "without")


def test_an_export_that_fails_is_said_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    exports = Exports(tmp_path, "bert", 4, Peers(World()))
    assert [step for step in range(1, 10) if exports.due_at(step)] == [4, 8]
    interrupt, python = Interrupt(watch_launcher=False), tmp_path / "python"
    exports.make(4, interrupt)  # its checkpoint is gone
    assert capsys.readouterr().out == ""
    folder_of(tmp_path, 4).mkdir(parents=True)
    write_index(folder_of(tmp_path, 4), {"stage": "checkpoint"})
    python.write_text("#!/bin/sh\necho error: the disk is full >&2\nexit 2\n")
    monkeypatch.setattr(sys, "executable", str(python))
    exports.make(4, interrupt)
    assert "not made: Permission denied; the training goes on" in capsys.readouterr().out
    python.chmod(0o755)
    exports.catch_up(step=5, begun=4, interrupt=interrupt)  # another run made step 4
    assert capsys.readouterr().out == ""
    exports.catch_up(step=5, begun=0, interrupt=interrupt)
    said = capsys.readouterr().out
    assert f"warning: {tmp_path}/exports/step_00000004 was not made\n  error: the disk is full\n  the training" in said
    assert f"pretrain export CONFIG.yaml checkpoint={folder_of(tmp_path, 4)}" in said
