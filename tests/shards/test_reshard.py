"""Shard sets made from shard sets: each document once, on its side, with its origin. Whole pieces are not read."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from pretrain import cli
from pretrain.config import build, load
from pretrain.errors import ConfigError, ShardError
from pretrain.shards import Shards
from pretrain.shards import reshard as reshard_stage
from pretrain.shards.reshard import ReshardConfig, run
from pretrain.storage.files import digest, write_json
from pretrain.storage.index import write_index
from pretrain.tools import check_files
from tests.conftest import ROOT
from tests.helpers.entries import entries
from tests.shards.test_reader import index_of, write_pieces

TOKENIZER = "ab" * 32


def write_set(folder: Path, train: list[list[list[int]]], heldout: list[list[list[int]]], **changes) -> Path:
    """A set of pieces of documents of ids. Document n of piece p came from line 100 p + n of x/en.txt or zh.jsonl."""
    folder.mkdir(parents=True)
    sides = {"train": train, "heldout": heldout}
    entries = {side: write_pieces(folder, side, pieces, 30_000) for side, pieces in sides.items()}
    write_json(folder / "origins.json", ["x/en.txt, line", "zh.jsonl, line"])
    index = {**index_of(entries), "tokenizer": TOKENIZER, "kind": "byte", "vocab_size": 30_000}
    index |= {"split": {"by": "text", "heldout_fraction": 0.1}, **changes}
    write_index(folder, index, recorded=("origins.json",))
    return folder


def drawn(seed: int, pieces: int, most: int = 40) -> list[list[list[int]]]:
    """Pieces of 50 documents."""
    rng = np.random.default_rng(seed)
    return [[[*rng.integers(1, 30_000, rng.integers(1, most)).tolist(), 0] for _ in range(50)] for _ in range(pieces)]


@pytest.fixture(scope="module")
def wiki(tmp_path_factory) -> Path:
    return write_set(tmp_path_factory.mktemp("wiki") / "shards", drawn(1, 4), drawn(2, 1))


@pytest.fixture(scope="module")
def web(tmp_path_factory) -> Path:
    return write_set(tmp_path_factory.mktemp("web") / "shards", drawn(3, 3), drawn(4, 2))


def reshard(out: Path, *parts: dict, **values) -> Path:
    values = {"parts": [{**part, "shards": str(part["shards"])} for part in parts], "out": str(out), **values}
    run(build(ReshardConfig, values, "test"))
    return out


def documents(folder: Path, side: str = "train") -> list[tuple]:
    """(ids, raw bytes, origin) of each document."""
    found = Shards(folder, side)
    raw = np.concatenate([found.sidecar(piece, "raw") for piece in range(len(found.pieces))])
    rows = zip(range(found.documents), raw.tolist(), strict=True)
    return [(tuple(found.document(n).tolist()), size, found.origin(n)) for n, size in rows]


def check(folder: Path) -> None:
    """Counts, unigrams and checksums agree with the files."""
    assert check_files.check(folder) == []
    for side in ("train", "heldout"):
        found, rows = Shards(folder, side), documents(folder, side)
        ids = np.concatenate([ids for ids, _, _ in rows])
        assert found.gather(np.array([0]), found.tokens)[0].tolist() == ids.tolist()
        assert np.array_equal(found.unigram(), np.bincount(ids, minlength=30_000))
        assert found.raw_bytes == sum(size for _, size, _ in rows) and found.documents == len(rows)


def test_concatenated_sets_have_the_documents_of_both_in_order(wiki, web, tmp_path):
    out = reshard(tmp_path / "both", {"shards": wiki}, {"shards": web})
    check(out)
    for side in ("train", "heldout"):
        one, two = documents(wiki, side), documents(web, side)
        marked = [(ids, raw, f"{Shards(web).fingerprint[:12]}: {origin}") for ids, raw, origin in two]
        assert documents(out, side) == one + marked
    index = Shards(out).index
    assert [part["shards"] for part in index["parts"]] == [Shards(wiki).fingerprint, Shards(web).fingerprint]
    assert index["split"] == {"by": "text", "heldout_fraction": 0.1} and index["tokenizer"] == TOKENIZER


def test_whole_pieces_are_linked_and_not_read(wiki, web, tmp_path, monkeypatch):
    digested = []
    monkeypatch.setattr("pretrain.storage.index.SMALL", 0)  # like a set that is too large for hashing at every opening
    monkeypatch.setattr("pretrain.storage.index.digest", lambda path: digested.append(path.name) or digest(path))
    out = reshard(tmp_path / "both", {"shards": wiki}, {"shards": web})
    assert (out / "train-00000.bin").samefile(wiki / "train-00000.bin")
    assert (out / "train-00004.bin").samefile(web / "train-00000.bin")
    assert (out / "heldout-00002.idx").samefile(web / "heldout-00001.idx")
    assert not [name for name in digested if name.endswith((".bin", ".idx", ".raw.npy"))]
    check(out)


def test_halves_share_no_document_and_make_the_whole(wiki, tmp_path):
    halves = [reshard(tmp_path / f"{n}", {"shards": wiki, "fraction": f}) for n, f in enumerate((0.5, [0.5, 1]))]
    for half in halves:
        check(half)
        assert documents(half, "heldout") == documents(wiki, "heldout")
    one, two, whole = documents(halves[0]), documents(halves[1]), documents(wiki)
    assert 70 <= len(one) <= 130 and sorted(one + two) == sorted(whole)
    assert one == [row for row in whole if row in set(one)], "order stays"


def test_a_larger_fraction_has_every_document_of_a_smaller_one(wiki, tmp_path):
    parts = [set(documents(reshard(tmp_path / str(f), {"shards": wiki, "fraction": f}))) for f in (0.1, 0.3, 0.9, 1)]
    assert all(small < large for small, large in pairwise(parts))
    assert parts[3] == set(documents(wiki))
    other = set(documents(reshard(tmp_path / "other", {"shards": wiki, "fraction": 0.3}, seed=1)))
    assert len(other & parts[1]) < 0.6 * len(other), "another seed chooses others"


def test_files_choose_on_both_sides(wiki, tmp_path):
    for pattern, place in (("zh.*", "zh.jsonl"), ("*.txt", "x/en.txt")):
        out = reshard(tmp_path / place[:2], {"shards": wiki, "files": [pattern]})
        check(out)
        for side in ("train", "heldout"):
            assert documents(out, side) == [row for row in documents(wiki, side) if row[2].startswith(place)]


def test_files_and_fraction_are_both_met(wiki, tmp_path):
    choice = {"files": ["zh.*"], "fraction": [0.2, 0.9]}
    out = reshard(tmp_path / "out", {"shards": wiki, **choice})
    check(out)
    within = set(documents(reshard(tmp_path / "fraction", {"shards": wiki, "fraction": [0.2, 0.9]})))
    assert documents(out) == [row for row in documents(wiki) if row in within and row[2].startswith("zh")]
    assert Shards(out).index["parts"] == [{"shards": Shards(wiki).fingerprint, **choice}]


def test_small_pieces_become_large_ones_and_large_ones_small(wiki, tmp_path, monkeypatch):
    monkeypatch.setattr(reshard_stage, "COPY_TOKENS", 64)  # a piece is copied in several stretches
    for piece_tokens in (200, 10**6):
        out = reshard(tmp_path / f"{piece_tokens}", {"shards": wiki, "fraction": 0.7}, piece_tokens=piece_tokens)
        check(out)
        found = Shards(out)
        sizes = found.piece_tokens[:-1]
        lasts = [int(found.piece_index(piece)[0][-1]) for piece in range(len(sizes))]
        assert all(size >= piece_tokens > size - last for size, last in zip(sizes, lasts, strict=True))
        assert len(found.pieces) > 10 if piece_tokens == 200 else len(found.pieces) == 1
    assert documents(tmp_path / "200") == documents(tmp_path / "1000000")


def test_the_same_bytes_come_out_every_time(wiki, web, tmp_path):
    parts = [{"shards": wiki, "fraction": 0.5}, {"shards": web}]
    a, b = (reshard(tmp_path / name, *parts) for name in "ab")
    assert [p.name for p in sorted(a.iterdir())] == [p.name for p in sorted(b.iterdir())]
    assert all(path.read_bytes() == (b / path.name).read_bytes() for path in a.iterdir())
    assert Shards(reshard(tmp_path / "c", *parts, seed=1)).fingerprint != Shards(a).fingerprint


# Sides


def test_what_another_set_holds_out_is_dropped_from_training_and_counted(tmp_path, capsys):
    """Sets that were split by different rules: documents 3 and 5 of one training side are held out by the other."""
    train, heldout = drawn(1, 3), drawn(2, 1)
    one = write_set(tmp_path / "one", train, heldout, split={"by": "text", "heldout_fraction": 0.1})
    other = [[train[0][3], train[0][5], *drawn(4, 1)[0]]]
    two = write_set(tmp_path / "two", drawn(3, 2), other, split={"by": "text", "heldout_fraction": 0.2})
    out = reshard(tmp_path / "out", {"shards": one}, {"shards": two})
    check(out)
    assert "dropped: 2 training documents" in capsys.readouterr().out
    index = Shards(out).index
    assert index["dropped"] == 2 and index["split"] is None
    trained = {ids for ids, _, _ in documents(out)}
    assert not trained & {ids for ids, _, _ in documents(out, "heldout")}
    assert len(documents(out)) == 5 * 50 - 2
    assert (out / "train-00001.bin").samefile(one / "train-00001.bin"), "the others are whole"


BY_SOURCE = {"by": "text", "heldout_fraction": 0.1, "sources": {"books": {"heldout_documents": 1}}}


@pytest.mark.parametrize("split", [None, BY_SOURCE])
def test_sets_whose_split_says_too_little_are_compared_too(tmp_path, split):
    """Sets without a recorded rule, and sets whose sources have rules of their own."""
    one = write_set(tmp_path / "one", drawn(1, 1), drawn(2, 1), split=split)
    two = write_set(tmp_path / "two", [drawn(2, 1)[0][:10] + drawn(5, 1)[0]], drawn(4, 1), split=split)
    out = reshard(tmp_path / "out", {"shards": one}, {"shards": two})
    assert Shards(out).index["dropped"] == 10 and len(documents(out)) == 100


# Origins and bytes of documents


def test_a_set_without_origins_gives_its_name_and_numbers(wiki, tmp_path):
    bare = write_set(tmp_path / "bare", drawn(8, 2), drawn(9, 1), sidecars=["raw"])
    out = reshard(tmp_path / "out", {"shards": wiki}, {"shards": bare, "fraction": 0.5})
    mark, ids = Shards(bare).fingerprint[:12], [Shards(bare).document(n).tolist() for n in range(100)]
    found = [(list(mine), origin) for mine, _, origin in documents(out)[200:]]
    assert 20 < len(found) < 80
    assert found == [
        (mine, f"shards {mark}, document {n}") for n, mine in enumerate(ids) if mine in [one for one, _ in found]
    ]


def test_raw_bytes_are_unknown_when_those_of_a_part_are(wiki, tmp_path):
    bare = write_set(tmp_path / "bare", drawn(8, 2), drawn(9, 1), sidecars=["origin"])
    out = reshard(tmp_path / "out", {"shards": wiki}, {"shards": bare})
    found = Shards(out)
    assert found.raw_bytes is None and found.index["sidecars"] == ["origin"]
    assert not list(out.glob("*.raw.npy")) and check_files.check(out) == []


# Errors


def test_documents_that_would_stand_twice_are_refused(wiki, web, tmp_path):
    half = reshard(tmp_path / "half", {"shards": wiki, "fraction": 0.5})
    both = reshard(tmp_path / "both", {"shards": wiki}, {"shards": web})
    copy = shutil.copytree(wiki, tmp_path / "copy")
    index = json.loads((copy / "index.json").read_text())
    (copy / "index.json").unlink()
    index = {key: value for key, value in index.items() if key not in ("files", "recorded", "checksum")}
    write_index(copy, {**index, "corpus": "another"}, recorded=("origins.json",))
    pairs = [
        ({"shards": wiki}, {"shards": wiki}),
        ({"shards": wiki}, {"shards": half}),
        ({"shards": both}, {"shards": web}),
        ({"shards": both}, {"shards": half}),
        ({"shards": wiki}, {"shards": copy}),
        ({"shards": wiki, "fraction": 0.5}, {"shards": wiki, "fraction": [0.4, 1]}),
    ]
    for one, two in pairs:
        with pytest.raises(ShardError, match="would be in the result twice") as error:
            reshard(tmp_path / "out", one, two)
        assert str(one["shards"]) in str(error.value) and str(two["shards"]) in str(error.value)
    assert not (tmp_path / "out").exists()


def test_sets_of_different_tokenizers_are_refused_naming_both(wiki, tmp_path):
    other = write_set(tmp_path / "other", drawn(5, 1), drawn(6, 1), tokenizer="cd" * 32)
    with pytest.raises(ShardError, match="different tokenizers") as error:
        reshard(tmp_path / "out", {"shards": wiki}, {"shards": other})
    assert f"{other}: cdcdcdcdcdcd…" in str(error.value) and str(wiki) in str(error.value)


@pytest.mark.parametrize(
    ("choice", "found"),
    [
        ({"files": ["fr*"]}, "x/en.txt, zh.jsonl"),
        ({"fraction": 1e-9}, "no document is chosen for the train side"),
        ({"fraction": 1e-30}, "no document is chosen for the train side"),
        ({"fraction": 1.5}, None),
        ({"fraction": [0.5, 0.5]}, None),
        ({"fraction": -1}, None),
    ],
)
def test_a_choice_that_cannot_be_met_is_refused(wiki, tmp_path, choice, found):
    with pytest.raises(ShardError if found else ConfigError) as error:
        reshard(tmp_path / "out", {"shards": wiki, **choice})
    assert (found or next(iter(choice))) in str(error.value)
    assert entries(tmp_path) == []


def test_a_set_is_not_replaced_by_what_is_made_of_it(wiki, tmp_path):
    copy = shutil.copytree(wiki, tmp_path / "in" / "copy")
    for out in (copy, copy / "half"):
        with pytest.raises(ShardError, match="the output folder is one of its own parts") as error:
            reshard(out, {"shards": copy, "fraction": 0.5})
        assert str(copy) in str(error.value)
    assert check_files.check(copy) == [] and entries(copy.parent) == [copy.name]


def test_a_damaged_piece_is_not_given_new_checksums(tmp_path, monkeypatch):
    damaged = write_set(tmp_path / "damaged", drawn(1, 3), drawn(2, 1))
    path = damaged / "train-00001.bin"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    monkeypatch.setattr("pretrain.storage.index.SMALL", 0)  # like a set that is too large for hashing at every opening
    with pytest.raises(ShardError, match=r"train-00001.bin was altered"):
        reshard(tmp_path / "out", {"shards": damaged, "fraction": 0.5})
    out = reshard(tmp_path / "out", {"shards": damaged})
    assert check_files.check(out) == [f"{out}/train-00001.bin: altered, its SHA-256 differs"], (
        "linked with its old ones"
    )


def test_a_set_that_changed_since_is_named_by_verify(wiki, web, tmp_path, capsys):
    copy = shutil.copytree(web, tmp_path / "web")
    out = reshard(tmp_path / "both", {"shards": wiki}, {"shards": copy, "fraction": 0.5})
    assert check_files.main([str(out)]) == 0
    shutil.rmtree(copy)
    shutil.copytree(wiki, copy)
    assert check_files.main([str(out)]) == 2
    said = capsys.readouterr().err
    assert (
        f"made with shards {Shards(web).fingerprint[:12]}…, but {copy} is now {Shards(wiki).fingerprint[:12]}…" in said
    )


def test_the_sample_configuration_takes_the_chinese_documents(prepared, tmp_path):
    shards = prepared.shards["bert"]
    changes = [f"parts.0.shards={shards}", f"out={tmp_path}/out"]
    run(load(ReshardConfig, ROOT / "configs/sample/reshard-zh.yaml", changes))
    for side in ("train", "heldout"):
        found, whole = Shards(tmp_path / "out", side), Shards(shards, side)
        chinese = [number for number in range(whole.documents) if whole.origin(number).startswith("zh.txt, line ")]
        assert 0 < found.documents == len(chinese) < whole.documents
        assert [found.origin(number) for number in range(found.documents)] == [whole.origin(n) for n in chinese]
        assert all(np.array_equal(found.document(n), whole.document(old)) for n, old in enumerate(chinese))


def test_the_command_line(wiki, web, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    text = f"parts:\n  - {{shards: {wiki}}}\n  - shards: {web}\n    fraction: [0.5, 1]\nout: {tmp_path}/out\n"
    config.write_text(text, encoding="utf-8")
    assert cli.main("reshard", [str(config)]) == 0
    assert "train: " in capsys.readouterr().out
    assert cli.main("reshard", [str(config), "parts.1.fraction=2"]) == 2
    assert "parts.1" in capsys.readouterr().err
