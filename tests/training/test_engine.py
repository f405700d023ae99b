"""The two engines do the same arithmetic, and DeepSpeed gets the settings that a user writes."""

import math
import shutil
from pathlib import Path

import pytest
import torch

from pretrain import config
from pretrain.errors import ConfigError
from pretrain.model.config import ModelConfig
from pretrain.model.init import initialise
from pretrain.model.models import parameters_of
from pretrain.model.transformer import Transformer
from pretrain.objectives.learner import Learner
from pretrain.objectives.masked_lm import MaskedLMConfig
from pretrain.order.phases import Phase
from pretrain.order.stream import Windows
from pretrain.shards import Shards
from pretrain.training.engine.config import EngineConfig, deepspeed_config
from pretrain.training.engine.deepspeed import DeepSpeedEngine
from pretrain.training.engine.engine import engine_for
from pretrain.training.engine.footprint import state_bytes
from pretrain.training.engine.local import LocalEngine
from pretrain.training.engine.ranks import World, find_world, join
from pretrain.training.loader import Batches
from pretrain.training.optim.adamw import AdamW, AdamWConfig
from tests.conftest import DECODER, ENCODER, run_values
from tests.helpers import cases
from tests.helpers.batches import batches as batches_of
from tests.helpers.ranks import on_ranks
from tests.helpers.states import loader, state_of

TWELVE = [{"steps": 12, "seq_len": 32, "batch_tokens": 256, "decay_steps": 4}]


@pytest.fixture(scope="module")
def plain(prepared, tmp_path_factory) -> Path:
    """A folder with a run of 12 steps in plain torch, for each size of its micro-batches."""
    root = tmp_path_factory.mktemp("plain")
    runs = [run_values(prepared, root / str(size), phases=TWELVE, engine={"micro_batch": size}) for size in (2, 8)]
    on_ranks(1, cases.train_each, runs, log=root / "log", launched=False)
    return root


@pytest.mark.parametrize("objective", ["masked_lm", "causal_lm"])
def test_deepspeed_of_every_stage_on_one_rank_equals_plain_torch(objective, prepared, tmp_path):
    """The decoder has a width_base, so its groups of weights have learning rates of their own."""
    shape = {"width_base": 8} if objective == "causal_lm" else {}
    local = run_values(prepared, tmp_path / "local", objective, phases=TWELVE, model=shape)
    launched = []
    for stage in range(4):
        asked = {"zero_stage": stage, "deepspeed": {"wall_clock_breakdown": False}}  # else plain torch runs 0 and 1
        launched += [run_values(prepared, tmp_path / f"{stage}", objective, phases=TWELVE, model=shape, engine=asked)]
    on_ranks(1, cases.train, local, log=tmp_path / "local.log", launched=False)
    on_ranks(1, cases.train_each, launched, log=tmp_path / "zero.log")
    said = (tmp_path / "zero.0.log").read_text()
    for stage in range(4):
        assert f"DeepSpeed ZeRO {stage}, 1 x cpu" in said
        assert differences(tmp_path / "local", tmp_path / f"{stage}") == [], stage


def test_bf16_of_plain_torch_is_that_of_deepspeed(prepared, tmp_path):
    """Losses agree to the last bits of bf16, and masters within a few steps of different roundings."""
    runs = []
    for name, engine in (("local", {}), ("zero", {"deepspeed": {"wall_clock_breakdown": False}})):
        runs += [run_values(prepared, tmp_path / name, phases=TWELVE, engine={"precision": "bf16", **engine})]
    on_ranks(1, cases.train_each, runs, log=tmp_path / "log")
    for said in ("plain torch, 1 x cpu, bf16", "DeepSpeed ZeRO 1, 1 x cpu, bf16"):
        assert said in (tmp_path / "log.0.log").read_text()
    one, other = cases.history(tmp_path / "local"), cases.history(tmp_path / "zero")
    for (_, loss, norm, digest), (_, loss_of_other, norm_of_other, digest_of_other) in zip(one, other, strict=True):
        assert digest == digest_of_other
        assert loss == pytest.approx(loss_of_other, rel=1e-3) and norm == pytest.approx(norm_of_other, rel=2e-2)
    expected, got = cases.state(tmp_path / "zero"), cases.state(tmp_path / "local")
    for name, tensor in expected.items():
        if name.startswith("weights/") and tensor.ndim == 2:
            assert (got[name] - tensor).norm() <= 1e-2 * tensor.norm(), name
            assert not torch.equal(got[name].bfloat16().float(), got[name])  # bf16 cannot hold the masters


