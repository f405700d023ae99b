"""The lock of a folder: no two processes make one folder, or train in it, at the same time.

The lock of `runs/wiki` is the file `runs/.wiki.lock`. It is created once and never removed: if processes removed it,
one of them could lock a file that no other process sees any more. The kernel releases the lock when its owner ends, for
any reason. The file holds the name of its last owner, for the error message of the next process.
"""

import contextlib
import fcntl
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pretrain.errors import UserError

LOCK, LOCKED = ".{}.lock", re.compile(r"\..*\.lock")  # the name of a lock file, and its pattern
NAMED_S = 0.1  # an owner writes its name after locking: a reader waits this long for the name
_held: dict[int, Path] = {}  # descriptor → folder, for the locks of this process


@contextmanager
def locked(folder: Path, command: str, error_type: type[UserError] = UserError) -> Iterator[None]:
    """Keep every other process out of `folder` until the block ends.

    `command` names the work of the owner in the message to other processes. Raises `error_type` if another process has
    the lock, or if the lock file cannot be made. A lock that this process has on a folder above `folder` is enough. A
    file system without locks keeps nobody out.
    """
    folder = Path(folder).resolve()
    if any(held in folder.parents for held in _held.values()):
        yield
        return
    lock = _lock(folder, error_type)
    _held[lock] = folder
    try:
        _sign(lock, command)
        yield
    finally:
        if _held.pop(lock, None):  # a forked process has closed it already
            os.close(lock)


def path_of(folder: Path) -> Path:
    """The lock file of a folder: beside the folder, or inside it if no file can be made beside it.

    A file beside the root of a mounted file system would not be seen by other machines that mount it. The folder above
    may also belong to another user.
    """
    folder = Path(folder).resolve()
    beside = folder.with_name(LOCK.format(folder.name))
    apart = is_mounted(folder) or not (os.access(folder.parent, os.W_OK) or beside.exists())
    return folder / LOCK.format("folder") if apart and folder.is_dir() else beside


def was_locked(folder: Path) -> bool:
    """Whether the lock file of `folder` exists: without it no process has replaced `folder` under a lock of its own."""
    try:
        return path_of(folder).exists()
    except (OSError, ValueError):  # the name is invalid
        return False


def is_mounted(folder: Path) -> bool:
    """Whether a file system, or a part of one (Docker's -v), is mounted at `folder`.

    `os.path.ismount` alone does not notice a mounted part of the same file system.
    """
    if os.path.ismount(folder):
        return True
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:  # not Linux
        return False
    return str(Path(folder).resolve()) in {line.split(" ")[4].replace("\\040", " ") for line in lines}


def _lock(folder: Path, error_type: type[UserError]) -> int:
    """Lock the lock file of `folder`, and return its descriptor."""
    while True:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            path = path_of(folder)
            descriptor = _open(path)
        except OSError as error:
            found = f"{error.filename}: {error.strerror}"
            raise error_type("the output folder cannot be made", found, "choose another out=") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            time.sleep(NAMED_S)
            remedy = "wait for it, or end it"
            raise error_type("another process is making this folder", f"{folder}: {_owner(path)}", remedy) from None
        except OSError:  # a file system without locks
            return descriptor
        if _is_at(descriptor, path):
            return descriptor
        os.close(descriptor)  # the file was removed between opening and locking


def _open(path: Path) -> int:
    """Open a lock file. Started programs do not inherit it. Another user's file can be locked, but not written."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except PermissionError:
        if not path.exists():
            raise
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _sign(lock: int, command: str) -> None:
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    owner = {"host": os.uname().nodename, "pid": os.getpid(), "command": command, "since": since}
    with contextlib.suppress(OSError):  # another user's file, or a full disk: the lock works without a name
        os.ftruncate(lock, 0)
        os.pwrite(lock, json.dumps(owner).encode() + b"\n", 0)


def _owner(path: Path) -> str:
    """A description of the owner, from the text of the lock file."""
    try:
        owner = json.loads(path.read_bytes())
        return "{command}, process {pid} on {host} since {since}".format(**owner)
    except (OSError, ValueError, KeyError, TypeError):
        return f"the owner has not written its name into {path}"


def _forget() -> None:
    """Close the copies of all locks in a forked process: they would outlive the owner. This releases no lock."""
    for lock in _held:
        os.close(lock)
    _held.clear()


os.register_at_fork(after_in_child=_forget)
