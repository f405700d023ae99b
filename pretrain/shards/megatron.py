"""Megatron's indexed dataset: a `.bin` file of ids, and an `.idx` file with the position of each document.

The layout of `.idx` (little endian), after Megatron-LM's `indexed_dataset.py`, version 1: magic `MMIDIDX\\0\\0`, uint64
version, uint8 dtype code, uint64 sequences, uint64 documents + 1, int32 lengths, int64 byte offsets, int64 document
index. Ids are uint16 if the vocabulary has fewer than 65,500 entries, else int32, as in Megatron's tool; the format has
no uint32.
"""

import struct
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from pretrain.errors import ShardError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
CODES: dict[np.dtype, int] = {np.dtype(np.uint16): 8, np.dtype(np.int32): 4}
INT32_VOCABULARY = 65_500
STRETCH = 1 << 20  # entries of the document index written at a time


def dtype_of(vocab_size: int) -> np.dtype:
    """The dtype of stored ids."""
    return np.dtype(np.uint16 if vocab_size < INT32_VOCABULARY else np.int32)


def write_idx(
    write: Callable[[bytes | np.ndarray], object],
    documents: int,
    lengths: Callable[[], Iterable[np.ndarray]],
    dtype: np.dtype,
) -> None:
    """Write Megatron's index for `documents` documents, each of one sequence.

    `lengths()` gives the lengths of the documents in tokens, int32, as several arrays one after another. It is called
    twice, so only one of the arrays must be in memory at a time.
    """
    write(HEADER.pack(MAGIC, 1, CODES[np.dtype(dtype)], documents, documents + 1))
    for stretch in lengths():
        write(stretch.astype("<i4"))
    offset = 0
    for stretch in lengths():
        sizes = stretch.astype("<i8") * np.dtype(dtype).itemsize
        ends = offset + np.cumsum(sizes)
        write(ends - sizes)
        offset = int(ends[-1]) if len(ends) else offset
    for first in range(0, documents + 1, STRETCH):
        write(np.arange(first, min(documents + 1, first + STRETCH), dtype="<i8"))


def read_idx(path: Path) -> tuple[np.dtype, np.ndarray, np.ndarray]:
    """(dtype of ids, lengths (n,) int32, byte offsets (n,) int64) of a Megatron index of n sequences, arrays mapped.

    Raises ShardError if the header or the size of the file does not follow the format.
    """
    dtype, n, _ = _header(path)
    return dtype, np.memmap(path, "<i4", "r", HEADER.size, (n,)), np.memmap(path, "<i8", "r", HEADER.size + 4 * n, (n,))


def read_document_index(path: Path) -> np.ndarray:
    """(documents + 1,) int64, mapped: the first sequence of each document, and the number of sequences.

    Raises ShardError if the file does not follow the format.
    """
    _, n, documents = _header(path)
    return np.memmap(path, "<i8", "r", HEADER.size + 12 * n, (documents,))


def documents_of_size(size: int) -> int:
    """The number of documents in an index of `size` bytes, if each document is one sequence, as in our sets."""
    return (size - HEADER.size - 8) // 20


def _header(path: Path) -> tuple[np.dtype, int, int]:
    """(dtype of ids, sequences, documents + 1) of a Megatron index."""
    with open(path, "rb") as file:
        header = file.read(HEADER.size)
    if len(header) < HEADER.size or header[:9] != MAGIC:
        raise ShardError(f"{path} is not a Megatron index", f"expected magic {MAGIC!r}, found {header[:9]!r}")
    _, version, code, n, documents = HEADER.unpack(header)
    dtype = next((dtype for dtype, known in CODES.items() if known == code), None)
    expected = HEADER.size + 12 * n + 8 * documents
    if version != 1 or dtype is None or path.stat().st_size != expected:
        raise ShardError(
            f"{path} cannot be read",
            f"version {version}, dtype code {code}, {path.stat().st_size:,} bytes",
            f"expected version 1, code in {sorted(CODES.values())}, {expected:,} bytes",
        )
    return dtype, n, documents
