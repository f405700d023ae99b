"""Facts about text and scores for the model card, read from the shards and the run if they still exist.

A checkpoint names its shards by fingerprint, and its configuration names their folder. If that folder is gone or holds
other shards, the card says that the text is not known.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from pretrain.errors import ExportError, UserError
from pretrain.storage.index import RECORDED, read_index
from pretrain.training.watch.metrics import EVALUATIONS

NUMBERS = ("standard_error", "no_context_loss", "gain", "accuracy", "bits_per_byte", "targets")  # shown on the card


@dataclass(frozen=True)
class CorpusText:
    """A corpus that a model was trained on. `index` is the index of its shards, or None if they were not found."""

    name: str
    fingerprint: str
    index: dict | None

    @property
    def sources(self) -> list[dict] | None:
        """Name, language and licence of each source; None if they were not recorded."""
        return self.index.get(RECORDED, {}).get("sources") if self.index else None

    def tokens(self, side: str) -> int | None:
        """The tokens of a side; None if the shards were not found."""
        return self.index["sides"][side]["tokens"] if self.index else None

    def bytes(self, side: str) -> int | None:
        """The bytes of a side's text; None if the shards were not found or do not record them."""
        return self.index["sides"][side]["raw_bytes"] if self.index else None


def texts(settings: dict, index: dict) -> list[CorpusText]:
    """The corpora of a run with `settings` (config.yaml as values) whose checkpoint has `index`."""
    if "shards" in index:
        found = _index(settings["data"].get("shards"), index["shards"])
        name = (found or {}).get(RECORDED, {}).get("name", "")
        return [CorpusText(name, index["shards"], found)]
    places = {corpus["name"]: corpus["shards"] for corpus in settings["data"].get("corpora") or []}
    return [CorpusText(name, mark, _index(places.get(name), mark)) for name, mark in index["corpora"]]


def scores(checkpoint: Path, step: int) -> list[dict]:
    """The held-out scores at a checkpoint's step, the last ones of each corpus. Empty if the step was not scored."""
    path = checkpoint.absolute().parent.parent / EVALUATIONS
    found = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    for line in lines:
        try:
            score = json.loads(line)
        except (ValueError, RecursionError):
            continue  # the last line of a killed run may be torn
        if isinstance(score, dict) and score.get("step") == step and _is_score(score):
            found[str(score.get("corpus", ""))] = score
    return list(found.values())


def _is_score(score: dict) -> bool:
    """Whether a line has numbers wherever the card shows numbers. Damaged lines are skipped."""
    known = [score[key] for key in NUMBERS if score.get(key) is not None]
    return isinstance(score.get("loss"), float) and all(type(value) in (int, float) for value in known)


def _index(folder: str | None, fingerprint: str) -> dict | None:
    """The index of the shards with this fingerprint, if they are in `folder`."""
    if folder is None:
        return None
    try:
        index = read_index(Path(folder), ExportError, "", stage="shards")
    except (UserError, OSError):
        return None
    return index if index["fingerprint"] == fingerprint else None
