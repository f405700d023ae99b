"""Find the files of a source: expand patterns and folders, pass over files that are no text, tell the formats."""

import errno
import glob
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from itertools import takewhile
from pathlib import Path

from pretrain.corpus.compressed import SUFFIXES
from pretrain.errors import CorpusError
from pretrain.storage.index import within

FORMATS = {
    "txt": (".txt",),
    "jsonl": (".jsonl", ".json", ".ndjson"),
    "parquet": (".parquet",),
    "arrow": (".arrow",),
}
# Files that folders and patterns pass over, besides hidden ones: other programs write them beside text.
PASSED_OVER = (
    "_*",  # _SUCCESS, _metadata of Spark
    "README*",
    "LICENSE*",
    "recipe.yaml",
    "index.json",
    "state.json",  # this and the following ones belong to `datasets`
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "cache-*.arrow",
)
TEXT_SUFFIXES = ("txt", "jsonl")  # the formats that may be compressed


def expand(names: list[str], root: Path, source: str) -> list[str]:
    """The files that a source's `names` stand for, relative to `root`, in the order of the names.

    A name is a file, a pattern (`*`, `?`, `[…]`, `**` for folders of any depth) or a folder, which stands for all files
    in it. The files of a pattern or folder are sorted by code point, so the order is the same on every machine.
    Symbolic links are followed. A folder that several links reach is entered once, so loops of links end.

    Raises CorpusError for a name without files, a file that comes twice, a folder of a stage that is not itself one of
    the `names`, and a file name that is not Unicode, because the stages write file names into their output.
    """
    found = [file for name in names for file in _expand(name, root, source)]
    _check_written(found, [_beginning(name) for name in names], root, source)
    first: dict[str, str] = {}
    for file in found:
        if not file.isascii() and not _is_unicode(file):
            raise CorpusError("a file's name is not valid UTF-8", ascii(str(root / file)), "rename the file")
        real = os.path.realpath(root / file)
        if real in first:
            said = f"{root / file}, of source {source!r}" + (f", is {first[real]}" if first[real] != file else "")
            raise CorpusError("a file comes twice in a source", said, "name it once")
        first[real] = file
    return found


def format_of(path: Path) -> str:
    """The format of a file, a key of FORMATS, by its name in any case. Raises CorpusError if the name does not tell."""
    packed = path.suffix.lower() in SUFFIXES
    suffix = Path(path.stem).suffix if packed else path.suffix
    for form, suffixes in FORMATS.items():
        if suffix.lower() in suffixes and (form in TEXT_SUFFIXES or not packed):
            return form
    remedy = f"set format: to one of {', '.join(FORMATS)}, or name only the files to be read (folder/**/*.txt)"
    raise CorpusError("cannot tell the format from the file's name", str(path), remedy)


def _expand(name: str, root: Path, source: str) -> list[str]:
    path = root / name
    if path.is_file():
        return [name]
    if path.is_dir():
        return _folder(name, root, source)
    if not glob.has_magic(name):
        remedy = "a recipe names its files relative to itself"
        raise CorpusError("no such text file", f"{path}, of source {source!r}", remedy)
    matches = _matches(name, root) if "**" in Path(name).parts else glob.glob(name, root_dir=root)
    found = sorted({match for match in matches if not (root / match).is_dir() and not _passed_over(match)})
    if not found:
        remedy = "a pattern is relative to the recipe; folders of any depth are **"
        raise CorpusError("no text file matches a pattern", f"{path}, of source {source!r}", remedy)
    return found


def _matches(name: str, root: Path) -> list[str]:
    """The paths that match a pattern with `**`. `glob.glob` finds the same, but follows a loop of links forever."""
    found = [_beginning(name)]
    rest = Path(name).parts[len(found[0].parts) :]
    for part in rest:
        if part == "**":
            walked = list(_walk(found, root))
            found = [folder for folder, _ in walked]
        else:
            found = [folder / entry for folder in found for entry in glob.glob(part, root_dir=root / folder)]
    if rest[-1] == "**":
        found = [folder / file for folder, files in walked for file in files]
    return [str(path) for path in found]


def _beginning(name: str) -> Path:
    """The folders of a name before its first part with a pattern."""
    return Path(*takewhile(lambda part: not glob.has_magic(part), Path(name).parts))


