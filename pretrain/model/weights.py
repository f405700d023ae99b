"""The table of a model's weights: how each is drawn, and how an optimizer treats it.

A module that owns matrices has a method `weights`, which says the role of each by its name in the module. Norms and the
biases of projections are the same everywhere, so they are said here.

With `model.width_base` the table transfers settings from a narrow model to one that is m times as wide (muP, Yang et
al. 2022, arXiv:2203.03466, tables 3 and 8, for Adam):

    weight                          first values, times     learning rate, times
    embeddings, norms, biases       1                       1
    matrices                        1/√m                    1/m
    head, where it is untied        1/m                     1/m
    norm before a tied head         1/m                     1/m

In place of the last row muP divides the logits by m, which no dialect can say. A norm that is m times smaller divides
them just so, and its learning rate keeps the same share of it. Dialects divide attention scores by √E, muP by E: both
are the same for heads of one width, so the heads of the narrow model must be as wide.

With `model.depth_base` it transfers them from a shallow pre-norm model to one with n times as many blocks (CompleteP,
Dey et al. 2025, arXiv:2505.01618, table 1, with alpha = 1). There each branch is divided by n before it is added to the
residual stream. No dialect can say that, so the last projection of a branch, with its bias, is n times smaller, and so
is its learning rate. Muon's steps are alike at every width, but this factor applies to them too.
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
    muon_rate: float = 1.0  # the same where Muon updates it
    tokens: int | None = None  # how many of its rows belong to tokens: rows after them are 0; None: it has no such rows


SCALE = Weight(constant=1.0)  # of a norm
BIAS = Weight()


def embedding(config: ModelConfig, tokens: int | None = None) -> Weight:
    """A table with a row of numbers for each of `tokens` tokens, or for each position."""
    return Weight(config.init_std, decays=True, tokens=tokens)


def projection(config: ModelConfig, tokens: int | None = None) -> Weight:
    """The matrix from hidden states to the logits of `tokens` tokens, where it is not their embedding."""
    ratio = config.width_ratio
    return Weight(config.init_std / ratio, decays=True, rate=1 / ratio, tokens=tokens)


def token_bias(tokens: int) -> Weight:
    """The bias of the logits of `tokens` tokens."""
    return Weight(unigram=True, tokens=tokens)


def before_projection(config: ModelConfig) -> dict[str, Weight]:
    """The weights of the norm before the projection onto the vocabulary."""
    ratio = config.width_ratio if config.tie_embeddings else 1.0
    return {"weight": Weight(constant=1 / ratio, rate=1 / ratio), "bias": Weight(rate=1 / ratio)}


def matrix(config: ModelConfig, last: bool = False) -> Weight:
    """A matrix from hidden values to hidden values. `last`: its product is added to the residual stream.

    Pre-norm models draw the last matrix of a branch from N(0, (init_std / √(2·layers))²): Radford et al. 2019, 2.3.
    With `depth_base` its blocks take the place of `layers`.
    """
    ratio, depth = config.width_ratio, config.depth_ratio if last else 1.0
    std = config.init_std / ratio**0.5
    if last and config.norm_position == "pre":
        std /= (2 * config.layers / depth) ** 0.5
    return Weight(std / depth, decays=True, hidden=True, rate=1 / ratio / depth, muon_rate=1 / depth)


def last_bias(config: ModelConfig) -> Weight:
    """The bias of a projection whose product is added to the residual stream."""
    return Weight(rate=1 / config.depth_ratio)


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
