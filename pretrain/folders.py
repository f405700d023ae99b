"""How every stage publishes its folder: written aside, hashed while writing, named last by one rename.

A folder is complete when its index file (JSON) is there. The index lists every file with its size and SHA-256, what
the folder was made from, and a fingerprint: the hash of the index without places, times and versions. Nothing large
is hashed again to prove what a folder is.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from pretrain import indexes
from pretrain.errors import PretrainError, UserError, refusal
from pretrain.locks import LOCKED, is_mounted, locked

if TYPE_CHECKING:
    from pretrain.config import StageConfig

INDEX = "index.json"
SMALL = 256 << 20  # bytes
CHECKSUM = "checksum"  # the key of a hash of the whole index; `fingerprint` leaves out what is recorded
DERIVED = ("words",)  # stages whose results lie in the folder that they were made from; no other's may
ASIDE = (".tmp", ".old", ".work")  # ends of the names of folders, beginning with a dot, that are not published yet
STRAY = re.compile(  # files and folders that the system, a file manager or an editor leaves beside any file
    r"\.DS_Store|\._.*|\.localized|\.Trash.*|\.fseventsd|\.Spotlight-V100|\.TemporaryItems|Icon\r"  # macOS
    r"|Thumbs\.db|ehthumbs\.db|desktop\.ini|\$RECYCLE\.BIN|System Volume Information"  # Windows
    r"|\.nfs[0-9a-f]+|\.smbdelete.*|\.fuse_hidden.*|\.panfs.*|\.snapshot|lost\+found|\.directory"  # Linux
    r"|@eaDir|#recycle|\.~lock\..*#|\..*\.sw[a-p]",  # NAS, editors
    re.IGNORECASE,
)
SETTINGS = "settings"  # the key of a record under which the settings of a stage are noted
RECORDED = "recorded"  # the key under which an index keeps what is noted but not part of its identity


@contextmanager
def publish(
    folder: Path, stage: str, what: type[UserError] = UserError, config: "StageConfig | None" = None
) -> Iterator[Path]:
    """Yield an empty folder beside `folder`; on success it takes `folder`'s name, on failure nothing is left behind.

    Refuses (`what`), before any work: to replace a folder that holds anything but an earlier result of the same stage,
    or one that was made with other settings than those of `config`, unless that says `replace`; to lie in a published
    folder, which would not be what it was; and to make what another process is making. The settings are recorded in
    the index, outside of its identity.
    """
    folder = Path(folder)
    check_output(folder, what, derived=stage in DERIVED)
    folder = folder.resolve() if folder.is_symlink() else folder  # the link stays a link
    _check_replaceable(folder, stage, what, config)
    with locked(folder, stage, what):
        aside = folder.with_name(f".{folder.name}.tmp")  # one name: what a killed run left is swept by the next
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            _sweep(folder, aside)
            _check_replaceable(folder, stage, what, config)  # once more: a process may have finished, or been killed
            aside.mkdir()
        except OSError as error:
            found = f"{error.filename}: {error.strerror}"
            raise what("the output folder cannot be made", found, "choose another out=") from None
        try:
            yield aside
            assert _stage(aside / INDEX) == stage, f"{aside} was published without an index of stage {stage}"
            if config is not None:
                _record_settings(aside, config.settings())
            _sync(aside)
            _take_name(aside, folder, what)
            # A worker of a killed run may still be writing there.
            shutil.rmtree(work_folder(folder), ignore_errors=True)
        except Exception as error:  # not OSError alone: safetensors and NumPy wrap what the system said
            if isinstance(error, PretrainError) or (refused := refusal(error, f"{folder} was not written")) is None:
                raise
            raise what(*refused) from None
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def _check_replaceable(folder: Path, stage: str, what: type[UserError], config: "StageConfig | None") -> None:
    """Raise `what` when `folder` cannot be replaced, or has anything but an earlier result of `stage`."""
    if folder.parent.exists() and not os.access(folder.parent, os.W_OK | os.X_OK):
        raise what("the output folder cannot be made", f"{folder.parent} may not be written", "choose another out=")
    if is_mounted(folder):
        remedy = f"choose a folder inside of it, such as out={folder / stage}"
        raise what("the output folder is a mount point, which cannot be replaced", str(folder), remedy)
    held = _stage(folder / INDEX)
    if held not in (stage, "") and folder.exists() and (not os.access(folder, os.R_OK) or is_used(folder)):
        found = f"the result of stage {held}" if held else f"files but no {INDEX} of ours"
        raise what("the output folder holds something else", f"{folder} has {found}", "choose another out=")
    if held is not None and config is not None and not config.replace:
        _check_settings(folder, stage, what, config)


def _check_settings(folder: Path, stage: str, what: type[UserError], config: "StageConfig") -> None:
    """Raise `what` when the result of `stage` in `folder` was made with other settings, naming each."""
    remedy = "choose another out=, or say replace=true to lose what is there"
    index = intact(folder / INDEX)
    if index is None:  # damaged: to make it again is the cure
        return
    if other := indexes.unknown_format(index):
        raise what(f"{folder} was made by another version", other, remedy)
    settings = index.get(RECORDED, {}).get(SETTINGS)
    lines = config.differences(settings if isinstance(settings, dict) else _older_settings(index, config))
    if lines:
        raise what(f"{folder} holds a result of stage {stage} that was made with other settings", *lines, remedy)


def intact(path: Path) -> dict | None:
    """An index that says what it was written to say, of any version; None: it was altered or damaged."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        whole = index["fingerprint"] == fingerprint(index) and index.get(CHECKSUM) in (None, checksum(index))
        return index if whole and isinstance(index.get(RECORDED, {}), dict) else None
    except (OSError, ValueError, RecursionError, TypeError, KeyError, AttributeError):
        return None


