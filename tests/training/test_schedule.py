"""The learning rate as a function of the step, and the groups with weight decay."""

import math

import pytest
import torch

from pretrain.model.config import ModelConfig
from pretrain.model.transformer import Transformer
from pretrain.order.phases import Phase
from pretrain.training.config import TrainingPhase
from pretrain.training.optim.adamw import AdamW, AdamWConfig
from pretrain.training.optim.schedule import OptimConfig, check_schedule, lr_at, schedule_notes
from pretrain.training.resume import past_conflicts
from tests.conftest import ENCODER


def phase(steps: int, decay_steps: int = 0, **keys) -> Phase:
    return TrainingPhase(**{"steps": steps, "seq_len": 8, "batch_tokens": 64, "decay_steps": decay_steps, **keys})


def rates(optim: OptimConfig, *phases: Phase, anew: int = 0) -> list[float]:
    return [lr_at(step, optim, list(phases), anew) for step in range(sum(phase.steps for phase in phases))]


def test_warm_up_is_linear_and_reaches_the_peak():
    optim = AdamWConfig(lr=1.0, warmup_steps=4)
    assert [lr_at(step, optim, [phase(10)]) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_the_decay_follows_one_minus_the_square_root_down_to_the_floor():
    optim = AdamWConfig(lr=2.0, floor=0.1)
    rates = [lr_at(step, optim, [phase(10, decay_steps=4)]) for step in range(12)]
    assert rates[:6] == [2.0] * 6
    assert rates[6:10] == pytest.approx([2 * (0.1 + 0.9 * (1 - (k / 5) ** 0.5)) for k in (1, 2, 3, 4)])
    assert rates[10:] == pytest.approx([0.2, 0.2])  # past the last step it stays at the floor


@pytest.mark.parametrize(
    ("decay", "shape"),
    [
        ("1-sqrt", lambda x: 1 - math.sqrt(x)),
        ("linear", lambda x: 1 - x),
        ("cosine", lambda x: (1 + math.cos(math.pi * x)) / 2),
    ],
)
def test_a_decay_has_the_shape_that_is_named(decay, shape):
    found = rates(AdamWConfig(lr=2.0, floor=0.1), phase(5, 3, decay=decay))
    assert found == pytest.approx([2.0, 2.0, *(0.2 + 1.8 * shape(k / 4) for k in (1, 2, 3))])


def before(step: int, optim: OptimConfig, phases: list[Phase]) -> float:
    """The schedule before phases had rates of their own. It jumped back to the peak after a decay."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    begin = 0
    for one in phases:
        end = begin + one.steps
        if step < end or one is phases[-1]:
            into_decay = min(step, end) - (end - one.decay_steps)
            if one.decay_steps and into_decay >= 0:
                share = (into_decay + 1) / (one.decay_steps + 1) if step < end else 1.0
                return optim.lr * (optim.floor + (1 - optim.floor) * (1 - share**0.5))
            return optim.lr
        begin = end
    raise AssertionError


@pytest.mark.parametrize("floor", [0.0, 0.1, 1 / 3])
def test_one_phase_and_a_curriculum_have_the_rates_they_always_had_to_the_last_bit(floor):
    """A long warm-up over a short first phase, phases without decay, and a decay in all or part of the last phase."""
    optim = AdamWConfig(lr=2.9e-3, warmup_steps=37, floor=floor)
    for phases in ([phase(100, 41)], [phase(20), phase(30), phase(50, 50)], [phase(37), phase(60, 13)]):
        steps = range(sum(one.steps for one in phases) + 3)
        assert [lr_at(s, optim, phases) for s in steps] == [before(s, optim, phases) for s in steps]


def test_a_phase_after_a_decayed_one_stays_where_that_ended_unless_it_is_told():
    optim, decayed = AdamWConfig(lr=1.0, floor=0.25), phase(4, 2)
    assert rates(optim, decayed, phase(3))[4:] == [0.25] * 3
    assert rates(optim, decayed, phase(3), phase(2))[4:] == [0.25] * 5
    assert rates(optim, decayed, phase(3, lr=0.5))[4:] == [0.5] * 3
    assert rates(optim, decayed, phase(3, lr=0.5), phase(2))[7:] == [0.5, 0.5]
    assert rates(optim, decayed, phase(4, warmup_steps=3))[4:] == [0.5, 0.75, 1.0, 1.0]
    assert rates(optim, decayed, phase(3, lr=0.75, warmup_steps=2))[4:] == [0.5, 0.75, 0.75]
    assert rates(optim, decayed, phase(3, 3, decay="linear"))[4:] == [0.25] * 3  # it is at the floor of the peak


def test_a_first_phase_may_have_its_own_rate_and_warm_up():
    assert rates(AdamWConfig(lr=1.0, warmup_steps=3), phase(4, lr=2.0, warmup_steps=2)) == [1.0, 2.0, 2.0, 2.0]


def test_a_decay_that_comes_in_a_warm_up_falls_from_where_that_stands():
    optim = AdamWConfig(lr=1.0, warmup_steps=10)
    found = rates(optim, phase(6, 2, decay="linear"))
    assert found == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5 * 2 / 3, 0.5 / 3])
    (note,) = schedule_notes(optim, [phase(6, 2)])
    assert "warmup_steps = 10" in note and "the decay begins after 4 steps" in note and "gets to 0.4, not to 1" in note
    assert schedule_notes(optim, [phase(4), phase(8, 2)]) == []
    assert "the run ends after 4 steps" in schedule_notes(optim, [phase(4)])[0]


def test_a_phase_at_a_rate_of_0_and_a_warm_up_that_has_no_room_are_refused():
    with pytest.raises(ValueError, match=r"phases\.1 would train with a learning rate of 0"):
        check_schedule(AdamWConfig(lr=1.0), [phase(4, 2), phase(3)])
    check_schedule(AdamWConfig(lr=1.0), [phase(4, 2), phase(3, warmup_steps=1)])
    for keys in ({"warmup_steps": 11}, {"warmup_steps": 6, "decay_steps": 5}, {"decay": "cosine"}):
        with pytest.raises(ValueError, match="phases: "):
            phase(10, **keys)


def test_adamw_that_a_branch_began_anew_warms_up_from_there():
    optim = AdamWConfig(lr=1.0, warmup_steps=4)
    assert rates(optim, phase(10), anew=5) == [0.25, 0.5, 0.75, 1.0, 1.0, 0.25, 0.5, 0.75, 1.0, 1.0]


TRUNK = [phase(10), phase(40, 10)]


@pytest.mark.parametrize(
    ("step", "phases", "named"),
    [
        (20, [phase(10), phase(60, 10)], []),  # a running phase becomes longer
        (20, [phase(10), phase(20, 10)], []),  # its decay begins now
        (20, [phase(10), phase(40, 30, decay="cosine")], []),  # another decay, from now on
        (20, [phase(10)], ["phases.1"]),
        (20, [phase(10), phase(8)], ["phases.1.steps"]),
        (20, [phase(12), phase(40, 10)], ["phases.0.steps"]),
        (20, [phase(10), phase(40, 31)], ["phases.1.decay_steps"]),  # began one step ago
        (20, [phase(10), phase(10), phase(5, lr=0.5)], []),  # cut short, and another appended
        (45, [phase(10), phase(40, 10), phase(7, warmup_steps=2)], []),
        (45, [phase(10), phase(60, 10)], ["phases.1.steps"]),
        (45, [phase(10), phase(40, 10, decay="linear")], ["phases.1.decay"]),
        (10, [phase(10), phase(4, seq_len=16, lr=0.5)], []),
        (11, [phase(10), phase(40, 10, seq_len=16, batch_tokens=128)], ["phases.1.seq_len", "phases.1.batch_tokens"]),
        (11, [phase(10), phase(40, 10, mixture={"en": 1})], ["phases.1.mixture"]),
        (0, [phase(3, seq_len=16, lr=0.1)], []),
    ],
)
def test_what_may_change_under_a_run_is_what_leaves_its_past_alone(step, phases, named):
    optim = AdamWConfig(lr=1.0, warmup_steps=3)
    lines = past_conflicts((optim, TRUNK), (optim, phases), step)
    assert [line.split(":")[0] for line in lines if not line.startswith("step ")] == named, lines


def test_other_rates_are_refused_with_the_step_that_would_have_had_another():
    old, new = AdamWConfig(lr=1.0, warmup_steps=3), AdamWConfig(lr=0.5, warmup_steps=3, floor=0.1)
    lines = past_conflicts((old, TRUNK), (new, TRUNK), 20)
    assert lines[0] == "optim.lr: 1.0 → 0.5" and "step 1 was made with a learning rate of 0.333, not of 0.167" in lines
    floor = AdamWConfig(lr=1.0, warmup_steps=3, floor=0.1)
    assert past_conflicts((old, TRUNK), (floor, TRUNK), 20) == []  # no decay has begun
    assert past_conflicts((old, TRUNK), (floor, TRUNK), 41)[0] == "optim.floor: 0.0 → 0.1"


def test_matrices_decay_and_vectors_do_not():
    net = Transformer(ModelConfig(**ENCODER), 50)
    groups = AdamW(AdamWConfig(lr=1.0, weight_decay=0.3)).build(net).param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert all(p.ndim >= 2 for p in groups[0]["params"]) and all(p.ndim == 1 for p in groups[1]["params"])
    assert sum(len(group["params"]) for group in groups) == len(list(net.parameters()))
    assert isinstance(groups[0]["params"][0], torch.nn.Parameter)
