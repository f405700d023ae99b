"""What a checkpoint survives: torn copies, killed saves, phases, other places."""

import json
import shutil
from pathlib import Path

import pytest

from pretrain import checkpoint, folders
from pretrain.checkpoint import Checkpoint
from pretrain.errors import ConfigError, ResumeError
from tests import cases
from tests.conftest import run_values
from tests.ranks import on_ranks
from tests.test_resume import kill_after_checkpoint

PHASES = [{"steps": 5, "seq_len": 16, "batch_tokens": 256}, {"steps": 7, "seq_len": 32, "batch_tokens": 512}]


def curriculum(prepared, out: Path, **sections) -> dict:
    values = run_values(prepared, out, phases=PHASES, evaluate={"every_steps": 4, "max_tokens": 512}, **sections)
    values["data"] = {**values["data"], "block_tokens": 64, "workers": 2}
    return {**values, "checkpoint": {"every_steps": 3, "keep": 9}}


@pytest.mark.parametrize("step", [3, 6])
def test_a_run_in_two_phases_with_workers_and_evaluation_continues_bit_by_bit(step, prepared, tmp_path):
    """Killed in its first phase, and in its second."""
    straight, killed = curriculum(prepared, tmp_path / "straight"), curriculum(prepared, tmp_path / "killed")
    on_ranks(2, cases.train, straight, log=tmp_path / "straight.log")
    kill_after_checkpoint(2, killed, tmp_path, True, step=step)
    on_ranks(2, cases.train, killed, log=tmp_path / "resumed.log")
    assert cases.history(tmp_path / "killed") == cases.history(tmp_path / "straight")
    one, other = (Checkpoint(checkpoint.newest(tmp_path / name)) for name in ("straight", "killed"))
    assert one.index["fingerprint"] == other.index["fingerprint"], "equal runs in two places are one identity"


def test_a_torn_checkpoint_is_passed_over_and_does_not_stand_in_the_way(prepared, tmp_path):
    values = run_values(prepared, tmp_path / "run", checkpoint={"every_steps": 4, "keep": 9})
    cases.train(values)
    whole = cases.history(tmp_path / "run")
    for step in (8, 12):
        (tmp_path / f"run/checkpoints/step_{step:08d}/index.json").unlink()
    (tmp_path / "run/checkpoints/.step_00000010.tmp").mkdir()
    assert checkpoint.newest(tmp_path / "run").name == "step_00000004"
    cases.train(values)
    assert cases.history(tmp_path / "run") == whole
    found = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert found == ["step_00000004", "step_00000008", "step_00000012"]


def test_a_phase_is_appended_after_the_end_and_the_old_summary_is_not_its_result(prepared, tmp_path):
    values = run_values(prepared, tmp_path / "run")
    first = cases.train(values)
    again = cases.train(values)
    assert first["steps"] == again["steps"] == 12
    appended = {"steps": 6, "seq_len": 32, "batch_tokens": 512, "lr": 1e-3, "decay_steps": 6}
    values["phases"] = [*values["phases"], appended]
    longer = cases.train(values)
    assert longer["steps"] == 18 and longer["tokens"] == 12 * 256 + 6 * 512
    assert [step for step, *_ in cases.history(tmp_path / "run")] == list(range(1, 19))


def test_a_running_phase_may_become_longer_and_a_finished_decay_may_not(prepared, tmp_path):
    straight = run_values(prepared, tmp_path / "straight", phases=[phase_of(16, 4)])
    cases.train(straight)
    values = run_values(prepared, tmp_path / "run", checkpoint={"every_steps": 6, "keep": 9}, phases=[phase_of(12, 4)])
    cases.train(values)
    with pytest.raises(ResumeError, match=r"phases\.0\.steps: 12 → 16(?s:.*)step 9 was made with(?s:.*)append a phase"):
        cases.train({**values, "phases": [phase_of(16, 4)]})
    shutil.rmtree(tmp_path / "run/checkpoints/step_00000012")
    cases.train({**values, "phases": [phase_of(16, 4)]})
    assert cases.history(tmp_path / "run") == cases.history(tmp_path / "straight")


def phase_of(steps: int, decay_steps: int) -> dict:
    return {"steps": steps, "seq_len": 32, "batch_tokens": 256, "decay_steps": decay_steps}


def test_a_phase_that_is_over_need_not_divide_among_the_ranks_of_today(prepared, tmp_path):
    """Batch warm-up, then more ranks: 3 windows a step do not divide by 2, and are history."""
    warm_up = {"steps": 4, "seq_len": 32, "batch_tokens": 96}
    values = run_values(prepared, tmp_path / "run", phases=[warm_up], engine={"micro_batch": 1})
    cases.train(values)
    values["phases"] = [warm_up, {"steps": 4, "seq_len": 32, "batch_tokens": 256}]
    on_ranks(2, cases.train, values, log=tmp_path / "two.log")
    assert len(cases.history(tmp_path / "run")) == 8
    with pytest.raises(ConfigError, match="set batch_tokens to 64 or 128"):
        on_two = run_values(prepared, tmp_path / "other", phases=[warm_up], engine={"micro_batch": 2})
        cases.train(on_two)


def test_block_tokens_written_out_or_left_to_their_default_are_the_same(prepared, tmp_path):
    values = run_values(prepared, tmp_path / "run")
    cases.train(values)
    values["data"]["block_tokens"] = 32
    assert cases.train(values)["steps"] == 12
    values["data"]["block_tokens"] = 64
    with pytest.raises(ResumeError, match=r"data\.block_tokens: 32 → 64"):
        cases.train(values)


def test_ranks_that_do_not_see_the_same_run_stop(prepared, tmp_path):
    """Rank 1 has a disk of its own, without the checkpoint that rank 0 continues from."""
    values = run_values(prepared, tmp_path / "rank0/run", checkpoint={"every_steps": 6, "keep": 9})
    cases.train(values)
    shutil.rmtree(tmp_path / "rank0/run/checkpoints/step_00000012")
    (tmp_path / "rank1").mkdir()
    said = on_ranks(2, train_on_its_own_disk, values, str(tmp_path), log=tmp_path / "two.log")
    assert all("the ranks do not see the same run" in message for message in said)
    assert all("checkpoint: rank 0 says" in message and "rank 1 says none" in message for message in said)


def train_on_its_own_disk(values: dict, disks: str) -> str:
    """Train in `disks`/rank<rank>/run, by a relative path as on two nodes; the error that ends it."""
    import os

    os.chdir(f"{disks}/rank{os.environ['RANK']}")
    try:
        cases.train({**values, "out": "run"})
    except ResumeError as error:
        return str(error)
    return "no error"


def test_a_checkpoint_names_what_it_was_made_from(prepared, tmp_path):
    cases.train(run_values(prepared, tmp_path / "run"))
    found = Checkpoint(checkpoint.newest(tmp_path / "run"))
    for stage in ("shards", "tokenizer"):
        folder = getattr(prepared, stage)["bert"]
        assert found.index[stage] == json.loads((folder / folders.INDEX).read_text())["fingerprint"]
    assert found.index["settings"]["seed"] == 7 and "out" not in found.index["settings"]
    (found.folder / "config.yaml").write_text("altered")
    with pytest.raises(ResumeError, match=r"config\.yaml has 7 bytes"):
        Checkpoint(found.folder)
