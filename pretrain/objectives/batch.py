"""A batch: what an objective shows to the model and asks of it, in a form that all objectives share."""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from pretrain.objectives.masking import flat, gaps, places

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Batch:
    """One micro-batch: B windows of T inputs with K target slots each. Slot k of window b asks for `targets[b, k]`.

    NumPy arrays, in int32, which takes half the bytes of int64 to make and to move; on a device, tensors. All methods
    work field by field, so an objective may add fields in a subclass.
    """

    inputs: Any  # (B, T)
    targets: Any  # (B, K)
    target_index: Any | None  # (B, K), ascending: where the targets stand; None: K = T, and slot k is position k
    weights: Any | None  # (B, K) float32, 0 for an empty slot; None: every slot is filled
    segments: Any | None  # (B, T): number of the document inside the window; None: each window holds one document
    position_ids: Any  # (B, T): the position inside the document

    def to(self, device: "torch.device") -> "Batch":
        """The same batch as tensors on `device`."""
        import torch

        return self._with(lambda x: torch.as_tensor(x).to(device, non_blocking=True))

    def filled(self) -> int:
        """Number of slots that count."""
        return self.targets.size if self.weights is None else int((self.weights > 0).sum())

    def rows(self, chosen: slice) -> "Batch":
        """Some of the windows."""
        return self._with(lambda x: x[chosen])

    def weighted(self, weights: np.ndarray) -> "Batch":
        """The same batch with other weights."""
        return type(self)(**{**vars(self), "weights": weights})

    def _with(self, change) -> "Batch":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return type(self)(**{name: None if x is None else change(x) for name, x in values.items()})


def joined(batches: list[Batch]) -> Batch:
    """The windows of several batches of one shape as one batch."""
    columns = {field.name: [getattr(batch, field.name) for batch in batches] for field in fields(batches[0])}
    found = {name: None if parts[0] is None else np.concatenate(parts) for name, parts in columns.items()}
    return type(batches[0])(**found)


def documents(starts: np.ndarray) -> tuple[np.ndarray | None, np.ndarray]:
    """(B, T) bool, True where a document or a part of one starts → its number in the window, and the position of each
    token inside it, both (B, T) int32.

    The first place of a window starts a document in any case. There are no numbers (None) where every window is one
    document. That is known here, on the host, so no device is asked for it.
    """
    B, T = starts.shape
    begins = starts.copy()
    begins[:, 0] = True
    at = flat(begins).astype(np.int32)  # few, so that what follows copies long runs
    if len(at) == B:
        return None, np.tile(places(T), (B, 1))
    first = at.searchsorted(places(B * T + 1)[::T])  # of each row, among all
    lengths = gaps(at, B * T)
    number = places(len(at)) - first[:-1].astype(np.int32).repeat(first[1:] - first[:-1])
    position_ids = places(B * T) - at.repeat(lengths)
    return number.repeat(lengths).reshape(B, T), position_ids.reshape(B, T)
