"""Many files of ids as one array: each is mapped, when it is first needed, into its slot of one reserved stretch.

A position becomes an address by arithmetic, so that rows out of thousands of files are copied by one gather: 2 to 4
times as fast as a loop over rows (32 x 512 ids out of 400 files: 670 against 340 M ids per CPU second). Python's own
`mmap` keeps a descriptor open for each file (until 3.13), so that a thousand files would end at `ulimit -n`; here none
stays open. The stretch costs address space only: 2 TB of 128 for 10¹² ids of 16 bits.
"""

import ctypes
import mmap
import os
import weakref
from pathlib import Path

import numpy as np

from pretrain.errors import ShardError

MAP_FIXED = 0x10  # of Linux and macOS
FAILED = ctypes.c_void_p(-1).value


class MappedFiles:
    """Files of `items` (n,) elements of `dtype`, one after another, read-only; sizes must be those on disk."""

    def __init__(self, paths: list[Path], items: np.ndarray, dtype: np.dtype):
        self.paths, self.items, self.dtype = paths, np.asarray(items, np.int64), np.dtype(dtype)
        self.ends = np.cumsum(self.items)  # position after each file
        self.begins = self.ends - self.items
        slots = -(-self.items * self.dtype.itemsize // mmap.PAGESIZE) * mmap.PAGESIZE
        self._slots = np.cumsum(slots) - slots  # bytes from the start of the stretch
        self._shift = self._slots // self.dtype.itemsize - self.begins  # position → element of the stretch
        size = int(slots.sum())
        libc = _libc()
        self._base = _mmap(libc, None, size, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
        weakref.finalize(self, libc.munmap, self._base, size)
        pointer = ctypes.cast(self._base, ctypes.POINTER(ctypes.c_uint8))
        self._stretch = np.ctypeslib.as_array(pointer, shape=(size,)).view(self.dtype)
        self._mapped = np.zeros(len(paths), bool)

    def rows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Positions starts[b] … starts[b] + length - 1 as (B, length) int32; all must lie in the files."""
        # Reading outside of a mapped file would not be an exception but the end of the process.
        assert starts.min() >= 0 and starts.max() + length <= self.ends[-1], (starts.min(), starts.max(), self.ends[-1])
        first, last = self._files(starts), self._files(starts + (length - 1))
        within = first == last
        if within.all():
            return self._gather(first, starts, length).astype(np.int32)
        rows = np.empty((len(starts), length), np.int32)
        rows[within] = self._gather(first[within], starts[within], length)
        for row in np.flatnonzero(~within).tolist():
            done = 0
            for file in range(first[row], last[row] + 1):
                begin, end = starts[row] + done, min(starts[row] + length, self.ends[file])
                rows[row, done : done + end - begin] = self.read(file, begin - self.begins[file], end - begin)
                done += end - begin
        return rows

    def read(self, file: int, first: int, items: int) -> np.ndarray:
        """Elements first … first + items - 1 of one file, as a view that lives as long as this object."""
        assert first >= 0 and first + items <= self.items[file], (file, first, items, self.items[file])
        self._map(np.array([file]))
        begin = int(self._slots[file]) // self.dtype.itemsize + int(first)
        return self._stretch[begin : begin + int(items)]

    def _files(self, positions: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.ends, positions, side="right")

    def _gather(self, files: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
        self._map(files)
        # Every place of the stretch begins a row of a view: choosing rows copies each in one piece, where indices of
        # single elements would be 8 bytes for each of 2.
        shape = (max(0, len(self._stretch) - length + 1), length)
        view = np.ndarray(shape, self.dtype, self._stretch, 0, (self.dtype.itemsize, self.dtype.itemsize))
        return view[starts + self._shift[files]]

    def _map(self, files: np.ndarray) -> None:
        for file in np.unique(files[~self._mapped[files]]).tolist():
            path, size = self.paths[file], int(self.items[file]) * self.dtype.itemsize
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise ShardError(f"{path} cannot be read any more", str(error.strerror)) from None
            try:
                found = os.fstat(descriptor).st_size
                if found != size:  # reading past a file's end would end the process
                    raise ShardError(f"{path} was changed while it was in use: {found:,} bytes instead of {size:,}")
                at = self._base + int(self._slots[file])
                _mmap(_libc(), at, size, mmap.PROT_READ, mmap.MAP_SHARED | MAP_FIXED, descriptor)
            finally:
                os.close(descriptor)
            self._mapped[file] = True


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    address, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    libc.mmap.restype, libc.mmap.argtypes = address, [address, size, number, number, number, ctypes.c_int64]
    libc.munmap.argtypes = [address, size]
    return libc


def _mmap(libc: ctypes.CDLL, address: int | None, size: int, access: int, flags: int, descriptor: int) -> int:
    found = libc.mmap(address, size, access, flags, descriptor, 0)
    if found in (None, FAILED):
        number = ctypes.get_errno()
        raise OSError(number, f"mapping {size:,} bytes: {os.strerror(number)}")
    return found
