"""Rules of filters: what is measured of a document, the limit it is held to, and how the measures are distributed."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate

# Of train documents that came to a rule: for each the report says what limit drops no more than that.
SHARES = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 0.5)
BROKEN: dict[str, Callable[[float, float], bool]] = {
    "<": float.__lt__,
    "≤": float.__le__,
    ">": float.__gt__,
    "≥": float.__ge__,
}


@dataclass(frozen=True)
class Rule:
    """A document goes when its `name` stands to `limit` as `sign` says: `characters < 10`."""

    name: str
    sign: str  # of BROKEN
    limit: float


@dataclass(frozen=True)
class Measurement:
    """What a rule found of one document."""

    rule: Rule
    value: float

    @property
    def broken(self) -> bool:
        return BROKEN[self.rule.sign](float(self.value), float(self.rule.limit))

    @property
    def reason(self) -> str:
        return f"{self.rule.name} {self.value:.4g} {self.rule.sign} {self.rule.limit:g}"


def measured(name: str, value: float, sign: str, limit: float | None) -> Iterator[Measurement]:
    """One, or none where there is no such rule (`limit` None)."""
    if limit is not None:
        yield Measurement(Rule(name, sign, limit), value)


@dataclass
class Distribution:
    """The values of one rule over the train documents that came to it. Kept to two significant digits: 90 a decade."""

    values: Counter[float] = field(default_factory=Counter)
    dropped: int = 0

    def add(self, one: Measurement) -> None:
        self.values[float(f"{one.value:.1e}")] += 1
        self.dropped += one.broken

    def merge(self, other: "Distribution") -> None:
        self.values.update(other.values)
        self.dropped += other.dropped

    def report(self, rule: Rule) -> dict:
        """`limits`: for each of SHARES the strictest limit that drops no more of the documents; null: every one does.

        To two significant digits, as the values are.
        """
        return {
            "rule": rule.name,
            "sign": rule.sign,
            "limit": rule.limit,
            "documents": self.values.total(),
            "dropped": self.dropped,
            "limits": {f"{share:g}": self._limit(rule.sign, share) for share in SHARES},
        }

    def _limit(self, sign: str, share: float) -> float | None:
        """With the limit at a value, all values beyond it go, and with ≤ and ≥ the value itself."""
        lenient = sorted(self.values, reverse=sign in (">", "≥"))  # the first limit drops least
        gone = list(accumulate(self.values[value] for value in lenient))
        if sign in ("<", ">"):
            gone = [0, *gone[:-1]]
        allowed = share * self.values.total()
        return next((lenient[i] for i in reversed(range(len(gone))) if gone[i] <= allowed), None)
