"""The names and the layout of a model's tensors in transformers, and the way there and back."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Modules = str | tuple[str, ...]  # one of our modules, or several whose rows one module of transformers has joined


@dataclass(frozen=True)
class Names:
    """Our modules → the modules of transformers that hold the same tensors."""

    outside: dict[str, str]  # outside of the blocks
    layer: str  # transformers calls block i `layer`.i
    inside: dict[Modules, str]  # inside of a block
    transposed: bool = False  # whether the matrices inside of a block are stored as (inputs, outputs)

    def theirs(self, ours: "dict[str, Tensor]", layers: int) -> "dict[str, Tensor]":
        """Our tensors under the names of transformers."""
        import torch

        left = dict(ours)
        found: dict[str, Tensor] = {}
        for modules, their, transposed in self._pairs(layers):
            for kind in ("weight", "bias"):
                parts = [left.pop(f"{module}.{kind}") for module in modules if f"{module}.{kind}" in left]
                if parts:
                    tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
                    flips = transposed and tensor.ndim == 2
                    found[f"{their}.{kind}"] = tensor.t().contiguous() if flips else tensor
        assert not left, f"tensors without a name in transformers: {', '.join(left)}"
        return found

    def ours(self, theirs: "dict[str, Tensor]", layers: int, rows: dict[str, int]) -> "dict[str, Tensor]":
        """The inverse of `theirs`. `rows`: the first dimension of each of our tensors, by name."""
        found: dict[str, Tensor] = {}
        for modules, their, transposed in self._pairs(layers):
            for kind in ("weight", "bias"):
                if f"{their}.{kind}" in theirs:
                    tensor = theirs[f"{their}.{kind}"]
                    tensor = tensor.t() if transposed and tensor.ndim == 2 else tensor
                    names = [f"{module}.{kind}" for module in modules]
                    parts = [tensor] if len(names) == 1 else tensor.split([rows[name] for name in names])
                    found |= {name: part.contiguous() for name, part in zip(names, parts, strict=True)}
        return found

    def _pairs(self, layers: int) -> Iterator[tuple[tuple[str, ...], str, bool]]:
        for ours, their in self.outside.items():
            yield (ours,), their, False
        for i in range(layers):
            for modules, their in self.inside.items():
                several = (modules,) if isinstance(modules, str) else modules
                yield tuple(f"blocks.{i}.{module}" for module in several), f"{self.layer}.{i}.{their}", self.transposed
