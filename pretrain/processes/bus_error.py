"""A message for SIGBUS: it names the mapped file that became shorter while it was read.

If a page of a mapped file is gone, or if the disk cannot read it, Python raises no exception: the kernel ends the
process without a message, which looks like a lack of memory. A Python signal handler does not help, because it runs
after the failed instruction, which then fails again for ever. A C signal handler runs at once.
"""

import ctypes
import os
import signal
import sys
from functools import cache

STATUS = 71  # the exit status of a forked process, by which the rank knows the cause; other processes end with 2
SA_SIGINFO, ADDRESS_AT = 4, 16  # Linux's flag; the offset of the address in a 64-bit siginfo_t
HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)

_started: list[int] = []  # the process that installed the handler


class _Action(ctypes.Structure):
    """`struct sigaction` of glibc and musl."""

    _fields_ = [
        ("handler", HANDLER),
        ("mask", ctypes.c_uint8 * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    ]


@cache
def explain_bus_errors() -> None:
    """Let this process, and processes forked from it, name the file when SIGBUS ends them. Linux only."""
    if sys.platform != "linux" or ctypes.sizeof(ctypes.c_void_p) != 8:
        return
    _started[:] = [os.getpid()]
    action = _Action(handler=_handler, flags=SA_SIGINFO)
    ctypes.CDLL(None, use_errno=True).sigaction(signal.SIGBUS, ctypes.byref(action), None)


@HANDLER
def _handler(number: int, info: int, context: int) -> None:
    """Print the message and end the process. Returning would repeat the failed instruction."""
    try:
        address = ctypes.c_uint64.from_address(info + ADDRESS_AT).value
        os.write(2, f"error: {_said(address)}\n".encode(errors="replace"))
    finally:
        os._exit(2 if _started == [os.getpid()] else STATUS)


def _said(address: int) -> str:
    """The message for a bus error at an address: the file mapped there, and the remedy."""
    remedy = "copy it again from where it was made, and start again: a run continues from its newest checkpoint"
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
        for line in maps:
            stretch, _, offset, _, _, *path = line.rstrip("\n").split(maxsplit=5)
            first, last = (int(end, 16) for end in stretch.split("-"))
            if first <= address < last and path and path[0].startswith("/"):
                wanted, name = int(offset, 16) + address - first, path[0].removesuffix(" (deleted)")
                try:
                    size = os.stat(name).st_size
                except OSError as error:
                    return f"a file cannot be read any more\n  {name}: {error.strerror}\n  {remedy}"
                if size <= wanted:
                    return f"a file became shorter while it was read\n  {name} has {size:,} bytes left\n  {remedy}"
                failed = "the disk or the network file system failed"
                return f"{failed}\n  {name}, byte {wanted:,}\n  look at the system's log (dmesg), and start again"
    return "memory that was mapped cannot be read (SIGBUS)\n  is /dev/shm full?\n  look at the system's log (dmesg)"
