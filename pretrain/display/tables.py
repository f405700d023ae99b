"""Tables on a terminal or in a log file."""

import sys
from collections.abc import Iterable, Sequence

LOG_COLUMNS = 160  # the characters of a line in a log file


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """A line for each row, as wide as its cells. The first column is aligned left, all others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()  # an empty cell ends a row
        for row in rows
    ]


def show(
    columns: Sequence[str],
    rows: Iterable[Sequence[str] | None],
    *,
    title: str = "",
    left: Iterable[int] = (0,),
    framed: bool = True,
) -> None:
    """Print a table. A row of None draws a line. The columns numbered in `left` are aligned left, all others right.

    Without a frame a row is one line, and cells that do not fit are cut off. With a frame they are folded.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title) if title else None, title_justify="left", pad_edge=framed)
    if not framed:
        table.box = None
    aligned_left = set(left)
    for number, name in enumerate(columns):
        table.add_column(
            Text(name),
            justify="left" if number in aligned_left else "right",
            no_wrap=not framed,
            overflow="fold" if framed else "ellipsis",
        )
    for row in rows:
        if row is None:
            table.add_section()
        else:
            table.add_row(*map(Text, row))  # not markup: `[unused1]` is shown as it is
    Console(width=None if sys.stdout.isatty() else LOG_COLUMNS).print(table)
