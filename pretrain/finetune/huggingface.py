"""The door to transformers: the one place that imports it, opens a folder with it, and keeps it quiet."""

import importlib
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from pretrain import folders
from pretrain.errors import TaskError


def library(name: str) -> ModuleType:
    """`transformers`, `peft` or `accelerate`. Raises TaskError when it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise TaskError(f"fine-tuning needs {name}", f"found: {error}", "needs: pip install '.[finetune]'") from None


def model_folder(folder: str) -> Path:
    """`folder` as a path. Raises TaskError when no model is there."""
    path = Path(folder)
    if not (path / "config.json").is_file():
        state = "it has no config.json" if path.is_dir() else "there is no such folder"
        raise TaskError(
            f"{folder}: {state}",
            "model = names a local Hugging Face folder",
            "make one with: python launch/export.py CONFIG.yaml",
        )
    return path


def must_differ(out: str, *read: str) -> None:
    """Publishing replaces `out`. Raises ValueError, for a config's validator, when it is one of the folders read."""
    if Path(out).resolve() in [Path(folder).resolve() for folder in read]:
        raise ValueError(f"out = {out} would replace what is read: choose another folder")


def identity(folder: str) -> str:
    """The fingerprint of a model folder: what our export wrote in its index, of other origin the hash of its files.

    Raises TaskError when the files are not those of the index.
    """
    path = model_folder(folder)
    if _is_ours(path / folders.INDEX):
        index = folders.read_index(path, TaskError, "python launch/export.py CONFIG.yaml")
        folders.check_sizes(path, index, TaskError)
        return index["fingerprint"]
    return folders.fingerprint({"files": folders.digests(path)})


def opened(what: str, folder: str, opening: Callable[..., Any], **options: Any) -> Any:
    """`opening(folder, **options)`. Raises TaskError with what transformers says when it cannot."""
    from safetensors import SafetensorError

    try:
        return opening(folder, **options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        said = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise TaskError(f"transformers cannot open the {what} of {folder}", f"it says: {said[:300]}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Without the libraries' advice, load reports and bars: what matters of it is said by us."""
    transformers = library("transformers")
    verbosity, bars = transformers.logging.get_verbosity(), transformers.utils.logging.is_progress_bar_enabled()
    disabled = logging.root.manager.disable
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.utils.logging.enable_progress_bar()


def _is_ours(index: Path) -> bool:
    try:
        return "fingerprint" in json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False
