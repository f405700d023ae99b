"""Blocks that are compiled or recomputed compute what plain blocks compute, and nothing is compiled twice."""

import os
import warnings

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from pretrain import config
from pretrain.errors import ConfigError
from pretrain.model.attention import Crossing, Layout
from pretrain.model.config import ModelConfig
from pretrain.model.init import initialise
from pretrain.model.models import model_of
from pretrain.model.transformer import Transformer
from pretrain.training.config import RunConfig
from pretrain.training.engine.blocks import DISABLING, set_up_blocks
from pretrain.training.engine.config import EngineConfig
from tests.conftest import DECODER, ENCODER, run_values
from tests.helpers import cases
from tests.helpers.ranks import on_ranks

# torch hides these warnings while it compiles, but not from a filter that makes errors of them.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
V, B = 50, 2
LOCAL = {**ENCODER, "norm_position": "pre", "positions": "rope", "mlp": "geglu", "bias": False, "transform_head": False}
LOCAL |= {"embed_norm": True, "first_norm": False, "window": 16, "global_every": 2, "max_positions": 512}
GENERATOR = {"layers": 2, "width": 16, "heads": 2, "mlp_width": 16}
T5 = {**DECODER, "causal": False, "decoder_layers": 2, "positions": "relative", "qk_norm": False, "kv_heads": None}
# By name: the shape of a model, the length of its windows, and its graphs: one for each kind of block, in training and
# in scoring. From 256 tokens on a CPU attends to one document after another, and from 512 on local layers to one block
# after another. Graphs end there: those of a block are its norm, its heads, the output of its attention, and the rest.
FAMILIES = {
    "decoder": (DECODER, 32, 2),
    "encoder": ({**ENCODER, "dropout": 0.1}, 32, 2),
    "local": (LOCAL, 512, 10),
    "electra": ({**ENCODER, "transform_head": False, "generator": GENERATOR}, 32, 4),
    "t5": ({**T5, "dropout": 0.1}, 32, 4),
}


@pytest.fixture
def compiler(monkeypatch):
    """torch.compile, which the environment of the tests turns off."""
    monkeypatch.delenv("TORCHDYNAMO_DISABLE")
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    """The number of graphs that torch has compiled."""
    return counters["stats"]["unique_graphs"]


def made(family: str, **engine) -> Transformer:
    model = model_of(ModelConfig(**FAMILIES[family][0]), V)
    initialise(model, 1)
    set_up_blocks(model, EngineConfig(micro_batch=B, **engine))
    return model


def windows(T: int, seed: int) -> tuple[Tensor, Layout]:
    """Windows of two documents, which meet at another place for each seed."""
    draw = torch.Generator().manual_seed(seed)
    ids, cut = torch.randint(V, (B, T), generator=draw), torch.randint(1, T, (B, 1), generator=draw)
    after = torch.arange(T) >= cut
    return ids, Layout(after.int(), torch.arange(T) - cut * after, True)


def hidden(model: Transformer, family: str, seed: int) -> Tensor:
    """A number that depends on the hidden states of every block."""
    ids, layout = windows(FAMILIES[family][1], seed)
    layout = Layout(layout.segments, layout.position_ids, model.config.causal)
    torch.manual_seed(seed)
    states = model(ids, layout)
    if family == "electra":
        return states.square().mean() + model.generator(ids, layout).square().mean()
    if family == "t5":
        written = Layout(layout.segments, layout.position_ids, True)
        return model.decode(ids, written, states, Crossing(layout.segments, layout.segments)).square().mean()
    return states.square().mean()


def gradients(model: Transformer, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_blocks_compute_what_plain_blocks_compute_and_are_compiled_once(family, compiler):
    plain, compiled = made(family), made(family, compile="aot_eager", recompute_every=2)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    after = []
    for seed in range(3):
        losses = [hidden(model, family, seed) for model in (plain, compiled)]
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)
        each = [gradients(model, loss) for model, loss in zip((plain, compiled), losses, strict=True)]
        torch.testing.assert_close(each[1], each[0], rtol=1e-4, atol=1e-6)
        compiled.eval()
        with torch.no_grad():
            assert hidden(compiled, family, seed).isfinite()
        compiled.train()
        after.append(graphs())
    assert after == [FAMILIES[family][2]] * 3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("every", [1, 2])
def test_recomputed_blocks_change_no_bit_and_keep_less(every, family):
    plain, recomputed = made(family), made(family, recompute_every=every)
    kept = []
    found = []
    for model in (plain, recomputed):
        held = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda x, h=held: keep(h, x), lambda x: x):
            loss = hidden(model, family, 3)
        found.append((loss, gradients(model, loss)))
        kept.append(sum(held.values()))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1].keys() == found[1][1].keys()
    assert all(torch.equal(gradient, found[1][1][name]) for name, gradient in found[0][1].items())
    assert kept[1] < (0.5 if every == 1 else 0.75) * kept[0]


def keep(held: dict[int, int], x: Tensor) -> Tensor:
    held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    return x


PHASES = [{"steps": 4, "seq_len": 16, "batch_tokens": 128}, {"steps": 4, "seq_len": 32, "batch_tokens": 128}]


