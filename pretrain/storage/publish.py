"""Publish the result of a stage: the files are written in a temporary folder, which one rename gives its final name.

So a folder with its final name is complete, whenever the process or the machine ends. Beside a folder NAME there may be
`.NAME.tmp` (the result in the making), `.NAME.old` (the result that it replaces) and `.NAME.work` (see work.py).
"""

import contextlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.errors import PretrainError, UserError, refusal
from pretrain.storage import schemas
from pretrain.storage.files import is_used, write_json
from pretrain.storage.index import CHECKSUM, DERIVED, INDEX, RECORDED, checksum, intact, stage_of
from pretrain.storage.locks import is_mounted, locked, was_locked

if TYPE_CHECKING:
    from pretrain.config import StageConfig

SETTINGS = "settings"  # the key under `recorded` with the settings of a stage


@contextmanager
def publish(
    folder: Path, stage: str, error_type: type[UserError] = UserError, config: "StageConfig | None" = None
) -> Iterator[Path]:
    """Yield an empty folder beside `folder`. On success it takes `folder`'s name; on failure it is deleted.

    Raises `error_type`, before any work, if `folder`

    - holds anything but an earlier result of the same stage,
    - holds a result that was made with other settings than `config`, unless `config.replace`,
    - lies in a published folder, which it would alter,
    - is being made by another process.

    The settings are recorded in the index, outside of its identity.
    """
    try:
        folder = Path(folder).resolve() if os.path.islink(folder) else Path(folder)  # the link stays
    except (OSError, RuntimeError):  # a loop, by version of Python
        found = f"{folder} is a link that leads to itself"
        raise error_type("the output folder cannot be made", found, "choose another out=") from None
    try:
        check_output(folder, error_type, derived=stage in DERIVED)
        _check_replaceable(folder, stage, error_type, config)
    except error_type:
        if not was_locked(folder):
            raise
        # Another process may have renamed the folder between two looks of a check: the checks under the lock decide.
    with locked(folder, stage, error_type):
        aside = folder.with_name(f".{folder.name}.tmp")  # always this name, so the next run finds and deletes it
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            _restore(folder)
            check_output(folder, error_type, derived=stage in DERIVED)
            _check_replaceable(folder, stage, error_type, config)
            for left in (aside, *_olds(folder)):  # by killed processes
                shutil.rmtree(left, ignore_errors=True)
            aside.mkdir()
        except OSError as error:
            found = f"{error.filename}: {error.strerror}"
            raise error_type("the output folder cannot be made", found, "choose another out=") from None
        try:
            yield aside
            assert stage_of(aside / INDEX) == stage, f"{aside} was published without an index of stage {stage}"
            if config is not None:
                _record_settings(aside, config.settings())
            _sync(aside)
            _take_name(aside, folder, error_type)
            # A worker of a killed run may still be writing there.
            shutil.rmtree(work_folder(folder), ignore_errors=True)
        except Exception as error:  # not only OSError: safetensors and NumPy wrap the system's errors
            if isinstance(error, PretrainError) or (refused := refusal(error, f"{folder} was not written")) is None:
                raise
            raise error_type(*refused) from None
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def _check_replaceable(folder: Path, stage: str, error_type: type[UserError], config: "StageConfig | None") -> None:
    """Raise `error_type` if `folder` cannot be replaced, or holds anything but an earlier result of `stage`."""
    if folder.parent.exists() and not os.access(folder.parent, os.W_OK | os.X_OK):
        found = f"no permission to write in {folder.parent}"
        raise error_type("the output folder cannot be made", found, "choose another out=")
    if is_mounted(folder):
        remedy = f"choose a folder inside of it, such as out={folder / stage}"
        raise error_type("the output folder is a mount point, which cannot be replaced", str(folder), remedy)
    held = stage_of(folder / INDEX)
    if held not in (stage, "") and _has_files(folder):
        found = f"the result of stage {held}" if held else f"files but no {INDEX} of ours"
        raise error_type("the output folder holds something else", f"{folder} has {found}", "choose another out=")
    if held is not None and config is not None and not config.replace:
        _check_settings(folder, stage, error_type, config)


def _has_files(folder: Path) -> bool:
    """Whether `folder` has files of a user, or cannot be looked into."""
    try:
        return is_used(folder)
    except FileNotFoundError:
        return False
    except PermissionError:
        return True


