"""A small part of benchmarks/fuzz.py: reading a damaged file gives one of our errors or the undamaged contents."""

import shutil
from pathlib import Path

from benchmarks.fuzz import Kind, fuzz, read_config, read_shards, read_text, read_tokenizer
from tests.conftest import ROOT


def test_no_damaged_file_ends_in_a_traceback_a_hang_or_other_text(prepared, tmp_path):
    text, vocabulary, tokens = tmp_path / "text", tmp_path / "tokenizer", tmp_path / "shards"
    text.mkdir()
    for name in ("recipe.yaml", "en.txt", "zh.txt"):
        shutil.copy(prepared.corpus.parent / name, text / name)
    shutil.copytree(prepared.tokenizer["byte"], vocabulary)
    shutil.copytree(prepared.shards["byte"], tokens)
    settings = Path(shutil.copy(ROOT / "configs/sample/shards-byte.yaml", tmp_path / "shards.yaml"))

    def files(folder: Path) -> list[Path]:
        return sorted(path for path in folder.iterdir() if path.is_file())

    kinds = [
        Kind("tokenizer", files(vocabulary), lambda: read_tokenizer(vocabulary)),
        Kind("tokenizer index", [vocabulary / "index.json"], lambda: read_tokenizer(vocabulary), signs=True),
        Kind("shards", files(tokens), lambda: read_shards(tokens)),
        Kind("shards index", [tokens / "index.json"], lambda: read_shards(tokens), signs=True, weight=2),
        Kind("recipe", [text / "recipe.yaml"], lambda: read_text(text), hashed=False),
        Kind("configuration", [settings], lambda: read_config("shards", settings), hashed=False),
    ]
    counts, faults = fuzz(tmp_path, kinds, inputs=200, seed=11)
    assert not faults, faults
    assert sum(found["refused"] for found in counts.values()) > 100 and all(counts[kind.name] for kind in kinds)
