"""Checkpoints survive torn copies, killed saves, changes of phase, and a move to another folder."""

import json
import os
import resource
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pretrain.errors import ConfigError, ResumeError, UserError
from pretrain.storage.files import write_json
from pretrain.storage.index import INDEX, checksum, fingerprint
from pretrain.storage.locks import locked
from pretrain.training import checkpoint, saving
from pretrain.training.checkpoint import Checkpoint, TrainState
from tests.conftest import run_values
from tests.helpers import cases
from tests.helpers.ranks import on_ranks
from tests.road.test_resume import kill_after_checkpoint

PHASES = [{"steps": 5, "seq_len": 16, "batch_tokens": 256}, {"steps": 7, "seq_len": 32, "batch_tokens": 512}]


def curriculum(prepared, out: Path, **sections) -> dict:
    values = run_values(prepared, out, phases=PHASES, evaluate={"every_steps": 4, "max_tokens": 512}, **sections)
    values["data"] = {**values["data"], "block_tokens": 64, "workers": 2}
    return {**values, "checkpoint": {"every_steps": 3, "keep": 9}}


@pytest.mark.parametrize(("step", "saving"), [(3, False), (6, True)])
def test_a_run_in_two_phases_with_workers_and_evaluation_continues_bit_by_bit(step, saving, prepared, tmp_path):
    """Killed in the first phase after a save, and in the second phase in the middle of a save."""
    straight, killed = curriculum(prepared, tmp_path / "straight"), curriculum(prepared, tmp_path / "killed")
    on_ranks(2, cases.train, straight, log=tmp_path / "straight.log")
    kill_after_checkpoint(2, killed, tmp_path, True, step=step, saving=saving)
    on_ranks(2, cases.train, killed, log=tmp_path / "resumed.log")
    assert "continuing after step 3" in (tmp_path / "resumed.0.log").read_text()
    assert cases.history(tmp_path / "killed") == cases.history(tmp_path / "straight")
    one, other = (Checkpoint(checkpoint.newest(tmp_path / name)) for name in ("straight", "killed"))
    assert one.index["fingerprint"] == other.index["fingerprint"], "equal runs in two places are one identity"
    for index, begun in ((one.index, [0]), (other.index, [0, 3])):
        attempts = index["recorded"]["attempts"]
        assert [attempt["from_step"] for attempt in attempts] == begun
        assert {attempt["ranks"] for attempt in attempts} == {2} and {attempt["nodes"] for attempt in attempts} == {1}
        (read,) = index["recorded"]["read"]
        assert read["tokens"] == 5 * 256 + 7 * 512 and read["padding"] == 0


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


def test_a_checkpoint_with_an_index_is_never_swept(prepared, tmp_path, capsys):
    """A missing file may still be copied again. Only a folder without an index was never complete."""
    cases.train(run_values(prepared, tmp_path / "run", checkpoint={"every_steps": 4, "keep": 9}))
    places = [tmp_path / f"run/checkpoints/step_{step:08d}" for step in (4, 8, 12)]
    (places[1] / "index.json").unlink()
    (places[2] / "weights.safetensors").write_bytes(b"cut")
    checkpoint.sweep(tmp_path / "run", TrainState(4, 4))
    assert [place.exists() for place in places] == [True, False, True]
    assert (
        checkpoint.newest(tmp_path / "run") == places[0]
        and "weights.safetensors has 3 bytes" in capsys.readouterr().out
    )
    # A checkpoint of another version is not passed over: a run that began anew would write over it.
    index = json.loads((places[2] / "index.json").read_text()) | {"format": 99}
    index |= {"fingerprint": fingerprint(index)}
    write_json(places[2] / "index.json", index | {"checksum": checksum(index)})
    with pytest.raises(ResumeError, match="made by another version"):
        checkpoint.newest(tmp_path / "run")


@pytest.mark.parametrize(("keep_every", "left"), [(0, [12]), (4, [4, 8, 12]), (5, [5, 10, 12])])
def test_milestones_are_kept_whatever_keep_says(keep_every, left, prepared, tmp_path):
    every = {"every_steps": 2, "keep": 1, "keep_every": keep_every}
    cases.train(run_values(prepared, tmp_path / "run", checkpoint=every, phases=[{**PHASES[0], "steps": 12}]))
    assert steps_saved(tmp_path / "run") == left


