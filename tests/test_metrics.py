"""What a watcher sees: TensorBoard's own reader on our events, the log line, metrics.jsonl across a restart."""

import json

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pretrain import metrics
from pretrain.evaluate import VALUES
from pretrain.metrics import StepReport, flat_steps, log_line
from tests import cases
from tests.conftest import run_values


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
    shown = steps.Scalars("train/loss")[-1].value
    assert shown == pytest.approx(sum(report.loss for report in recorded[8:]) / 4, rel=1e-6)
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
    """Noise of 0.1, and what it falls by in 100 steps; fewer than 200 steps say nothing."""
    losses = 6 - fall * np.arange(400) / 100 + 0.1 * np.random.default_rng(0).standard_normal(400)
    for count, found in ((400, expected), (300, 0)):
        reports = [StepReport(n + 1, float(loss), 0.1, 1.0, "", 1, 1.0, 1.0) for n, loss in enumerate(losses[:count])]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(vars(report)) + "\n" for report in reports))
        assert flat_steps(tmp_path) == found


def test_a_restart_leaves_one_line_and_one_point_a_step(prepared, tmp_path, capsys):
    """Steps after the checkpoint were recorded and lost with the process; the restart records them once."""
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
    assert set(scored[0]) == {"step", "corpus", "targets", *VALUES}
    points = [event.step for event in read(tmp_path / "run/tensorboard").Scalars("train/loss")]
    assert points == list(range(1, 13))
    assert [json.loads(line)["step"] for line in open(tmp_path / "run/metrics.jsonl")] == list(range(1, 13))


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

    assert metrics.peak_flops(torch.device("cpu")) is None
