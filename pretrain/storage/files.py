"""Single files: write a file so that it is complete or absent, hash it, and know a file that a system left behind."""

import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from pretrain.storage.locks import LOCKED

STRAY = re.compile(  # files and folders that the system, a file manager or an editor leaves beside any file
    r"\.DS_Store|\._.*|\.localized|\.Trash.*|\.fseventsd|\.Spotlight-V100|\.TemporaryItems|Icon\r"  # macOS
    r"|Thumbs\.db|ehthumbs\.db|desktop\.ini|\$RECYCLE\.BIN|System Volume Information"  # Windows
    r"|\.nfs[0-9a-f]+|\.smbdelete.*|\.fuse_hidden.*|\.panfs.*|\.snapshot|lost\+found|\.directory"  # Linux
    r"|@eaDir|#recycle|\.~lock\..*#|\..*\.sw[a-p]",  # NAS, editors
    re.IGNORECASE,
)
UNFINISHED = re.compile(r"\.[0-9a-f]{32}\.tmp")  # the temporary names of `finished`


def is_used(folder: Path) -> bool:
    """Whether a folder has anything but locks, unfinished files and files that the system or an editor left."""
    return not all(any(kind.fullmatch(path.name) for kind in (STRAY, LOCKED, UNFINISHED)) for path in folder.iterdir())


def lies_in(path: Path | str, folder: Path | str) -> bool:
    """Whether `path` is `folder` or lies in it, after following all links."""
    path, folder = Path(path).resolve(), Path(folder).resolve()
    return folder == path or folder in path.parents


def digest(path: Path) -> dict:
    """`{"bytes": size, "sha256": hex}` of a file, read once."""
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def is_stray(path: Path) -> bool:
    """Whether the system, a file manager or an editor left the file, or a folder above it."""
    return any(STRAY.fullmatch(part) for part in path.parts)


def write_json(path: Path, value: object) -> None:
    """Write `value` as JSON. A reader sees the old file or the new one."""
    with finished(path) as file:
        file.write(as_json(value).encode())


@contextmanager
def finished(path: Path) -> Iterator[BinaryIO]:
    """A file that is written under a temporary name and synced before it gets its own name.

    So a file that has its name is complete, whenever the process or the machine ends. Two processes that write the same
    file at once do not disturb each other.
    """
    aside = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with open(aside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.rename(path)
    except BaseException:
        aside.unlink(missing_ok=True)  # an incomplete file must not fill the disk
        raise


def as_json(value: object) -> str:
    """The text of our JSON files."""
    return json.dumps(value, ensure_ascii=False, indent=1) + "\n"
