"""Facts about text and scores for the model card, read from the shards and the run if they still exist.

A checkpoint names its shards by fingerprint, and its configuration names their folder. If that folder is gone or holds
other shards, the card says that the text is not known.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from pretrain.errors import ExportError, UserError
from pretrain.storage.index import RECORDED, read_index
from pretrain.training.watch.metrics import EVALUATIONS, reports

NUMBERS = ("standard_error", "no_context_loss", "gain", "accuracy", "bits_per_byte", "targets")  # shown on the card


@dataclass(frozen=True)
class CorpusText:
    """A corpus that a model was trained on. `index` is the index of its shards, or None if they were not found."""

    name: str
    fingerprint: str
    index: dict | None
    read: dict | None = None  # the tokens of its text and the padding that were read; None: not recorded

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

    @property
    def read_tokens(self) -> int | None:
        """The tokens of text that were read; None if the checkpoint does not record them."""
        return self.read["tokens"] if self.read else None

    @property
    def passes(self) -> float | None:
        """The read tokens as passes over the training side; None if the checkpoint does not record them."""
        return round(self.read["tokens"] / self.read["pass_tokens"], 4) if self.read else None


def texts(settings: dict, index: dict) -> list[CorpusText]:
    """The corpora of a run with `settings` (config.yaml as values) whose checkpoint has `index`.

    A branch may have corpora that its parent lacked, and its parent may have read corpora that it lacks.
    """
    entries = index.get(RECORDED, {}).get("read")
    read = {entry["shards"]: entry for entry in entries or []}

    def text(name: str, mark: str, found: dict | None) -> CorpusText:
        entry = read.pop(mark, None if entries is None else {"tokens": 0, "padding": 0, "pass_tokens": 1})
        return CorpusText(name, mark, found, entry)

    if "shards" in index:
        found = _index(settings["data"].get("shards"), index["shards"])
        listed = [text((found or {}).get(RECORDED, {}).get("name", ""), index["shards"], found)]
    else:
        places = {corpus["name"]: corpus["shards"] for corpus in settings["data"].get("corpora") or []}
        listed = [text(name, mark, _index(places.get(name), mark)) for name, mark in index["corpora"]]
    return listed + [CorpusText(entry["name"], mark, None, entry) for mark, entry in read.items()]


def sources(texts: list[CorpusText]) -> list[dict]:
    """The sources of all corpora that record them, each once."""
    known = (source for text in texts for source in text.sources or ())
    return list({(one["name"], one["language"], one["licence"]): one for one in known}.values())


def step_seconds(checkpoint: Path, step: int) -> float | None:
    """The seconds of the first `step` steps; None if the run's metrics do not have all of them."""
    try:
        seconds = {report.step: report.step_s for report in reports(_run_of(checkpoint)) if report.step <= step}
    except OSError:
        return None
    return round(sum(seconds.values()), 1) if len(seconds) == step else None


def _run_of(checkpoint: Path) -> Path:
    """The folder of the run that a checkpoint belongs to."""
    return checkpoint.absolute().parent.parent


def scores(checkpoint: Path, step: int) -> list[dict]:
    """The held-out scores at a checkpoint's step, the last ones of each corpus. Empty if the step was not scored."""
    path = _run_of(checkpoint) / EVALUATIONS
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