def test_a_run_continues_compiled_or_not_and_compiles_each_shape_once(compiler, prepared, tmp_path):
    def run(name: str, phases: list[dict], **engine) -> int:
        """Train a run, or go on with it, and return the number of graphs that it needed."""
        before = graphs()
        changes = {"model": {"layers": 1, "dropout": 0.1}, "evaluate": {"every_steps": 2, "max_tokens": 256}}
        changes |= {"phases": phases, "data": {"block_tokens": 32}, "engine": engine}
        cases.train(run_values(prepared, tmp_path / name, **changes))
        return graphs() - before

    aot = {"compile": "aot_eager"}
    run("plain", PHASES)
    assert run("run", PHASES, **aot) > 0
    # All that follow have the graphs of that run. With fewer windows at once they would need others.
    assert run("again", PHASES[:1], **aot, micro_batch=4) == run("again", PHASES, **aot, recompute_every=1) == 0
    assert run("mixed", PHASES[:1], **aot, micro_batch=4) == run("mixed", PHASES, recompute_every=2) == 0
    plain, state = cases.history(tmp_path / "plain"), cases.state(tmp_path / "plain")
    assert len(plain) == 8
    for name in ("run", "again", "mixed"):
        found = cases.history(tmp_path / name)
        assert [line[3] for line in found] == [line[3] for line in plain]
        assert [line[1] for line in found] == pytest.approx([line[1] for line in plain], rel=1e-6)
        assert list(cases.state(tmp_path / name)) == list(state)


@pytest.mark.parametrize("stages", [(0, 1, 2), (3,)])
def test_compiled_and_recomputed_blocks_train_alike_at_every_zero_stage(stages, prepared, tmp_path):
    both, phases = {"compile": "aot_eager", "recompute_every": 1}, [{"steps": 2, "seq_len": 32, "batch_tokens": 128}]
    engines = {"plain": {"zero_stage": 1}, **{str(stage): {"zero_stage": stage, **both} for stage in stages}}
    runs = [
        run_values(prepared, tmp_path / name, phases=phases, model={"layers": 1}, engine=engine)
        for name, engine in engines.items()
    ]
    on_ranks(2, train_compiled, runs, log=tmp_path / "log")
    plain = cases.history(tmp_path / "plain")
    for stage in stages:
        found = cases.history(tmp_path / str(stage))
        assert [line[1] for line in found] == pytest.approx([line[1] for line in plain], rel=1e-6), stage
        assert [line[2] for line in found] == pytest.approx([line[2] for line in plain], rel=1e-5), stage
    said = (tmp_path / "log.0.log").read_text()
    assert all(f"DeepSpeed ZeRO {stage}, compiled by aot_eager, 2 x cpu" in said for stage in stages)
    assert said.count("graphs of compiled blocks are fragmented") == (3 in stages) and "UserWarning" not in said
    assert "compiled" not in (tmp_path / "log.1.log").read_text()


def train_compiled(runs: list[dict]) -> None:
    del os.environ["TORCHDYNAMO_DISABLE"]
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    cases.train_each(runs)


def test_the_usual_backend_computes_what_plain_blocks_compute(compiler, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    plain, compiled = made("encoder"), made("encoder", compile="inductor", recompute_every=1)
    for model in (plain, compiled):
        for block in model.blocks:
            block.dropout.p = block.attention.p_drop = 0.0  # the backend draws other numbers
    losses = [hidden(model, "encoder", 1) for model in (plain, compiled)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    each = [gradients(model, loss) for model, loss in zip((plain, compiled), losses, strict=True)]
    torch.testing.assert_close(each[1], each[0], rtol=1e-3, atol=1e-5)


def test_a_machine_that_cannot_compile_is_refused_before_the_first_step(compiler, monkeypatch, prepared, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    values = run_values(prepared, tmp_path / "run", engine={"compile": "inductor"})
    with torch._inductor.config.patch({"cpp.cxx": (None, "/nowhere/g++")}), pytest.raises(ConfigError) as error:
        cases.train(values)  # as with the environment variable CXX=/nowhere/g++
    assert "cannot compile on this machine\n  InductorError: InvalidCxxCompiler" in str(error.value)
    assert "install a C++ compiler" in str(error.value) and not (tmp_path / "run").exists()
    for name in DISABLING:
        monkeypatch.setenv(name, "1")
        with pytest.raises(ConfigError, match=f"would compile nothing\n.*{name} is 1"):
            cases.train(values)
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"compile": "true"}, "engine.compile"),
        ({"recompute_every": -1}, "engine.recompute_every"),
        ({"deepspeed": {"activation_checkpointing": {"cpu_checkpointing": True}}}, "engine.recompute_every does it"),
        ({"deepspeed": {"compile": {"deepcompile": True}}}, "engine.compile compiles the blocks"),
    ],
)
def test_keys_without_effect_are_refused(keys, message, prepared, tmp_path):
    with pytest.raises(ConfigError, match=message):
        config.build(RunConfig, run_values(prepared, tmp_path / "run", engine=keys), "test")
