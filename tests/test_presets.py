"""Real presets: each is a valid run with the number of parameters that its comment says, and small ones take a step."""

import math
import re
import shlex
import sys

import pytest
import torch

from pretrain.config import load
from pretrain.dialects import DIALECTS, check_expressible
from pretrain.model.init import initialise
from pretrain.model.models import model_of, parameters_of
from pretrain.objectives import OBJECTIVES
from pretrain.objectives.learner import Learner
from pretrain.order.rows import of_stream
from pretrain.training.config import RunConfig
from pretrain.training.loader import accumulation, windows_at_once
from tests.conftest import ROOT

sys.path.append(str(ROOT / "docs/tables"))
import presets

SPECIALS = presets.SPECIALS
STEPPED = 50e6  # the largest model that takes a step here


@pytest.mark.parametrize("name", presets.NAMES)
def test_a_preset_has_the_parameters_of_its_comment_and_a_dialect(name):
    run, millions, entries = presets.preset(name)[:3]
    assert run.out == f"runs/{name}"
    assert parameters_of(run.model, entries) == pytest.approx(millions * 1e6, rel=0.02)
    check_expressible(run.model, run.export.dialect, SPECIALS)
    if OBJECTIVES[run.objective.kind].causal is None:
        for dialect in ("llama", "eurobert"):
            other = run.model.model_copy(update={"causal": DIALECTS[dialect].wanted["causal"]})
            check_expressible(other, dialect, SPECIALS)


@pytest.mark.parametrize("name", presets.NAMES)
def test_a_small_preset_takes_a_step_that_begins_at_ln_v_and_lowers_the_loss(name):
    run, _, entries = presets.preset(name)[:3]
    if parameters_of(run.model, entries) > STEPPED:
        with torch.device("meta"):
            model_of(run.model, entries)
        pytest.skip("too large for this test; it was built on the meta device")
    torch.manual_seed(0)
    T, section = 32, run.objective_of(0)
    objective = OBJECTIVES[section.kind](section, SPECIALS, entries, T, 1)
    rows = of_stream(torch.randint(6, entries, (4, T + 1)).int().numpy(), end=3)
    batch = objective.batch(rows, torch.arange(4).numpy())
    counts, batch = objective.counts(batch), batch.to(torch.device("cpu"))
    model = Learner(model_of(run.model, entries))
    initialise(model.model, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(2):
        means = {part: loss / counts[part] for part, loss in model(objective, batch).items()}
        optimizer.zero_grad()
        sum(weight * means[part] for part, weight in objective.parts.items()).backward()
        optimizer.step()
        losses.append({part: float(mean.detach()) for part, mean in means.items()})
    for part, first in losses[0].items():
        outcomes = 2 if part == "detection" else entries
        assert first == pytest.approx(math.log(outcomes), abs=0.25)
        assert losses[1][part] < first


@pytest.mark.parametrize("name", presets.NAMES)
def test_the_head_of_a_preset_has_its_command_and_memory(name):
    text = (ROOT / f"configs/presets/{name}.yaml").read_text(encoding="utf-8")
    assert presets.head(name) in text, presets.head(name)


@pytest.mark.parametrize("name", presets.NAMES)
def test_a_run_accepts_every_command_on_the_page_of_the_presets(name):
    """Each command is for a number of GPUs among which the batches of all phases divide."""
    section = presets.section(name, "en")
    commands = [line for line in section.splitlines() if "launch/pretrain.py" in line]
    assert len(commands) == 2
    for command in commands:
        before, after = (shlex.split(part) for part in command.split("launch/pretrain.py"))
        ranks = int(before[-1]) if "--num_gpus" in before else 64 if "--hostfile" in before else 1
        run = load(RunConfig, ROOT / after[0], after[1:])
        for phase in run.phases:
            size = windows_at_once(phase, run.phases, run.engine.micro_batch)
            assert accumulation(phase, size, ranks) >= 1, command


def test_the_page_of_the_presets_counts_bytes_as_zero_divides_them():
    """18 bytes for each parameter in bf16 with AdamW or Muon."""
    for name in presets.NAMES:
        found = presets.preset(name)
        for ranks, stage, divided, whole in (
            (1, None, 0, 18),
            (8, 1, 12, 6),
            (8, 2, 16, 2),
            (8, 3, 18, 0),
            (64, 3, 18, 0),
        ):
            if ranks <= 8 or found.parameters > presets.LARGE:
                memory = found.memory(ranks, stage)
                state = memory.weights + memory.gradients + memory.optimizer
                assert state == pytest.approx((whole + divided / ranks) * found.parameters, rel=1e-6)


def test_the_presets_of_the_sample_are_valid_runs():
    for name in ("bert", "encoder", "electra", "t5", "decoder", "prefix-lm", "fill-in-middle", "hybrid"):
        run = load(RunConfig, ROOT / f"configs/sample/{name}.yaml")
        check_expressible(run.model, run.export.dialect, SPECIALS)


@pytest.mark.parametrize("path", sorted((ROOT / "configs/two-cores").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_configuration_for_two_cores_runs_on_one_and_two_ranks(path):
    """Its comment has the parameters and the tokens, and the dialect can express the model."""
    run = load(RunConfig, path)
    head = path.read_text(encoding="utf-8")
    millions, tokens = (float(re.search(rf"([\d.]+) M {what}", head)[1]) for what in ("parameters", "tokens"))
    assert round(parameters_of(run.model, 8192) / 1e6, 1) == millions
    assert round(sum(phase.steps * phase.batch_tokens for phase in run.phases) / 1e6, 1) == tokens
    check_expressible(run.model, run.export.dialect, SPECIALS)
    for phase in run.phases:
        for ranks in (1, 2):
            at_once = windows_at_once(phase, run.phases, run.engine.micro_batch)
            assert accumulation(phase, at_once, ranks) * at_once * ranks == phase.batch
