"""Scoring a run again gives the run's own scores. More tokens, other text and other windows can be scored too."""

import json
import math
import os
import shutil
import signal

import pytest

from pretrain import cli, shards
from pretrain.errors import ConfigError, ResumeError, ShardError, UserError
from pretrain.evaluation import stage
from pretrain.evaluation.stage import ScoringConfig
from pretrain.storage.index import read_index
from pretrain.training.engine.ranks import World
from pretrain.training.heldout import HeldOut, Scores
from tests.conftest import run_values
from tests.helpers import cases
from tests.helpers.ranks import Ranks, on_ranks


def score(**values) -> dict:
    return stage.run(ScoringConfig(**values))


@pytest.fixture(scope="module")
def runs(prepared, tmp_path_factory) -> dict:
    """Runs of both kinds of objectives and windows, evaluated at steps 6 and 12 with a checkpoint of each."""
    root, found = tmp_path_factory.mktemp("scored"), {}
    for objective, windows in (("masked_lm", "stream"), ("causal_lm", "documents")):
        saved = {"evaluate": {"every_steps": 6, "max_tokens": 640}, "checkpoint": {"every_steps": 6}}
        values = run_values(prepared, root / objective, objective, **saved)
        kept = shutil.copytree(values["data"]["shards"], root / f"shards-{objective}")
        values["data"] |= {"windows": windows, "shards": str(kept)}
        cases.train(values)
        lines = (root / objective / "evaluations.jsonl").read_text().splitlines()
        found[objective] = root / objective, {line["step"]: line for line in map(json.loads, lines)}
    return found


@pytest.mark.parametrize("objective", ["masked_lm", "causal_lm"])
def test_a_run_and_its_checkpoints_are_scored_as_they_were(objective, runs, tmp_path, capsys):
    run, scored = runs[objective]
    for step, which in ((12, run), (6, run / "checkpoints" / "step_00000006")):
        found = score(run=str(which), out=str(tmp_path / f"{step}"))
        assert {"step": step, "corpus": "", **found["scores"][""]} == scored[step]
        assert found["step"] == step and json.loads((tmp_path / f"{step}/scores.json").read_text()) == found
        assert read_index(tmp_path / f"{step}", UserError, "")["base"] == found["fingerprint"]
    shown = capsys.readouterr().out
    assert f"{scored[6]['loss']:.4f}" in shown and f"{scored[6]['gain']:.4f}" in shown


def test_other_text_more_tokens_and_other_windows_are_scored(prepared, runs, tmp_path):
    run, scored = runs["causal_lm"]
    other = tmp_path / "other"
    recipe = tmp_path / "recipe.yaml"
    source = {"name": "zh", "language": "zh", "files": [str(prepared.corpus.parent / "zh.txt")]}
    recipe.write_text(json.dumps({"name": "zh", "heldout_fraction": 0.3, "sources": [source]}))
    wanted = {"corpus": str(recipe), "tokenizer": str(prepared.tokenizer["byte"]), "out": str(other)}
    shards.run(shards.ShardsConfig(**wanted))
    tokens = shards.Shards(other, "heldout").tokens
    found = score(run=str(run), shards=[str(other)], max_tokens=1 << 30, seq_len=16, windows="stream")
    assert list(found["scores"]) == [str(other)] and found["scores"][str(other)]["targets"] == tokens
    assert found["seq_len"] == 16 and found["scores"][str(other)]["loss"] != scored[12]["loss"]


def test_ranks_score_what_one_process_scores(runs, tmp_path):
    run, scored = runs["masked_lm"]
    found, other = on_ranks(2, stage.run, ScoringConfig(run=str(run), micro_batch=3), log=tmp_path / "log")
    assert found == other
    for name, value in found["scores"][""].items():
        assert value == scored[12][name] or math.isclose(value, scored[12][name], rel_tol=1e-5), name


def test_a_rank_that_is_killed_while_it_scores_is_said_to_have_ended(runs, tmp_path):
    with Ranks(2, score_but_die_on_rank_1, str(runs["masked_lm"][0]), log=tmp_path / "log") as ranks:
        done, value = ranks.result(0, within=60)
    assert not done and "PretrainError: rank 0 lost the connection to another rank" in value, value


def score_but_die_on_rank_1(run: str) -> None:
    real = HeldOut.score

    def die_or_score(self: HeldOut, scorer: object, world: World, at_once: int) -> Scores:
        if world.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, scorer, world, at_once)

    HeldOut.score = die_or_score
    score(run=run)


def test_what_does_not_fit_is_refused(prepared, runs, tmp_path, capsys):
    run, _ = runs["causal_lm"]
    for values, kind, message in (
        ({"tokenizer": str(prepared.tokenizer["bert"])}, ConfigError, "trained with another tokenizer"),
        ({"shards": [str(prepared.shards["bert"])]}, ShardError, "built with another tokenizer"),
        ({"seq_len": 4096}, ConfigError, "longer than the model's windows"),
        ({"run": str(tmp_path)}, ResumeError, "no complete checkpoint in it"),
    ):
        with pytest.raises(kind, match=message):
            score(**{"run": str(run), **values})
    (run.parent / "shards-causal_lm").rename(tmp_path / "kept")
    with pytest.raises(ShardError, match="there is no such folder"):
        score(run=str(run))
    shutil.copytree(prepared.shards["bert"], run.parent / "shards-causal_lm")
    with pytest.raises(ShardError, match="built with another tokenizer"):
        score(run=str(run))
    shutil.rmtree(run.parent / "shards-causal_lm")
    recipe = tmp_path / "recipe.yaml"
    source = {"name": "en", "language": "en", "files": [str(prepared.corpus.parent / "en.txt")]}
    recipe.write_text(json.dumps({"name": "en", "heldout_fraction": 0.3, "sources": [source]}))
    wanted = {"corpus": str(recipe), "tokenizer": str(prepared.tokenizer["byte"])}
    shards.run(shards.ShardsConfig(**wanted, out=str(run.parent / "shards-causal_lm")))
    with pytest.raises(ShardError, match="not the shards that the run was trained on"):
        score(run=str(run))
    (tmp_path / "score.yaml").write_text(f"run: {run}\nout: {run / 'config.yaml'}\n")
    assert cli.main("evaluate", [str(tmp_path / "score.yaml")]) == 2
    assert "Traceback" not in capsys.readouterr().err
