"""An index with a right fingerprint that this version cannot read gives an error at every opening."""

import copy
import json
import shutil

import pytest

from pretrain import cleaning
from pretrain.corpus import open_corpus
from pretrain.errors import UserError
from pretrain.shards import Shards
from pretrain.storage.index import checksum, fingerprint
from pretrain.tokenizer import open_tokenizer
from pretrain.tools import check_files

WRONG = [None, -1, 2**80, "\ud800", "../x", [], {"a": {"b": []}}]


def signed(folder, index: dict) -> None:
    """Write the index with a right fingerprint and checksum, as another release or a tool does."""
    path = folder / "index.json"
    try:
        index = {**index, "fingerprint": fingerprint(index)}
        index = {**index, "checksum": checksum(index)}
    except (UnicodeEncodeError, AttributeError, TypeError):  # such an index cannot have a fingerprint
        pass
    path.write_text(json.dumps(index))


def changed(index: dict) -> list[dict]:
    """Copies of an index, each with one key missing or of another type, at any depth."""
    found = []

    def walk(value, path: tuple) -> None:
        items = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
        for key, inner in list(items):
            if (*path, key) in (("fingerprint",), ("checksum",)):
                continue
            for wrong in ("missing", *WRONG):
                other = copy.deepcopy(index)
                place = other
                for step in path:
                    place = place[step]
                if wrong == "missing":
                    del place[key]
                else:
                    place[key] = wrong
                found.append(other)
            if len(path) < 3:
                walk(inner, (*path, key))

    walk(index, ())
    return found


def cleaned(folder) -> None:
    """Read every key that is read from the index of a cleaned corpus."""
    corpus = open_corpus(folder)
    corpus.shares.show(corpus.meant)


READERS = {
    "tokenizer": [open_tokenizer],
    "shards": [Shards, lambda path: Shards(path, "heldout").origin(0)],
    "clean": [cleaned],
}


@pytest.mark.parametrize("stage", READERS)
def test_no_structure_of_an_index_gives_a_traceback(prepared, tmp_path, stage, capsys):
    folder = tmp_path / stage
    if stage == "clean":
        cleaning.run(cleaning.CleanConfig(corpus=str(prepared.corpus), out=str(folder), plot=False))
    else:
        shutil.copytree({"tokenizer": prepared.tokenizer, "shards": prepared.shards}[stage]["bert"], folder)
    opened = READERS[stage]
    index = json.loads((folder / "index.json").read_text())
    others = changed(index)
    assert len(others) > 300
    refused = 0
    for other in others:
        signed(folder, other)
        for reader in (*opened, check_files.check):
            try:
                reader(folder)
            except UserError as error:
                refused += 1
                assert str(folder) in str(error)
    assert refused > len(others) // 2  # nothing reads other keys


@pytest.mark.parametrize("format", [99, 0, "2", 2.5, None, [1]])
def test_another_format_is_refused_by_name(prepared, tmp_path, format):
    for source, reader in ((prepared.tokenizer["byte"], open_tokenizer), (prepared.shards["byte"], Shards)):
        folder = shutil.copytree(source, tmp_path / source.name)
        signed(folder, {**json.loads((folder / "index.json").read_text()), "format": format})
        for read in (reader, check_files.check):
            with pytest.raises(UserError, match=r"another version(.|\n)*this version reads(.|\n)*make it again"):
                read(folder)


def test_half_of_a_surrogate_pair_is_damage(prepared, tmp_path):
    folder = shutil.copytree(prepared.shards["byte"], tmp_path / "shards")
    index = json.loads((folder / "index.json").read_text())
    index["recorded"]["corpus"] = "\udcff"
    (folder / "index.json").write_text(json.dumps(index))
    for read in (Shards, check_files.check):
        with pytest.raises(UserError, match="half of a surrogate pair"):
            read(folder)
