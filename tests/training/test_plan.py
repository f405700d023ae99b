"""The plan of a run's memory is what real engines allocate."""

import gc

import numpy as np
import pytest
import torch

from benchmarks.activations import Existing, storage
from benchmarks.gpu import plans
from pretrain.model.attention import Layout
from pretrain.model.config import ModelConfig
from pretrain.model.models import model_of
from pretrain.objectives import OBJECTIVES
from pretrain.objectives.causal_lm import CausalLM, CausalLMConfig
from pretrain.objectives.learner import Learner
from pretrain.order.phases import Phase
from pretrain.order.rows import of_stream
from pretrain.training.engine.blocks import set_up_blocks
from pretrain.training.engine.config import EngineConfig
from pretrain.training.engine.deepspeed import DeepSpeedEngine
from pretrain.training.engine.footprint import buffer_bytes, state_bytes
from pretrain.training.engine.local import LocalEngine
from pretrain.training.engine.ranks import World, find_world, join
from pretrain.training.loader import accumulation, windows_at_once
from pretrain.training.optim import OPTIMIZERS
from pretrain.training.plan import GPUS, activation_bytes, fitting_micro_batch
from tests.conftest import DECODER
from tests.helpers.ranks import on_ranks
from tests.test_presets import presets

WIDE = {**DECODER, "width": 128, "heads": 4, "kv_heads": 4, "head_width": 32, "mlp_width": 512}
ENTRIES, T = 200, 16
BUCKET = {"reduce_bucket_size": 150_000}  # a quarter of the weights


@pytest.mark.parametrize(
    ("world", "stage", "precision", "rule", "keys"),
    [
        (1, 1, "bf16", "adamw", {}),  # a plain process
        (1, 1, "fp32", "muon", {}),
        (2, 1, "bf16", "adamw", BUCKET),
        (2, 1, "fp32", "adamw", BUCKET),
        (2, 2, "bf16", "muon", BUCKET | {"overlap_comm": True}),
        (2, 2, "fp32", "adamw", BUCKET),
        (2, 3, "bf16", "adamw", {"reduce_bucket_size": 1_000_000}),
    ],
)
def test_an_engine_allocates_what_is_planned(world, stage, precision, rule, keys, tmp_path):
    """The most bytes of tensors that exist in a backward pass and in a step, to 5 %, at ZeRO 3 to 12 %.

    DeepSpeed gathers weights ahead at ZeRO 3, so it is not always the same weights that exist at once.
    """
    further = {"zero_optimization": keys} if keys else {}
    engine = EngineConfig(micro_batch=1, zero_stage=stage, precision=precision, deepspeed=further)
    weights, passed, stepped = on_ranks(world, measured, engine, rule, log=tmp_path / "log", launched=world > 1)[0]
    place = World(0, world, launched=world > 1)
    state = state_bytes(weights, 2, engine, place, gpu=False).device
    backward, step = buffer_bytes(weights, engine, place, whole=rule == "muon")
    kept = activation_bytes(ModelConfig(**WIDE), ENTRIES, T, T, 1, 2 if precision == "bf16" else 4)
    near = 0.12 if stage == 3 else 0.05
    assert passed == pytest.approx(state + kept + backward, rel=near)
    assert stepped == pytest.approx(state + step, rel=near)


def measured(config: EngineConfig, rule: str) -> tuple[int, int, int]:
    """The weights of a model, and the most bytes that rank 0 has in a backward pass and in a step."""
    world = find_world()
    if world.launched:
        join(world, 60)
    model = model_of(ModelConfig(**WIDE), ENTRIES)
    weights = sum(p.numel() for p in model.parameters())
    objective = CausalLM(CausalLMConfig(kind="causal_lm"), {"eod": 0}, ENTRIES, T, 1)
    batch = objective.batch(of_stream(torch.arange(6, 7 + T)[None].int().numpy(), end=0), torch.arange(1).numpy())
    optimizer = OPTIMIZERS[rule](OPTIMIZERS[rule].Config(kind=rule, lr=1e-3))
    engine = (DeepSpeedEngine if world.launched else LocalEngine)(Learner(model), optimizer, config, 1.0, world)

    def backward() -> None:
        engine.backward(engine(objective, batch), {"loss": 0.01})

    def most(work) -> int:
        before = existing()
        with Existing(set(before)) as seen:
            work()
        return sum(before.values()) + seen.peak

    backward()
    engine.step(1e-3)  # at ZeRO 3 the first step records the order of the layers
    backward()
    return weights, most(backward), most(lambda: engine.step(1e-3))


