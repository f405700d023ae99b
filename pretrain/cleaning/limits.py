"""Rules of filters: a measured value, its limit, and the distribution of the values over the corpus."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate

# For each of these shares of the train documents, the report names the strictest limit that drops no more of them.
SHARES = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 0.5)
BROKEN: dict[str, Callable[[float, float], bool]] = {
    "<": float.__lt__,
    "≤": float.__le__,
    ">": float.__gt__,
    "≥": float.__ge__,
}


@dataclass(frozen=True)
class Rule:
    """A limit on a measured value. `characters < 10` drops every document with fewer than 10 characters."""

    name: str  # of the measured value
    sign: str  # a key of BROKEN
    limit: float


@dataclass(frozen=True)
class Measurement:
    """The value that a rule measured in one document."""

    rule: Rule
    value: float

    @property
    def broken(self) -> bool:
        """Whether the rule drops the document."""
        return BROKEN[self.rule.sign](float(self.value), float(self.rule.limit))

    @property
    def reason(self) -> str:
        return f"{self.rule.name} {self.value:.4g} {self.rule.sign} {self.rule.limit:g}"


def measured(name: str, value: float, sign: str, limit: float | None) -> Iterator[Measurement]:
    """Yield one measurement, or none if there is no such rule (`limit` is None)."""
    if limit is not None:
        yield Measurement(Rule(name, sign, limit), value)


@dataclass
class Distribution:
    """The values of one rule over the train documents that it measured.

    Values are rounded to two significant digits, so there are at most 90 different ones in each power of ten.
    """

    values: Counter[float] = field(default_factory=Counter)
    dropped: int = 0  # documents that broke the rule

    def add(self, one: Measurement) -> None:
        self.values[float(f"{one.value:.1e}")] += 1
        self.dropped += one.broken

    def merge(self, other: "Distribution") -> None:
        self.values.update(other.values)
        self.dropped += other.dropped

    def report(self, rule: Rule) -> dict:
        """The distribution as JSON. `limits` maps each of SHARES to the strictest limit that drops no larger share.

        A limit has two significant digits, like the values. It is null if every limit drops more.
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
        """The strictest limit that drops at most `share` of the documents; None if every limit drops more.

        A limit drops all values beyond it; with ≤ and ≥ it also drops the value that equals it.
        """
        lenient = sorted(self.values, reverse=sign in (">", "≥"))  # the first limit drops least
        gone = list(accumulate(self.values[value] for value in lenient))
        if sign in ("<", ">"):
            gone = [0, *gone[:-1]]
        allowed = share * self.values.total()
        return next((lenient[i] for i in reversed(range(len(gone))) if gone[i] <= allowed), None)
