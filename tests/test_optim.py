"""The learning rate as a function of the step, and who decays."""

import pytest
import torch

from pretrain.model import ModelConfig, Transformer
from pretrain.optim import OptimConfig, adamw, lr_at
from pretrain.phases import Phase
from tests.conftest import ENCODER


def phase(steps: int, decay_steps: int = 0) -> Phase:
    return Phase(steps=steps, seq_len=8, batch_tokens=64, decay_steps=decay_steps)


def test_warm_up_is_linear_and_reaches_the_peak():
    optim = OptimConfig(lr=1.0, warmup_steps=4)
    assert [lr_at(step, optim, [phase(10)]) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_the_decay_follows_one_minus_the_square_root_down_to_the_floor():
    optim = OptimConfig(lr=2.0, floor=0.1)
    rates = [lr_at(step, optim, [phase(10, decay_steps=4)]) for step in range(12)]
    assert rates[:6] == [2.0] * 6
    assert rates[6:10] == pytest.approx([2 * (0.1 + 0.9 * (1 - (k / 5) ** 0.5)) for k in (1, 2, 3, 4)])
    assert rates[10:] == pytest.approx([0.2, 0.2])  # past the last step it stays at the floor


def test_a_phase_after_the_trunk_leaves_the_trunk_alone():
    optim = OptimConfig(lr=1.0, warmup_steps=2)
    trunk, longer = [phase(10)], [phase(10), phase(5, decay_steps=5)]
    assert [lr_at(step, optim, trunk) for step in range(10)] == [lr_at(step, optim, longer) for step in range(10)]
    assert lr_at(14, optim, longer) < lr_at(10, optim, longer) < 1.0


def test_matrices_decay_and_vectors_do_not():
    net = Transformer(ModelConfig(**ENCODER), 50)
    groups = adamw(net, OptimConfig(lr=1.0, weight_decay=0.3), fused=False).param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert all(p.ndim >= 2 for p in groups[0]["params"]) and all(p.ndim == 1 for p in groups[1]["params"])
    assert sum(len(group["params"]) for group in groups) == len(list(net.parameters()))
    assert isinstance(groups[0]["params"][0], torch.nn.Parameter)
