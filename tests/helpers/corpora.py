"""Make small corpora in a test's folder, and read them."""

import bz2
import gzip
import lzma
from pathlib import Path

import pytest
import yaml
import zstandard

from pretrain.corpus import Skipped, open_corpus
from pretrain.errors import CorpusError

PACK = {
    "": bytes,
    ".gz": lambda data: gzip.compress(data, mtime=0),
    ".zst": zstandard.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}
LONG = "\n\n".join(f"Document {n} of {'many' * (n % 7)}: {n**5:x} 漢字." for n in range(4000))


def file(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return path


def recipe(folder: Path, *sources: dict, **keys) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"name": "made", "sources": list(sources), **keys}), encoding="utf-8")
    return path


def source(folder: Path, **keys) -> Path:
    """Write a recipe with one source named `s`."""
    return recipe(folder, {"name": "s", **keys})


def texts(path: Path) -> list[str]:
    return [document.text for document in open_corpus(path).documents()]


def places(path: Path) -> list[str]:
    return [document.where for document in open_corpus(path).documents()]


def skipped(path: Path) -> tuple[list[str], dict[str, dict[str, int]]]:
    """Return the texts, and by source and kind the number of records that were skipped."""
    found = Skipped()
    return [document.text for document in open_corpus(path).documents(skipped=found)], found.counts


def refused(path: Path) -> str:
    with pytest.raises(CorpusError) as error:
        texts(path)
    return str(error.value)
