"""The door to transformers and peft: it checks model folders, opens them, and keeps the libraries quiet.

A folder is checked before transformers sees it: it must be complete and unaltered, and it must not bring code. After it
is opened, faults that transformers ignores are errors here: missing weights, a missing tokenizer, and a tokenizer with
more tokens than the model has embeddings.
"""

import importlib
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

from pretrain.errors import PretrainError, TaskError
from pretrain.storage.index import CHECKSUM, INDEX, check_contents, digests, fingerprint, read_index

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# Keys of a config.json that name code in the folder or on a hub. A folder with such a key is not opened.
CODE = ("auto_map", "custom_pipelines", "auto_mapping")
ATTENTION = ("attn_implementation", "_attn_implementation")  # a value `owner/kernel` is code from a hub
OBJECTS = ("config.json", "generation_config.json", "tokenizer_config.json", "adapter_config.json")
LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers")
MAKE_AGAIN = "export it again, or copy it again from where it was made"


def library(name: str) -> ModuleType:
    """`transformers`, `peft` or `accelerate`. Raises TaskError when it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise TaskError(f"this stage needs {name}", f"found: {error}", "pip install '.[finetune]'") from None


def model_folder(folder: str) -> Path:
    """`folder` as a path. Raises TaskError unless it holds a complete model that brings no code."""
    path = Path(folder)
    try:
        there, found = path.is_dir(), (path / "config.json").is_file()
        adapter = (path / "adapter_config.json").is_file()
    except (OSError, ValueError) as error:  # no permission, a name that is too long, a NUL
        raise TaskError(f"{folder!r} cannot be opened", f"found: {error}", "set model to a local folder") from None
    if adapter:
        raise TaskError(
            f"{folder}: this folder holds an adapter, and a whole model is needed",
            "found: adapter_config.json",
            "merge it: open it as its README.md says, then merge_and_unload() and save_pretrained() to another folder",
        )
    if not found:
        raise TaskError(
            f"{folder}: it has no config.json" if there else f"{folder}: there is no such folder",
            "set model to a local Hugging Face folder",
            "make one with: python launch/export.py CONFIG.yaml",
        )
    for settings in sorted(path.glob("*config.json")):
        _refuse_code(settings)
    if not any(path.glob("*.safetensors")) and any(path.glob("*.bin")):
        raise TaskError(
            f"{folder}: the weights are pickles, which can run code when they are opened",
            "found: .bin files and no .safetensors",
            "convert them to safetensors where the model came from",
        )
    _check_layers(path)
    return path


def _check_layers(folder: Path) -> None:
    """Raise TaskError if config.json asks for more layers than the folder has tensors.

    transformers builds all layers before it reads the weights: with a damaged number it would never finish.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    found = {key: config[key] for key in LAYERS if isinstance(config.get(key), int)}
    tensors = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = file.read(size) if size < path.stat().st_size else b""
        tensors += header.count(b'"data_offsets"')
    for key, layers in found.items():
        if tensors and layers > tensors:
            raise TaskError(
                f"{folder}: config.json says more layers than the folder has weights",
                f"{key} = {layers:,}, and the safetensors files hold {tensors:,} tensors",
                MAKE_AGAIN,
            )


