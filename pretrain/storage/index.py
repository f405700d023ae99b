"""The index of a published folder, index.json: its files, its sources, and its fingerprint.

The index lists every file with its size and SHA-256. The fingerprint is the hash of the index without places, times
and versions. So the identity of a folder is known without hashing large files again.
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
SMALL = 256 << 20  # bytes of a folder up to which every opening hashes all files
CHECKSUM = "checksum"  # the key for the hash of the whole index, `recorded` included
DERIVED = ("words",)  # the stages with results inside the folder that they were made from
RECORDED = "recorded"  # the key for entries that are not part of the identity


def intact(path: Path) -> dict | None:
    """The index in a file, of any version; None if it was altered or damaged."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        whole = index["fingerprint"] == fingerprint(index) and index.get(CHECKSUM) in (None, checksum(index))
        return index if whole and isinstance(index.get(RECORDED, {}), dict) else None
    except (OSError, ValueError, RecursionError, TypeError, KeyError, AttributeError):
        return None


def digests(folder: Path, known: dict[str, dict] | None = None) -> dict[str, dict]:
    """The digest of every file below `folder` except its index, sorted by relative name. `known` digests are reused."""
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
    """Add the digests of `folder`'s files and the fingerprint to `index`, write it, and return it. Call it last.

    Files named in `recorded` hold places or times: they are checked like the others, but are not part of the identity.
    Files in `known` were hashed while they were written, and are not read again.
    """
    found = digests(folder, known)
    index = {**index, "files": {name: entry for name, entry in found.items() if name not in recorded}}
    if recorded:
        index[RECORDED] = {**index.get(RECORDED, {}), "files": {name: found[name] for name in recorded}}
    index["fingerprint"] = fingerprint(index)
    index[CHECKSUM] = checksum(index)
    write_json(folder / INDEX, index)
    return index


def read_index(folder: Path, error_type: type[UserError], made_by: str, stage: str | None = None) -> dict:
    """The index of a complete folder of `stage`, or of any stage if `stage` is None.

    schemas.py checks every key that is read later. Raises `error_type` if the index is missing, damaged, of another
    stage, or of a version that this one does not read.
    """
    path, again = Path(folder) / INDEX, f"make it again with: {made_by}"
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        state = "the folder is incomplete" if Path(folder).is_dir() else "there is no such folder"
        raise error_type(f"{folder}: {state}", f"looked for: {path}", f"make it with: {made_by}") from None
    except OSError as error:
        raise error_type(f"{path} cannot be read", str(error.strerror), "correct this, and start again") from None
    except (ValueError, RecursionError):
        raise error_type(f"{path} is damaged: not JSON", again) from None
    if not isinstance(index, dict) or not isinstance(index.get(RECORDED, {}), dict):
        raise error_type(f"{path} was altered: its fingerprint does not match", again)
    try:
        is_same = index.get("fingerprint") == fingerprint(index)
        is_same_record = index.get(CHECKSUM) in (None, checksum(index))  # None: an older index
    except UnicodeEncodeError as error:
        raise error_type(
            f"{path} is damaged: it has half of a surrogate pair", f"{error.object!a:.60}", again
        ) from None
    if not is_same:
        raise error_type(f"{path} was altered: its fingerprint does not match", again)
    if not is_same_record:
        raise error_type(f"{path} was altered: its checksum does not match", again)
    if other := schemas.unknown_format(index):
        raise error_type(f"{folder} was made by another version", f"{path}: {other}", f"take that version, or {again}")
    if stage and index.get("stage") != stage:
        found = f"its {INDEX} says stage {json.dumps(index.get('stage'))}"
        raise error_type(f"{folder} is not of the stage {stage}", found, f"make such a folder with: {made_by}")
    if wrong := schemas.faults(index):
        raise error_type(
            f"{path} is not error_type this version reads", *wrong, f"take the version that made it, or {again}"
        )
    return index


def listed(index: dict) -> dict[str, dict]:
    """Every file of a folder with its size and SHA-256, also files that are not part of the identity."""
    return {**index["files"], **index.get(RECORDED, {}).get("files", {})}


def check_sizes(folder: Path, index: dict, error_type: type[UserError]) -> None:
    """Raise `error_type` unless every listed file has its listed size.

    Every opening of a folder checks this. It costs one stat for each file.
    """
    for name, entry in listed(index).items():
        path = f"{folder}/{name}"  # with thousands of files, making a Path takes longer than the stat
        try:
            found = os.stat(path).st_size
        except OSError:
            found = None
        if found != entry["bytes"]:
            state = "is missing" if found is None else f"has {found:,} bytes, not {entry['bytes']:,}: truncated?"
            raise error_type(f"{path} {state}", "copy it again from where it was made, or rebuild the folder")


def check_contents(folder: Path, index: dict, error_type: type[UserError], remedy: str, thorough: bool = False) -> None:
    """Raise `error_type`, naming each file, if a file's size differs from the index.

    In a small folder (0.2 s), or if `thorough`, every byte is compared too.
    """
    check_sizes(folder, index, error_type)
    if thorough or sum(entry["bytes"] for entry in listed(index).values()) <= SMALL:
        found = faults(folder, index)
        if found:
            raise error_type(f"{folder} was altered after it was made", *found, remedy)


def faults(folder: Path, index: dict, advance: Callable[[int], None] = lambda files: None) -> list[str]:
    """A line for each file that differs from the index: its name and the difference. Every byte is hashed."""
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
    # A folder whose name begins with a dot belongs to a stage that is running or was killed: it is not extra either.
    inner = {path for place in [*within(folder), *unlisted, *Path(folder).glob(".*/")] for path in place.rglob("*")}
    files = (path.relative_to(folder) for path in Path(folder).rglob("*") if path.is_file() and path not in inner)
    present = {path.as_posix() for path in files if not (is_stray(path) or LOCKED.fullmatch(path.name))}
    return found + [f"{name}: extra, not in the index" for name in sorted(present - set(listed(index)) - {INDEX})]


def strays(folder: Path, index: dict) -> list[str]:
    """The names of harmless files that the system or an editor left in a published folder."""
    paths = (path.relative_to(folder) for path in Path(folder).rglob("*") if path.is_file())
    return sorted({path.as_posix() for path in paths if is_stray(path)} - set(listed(index)))


def within(folder: Path) -> list[Path]:
    """The published folders inside a published folder: results derived from it, each with an index of its own."""
    return sorted(path.parent for path in Path(folder).glob(f"*/{INDEX}") if stage_of(path) is not None)


def index_faults(folder: Path, index: dict) -> list[str]:
    """A line if the bytes of an index with a right fingerprint were altered: in its record or in its white space."""
    same = (Path(folder) / INDEX).read_bytes() == as_json(index).encode()
    same = same and index.get(CHECKSUM) in (None, checksum(index))  # None: an older index
    return [] if same else [f"{INDEX}: altered, its bytes differ from the bytes that were written"]


def checksum(index: dict) -> str:
    """The SHA-256 of a whole index, with `recorded`."""
    return _sha256({key: value for key, value in index.items() if key != CHECKSUM})


def _sha256(value: object) -> str:
    """The SHA-256 of a value's canonical JSON."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def stage_of(index: Path) -> str | None:
    """The stage named in the file `index`; "" if the file is damaged, None if it is not an index of ours."""
    try:
        found = json.loads(index.read_text(encoding="utf-8"))
    except OSError:
        return None
    except (ValueError, RecursionError):
        return ""
    return found["stage"] if isinstance(found, dict) and {"stage", "fingerprint"} <= found.keys() else None
