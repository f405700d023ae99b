"""Counts of the train and held-out documents of each source, shown at the end of a stage."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

from pretrain.display import tables

SIDES = ("train", "heldout")
SHOWN = 40  # sources in the table: the largest
REMEDY = (
    "set heldout_documents: 1 (or more), or another heldout_fraction:, for the source; split_characters: 4000 holds out"
    " passages of long documents; heldout_fraction: 0 or 1 says that it is meant so"
)


@dataclass
class Shares:
    """Documents and bytes of UTF-8 on each side of each source."""

    counts: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)  # source → side → documents, bytes

    def add(self, source: str, side: str, documents: int, size: int) -> None:
        sides = self.counts.setdefault(source, {side: {"documents": 0, "bytes": 0} for side in SIDES})
        sides[side]["documents"] += documents
        sides[side]["bytes"] += size

    def merge(self, other: "Shares") -> None:
        for source, sides in other.counts.items():
            for side, found in sides.items():
                self.add(source, side, found["documents"], found["bytes"])

    def lacking(self, meant: frozenset[str] = frozenset()) -> Iterator[str]:
        """Yield a warning for each source that has text on one side only, except the sources in `meant`."""
        total = sum(found["bytes"] for sides in self.counts.values() for found in sides.values())
        for source, sides in self.counts.items():
            documents, size = (sum(found[unit] for found in sides.values()) for unit in ("documents", "bytes"))
            if not documents or source in meant:
                continue
            of = f"its {documents:,} documents ({size / max(1, total):.1%} of all bytes)"
            for side, state in (("heldout", "is held out"), ("train", "is left to train on")):
                if not sides[side]["documents"]:
                    yield f"source {source!r}: none of {of} {state}"

    def show(self, meant: frozenset[str] = frozenset()) -> None:
        """Print the sides of each source as a table, and the warnings of `lacking` on standard error."""
        if not self.counts:
            return
        rows = []
        sizes = {source: sum(found["bytes"] for found in sides.values()) for source, sides in self.counts.items()}
        largest = sorted(sizes, key=lambda source: -sizes[source])[:SHOWN]
        for source in (source for source in sizes if source in largest):
            train, heldout = (self.counts[source][side] for side in SIDES)
            cells = [f"{side[unit]:,}" for side in (train, heldout) for unit in ("documents", "bytes")]
            rows.append((source, *cells, f"{heldout['bytes'] / max(1, sizes[source]):.2%}"))
        columns = ("source", "train documents", "bytes", "held-out documents", "bytes", "bytes held out")
        tables.show(columns, rows, framed=False)
        if len(sizes) > SHOWN:
            print(f"and {len(sizes) - SHOWN:,} smaller sources")
        said = list(self.lacking(meant))
        for line in said[:SHOWN]:
            print(line, file=sys.stderr)
        if said:
            more = f"the same holds for {len(said) - SHOWN:,} other sources; " if len(said) > SHOWN else ""
            print(f"  {more}{REMEDY}", file=sys.stderr)
