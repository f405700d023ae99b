"""Whatever the library `datasets` loads by name: from the Hugging Face hub, streamed, or from a folder here."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pretrain.config import Config
from pretrain.corpus.chunks import FilePart
from pretrain.corpus.files import saved
from pretrain.errors import CorpusError


class HubDataset(Config):
    name: str  # of the hub, "org/name"; or a folder, relative to the recipe
    config: str | None = None
    split: str = "train"
    revision: str | None = None  # of the hub: a commit, tag or branch; default: what is newest when the work begins


@dataclass(frozen=True)
class Resolved:
    """A dataset as it is read: of the hub at one commit, of a folder from certain files."""

    dataset: HubDataset
    path: str  # what `datasets` calls it
    revision: str | None  # the commit
    files: list[Path]

    def identity(self) -> dict:
        found = {"config": self.dataset.config, "split": self.dataset.split}
        return {**found, "name": self.path, "revision": self.revision} if self.revision else found


def saved_folder(dataset: HubDataset, root: Path) -> str | None:
    """The folder below `root` where `save_to_disk` put the split, or None if the name is not of such a folder."""
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
    if splits or state:
        raise _no_split(dataset.split, splits["splits"] if splits else [state.get("_split")], folder)
    return None


def resolve(dataset: HubDataset, root: Path) -> Resolved:
    """What a dataset is at this moment. Raises CorpusError if there is none, or the hub cannot be reached."""
    folder = root / dataset.name
    if not folder.is_dir():
        return Resolved(dataset, dataset.name, _commit(dataset), [])
    from datasets import load_dataset_builder

    try:
        found = load_dataset_builder(str(folder), dataset.config).config.data_files
    except Exception as error:  # of the library, and of those it calls
        raise _refusal(str(folder), error) from None
    if dataset.split not in found:
        raise _no_split(dataset.split, found, folder)
    return Resolved(dataset, str(folder), None, [Path(name) for name in found[dataset.split]])


def parts_of(resolved: Resolved, field: str, size: int) -> Iterator[FilePart]:
    """The split in parts of at most about `size` bytes. Raises CorpusError for what cannot be loaded.

    Memory: what `datasets` holds to stream it, and tables.ROWS rows.
    """
    from pretrain.corpus.tables import column, cut

    label = f"{resolved.dataset.name} ({resolved.dataset.split})"

    def batches():
        for table in _stream(resolved):
            batches = table.select([column(table.column_names, field, label)]).to_batches()
            yield from ((batch, 0) for batch in batches)  # of a stream nobody knows how long it is

    return cut(batches(), label, size)


def _stream(resolved: Resolved) -> Iterator:
    """pyarrow tables of a few rows."""
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
    remedy = "check the name, the split and the network; HF_ENDPOINT names a mirror, HF_TOKEN opens what is gated"
    return CorpusError(f"the dataset {name} cannot be read", f"{type(error).__name__}: {said}", remedy)
