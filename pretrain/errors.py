"""The family of exceptions that end a command with a message instead of a traceback.

    PretrainError               exit 1: a failure that is not the user's, such as a worker process that died
    ├── Stopped                 exit 75: a run was stopped by a signal and has saved; start again to continue
    └── UserError               exit 2: what is wrong, where, what was found, what to do
        ├── ConfigError         a setting is unknown, malformed or contradicts another
        ├── CorpusError         text is missing, empty or does not follow the recipe
        ├── TokenizerError      a vocabulary cannot be trained, opened or used
        ├── ShardError          token files are missing, damaged or of another tokenizer
        ├── ResumeError         a run cannot continue from the files in its folder
        ├── ExportError         a checkpoint cannot be exported as asked
        ├── TaskError           a fine-tuning task cannot be read or trained
        └── SystemRefusal       the machine refuses: a full disk, no memory, a limit, a permission

Every other exception is a fault of this program: it ends with a traceback and exit 1.
"""

import errno
import os
import re

SHORT_WRITE = re.compile(r"[0-9]+ requested and [0-9]+ written")  # by NumPy, on a full disk
WRAPPED = re.compile(r"\((?:os error|errno) ([0-9]+)\)|\[[Ee]rrno ([0-9]+)\]")  # by safetensors, tokenizers, Arrow
NO_MEMORY = re.compile(r"can't allocate memory|CUDA out of memory|Cannot allocate memory")  # by PyTorch

# errno → the problem, and what to do
REFUSALS = {
    errno.ENOSPC: ("the disk is full", "free some space and start again"),
    errno.EDQUOT: ("the disk quota is used up", "free some space, or ask for more, and start again"),
    errno.EFBIG: (
        "a file may not become so large",
        "raise the limit (ulimit -f), or take another file system, and start again",
    ),
    errno.EROFS: ("the file system is read-only", "choose another out=, or have it mounted for writing"),
    errno.EIO: ("the disk or the network file system failed", "look at the system's log (dmesg), and start again"),
    errno.ESTALE: ("a network file system lost a file that was open", "start again"),
    errno.EACCES: ("permission denied", "change the permissions, or choose another out="),
    errno.EPERM: ("permission denied", "change the permissions, or choose another out="),
    errno.ENAMETOOLONG: ("a name is longer than the file system allows", "choose a shorter name"),
    errno.ELOOP: ("symbolic links lead in a circle", "correct the link"),
    errno.EISDIR: ("a folder is where a file should be", "remove or rename it"),
    errno.ENOTDIR: ("a file is where a folder should be", "remove or rename it"),
    errno.EMFILE: ("too many files are open", "raise the limit (ulimit -n) and start again"),
    errno.ENFILE: ("too many files are open on this machine", "end other programs and start again"),
    errno.ENOMEM: ("there is not enough memory", "end other programs, or take fewer workers or smaller batches"),
}


class PretrainError(Exception):
    """An error with a message. This class itself is for failures that are not the user's, such as a dead process."""

    exit_code = 1


class Stopped(PretrainError):
    """A run was asked to stop and has saved. It printed a message when it stopped."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again later


class UserError(PretrainError):
    """A user's mistake. `what` is one line. `details` are further lines: where, what was found, what to do."""

    exit_code = 2

    def __init__(self, what: str, *details: str):
        self.what, self.details = what, details
        super().__init__("\n  ".join((what, *details)))


class ConfigError(UserError):
    pass


class CorpusError(UserError):
    pass


class TokenizerError(UserError):
    pass


class ShardError(UserError):
    pass


class ResumeError(UserError):
    pass


class ExportError(UserError):
    pass


class TaskError(UserError):
    pass


class SystemRefusal(UserError):
    pass


def refusal(error: BaseException, done: str = "") -> tuple[str, str, str] | None:
    """The problem, the place or the error's own text, and the remedy, if the system caused `error`; else None.

    `done` is added to the problem: it says which work was not done. Libraries wrap errors of the system in exceptions
    of their own, which are recognised by their text.
    """
    number, said = getattr(error, "errno", None), str(error)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and NO_MEMORY.search(said)):
        number = errno.ENOMEM
    elif isinstance(error, RuntimeError) and said.startswith("Symlink loop"):  # by pathlib before Python 3.13
        number = errno.ELOOP
    elif SHORT_WRITE.fullmatch(said):
        number = errno.ENOSPC
    elif number is None and (wrapped := WRAPPED.search(said)):
        number = int(wrapped[1] or wrapped[2])
    if number not in REFUSALS:
        return None
    what, remedy = REFUSALS[number]
    name = getattr(error, "filename", None)
    first_line = said.split("\n")[0]
    system = getattr(error, "strerror", first_line)
    found = f"{os.fspath(name)!s}: {system}" if isinstance(name, (str, os.PathLike)) else first_line
    return what + (f": {done}" if done else ""), found or type(error).__name__, remedy