def existing() -> dict[int, int]:
    """The bytes of every tensor of this process, by its storage."""
    gc.collect()
    found = {}
    for one in gc.get_objects():
        if isinstance(one, torch.Tensor) and one.device.type == "cpu":
            for tensor in (one, one.grad if one.is_leaf else None):
                if tensor is not None:
                    found[storage(tensor)] = tensor.untyped_storage().nbytes()
    return found


SMALL = {"layers": 4, "width": 128, "heads": 4, "mlp_width": 384, "dropout": 0.0}
OF_DECODER = {"decoder_layers": 4, "head_width": 32}


@pytest.mark.parametrize(
    ("name", "changes", "recompute_every"),
    [
        ("bert-base", {}, 0),
        ("modernbert-base", {}, 0),
        ("electra-small", {}, 0),
        ("t5-base", OF_DECODER, 0),
        ("gpt2-124m", {}, 0),
        ("gpt2-124m", {}, 1),
        ("qwen3-0.6b", {"kv_heads": 2, "head_width": 32}, 0),
        ("qwen3-0.6b", {"kv_heads": 2, "head_width": 32}, 1),
    ],
)
def test_activations_of_every_kind_of_preset_are_those_of_a_step(name, changes, recompute_every):
    """The most bytes of tensors in fp32, to 8 %, beside the weights and their gradients."""
    run = presets.preset(name).run
    config = ModelConfig(**run.model.model_dump() | SMALL | changes)
    windows, length, entries = 16, 256, 4000
    objective = OBJECTIVES[run.objective.kind](run.objective, presets.SPECIALS, entries, length, 1)
    ids = torch.arange(210, 210 + windows * (length + 1)).remainder(entries).view(windows, -1).int()
    batch = objective.batch(of_stream(ids.numpy(), end=3), np.arange(windows)).to(torch.device("cpu"))
    learner = Learner(model_of(config, entries))
    set_up_blocks(learner, EngineConfig(micro_batch=windows, recompute_every=recompute_every))
    for p in learner.parameters():
        p.grad = torch.zeros_like(p)
    with Existing({storage(x) for p in learner.parameters() for x in (p, p.grad)}) as seen:
        torch.stack(list(learner(objective, batch).values())).sum().backward()
    planned = activation_bytes(config, entries, length, objective.targets, windows, 4, recompute_every)
    assert planned == pytest.approx(seen.peak, rel=0.08)


def test_the_micro_batch_that_fits_divides_every_phase_among_the_ranks():
    phases = [Phase(steps=1, seq_len=128, batch_tokens=32768), Phase(steps=1, seq_len=512, batch_tokens=131072)]
    for ranks, size in ((1, 64), (8, 8), (64, 1)):
        assert fitting_micro_batch(phases, 64, ranks) == size
        for phase in phases:
            assert accumulation(phase, windows_at_once(phase, phases, size), ranks) >= 1
    assert fitting_micro_batch(phases, 64, 3) is None


def test_the_runs_that_are_to_be_measured_on_a_gpu_fit_into_it(tmp_path):
    """Runs of real sizes. The twelve of the presets differ in their plans."""
    peaks, counts = {}, {}
    for group, runs in plans.RUNS.items():
        counts[group] = len(runs)
        for one in runs:
            planned = plans.plan(one, plans.values_of(one, tmp_path, toy=False), toy=False)
            assert one.name not in peaks
            peaks[one.name] = planned["gb"]["peak"]
            assert planned["step_ms"]["counted"] < planned["step_ms"]["assumed share of the peak"]
            assert planned["seen_flops_a_token"] <= planned["flops_a_token"]
    of_presets = list(peaks.values())[: counts["presets"]]
    assert len(set(of_presets)) == 12
    assert max(of_presets) < 0.9 * GPUS[plans.GPU].gb
    assert max(peaks.values()) < GPUS[plans.GPU].gb
    assert peaks["gpt2-124m, plain, recomputed"] < peaks["gpt2-124m, plain"] < peaks["gpt2-124m, ZeRO 3"]
    assert peaks["qwen3-0.6b, ZeRO 2, offloaded"] < peaks["qwen3-0.6b, plain"]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 2])
def test_the_tokens_that_are_seen_are_those_of_the_mask(causal, window):
    """Documents of 3, 1 and 12 tokens fill two windows of 8."""
    segments = torch.tensor([[0] * 3 + [1] + [2] * 4, [0] * 8])
    mask = Layout(segments, segments, causal).mask(window, torch.float32)
    found = plans.seen(np.array([3, 1, 12]), 8, causal, window)
    assert found == pytest.approx((mask == 0).sum().item() / 16)
