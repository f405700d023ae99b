"""A branch continues its parent bit by bit, or differs exactly in the settings that were changed."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pretrain.errors import ConfigError, ResumeError
from pretrain.order import branch
from pretrain.order.branch import BranchConfig
from pretrain.order.phases import Phase
from pretrain.storage.index import INDEX, read_index
from pretrain.tools import check_files, explain
from pretrain.training import checkpoint
from tests.conftest import run_values
from tests.helpers import cases
from tests.helpers.ranks import on_ranks
from tests.road.test_resume import kill_after_checkpoint

PHASES = [
    {"steps": 6, "seq_len": 16, "batch_tokens": 128},
    {"steps": 10, "seq_len": 32, "batch_tokens": 256, "decay_steps": 3},
]


@pytest.fixture(scope="module")
def parent(prepared, tmp_path_factory):
    """A run of 16 steps with checkpoints every four."""
    values = run_values(prepared, tmp_path_factory.mktemp("parent") / "run", phases=PHASES, log_every=100)
    values["checkpoint"] = {"every_steps": 4, "keep": 9}
    values["model"]["dropout"], values["data"]["block_tokens"] = 0.1, 64
    cases.train(values)
    return values


def branched(parent: dict, out, step: int = 8, **sections) -> dict:
    begin = {"run": parent["out"], "step": step, **sections.pop("branch_from", {})}
    values = {**parent, "out": str(out), "branch_from": begin}
    for name, changes in sections.items():
        values[name] = {**values[name], **changes} if isinstance(changes, dict) else changes
    return values


def after(history: list, step: int) -> list:
    return [report for report in history if report[0] > step]


def test_a_branch_that_changes_nothing_is_the_parents_own_continuation(parent, tmp_path, capsys):
    summary = cases.train(branched(parent, tmp_path / "run"))
    assert "branching after step 8 of" in (said := capsys.readouterr().out)
    assert "other than in the parent" not in said and "lacks step" not in said
    assert cases.history(tmp_path / "run") == after(cases.history(Path(parent["out"])), 8)
    ours, theirs = cases.state(tmp_path / "run"), cases.state(Path(parent["out"]))
    assert all(torch.equal(tensor, ours[name]) for name, tensor in theirs.items())
    assert summary["steps"] == 16 and summary["steps_skipped"] == 0
    assert summary["first_loss"] == cases.history(tmp_path / "run")[0][1]
    began = read_index(branch.BranchConfig(run=parent["out"], step=8).folder, ResumeError, "")
    for folder in sorted((tmp_path / "run/checkpoints").iterdir()):
        index = json.loads((folder / INDEX).read_text())
        assert index["parent"] == began["fingerprint"] and index["recorded"]["parent"].endswith("step_00000008")
    ended = [
        json.loads((checkpoint.newest(run) / INDEX).read_text()) for run in (tmp_path / "run", Path(parent["out"]))
    ]
    ours, theirs = (index["recorded"] for index in ended)
    assert ours["read"] == theirs["read"], "the branch has read what its parent had read, and then its own text"
    assert [(one["from_step"], one["branched"]) for one in ours["attempts"]] == [(0, False), (8, True)]
    check_files.run([tmp_path / "run"])
    assert "intact" in capsys.readouterr().out


def test_a_branch_is_killed_and_goes_on_without_its_parent(parent, tmp_path):
    """Two ranks at ZeRO 2; the parent is removed as soon as the branch has begun."""
    copy = {**parent, "out": str(tmp_path / "parent")}
    shutil.copytree(parent["out"], copy["out"])
    sections = {
        "engine": {"zero_stage": 2, "micro_batch": 1},
        "branch_from": {"optimizer": "fresh", "skip_steps": [10, 11]},
        "checkpoint": {"every_steps": 12},
    }
    straight, killed = (
        branched(copy, tmp_path / "straight", **sections),
        branched(copy, tmp_path / "killed", **sections),
    )
    on_ranks(2, cases.train, straight, log=tmp_path / "straight.log")
    kill_after_checkpoint(2, killed, tmp_path, True, step=12)
    shutil.rmtree(copy["out"])
    on_ranks(2, cases.train, killed, log=tmp_path / "resumed.log")
    assert "continuing after step 12" in (tmp_path / "resumed.0.log").read_text()
    assert cases.history(tmp_path / "killed") == cases.history(tmp_path / "straight")
    expected, found = cases.state(tmp_path / "straight"), cases.state(tmp_path / "killed")
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_adamw_begins_anew_with_a_warm_up_of_its_own(parent, tmp_path):
    cases.train(branched(parent, tmp_path / "run", branch_from={"optimizer": "fresh"}))
    kept = after(cases.history(Path(parent["out"])), 8)
    fresh = cases.history(tmp_path / "run")
    assert [digest for *_, digest in fresh] == [digest for *_, digest in kept]
    assert fresh[0][1] == kept[0][1] and fresh[1][1] != kept[1][1]
    first = checkpoint.Checkpoint(tmp_path / "run/checkpoints/step_00000008")
    assert first.state.adam_began == 8 and first.state.steps_applied == first.state.skipped == 0
    moments = load_file(first.folder / "exp_avg.safetensors")
    assert not any(tensor.any() for tensor in moments.values())
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["lr"] for line in lines[:5]] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3])


def digests(out) -> dict[int, str]:
    return {step: digest for step, _, _, digest in cases.history(out)}


def test_steps_that_are_skipped_are_never_read_and_the_others_move_forward(parent, tmp_path, capsys):
    """Compare the texts: `explain` prints the windows that every step of parent and branch reads."""
    values = branched(parent, tmp_path / "run", branch_from={"skip_steps": [10, 12]})
    cases.train(values)
    assert "the data that steps 10 to 12 of the parent read are skipped" in capsys.readouterr().out
    # A parent that is three steps longer reads the windows that the branch reads in the end.
    longer = {**parent, "out": str(tmp_path / "longer"), "phases": [PHASES[0], {**PHASES[1], "steps": 13}]}
    cases.train(longer)
    windows = {}
    for name in ("run", "longer"):
        for step in range(7, 17 + 3 * (name == "longer")):
            capsys.readouterr()
            assert explain.main([str(tmp_path / name), "--step", str(step)]) == 0
            found = capsys.readouterr().out
            windows[name, step] = [line for line in found.splitlines() if line.startswith("sample")]
    moved = {9: 9, **{step: step + 3 for step in range(10, 17)}}
    for step, source in moved.items():
        assert windows["run", step] == windows["longer", source], step
    trained = digests(tmp_path / "run")
    assert trained[9] == digests(tmp_path / "longer")[9] and trained[10] != digests(tmp_path / "longer")[10]
    assert explain.main([str(tmp_path / "run"), "--step", "10", "--sample", "0"]) == 0
    assert windows["longer", 13][0].removeprefix("sample 0: ") in capsys.readouterr().out


def test_a_document_of_a_skipped_step_is_said_to_be_read_by_none(parent, tmp_path, capsys):
    cases.train(branched(parent, tmp_path / "run", branch_from={"skip_steps": [10, 12]}))
    capsys.readouterr()
    explain.main([parent["out"], "--step", "11"])
    where = capsys.readouterr().out.split(")  ", 1)[1].split("  ", 1)[0]
    explain.main([str(tmp_path / "run"), "--document", where])
    assert "step      none" in capsys.readouterr().out


PLAN = [Phase(steps=steps, seq_len=8, batch_tokens=8) for steps in (5, 20, 7)]


@pytest.mark.parametrize(
    "skips", [[], [(7, 9)], [(2, 5)], [(7, 9), (10, 10), (7, 8)], [(3, 3), (12, 25), (26, 26), (27, 32)]]
)
def test_what_a_step_reads_and_who_reads_it_are_inverse(skips):
    """Compare with a list from which the skipped steps are removed one after another, phase by phase."""
    begin, total = 0, []
    for phase in PLAN:
        of_phase = [(first, last) for first, last in skips if begin < first <= begin + phase.steps]
        data = list(range(phase.steps + sum(last - first + 1 for first, last in of_phase)))
        for first, last in of_phase:
            del data[first - 1 - begin : last - begin]
        assert len(data) == phase.steps
        base = sum(one.steps for one in branch.reading(PLAN, skips)[: len(total)])
        total.append([base + at for at in data])
        begin += phase.steps
    expected = [step for phase in total for step in phase]
    found = [branch.reads(step, PLAN, skips) for step in range(32)]
    assert found == expected
    inverse = {step: number for number, step in enumerate(found)}
    length = sum(phase.steps for phase in branch.reading(PLAN, skips))
    assert [branch.read_by(step, PLAN, skips) for step in range(length)] == [
        inverse.get(step) for step in range(length)
    ]


def test_a_branch_of_a_branch_repeats_what_was_skipped(parent, tmp_path):
    cases.train(branched(parent, tmp_path / "one", branch_from={"skip_steps": [9, 9]}))
    one = {**parent, "out": str(tmp_path / "one")}
    with pytest.raises(ResumeError, match=r"begins with \[\[9, 9\]\]: take \[\[9, 9\], \[14, 15\]\]"):
        cases.train(branched(one, tmp_path / "two", step=12, branch_from={"skip_steps": [14, 15]}))
    cases.train(branched(one, tmp_path / "two", step=12, branch_from={"skip_steps": [[9, 9], [14, 15]]}))
    two = digests(tmp_path / "two")
    assert two[13] == digests(tmp_path / "one")[13] and two[14] != digests(tmp_path / "one")[14]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"step": 9}, r"no checkpoint to branch from(?s:.*)has 4, 8, 12, 16"),
        ({"step": 16}, r"branch_from\.step = 16, but phases end after 16"),
        ({"model": {"max_positions": 128}}, r"keeps the model(?s:.*)model\.max_positions: 64 → 128"),
        ({"model": {"mlp_width": 32}}, r"keeps the model(?s:.*)model\.mlp_width: 64 → 32"),
        ({"branch_from": {"skip_steps": [7, 9]}}, r"\[7, 9\]: the branch begins after step 8"),
        ({"branch_from": {"skip_steps": [9, 17]}}, r"\[9, 17\] does not lie in one phase"),
        ({"branch_from": {"skip_steps": [6, 7]}, "step": 4}, r"\[6, 7\] does not lie in one phase"),
        ({"branch_from": {"skip_steps": [12, 9]}}, "the first step comes after the last"),
        ({"branch_from": {"step": None}}, r"branch_from\.step is missing"),
        ({"branch_from": {"run": "nowhere"}}, r"no checkpoint to branch from: nowhere(?s:.*)has no checkpoint"),
    ],
)
def test_a_branch_that_cannot_be_is_refused(sections, message, parent, tmp_path):
    with pytest.raises((ConfigError, ResumeError), match=message):
        cases.train(branched(parent, tmp_path / "run", **sections))
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


def test_a_branch_needs_its_own_folder_and_stays_a_branch(parent, tmp_path):
    shutil.copytree(parent["out"], tmp_path / "run")
    with pytest.raises(ResumeError, match=r"branch_from: None → "):
        cases.train(branched(parent, tmp_path / "run"))
    shutil.rmtree(tmp_path / "run/checkpoints")
    with pytest.raises(ConfigError, match="a branch needs a folder of its own"):
        cases.train(branched({**parent, "out": str(tmp_path / "run")}, tmp_path / "run"))


def test_a_branch_with_rope_goes_on_with_longer_windows(prepared, tmp_path, capsys):
    short = run_values(prepared, tmp_path / "short", "causal_lm", data={"block_tokens": 128})
    short |= {"phases": [{"steps": 2, "seq_len": 64, "batch_tokens": 256}], "log_every": 100}
    short["data"] |= {"shards": str(prepared.shards["byte"]), "tokenizer": str(prepared.tokenizer["byte"])}
    cases.train(short)
    scaling = {"kind": "yarn", "original_positions": 64}
    rotations = {"max_positions": 128, "rope_theta": 5e4, "rope_scaling": scaling}
    longer = [*short["phases"], {"steps": 2, "seq_len": 128, "batch_tokens": 256, "lr": 1e-4}]
    with pytest.raises(ResumeError, match=r"model\.max_positions: 64 → 128(?s:.*)model\.rope_scaling: None → "):
        cases.train({**short, "model": {**short["model"], **rotations}, "phases": longer})
    capsys.readouterr()
    assert cases.train(branched(short, tmp_path / "long", 2, model=rotations, phases=longer))["steps"] == 4
    said = capsys.readouterr().out
    assert "other than in the parent: model.rope_scaling: None → {'kind': 'yarn'" in said
    assert "other than in the parent: model.rope_theta: 10000.0 → 50000.0" in said
    began, ended = (tmp_path / f"{name}/checkpoints/step_00000002" for name in ("long", "short"))
    ours, theirs = (load_file(next(folder.glob("weights*.safetensors"))) for folder in (began, ended))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_what_differs_from_the_parent_is_printed(parent, tmp_path, capsys):
    cases.train(branched(parent, tmp_path / "run", seed=8, optim={"lr": 5e-4}))
    said = capsys.readouterr().out
    assert (
        "other than in the parent: seed: 7 → 8" in said and "other than in the parent: optim.lr: 0.001 → 0.0005" in said
    )


def test_the_step_may_be_the_name_of_a_checkpoint():
    folder = "runs/x/checkpoints/step_00000012"
    assert BranchConfig(run=folder).at == 12 and str(BranchConfig(run=folder).folder) == folder
    assert str(BranchConfig(run="runs/x", step=12).folder) == folder
    with pytest.raises(ValueError, match=r"step = 8, but branch_from\.run is the checkpoint step_00000012"):
        BranchConfig(run=folder, step=8)
