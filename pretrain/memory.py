"""How a process takes memory from the system."""

import ctypes
import os
import resource
from contextlib import suppress
from functools import cache
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
KEPT = 256 << 20  # bytes, at the end of the heap
MAPPED = 8 << 20  # bytes from which a block is mapped by itself, and given back as soon as it is free


@cache
def keep_freed() -> None:
    """Have malloc keep up to KEPT bytes that are free for what is asked for next.

    As it is set, glibc gives the free end of the heap back to the system and takes it again, zeroed page by page, at
    every turn of a loop whose arrays have some megabytes. Without this, encoding Chinese takes an eighth more time,
    masking whole words in batches of 128 windows of 512 twice the time; peaks of memory are the same but for a
    twentieth. It is for processes that work on arrays of less than MAPPED: training on a CPU, with larger tensors, has
    three times the page faults with it. A chunk of text, of 4 MiB, is below MAPPED too, which spares a build a quarter
    of its page faults. Other C libraries are left as they are.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_TRIM_THRESHOLD, KEPT)
        libc.mallopt(M_MMAP_THRESHOLD, MAPPED)


def limit() -> int:
    """Bytes that a process may use at most: the machine's memory, or less where a container or `ulimit -v` says so."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # of control groups, version 2 and 1
        with suppress(OSError, ValueError):
            found.append(int(Path("/sys/fs/cgroup", name).read_text()))
    address_space, _ = resource.getrlimit(resource.RLIMIT_AS)
    return min(found + ([address_space] if address_space != resource.RLIM_INFINITY else []))
