"""Checkpoints that a run saves and removes: after steps that are not finite, after a kill, and when asked to stop."""

import json
import math
import os
import signal
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pretrain.errors import ConfigError, PretrainError, Stopped
from pretrain.training import checkpoint, trainer
from pretrain.training.engine.local import LocalEngine
from pretrain.training.heldout import HeldOut
from tests.conftest import run_values
from tests.helpers import cases
from tests.helpers.ranks import on_ranks
from tests.training.test_checkpoint import steps_saved

LR_AT = trainer.lr_at
LONG = [{"steps": 40, "seq_len": 32, "batch_tokens": 256}]
EVERY_STEP = {"every_steps": 1, "keep": 1}


def lr_of_a_flipped_bit(step: int, *settings) -> float:
    """One learning rate is far too large: step 8 is finite and leaves ruined weights."""
    return 1e30 if step == 7 else LR_AT(step, *settings)


@pytest.mark.parametrize(
    ("every", "left", "said"),
    [
        (3, [3, 6], "the newest checkpoint, {6}, is from before: start again"),
        (4, [4, 8], "the newest checkpoint is {8}; no finite step has followed it, so its weights may be ruined\n"),
        (1, [7, 8], "if so, remove it to continue from {7}"),
    ],
)
def test_a_run_that_diverges_keeps_what_it_had_and_says_what_that_is(
    every, left, said, prepared, tmp_path, monkeypatch
):
    keep = 2 if every == 3 else 1
    values = run_values(prepared, tmp_path / "run", phases=LONG, checkpoint={"every_steps": every, "keep": keep})
    monkeypatch.setattr(trainer, "lr_at", lr_of_a_flipped_bit)
    with pytest.raises(PretrainError, match="no finite loss and gradient in 20 steps in a row, 9 to 28") as failed:
        cases.train(values)
    assert steps_saved(tmp_path / "run") == left
    places = {str(step): tmp_path / f"run/checkpoints/step_{step:08d}" for step in left}
    assert filled(said, places) in str(failed.value)
    assert "NaN" not in (tmp_path / "run/metrics.jsonl").read_text()

    monkeypatch.setattr(trainer, "lr_at", LR_AT)  # the fault does not happen again, and the user follows the advice
    if every != 3:
        for file in (tmp_path / "run/checkpoints/step_00000008").iterdir():
            file.unlink()
        (tmp_path / "run/checkpoints/step_00000008").rmdir()
    assert math.isfinite(cases.train(values)["heldout_loss"])


def filled(text: str, places: dict[str, Path]) -> str:
    for name, place in places.items():
        text = text.replace(f"{{{name}}}", str(place))
    return text


def test_ranks_of_every_stage_keep_what_they_had(prepared, tmp_path):
    runs = [
        run_values(
            *(prepared, tmp_path / str(stage)),
            **{"phases": LONG, "engine": {"zero_stage": stage}, "checkpoint": EVERY_STEP, "model": {"layers": 1}},
        )
        for stage in (0, 1, 2, 3)
    ]
    for said in on_ranks(2, diverge, runs, log=tmp_path / "two.log"):
        assert len(said) == 4 and all("in 20 steps in a row, 9 to 28" in message for message in said), said
    assert [steps_saved(tmp_path / str(stage)) for stage in (0, 1, 2, 3)] == 4 * [[7, 8]]


def diverge(runs: list[dict]) -> list[str]:
    """Train each run with one learning rate that is far too large, and return the errors that end them."""
    trainer.lr_at, said = lr_of_a_flipped_bit, []
    for values in runs:
        try:
            cases.train(values)
        except PretrainError as error:
            said.append(str(error))
    return said


def test_ruined_weights_at_the_end_are_not_the_result(prepared, tmp_path, monkeypatch):
    """Steps 9 and 10 of 10 are skipped: neither is saved, and there is no summary."""
    ten = [{**LONG[0], "steps": 10}]
    values = run_values(prepared, tmp_path / "run", phases=ten, checkpoint={"every_steps": 3, "keep": 1})
    monkeypatch.setattr(trainer, "lr_at", lr_of_a_flipped_bit)
    with pytest.raises(PretrainError, match=r"loss at step 10 is not finite.*\n.*step_00000006, is from before"):
        cases.train(values)
    assert steps_saved(tmp_path / "run") == [6] and not (tmp_path / "run/summary.json").exists()


