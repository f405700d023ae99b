"""The funnel: documents and bytes in and out of every cleaning step, per source, with samples and measured values.

The hash of a document's place in the corpus decides whether it is kept as a sample. So the samples are the same for any
number of workers, and they come from all over the corpus.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from hashlib import blake2b

from pretrain.cleaning.limits import SHARES, Distribution, Measurement, Rule
from pretrain.display import tables

EXCERPT = 240  # characters of a sample
CONTEXT = 60  # characters of a sample before the first change
MEASURED = re.compile(r" \d[\d.e+-]*(?= [<>≤≥]|,)")  # the 11.3 of "mean word length 11.3 > 10", not part of the reason
WHAT = ("documents", "bytes", "heldout")  # bytes of UTF-8; documents of the held-out side
COUNTS = (*(f"{what}_{way}" for what in WHAT for way in ("in", "out")), "changed", "changes")
READ = "read"  # the first step: reading the corpus
REASONS = 2  # reasons in a row of the table: the most frequent ones
WHY, LIMIT = "why dropped; what changed", "a document goes at"
ASKED = SHARES[2::2]  # the shares in the table of rules: 0.1 % to half of the documents


@dataclass
class Flow:
    """One step of one source, or of all sources."""

    # By the names in COUNTS. `changed` counts documents that stay with another text, `changes` is in the step's unit.
    counts: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)  # why documents were dropped, without the measured values
    dropped: list[tuple[str, dict]] = field(default_factory=list)  # (draw, sample), sorted
    changed: list[tuple[str, dict]] = field(default_factory=list)
    rules: dict[Rule, Distribution] = field(default_factory=dict)

    def measure(self, measured: Iterable[Measurement]) -> None:
        """Add the measurements of one document."""
        for one in measured:
            self.rules.setdefault(one.rule, Distribution()).add(one)

    def count(self, heldout: bool, size: int, left: int | None, changes: int = 0) -> None:
        """Count one document of `size` bytes. `left`: its bytes after the step, or None if it was dropped."""
        counts = self.counts
        counts["documents_in"] += 1
        counts["bytes_in"] += size
        counts["heldout_in"] += heldout
        if left is not None:
            counts["documents_out"] += 1
            counts["bytes_out"] += left
            counts["heldout_out"] += heldout
            counts["changed"] += changes > 0
            counts["changes"] += changes

    def merge(self, other: "Flow", samples: int) -> None:
        self.counts.update(other.counts)
        self.reasons.update(other.reasons)
        self.dropped = sorted([*self.dropped, *other.dropped], key=_place)[:samples]
        self.changed = sorted([*self.changed, *other.changed], key=_place)[:samples]
        for rule, distribution in other.rules.items():
            self.rules.setdefault(rule, Distribution()).merge(distribution)

    def report(self) -> dict:
        return {
            **{name: self.counts[name] for name in COUNTS},
            "reasons": dict(sorted(self.reasons.items(), key=lambda item: (-item[1], item[0]))),
            "dropped_samples": [sample for _, sample in self.dropped],
            "changed_samples": [sample for _, sample in self.changed],
            "rules": [distribution.report(rule) for rule, distribution in self.rules.items()],
        }


class Funnel:
    """The flows of a corpus: source → step → Flow, with the steps in order. Memory: 2 · `samples` excerpts a flow."""

    def __init__(self, steps: dict[str, list[str]], samples: int):
        self.flows = {source: {step: Flow() for step in names} for source, names in steps.items()}
        self.samples = samples

    def trimmed(self) -> "Funnel":
        """Remove flows without documents: with many sources, a process then sends little. Returns the funnel itself."""
        counted = {
            source: {s: flow for s, flow in flows.items() if flow.counts} for source, flows in self.flows.items()
        }
        self.flows = {source: flows for source, flows in counted.items() if flows}
        return self

    def merge(self, other: "Funnel") -> None:
        for source, flows in other.flows.items():
            for step, flow in flows.items():
                self.flows[source][step].merge(flow, self.samples)

    def dropped(
        self, source: str, step: str, where: str, why: str, text: str, mask: Callable[[str], str] = str, **more: object
    ) -> None:
        """Count the reason of a dropped document. A sample of it has its text, masked by `mask`, and `more`."""
        flow, sample = self.flows[source][step], {"where": where, "why": why, **more}
        flow.reasons[MEASURED.sub("", why)] += 1
        self._offer(flow.dropped, step, where, lambda: {**sample, "text": mask(excerpt(text))})

    def changed(
        self, source: str, step: str, where: str, before: str, after: str, mask: Callable[[str], str] = str
    ) -> None:
        """Note that a document was changed. A sample of it has the text before and after, masked by `mask`."""
        flow = self.flows[source][step]
        self._offer(flow.changed, step, where, lambda: {"where": where, **difference(before, after, mask)})

    def total(self) -> dict[str, Flow]:
        """The sum of the flows of all sources, without samples. Documents of a source without a step pass it."""
        found: dict[str, Flow] = {}
        left: dict[str, Counter[str]] = {}
        for step in merged([list(flows) for flows in self.flows.values()]):
            found[step] = Flow()
            for source, flows in self.flows.items():
                if step in flows:
                    found[step].merge(flows[step], samples=0)
                    left[source] = flows[step].counts
                else:
                    passing = {f"{what}_{way}": left[source][f"{what}_out"] for what in WHAT for way in ("in", "out")}
                    found[step].counts.update(passing)
        return found

    def _offer(self, held: list[tuple[str, dict]], step: str, where: str, sample: Callable[[], dict]) -> None:
        """Keep the sample if its draw is among the smallest. `sample` is only called if it is kept."""
        place = draw(f"{step}\n{where}")
        if len(held) < self.samples or (held and place < held[-1][0]):
            held.append((place, sample()))
            held.sort(key=_place)
            del held[self.samples :]


def merged(orders: list[list[str]]) -> list[str]:
    """Merge several ordered lists of names: each name once, after the names before it in the first list that has it."""
    found: list[str] = []
    for order in orders:
        place = 0
        for name in order:
            if name not in found:
                found.insert(place, name)
            place = found.index(name) + 1
    return found


def excerpt(text: str) -> str:
    return text if len(text) <= EXCERPT else text[:EXCERPT] + "…"


def difference(before: str, after: str, mask: Callable[[str], str]) -> dict[str, str]:
    """Both texts around their first difference, masked."""
    same = next(
        (i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after))
    )
    begin = max(0, same - CONTEXT)
    lead = "…" if begin else ""
    return {"before": mask(lead + excerpt(before[begin:])), "after": mask(lead + excerpt(after[begin:]))}


def table(report: dict) -> None:
    """Print the funnel: one table for each source, and one for all of them if there are several."""
    several = len(report["sources"]) > 1
    for source in [*report["sources"], *([{"name": "all sources", **report["all"]}] if several else [])]:
        read, *steps = source["steps"]
        busy = [step for step in steps if step["changed"] or step["documents_out"] < step["documents_in"]]
        columns = ("step", "documents", "dropped", "", "bytes", "left", WHY)
        rows = [_row(step, read["bytes_in"]) for step in (read, *busy)]
        tables.show(columns, rows, title=source["name"], left=(0, 6), framed=False)
        idle = [step["step"] for step in steps if step not in busy]
        print(f"nothing to do: {', '.join(idle)}\n" if idle else "")
        if source in report["sources"] and any(step["rules"] for step in steps):
            _show_rules(source["name"], steps)
            print()


def _row(step: dict, read_bytes: int) -> list[str]:
    dropped = step["documents_in"] - step["documents_out"]
    why = [f"{reason} ({documents:,})" for reason, documents in list(step["reasons"].items())[:REASONS]]
    if step["changed"]:
        why.append(f"{step['changes']:,} {step['unit']} in {step['changed']:,} documents")
    return [
        step["step"],
        f"{step['documents_out']:,}",
        f"{dropped:,}" if dropped else "",
        f"{dropped / step['documents_in']:.2%}" if dropped else "",
        f"{step['bytes_out']:,}",
        f"{step['bytes_out'] / read_bytes:.1%}" if read_bytes else "",
        "; ".join(why),
    ]


def _show_rules(name: str, steps: list[dict]) -> None:
    """Print a row for each limit of a filter, with the limits that would drop other shares of the documents."""
    asked = (f"{share:.1%}".replace(".0%", "%") for share in ASKED)
    title = f"{name}: the limits, and the strictest ones that drop at most …"
    columns, rows = ("step", LIMIT, "train documents", "dropped", *asked), []
    for step in steps:
        for rule in step["rules"]:
            others = ["-" if (at := rule["limits"][f"{share:g}"]) is None else f"{at:g}" for share in ASKED]
            limit, dropped = f"{rule['rule']} {rule['sign']} {rule['limit']:g}", rule["dropped"]
            rows.append((step["step"], limit, f"{rule['documents']:,}", f"{dropped:,}" if dropped else "", *others))
    tables.show(columns, rows, title=title, left=(0, 1), framed=False)


def draw(name: str) -> str:
    """A hash of `name`. The samples with the smallest draws are shown."""
    return blake2b(name.encode(), digest_size=8).hexdigest()


def _place(entry: tuple[str, dict]) -> str:
    return entry[0]
