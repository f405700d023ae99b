"""The table of weights: every weight has one role, wherever its module stands."""

import pytest
import torch
from torch import nn

from pretrain.config import load
from pretrain.model.config import ModelConfig
from pretrain.model.init import initialise
from pretrain.model.transformer import Transformer
from pretrain.model.weights import Weight, weights_of
from pretrain.training.config import RunConfig
from pretrain.training.optim.adamw import AdamW, AdamWConfig
from tests.conftest import DECODER, ENCODER, ROOT

PRESETS = sorted(path.stem for path in (ROOT / "configs/presets").glob("*.yaml"))
V = 50


@pytest.mark.parametrize("name", PRESETS)
def test_every_weight_of_a_preset_has_one_role(name):
    """Without width_base the learning rate of each weight is the run's, and the groups are matrices and vectors."""
    with torch.device("meta"):
        model = Transformer(load(RunConfig, ROOT / f"configs/presets/{name}.yaml").model, V)
    roles, weights = weights_of(model), dict(model.named_parameters())
    assert list(roles) == list(weights) and len({id(p) for p in weights.values()}) == len(weights)
    assert ("head.decoder.weight" in roles) != model.config.tie_embeddings
    for key, role in roles.items():
        assert role.decays == (weights[key].ndim == 2) == bool(role.std) and role.rate == 1, key
        assert role.hidden == (role.decays and (key.startswith("blocks.") or key == "head.dense.weight")), key
    groups = AdamW(AdamWConfig(lr=1, weight_decay=0.3)).build(model).param_groups
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decays == {id(p): 0.3 * (p.ndim == 2) for p in weights.values()} and len(groups) <= 2


def test_the_table_of_a_decoder_with_three_layers():
    pre = weights_of(Transformer(ModelConfig(**{**DECODER, "layers": 3, "tie_embeddings": False}), V))
    matrix, last = Weight(0.02, decays=True, hidden=True), Weight(0.02 / 6**0.5, decays=True, hidden=True)
    block = {"attention.q", "attention.k", "attention.v", "attention.out", "mlp.up", "mlp.gate", "mlp.down"}
    norms = {"attention.q_norm", "attention.k_norm", "attention_norm", "mlp_norm"}
    expected = {"embed.weight": Weight(0.02, decays=True), "head.decoder.weight": Weight(0.02, decays=True)}
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
    assert post["head.decoder.bias"] == Weight(unigram=True)


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
