"""What a watcher sees: TensorBoard's own reader on our events, the log line, metrics.jsonl across a restart."""

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pretrain import metrics
from pretrain.metrics import log_line
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


def test_a_restart_leaves_one_line_and_one_point_a_step(prepared, tmp_path):
    """Steps after the checkpoint were recorded and lost with the process; the restart records them once."""
    values = run_values(prepared, tmp_path / "run", checkpoint={"every_steps": 4}, log_every=1)
    cases.train(values)
    complete = cases.history(tmp_path / "run")
    for gone in ("step_00000008", "step_00000012"):
        folder = tmp_path / "run/checkpoints" / gone
        for file in folder.iterdir() if folder.exists() else ():
            file.unlink()
    with open(tmp_path / "run/metrics.jsonl", "a") as file:
        file.write('{"step": 13, "los')  # torn by the kill
    values["checkpoint"] = {"every_steps": 4, "keep": 3}
    cases.train(values)
    assert cases.history(tmp_path / "run") == complete
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
