"""Optimizers that need whole weights equal a slow loop, at every stage of ZeRO, across ranks and after a restart."""

from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pretrain.model.config import ModelConfig
from pretrain.model.init import initialise
from pretrain.model.transformer import Transformer
from pretrain.model.weights import Weight, weights_of
from pretrain.objectives.causal_lm import CausalLMConfig
from pretrain.objectives.learner import Learner
from pretrain.order.phases import Phase
from pretrain.order.stream import Windows
from pretrain.shards import Shards
from pretrain.training.engine.config import EngineConfig
from pretrain.training.engine.deepspeed import DeepSpeedEngine
from pretrain.training.engine.local import LocalEngine
from pretrain.training.engine.ranks import World, find_world, join
from pretrain.training.loader import Batches
from pretrain.training.optim import parts
from pretrain.training.optim.adamw import AdamW, AdamWConfig
from pretrain.training.optim.lamb import Lamb, LambConfig
from pretrain.training.optim.muon import Muon, MuonConfig
from pretrain.training.optim.optimizer import Optimizer
from pretrain.training.optim.orthogonal import POLAR_EXPRESS, orthogonal
from tests.conftest import DECODER
from tests.helpers.batches import batches as batches_of
from tests.helpers.ranks import on_ranks
from tests.helpers.states import loader, state_of

CLIP, RATES = 0.3, (0.01, 0.02, 0.015)
RULES: dict[str, Optimizer] = {  # those that need whole weights
    "Muon": Muon(MuonConfig(kind="muon", lr=0.02, row_beta=None)),
    "NorMuon": Muon(MuonConfig(kind="muon", lr=0.02)),
    "StableAdamW": AdamW(AdamWConfig(lr=0.02, clip_updates=True)),
    "LAMB": Lamb(LambConfig(kind="lamb", lr=0.02)),
}


@pytest.mark.parametrize("shape", [(12, 12), (40, 12), (12, 40)])
def test_orthogonal_makes_all_singular_values_about_one_and_keeps_the_directions(shape):
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(matrices, full_matrices=False)
    found = torch.linalg.diagonal(u.mT @ orthogonal(matrices) @ v.mT)
    torch.testing.assert_close(found, torch.ones_like(s), rtol=0, atol=0.15)
    torch.testing.assert_close(u @ torch.diag_embed(found) @ v, orthogonal(matrices), rtol=0, atol=1e-4)
    assert torch.equal(orthogonal(torch.zeros(1, *shape)), torch.zeros(1, *shape))


@pytest.mark.parametrize("name", RULES)
def test_the_step_is_that_of_a_slow_loop(name, prepared):
    rules, slow = RULES[name], SLOW[name]
    engine, batches = local(prepared, rules, micro_batch=8)
    model, _ = model_and_batches(prepared, 8)
    learner, roles = Learner(model), weights_of(model)
    for step, rate in enumerate(RATES):  # each from the state that the engine has
        batch, objective = batches[step].batch, batches.objectives[0]
        state = state_of(engine)
        for name, p in model.named_parameters():
            p.data.copy_(state["weights", name])
        engine.backward(engine(objective, batch), {"loss": 1 / batch.filled()})
        engine.step(rate)
        gradients = torch.autograd.grad(
            learner(objective, batch.to(torch.device("cpu")), False)["loss"] / batch.filled(), list(model.parameters())
        )
        norm = torch.stack([g.norm() for g in gradients]).norm()
        assert norm > CLIP
        for (name, p), gradient in zip(model.named_parameters(), gradients, strict=True):
            gradient = gradient * CLIP / (norm + 1e-6)
            moments = state["exp_avg", name], state["exp_avg_sq", name]
            slow(p.data, gradient, *moments, rate, step, rules.config, roles[name])
            state["weights", name] = p.detach()
        assert different(engine, state) == []


@pytest.mark.parametrize("name", ["AdamW", *RULES])
def test_a_skipped_step_changes_no_weight_and_no_state(name, prepared):
    """Steps between which others are skipped equal the same steps alone, to the last bit."""
    rules = RULES.get(name) or AdamW(AdamWConfig(lr=0.02))
    engine, batches = local(prepared, rules, micro_batch=8)
    other, _ = local(prepared, rules, micro_batch=8)
    for step, rate in enumerate(RATES):
        batch, objective = batches[step].batch, batches.objectives[0]
        for scale in (1 / batch.filled(), float("nan"), float("inf")):
            engine.backward(engine(objective, batch), {"loss": scale})
            assert engine.step(rate).isfinite() == (scale < 1)
        other.backward(other(objective, batch), {"loss": 1 / batch.filled()})
        other.step(rate)
        expected, found = state_of(other), state_of(engine)
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
        assert {float(state["step"]) for state in engine.optimizer.state.values()} <= {0, step + 1}


