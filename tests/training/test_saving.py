"""Checkpoints are written while the training goes on: what they hold, when they count, and who waits for them."""

import os
import random
import resource
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pretrain.errors import ResumeError, Stopped
from pretrain.training import checkpoint, saving, trainer
from pretrain.training.checkpoint import Checkpoint
from pretrain.training.saving import Writer
from pretrain.training.watch import metrics
from tests.conftest import run_values
from tests.helpers import cases
from tests.helpers.ranks import Ranks, on_ranks
from tests.training.test_checkpoint import errors_of, steps_saved

LR_AT, WRITE, FINISH = trainer.lr_at, saving._write, Writer.finish


@pytest.mark.parametrize(("world", "stage"), [(1, 1), (2, 1), (2, 2), (2, 3)])
def test_a_checkpoint_written_after_later_steps_holds_the_state_of_its_own(world, stage, prepared, tmp_path):
    """Nothing of step 4 is written before step 7 is done. The run is killed as soon as the checkpoint is there."""
    launched = world > 1
    runs = [
        run_values(prepared, tmp_path / name, engine={"zero_stage": stage}, checkpoint={"every_steps": 4})
        for name in ("straight", "killed")
    ]
    saved = tmp_path / "killed/checkpoints/step_00000004"
    with Ranks(world, train_and_write_late, runs, log=tmp_path / "killed.log", launched=launched) as ranks:
        wait_for(saved.exists, ranks)
    assert metrics.last_step(tmp_path / "killed") >= 7 and checkpoint.newest(tmp_path / "killed") == saved
    on_ranks(world, cases.train, runs[1], log=tmp_path / "resumed.log", launched=launched)
    assert "continuing after step 4" in (tmp_path / "resumed.0.log").read_text()
    assert_same(tmp_path / "straight", tmp_path / "killed")


def train_and_write_late(runs: list[dict]) -> None:
    """Train the first run; then the second, whose threads begin to write three steps after the copy."""
    cases.train(runs[0])

    def write(aside: Path, *arguments):
        wait_for(lambda: metrics.last_step(aside.parents[1]) >= step_of(aside) + 3)
        return WRITE(aside, *arguments)

    saving._write = write
    cases.train(runs[1])


def step_of(aside: Path) -> int:
    return int(aside.name.removeprefix(".step_").removesuffix(".tmp"))


def wait_for(true, ranks: Ranks | None = None) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline and (ranks is None or ranks.processes[0].is_alive()), ranks and ranks.logs()
        time.sleep(0.001)


def assert_same(one: Path, other: Path) -> None:
    assert cases.history(one) == cases.history(other)
    expected, found = cases.state(one), cases.state(other)
    assert expected.keys() == found.keys() and all(torch.equal(tensor, found[key]) for key, tensor in expected.items())


@pytest.mark.parametrize("stage", [1, 2])
def test_a_run_that_is_killed_at_any_point_of_a_slow_write_has_whole_checkpoints_only(stage, prepared, tmp_path):
    """Two ranks, killed three times at random points; writing takes as long as several steps."""
    draw = random.Random(stage)
    phases = [{"steps": 24, "seq_len": 32, "batch_tokens": 256}]
    straight, killed = (
        run_values(
            prepared, tmp_path / name, phases=phases, engine={"zero_stage": stage}, checkpoint={"every_steps": 6}
        )
        for name in ("straight", "killed")
    )
    for number, step in enumerate((6, 12, 18)):
        runs = [straight, killed] if number == 0 else [killed]
        aside, saved = (tmp_path / f"killed/checkpoints/{name}" for name in (f".step_{step:08}.tmp", f"step_{step:08}"))
        with Ranks(2, train_on_a_slow_disk, runs, log=tmp_path / f"killed{number}.log") as ranks:
            wait_for(lambda aside=aside, saved=saved: aside.exists() or saved.exists(), ranks)
            time.sleep(draw.uniform(0, 0.3))
        for folder in (tmp_path / "killed/checkpoints").glob("step_*"):
            Checkpoint(folder)  # raises unless every byte is right
    on_ranks(2, train_on_a_slow_disk, [killed], log=tmp_path / "resumed.log")
    assert_same(tmp_path / "straight", tmp_path / "killed")
    assert not list((tmp_path / "killed/checkpoints").glob(".step_*"))