def _check_written(files: list[str], named: list[Path], root: Path, source: str) -> None:
    """Raise CorpusError if files lie in a folder that a stage published, unless the recipe names this folder.

    A cleaned corpus that lies beside its original, for instance, would be read as well: every document would come
    twice, and a changed document might be on the other side.
    """
    folders = {root / Path(file).parent for file in files}
    folders -= {root / place for name in named for place in (name, name.parent)}
    for above in sorted({folder.parent for folder in folders}):
        for folder in filter(folders.__contains__, within(above)):
            remedy = "move it elsewhere, or name the files and folders that are text"
            raise CorpusError("a source would read the output of a stage", f"{folder}, of source {source!r}", remedy)


def _folder(name: str, root: Path, source: str) -> list[str]:
    """All files below a folder. For a folder that `datasets` saved, the files that it lists."""
    path = root / name
    splits, state = saved(path, "dataset_dict.json"), saved(path, "state.json")
    if splits:
        remedy = f"name one of them: {', '.join(str(Path(name) / split) for split in splits['splits'])}"
        raise CorpusError("a saved dataset has several splits", f"{path}, of source {source!r}", remedy)
    if state:
        return [str(Path(name) / file["filename"]) for file in state["_data_files"]]
    found = sorted(
        str(at / file) for at, files in _walk([Path(name)], root) for file in files if not _passed_over(file)
    )
    if not found:
        raise CorpusError("a folder holds no text", f"{path}, of source {source!r}", "name another one")
    return found


def _walk(folders: list[Path], root: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yield `folders` (relative to `root`) and all folders below them, each with the names of its files.

    Hidden files and folders are left out. Every folder is entered once: by its own path if no link is needed to reach
    it, otherwise by the first link. Raises OSError for a folder without permission to read.
    """
    entered: set[str] = set()
    while folders:
        links = []
        for begin in sorted(folders):
            below = [(begin, os.path.realpath(root / begin))]
            while below:
                folder, real = below.pop()
                if real in entered:
                    continue
                entered.add(real)
                files = []
                for entry in _entries(root / folder):
                    if not os.path.isdir(entry.path):  # entry.is_dir() raises for a link to itself
                        files.append(entry.name)
                    elif entry.is_symlink():
                        links.append(folder / entry.name)
                    else:
                        below.append((folder / entry.name, os.path.join(real, entry.name)))
                yield folder, files
        folders = links


def _entries(folder: Path) -> list[os.DirEntry]:
    """The entries of a folder that are not hidden; an empty list if there is no such folder."""
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return []
        raise


@contextmanager
def reached(source: str) -> Iterator[None]:
    """Turn an OSError inside, such as a missing permission, into a CorpusError that names the source."""
    try:
        yield
    except OSError as error:
        where = f"{error.filename}, of source {source!r}: {error.strerror}"
        raise CorpusError("cannot read a text file", where, "change its permissions, or name another one") from None


def saved(folder: Path, name: str) -> dict | None:
    """Read the file `name` of `datasets.save_to_disk`: dataset_dict.json of several splits, or state.json of one.

    None if there is no such file, or another program wrote it.
    """
    try:
        found = json.loads((folder / name).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, RecursionError) as error:
        raise CorpusError("a saved dataset is damaged", f"{folder / name}: {error}", "save it again") from None
    if not isinstance(found, dict) or not {"splits", "_data_files"} & found.keys():
        return None
    splits, files = found.get("splits", []), found.get("_data_files", [])
    named = isinstance(files, list) and all(isinstance(f, dict) and _is_name(f.get("filename")) for f in files)
    if not named or not isinstance(splits, list) or not all(map(_is_name, splits)):
        raise CorpusError("a saved dataset is damaged", f"{folder / name} does not name its files", "save it again")
    return found


def _is_name(value: object) -> bool:
    """Whether the value can be a file's name."""
    return isinstance(value, str) and "\0" not in value and _is_unicode(value)


def _is_unicode(name: str) -> bool:
    try:
        return bool(name.encode())
    except UnicodeEncodeError:
        return False


def _passed_over(file: str) -> bool:
    return any(fnmatchcase(Path(file).name, pattern) for pattern in PASSED_OVER)
