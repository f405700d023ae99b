"""The table of weights: every weight has one role, wherever its module stands."""

import pytest
import torch
from torch import nn

from pretrain.config import load
from pretrain.model.attention import Layout
from pretrain.model.config import ModelConfig
from pretrain.model.init import initialise
from pretrain.model.models import model_of
from pretrain.model.transformer import Transformer
from pretrain.model.weights import Weight, weights_of
from pretrain.training.config import RunConfig
from pretrain.training.engine.weights import set_lr
from pretrain.training.optim import OPTIMIZERS
from pretrain.training.optim.adamw import AdamW, AdamWConfig
from pretrain.training.optim.muon import MuonConfig
from tests.conftest import DECODER, ENCODER, ROOT

PRESETS = sorted(path.stem for path in (ROOT / "configs/presets").glob("*.yaml"))
V = 50


@pytest.mark.parametrize("name", PRESETS)
def test_every_weight_of_a_preset_has_one_role(name):
    """Without width_base the learning rate of each weight is the run's, and the groups are matrices and vectors."""
    config = load(RunConfig, ROOT / f"configs/presets/{name}.yaml").model
    with torch.device("meta"):
        model = model_of(config.model_copy(update={"width_base": None, "depth_base": None}), V)
    roles, weights = weights_of(model), dict(model.named_parameters())
    assert list(roles) == list(weights) and len({id(p) for p in weights.values()}) == len(weights)
    for key, role in roles.items():
        assert role.decays == (weights[key].ndim == 2) == bool(role.std) and role.rate == 1, key
        between = ".blocks." in f".{key}" or key.endswith(("dense.weight", "embed_project.weight"))
        assert role.hidden == (role.decays and between), key
    groups = AdamW(AdamWConfig(lr=1, weight_decay=0.3)).build(model).param_groups
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decays == {id(p): 0.3 * (p.ndim == 2) for p in weights.values()} and len(groups) <= 2


def test_the_table_of_a_decoder_with_three_layers():
    pre = weights_of(Transformer(ModelConfig(**{**DECODER, "layers": 3, "tie_embeddings": False}), V))
    matrix, last = Weight(0.02, decays=True, hidden=True), Weight(0.02 / 6**0.5, decays=True, hidden=True)
    block = {"attention.q", "attention.k", "attention.v", "attention.out", "mlp.up", "mlp.gate", "mlp.down"}
    norms = {"attention.q_norm", "attention.k_norm", "attention_norm", "mlp_norm"}
    table = Weight(0.02, decays=True, tokens=V)
    expected = {"embed.weight": table, "head.decoder.weight": table}
    expected |= {"final_norm.weight": Weight(constant=1)}
    for layer in range(3):
        expected |= {f"blocks.{layer}.{name}.weight": Weight(constant=1) for name in norms}
        for name in block:
            ends = name in ("attention.out", "mlp.down")
            expected[f"blocks.{layer}.{name}.weight"] = last if ends else matrix
    assert pre == expected
    post = weights_of(Transformer(ModelConfig(**ENCODER), V))
    assert post["blocks.1.mlp.down.weight"] == post["head.dense.weight"] == matrix
    assert post["embed_position.weight"] == Weight(0.02, decays=True) and post["embed_norm.bias"] == Weight()
    assert post["head.decoder.bias"] == Weight(unigram=True, tokens=V)


class Two(nn.Module):
    """Two models of different depth that share the embedding of tokens, and a table of their own."""

    def __init__(self):
        super().__init__()
        self.small, self.large = (Transformer(ModelConfig(**{**DECODER, "layers": layers}), V) for layers in (1, 4))
        self.large.embed.weight = self.small.embed.weight
        self.large.head.decoder.weight = self.small.embed.weight
        self.shift = nn.Parameter(torch.empty(8))

    def weights(self) -> dict[str, Weight]:
        return {"shift": Weight(constant=2.0)}


