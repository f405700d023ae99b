"""Rows: the tokens of a batch of windows, in the one form that objectives know.

Windows of the stream (stream.py) and packed windows (packed.py) both give rows, so an objective never asks which of the
two it was given.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np


@dataclass(frozen=True)
class Rows:
    """B windows of T places each; every array is (B, T).

    Where a window holds several documents, or parts of documents, `begins` is True at the first place of each part. The
    first place of a window of the stream always begins a part; a document that begins at the last place of such a
    window has no token of text there, and no part of its own.
    """

    ids: np.ndarray  # int32: the tokens; padding where there is no text
    before: np.ndarray  # int32: the token that precedes each one in the stream: the end mark before a document's first
    begins: np.ndarray  # bool: where a part of a document begins
    text: np.ndarray | None = None  # bool: False where a place is free; None: no place is
    words: np.ndarray | None = None  # bool: where a word begins, if that was asked for; free places begin words too

    def part_starts(self) -> np.ndarray:
        """(B, T) bool: where a part of a document begins, or a stretch of free places."""
        if self.text is None:
            return self.begins
        free = ~self.text
        starts = self.begins | free
        starts[:, 1:] &= ~(free[:, 1:] & free[:, :-1])
        return starts

    def part_ends(self) -> np.ndarray:
        """(B, T) bool: the last token of every part of a document."""
        ends = np.ones_like(self.begins) if self.text is None else self.text.copy()
        ends[:, :-1] &= self.begins[:, 1:] if self.text is None else self.begins[:, 1:] | ~self.text[:, 1:]
        return ends


def of_stream(tokens: np.ndarray, end: int, words: np.ndarray | None = None) -> Rows:
    """Rows of windows of the stream. `tokens` (B, 1 + T) begin with the one before each window; `end`: the end mark."""
    before = tokens[:, :-1]
    begins = before == end
    begins[:, -1] = False
    begins[:, 0] = True
    return Rows(tokens[:, 1:], before, begins, words=words)


def joined(parts: Sequence[tuple[np.ndarray, Rows]]) -> Rows:
    """Rows of several corpora as one: each of `parts` says which rows of the result (its numbers) it gives."""
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
