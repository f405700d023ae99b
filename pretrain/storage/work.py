"""The work folder of a stage: its finished files, from which it continues after it was killed.

A stage that makes the folder NAME keeps its finished files in `.NAME.work` beside it, in one folder for each kind of
file and the settings that decide their contents. Files are sealed (see `sealed`), or listed with their digests in a
sealed record, so that damage is found before a file is reused.
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pretrain.errors import UserError
from pretrain.storage.files import digest
from pretrain.storage.publish import check_output, work_folder
from pretrain.storage.sealed import discard, sealed, unsealed, usable


@contextmanager
def kept(
    folder: Path, noun: str, pattern: str, error_type: type[UserError] = UserError, derived: bool = False
) -> Iterator[Path]:
    """The work folder of `folder`. Use it inside `publish`, which admits one process and deletes the folder at the end.

    On failure the work folder stays if it has files that match `pattern`; the message calls them `noun`. `derived` is
    for a `folder` inside the published folder that it is made from.
    """
    work = work_folder(folder)
    check_output(work, error_type, derived)
    work.mkdir(parents=True, exist_ok=True)
    try:
        yield work
    except BaseException:
        count = sum(1 for _ in work.glob(pattern))
        if count:
            print(f"{count:,} finished {noun} are kept in {work}: start again to go on from there", file=sys.stderr)
        else:
            shutil.rmtree(work, ignore_errors=True)
        raise


def settled(work: Path, kind: str, settings: object) -> Path:
    """Return the folder of a work folder for files of this kind that these settings decide.

    Folders of the same kind for other settings, and temporary files of killed processes, are deleted.
    """
    name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    folder = work / f"{kind}-{name}"
    for other in work.glob(f"{kind}-*"):
        if other != folder:
            shutil.rmtree(other)
    folder.mkdir(exist_ok=True)
    for left in folder.glob(".*.tmp"):
        left.unlink(missing_ok=True)
    return folder


def record(path: Path, files: dict[str, dict], values: dict) -> None:
    """Write a sealed record: the digests of finished `files` beside it, and `values` that belong to them."""
    with sealed(path) as file:
        file.write(json.dumps({"files": files, **values}).encode())


def recorded(path: Path) -> dict | None:
    """Return the `values` and `files` of a record if the record and all its files are undamaged, else None.

    Damaged files are deleted, and a message names them.
    """
    if not usable(path):
        return None
    found = json.loads(unsealed(path))
    there = {name: path.with_name(name) for name in found["files"] if path.with_name(name).exists()}
    damaged = [file for name, file in there.items() if digest(file) != found["files"][name]]
    for file in damaged:
        discard(file)
    # A killed run may have moved some files to the output already.
    return found if len(there) == len(found["files"]) and not damaged else None


def code(*packages: str) -> str:
    """The hash of the source code of some of our packages: another version of the code must not reuse its work."""
    found = hashlib.sha256()
    for package in packages:
        for path in sorted((Path(__file__).parent.parent / package).rglob("*.py")):
            found.update(path.read_bytes())
    return found.hexdigest()
