"""Progress of long work: a bar on a terminal (rich), a line every 10 s in a log. Both show the remaining time."""

import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

LINE_EVERY_S = 10.0
MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1 << 10  # bytes
RECENT_S = 120.0  # the remaining time follows from the rate of this period: a restarted stage first skips finished work
Advance = Callable[..., None]


@contextmanager
def progress(what: str, unit: str, total: int | None = None, reads: int | None = None) -> Iterator[Advance]:
    """Yield a function `advance(n, note="", read=0)`: it counts `n` more units, and `read` more bytes of files.

    The finished share and the remaining time follow from `reads`, the bytes of all files, or from `total`, the number
    of units. Without either they are not shown. The bar or line ends with the last `note` that was not empty. The
    progress goes to standard error, so that standard output has only results.
    """
    if sys.stderr.isatty():
        yield from _bar(what, unit, total, reads)
    else:
        yield from _lines(what, unit, total, reads)


def closing_line(stage: str, began: float) -> None:
    """Print on standard error the time of a stage since `began` (from time.monotonic), and its peak memory.

    The memory is the peak of this process, and the largest peak of a process that it started and that has ended.
    """
    others = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * MAXRSS_UNIT
    worker = f", of a worker {others / 1e9:.2f} GB" if others else ""
    spent = time.monotonic() - began
    print(f"{stage}: {spent:.1f} s, largest memory {_own_memory() / 1e9:.2f} GB{worker}", file=sys.stderr, flush=True)


def _own_memory() -> int:
    """The peak memory of this process, in bytes.

    On Linux `ru_maxrss` of a new process includes the memory of its parent, so VmHWM is read first.
    """
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split(maxsplit=1)[0]) << 10
    except (OSError, ValueError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS_UNIT


def _bar(what: str, unit: str, total: int | None, reads: int | None) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    name, count, note = (TextColumn(f"{{task.{field}}}") for field in ("description", "fields[count]", "fields[note]"))
    share = [TaskProgressColumn()] if reads or total else []
    left = [TextColumn("eta"), TimeRemainingColumn()] if reads or total else []
    columns = (name, BarColumn(), *share, count, TimeElapsedColumn(), *left, note)
    with Progress(*columns, console=Console(stderr=True), transient=True, speed_estimate_period=RECENT_S) as bar:
        done = 0
        task = bar.add_task(what, total=reads or total, count="", note="")

        def advance(n: int, note: str = "", read: int = 0) -> None:
            nonlocal done
            done += n
            bar.update(task, advance=read if reads else n, count=_count(done, total, unit))
            if note:
                bar.update(task, note=note)

        advance(0)
        yield advance


def _lines(what: str, unit: str, total: int | None, reads: int | None) -> Iterator[Advance]:
    started = said = time.monotonic()
    done = position = 0
    last, whole = "", reads or total
    marks = deque([(started, 0)])  # (time, position) of the lines printed in the last RECENT_S

    def say() -> None:
        now = time.monotonic()
        while len(marks) > 1 and now - marks[0][0] > RECENT_S:
            marks.popleft()
        since, before = marks[0]
        marks.append((now, position))
        parts = [f"{what}: {_count(done, total, unit)}"]
        if whole:
            parts.append(f"{min(1, position / whole):.0%}")
        parts.append(f"{now - started:.0f} s")
        if whole and before < position < whole:
            parts.append(f"eta {(now - since) / (position - before) * (whole - position):.0f} s")
        print(", ".join([*parts, *filter(None, [last])]), file=sys.stderr, flush=True)

    def advance(n: int, note: str = "", read: int = 0) -> None:
        nonlocal done, position, said, last
        done, position, last = done + n, position + (read if reads else n), note or last
        if time.monotonic() - said >= LINE_EVERY_S:
            said = time.monotonic()
            say()

    yield advance
    say()


def _count(done: int, total: int | None, unit: str) -> str:
    return f"{done:,}{f'/{total:,}' if total else ''} {unit}"
