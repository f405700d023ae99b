"""Progress of long work: a bar on a terminal (rich), a line now and then in a log; both with the time that is left."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LINE_EVERY_S = 10.0
Advance = Callable[..., None]


@contextmanager
def progress(what: str, unit: str, total: int | None = None) -> Iterator[Advance]:
    """Yield `advance(n, note="")`: `n` more units are done, and the bar or line ends with `note` from now on.

    Written to standard error, so that results on standard output stay clean.
    """
    if sys.stderr.isatty():
        yield from _bar(what, unit, total)
    else:
        yield from _lines(what, unit, total)


def _bar(what: str, unit: str, total: int | None) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    name, count, left = TextColumn("{task.description}"), MofNCompleteColumn(), TimeRemainingColumn()
    columns = (name, BarColumn(), count, TextColumn(unit), TimeElapsedColumn(), TextColumn("eta"), left)
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total, note="")

        def advance(n: int, note: str = "") -> None:
            bar.update(task, advance=n, **({"note": note} if note else {}))

        yield advance


def _lines(what: str, unit: str, total: int | None) -> Iterator[Advance]:
    started = said = time.monotonic()
    done, last = 0, ""

    def say() -> None:
        of, spent = f"/{total:,}" if total else "", time.monotonic() - started
        parts = [f"{what}: {done:,}{of} {unit}", f"{spent:.0f} s"]
        if total and 0 < done < total:
            parts.append(f"eta {spent / done * (total - done):.0f} s")
        print(", ".join([*parts, *filter(None, [last])]), file=sys.stderr, flush=True)

    def advance(n: int, note: str = "") -> None:
        nonlocal done, said, last
        done, last = done + n, note or last
        if time.monotonic() - said >= LINE_EVERY_S:
            said = time.monotonic()
            say()

    yield advance
    say()
