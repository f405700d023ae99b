"""Compare a fine-tuned model with its random twin: same task, labels and architecture, but random initial weights.

Two runs make the two folders, in either order. The run that ends last finds the other folder beside its own `out`, and
its report says whether pre-training helped.
"""

import json
from contextlib import suppress
from pathlib import Path

from pretrain.storage.index import INDEX

SAME = ("labels", "labels_seed", "max_length")  # options that twins share


def compared(out: Path, index: dict, report: dict) -> list[dict]:
    """Every twin beside `out`, with a line that compares the two. `index` and `report` belong to the new folder."""
    found = []
    for path in sorted(out.absolute().parent.glob(f"*/{INDEX}")):
        other = _read(path)
        if path.parent == out.absolute() or not other:
            continue
        # A damaged folder beside `out` must not lose the new result.
        with suppress(LookupError, TypeError, ValueError, AttributeError):
            if _is_twin(index, other):
                theirs = _read(path.with_name("report.json")) or {}
                line = said(path.parent.name, report, theirs)
                found.append({"folder": path.parent.name, "fingerprint": other["fingerprint"], "said": line})
    return found


def said(name: str, report: dict, other: dict) -> str:
    """One line that compares `report` with `other`, the report of the folder `name`. One of them is a random twin."""
    ours, theirs = report["test"], other["test"]
    pretrained, random = (theirs, ours) if report["init"] == "random" else (ours, theirs)
    verdict = verdict_of(pretrained, random)
    levels = f"{100 * pretrained['accuracy']:.1f} and {100 * random['accuracy']:.1f} %"
    if report["init"] == "random":
        return f"the pre-trained {name} and this random twin: {levels}; {verdict}"
    return f"this and its random twin {name}: {levels}; {verdict}"


def verdict_of(pretrained: dict, random: dict) -> str:
    """Whether the pre-trained result is better than its random twin. Both are the section `test` of a report."""
    if pretrained["interval95"][0] > random["interval95"][1]:
        return "pre-training helped: the 95 % intervals do not overlap"
    if pretrained["interval95"][1] < random["interval95"][0]:
        return "pre-training harmed: the 95 % intervals do not overlap"
    return "no gain from pre-training is shown: the 95 % intervals overlap"


def _is_twin(index: dict, other: dict) -> bool:
    """Whether two results share task and base, and one of them started from random weights."""
    ours, theirs = index["options"], other.get("options", {})
    alike = all(index[key] == other.get(key) for key in ("stage", "task", "base"))
    return alike and all(ours[key] == theirs.get(key) for key in SAME) and ours["init"] != theirs.get("init")


def _read(path: Path) -> dict | None:
    """The JSON object in a file; None if the file is missing or damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
