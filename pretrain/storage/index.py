"""The index of a published folder, index.json: which files it has, what it was made from, and its fingerprint.

The index lists every file with its size and SHA-256. The fingerprint is the hash of the index without places, times
and versions. Nothing large is hashed again to prove what a folder is.
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from pretrain.errors import UserError
from pretrain.storage import schemas
from pretrain.storage.files import as_json, digest, is_stray, write_json
from pretrain.storage.locks import LOCKED

INDEX = "index.json"


SMALL = 256 << 20  # bytes


CHECKSUM = "checksum"  # the key of a hash of the whole index; `fingerprint` leaves out what is recorded


DERIVED = ("words",)  # stages whose results lie in the folder that they were made from; no other's may


RECORDED = "recorded"  # the key under which an index keeps what is noted but not part of its identity


def intact(path: Path) -> dict | None:
    """An index that says what it was written to say, of any version; None: it was altered or damaged."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        whole = index["fingerprint"] == fingerprint(index) and index.get(CHECKSUM) in (None, checksum(index))
        return index if whole and isinstance(index.get(RECORDED, {}), dict) else None
    except (OSError, ValueError, RecursionError, TypeError, KeyError, AttributeError):
        return None


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
    """The index of a complete folder, of one stage or any, with all that is read of it (schemas.py).

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
    if other := schemas.unknown_format(index):
        raise what(f"{folder} was made by another version", f"{path}: {other}", f"take that version, or {again}")
    if stage and index.get("stage") != stage:
        found = f"its {INDEX} says stage {json.dumps(index.get('stage'))}"
        raise what(f"{folder} is not of the stage {stage}", found, f"make such a folder with: {made_by}")
    if found := schemas.faults(index):
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


def check_contents(folder: Path, index: dict, what: type[UserError], remedy: str, thorough: bool = False) -> None:
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
    present = {path.as_posix() for path in files if not (is_stray(path) or LOCKED.fullmatch(path.name))}
    return found + [f"{name}: extra, not in the index" for name in sorted(present - set(listed(index)) - {INDEX})]


def strays(folder: Path, index: dict) -> list[str]:
    """Names of files in a published folder that the system or an editor left there: no part of it, and harmless."""
    paths = (path.relative_to(folder) for path in Path(folder).rglob("*") if path.is_file())
    return sorted({path.as_posix() for path in paths if is_stray(path)} - set(listed(index)))


def within(folder: Path) -> list[Path]:
    """The published folders that lie in a published folder: what was derived from it later, with an index each."""
    return sorted(path.parent for path in Path(folder).glob(f"*/{INDEX}") if stage_of(path) is not None)


def index_faults(folder: Path, index: dict) -> list[str]:
    """What is wrong with the bytes of an index that says what it should: those of its record, or of white space."""
    same = (Path(folder) / INDEX).read_bytes() == as_json(index).encode()
    same = same and index.get(CHECKSUM) in (None, checksum(index))  # None: of an older index
    return [] if same else [f"{INDEX}: altered, its bytes are not those that were written"]


def checksum(index: dict) -> str:
    """SHA-256 of a whole index, what is recorded included."""
    return _sha256({key: value for key, value in index.items() if key != CHECKSUM})


def _sha256(value: object) -> str:
    """Of the canonical JSON."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def stage_of(index: Path) -> str | None:
    """The stage of the folder that `index` belongs to, "" if it is damaged; None: not an index of ours."""
    try:
        found = json.loads(index.read_text(encoding="utf-8"))
    except OSError:
        return None
    except (ValueError, RecursionError):
        return ""
    return found["stage"] if isinstance(found, dict) and {"stage", "fingerprint"} <= found.keys() else None
