"""Files of a published folder that must stay as they are while somebody reads them."""

import os
from collections.abc import Iterable
from pathlib import Path

from pretrain.errors import UserError
from pretrain.storage.files import digest
from pretrain.storage.index import listed


class Unchanged:
    """Detects changes of the files in a published folder while they are being read."""

    def __init__(self, folder: Path, index: dict, names: Iterable[str]):
        """Take the stamp of each file: its place on the disk, its size, and the time of its last change."""
        self._folder, self._index = folder, index
        self._stamps = {name: self._stamp(name) for name in names}

    def check(self, error_type: type[UserError]) -> None:
        """Raise `error_type`, naming the file, if the bytes of a file no longer agree with the index.

        This costs one stat a file. Only a file with a new stamp is hashed, because it may be a correct new copy.
        """
        for name, before in self._stamps.items():
            now = self._stamp(name)
            if now == before:
                continue
            if now is None or digest(self._folder / name) != listed(self._index)[name]:
                state = "is missing" if now is None else "is not what it was when it was opened"
                found = "the steps since the newest checkpoint may have read wrong data: they are not saved"
                remedy = "copy it again from where it was made, and start again"
                raise error_type(f"{self._folder / name} {state}", found, remedy)
            self._stamps[name] = now

    def _stamp(self, name: str) -> tuple[int, ...] | None:
        try:
            found = os.stat(f"{self._folder}/{name}")
        except OSError:
            return None
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