def test_two_models_in_one_module_have_the_roles_that_they_have_alone():
    both = Two()
    initialise(both, 1)
    roles = weights_of(both)
    assert list(roles) == [name for name, _ in both.named_parameters()] and "large.embed.weight" not in roles
    for prefix, model in (("small.", both.small), ("large.", both.large)):
        alone = {f"{prefix}{name}": role for name, role in weights_of(model).items()}
        assert alone.keys() - roles.keys() <= {"large.embed.weight"}
        assert all(roles[name] == role for name, role in alone.items() if name in roles)
    assert roles["small.blocks.0.mlp.down.weight"].std == 0.02 / 2**0.5
    assert roles["large.blocks.0.mlp.down.weight"].std == 0.02 / 8**0.5
    assert torch.equal(both.shift, torch.full((8,), 2.0))


def test_a_weight_that_no_module_speaks_of_is_named():
    class Silent(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = Transformer(ModelConfig(**DECODER), V)
            self.table = nn.Embedding(3, 4)

    with pytest.raises(AssertionError, match=r"no module says what these weights are: table\.weight"):
        weights_of(Silent())


@pytest.mark.parametrize("shape", [ENCODER, {**DECODER, "tie_embeddings": False, "logit_cap": 3.0}])
def test_a_padded_vocabulary_learns_the_same_and_its_padding_stays_zero(shape):
    """The first values, losses, scores and steps are those of the model without padding, whatever multiple it has."""
    torch.manual_seed(1)
    ids, found = torch.randint(V, (4, 33)), []
    for multiple in (1, 32):
        model = Transformer(ModelConfig(**{**shape, "vocab_multiple": multiple}), V)
        initialise(model, 1, torch.arange(V))
        layout = Layout(None, torch.arange(32).expand(4, -1), model.config.causal)
        optimizer = AdamW(AdamWConfig(lr=1e-3)).build(model)
        losses = []
        for _ in range(3):
            loss = model.loss(model(ids[:, :-1], layout), ids[:, 1:], None, z_loss=0.1) / 128
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        rows = model(ids[:, :-1], layout)
        nll, likeliest = model.score(rows, ids[:, 1:])
        drawn = model.drawn(rows, ids[:, 1:], None, torch.full((4, 32), 1 - 2**-24))[1]
        assert model.logits(rows).shape[-1] == V and int(likeliest.max()) < V and int(drawn.max()) < V
        weights = dict(model.named_parameters())
        for name, role in weights_of(model).items():
            if role.tokens:
                assert len(weights[name]) == (V if multiple == 1 else 64) and not weights[name][V:].any()
        cut = {name: p.detach()[: weights_of(model)[name].tokens] for name, p in weights.items()}
        found.append((torch.tensor(losses), nll, model.logits(rows).detach(), cut))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


SHAPES = {
    "tied decoder": {**DECODER, "head_width": 16},
    "untied decoder": {**DECODER, "head_width": 16, "tie_embeddings": False, "qk_norm": False},
    "encoder": ENCODER,
}


def change(shape: dict, width: int, base: int | None, muon: bool = False) -> dict[str, float]:
    """How far four steps of Adam or Muon move the activations of a model: root mean squares, by their names."""
    sizes = {"width": width, "heads": width // 16, "kv_heads": width // 16, "mlp_width": 2 * width, "width_base": base}
    model = Transformer(ModelConfig(**{**shape, **sizes}), V)
    initialise(model, 1)
    config = MuonConfig(kind="muon", lr=1, adam_lr=0.1) if muon else AdamWConfig(lr=1)
    kind = OPTIMIZERS[config.kind](config)
    optimizer = kind.build(model)
    for weight in model.parameters():
        optimizer.state[weight].update(kind.first_state(weight))
    ids = torch.randint(V, (8, 33), generator=torch.Generator().manual_seed(1))
    inputs, targets = ids[:, :-1], ids[:, 1:]
    layout = Layout(None, torch.arange(32).expand(8, -1), model.config.causal)

    def activations() -> dict[str, torch.Tensor]:
        found = {}
        parts = {"q": model.blocks[1].attention.q, "attention": model.blocks[1].attention, "block": model.blocks[-1]}
        hooks = [
            part.register_forward_hook(lambda _, __, x, name=name: found.update({name: x}))
            for name, part in parts.items()
        ]
        found["logits"] = model.logits(model(inputs, layout))
        for hook in hooks:
            hook.remove()
        return found

    before = activations()
    for _ in range(4):
        (model.loss(model(inputs, layout), targets, None) / targets.numel()).backward()
        set_lr(optimizer, 0.02 if muon else 3e-3)
        optimizer.step()
        optimizer.zero_grad()
    return {name: float((x - before[name]).detach().square().mean().sqrt()) for name, x in activations().items()}


@pytest.mark.parametrize("name", SHAPES)
def test_width_base_keeps_the_change_of_activations_the_same_at_every_width(name):
    """The coordinate check of Yang et al. 2022, section D.1. Without width_base changes grow with the width."""
    shape = SHAPES[name]
    narrow, middle, wide = (change(shape, width, 64) for width in (64, 128, 256))
    for part, first in narrow.items():
        assert max(first, middle[part], wide[part]) < 1.5 * min(first, middle[part], wide[part]), part
    without = change(shape, 256, None)
    assert change(shape, 64, None) == narrow
    for part in ("q", "attention", "logits"):
        assert without[part] > 2 * narrow[part], part


@pytest.mark.parametrize("muon", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_depth_base_keeps_the_change_of_the_hidden_states_the_same_at_every_depth(muon, bias):
    """Without depth_base the changes of more blocks add up."""
    shape = {**DECODER, "head_width": 16, "bias": bias, "norm": "layernorm"}
    shallow, middle, deep = (change({**shape, "layers": n, "depth_base": 2}, 64, None, muon) for n in (2, 6, 16))
    without = change({**shape, "layers": 16}, 64, None, muon)
    assert change({**shape, "layers": 2}, 64, None, muon) == shallow
    assert max(middle["block"], deep["block"]) < 1.25 * shallow["block"]
    assert without["block"] > 2 * deep["block"]


def test_the_last_projections_of_a_deep_model_are_small_and_slow():
    sizes = {"layers": 6, "depth_base": 2, "width_base": 8}
    config = ModelConfig(**{**DECODER, **sizes, "bias": True, "norm": "layernorm"})
    roles = weights_of(Transformer(config, V))
    last = Weight(0.02 / 2 / 2 / 3, decays=True, hidden=True, rate=1 / 12, muon_rate=1 / 3)
    assert roles["blocks.5.mlp.down.weight"] == roles["blocks.0.attention.out.weight"] == last
    assert roles["blocks.5.mlp.down.bias"] == Weight(rate=1 / 3) and roles["blocks.5.mlp.up.bias"] == Weight()
    assert roles["blocks.5.mlp.up.weight"] == Weight(0.01, decays=True, hidden=True, rate=1 / 4)


def test_groups_have_their_own_factor_of_the_learning_rate_and_keep_their_decay():
    wide = ModelConfig(**{**DECODER, "width_base": 8, "tie_embeddings": False})
    model = Transformer(wide, V)
    optimizer = AdamW(AdamWConfig(lr=1, weight_decay=0.1)).build(model)
    set_lr(optimizer, 0.02)
    found = {(group["lr"], group["weight_decay"]): len(group["params"]) for group in optimizer.param_groups}
    assert found == {(0.02, 0.1): 1, (0.005, 0.4): 15, (0.02, 0.0): 9}  # embedding; matrices and head; norms
    roles = weights_of(Transformer(ModelConfig(**{**DECODER, "width_base": 8}), V))
    assert roles["final_norm.weight"] == Weight(constant=0.25, rate=0.25)
    roles = weights_of(Transformer(ModelConfig(**{**ENCODER, "width_base": 8}), V))
    assert roles["head.norm.weight"] == Weight(constant=0.25, rate=0.25) and roles["head.norm.bias"].rate == 0.25
    assert roles["head.dense.weight"].std == 0.01 and roles["blocks.1.mlp_norm.weight"] == Weight(constant=1)
