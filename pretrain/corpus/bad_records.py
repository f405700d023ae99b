"""Bad records, which give no document: their kinds, their number, and the error about them."""

from dataclasses import dataclass, field

from pretrain.errors import CorpusError

SAMPLES = 5  # bad records that are kept of each kind and source: the first ones

# kind → the problem, and the remedy
NOT_UTF8, NOT_JSON, NO_TEXT, NOT_UNICODE = "not UTF-8", "not JSON", "no text", "not Unicode"
TOO_LONG, TOO_DEEP, ARRAY, EMPTY = "too long", "nested too deeply", "a JSON array", "empty"
MESSAGES = {
    NOT_UTF8: ("the text is not valid UTF-8", "convert the file (iconv -f … -t utf-8); nothing is repaired silently"),
    NOT_JSON: ("a line is not JSON", "a .jsonl file holds one JSON object a line: repair or remove the line"),
    NO_TEXT: ("a record has no text under {field}", "set field: in the recipe (a.b is b inside a)"),
    NOT_UNICODE: ("the text is not valid Unicode", "repair or remove the record"),
    TOO_DEEP: ("a record is nested too deeply", "flatten or remove the record"),
    ARRAY: (
        "a line is a JSON array, not an object",
        "write one object a line: jq -c '.[]' OLD > NEW.jsonl",
    ),
    TOO_LONG: (
        "a record is longer than max_record_bytes",
        "set max_record_bytes: in the recipe; in .txt a blank line ends a document, in .jsonl the end of a line",
    ),
}
LISTED = 20  # kinds and sources in a message
SKIP = "or set bad_records: skip for this source, and they are counted and left out"


@dataclass(frozen=True)
class Bad:
    """A record that gives no document."""

    kind: str  # a key of MESSAGES, or EMPTY
    where: str  # "en.jsonl, line 12"
    found: str
    remedy: str | None = None  # in place of the remedy of its kind


@dataclass
class Skipped:
    """Counts of bad records by source and kind. Merged in the order of chunks, they do not depend on the workers.

    Memory: SAMPLES records for each source and kind.
    """

    counts: dict[str, dict[str, int]] = field(default_factory=dict)  # source → kind → records
    samples: dict[str, dict[str, list[Bad]]] = field(default_factory=dict)  # source → kind → the first SAMPLES records

    @classmethod
    def of(cls, values: dict) -> "Skipped":
        """The inverse of `dataclasses.asdict`, also after a way through JSON."""
        samples = {
            source: {kind: [Bad(**bad) for bad in found] for kind, found in kinds.items()}
            for source, kinds in values["samples"].items()
        }
        return cls(values["counts"], samples)

    def add(self, source: str, bad: Bad) -> None:
        self._take(source, bad.kind, 1, [bad])

    def merge(self, other: "Skipped") -> None:
        for source, kinds in other.counts.items():
            for kind, records in kinds.items():
                self._take(source, kind, records, other.samples[source][kind])

    def __bool__(self) -> bool:
        return bool(self.counts)

    def report(self) -> dict:
        """The counts as JSON: source → kind → {"records": …, "samples": [{"where": …, "found": …}]}."""
        return {
            source: {kind: self._report(source, kind, records) for kind, records in kinds.items()}
            for source, kinds in self.counts.items()
        }

    def line(self) -> str:
        """One line: "no document from 12 records: en 9 empty, 3 not JSON (first: en.jsonl, line 12)"."""
        parts = [
            f"{source} " + ", ".join(f"{records:,} {kind}" for kind, records in kinds.items())
            for source, kinds in self.counts.items()
        ]
        total = sum(sum(kinds.values()) for kinds in self.counts.values())
        first = next((s[0].where for kinds in self.samples.values() for s in kinds.values()), None)
        return f"no document from {total:,} records: {'; '.join(parts)} (first: {first})"

    def _take(self, source: str, kind: str, records: int, samples: list[Bad]) -> None:
        counts = self.counts.setdefault(source, {})
        counts[kind] = counts.get(kind, 0) + records
        held = self.samples.setdefault(source, {}).setdefault(kind, [])
        held.extend(samples[: SAMPLES - len(held)])

    def _report(self, source: str, kind: str, records: int) -> dict:
        samples = [{"where": bad.where, "found": bad.found} for bad in self.samples[source][kind]]
        return {"records": records, "samples": samples}


class BadRecord(CorpusError):
    """A bad record in a source with `bad_records: stop`."""


def bad_lines(found: dict[str, dict[str, tuple[int, Bad, tuple[str, ...]]]]) -> tuple[str, ...]:
    """The first line and the details of the error about bad records, given source → kind → (count, first, fields)."""
    listed = [(source, *entry) for source, kinds in found.items() for entry in kinds.values()]
    details: list[str] = []
    remedies: dict[str, None] = {}
    for source, records, bad, fields in listed[:LISTED]:
        what, remedy = MESSAGES[bad.kind]
        what = what.format(field=" and ".join(map(repr, fields)))
        more = f" (and {records - 1:,} more in source {source!r})" if records > 1 else ""
        details.append(f"{bad.where}: {what + ': ' if len(listed) > 1 else ''}{bad.found}{more}")
        remedies[bad.remedy or remedy] = None
    if len(listed) > 1:
        total = sum(records for _, records, _, _ in listed)
        what = f"{total:,} records cannot be read; the first of each kind and source:"
        details += [f"and {len(listed) - LISTED:,} other kinds and sources"] if len(listed) > LISTED else []
    return (what, *details, *remedies, SKIP)