@pytest.mark.parametrize("bad", [6, 12])
def test_one_step_that_is_skipped_is_said_counted_and_costs_no_checkpoint(bad, prepared, tmp_path, monkeypatch, capsys):
    """Step 6, where a checkpoint is due: step 7 is saved. The last step: saved once its held-out loss is finite."""
    begin(monkeypatch, bad)
    values = run_values(prepared, tmp_path / "run", checkpoint={"every_steps": 6, "keep": 9})
    summary = cases.train(values)
    assert steps_saved(tmp_path / "run") == ([7, 12] if bad == 6 else [6, 12])
    assert summary["steps_skipped"] == 1 and math.isfinite(summary["last_loss"])
    history = cases.history(tmp_path / "run")
    assert [step for step, loss, norm, _ in history if loss is None and norm is None] == [bad]
    assert capsys.readouterr().out.count("skipped 1 step since the last line") == 1
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    line = -(-bad // 4) * 4
    losses = [loss for step, loss, *_ in history if line - 4 < step <= line and loss is not None]
    shown = {event.step: event.value for event in events.Scalars("train/loss")}
    assert shown[line] == pytest.approx(sum(losses) / 3, rel=1e-6)
    assert {event.step: event.value for event in events.Scalars("optim/skipped_steps")}[line] == 1
    text = (tmp_path / "run/metrics.jsonl").read_text() + (tmp_path / "run/summary.json").read_text()
    assert "NaN" not in text and json.loads((tmp_path / "run/summary.json").read_text())


def begin(monkeypatch, bad: int) -> None:
    """From now on the loss of step `bad` is not finite."""
    step, forward = LocalEngine.step, LocalEngine.__call__
    done = [0]

    def counted(self, lr):
        done[0] += 1
        return step(self, lr)

    def poisoned(self, objective, batch, each=False):
        found = forward(self, objective, batch, each)
        poisons = done[0] == bad - 1 and self.module.training
        return {part: loss * float("nan") for part, loss in found.items()} if poisons else found

    monkeypatch.setattr(LocalEngine, "step", counted)
    monkeypatch.setattr(LocalEngine, "__call__", poisoned)


def test_the_last_checkpoint_is_there_before_the_last_evaluation(prepared, tmp_path, monkeypatch):
    values = run_values(prepared, tmp_path / "run")
    with monkeypatch.context() as killed:
        killed.setattr(HeldOut, "batch", lambda *_: os._exit(9))
        pid = os.fork()
        if pid == 0:
            cases.train(values)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert steps_saved(tmp_path / "run") == [12]
    assert cases.train(values)["steps"] == 12 and (tmp_path / "run/summary.json").exists()


def test_a_run_killed_while_it_writes_its_first_file_begins_again(prepared, tmp_path, monkeypatch):
    values = run_values(prepared, tmp_path / "run", phases=[{"steps": 2, "seq_len": 32, "batch_tokens": 256}])
    with monkeypatch.context() as killed:
        killed.setattr(os, "fsync", lambda _: os._exit(9))
        pid = os.fork()
        if pid == 0:
            cases.train(values)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert [path.suffix for path in (tmp_path / "run").iterdir()] == [".tmp"]
    assert cases.train(values)["steps"] == 2


@pytest.mark.parametrize("at", [6, 12])
def test_a_run_that_is_asked_to_stop_while_it_evaluates_saves_and_stops(at, prepared, tmp_path, monkeypatch, capsys):
    cases.train(run_values(prepared, tmp_path / "straight"))
    sections = {"evaluate": {"every_steps": at, "max_tokens": 1 << 20}, "checkpoint": {"every_s": 0}}
    values = run_values(prepared, tmp_path / "run", **sections)
    batch, batches = HeldOut.batch, []

    def asked(self, numbers):
        batches.append(numbers)
        os.kill(os.getpid(), signal.SIGTERM)
        return batch(self, numbers)

    with monkeypatch.context() as once:
        once.setattr(HeldOut, "batch", asked)
        with pytest.raises(Stopped) as stopped:
            cases.train(values)
    assert stopped.value.exit_code == 75 and len(batches) == 1
    assert f"stopped at step {at} (SIGTERM): saved" in capsys.readouterr().out
    assert steps_saved(tmp_path / "run") == [at] and not (tmp_path / "run/summary.json").exists()
    assert cases.train(values)["steps"] == 12
    assert cases.history(tmp_path / "run") == cases.history(tmp_path / "straight")
    scored = [json.loads(line) for line in (tmp_path / "run/evaluations.jsonl").read_text().splitlines()]
    assert [(score["step"], score["corpus"]) for score in scored] == [(step, "") for step in sorted({at, 12})]
    if at == 6:  # the mean of steps 5 to 8, two of which are from the attempt before
        means = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step  8/12")]
        losses = [loss for step, loss, *_ in cases.history(tmp_path / "run") if 5 <= step <= 8]
        assert f"loss {sum(losses) / 4:.3f}" in means[0]


def test_a_run_that_is_asked_to_stop_where_steps_are_not_finite_saves_nothing_and_says_so(
    prepared, tmp_path, monkeypatch, capsys
):
    values = run_values(prepared, tmp_path / "run", phases=LONG, checkpoint={"every_steps": 3, "keep": 1})

    def asked(step: int, *settings) -> float:
        if step == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return lr_of_a_flipped_bit(step, *settings)

    monkeypatch.setattr(trainer, "lr_at", asked)
    with pytest.raises(Stopped):
        cases.train(values)
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith("stopped at step 10 (SIGTERM): not saved, 2 steps in a row had no finite loss and gradient;")
    assert f"the newest checkpoint, {checkpoint.newest(tmp_path / 'run')}, is from before" in said
    assert steps_saved(tmp_path / "run") == [6]


def test_an_output_folder_behind_a_broken_link_is_refused_before_the_run(prepared, tmp_path):
    (tmp_path / "run").symlink_to(tmp_path / "gone/run")
    with pytest.raises(ConfigError, match=r"cannot be made(?s:.*)gone/run, which is not there"):
        cases.train(run_values(prepared, tmp_path / "run"))
