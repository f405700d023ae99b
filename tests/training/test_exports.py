"""A run exports while it trains: its losses do not change, and an export that was killed is made again."""

import json
import time

import pytest

from pretrain.storage.index import INDEX
from pretrain.training.checkpoint import folder_of
from tests.conftest import run_values
from tests.helpers import cases
from tests.helpers.ranks import Ranks, on_ranks

pytest.importorskip("transformers", reason="needs pip install '.[export]'")

EXPORT = {"dialect": "bert", "every_steps": 4}
PHASES = [{"steps": 10, "seq_len": 32, "batch_tokens": 256}]


def test_exports_change_no_loss_survive_a_kill_and_warn_if_they_fail(prepared, tmp_path):
    """Two ranks. The export of step 4 fails because its folder is taken; kill -9 comes in the middle of step 8's."""
    values = {
        name: run_values(prepared, tmp_path / name, phases=PHASES, model={"dropout": 0.1}, export=export)
        for name, export in (("without", {"dialect": "bert"}), ("with", EXPORT))
    }
    on_ranks(2, cases.train, values["without"], log=tmp_path / "without.log")
    exports = tmp_path / "with/exports"
    (exports / "step_00000004").mkdir(parents=True)
    (exports / "step_00000004/notes.txt").write_text("mine")
    (tmp_path / "with/config.yaml").write_text("")  # so that the folder is known as a run's

    ranks = Ranks(2, cases.train, values["with"], log=tmp_path / "killed.log")
    deadline = time.monotonic() + 120
    while not list(exports.glob(".step_00000008.tmp/config.json")):
        assert time.monotonic() < deadline, ranks.logs()
        time.sleep(0.02)
    ranks.kill()
    said = (tmp_path / "killed.0.log").read_text()
    assert f"warning: {exports}/step_00000004 was not made\n  error: the output folder holds something else" in said
    assert "  the training goes on; once this is corrected: pretrain export CONFIG.yaml checkpoint=" in said
    assert not (exports / "step_00000008").exists()

    on_ranks(2, cases.train, values["with"], log=tmp_path / "resumed.log")
    said = (tmp_path / "resumed.0.log").read_text()
    assert f"{exports}/step_00000008: equal to step 8 in transformers" in said and "was not made" not in said
    assert said.index("step_00000008: equal") < said.index("step 10/10"), "the training waited"
    assert sorted(path.name for path in exports.iterdir() if not path.name.startswith(".")) == [
        "step_00000004",
        "step_00000008",
    ]
    assert not list(exports.glob(".*.tmp"))
    index = json.loads((exports / "step_00000008/index.json").read_text())
    assert index["checkpoint"] == json.loads((folder_of(tmp_path / "with", 8) / INDEX).read_text())["fingerprint"]
    assert index["recorded"]["certificate"]["max_logit_diff"] <= 1e-4
    assert cases.history(tmp_path / "with") == cases.history(tmp_path / "without")