def train_on_a_slow_disk(runs: list[dict]) -> None:
    """Train the runs. The last one writes 16 KiB at a time, and pauses after each."""
    cases.train_each(runs[:-1])
    saving.CHUNK_BYTES, appended = 1 << 14, saving._appended

    def slowly(*arguments):
        for chunk in appended(*arguments):
            time.sleep(0.004)
            yield chunk

    saving._appended = slowly
    cases.train(runs[-1])


def test_a_rank_that_cannot_write_ends_the_run_at_the_next_step_and_old_checkpoints_stay(prepared, tmp_path):
    phases = [{"steps": 400, "seq_len": 32, "batch_tokens": 256}]
    values = run_values(prepared, tmp_path / "run", phases=phases, checkpoint={"every_steps": 4, "keep": 1})
    for said in on_ranks(2, error_of_a_full_disk, values, log=tmp_path / "two.log"):
        assert "a file may not become so large" in said and "step_00000008 was not written" in said
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step_00000004"]
    assert Checkpoint(tmp_path / "run/checkpoints/step_00000004").state.step == 4
    assert 8 < metrics.last_step(tmp_path / "run") < 400, "the training went on while the checkpoint was written"
    assert "Traceback" not in "".join(path.read_text() for path in tmp_path.glob("two.*.log"))


def error_of_a_full_disk(values: dict) -> str:
    """The error that ends the run. Rank 1 may not write large files from step 6 on."""

    def limited(step: int, *settings) -> float:
        if step == 6 and os.environ["RANK"] == "1":
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        return LR_AT(step, *settings)

    trainer.lr_at = limited
    return errors_of([values])[0]


@pytest.fixture
def held(monkeypatch) -> list[list[int]]:
    """Threads write only when the training waits for them. Lists the complete checkpoints when each begins."""
    waits, there = threading.Event(), []

    def write(aside: Path, *arguments):
        there.append(checkpoint.steps_of(aside.parents[1]))
        assert waits.wait(60)
        waits.clear()
        return WRITE(aside, *arguments)

    def finish(self):
        waits.set()
        return FINISH(self)

    monkeypatch.setattr(saving, "_write", write)
    monkeypatch.setattr(Writer, "finish", finish)
    return there


def test_a_save_waits_for_the_one_before_which_stays_until_it_is_replaced(held, prepared, tmp_path, capsys):
    values = run_values(prepared, tmp_path / "run", checkpoint={"every_steps": 3, "keep": 1})
    cases.train(values)
    said = capsys.readouterr().out
    for before, step in ((3, 6), (6, 9), (9, 12)):
        assert f"s to be saved, until step {before} was written" in said
        assert said.index(f"saved step {before}: the training waited") < said.index(f"step {step} waited ")
    assert held == [[], [3], [6], [9]] and steps_saved(tmp_path / "run") == [12]
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    for name in ("speed/save_stall_s", "speed/save_write_s"):
        found = events.Scalars(name)
        assert [event.step for event in found] == [3, 6, 9, 12] and all(0 < event.value < 60 for event in found)


def test_the_clock_saves_nothing_while_a_checkpoint_is_in_the_making(held, prepared, tmp_path, capsys):
    values = run_values(prepared, tmp_path / "run", checkpoint={"every_s": 1e-9, "keep": 9})
    cases.train(values)
    assert steps_saved(tmp_path / "run") == [1, 12] and "step 12 waited" in capsys.readouterr().out


def test_a_run_that_is_asked_to_stop_completes_what_it_was_writing_and_saves(held, prepared, tmp_path, monkeypatch):
    def asked(step: int, *settings) -> float:
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return LR_AT(step, *settings)

    monkeypatch.setattr(trainer, "lr_at", asked)
    with pytest.raises(Stopped):
        cases.train(run_values(prepared, tmp_path / "run", checkpoint={"every_steps": 4}))
    assert steps_saved(tmp_path / "run") == [4, 6] and held == [[], [4]]


def test_a_plain_process_that_fails_completes_what_it_was_writing(held, prepared, tmp_path, monkeypatch):
    def failing(step: int, *settings) -> float:
        if step == 6:
            raise ResumeError("this step fails")
        return LR_AT(step, *settings)

    monkeypatch.setattr(trainer, "lr_at", failing)
    with pytest.raises(ResumeError, match="this step fails"):
        cases.train(run_values(prepared, tmp_path / "run", checkpoint={"every_steps": 4}))
    assert steps_saved(tmp_path / "run") == [4]
