"""Functions that several dialects share: compare a model with the required values, and rename its tensors."""

from typing import TYPE_CHECKING

from pretrain.model.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor


def differences(model: ModelConfig, dialect: str, wanted: dict[str, object]) -> list[str]:
    """A line such as `model.norm = rmsnorm: bert has layernorm` for each key with another value than the wanted one."""
    found = {key: getattr(model, key) for key in wanted}
    return [
        f"model.{key} = {_as_yaml(found[key])}: {dialect} has {_as_yaml(wanted[key])}"
        for key in wanted
        if found[key] != wanted[key]
    ]


def rename(
    ours: "dict[str, Tensor]", layers: int, outside: dict[str, str], layer: str, inside: dict[str, str]
) -> "dict[str, Tensor]":
    """`ours` under the names of the dialect.

    `outside` maps our module names to the dialect's outside of the blocks, and `inside` maps them inside of a block.
    The dialect calls block i `layer`.i.
    """
    names = dict(outside)
    for i in range(layers):
        names |= {f"blocks.{i}.{our}": f"{layer}.{i}.{their}" for our, their in inside.items()}
    theirs = {}
    for name, tensor in ours.items():
        module, _, kind = name.rpartition(".")  # kind: weight or bias
        theirs[f"{names[module]}.{kind}"] = tensor
    return theirs


def _as_yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