def test_a_run_is_saved_by_the_clock_and_says_when_it_is_saved_only_at_its_end(prepared, tmp_path, capsys):
    short = [{**PHASES[0], "steps": 3}]
    often = {"every_s": 1e-9, "keep": 9}
    cases.train(run_values(prepared, tmp_path / "often", checkpoint=often, phases=short))
    assert {1, 3} <= set(steps_saved(tmp_path / "often")) and "saved only at its end" not in capsys.readouterr().out
    cases.train(run_values(prepared, tmp_path / "end", checkpoint={"every_s": 0}, phases=short))
    assert steps_saved(tmp_path / "end") == [3] and "saved only at its end" in capsys.readouterr().out


def steps_saved(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in (run / "checkpoints").iterdir())


def test_a_flipped_bit_is_found_whatever_the_size_and_by_the_rank_that_hashes_it(prepared, tmp_path, monkeypatch):
    values = run_values(prepared, tmp_path / "run", checkpoint={"every_steps": 6, "keep": 9})
    cases.train(values)
    whole = cases.history(tmp_path / "run")
    monkeypatch.setattr("pretrain.storage.index.SMALL", 0)  # as in folders too large to be hashed at every opening
    newest = checkpoint.newest(tmp_path / "run")
    (tmp_path / "run/summary.json").unlink()
    for name in ("weights", "exp_avg", "exp_avg_sq"):
        file = newest / f"{name}.safetensors"
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 64
        file.write_bytes(data)
        with pytest.raises(ResumeError, match=rf"{name}\.safetensors: altered.*\n  remove .*step_00000012 to use"):
            cases.train(values)
        assert sum(refused(newest, rank, 2) for rank in range(2)) == 1, "two ranks share the hashing"
        data[len(data) // 2] ^= 64
        file.write_bytes(data)
    shutil.rmtree(newest)  # the remedy in the message
    cases.train(values)
    assert cases.history(tmp_path / "run") == whole


def refused(folder: Path, rank: int, ranks: int) -> bool:
    try:
        Checkpoint(folder, rank, ranks)
    except ResumeError:
        return True
    return False


def test_ranks_share_the_files_of_a_checkpoint_and_wait_for_one_that_writes_slowly(prepared, tmp_path):
    """A save takes longer than engine.timeout_s, after which a collective of the engine would end the run."""
    sections = {"engine": {"zero_stage": 3, "timeout_s": 6}, "checkpoint": {"every_steps": 6}}
    values = run_values(prepared, tmp_path / "run", "causal_lm", **sections)
    written = on_ranks(2, train_in_parts_on_a_slow_disk, values, log=tmp_path / "run.log")
    newest = checkpoint.newest(tmp_path / "run")
    names = sorted(path.name for path in newest.glob("*.safetensors"))
    parts = len(names) // 3
    assert parts > 2 and names[0] == f"exp_avg-00001-of-{parts:05d}.safetensors"
    assert all(len(files) > 3 for files in written) and not set(written[0]) & set(written[1])
    tensors = {}
    for name in names:
        assert not set(tensors) & {(name.split("-")[0], tensor) for tensor in load_file(newest / name)}
        tensors |= {(name.split("-")[0], tensor): value for tensor, value in load_file(newest / name).items()}
    load = Checkpoint(newest).tensors()
    assert all(torch.equal(load(*key), value) for key, value in tensors.items())
    assert len(tensors) == 3 * len(Checkpoint(newest).weights())
    values["phases"] = [*values["phases"], {"steps": 2, "seq_len": 32, "batch_tokens": 256, "lr": 1e-3}]
    assert cases.train(values)["steps"] == 14, "one plain process continues from the parts"


def train_in_parts_on_a_slow_disk(values: dict) -> list[str]:
    """Train, and return the names of the tensor files that this rank wrote. One of rank 1 takes 8 seconds to sync."""
    sync, written = os.fsync, []

    def fsync(descriptor: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        if name.endswith(".safetensors"):
            if os.environ["RANK"] == "1" and not written:
                time.sleep(8)
            written.append(name)
        sync(descriptor)

    os.fsync = fsync
    saving.PART_BYTES = 60_000
    cases.train(values)
    return sorted(set(written))


def test_all_ranks_end_with_the_error_of_the_one_that_cannot_go_on(prepared, tmp_path):
    """First another process holds the lock, which only rank 0 asks for; then rank 1 may not write large files."""
    runs = [run_values(prepared, tmp_path / name) for name in ("locked", "limited")]
    with locked(tmp_path / "locked", "pretrain"):
        said = on_ranks(2, errors_of_limited_ranks, runs, log=tmp_path / "two.log")
    for first, second in said:
        assert "another process is making this folder" in first and f"process {os.getpid()} on" in first
        assert "a file may not become so large" in second and "step_00000012 was not written" in second
    assert not (tmp_path / "locked").exists() and not any((tmp_path / "limited/checkpoints").iterdir())


def errors_of_limited_ranks(runs: list[dict]) -> list[str]:
    if os.environ["RANK"] == "1":
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    return errors_of(runs)


def errors_of(runs: list[dict]) -> list[str]:
    """Train each run, and return the errors that end them."""
    said = []
    for values in runs:
        try:
            cases.train(values)
        except UserError as error:
            said.append(str(error))
    return said


def test_no_space_before_the_first_checkpoint_is_said(prepared, tmp_path):
    values = run_values(prepared, tmp_path / "run")
    (said,) = on_ranks(1, error_without_space, values, log=tmp_path / "one.log", launched=False)
    assert "a file may not become so large" in said and "raise the limit" in said
    assert not (tmp_path / "run/config.yaml").exists() and not (tmp_path / "run/checkpoints").exists()


def error_without_space(values: dict) -> str:
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
    return errors_of([values])[0]


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


def test_a_run_with_another_optimizer_continues_nothing_and_a_branch_begins_it_anew(prepared, tmp_path):
    cases.train(run_values(prepared, tmp_path / "run"))
    muon = {"optim": {"kind": "muon", "lr": 0.02}}
    with pytest.raises(ResumeError, match=r"optim\.kind: adamw → muon"):
        cases.train(run_values(prepared, tmp_path / "run", **muon))
    further = {
        **muon,
        "phases": [phase_of(12, 4), {**phase_of(4, 0), "lr": 0.01}],
        "branch_from": {"run": str(tmp_path / "run")},
    }
    branch = run_values(prepared, tmp_path / "branch", **further)
    branch["branch_from"] |= {"step": 12, "optimizer": "keep"}
    with pytest.raises(ResumeError, match=r"cannot keep the state of another optimizer(?s:.*)adamw → muon"):
        cases.train(branch)


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
    """Batch warm-up, then more ranks: 3 windows a step do not divide by 2, but that phase is over."""
    warm_up = {"steps": 4, "seq_len": 32, "batch_tokens": 96}
    values = run_values(prepared, tmp_path / "run", phases=[warm_up], engine={"micro_batch": 1})
    cases.train(values)
    values["phases"] = [warm_up, {"steps": 4, "seq_len": 32, "batch_tokens": 256}]
    on_ranks(2, cases.train, values, log=tmp_path / "two.log")
    assert len(cases.history(tmp_path / "run")) == 8
    with pytest.raises(ConfigError, match="set batch_tokens to 64 or 128"):
        on_two = run_values(prepared, tmp_path / "other", phases=[warm_up], engine={"micro_batch": 2})
        cases.train(on_two)


def test_a_run_resumes_with_a_micro_batch_larger_than_its_first_phase(prepared, tmp_path):
    first = {"steps": 1, "seq_len": 32, "batch_tokens": 128}
    cases.train(run_values(prepared, tmp_path / "run", phases=[first], engine={"micro_batch": 2}))
    longer = [first, {"steps": 2, "seq_len": 32, "batch_tokens": 256}]
    cases.train(run_values(prepared, tmp_path / "run", phases=longer, engine={"micro_batch": 8}))
    assert len(cases.history(tmp_path / "run")) == 3


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
    """Train in `disks`/rank<rank>/run, by a relative path as on two nodes, and return the error that ends the run."""
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
        assert found.index[stage] == json.loads((folder / INDEX).read_text())["fingerprint"]
    assert found.index["settings"]["seed"] == 7 and "out" not in found.index["settings"]
    (found.folder / "config.yaml").write_text("altered")
    with pytest.raises(ResumeError, match=r"config\.yaml has 7 bytes"):
        Checkpoint(found.folder)
