"""The records of a run: events read by TensorBoard, the lines of the log, and metrics.jsonl after a restart."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pretrain.training.heldout import VALUES
from pretrain.training.watch import metrics
from pretrain.training.watch.log import Interval, StepReport, log_line, peak_flops
from pretrain.training.watch.metrics import Metrics, flat_steps
from tests.conftest import ROOT, run_values
from tests.helpers import cases


def read(folder) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return events


@pytest.mark.parametrize(
    ("objective", "extra"), [("masked_lm", "heldout/accuracy"), ("causal_lm", "heldout/bits_per_byte")]
)
def test_tensorboard_shows_every_series_over_steps_and_over_tokens(objective, extra, prepared, tmp_path):
    values = run_values(prepared, tmp_path / "run", objective, evaluate={"every_steps": 6, "max_tokens": 512})
    cases.train(values)
    steps, tokens = read(tmp_path / "run/tensorboard"), read(tmp_path / "run/tensorboard/by_tokens")
    series = {
        "train/loss", "optim/lr", "optim/grad_norm", "optim/grad_norm_max", "optim/clipped_share",
        "optim/skipped_steps", "speed/tokens_per_s", "speed/data_wait_share", "memory/gib",
        "heldout/loss", extra,
    }  # fmt: skip
    assert series <= set(steps.Tags()["scalars"])
    assert {f"by_tokens/{tag.replace('/', '_')}" for tag in series} <= set(tokens.Tags()["scalars"])
    assert [event.step for event in steps.Scalars("train/loss")] == [4, 8, 12]
    assert [event.step for event in tokens.Scalars("by_tokens/train_loss")] == [4 * 256, 8 * 256, 12 * 256]
    assert [event.step for event in steps.Scalars("heldout/loss")] == [6, 12]
    recorded = metrics.reports(tmp_path / "run")
    means = [sum(report.loss for report in recorded[begin:][:4]) / 4 for begin in (0, 4, 8)]
    assert [event.value for event in steps.Scalars("train/loss")] == pytest.approx(means, rel=1e-6)
    norms = [report.grad_norm for report in recorded[4:8]]
    shown = {tag: steps.Scalars(f"optim/{tag}")[1].value for tag in ("grad_norm_max", "clipped_share")}
    assert shown == pytest.approx({"grad_norm_max": max(norms), "clipped_share": sum(n > 1.0 for n in norms) / 4})
    shown_text = {tag: steps.Tensors(f"{tag}/text_summary")[-1] for tag in ("config", "sample")}
    text = {tag: event.tensor_proto.string_val[0].decode() for tag, event in shown_text.items()}
    assert "mask_ratio" in text["config"] or "causal_lm" in text["config"]
    assert "**[" in text["sample"] if objective == "masked_lm" else "▸" in text["sample"]


def evaluations(run) -> list[dict]:
    return [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("lr", "steps", "learnt"), [(1e-9, 4, False), (1e-2, 120, True)])
def test_a_model_that_makes_nothing_of_context_is_said_to(lr, steps, learnt, prepared, tmp_path, capsys):
    phases = [{"steps": steps, "seq_len": 32, "batch_tokens": 512}]
    values = run_values(prepared, tmp_path / "run", "causal_lm", phases=phases)
    values["optim"] |= {"lr": lr, "warmup_steps": 0}
    summary = cases.train(values)
    warning = "warning: this model predicts held-out text no better than token frequencies do"
    assert (warning not in capsys.readouterr().out) == learnt == (summary["heldout_gain"] > 0), summary


@pytest.mark.parametrize(("fall", "expected"), [(0.0, 200), (0.1, 0), (-0.1, 200)])
def test_a_loss_that_does_not_fall_is_flat(fall, expected, tmp_path):
    """A loss with noise of 0.1, and its fall in 100 steps. Fewer than 200 steps are never called flat."""
    losses = 6 - fall * np.arange(400) / 100 + 0.1 * np.random.default_rng(0).standard_normal(400)
    for count, found in ((400, expected), (300, 0)):
        reports = [StepReport(n + 1, float(loss), 0.1, 1.0, "", 1, 1.0, 1.0) for n, loss in enumerate(losses[:count])]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(vars(report)) + "\n" for report in reports))
        assert flat_steps(tmp_path) == found


def test_a_restart_leaves_one_line_and_one_point_a_step(prepared, tmp_path, capsys):
    """Steps after the checkpoint were recorded before the process died. The restart records them once."""
    values = run_values(prepared, tmp_path / "run", checkpoint={"every_steps": 4}, log_every=1)
    values["evaluate"]["every_steps"] = 3
    cases.train(values)
    complete, scored = cases.history(tmp_path / "run"), evaluations(tmp_path / "run")
    for gone in ("step_00000008", "step_00000012"):
        folder = tmp_path / "run/checkpoints" / gone
        for file in folder.iterdir() if folder.exists() else ():
            file.unlink()
    with open(tmp_path / "run/metrics.jsonl", "a") as file:
        file.write('{"step": 13, "los')  # torn by the kill
    with open(tmp_path / "run/evaluations.jsonl", "a") as file:
        file.write('{"step": 3, "corpus": 7}\n{"step": 12, "cor')
    values["checkpoint"] = {"every_steps": 4, "keep": 3}
    cases.train(values)
    assert cases.history(tmp_path / "run") == complete and evaluations(tmp_path / "run") == scored
    assert "evaluations.jsonl: 1 damaged line removed" in capsys.readouterr().out
    assert [(score["step"], score["corpus"]) for score in scored] == [(step, "") for step in (3, 6, 9, 12)]
    assert set(scored[0]) == {"step", "corpus", "targets", "learnt", *VALUES}
    points = [event.step for event in read(tmp_path / "run/tensorboard").Scalars("train/loss")]
    assert points == list(range(1, 13))
    lines = (tmp_path / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 13))


def test_the_log_line_shows_units_and_never_a_guess():
    values = {"train/loss": 3.4123, "optim/lr": 4.1e-4, "optim/grad_norm": 0.62, "speed/tokens_per_s": 412_345.0}
    values["speed/data_wait_share"] = 0.01
    assert log_line(120, 20_000, values, 11_520) == (
        "step   120/20000  loss 3.412  lr 4.1e-04  grad 0.62  412k tok/s  mfu ?  wait 1%  eta 3h12m"
    )
    values["speed/mfu"] = 0.384
    del values["optim/grad_norm"]
    line = log_line(1, 10, values, 65, skipped=3)
    assert "grad not finite  skipped 3 steps since the last line" in line
    assert "mfu 38%" in line and line.endswith("eta 1m05s")


def test_mfu_is_known_only_for_listed_devices():
    import torch

    assert peak_flops(torch.device("cpu")) is None


def report(step: int) -> StepReport:
    return StepReport(step, 2.0 + step, 1e-3, 1.0, "00ff", 256 * step, 0.1, 0.0)


def line(**changes) -> bytes:
    return json.dumps({**vars(report(3)), **changes}).encode()


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"\0" * 300,
        b"\xff",
        b'{"step": 3, "los',
        b"[1, 2]",
        b"3",
        line(step="3"),
        b'{"step": ' + b"9" * 5000 + b"}",
        line(loss="high"),
        line(digest=7),
        line(tokens=-1),
        b"[" * 100_000,
    ],
    ids=lambda damage: repr(damage[:24]),
)
def test_a_damaged_line_is_removed_and_the_steps_that_are_missing_are_named(damage, tmp_path, capsys):
    lines = [json.dumps(vars(report(step))).encode() for step in (1, 2, 4, 5, 6, 9)]
    lines.insert(2, damage)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(line + b"\n" for line in lines) + b'{"step": 10, "lo')  # torn by kill -9
    found = Metrics(tmp_path, 8, 8 * 256, 4, 8, "seed: 1")
    assert [report.step for report in found.before] == [5, 6]
    assert [report.step for report in metrics.reports(tmp_path)] == [1, 2, 4, 5, 6]
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 and f"{path} had 1 damaged line, now removed, and lacks steps 3, 7 to 8;" in said[0]
    found.record(report(9))
    found.close()
    assert [report.step for report in metrics.reports(tmp_path)] == [1, 2, 4, 5, 6, 9]


def test_a_step_that_is_not_finite_is_null_and_older_ones_are_read(tmp_path):
    found = Metrics(tmp_path, 0, 0, 0, 0, "seed: 1")
    found.record(replace(report(1), loss=None, grad_norm=None))
    found.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert '"loss": null' in text and '"grad_norm": null' in text
    (tmp_path / "metrics.jsonl").write_text(text.replace('"loss": null', '"loss": NaN'))
    assert metrics.reports(tmp_path)[0].loss is None


def test_means_are_over_finite_steps_and_the_speed_over_steps_of_this_attempt():
    steps = [report(1), replace(report(2), loss=None, grad_norm=None), replace(report(3), grad_norm=4.0)]
    interval = Interval(steps[:1])
    for step in steps[1:]:
        interval.add(replace(step, step_s=0.5))
    values = interval.values(1.0, 256)
    assert values["train/loss"] == 4.0 and values["optim/grad_norm"] == values["optim/grad_norm_max"] == 4.0
    assert values["optim/clipped_share"] == 0.5 and interval.skipped == 1
    assert values["speed/tokens_per_s"] == 512 and interval.step_s == 0.5
    interval = Interval()
    interval.add(steps[1])
    assert not {"train/loss", "optim/grad_norm", "optim/clipped_share"} & interval.values(None, 256).keys()


def test_records_that_are_removed_or_cannot_be_written_are_warned_of_once_and_begun_again(tmp_path, capsys):
    found = Metrics(tmp_path, 0, 0, 0, 0, "seed: 1")
    found.record(report(1))
    found.scalars({"train/loss": 1.0}, 1, 256)
    shutil.rmtree(tmp_path / "tensorboard")
    (tmp_path / "metrics.jsonl").unlink()
    for step in (2, 3):
        found.record(report(step))
        found.scalars({"train/loss": float(step), "optim/grad_norm": float("nan")}, step, 256 * step)
    assert [report.step for report in metrics.reports(tmp_path)] == [2, 3]
    assert [event.step for event in read(tmp_path / "tensorboard").Scalars("train/loss")] == [2, 3]
    assert [event.step for event in read(tmp_path / "tensorboard/by_tokens").Scalars("by_tokens/train_loss")] == [
        512,
        768,
    ]
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 3 and all("was removed or replaced" in line and "the training goes on" in line for line in said)

    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    found.record(report(4))
    (tmp_path / "metrics.jsonl").unlink()  # there is space again: nothing is lost
    found.record(report(5))
    found.close()
    assert [report.step for report in metrics.reports(tmp_path)] == [4, 5]
    full = Metrics(tmp_path / "other", 0, 0, 0, 0, "seed: 1")
    (tmp_path / "other").mkdir(exist_ok=True)
    (tmp_path / "other/metrics.jsonl").symlink_to("/dev/full")
    full.record(report(1))
    full.record(report(2))
    full.sync()
    full.close()
    (said,) = capsys.readouterr().out.splitlines()
    assert "other/metrics.jsonl cannot be written: No space left on device" in said


def test_a_log_that_cannot_be_written_does_not_end_a_run():
    code = "from pretrain.training.watch.log import say; say('a'); say('b')"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0 and done.stderr.count("the log cannot be written: No space left") == 1, done.stderr
