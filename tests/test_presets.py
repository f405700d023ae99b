"""Real presets: each is a valid run with the number of parameters that its comment says, and small ones take a step."""

import math
import re

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
from tests.conftest import ROOT

PRESETS = sorted(path.stem for path in (ROOT / "configs/presets").glob("*.yaml"))
SENTINELS = {f"<extra_id_{n}>": 100 + n for n in range(100)}
SPECIALS = SENTINELS | {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4, "eod": 5}
STEPPED = 50e6  # the largest model that takes a step here


def described(name: str) -> tuple[RunConfig, int, int]:
    """The run of a preset, and the parameters (in millions) and the entries that its comment speaks of."""
    text = (ROOT / f"configs/presets/{name}.yaml").read_text(encoding="utf-8")
    comment = " ".join(line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#"))
    found = re.findall(r"([\d,]+) M(?: parameters)? with ([\d,]+)(?: entries)?[:\s(]", comment)
    millions, entries = (int(number.replace(",", "")) for number in found[-1])
    return load(RunConfig, ROOT / f"configs/presets/{name}.yaml"), millions, entries


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_parameters_of_its_comment_and_a_dialect(name):
    run, millions, entries = described(name)
    assert run.out == f"runs/{name}"
    assert parameters_of(run.model, entries) == pytest.approx(millions * 1e6, rel=0.02)
    check_expressible(run.model, run.export.dialect, SPECIALS)
    if OBJECTIVES[run.objective.kind].causal is None:
        for dialect in ("llama", "eurobert"):
            other = run.model.model_copy(update={"causal": DIALECTS[dialect].wanted["causal"]})
            check_expressible(other, dialect, SPECIALS)


@pytest.mark.parametrize("name", PRESETS)
def test_a_small_preset_takes_a_step_that_begins_at_ln_v_and_lowers_the_loss(name):
    run, _, entries = described(name)
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


def test_the_presets_of_the_sample_are_valid_runs():
    for name in ("bert", "encoder", "electra", "t5", "decoder", "prefix-lm", "fill-in-middle", "hybrid"):
        run = load(RunConfig, ROOT / f"configs/sample/{name}.yaml")
        check_expressible(run.model, run.export.dialect, SPECIALS)