def _older_settings(index: dict, config: "StageConfig") -> dict:
    """The settings that the index of an older version reveals; all others are taken to be the same."""
    said = {**index, **index.get(RECORDED, {})}
    now = config.settings()
    return {key: said[key] if type(said.get(key)) is type(new) else new for key, new in now.items()}


def _record_settings(folder: Path, settings: dict) -> None:
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    index[RECORDED] = {**index.get(RECORDED, {}), SETTINGS: settings}
    index[CHECKSUM] = checksum(index)
    write_json(folder / INDEX, index)


def _sweep(folder: Path, aside: Path) -> None:
    """Put right what a killed process left beside `folder`, whose lock this process has."""
    shutil.rmtree(aside, ignore_errors=True)
    for old in _olds(folder):
        if not folder.exists() and _stage(old / INDEX):
            old.rename(folder)  # killed between the two renames: the earlier result is all there is
        else:
            shutil.rmtree(old, ignore_errors=True)


def _take_name(aside: Path, folder: Path, what: type[UserError]) -> None:
    """Give `aside` the name of `folder`. What had the name is removed, if the system lets go of it.

    A result that cannot have the name gets another beside it: its work is not lost.
    """
    old = next(old for old in _old_names(folder) if not old.exists()) if folder.exists() else None
    try:
        if old:
            folder.rename(old)
        aside.rename(folder)
    except OSError as error:
        if old and old.exists() and not folder.exists():
            old.rename(folder)
        saved = next(name for name in (folder.with_name(f"{folder.name}-{n}") for n in count(2)) if not name.exists())
        aside.rename(saved)
        found = f"{folder}: {error.strerror}"
        raise what("the output folder cannot be replaced", found, f"the new result is in {saved}") from None
    if old:
        try:
            shutil.rmtree(old)
        except OSError as error:  # on NFS while another process has a file of it open
            state = f"could not be removed ({error.strerror}): is a file of it in use?"
            print(f"note: {folder} is published; what it replaces, {old}, {state}", file=sys.stderr)


def _old_names(folder: Path) -> Iterator[Path]:
    """Names beside `folder` for what it replaces, one after another: `.NAME.old`, `.NAME.old2` …"""
    return (folder.with_name(f".{folder.name}.old{number if number > 1 else ''}") for number in count(1))


def _olds(folder: Path) -> list[Path]:
    name = re.compile(re.escape(f".{folder.name}.old") + r"\d*")
    return sorted(path for path in folder.parent.iterdir() if name.fullmatch(path.name))


