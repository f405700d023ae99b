"""Datasets that the library `datasets` loads by name: streamed from the Hugging Face hub, or from a local folder."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.config import Config
from pretrain.corpus.chunks import FilePart
from pretrain.corpus.files import saved
from pretrain.errors import CorpusError


class HubDataset(Config):
    """A dataset that the library `datasets` loads by its name."""

    name: str
    """The name on the hub, `org/name`, or a folder relative to the recipe."""
    config: str | None = None
    """The configuration (subset) of the dataset, if it has several."""
    split: str = "train"
    """The split of the dataset."""
    revision: str | None = None
    """A commit, tag or branch on the hub; null: the newest commit when the work begins."""


@dataclass(frozen=True)
class Resolved:
    """A dataset with everything fixed: a commit on the hub, or the files in a folder."""

    dataset: HubDataset
    path: str  # its name for `datasets`
    revision: str | None  # the commit on the hub
    files: list[Path]  # of a dataset in a folder; empty for a dataset on the hub

    def identity(self) -> dict:
        """The keys that identify the dataset in a fingerprint. A folder is identified by its files in addition."""
        found = {"config": self.dataset.config, "split": self.dataset.split}
        return {**found, "name": self.path, "revision": self.revision} if self.revision else found


def saved_folder(dataset: HubDataset, root: Path) -> str | None:
    """The folder below `root` where `save_to_disk` put the split; None if the name is no such folder."""
    folder = root / dataset.name
    splits, state = saved(folder, "dataset_dict.json"), saved(folder, "state.json")
    if folder.is_dir() and dataset.revision:
        raise CorpusError("a folder has no revisions", str(folder), "remove revision:, or name a dataset of the hub")
    if (splits or state) and dataset.config:
        raise CorpusError("a saved dataset has no configs", str(folder), "remove config:")
    if splits and dataset.split in splits["splits"]:
        return str(Path(dataset.name) / dataset.split)
    if state and state.get("_split") in (None, dataset.split):
        return dataset.name
    if splits:
        raise _no_split(dataset.split, splits["splits"], folder)
    if state:
        raise _no_split(dataset.split, [str(state.get("_split"))], folder)
    return None


def resolve(dataset: HubDataset, root: Path) -> Resolved:
    """Find the newest commit or the files of a dataset. Raises CorpusError if there is none, or no connection."""
    folder = root / dataset.name
    if not folder.is_dir():
        return Resolved(dataset, dataset.name, _commit(dataset), [])
    from datasets import load_dataset_builder

    try:
        found = load_dataset_builder(str(folder), dataset.config).config.data_files
    except Exception as error:  # `datasets` passes on errors of many other libraries
        raise _refusal(str(folder), error) from None
    if dataset.split not in found:
        raise _no_split(dataset.split, found, folder)
    return Resolved(dataset, str(folder), None, [Path(name) for name in found[dataset.split]])


def parts_of(resolved: Resolved, fields: tuple[str, ...], size: int) -> Iterator[FilePart]:
    """Cut the split into parts of at most about `size` bytes. Raises CorpusError if it cannot be loaded.

    Memory: tables.ROWS rows, and the buffers of `datasets`.
    """
    from pretrain.corpus.tables import columns, cut

    label = f"{resolved.dataset.name} ({resolved.dataset.split})"

    def batches() -> Iterator[tuple[Any, int]]:
        for table in _stream(resolved):
            batches = table.select(columns(table.column_names, fields, label)).to_batches()
            yield from ((batch, 0) for batch in batches)  # the length of a stream is not known

    return cut(batches(), label, size)


def _stream(resolved: Resolved) -> Iterator:
    """Stream the split as pyarrow tables of a few rows."""
    from datasets import load_dataset

    from pretrain.corpus.tables import ROWS

    name, config, split = resolved.path, resolved.dataset.config, resolved.dataset.split
    try:
        rows = load_dataset(name, config, split=split, revision=resolved.revision, streaming=True)
        yield from rows.with_format("arrow").iter(ROWS)
    except Exception as error:
        raise _refusal(name, error) from None


def _commit(dataset: HubDataset) -> str:
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(dataset.name, revision=dataset.revision, timeout=30).sha
    except Exception as error:
        raise _refusal(dataset.name, error) from None


def _no_split(split: str, splits: Iterable[str], folder: Path) -> CorpusError:
    found = f"its splits: {', '.join(map(str, splits))}"
    return CorpusError(f"a dataset has no split {split!r}", str(folder), found, "set split: in the recipe")


def _refusal(name: str, error: Exception) -> CorpusError:
    said = next(iter(str(error).splitlines()), "")
    remedy = "check the name, the split and the network; HF_ENDPOINT names a mirror, HF_TOKEN opens gated datasets"
    return CorpusError(f"the dataset {name} cannot be read", f"{type(error).__name__}: {said}", remedy)