@pytest.mark.parametrize(
    ("engine", "world", "expected"),
    [
        ({}, World(), "plain torch"),
        ({"zero_stage": 3}, World(), "plain torch"),  # a plain process has no ranks to shard over
        ({"zero_stage": 0}, World(launched=True), "plain torch"),
        ({"precision": "bf16"}, World(launched=True), "plain torch"),
        ({"zero_stage": 2}, World(launched=True), "DeepSpeed"),
        ({"deepspeed": {"wall_clock_breakdown": True}}, World(launched=True), "DeepSpeed"),
        ({"zero_stage": 0}, World(1, 2, 1, launched=True), "DeepSpeed"),
    ],
)
def test_one_rank_trains_with_plain_torch_unless_deepspeed_is_asked_for(engine, world, expected):
    found = engine_for(EngineConfig(micro_batch=1, **engine), world)
    assert found is {"plain torch": LocalEngine, "DeepSpeed": DeepSpeedEngine}[expected]


def test_bf16_gradients_are_summed_in_fp32(prepared):
    """The sum over micro-batches is the fp32 sum of the bf16 gradient of each, which bf16 cannot hold."""
    engine, batches = local_engine(prepared, 2, precision="bf16")
    assert {p.dtype for p in engine.module.parameters()} == {torch.bfloat16}
    each = []
    for item in range(4):
        engine.backward(engine(batches.objectives[0], batches[item].batch), {"loss": 0.1})
        each.append([p.grad.clone() for p in engine.masters.parameters()])
        engine.optimizer.zero_grad()
    for item in range(4):
        engine.backward(engine(batches.objectives[0], batches[item].batch), {"loss": 0.1})
    for p, *parts in zip(engine.masters.parameters(), *each, strict=True):
        assert all(torch.equal(part.bfloat16().float(), part) for part in parts)
        assert torch.equal(p.grad, ((parts[0] + parts[1]) + parts[2]) + parts[3])
    assert any(not torch.equal(p.grad.bfloat16().float(), p.grad) for p in engine.masters.parameters())
    assert engine.step(1e-3) > 0
    for p, master in zip(engine.module.parameters(), engine.masters.parameters(), strict=True):
        assert torch.equal(p, master.bfloat16()) and p.grad is None and master.grad is None


def test_the_state_of_bf16_in_plain_torch_goes_to_every_stage_and_precision_and_back(prepared, tmp_path):
    """Compare masters and moments to the last bit."""
    engine, batches = local_engine(prepared, 2, precision="bf16")
    for item in range(2):
        engine.backward(engine(batches.objectives[0], batches[item].batch), {"loss": 0.01})
        engine.step(1e-3)
    state = state_of(engine)
    assert {kind for kind, _ in state} == set(KINDS)
    for precision in ("fp32", "bf16"):
        other, _ = local_engine(prepared, 2, precision=precision)
        other.restore(loader(state), 2, batches.objectives[0], batches[0].batch)
        found = state_of(other)
        assert all(torch.equal(found[key], tensor) for key, tensor in state.items())
        assert all(float(inner["step"]) == 2 for inner in other.optimizer.state.values())
        if precision == "bf16":  # it continues like the engine that was never saved
            engine.backward(engine(batches.objectives[0], batches[2].batch), {"loss": 0.01})
            other.backward(other(batches.objectives[0], batches[2].batch), {"loss": 0.01})
            assert engine.step(1e-3) == other.step(1e-3)
            one, found = state_of(engine), state_of(other)
            assert all(torch.equal(one[key], found[key]) for key in state)
    for lost in on_ranks(2, restored_by_deepspeed, prepared, state, log=tmp_path / "restored.log"):
        assert lost == []


