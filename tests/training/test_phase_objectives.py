"""Runs with phases of different objectives: other mask ratios, or causal and then masked language modelling."""

import json

import pytest

from pretrain import config
from pretrain.errors import ConfigError, ResumeError
from pretrain.order.run_data import open_run_data
from pretrain.tokenizer import open_tokenizer
from pretrain.tools import explain
from pretrain.training.config import RunConfig
from pretrain.training.loader import Batches
from tests.conftest import run_values
from tests.helpers import cases
from tests.helpers.batches import steps_of
from tests.helpers.ranks import on_ranks
from tests.road.test_resume import kill_after_checkpoint

SIZES = {"steps": 4, "seq_len": 32, "batch_tokens": 256}
RATIOS = [{**SIZES, "objective": {"mask_ratio": ratio}} for ratio in (0.3, 0.15, 0.05)]
CAUSAL_FIRST = [{**SIZES, "steps": 7, "objective": {"kind": "causal_lm"}}, {**SIZES, "steps": 5}]


def values(prepared, out, phases) -> dict:
    return run_values(prepared, out, phases=phases, checkpoint={"every_steps": 6, "keep": 9}, model={"dropout": 0.1})


@pytest.mark.parametrize("phases", [RATIOS, CAUSAL_FIRST], ids=["ratios", "causal first"])
@pytest.mark.parametrize("world", [1, 2])
def test_a_run_that_is_killed_before_its_objective_changes_continues_bit_by_bit(world, phases, prepared, tmp_path):
    launched = world > 1
    straight, killed = (values(prepared, tmp_path / name, phases) for name in ("straight", "killed"))
    on_ranks(world, cases.train, straight, log=tmp_path / "straight.log", launched=launched)
    kill_after_checkpoint(world, killed, tmp_path, launched, step=6)
    on_ranks(world, cases.train, killed, log=tmp_path / "resumed.log", launched=launched)
    assert "continuing after step 6" in (tmp_path / "resumed.0.log").read_text()
    assert cases.history(tmp_path / "killed") == cases.history(tmp_path / "straight")
    one, other = (cases.state(tmp_path / name) for name in ("straight", "killed"))
    assert one.keys() == other.keys() and all(tensor.equal(other[name]) for name, tensor in one.items())


def test_each_phase_has_its_own_number_of_targets_and_its_own_attention(prepared, tmp_path):
    built = config.build(RunConfig, values(prepared, tmp_path / "run", [*CAUSAL_FIRST[:1], *RATIOS]), "test").resolved()
    tokenizer = open_tokenizer(built.data.tokenizer)
    data, objectives = open_run_data(built.data, built.phases, built.seed, tokenizer), built.objectives(tokenizer)
    assert [objective.causal for objective in objectives] == [True, False, False, False]
    batches = Batches(data, objectives, micro_batch=8)
    found = [micro.batch.targets.shape[1] for step in steps_of(batches, 0) for micro in step]
    assert found == [32] * 7 + [10] * 4 + [5] * 4 + [2] * 4


def test_a_phase_takes_over_what_it_does_not_say_and_another_kind_begins_with_its_defaults(prepared, tmp_path):
    given = values(prepared, tmp_path / "run", [RATIOS[0], CAUSAL_FIRST[0], SIZES])
    given["objective"] |= {"unit": "word", "mask_share": "0.9"}
    built = config.build(RunConfig, given, "test")
    first, second, third = (built.objective_of(number) for number in range(3))
    assert (first.mask_ratio, first.unit, first.mask_share) == (0.3, "word", 0.9)
    assert second.kind == "causal_lm" and third == built.objective
    assert config.build(RunConfig, config.parse(config.dump(built), "dump"), "dump") == built


def test_the_model_must_be_what_the_last_phase_trains(prepared, tmp_path):
    with pytest.raises(ConfigError, match=r"phases\.1\.objective\.kind = causal_lm needs model\.causal = true"):
        config.build(RunConfig, values(prepared, tmp_path / "run", [SIZES, CAUSAL_FIRST[0]]), "test")
    with pytest.raises(ConfigError, match=r"unknown key phases\.0\.objective\.mask_ratoi: did you mean"):
        config.build(RunConfig, values(prepared, tmp_path / "run", [{**SIZES, "objective": {"mask_ratoi": 1}}]), "test")


def test_the_objective_of_a_phase_that_is_done_stays_and_that_of_a_later_one_may_change(prepared, tmp_path):
    phases = [{**phase, "steps": 2} for phase in RATIOS[:2]]
    cases.train(values(prepared, tmp_path / "run", phases))
    changed = [phases[0], {**phases[1], "objective": {"mask_ratio": 0.4}}]
    with pytest.raises(ResumeError, match=r"phases\.1\.objective: None → .*0\.4"):
        cases.train(values(prepared, tmp_path / "run", changed))
    summary = cases.train(values(prepared, tmp_path / "run", [*phases, {**SIZES, "steps": 1}]))
    assert summary["steps"] == 5
    scored = [json.loads(line) for line in (tmp_path / "run/evaluations.jsonl").read_text().splitlines()]
    assert len({score["targets"] for score in scored}) == 1, "held-out text is masked alike in every phase"


def test_a_window_is_shown_as_the_objective_of_its_phase_has_it(prepared, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(config.dump(config.build(RunConfig, values(prepared, tmp_path / "run", CAUSAL_FIRST), "test")))
    for step, said in ((7, "32 targets: every token's successor"), (8, "5 targets of 32 tokens")):
        assert explain.main([str(path), "--step", str(step), "--sample", "0"]) == 0
        assert said in capsys.readouterr().out