def _refuse_code(settings: Path) -> None:
    """Raise TaskError if a JSON file of settings cannot be read, or asks to run code of the folder or of a hub."""
    try:
        values = json.loads(settings.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        found = str(error).splitlines()[0][:200]
        raise TaskError(f"{settings} cannot be read as JSON", f"found: {found}", MAKE_AGAIN) from None
    if isinstance(values, list) and settings.name not in OBJECTS:
        return  # another program's file, such as the list of data sets in data_config.json
    if not isinstance(values, dict):
        raise TaskError(f"{settings} must be a JSON object", f"found: {str(values)[:80]}", MAKE_AGAIN)
    asks = [key for key in CODE if values.get(key)]
    asks += [key for key in ATTENTION if "/" in str(values.get(key, ""))]
    if asks:
        raise TaskError(
            f"{settings.parent}: this model asks to run code of its own, and such folders are not opened",
            f"{settings.name} has {asks[0]}: {str(values[asks[0]])[:120]}",
            "take a model of an architecture that transformers has itself",
        )


def must_differ(out: str, *read: str) -> None:
    """Raise ValueError, for a config's validator, if `out` is a folder that is read: publishing would replace it."""
    if Path(out).resolve() in [Path(folder).resolve() for folder in read]:
        raise ValueError(f"out = {out} would replace a folder that is read: choose another one")


def identity(folder: str) -> str:
    """The fingerprint of a model folder: from its index if our stages made it, else a hash of its files.

    Every byte is hashed, however large the folder is: a model with a flipped bit trains and answers without an error.
    transformers then reads the bytes from the file system's cache. Raises TaskError if the folder may not be opened, or
    if its files differ from its index.
    """
    path = model_folder(folder)
    if _is_ours(path / INDEX):
        index = read_index(path, TaskError, "python launch/export.py CONFIG.yaml")
        check_contents(path, index, TaskError, MAKE_AGAIN, thorough=True)
        return index["fingerprint"]
    return fingerprint({"files": digests(path)})


class _AutoClass(Protocol):
    """A class of transformers such as AutoTokenizer, which chooses a class for the folder that it opens."""

    def from_pretrained(self, folder: str, **options: Any) -> Any: ...


def open_config(folder: str, **changes: Any) -> "PretrainedConfig":
    """The folder's configuration, with `changes` laid over it."""
    return _opened("configuration", folder, library("transformers").AutoConfig, **changes)


def open_model(
    folder: str, auto: _AutoClass, may_be_new: Callable[[str, "PreTrainedModel"], bool], **options: Any
) -> tuple["PreTrainedModel", set[str], dict[str, tuple]]:
    """Open the folder as a model of the class that `auto` chooses.

    Returns the model, the names of the weights that the folder lacks, and {name: shape} of the weights that it has in
    another shape. These weights start at random. `may_be_new(name, model)` decides which weights may do so. Raises
    TaskError for any other weight that the folder lacks or has in another shape.
    """
    model, info = _opened(
        "model", folder, auto,
        use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True, **options,
    )  # fmt: skip
    shapes = {name: tuple(shape) for name, shape, _ in info["mismatched_keys"]}
    new = {name for name in [*info["missing_keys"], *shapes] if may_be_new(name, model)}
    for problem, names in (("missing", info["missing_keys"]), ("of another shape than config.json says", shapes)):
        if lacking := sorted(set(names) - new):
            raise TaskError(
                "the folder lacks weights of its model, which would start at random",
                f"{folder} as {type(model).__name__}: {len(lacking)} {problem}, the first is {lacking[0]}",
                MAKE_AGAIN,
            )
    return model, set(info["missing_keys"]) & new, {name: shapes[name] for name in shapes if name in new}


def open_tokenizer(folder: str, config: "PretrainedConfig") -> "PreTrainedTokenizerBase":
    """The folder's tokenizer. Raises TaskError if the folder has none, or that of another model."""
    tokenizer = _opened("tokenizer", folder, library("transformers").AutoTokenizer)
    vocabulary = tokenizer.get_vocab()
    # If the files are missing, transformers 5 gives an empty tokenizer.
    if len(vocabulary) <= len(set(tokenizer.all_special_tokens)):
        found = f"transformers finds {len(vocabulary)} tokens there"
        raise TaskError(f"{folder} has no tokenizer", found, f"copy the tokenizer's files into it, or {MAKE_AGAIN}")
    largest, rows = max(vocabulary.values()), getattr(config.get_text_config(), "vocab_size", None)
    if rows is not None and largest >= rows:
        raise TaskError(
            f"{folder} has the tokenizer of another model",
            f"its ids go up to {largest:,}, the model has embeddings for {rows:,} tokens",
            f"put the model's own tokenizer there, or {MAKE_AGAIN}",
        )
    return tokenizer


def _opened(what: str, folder: str, auto: _AutoClass, **options: Any) -> Any:
    """`auto.from_pretrained(folder)`, without a download and without code from the folder.

    Raises TaskError with the message of transformers if it cannot open the folder.
    """
    with explained(f"transformers cannot open the {what} of {folder}"):
        return auto.from_pretrained(folder, trust_remote_code=False, local_files_only=True, **options)


@contextmanager
def explained(failure: str) -> Iterator[None]:
    """Turn every error that transformers raises inside into a TaskError that begins with `failure`.

    If a folder is damaged or was made elsewhere, transformers raises errors of every kind: KeyError, TypeError,
    AttributeError, SafetensorError and more.
    """
    try:
        yield
    except (PretrainError, MemoryError):
        raise
    except Exception as error:
        said = next(iter(str(error).strip().splitlines()), "")
        raise TaskError(failure, f"it says: {type(error).__name__}: {said[:300]}", MAKE_AGAIN) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the advice, load reports and progress bars of the libraries; our own messages say what matters."""
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
    """Whether our stages made the folder. A damaged index counts as ours, so that reading it raises an error."""
    try:
        found = json.loads(index.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    except (OSError, ValueError, RecursionError):
        return True
    return isinstance(found, dict) and bool({"stage", "fingerprint", CHECKSUM} & found.keys())