def check_output(folder: Path, what: type[UserError] = UserError, derived: bool = False) -> None:
    """Raise `what` when `folder` cannot be made: its name is none, it or one above it is a file, or may not be written.

    Nor may it lie in a published folder, unless what it will hold is `derived` from that.
    """
    folder, remedy = Path(folder), "choose another out="
    try:
        # The longest name that is made beside it and in it: a name that is too long is refused before any work.
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(folder.absolute().with_name(f".{folder.absolute().name}.old999") / ("x" * 64))
        above = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        outer = () if derived else folder.resolve().parents
        held = next(((path, stage) for path in outer if (stage := _stage(path / INDEX))), None)
    except (OSError, ValueError) as error:  # no permission to look, a name that is too long, a NUL
        found = getattr(error, "strerror", None) or str(error)
        raise what("the output folder cannot be made", f"{str(folder)!r:.200}: {found}", remedy) from None
    if not above.is_dir():
        raise what("the output folder cannot be made", f"{above} is a file", remedy)
    if not os.access(above, os.W_OK | os.X_OK):
        raise what("the output folder cannot be made", f"{above} may not be written", remedy)
    if held:
        found = f"{folder} is in {held[0]}, the result of stage {held[1]}"
        raise what("the output folder lies in a published folder", found, remedy)


def is_used(folder: Path) -> bool:
    """Whether a folder has anything but what the system or a file manager left in it."""
    return not all(STRAY.fullmatch(path.name) or LOCKED.fullmatch(path.name) for path in folder.iterdir())


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
    """The index of a complete folder, of one stage or any, with all that is read of it (indexes.py).

    Raises `what` when it is missing, damaged, of another stage, or of a version that this one does not read.
    """
    path, again = Path(folder) / INDEX, f"make it again with: {made_by}"
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        state = "the folder is incomplete" if Path(folder).is_dir() else "there is no such folder"
        raise what(f"{folder}: {state}", f"looked for: {path}", f"make it with: {made_by}") from None
    except OSError as error:
        raise what(f"{path} cannot be read", error.strerror, "mend that, and start again") from None
    except (ValueError, RecursionError):
        raise what(f"{path} is damaged: not JSON", again) from None
    if not isinstance(index, dict) or not isinstance(index.get(RECORDED, {}), dict):
        raise what(f"{path} was altered: its fingerprint does not match", again)
    try:
        intact = index.get("fingerprint") == fingerprint(index)
        whole = index.get(CHECKSUM) in (None, checksum(index))  # None: of an older index
    except UnicodeEncodeError as error:
        raise what(f"{path} is damaged: it has half of a surrogate pair", f"{error.object!a:.60}", again) from None
    if not intact:
        raise what(f"{path} was altered: its fingerprint does not match", again)
    if not whole:
        raise what(f"{path} was altered: its checksum does not match", again)
    if other := indexes.unknown_format(index):
        raise what(f"{folder} was made by another version", f"{path}: {other}", f"take that version, or {again}")
    if stage and index.get("stage") != stage:
        found = f"its {INDEX} says stage {json.dumps(index.get('stage'))}"
        raise what(f"{folder} is not of the stage {stage}", found, f"make such a folder with: {made_by}")
    if found := indexes.faults(index):
        raise what(f"{path} is not what this version reads", *found, f"take the version that made it, or {again}")
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
    files = (path.relative_to(folder) for path in Path(folder).rglob("*") if path.is_file() and path not in inner)
    present = {path.as_posix() for path in files if not (_is_stray(path) or LOCKED.fullmatch(path.name))}
    return found + [f"{name}: extra, not in the index" for name in sorted(present - set(listed(index)) - {INDEX})]


def strays(folder: Path, index: dict) -> list[str]:
    """Names of files in a published folder that the system or an editor left there: no part of it, and harmless."""
    paths = (path.relative_to(folder) for path in Path(folder).rglob("*") if path.is_file())
    return sorted({path.as_posix() for path in paths if _is_stray(path)} - set(listed(index)))


def _is_stray(path: Path) -> bool:
    return any(STRAY.fullmatch(part) for part in path.parts)


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


def work_folder(folder: Path) -> Path:
    """Where a stage keeps what it has finished of `folder` until that is published."""
    folder = folder.resolve() if folder.is_symlink() else folder.absolute()  # workers elsewhere have another folder
    return folder.with_name(f".{folder.name}.work")


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
    except (ValueError, RecursionError):
        return ""
    return found["stage"] if isinstance(found, dict) and {"stage", "fingerprint"} <= found.keys() else None


def _sync(folder: Path) -> None:
    """Push everything to disk, readable to whom the umask allows (safetensors makes its files private)."""
    os.umask(mask := os.umask(0o022))
    for path in [*folder.rglob("*"), folder]:
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
