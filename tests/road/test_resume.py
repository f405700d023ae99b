"""Twelve steps without a break equal six steps, kill -9 and six more: batches, losses and weights, to the last bit."""

import time
from pathlib import Path

import pytest
import torch

from pretrain import shards, tokenizer
from pretrain.training import checkpoint
from tests.conftest import run_values
from tests.helpers import cases
from tests.helpers.ranks import Ranks, on_ranks

ENGINES = [  # launched, ranks, ZeRO stage, precision
    (False, 1, 1, "fp32"),
    (False, 1, 1, "autocast"),
    (False, 1, 1, "bf16"),
    (True, 1, 3, "fp32"),  # one rank at stage 0 or 1 trains with plain torch
    (True, 2, 0, "fp32"),
    (True, 2, 1, "fp32"),
    (True, 2, 2, "fp32"),
    (True, 2, 3, "fp32"),
    (True, 2, 1, "bf16"),
    (True, 2, 3, "bf16"),
    (True, 2, 1, "autocast"),
    (True, 2, 3, "autocast"),
]


def name_of(case) -> str:
    launched, world, stage, precision = case
    return f"{'zero' + str(stage) if launched else 'local'}-{world}-{precision}"


@pytest.mark.parametrize("case", ENGINES, ids=map(name_of, ENGINES))
def test_a_killed_run_continues_bit_by_bit(case, prepared, tmp_path):
    launched, world, stage, precision = case
    objective = "causal_lm" if stage == 3 or not launched else "masked_lm"
    muon = world == 2 and stage == 3 and precision == "fp32"  # whose matrices all ranks have parts of
    sections = {
        "optim": {"kind": "muon", "lr": 0.02} if muon else {},
        "engine": {"zero_stage": stage, "precision": precision},
        "model": {"dropout": 0.1},
        "checkpoint": {"every_steps": 6},
    }
    straight = run_values(prepared, tmp_path / "straight", objective, **sections)
    killed = run_values(prepared, tmp_path / "killed", objective, **sections)
    kill_after_checkpoint(world, killed, tmp_path, launched, step=6, first=straight)
    on_ranks(world, cases.train, killed, log=tmp_path / "resumed.log", launched=launched)
    assert "continuing after step 6" in (tmp_path / "resumed.0.log").read_text()

    assert cases.history(tmp_path / "killed") == cases.history(tmp_path / "straight")
    expected, found = cases.state(tmp_path / "straight"), cases.state(tmp_path / "killed")
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


OTHERS = {  # objective → keys, ZeRO stage. Special tokens with a role serve as marks here.
    "prefix_lm": ({}, 1),
    "fill_in_middle": ({"prefix_mark": "unk", "suffix_mark": "pad", "middle_mark": "eod", "rate": 1.0}, 3),
    "hybrid": ({"mask_ratio": 0.3}, 3),
    "replaced_token_detection": ({"mask_ratio": 0.3}, 3),
    "span_corruption": ({}, 3),
}
T5 = {"causal": False, "decoder_layers": 1, "positions": "relative", "qk_norm": False}
GENERATOR = {"layers": 1, "width": 16, "heads": 2, "mlp_width": 32}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_killed_run_of_every_other_objective_continues_bit_by_bit_on_two_ranks(kind, prepared, tmp_path):
    """The objectives in OTHERS have batches with further arrays, or arrays in another order, in packed windows."""
    keys, stage = OTHERS[kind]
    encodes = kind == "replaced_token_detection"
    vocabulary = "bert" if encodes or kind == "hybrid" else "byte"
    model = {"generator": GENERATOR, "transform_head": False} if encodes else T5 if kind == "span_corruption" else {}
    data = {"shards": str(prepared.shards[vocabulary]), "tokenizer": str(prepared.tokenizer[vocabulary])}
    if kind == "span_corruption":
        data = with_sentinels(prepared, tmp_path)
    sections = {
        "data": {**data, "windows": "documents", "workers": 1},
        "engine": {"zero_stage": stage},
        "model": {"dropout": 0.1, **model},
        "checkpoint": {"every_steps": 6},
    }
    shape = "masked_lm" if encodes else "causal_lm"
    runs = [run_values(prepared, tmp_path / name, shape, **sections) for name in ("straight", "killed")]
    runs = [values | {"objective": {"kind": kind, **keys}} for values in runs]
    kill_after_checkpoint(2, runs[1], tmp_path, True, step=6, first=runs[0])
    on_ranks(2, cases.train, runs[1], log=tmp_path / "resumed.log")
    assert cases.history(tmp_path / "killed") == cases.history(tmp_path / "straight")
    expected, found = cases.state(tmp_path / "straight"), cases.state(tmp_path / "killed")
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def with_sentinels(prepared, folder: Path) -> dict[str, str]:
    """The section `data` of shards whose vocabulary has sentinels."""
    text, made = str(prepared.corpus), {"tokenizer": str(folder / "tokenizer"), "shards": str(folder / "shards")}
    keys = {"kind": "byte", "vocab_size": 1024, "sentinels": 5, "plot": False}
    tokenizer.run(tokenizer.TokenizerConfig(corpus=text, out=made["tokenizer"], **keys))
    shards.run(shards.ShardsConfig(corpus=text, tokenizer=made["tokenizer"], out=made["shards"]))
    return made


