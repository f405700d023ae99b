"""A fine-tuned model beside its random twin: the same task, labels and architecture from random weights.

The two are made by two runs, in either order. Whichever ends last finds the other among the folders beside its own
`out`, and says in its report whether pre-training helped.
"""

import json
from contextlib import suppress
from pathlib import Path

from pretrain.storage.index import INDEX

SAME = ("labels", "labels_seed", "max_length")  # options of the two


def compared(out: Path, index: dict, report: dict) -> list[dict]:
    """Each twin found beside `out`, with what the comparison says. `index` and `report` are those of the new folder."""
    found = []
    for path in sorted(out.absolute().parent.glob(f"*/{INDEX}")):
        other = _read(path)
        if path.parent == out.absolute() or not other:
            continue
        # A damaged neighbour is no reason to lose a result.
        with suppress(LookupError, TypeError, ValueError, AttributeError):
            if _is_twin(index, other):
                theirs = _read(path.with_name("report.json")) or {}
                line = said(path.parent.name, report, theirs)
                found.append({"folder": path.parent.name, "fingerprint": other["fingerprint"], "said": line})
    return found


def said(name: str, report: dict, other: dict) -> str:
    """One line about a result and that of the folder `name`, one of which began with random weights."""
    ours, theirs = report["test"], other["test"]
    pretrained, random = (theirs, ours) if report["init"] == "random" else (ours, theirs)
    verdict = verdict_of(pretrained, random)
    levels = f"{100 * pretrained['accuracy']:.1f} and {100 * random['accuracy']:.1f} %"
    if report["init"] == "random":
        return f"the pre-trained {name} and this random twin: {levels}; {verdict}"
    return f"this and its random twin {name}: {levels}; {verdict}"


def verdict_of(pretrained: dict, random: dict) -> str:
    """Whether the pre-trained result is beyond its random twin, of two `test` sections of reports."""
    if pretrained["interval95"][0] > random["interval95"][1]:
        return "pre-training helped: the 95 % intervals do not overlap"
    if pretrained["interval95"][1] < random["interval95"][0]:
        return "pre-training harmed: the 95 % intervals do not overlap"
    return "no gain from pre-training is shown: the 95 % intervals overlap"


def _is_twin(index: dict, other: dict) -> bool:
    """Whether two results are of one task and base, one of them from random weights."""
    ours, theirs = index["options"], other.get("options", {})
    alike = all(index[key] == other.get(key) for key in ("stage", "task", "base"))
    return alike and all(ours[key] == theirs.get(key) for key in SAME) and ours["init"] != theirs.get("init")


def _read(path: Path) -> dict | None:
    """A JSON object; None where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
