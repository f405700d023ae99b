"""From what a recipe names to files: patterns and folders, what is passed over in them, and the format of each file."""

import glob
import json
import os
from fnmatch import fnmatchcase
from pathlib import Path

from pretrain.corpus.compressed import SUFFIXES
from pretrain.errors import CorpusError

FORMATS = {
    "txt": (".txt",),
    "jsonl": (".jsonl", ".json", ".ndjson"),
    "parquet": (".parquet",),
    "arrow": (".arrow",),
}
# In folders and for patterns, beside names that begin with a dot: what other programs leave beside text, and say of it.
PASSED_OVER = (
    "_*",  # _SUCCESS, _metadata of Spark
    "README*",
    "LICENSE*",
    "recipe.yaml",
    "index.json",
    "state.json",  # this and the next ones: of `datasets`
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "cache-*.arrow",
)
TEXT_SUFFIXES = ("txt", "jsonl")  # the formats that may be compressed


def expand(names: list[str], root: Path, source: str) -> list[str]:
    """The files that a source's `names` stand for, relative to `root`, in the order of the names.

    A name is a file, a pattern (`*`, `?`, `[…]`, `**` for folders of any depth) or a folder, which is all that is
    in it. Patterns and folders are sorted by code point, so that the order is the same on every machine.

    Raises CorpusError for a name that stands for nothing, and for a file that comes twice.
    """
    found = [file for name in names for file in _expand(name, root, source)]
    first: dict[str, str] = {}
    for file in found:
        real = os.path.realpath(root / file)
        if real in first:
            said = f"{root / file}, of source {source!r}" + (f", is {first[real]}" if first[real] != file else "")
            raise CorpusError("a file comes twice in a source", said, "name it once")
        first[real] = file
    return found


def format_of(path: Path) -> str:
    """One of FORMATS, from the file's name."""
    packed = path.suffix in SUFFIXES
    suffix = Path(path.stem).suffix if packed else path.suffix
    for form, suffixes in FORMATS.items():
        if suffix in suffixes and (form in TEXT_SUFFIXES or not packed):
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
    matches = glob.glob(name, root_dir=root, recursive=True)
    found = sorted({match for match in matches if not (root / match).is_dir() and not _passed_over(match)})
    if not found:
        remedy = "a pattern is relative to the recipe; folders of any depth are **"
        raise CorpusError("no text file matches a pattern", f"{path}, of source {source!r}", remedy)
    return found


def _folder(name: str, root: Path, source: str) -> list[str]:
    """All files below a folder; of one that `datasets` saved, those that it lists."""
    path = root / name
    splits, state = saved(path, "dataset_dict.json"), saved(path, "state.json")
    if splits:
        remedy = f"name one of them: {', '.join(str(Path(name) / split) for split in splits['splits'])}"
        raise CorpusError("a saved dataset has several splits", f"{path}, of source {source!r}", remedy)
    if state:
        return [str(Path(name) / file["filename"]) for file in state["_data_files"]]
    inside = glob.glob("**/*", root_dir=path, recursive=True)
    found = sorted(str(Path(name) / file) for file in inside if not (path / file).is_dir() and not _passed_over(file))
    if not found:
        raise CorpusError("a folder holds no text", f"{path}, of source {source!r}", "name another one")
    return found


def saved(folder: Path, name: str) -> dict | None:
    """What `datasets.save_to_disk` wrote in a folder: dataset_dict.json of several splits, state.json of one."""
    try:
        found = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CorpusError("a saved dataset is damaged", f"{folder / name}: {error}", "save it again") from None
    return found if {"splits", "_data_files"} & found.keys() else None


def _passed_over(file: str) -> bool:
    return any(fnmatchcase(Path(file).name, pattern) for pattern in PASSED_OVER)
