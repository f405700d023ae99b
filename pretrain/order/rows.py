"""Rows: the tokens of a batch of windows, in the one form that objectives know.

Windows of the stream (stream.py) and packed windows (packed.py) both give rows, so an objective never asks which of the
two made its rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np


@dataclass(frozen=True)
class Rows:
    """B windows of T places each; every array is (B, T).

    A window holds one or more parts: documents or pieces of documents. `begins` is True at the first place of each
    part. The first place of a window of the stream always begins a part, and the last place never does, even if a
    document begins there.
    """

    ids: np.ndarray  # int32: the tokens; padding where there is no text
    before: np.ndarray  # int32: the token before each token in the stream; before a document it is the end mark
    begins: np.ndarray  # bool: True where a part begins
    text: np.ndarray | None = None  # bool: False where a place is free; None: no place is free
    words: np.ndarray | None = None  # bool: True where a word begins and at free places; None: it was not asked for

    def part_starts(self) -> np.ndarray:
        """(B, T) bool: True where a part begins, and at the first of successive free places."""
        if self.text is None:
            return self.begins
        free = ~self.text
        starts = self.begins | free
        starts[:, 1:] &= ~(free[:, 1:] & free[:, :-1])
        return starts

    def part_ends(self) -> np.ndarray:
        """(B, T) bool: True at the last token of every part."""
        ends = np.ones_like(self.begins) if self.text is None else self.text.copy()
        ends[:, :-1] &= self.begins[:, 1:] if self.text is None else self.begins[:, 1:] | ~self.text[:, 1:]
        return ends


def of_stream(tokens: np.ndarray, end: int, words: np.ndarray | None = None) -> Rows:
    """Rows of windows of the stream. `tokens` (B, 1 + T) has each window and the token before it; `end` is the end
    mark."""
    before = tokens[:, :-1]
    begins = before == end
    begins[:, -1] = False
    begins[:, 0] = True
    return Rows(tokens[:, 1:], before, begins, words=words)


def joined(parts: Sequence[tuple[np.ndarray, Rows]]) -> Rows:
    """Join the rows of several corpora. Each of `parts` has the row numbers in the result, and their rows."""
    count = sum(len(numbers) for numbers, _ in parts)
    found = {}
    for field in fields(Rows):
        arrays = [getattr(rows, field.name) for _, rows in parts]
        if arrays[0] is None:
            continue
        found[field.name] = whole = np.empty((count, *arrays[0].shape[1:]), arrays[0].dtype)
        for (numbers, _), array in zip(parts, arrays, strict=True):
            whole[numbers] = array
    return Rows(**found)
