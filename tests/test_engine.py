"""The two engines do the same arithmetic, and what a user writes is what DeepSpeed is told."""

import math
import shutil
from pathlib import Path

import pytest
import torch

from pretrain import config
from pretrain.engine import EngineConfig, LocalEngine, deepspeed_config
from pretrain.errors import ConfigError
from pretrain.loader import Batches
from pretrain.model import ModelConfig, Transformer, initialise
from pretrain.objectives import Learner, MaskedLMConfig
from pretrain.optim import OptimConfig, adamw
from pretrain.phases import Phase
from pretrain.ranks import World, find_world, join
from pretrain.shards import Shards
from pretrain.windows import Windows
from tests import cases
from tests.conftest import ENCODER, run_values
from tests.ranks import on_ranks

TWENTY = [{"steps": 20, "seq_len": 32, "batch_tokens": 256, "decay_steps": 5}]


@pytest.mark.parametrize("objective", ["masked_lm", "causal_lm"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_on_one_rank_equals_plain_torch(objective, stage, prepared, tmp_path):
    local = run_values(prepared, tmp_path / "local", objective, phases=TWENTY)
    launched = run_values(prepared, tmp_path / "zero", objective, phases=TWENTY, engine={"zero_stage": stage})
    on_ranks(1, cases.train, local, log=tmp_path / "local.log", launched=False)
    on_ranks(1, cases.train, launched, log=tmp_path / "zero.log")
    assert differences(tmp_path / "local", tmp_path / "zero") == []


@pytest.mark.parametrize(("world", "micro_batch"), [(1, 8), (1, 1), (2, 4), (2, 1)])
def test_micro_batches_and_ranks_do_not_change_the_mean(world, micro_batch, prepared, tmp_path):
    whole = run_values(prepared, tmp_path / "whole", phases=TWENTY, engine={"micro_batch": 8})
    parts = run_values(prepared, tmp_path / "parts", phases=TWENTY, engine={"micro_batch": micro_batch})
    on_ranks(1, cases.train, whole, log=tmp_path / "whole.log", launched=False)
    on_ranks(world, cases.train, parts, log=tmp_path / "parts.log", launched=world > 1)
    assert differences(tmp_path / "whole", tmp_path / "parts") == []


def test_another_training_is_told_from_the_same_one(prepared, tmp_path):
    for name, changes in (("one", {}), ("rate", {"optim": {"lr": 1.1e-3}}), ("seed", {"seed": 8})):
        values = run_values(prepared, tmp_path / name, phases=TWENTY, **changes)
        on_ranks(1, cases.train, values, log=tmp_path / f"{name}.log", launched=False)
    assert differences(tmp_path / "one", tmp_path / "one") == []
    assert {line.split(" ")[0] for line in differences(tmp_path / "one", tmp_path / "rate")} >= {"losses", "weights/"}
    assert differences(tmp_path / "one", tmp_path / "seed")[0].startswith("batches")


def differences(one: Path, other: Path) -> list[str]:
    """What two trainings of 20 steps do not share: batches, losses and weights within 1e-5, gradient norms within 1e-4,
    all relative."""
    a, b = cases.history(one), cases.history(other)
    assert len(a) == len(b) == 20
    found = [] if [digest for *_, digest in a] == [digest for *_, digest in b] else ["batches"]
    for name, column, tolerance in (("losses", 1, 1e-5), ("norms", 2, 1e-4)):
        pairs = [(x[column], y[column]) for x, y in zip(a, b, strict=True)]
        found += [f"{name} {x} {y}" for x, y in pairs if not abs(x - y) <= tolerance * abs(y)]
    expected, got = cases.state(one), cases.state(other)
    weights = [name for name in expected if name.startswith("weights/")]
    assert len(weights) > 20
    for name in weights:
        if name.endswith("attention.k.bias"):  # softmax ignores it: its gradient is rounding, which Adam magnifies
            continue
        if not (got[name] - expected[name]).norm() <= 1e-5 * expected[name].norm():
            found.append(f"weights/ {name}")
    return found


def test_slots_count_alike_whatever_micro_batch_they_are_in(prepared):
    """Rows with empty slots: the gradient of two unequal micro-batches is that of the whole batch."""
    gradients = []
    for micro_batch in (8, 2):
        engine, batches = local_engine(prepared, micro_batch)
        micros = [batches[item] for item in range(8 // micro_batch)]
        emptied = []
        for micro in micros:
            weights = micro.batch.weights.clone()
            even = torch.arange(micro.first_sample, micro.first_sample + micro_batch) % 2 == 0
            weights[even, 3:] = 0  # every other sample keeps three targets
            emptied.append(type(micro.batch)(**{**vars(micro.batch), "weights": weights}))
        filled = sum(batch.filled() for batch in emptied)
        for batch in emptied:
            engine.backward(engine(batch), 1 / filled)
        gradients.append([p.grad.clone() for p in engine.module.parameters()])
    for whole, parts in zip(*gradients, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


def test_a_gradient_that_is_not_finite_is_skipped(prepared):
    engine, batches = local_engine(prepared, 2)
    before = [p.detach().clone() for p in engine.module.parameters()]
    engine.backward(engine(batches[0].batch) * float("nan"), 1.0)
    assert engine.step(1e-3) is None
    assert all(torch.equal(p, old) for p, old in zip(engine.module.parameters(), before, strict=True))


@pytest.mark.parametrize(("stage", "world"), [(0, 2), (1, 2), (2, 2), (3, 2)])
def test_deepspeed_skips_a_gradient_that_is_not_finite_on_one_rank(stage, world, prepared, tmp_path):
    results = on_ranks(world, poison_one_rank, prepared, stage, log=tmp_path / "nan.log")
    for norms, unchanged, moved in results:
        assert norms[0] is None and norms[1] > 0
        assert unchanged and moved


def poison_one_rank(prepared, stage: int) -> tuple[list, bool, bool]:
    """One step with a NaN loss on rank 1 only, then a good one: norms, weights unchanged after the first, moved after
    the second."""
    from pretrain.engine import DeepSpeedEngine

    world = find_world()
    join(world, 60)
    model, batches = model_and_batches(prepared, 2)
    engine_config = EngineConfig(micro_batch=2, zero_stage=stage)
    engine = DeepSpeedEngine(Learner(model), lambda m: adamw(m, OptimConfig(lr=1), False), engine_config, 1.0, world)
    states, norms = [], []
    for factor in (float("nan") if world.rank == 1 else 1.0, 1.0):
        engine.backward(engine(batches[0].batch) * factor, 1.0)
        norms.append(engine.step(1e-3))
        states.append({name: engine.whole("weights", name).clone() for name in engine.shapes()})
    fresh, _ = model_and_batches(prepared, 2)
    first = dict(fresh.named_parameters())
    unchanged = all(torch.equal(t, first[name]) for name, t in states[0].items())
    return norms, unchanged, any(not torch.equal(t, states[0][name]) for name, t in states[1].items())


def model_and_batches(prepared, micro_batch: int) -> tuple[Transformer, Batches]:
    shards = Shards(prepared.shards["bert"])
    phase = Phase(steps=4, seq_len=32, batch_tokens=256)
    batches = Batches({"": Windows(shards, 32, 7)}, MaskedLMConfig(kind="masked_lm"), [phase], 7, micro_batch, 0, 1)
    model = Transformer(ModelConfig(**ENCODER), shards.vocab_size)
    initialise(model, 7)
    return model, batches


def local_engine(prepared, micro_batch: int) -> tuple[LocalEngine, Batches]:
    model, batches = model_and_batches(prepared, micro_batch)
    engine_config = EngineConfig(micro_batch=micro_batch)
    engine = LocalEngine(Learner(model), lambda m: adamw(m, OptimConfig(lr=1), False), engine_config, 1.0, World())
    return engine, batches


def test_the_derived_configuration_says_everything_that_deepspeed_would_otherwise_guess():
    derived = deepspeed_config(EngineConfig(micro_batch=4, precision="bf16", zero_stage=2), clip=0.5)
    assert derived["gradient_clipping"] == 0.5 and derived["managed_gradient_accumulation"] is False
    assert derived["data_types"] == {"grad_accum_dtype": "fp32"} and derived["bf16"] == {"enabled": True}
    assert derived["zero_optimization"] == {"stage": 2} and derived["train_micro_batch_size_per_gpu"] == 4


def test_further_keys_are_merged_into_the_sections_they_belong_to():
    further = {
        "wall_clock_breakdown": "true",
        "zero_optimization": {"overlap_comm": "true", "reduce_bucket_size": "5e7"},
    }
    engine = config.build(EngineConfig, {"micro_batch": "4", "zero_stage": "2", "deepspeed": further}, "x.yaml")
    derived = deepspeed_config(engine, 1.0)
    assert derived["wall_clock_breakdown"] is True and derived["gradient_clipping"] == 1.0
    assert derived["zero_optimization"] == {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 5e7}
    assert deepspeed_config(engine, math.inf)["gradient_clipping"] == 0.0


@pytest.mark.parametrize(
    ("further", "message"),
    [
        ({"gradient_clipping": 2}, r"gradient_clipping: it follows from optim\.clip"),
        ({"zero_optimization": {"stage": 3}}, r"zero_optimization\.stage: it follows from engine\.zero_stage"),
        ({"bf16": {"enabled": True}}, r"bf16\.enabled: it follows from engine\.precision"),
        ({"fp16": {"enabled": True}}, "fp16: engine.precision is fp32"),
        ({"fp16": {}}, "fp16: engine.precision is fp32"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "device: only cpu is supported"),
        ({"zero_optimization": {"round_robin_gradients": True}}, "does not continue from its checkpoints"),
        ({"zero_optimisation": {"overlap_comm": True}}, "did you mean zero_optimization"),
    ],
)
def test_a_key_that_follows_from_another_of_ours_is_refused_by_its_full_name(further, message):
    with pytest.raises(ConfigError, match=message):
        config.build(EngineConfig, {"micro_batch": 4, "deepspeed": further}, "x.yaml")


BUCKETS = {"reduce_bucket_size": 5000, "allgather_bucket_size": 5000}
TO_CPU = {"device": "cpu"}


@pytest.mark.parametrize(
    ("stage", "precision", "keys"),
    [
        (1, "bf16", {"offload_optimizer": TO_CPU, **BUCKETS}),
        (2, "fp32", {"offload_optimizer": TO_CPU, "overlap_comm": True, "contiguous_gradients": False, **BUCKETS}),
        (3, "fp32", {"offload_optimizer": TO_CPU, "offload_param": TO_CPU, "stage3_param_persistence_threshold": 0}),
    ],
)
def test_a_run_with_offload_overlap_and_buckets_is_the_same_and_continues_bit_by_bit(
    stage, precision, keys, prepared, tmp_path
):
    engine = {"zero_stage": stage, "precision": precision}
    plain = run_values(prepared, tmp_path / "plain", phases=TWENTY, engine=engine)
    values = run_values(prepared, tmp_path / "run", phases=TWENTY, checkpoint={"every_steps": 12, "keep": 9})
    values["engine"] |= {**engine, "deepspeed": {"zero_optimization": keys}}
    on_ranks(2, cases.train, values, log=tmp_path / "run.log")
    if precision == "fp32":
        on_ranks(2, cases.train, plain, log=tmp_path / "plain.log")
        assert differences(tmp_path / "plain", tmp_path / "run") == []
    history, state = cases.history(tmp_path / "run"), cases.state(tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step_00000020")
    on_ranks(2, cases.train, values, log=tmp_path / "again.log")
    assert "continuing after step 12" in (tmp_path / "again.0.log").read_text()
    assert cases.history(tmp_path / "run") == history
    again = cases.state(tmp_path / "run")
    assert all(torch.equal(tensor, again[name]) for name, tensor in state.items())


def test_keys_that_deepspeed_refuses_are_named_with_its_reason(prepared, tmp_path):
    values = run_values(prepared, tmp_path / "run", engine={"zero_stage": 1})
    values["engine"]["deepspeed"] = {"zero_optimization": {"overlap_comm": True}}
    (said,) = on_ranks(1, refused_with, values, log=tmp_path / "log")
    assert "zero_optimization.overlap_comm, and says" in said and "ZeRO stage 2" in said, said
    with pytest.raises(ConfigError, match=r"a plain process(?s:.*)ignore zero_optimization\.overlap_comm"):
        cases.train({**values, "out": str(tmp_path / "plain")})


def refused_with(values: dict) -> str:
    with pytest.raises(ConfigError) as error:
        cases.train(values)
    return str(error.value)


def test_bf16_at_stage_0_is_refused():
    with pytest.raises(ConfigError, match=r"needs engine\.zero_stage = 1, 2 or 3"):
        config.build(EngineConfig, {"micro_batch": "4", "precision": "bf16", "zero_stage": "0"}, "x.yaml")