KINDS = ("weights", "exp_avg", "exp_avg_sq")
STAGES = [(0, "fp32"), (1, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16"), (3, "autocast")]


def restored_by_deepspeed(prepared, state: dict) -> list[str]:
    """The tensors of a saved state that DeepSpeed does not have after `restore`, by stage and precision."""
    world = find_world()
    join(world, 60)
    lost = []
    for stage, precision in STAGES:
        model, batches = model_and_batches(prepared, 2)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(state["weights", name])
        config = EngineConfig(micro_batch=2, zero_stage=stage, precision=precision)
        engine = DeepSpeedEngine(Learner(model), AdamW(AdamWConfig(lr=1)), config, 1.0, world)
        engine.restore(loader(state), 2, batches.objectives[0], batches[0].batch)
        found = state_of(engine)
        lost += [f"{key} at stage {stage}, {precision}" for key in state if not torch.equal(found[key], state[key])]
    return lost


@pytest.mark.parametrize(("world", "micro_batches"), [(1, [8, 1]), (2, [4, 1])])
def test_micro_batches_and_ranks_do_not_change_the_mean(world, micro_batches, plain, prepared, tmp_path):
    engines = {str(size): {"micro_batch": size} for size in micro_batches}
    runs = [run_values(prepared, tmp_path / name, phases=TWELVE, engine=engine) for name, engine in engines.items()]
    on_ranks(world, cases.train_each, runs, log=tmp_path / "parts.log", launched=world > 1)
    for name in engines:
        assert differences(plain / "8", tmp_path / name) == []


def test_another_training_is_told_from_the_same_one(plain, prepared, tmp_path):
    for name, changes in (("rate", {"optim": {"lr": 1.1e-3}}), ("seed", {"seed": 8})):
        cases.train(run_values(prepared, tmp_path / name, phases=TWELVE, **changes))
    assert differences(plain / "2", plain / "2") == []
    assert {line.split(" ")[0] for line in differences(plain / "2", tmp_path / "rate")} >= {"losses", "weights/"}
    assert differences(plain / "2", tmp_path / "seed")[0].startswith("batches")


def differences(one: Path, other: Path) -> list[str]:
    """The differences of two trainings of 12 steps: other batches, or a relative difference above a limit.

    The limit is 1e-5 for losses and weights, and 1e-4 for gradient norms.
    """
    a, b = cases.history(one), cases.history(other)
    assert len(a) == len(b) == 12
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
    """With empty slots, the gradient of two unequal micro-batches equals that of the whole batch."""
    gradients = []
    for micro_batch in (8, 2):
        engine, batches = local_engine(prepared, micro_batch)
        micros = [batches[item] for item in range(8 // micro_batch)]
        emptied = []
        for micro in micros:
            weights = micro.batch.weights.copy()
            even = torch.arange(micro.first_sample, micro.first_sample + micro_batch) % 2 == 0
            weights[even, 3:] = 0  # every other sample keeps three targets
            emptied.append(type(micro.batch)(**{**vars(micro.batch), "weights": weights}))
        filled = sum(batch.filled() for batch in emptied)
        for batch in emptied:
            engine.backward(engine(batches.objectives[0], batch), {"loss": 1 / filled})
        gradients.append([p.grad.clone() for p in engine.module.parameters()])
    for whole, parts in zip(*gradients, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


def test_a_gradient_that_is_not_finite_is_skipped(prepared):
    engine, batches = local_engine(prepared, 2)
    before = [p.detach().clone() for p in engine.module.parameters()]
    engine.backward(engine(batches.objectives[0], batches[0].batch), {"loss": float("nan")})
    assert not engine.step(1e-3).isfinite()
    assert all(torch.equal(p, old) for p, old in zip(engine.module.parameters(), before, strict=True))


@pytest.mark.parametrize(("stage", "world"), [(0, 2), (1, 2), (2, 2), (3, 2)])
def test_deepspeed_skips_a_gradient_that_is_not_finite_on_one_rank(stage, world, prepared, tmp_path):
    results = on_ranks(world, poison_one_rank, prepared, stage, log=tmp_path / "nan.log")
    for norms, unchanged, moved in results:
        assert not math.isfinite(norms[0]) and norms[1] > 0
        assert unchanged and moved


def poison_one_rank(prepared, stage: int) -> tuple[list, bool, bool]:
    """A step with a NaN loss on rank 1 only, and then a good one.

    Returns the norms, whether the first step left the weights unchanged, and whether the second moved them.
    """
    world = find_world()
    join(world, 60)
    model, batches = model_and_batches(prepared, 2)
    engine_config = EngineConfig(micro_batch=2, zero_stage=stage)
    engine = DeepSpeedEngine(Learner(model), AdamW(AdamWConfig(lr=1)), engine_config, 1.0, world)
    states, norms = [], []
    for factor in (float("nan") if world.rank == 1 else 1.0, 1.0):
        engine.backward(engine(batches.objectives[0], batches[0].batch), {"loss": factor})
        norms.append(float(engine.step(1e-3)))
        states.append({name: tensor for (_, name), tensor in state_of(engine, ("weights",)).items()})
    fresh, _ = model_and_batches(prepared, 2)
    first = dict(fresh.named_parameters())
    unchanged = all(torch.equal(t, first[name]) for name, t in states[0].items())
    return norms, unchanged, any(not torch.equal(t, states[0][name]) for name, t in states[1].items())


def model_and_batches(prepared, micro_batch: int) -> tuple[Transformer, Batches]:
    shards = Shards(prepared.shards["bert"])
    phase = Phase(steps=4, seq_len=32, batch_tokens=256)
    batches = batches_of({"": Windows(shards, 32, 7)}, MaskedLMConfig(kind="masked_lm"), [phase], 7, micro_batch)
    model = Transformer(ModelConfig(**ENCODER), shards.vocab_size)
    initialise(model, 7)
    return model, batches


def local_engine(prepared, micro_batch: int, **engine) -> tuple[LocalEngine, Batches]:
    model, batches = model_and_batches(prepared, micro_batch)
    engine_config = EngineConfig(micro_batch=micro_batch, **engine)
    engine = LocalEngine(Learner(model), AdamW(AdamWConfig(lr=1)), engine_config, 1.0, World())
    return engine, batches


def test_the_derived_configuration_says_everything_that_deepspeed_would_otherwise_guess():
    derived = deepspeed_config(EngineConfig(micro_batch=4, precision="bf16", zero_stage=2), clip=0.5)
    assert derived["gradient_clipping"] == 0.5 and derived["managed_gradient_accumulation"] is False
    assert derived["data_types"] == {"grad_accum_dtype": "fp32"} and derived["bf16"] == {"enabled": True}
    assert derived["zero_optimization"] == {"stage": 2, "reduce_scatter": False}
    assert derived["train_micro_batch_size_per_gpu"] == 4


def test_further_keys_are_merged_into_the_sections_they_belong_to():
    further = {
        "wall_clock_breakdown": "true",
        "zero_optimization": {"overlap_comm": "true", "reduce_bucket_size": "5e7"},
    }
    engine = config.build(EngineConfig, {"micro_batch": "4", "zero_stage": "2", "deepspeed": further}, "x.yaml")
    derived = deepspeed_config(engine, 1.0)
    assert derived["wall_clock_breakdown"] is True and derived["gradient_clipping"] == 1.0
    ours = {"stage": 2, "reduce_scatter": False}
    assert derived["zero_optimization"] == ours | {"overlap_comm": True, "reduce_bucket_size": 5e7}
    assert deepspeed_config(engine, math.inf)["gradient_clipping"] == 0.0


def test_deepspeed_is_told_to_take_an_optimizer_that_it_does_not_list():
    engine = EngineConfig(micro_batch=4)
    listed = deepspeed_config(engine, 1.0)
    assert deepspeed_config(engine, 1.0, untested=True) == {**listed, "zero_allow_untested_optimizer": True}
    assert "zero_allow_untested_optimizer" not in listed


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
        ({"zero_optimization": None}, "zero_optimization = None is not a mapping"),
        ({"bf16": True}, "bf16 = True is not a mapping"),
        ({"zero_optimization": {"offload_optimizer": "cpu"}}, "offload_optimizer = 'cpu' is not a mapping"),
        ({"zero_optimisation": {"overlap_comm": True}}, "did you mean zero_optimization"),
    ],
)
def test_a_key_that_follows_from_another_of_ours_is_refused_by_its_full_name(further, message):
    with pytest.raises(ConfigError, match=message):
        config.build(EngineConfig, {"micro_batch": 4, "deepspeed": further}, "x.yaml")


BUCKETS = {"reduce_bucket_size": 5000, "allgather_bucket_size": 5000}
TO_CPU = {"device": "cpu"}
GATHERING = {"stage3_prefetch_bucket_size": 3000, "stage3_max_live_parameters": 5000, "stage3_max_reuse_distance": 1000}
PAIRS = {"zero_hpz_partition_size": 2}  # hpZ: each pair of ranks holds all weights once more


@pytest.mark.parametrize(
    ("world", "stage", "precision", "keys"),
    [
        (2, 1, "bf16", {"offload_optimizer": TO_CPU, **BUCKETS}),
        (2, 2, "fp32", {"offload_optimizer": TO_CPU, "overlap_comm": True, "contiguous_gradients": False, **BUCKETS}),
        (2, 3, "fp32", {"offload_optimizer": TO_CPU, "offload_param": TO_CPU, "stage3_param_persistence_threshold": 0}),
        (4, 3, "fp32", {**PAIRS, **GATHERING, "sub_group_size": 2000, "stage3_param_persistence_threshold": 10}),
    ],
)
def test_a_run_with_keys_of_zero_is_the_same_and_continues_bit_by_bit(
    world, stage, precision, keys, prepared, tmp_path
):
    """Groups of weights have learning rates of their own, and the vocabulary is padded."""
    engine = {"zero_stage": stage, "precision": precision, "micro_batch": 2}
    model = {"width_base": 16, "vocab_multiple": 60}
    plain = run_values(prepared, tmp_path / "plain", phases=TWELVE, model=model, engine=engine)
    values = run_values(
        prepared, tmp_path / "run", phases=TWELVE, model=model, checkpoint={"every_steps": 7, "keep": 9}
    )
    values["engine"] |= {**engine, "deepspeed": {"zero_optimization": keys}}
    on_ranks(world, cases.train_each, [values, plain] if precision == "fp32" else [values], log=tmp_path / "run.log")
    if precision == "fp32":
        assert differences(tmp_path / "plain", tmp_path / "run") == []
    history, state = cases.history(tmp_path / "run"), cases.state(tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step_00000012")
    on_ranks(world, cases.train, values, log=tmp_path / "again.log")
    assert "continuing after step 7" in (tmp_path / "again.0.log").read_text()
    assert cases.history(tmp_path / "run") == history
    again = cases.state(tmp_path / "run")
    assert all(torch.equal(tensor, again[name]) for name, tensor in state.items())


def test_hpz_makes_each_group_of_ranks_hold_all_weights_once_more(prepared, tmp_path):
    """A run would have the same losses if DeepSpeed ignored the key."""
    assert all(on_ranks(2, halves, prepared, log=tmp_path / "log"))


def halves(prepared) -> bool:
    """Whether a rank holds a half of every weight once more, after a forward pass at ZeRO 3."""
    world = find_world()
    join(world, 60)
    model, batches = model_and_batches(prepared, 2)
    config = EngineConfig(micro_batch=2, zero_stage=3, deepspeed={"zero_optimization": PAIRS})
    engine = DeepSpeedEngine(Learner(model), AdamW(AdamWConfig(lr=1)), config, 1.0, world)
    engine(batches.objectives[0], batches[0].batch)
    held = [(p.ds_secondary_tensor, p.ds_numel) for p in engine.module.parameters()]
    return all(part is not None and part.numel() == -(-numel // 2) for part, numel in held)


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


SIZES = [(ENCODER, {}), (DECODER, {}), (DECODER, {"layers": 7, "tie_embeddings": False, "positions": "learned"})]


@pytest.mark.parametrize(("shape", "changes"), SIZES)
def test_weights_are_counted_without_making_them(shape, changes):
    model_config = ModelConfig(**{**shape, **changes})
    assert parameters_of(model_config, 77) == sum(p.numel() for p in Transformer(model_config, 77).parameters())


@pytest.mark.parametrize(("precision", "a_weight"), [("fp32", 16), ("autocast", 16), ("bf16", 18)])
def test_a_model_takes_as_much_memory_as_is_said(precision, a_weight, prepared):
    model, batches = model_and_batches(prepared, 2)
    parameters = sum(p.numel() for p in model.parameters())
    engine_config = EngineConfig(micro_batch=2, precision=precision)
    said = state_bytes(parameters, 2, engine_config, World(), gpu=False)
    assert (said.device, said.host) == (a_weight * parameters, 12 * parameters)
    engine = LocalEngine(Learner(model), AdamW(AdamWConfig(lr=1)), engine_config, 1.0, World())
    engine.backward(engine(batches.objectives[0], batches[0].batch), {"loss": 1.0})
    tensors = [*engine.module.parameters(), *engine.masters.parameters()]
    tensors += [p.grad for p in engine.masters.parameters()]
    tensors += [value for state in engine.optimizer.state.values() for value in state.values() if value.ndim]
    assert sum(t.nbytes for t in {t.data_ptr(): t for t in tensors}.values()) == a_weight * parameters


@pytest.mark.parametrize(
    ("precision", "stage", "a_weight"),
    [("fp32", 0, 16), ("fp32", 1, 11), ("bf16", 1, 9), ("bf16", 2, 6), ("bf16", 3, 4.5), ("fp32", 3, 5)],
)
def test_zero_divides_what_each_of_four_ranks_keeps(precision, stage, a_weight):
    engine_config = EngineConfig(micro_batch=1, precision=precision, zero_stage=stage)
    said = state_bytes(100, 2, engine_config, World(0, 4), gpu=False)
    assert (said.device, said.host) == (100 * a_weight, 100 * 12 // 4)


@pytest.mark.parametrize("changes", [{"width": 4096000}, {"layers": 10**12}, {"mlp_width": 2**62}, {"width": 2**63}])
def test_a_model_larger_than_the_memory_is_refused_before_it_is_made(changes, prepared, tmp_path):
    values = run_values(prepared, tmp_path / "run", model=changes)
    with pytest.raises(ConfigError, match=r"larger than the memory(?s:.*)weights take at least|too large to exist"):
        cases.train(values)
    assert not (tmp_path / "run").exists()