def of_muon(p: Tensor, gradient: Tensor, momentum: Tensor, squares: Tensor, rate: float, step: int, config, role):
    """One weight, as the papers say. Other weights than matrices are Adam's, without weight decay."""
    if not role.hidden:
        p.sub_(rate * config.adam_lr / config.lr * adam(gradient, momentum, squares, step, config))
        return
    beta = 0.85 + 0.10 * rate / config.lr
    momentum.copy_(beta * momentum + (1 - beta) * gradient)
    x = beta * momentum + (1 - beta) * gradient
    tall = x.shape[0] > x.shape[1]
    x = (x.T if tall else x) / (1.02 * x.norm() + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        x = a * x + (b * (x @ x.T) + c * (x @ x.T) @ (x @ x.T)) @ x
    x = x.T if tall else x
    if config.row_beta is not None:
        size = x.norm()
        squares.copy_(0.95 * squares + 0.05 * (x**2).mean(1, keepdim=True))
        x = x / squares.sqrt()
        x = x * size / x.norm()
    update = x * max(1, p.shape[0] / p.shape[1]) ** 0.5
    p.sub_(torch.where(update.sign() == p.sign(), rate * config.weight_decay * p, 0) + rate * update)


def of_stable_adamw(p: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, rate: float, step: int, config, role):
    update = adam(gradient, mean, square, step, config) + (config.weight_decay * p if role.decays else 0)
    second = square / (1 - config.betas[1] ** (step + 1))
    too_large = (gradient**2 / second).mean().sqrt()
    p.sub_(rate / max(1, too_large) * update)


def of_lamb(p: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, rate: float, step: int, config, role):
    update = adam(gradient, mean, square, step, config) + (config.weight_decay * p if role.decays else 0)
    p.sub_(rate * (p.norm() / update.norm() if p.ndim == 2 else 1) * update)


def adam(gradient: Tensor, mean: Tensor, square: Tensor, step: int, config) -> Tensor:
    beta, beta_sq = config.betas
    mean.copy_(beta * mean + (1 - beta) * gradient)
    square.copy_(beta_sq * square + (1 - beta_sq) * gradient**2)
    first, second = mean / (1 - beta ** (step + 1)), square / (1 - beta_sq ** (step + 1))
    return first / (second.sqrt() + config.eps)


SLOW = {"Muon": of_muon, "NorMuon": of_muon, "StableAdamW": of_stable_adamw, "LAMB": of_lamb}


def test_a_rate_of_adamw_is_small_for_muon():
    (note,) = MuonConfig(kind="muon", lr=3e-4).notes()
    assert "optim.lr = 0.0003 is small for muon" in note and "optim.adam_lr = 0.003" in note
    assert not MuonConfig(kind="muon", lr=0.01).notes() and not AdamWConfig(lr=3e-4).notes()


def test_stable_adamw_is_adamw_until_a_gradient_grows():
    """After ten equal gradients, one is ten times as large: its root mean square is 2.8 times that of the mean."""
    steps = {}
    for clip_updates in (False, True):
        p = torch.nn.Linear(4, 4, bias=False)
        torch.nn.init.ones_(p.weight)
        rules = AdamW(AdamWConfig(lr=1, clip_updates=clip_updates, weight_decay=0))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("pretrain.model.weights.weights_of", lambda module: {"weight": Weight(decays=True)})
            built = rules.build(p)
        built.state[p.weight] = rules.first_state(p.weight)
        steps[clip_updates] = []
        for size in [1.0] * 10 + [10.0]:
            before, p.weight.grad = p.weight.detach().clone(), torch.full((4, 4), size)
            built.step()
            steps[clip_updates].append(float((before - p.weight).mean().detach()))
    assert steps[True][:10] == pytest.approx(steps[False][:10], rel=1e-5)
    square = (0.95 * (1 - 0.95**10) + 0.05 * 100) / (1 - 0.95**11)
    ratio = 10 / square**0.5
    assert ratio > 2.5 and steps[True][10] == pytest.approx(steps[False][10] / ratio, rel=1e-4)


def test_every_stage_on_two_ranks_takes_the_steps_of_one_process(prepared, tmp_path):
    """From the first weights and from the state that one process has after two steps. Also after a restart, bit by bit.

    Steps are compared from equal states: what rounding changes in one step, an orthogonal update of the next may make
    as large as all the rest.
    """
    states: dict[str, list] = {name: [] for name in RULES}
    for name, rules in RULES.items():
        engine, batches = local(prepared, rules, micro_batch=2)
        for step in range(3):
            taken(engine, batches, step, 1)
            states[name].append(state_of(engine))
    torch.save(states, tmp_path / "states.pt")
    for faults, gathered in on_ranks(2, of_ranks, prepared, tmp_path, log=tmp_path / "ranks.log"):
        assert not faults, "\n".join(faults)
        assert gathered == [0, 1, 1, 7] * 2 + [0] * 4, "at stages 1 and 2 the ranks share one matrix"


def of_ranks(prepared, folder: Path) -> tuple[list[str], list[int]]:
    """The tensors that differ from states.pt, those of one process after each step, or after a restart.

    The second value says how many matrices were gathered in a step, for each optimizer and stage.
    """
    world, states = find_world(), torch.load(folder / "states.pt")
    join(world, 60)
    gather, count = parts._together, []
    parts._together = lambda held, shapes, *others: count.extend(shapes) or gather(held, shapes, *others)
    faults, gathered = [], []
    muons, others = product(("Muon", "NorMuon"), range(4)), product(("StableAdamW", "LAMB"), (1, 3))
    for name, stage in (*muons, *others):
        count.clear()
        rules = RULES[name]
        parts.CHUNK = 1 if name == "Muon" else 1 << 26  # also one matrix after another
        engine, batches = sharded(prepared, rules, stage, world)
        taken(engine, batches, 0, world.size)
        gathered.append(len(count))
        where = f"{name} at stage {stage}"
        faults += [f"{fault}, first step of {where}" for fault in different(engine, states[name][0])]
        taken(engine, batches, 1, world.size)
        saved = state_of(engine)
        taken(engine, batches, 2, world.size)
        again, _ = sharded(prepared, rules, stage, world, saved)
        taken(again, batches, 2, world.size)
        one, other = state_of(engine), state_of(again)
        same = all(torch.equal(one[key], other[key]) for key in one)
        faults += [] if same else [f"after a restart, {where}"]
        moved, _ = sharded(prepared, rules, stage, world, states[name][1])
        taken(moved, batches, 2, world.size)
        faults += [f"{fault}, moved to {where}" for fault in different(moved, states[name][2])]
    return faults, gathered


def different(engine, wanted: dict) -> list[str]:
    """The tensors of an engine that are too far from the wanted ones.

    Weights may differ by 1e-6 of their length. Moments may differ by more, because torch adds 1e-6 to the norm that a
    clipped gradient is divided by, and DeepSpeed does not.
    """
    got = state_of(engine)
    found = {key: (float((got[key] - tensor).norm()), float(tensor.norm())) for key, tensor in wanted.items()}
    limits = {"weights": 1e-6, "exp_avg": 5e-6, "exp_avg_sq": 1e-5}
    return [f"{key}: {a:.1e} of {b:.1e}" for key, (a, b) in found.items() if a > limits[key[0]] * b]


def sharded(prepared, rules: Optimizer, stage: int, world: World, state: dict | None = None):
    """An engine on two ranks with micro-batches of 2: fresh, or restored."""
    model, batches = model_and_batches(prepared, 2)
    if state:
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(state["weights", name])
    settings = EngineConfig(micro_batch=2, zero_stage=stage)
    engine = DeepSpeedEngine(Learner(model), rules, settings, CLIP, world)
    if state:
        engine.restore(loader(state), 2, batches.objectives[0], batches[0].batch)
    return engine, batches


def taken(engine, batches: Batches, step: int, ranks: int) -> None:
    """Take a step with two micro-batches of two windows. If there are two ranks, the other has gradients of zeros.

    So a sum of gradients is exact: what rounding changes in it, an orthogonal update makes as large as all the rest.
    """
    rank = engine.world.rank if ranks > 1 else 0
    for item in range(2 * step, 2 * step + 2):
        loss = engine(batches.objectives[0], batches[item].batch)
        engine.backward(loss, {"loss": 1 / (4 * 32) if rank == 0 else 0.0})
    assert engine.step(RATES[step]) > CLIP


def local(prepared, rules: Optimizer, micro_batch: int) -> tuple[LocalEngine, Batches]:
    model, batches = model_and_batches(prepared, micro_batch)
    return LocalEngine(Learner(model), rules, EngineConfig(micro_batch=micro_batch), CLIP, World()), batches


def model_and_batches(prepared, micro_batch: int) -> tuple[Transformer, Batches]:
    shards = Shards(prepared.shards["byte"])
    phase = Phase(steps=len(RATES), seq_len=32, batch_tokens=256)
    batches = batches_of({"": Windows(shards, 33, 7)}, CausalLMConfig(kind="causal_lm"), [phase], 7, micro_batch)
    model = Transformer(ModelConfig(**DECODER | {"layers": 1, "mlp_width": 96}), shards.vocab_size)
    initialise(model, 7)
    return model, batches
