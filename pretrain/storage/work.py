"""What a stage that is killed has finished, and goes on from."""

import hashlib
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pretrain.errors import UserError
from pretrain.storage.publish import check_output, work_folder


@contextmanager
def kept(folder: Path, noun: str, pattern: str, what: type[UserError] = UserError) -> Iterator[Path]:
    """A folder `.NAME.work` for what a stage has finished of `folder`; inside of `publish`, which keeps others out and
    removes it in the end. On failure it stays, if it has files of `pattern`: the user knows them as `noun`."""
    work = work_folder(folder)
    check_output(work, what)
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


def code(*packages: str) -> str:
    """Hash of the source code of some of our packages: unfinished work of one version is not taken over by another."""
    found = hashlib.sha256()
    for package in packages:
        for path in sorted((Path(__file__).parent.parent / package).rglob("*.py")):
            found.update(path.read_bytes())
    return found.hexdigest()
