"""Progress of long work: a bar on a terminal (rich), a line now and then in a log."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LINE_EVERY_S = 10.0


@contextmanager
def progress(what: str, unit: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Yield `advance(n)`. Written to standard error, so that results on standard output stay clean."""
    if sys.stderr.isatty():
        yield from _bar(what, unit, total)
    else:
        yield from _lines(what, unit, total)


def _bar(what: str, unit: str, total: int | None) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    name, count = TextColumn("{task.description}"), MofNCompleteColumn()
    columns = (name, BarColumn(), count, TextColumn(unit), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda n: bar.advance(task, n)


def _lines(what: str, unit: str, total: int | None) -> Iterator[Callable[[int], None]]:
    started = said = time.monotonic()
    done = 0

    def say() -> None:
        of = f"/{total:,}" if total else ""
        print(f"{what}: {done:,}{of} {unit}, {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)

    def advance(n: int) -> None:
        nonlocal done, said
        done += n
        if time.monotonic() - said >= LINE_EVERY_S:
            said = time.monotonic()
            say()

    yield advance
    say()