def _check_settings(folder: Path, stage: str, error_type: type[UserError], config: "StageConfig") -> None:
    """Raise `error_type`, naming each setting, if the result of `stage` in `folder` was made with other settings."""
    remedy = "choose another out=, or set replace=true, which deletes the earlier result"
    index = intact(folder / INDEX)
    if index is None:  # damaged: making it again is the remedy
        return
    if other := schemas.unknown_format(index):
        raise error_type(f"{folder} was made by another version", other, remedy)
    settings = index.get(RECORDED, {}).get(SETTINGS)
    lines = config.differences(settings if isinstance(settings, dict) else _older_settings(index, config))
    if lines:
        raise error_type(f"{folder} holds a result of stage {stage} that was made with other settings", *lines, remedy)


def _older_settings(index: dict, config: "StageConfig") -> dict:
    """The settings found in the index of an older version. All other settings are assumed to be the same."""
    said = {**index, **index.get(RECORDED, {})}
    now = config.settings()
    return {key: said[key] if type(said.get(key)) is type(new) else new for key, new in now.items()}


def _record_settings(folder: Path, settings: dict) -> None:
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    index[RECORDED] = {**index.get(RECORDED, {}), SETTINGS: settings}
    index[CHECKSUM] = checksum(index)
    write_json(folder / INDEX, index)


def _restore(folder: Path) -> None:
    """Give the earlier result its name back if a process was killed between its two renames.

    This process must hold the lock of `folder`.
    """
    for old in _olds(folder):
        if not folder.exists() and stage_of(old / INDEX):
            old.rename(folder)


def _take_name(aside: Path, folder: Path, error_type: type[UserError]) -> None:
    """Rename `aside` to `folder`, and delete the earlier folder of that name if the system permits it.

    If the rename fails, the result gets another name beside it, so that its work is not lost.
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
        raise error_type("the output folder cannot be replaced", found, f"the new result is in {saved}") from None
    if old:
        try:
            shutil.rmtree(old)
        except OSError as error:  # on NFS while another process has a file of it open
            state = f"could not be removed ({error.strerror}): is one of its files in use?"
            print(f"note: {folder} is published; the result that it replaces, {old}, {state}", file=sys.stderr)


def _old_names(folder: Path) -> Iterator[Path]:
    """Successive names beside `folder` for the folder that it replaces: `.NAME.old`, `.NAME.old2` …"""
    return (folder.with_name(f".{folder.name}.old{number if number > 1 else ''}") for number in count(1))


def _olds(folder: Path) -> list[Path]:
    name = re.compile(re.escape(f".{folder.name}.old") + r"\d*")
    return sorted(path for path in folder.parent.iterdir() if name.fullmatch(path.name))


def check_output(folder: Path, error_type: type[UserError] = UserError, derived: bool = False) -> None:
    """Raise `error_type` if `folder` cannot be made or must not be made there.

    Its name may be invalid. It, or a folder above it, may be a file or not writable. It may lie in a published folder.
    Only a result `derived` from a published folder may lie in that folder.
    """
    folder, remedy = Path(folder), "choose another out="
    try:
        # Look up the longest names that will be made beside it and in it: too long a name fails before any work.
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(folder.absolute().with_name(f".{folder.absolute().name}.old999") / ("x" * 64))
        above = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        outer = () if derived else folder.resolve().parents
        held = next(((path, stage) for path in outer if (stage := stage_of(path / INDEX))), None)
    except (OSError, ValueError) as error:  # no permission to look, a name that is too long, a NUL
        found = getattr(error, "strerror", None) or str(error)
        raise error_type("the output folder cannot be made", f"{str(folder)!r:.200}: {found}", remedy) from None
    if not above.is_dir():
        raise error_type("the output folder cannot be made", f"{above} is a file", remedy)
    if not os.access(above, os.W_OK | os.X_OK):
        raise error_type("the output folder cannot be made", f"no permission to write in {above}", remedy)
    if held:
        found = f"{folder} is in {held[0]}, the result of stage {held[1]}"
        raise error_type("the output folder lies in a published folder", found, remedy)


def work_folder(folder: Path) -> Path:
    """The folder where a stage keeps its finished work until `folder` is published."""
    folder = folder.resolve() if folder.is_symlink() else folder.absolute()  # other machines have another cwd
    return folder.with_name(f".{folder.name}.work")


def _sync(folder: Path) -> None:
    """Write everything through to the disk, with the permissions of the umask (safetensors makes its files private)."""
    os.umask(mask := os.umask(0o022))
    for path in [*folder.rglob("*"), folder]:
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
