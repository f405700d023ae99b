"""Tables on a terminal or in a log file."""

import sys
from collections.abc import Iterable, Sequence

LOG_COLUMNS = 160  # characters of a line where there is no terminal to fit


def show(
    columns: Sequence[str],
    rows: Iterable[Sequence[str] | None],
    *,
    title: str = "",
    left: Iterable[int] = (0,),
    framed: bool = True,
) -> None:
    """Print a table. The columns whose numbers are in `left` are aligned left, the others right; None draws a line.

    Without a frame a row is one line: cells that do not fit are cut off. With a frame they are folded.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    style = {} if framed else {"box": None, "pad_edge": False}
    table = Table(title=Text(title) if title else None, title_justify="left", **style)
    for number, name in enumerate(columns):
        align = "left" if number in set(left) else "right"
        table.add_column(Text(name), justify=align, no_wrap=not framed, overflow="fold" if framed else "ellipsis")
    for row in rows:
        if row is None:
            table.add_section()
        else:
            table.add_row(*map(Text, row))  # not markup: `[unused1]` is shown as it is
    Console(width=None if sys.stdout.isatty() else LOG_COLUMNS).print(table)
