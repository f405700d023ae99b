"""How a process takes memory from the system."""

import ctypes
import os
import resource
from contextlib import suppress
from functools import cache
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -3, -4, -8  # of malloc.h
KEPT = 256 << 20  # bytes, at the end of the heap
MAPPED = 8 << 20  # bytes from which a block is mapped by itself, and given back as soon as it is free
MOST = 2**31 - 1  # of an int


@cache
def keep_freed() -> None:
    """Have malloc keep up to KEPT bytes that are free for what is asked for next.

    As it is set, glibc gives the free end of the heap back to the system and takes it again, zeroed page by page, at
    every turn of a loop whose arrays have some megabytes. Without this, encoding Chinese takes an eighth more time,
    masking whole words in batches of 128 windows of 512 twice the time; peaks of memory are the same but for a
    twentieth. It is for processes that work on arrays of less than MAPPED: training on a CPU, with larger tensors, has
    three times the page faults with it (see keep_tensors). A chunk of text, of 4 MiB, is below MAPPED too, which spares
    a build a quarter of its page faults. Other C libraries are left as they are.
    """
    _mallopt({M_TRIM_THRESHOLD: KEPT, M_MMAP_THRESHOLD: MAPPED})


def keep_tensors() -> None:
    """Have malloc keep all that is freed, however large, and one heap for all threads: for training on a CPU.

    Without it, a step of 14 M weights and 1,024 tokens has 12,000 to 27,000 page faults, which take 24 to 53 ms of its
    900. ZeRO 1 makes its buffers of gradients anew at every step: 53,000 page faults, and 809 ms instead of 650 on each
    of two ranks. Peaks of memory are the same but for 4 %. Call it before the first collective, which starts threads.
    """
    _mallopt({M_TRIM_THRESHOLD: MOST, M_MMAP_MAX: 0, M_ARENA_MAX: 1})


def _mallopt(settings: dict[int, int]) -> None:
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        for name, value in settings.items():
            libc.mallopt(name, value)


def limit() -> int:
    """Bytes that a process may use at most: the machine's memory, or less where a container or `ulimit -v` says so."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # of control groups, version 2 and 1
        with suppress(OSError, ValueError):
            found.append(int(Path("/sys/fs/cgroup", name).read_text()))
    address_space, _ = resource.getrlimit(resource.RLIMIT_AS)
    return min(found + ([address_space] if address_space != resource.RLIM_INFINITY else []))