def kill_after_checkpoint(
    world: int,
    values: dict,
    tmp_path: Path,
    launched: bool,
    step: int,
    saving: bool = False,
    first: dict | None = None,
) -> None:
    """Start the run and kill every rank with kill -9 after checkpoint `step` was published and before the run is over.

    With `saving`, kill the ranks while that checkpoint is written. The same processes train the run `first` before.
    """
    out = Path(values["out"])
    saved, aside = (out / f"checkpoints/{name}" for name in (f"step_{step:08d}", f".step_{step:08d}.tmp"))
    for attempt in range(5):
        runs = [first, values] if first else [values]
        with Ranks(world, cases.train_each, runs, log=tmp_path / f"killed{attempt}.log", launched=launched) as ranks:
            deadline = time.monotonic() + 60
            while not (saved.exists() or (saving and aside.exists())):
                assert time.monotonic() < deadline and ranks.processes[0].is_alive(), ranks.logs()
                time.sleep(0.0005)
        if (aside.exists() and not saved.exists()) if saving else checkpoint.newest(out) == saved:
            return
        for file in sorted(out.rglob("*"), reverse=True):  # the kill came too late: try again
            file.rmdir() if file.is_dir() else file.unlink()
    raise AssertionError("the run always finished before it could be killed")


def test_two_ranks_at_stage_2_continue_on_one_rank_at_stage_1_with_equal_batches(prepared, tmp_path):
    values = run_values(prepared, tmp_path / "straight", engine={"zero_stage": 2}, checkpoint={"every_steps": 6})
    on_ranks(2, cases.train, values, log=tmp_path / "straight.log")
    values = run_values(prepared, tmp_path / "moved", engine={"zero_stage": 2}, checkpoint={"every_steps": 6})
    kill_after_checkpoint(2, values, tmp_path, True, step=6)
    values = run_values(prepared, tmp_path / "moved", engine={"zero_stage": 1, "micro_batch": 8})
    on_ranks(1, cases.train, values, log=tmp_path / "moved.log")

    straight, moved = cases.history(tmp_path / "straight"), cases.history(tmp_path / "moved")
    assert [digest for *_, digest in straight] == [digest for *_, digest in moved]
    assert straight[:6] == moved[:6]
    for (_, loss, norm, _), (_, other_loss, other_norm, _) in zip(straight, moved, strict=True):
        assert loss == pytest.approx(other_loss, rel=1e-5) and norm == pytest.approx(other_norm, rel=1e-4)


def test_a_run_continues_from_deepspeed_to_plain_torch_and_back(prepared, tmp_path):
    values = run_values(prepared, tmp_path / "straight", checkpoint={"every_steps": 4})
    on_ranks(1, cases.train, values, log=tmp_path / "straight.log", launched=False)
    values = run_values(prepared, tmp_path / "moved", checkpoint={"every_steps": 4})
    kill_after_checkpoint(2, values, tmp_path, True, step=4)
    kill_after_checkpoint(1, values, tmp_path, False, step=8)
    on_ranks(2, cases.train, values, log=tmp_path / "moved.log")
    for (*_, digest), (*_, other) in zip(
        cases.history(tmp_path / "straight"), cases.history(tmp_path / "moved"), strict=True
    ):
        assert digest == other
    expected, found = cases.state(tmp_path / "straight"), cases.state(tmp_path / "moved")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6, msg=name)
