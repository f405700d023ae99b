"""How every stage publishes its folder: written aside, hashed while writing, named last by one rename.

A folder is complete when its index file (JSON) is there. The index lists every file with its size and SHA-256, what
the folder was made from, and a fingerprint: the hash of the index without places, times and versions. Nothing large
is hashed again to prove what a folder is.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from pretrain.errors import UserError

INDEX = "index.json"
SMALL = 256 << 20  # bytes
SHORT_WRITE = re.compile(r"[0-9]+ requested and [0-9]+ written")  # of NumPy
CHECKSUM = "checksum"  # the key of a hash of the whole index; `fingerprint` leaves out what is recorded
DERIVED = ("words",)  # stages whose results lie in the folder that they were made from; no other's may
ASIDE = (".tmp", ".old", ".work")  # ends of the names of folders, beginning with a dot, that are not published yet
RECORDED = "recorded"  # the key under which an index keeps what is noted but not part of its identity


@contextmanager
def publish(folder: Path, stage: str, what: type[UserError] = UserError) -> Iterator[Path]:
    """Yield an empty folder beside `folder`; on success it takes `folder`'s name, on failure nothing is left behind.

    Refuses (`what`), before any work, to replace a folder that holds anything but an earlier result of the same stage,
    and to lie in a published folder, which would not be what it was.
    """
    folder = Path(folder)
    folder = folder.resolve() if folder.is_symlink() else folder  # the link stays a link
    check_output(folder, what, derived=stage in DERIVED)
    held = _stage(folder / INDEX)
    if held not in (stage, "") and folder.exists() and (not os.access(folder, os.R_OK) or any(folder.iterdir())):
        found = f"the result of stage {held}" if held else f"files but no {INDEX} of ours"
        raise what("the output folder holds something else", f"{folder} has {found}", "choose another out=")
    aside = folder.with_name(f".{folder.name}.tmp")  # one name: what a killed run left is swept by the next
    if aside.is_dir():
        os.close(_held(aside, folder, what))
        shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
    except OSError as error:
        raise what("the output folder cannot be made", f"{aside}: {error.strerror}", "choose another out=") from None
    lock = _held(aside, folder, what)
    try:
        yield aside
        assert _stage(aside / INDEX) == stage, f"{aside} was published without an index of stage {stage}"
        _sync(aside)
        if folder.exists():
            old = folder.with_name(f".{folder.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
            aside.rename(folder)
            shutil.rmtree(old)
        else:
            aside.rename(folder)
        shutil.rmtree(_work(folder), ignore_errors=True)  # a worker of a killed run may still be writing there
    except PermissionError as error:
        found = f"{error.filename}: {error.strerror}"
        raise what("permission denied", found, "change the permissions, or choose another out=") from None
    except Exception as error:
        if getattr(error, "errno", None) == errno.EFBIG:
            remedy = "raise the limit (ulimit -f), or take another file system, and start again"
            raise what(f"a file may not become so large: {folder} was not written", str(error), remedy) from None
        if not _disk_full(error):
            raise
        raise what(
            f"the disk is full: {folder} was not written", str(error), "free some space and start again"
        ) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        os.close(lock)


def _held(aside: Path, folder: Path, what: type[UserError]) -> int:
    """A descriptor of `aside`, locked until it is closed: by a killed process too. Raises `what` if another has it."""
    try:
        lock = os.open(aside, os.O_RDONLY)
    except OSError as error:
        raise what("the output folder cannot be made", f"{aside}: {error.strerror}", "choose another out=") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise what("another process is making this folder", str(folder), "wait for it, or end it") from None
    except OSError:  # a file system without locks
        pass
    return lock


def check_output(folder: Path, what: type[UserError] = UserError, derived: bool = False) -> None:
    """Raise `what` when `folder` cannot be a folder because it, or one above it, is a file.

    Nor may it lie in a published folder, unless what it will hold is `derived` from that.
    """
    try:
        file = next((path for path in (folder, *folder.parents) if path.exists() and not path.is_dir()), None)
        above = () if derived else folder.resolve().parents
        held = next(((path, stage) for path in above if (stage := _stage(path / INDEX))), None)
    except OSError as error:  # no permission to look, or a name that is too long
        raise what("the output folder cannot be made", f"{folder}: {error.strerror}", "choose another out=") from None
    if file:
        raise what("the output folder cannot be made", f"{file} is a file", "choose another out=")
    if held:
        found = f"{folder} is in {held[0]}, the result of stage {held[1]}"
        raise what("the output folder lies in a published folder", found, "choose another out=")


def lies_in(path: Path | str, folder: Path | str) -> bool:
    """Whether `path` is `folder` or lies in it, wherever their links lead."""
    path, folder = Path(path).resolve(), Path(folder).resolve()
    return folder == path or folder in path.parents


def digest(path: Path) -> dict:
    """`{"bytes": size, "sha256": hex}` of a file, read once."""
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def digests(folder: Path, known: dict[str, dict] | None = None) -> dict[str, dict]:
    """`digest` of every file below `folder` but its index, by relative name, sorted; unless it is `known`."""
    known = known or {}
    files = (path for path in folder.rglob("*") if path.is_file())
    names = sorted(path.relative_to(folder).as_posix() for path in files)
    return {name: known.get(name) or digest(folder / name) for name in names if name != INDEX}


def fingerprint(index: dict) -> str:
    """The identity of an index: SHA-256 of its canonical JSON without `recorded`, `fingerprint` and `checksum`."""
    return _sha256({key: value for key, value in index.items() if key not in (RECORDED, "fingerprint", CHECKSUM)})


def write_index(
    folder: Path, index: dict, recorded: tuple[str, ...] = (), known: dict[str, dict] | None = None
) -> dict:
    """Add the digests of `folder`'s files and the fingerprint to `index`, write it last, return it.

    Files named in `recorded` hold places or times: checked like the others, but not part of the identity. Those in
    `known` were hashed while they were written, and are not read again.
    """
    found = digests(folder, known)
    index = {**index, "files": {name: entry for name, entry in found.items() if name not in recorded}}
    if recorded:
        index[RECORDED] = {**index.get(RECORDED, {}), "files": {name: found[name] for name in recorded}}
    index["fingerprint"] = fingerprint(index)
    index[CHECKSUM] = checksum(index)
    write_json(folder / INDEX, index)
    return index


def read_index(folder: Path, what: type[UserError], made_by: str, stage: str | None = None) -> dict:
    """The index of a complete folder, of one stage or any. Raises `what` when it is missing, damaged or of another."""
    path = Path(folder) / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        state = "the folder is incomplete" if Path(folder).is_dir() else "there is no such folder"
        raise what(f"{folder}: {state}", f"looked for: {path}", f"make it with: {made_by}") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise what(f"{path} is damaged: not JSON", f"make it again with: {made_by}") from None
    if not isinstance(index, dict) or index.get("fingerprint") != fingerprint(index):
        raise what(f"{path} was altered: its fingerprint does not match", f"make it again with: {made_by}")
    if index.get(CHECKSUM) not in (None, checksum(index)):  # None: of an older index
        raise what(f"{path} was altered: its checksum does not match", f"make it again with: {made_by}")
    if stage and index.get("stage") != stage:
        found = f"its {INDEX} says stage {json.dumps(index.get('stage'))}"
        raise what(f"{folder} is not of the stage {stage}", found, f"make such a folder with: {made_by}")
    return index


def listed(index: dict) -> dict[str, dict]:
    """Every file of a folder with its size and SHA-256, those outside its identity included."""
    return {**index["files"], **index.get(RECORDED, {}).get("files", {})}


def check_sizes(folder: Path, index: dict, what: type[UserError]) -> None:
    """Every listed file is there with its listed size: what every opening checks, at the cost of a stat each."""
    for name, entry in listed(index).items():
        path = f"{folder}/{name}"  # of thousands of files a Path each would take longer than to ask for their sizes
        try:
            found = os.stat(path).st_size
        except OSError:
            found = None
        if found != entry["bytes"]:
            state = "is missing" if found is None else f"has {found:,} bytes, not {entry['bytes']:,}: truncated?"
            raise what(f"{path} {state}", "copy it again from where it was made, or rebuild the folder")


def check(folder: Path, index: dict, what: type[UserError], remedy: str, thorough: bool = False) -> None:
    """Sizes always; every byte when the folder is small (0.2 s) or `thorough`. Raises `what`, naming each file."""
    check_sizes(folder, index, what)
    if thorough or sum(entry["bytes"] for entry in listed(index).values()) <= SMALL:
        found = faults(folder, index)
        if found:
            raise what(f"{folder} was altered after it was made", *found, remedy)


def faults(folder: Path, index: dict, advance: Callable[[int], None] = lambda files: None) -> list[str]:
    """Names of files that differ from the index, each with what is wrong: every byte is hashed."""
    found = []
    for name, entry in listed(index).items():
        path = Path(folder) / name
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            found.append(f"{name}: missing")
        elif size != entry["bytes"]:
            state = "truncated" if size < entry["bytes"] else "altered"
            found.append(f"{name}: {state}, {size:,} bytes instead of {entry['bytes']:,}")
        elif digest(path)["sha256"] != entry["sha256"]:
            found.append(f"{name}: altered, its SHA-256 differs")
        advance(1)
    unlisted = [Path(folder) / name for name in DERIVED]
    unlisted = [path for path in unlisted if path.is_dir() and not (path / INDEX).exists()]
    found += [f"{path.name}/{INDEX}: missing" for path in unlisted]
    # Nor what is being made: folders whose names begin with a dot are those of a stage at work, or killed at it.
    inner = {path for place in [*within(folder), *unlisted, *Path(folder).glob(".*/")] for path in place.rglob("*")}
    files = (path for path in Path(folder).rglob("*") if path.is_file() and path not in inner)
    present = {path.relative_to(folder).as_posix() for path in files}
    return found + [f"{name}: extra, not in the index" for name in sorted(present - set(listed(index)) - {INDEX})]


def within(folder: Path) -> list[Path]:
    """The published folders that lie in a published folder: what was derived from it later, with an index each."""
    return sorted(path.parent for path in Path(folder).glob(f"*/{INDEX}") if _stage(path) is not None)


def index_faults(folder: Path, index: dict) -> list[str]:
    """What is wrong with the bytes of an index that says what it should: those of its record, or of white space."""
    same = (Path(folder) / INDEX).read_bytes() == _json(index).encode()
    same = same and index.get(CHECKSUM) in (None, checksum(index))  # None: of an older index
    return [] if same else [f"{INDEX}: altered, its bytes are not those that were written"]


def checksum(index: dict) -> str:
    """SHA-256 of a whole index, what is recorded included."""
    return _sha256({key: value for key, value in index.items() if key != CHECKSUM})


def write_json(path: Path, value: object) -> None:
    """A reader sees the old file or the new one."""
    with finished(path) as file:
        file.write(_json(value).encode())


@contextmanager
def finished(path: Path) -> Iterator[BinaryIO]:
    """A file that is written aside and synced before it gets its name: what has the name is whole, whenever the process
    or the machine ends. Two processes that do the same work at once do not meet."""
    aside = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with open(aside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.rename(path)
    except BaseException:
        aside.unlink(missing_ok=True)  # a full disk is not filled by what nobody can use
        raise


@contextmanager
def kept(folder: Path, noun: str, pattern: str, what: type[UserError] = UserError) -> Iterator[Path]:
    """A folder `.NAME.work` for what a stage has finished of `folder`; inside of `publish`, which keeps others out and
    removes it in the end. On failure it stays, if it has files of `pattern`: the user knows them as `noun`."""
    work = _work(folder)
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


def _work(folder: Path) -> Path:
    folder = folder.resolve() if folder.is_symlink() else folder.absolute()  # workers elsewhere have another folder
    return folder.with_name(f".{folder.name}.work")


def code(*packages: str) -> str:
    """Identity of the code in packages of ours: what one version left half-done is not taken for another's."""
    found = hashlib.sha256()
    for package in packages:
        for path in sorted((Path(__file__).parent / package).glob("*.py")):
            found.update(path.read_bytes())
    return found.hexdigest()


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, indent=1) + "\n"


def _sha256(value: object) -> str:
    """Of the canonical JSON."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _stage(index: Path) -> str | None:
    """The stage of the folder that `index` belongs to, "" if it is damaged; None: not an index of ours."""
    try:
        found = json.loads(index.read_text(encoding="utf-8"))
    except OSError:
        return None
    except ValueError:
        return ""
    return found["stage"] if isinstance(found, dict) and {"stage", "fingerprint"} <= found.keys() else None


def _disk_full(error: Exception) -> bool:
    """True for ENOSPC and EDQUOT; safetensors wraps them in an error of its own, NumPy counts what it could write."""
    number = getattr(error, "errno", None)
    said = str(error)
    full = f"os error {errno.ENOSPC}" in said or SHORT_WRITE.fullmatch(said) is not None
    return full or number in (errno.ENOSPC, errno.EDQUOT)


def _sync(folder: Path) -> None:
    """Push everything to disk, readable to whom the umask allows (safetensors makes its files private)."""
    os.umask(mask := os.umask(0o022))
    for path in [*folder.rglob("*"), folder]:
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
