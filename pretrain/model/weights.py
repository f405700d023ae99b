"""The table of a model's weights: how each is drawn, and how an optimizer treats it.

A module that owns matrices has a method `weights`, which says the role of each by its name in the module. Norms and the
biases of projections are the same everywhere, so they are said here.
"""

from dataclasses import dataclass

from torch import nn

from pretrain.model.config import ModelConfig


@dataclass(frozen=True)
class Weight:
    """The role of one weight in the model."""

    std: float = 0.0  # its first values are drawn from N(0, std²); 0: all of them are `constant`
    constant: float = 0.0
    unigram: bool = False  # whether its first values are log p(token), where tokens were counted
    decays: bool = False  # whether weight decay makes it smaller
    hidden: bool = False  # whether it is a matrix from hidden values to hidden values: Muon's
    rate: float = 1.0  # its learning rate, as a multiple of the run's


SCALE = Weight(constant=1.0)  # of a norm
BIAS = Weight()
TOKEN_BIAS = Weight(unigram=True)


def embedding(config: ModelConfig) -> Weight:
    """A table with a row of `width` numbers for each token or position."""
    return Weight(config.init_std, decays=True)


def projection(config: ModelConfig) -> Weight:
    """The matrix from hidden states to logits, where it is not the token embedding."""
    return Weight(config.init_std, decays=True)


def matrix(config: ModelConfig, last: bool = False) -> Weight:
    """A matrix from hidden values to hidden values. `last`: its product is added to the residual stream.

    Pre-norm models draw the last matrix of a branch from N(0, (init_std / √(2·layers))²): Radford et al. 2019, 2.3.
    """
    deep = last and config.norm_position == "pre"
    return Weight(config.init_std / (2 * config.layers) ** 0.5 if deep else config.init_std, decays=True, hidden=True)


def weights_of(module: nn.Module) -> dict[str, Weight]:
    """The role of each weight by its name in `module`, in the order of `named_parameters`: tied weights are there once.

    A tied weight has the role that is said for its first name.
    """
    roles: dict[str, Weight] = {}
    for path, part in module.named_modules():  # a module comes before its parts, so what it says of them counts
        for name, role in _said(part).items():
            roles.setdefault(f"{path}.{name}" if path else name, role)
    names = [name for name, _ in module.named_parameters()]
    missing = [name for name in names if name not in roles]
    assert not missing, f"no module says what these weights are: {', '.join(missing)}"
    return {name: roles[name] for name in names}


def _said(part: nn.Module) -> dict[str, Weight]:
    """The roles that a module says, by the names of its weights."""
    if isinstance(part, nn.LayerNorm | nn.RMSNorm):
        return {"weight": SCALE, "bias": BIAS}
    if isinstance(part, nn.Linear):
        return {"bias": BIAS}
    return part.weights() if hasattr(part, "weights") else {}  # type: ignore[operator]
