"""Check every byte of published folders against their indexes, and check that their sources are still the same.

    $ python launch/check_files.py runs/wiki/shards
    runs/wiki/shards: shards, 8 files, 1,234,567 bytes: intact

Opening a folder checks sizes and, where that is cheap, checksums. This command checks everything, however large: use it
after a copy between machines.
"""

import argparse
from pathlib import Path

from pydantic import ValidationError

from pretrain import cli
from pretrain.config import read_values
from pretrain.display.progress import progress
from pretrain.errors import UserError
from pretrain.storage import schemas
from pretrain.storage.index import INDEX, RECORDED, faults, index_faults, listed, read_index, strays, within

MADE_BY = "python launch/STAGE.py CONFIG.yaml"


class CorpusPlace(schemas.IndexSection):
    """A corpus in the section `data` of a run's configuration."""

    name: str
    shards: str


class DataSection(schemas.IndexSection):
    """The keys that are read from the section `data` of a run's configuration."""

    tokenizer: str | None = None
    shards: str | None = None
    corpora: list[CorpusPlace] | None = None


# The key of a source's fingerprint in an index → the key of the source's place under `recorded`.
PLACES = {"tokenizer": "tokenizer", "parent": "parent", "shards": "shards", "checkpoint": "checkpoint", "base": "model"}


def main(argv: list[str] | None = None, prog: str = "launch/check_files.py") -> int:
    """Check the folders on the command line, and return the exit status."""
    cli.make_printing_safe()
    parser = argparse.ArgumentParser(prog=prog, description="Check every byte of published folders.")
    parser.add_argument(
        "folders",
        nargs="+",
        metavar="FOLDER",
        help="the result of a stage, or a run with its checkpoints and exports",
    )
    arguments = parser.parse_args(argv)
    return cli.guarded(lambda: run([Path(folder) for folder in arguments.folders]))


def run(paths: list[Path]) -> None:
    """Print a line for each intact folder. When all folders are checked, raise UserError with every fault found."""
    named = [folder for path in paths for folder in published(path)]
    lines, broken = [], 0
    for folder in named:
        try:
            found = check(folder)
        except UserError as error:  # the index itself is damaged
            found = [error.what, *error.details]
        lines += found
        broken += bool(found)
    if lines:
        remedy = "copy each of them again from where it was made, or make it again"
        raise UserError(f"damaged, altered or missing: {broken} of {len(named)} folders", *lines, remedy)


def published(path: Path) -> list[Path]:
    """The folders that `path` stands for: itself and folders derived inside it, or a run's checkpoints and exports."""
    if not (path / INDEX).exists() and (path / "checkpoints").is_dir():
        return sorted(found for kind in ("checkpoints", "exports") for found in (path / kind).glob("step_*")) or [path]
    return [path, *within(path)]


def check(folder: Path) -> list[str]:
    """The faults of a published folder, a line each. If it has none, print that it is intact.

    Raises UserError if its index is damaged.
    """
    index = read_index(folder, UserError, MADE_BY)
    with progress(f"hashing {folder}", "files", len(listed(index))) as advance:
        wrong = faults(folder, index, advance) + index_faults(folder, index)
    if wrong:
        return [f"{folder}/{fault}" for fault in wrong]
    notes = [f"  {name}: not of this folder, and harmless" for name in strays(folder, index)]
    for what, fingerprint, place in made_with(folder, index):
        try:
            found = read_index(place, UserError, MADE_BY)["fingerprint"]
        except UserError:
            notes.append(f"  made with {what} {fingerprint[:12]}…, not checked: {place} has no index of ours")
            continue
        if found != fingerprint:
            wrong.append(f"{folder}: made with {what} {fingerprint[:12]}…, but {place} is now {found[:12]}…")
    if not wrong:
        size = sum(entry["bytes"] for entry in listed(index).values())
        print(f"{folder}: {index['stage']}, {len(listed(index))} files, {size:,} bytes: intact")
        for note in notes:
            print(note)
    return wrong


def made_with(folder: Path, index: dict) -> list[tuple[str, str, Path]]:
    """(kind, fingerprint, place) of each folder that this one was made with, if its place is recorded."""
    places = index.get(RECORDED, {})
    if index["stage"] == "checkpoint":
        places = _places_of_run(folder / "config.yaml") | {"parent": places.get("parent")}  # a branch has a parent
    one = [(what, index[what], Path(places[at])) for what, at in PLACES.items() if index.get(what) and places.get(at)]
    parts = zip(index.get("parts", ()), places.get("parts", ()), strict=True)  # if several sets were put together
    corpora = {corpus["name"]: corpus["shards"] for corpus in places.get("corpora") or ()}  # if the run mixes corpora
    named = [(name, fingerprint) for name, fingerprint in index.get("corpora") or () if name in corpora]
    mixed = [(f"corpus {name}", fingerprint, corpora[name]) for name, fingerprint in named]
    several = [("shards", part["shards"], place) for part, place in parts] + mixed
    return one + [(what, fingerprint, Path(place)) for what, fingerprint, place in several]


def _places_of_run(path: Path) -> dict:
    """The places of a run's tokenizer and shards, from its configuration. Raises UserError if they cannot be read."""
    try:
        values = read_values(path.read_text(encoding="utf-8"))
        return DataSection.model_validate(values["data"]).model_dump()
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        kind = "not what this version reads" if isinstance(error, ValidationError) else type(error).__name__
        remedy = "copy the checkpoint again from where it was made"
        raise UserError(f"{path} does not say what the run was made with", kind, remedy) from None
