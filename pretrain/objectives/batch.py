"""A batch: the inputs and the targets of some windows, in a form that all objectives share."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pretrain.objectives.masking import flat, gaps, places

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Batch:
    """One micro-batch: B windows of T inputs with K target slots each. The target of slot k of window b is
    `targets[b, k]`.

    The fields are NumPy arrays in int32, because int64 takes twice the bytes to make and to move. `to` turns them into
    tensors. All methods work field by field, so an objective may add fields in a subclass.
    """

    inputs: Any  # (B, T)
    targets: Any  # (B, K)
    target_index: Any | None  # (B, K), ascending: the positions of the targets; None: K = T, and slot k is position k
    weights: Any | None  # (B, K) float32, 0 for an empty slot; None: every slot is filled
    segments: Any | None  # (B, T): the number of each token's document; None: each window holds one document
    position_ids: Any  # (B, T): the position of each token in its document
    # (n + 1,): where each of the n documents begins in the tokens of all windows laid end to end. `to` makes it, on the
    # host, which does not wait for a device to count them. None: each window holds one document.
    offsets: Any | None = field(default=None, kw_only=True)

    def to(self, device: "torch.device") -> "Batch":
        """The same batch as tensors on `device`. The host does not wait until a GPU has them."""
        import torch

        def moved(x: Any) -> torch.Tensor:
            tensor = torch.as_tensor(x)
            if device.type == "cuda" and not tensor.is_cuda:
                tensor = tensor.pin_memory()  # a copy from other memory would wait. Its block is freed after the copy.
            return tensor.to(device, non_blocking=True)

        found = self._with(moved)
        if isinstance(self.segments, np.ndarray):
            found = replace(found, offsets=moved(offsets(self.segments)))
        return found

    def filled(self) -> int:
        """The number of slots that count."""
        return self.targets.size if self.weights is None else int((self.weights > 0).sum())

    def arrays(self) -> list[Any]:
        """Its arrays or tensors."""
        return [value for field in fields(self) if (value := getattr(self, field.name)) is not None]

    def rows(self, chosen: slice) -> "Batch":
        """The batch of the `chosen` windows."""
        return replace(self, offsets=None)._with(lambda x: x[chosen])

    def weighted(self, weights: np.ndarray) -> "Batch":
        """The same batch with other weights."""
        return type(self)(**{**vars(self), "weights": weights})

    def _with(self, change: Callable[[Any], Any]) -> "Batch":
        """The same batch with `change` applied to each of its arrays."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return type(self)(**{name: None if x is None else change(x) for name, x in values.items()})


def offsets(segments: np.ndarray) -> np.ndarray:
    """(n + 1,) int32: where each of n documents begins in the tokens of all windows (B, T) laid end to end."""
    begins = np.ones(segments.shape, bool)
    np.not_equal(segments[:, 1:], segments[:, :-1], out=begins[:, 1:])
    return np.append(flat(begins), segments.size).astype(np.int32)


def joined(batches: list[Batch]) -> Batch:
    """One batch of the windows of several batches, which have one shape."""
    columns = {field.name: [getattr(batch, field.name) for batch in batches] for field in fields(batches[0])}
    found = {name: None if parts[0] is None else np.concatenate(parts) for name, parts in columns.items()}
    return type(batches[0])(**found)


def documents(starts: np.ndarray) -> tuple[np.ndarray | None, np.ndarray]:
    """`segments` and `position_ids` of a batch, both (B, T) int32.

    `starts` (B, T) is True where a document, or a part of one, starts; the first place of a window always starts one.
    The segments are None if every window is one document. This is decided here, on the host, so nothing waits for a
    device.
    """
    B, T = starts.shape
    begins = starts.copy()
    begins[:, 0] = True
    at = flat(begins).astype(np.int32)  # few positions, so the steps below copy long runs
    if len(at) == B:
        return None, np.tile(places(T), (B, 1))
    first = at.searchsorted(places(B * T + 1)[::T])  # the number of the first document of each row, among all
    lengths = gaps(at, B * T)
    number = places(len(at)) - first[:-1].astype(np.int32).repeat(first[1:] - first[:-1])
    position_ids = places(B * T) - at.repeat(lengths)
    return number.repeat(lengths).reshape(B, T), position_ids.reshape(B, T)
