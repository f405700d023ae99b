"""Token files: the bytes are Megatron's, the documents the tokenizer's, the stream one; errors name the damage."""

import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from pretrain.corpus import SIDES, open_corpus
from pretrain.corpus.sides import side_of
from pretrain.errors import CorpusError, ShardError
from pretrain.shards import Shards, ShardsConfig, check_tokenizer, run, segment
from pretrain.shards.megatron import read_idx, write_idx
from pretrain.shards.segment import WordsConfig
from pretrain.shards.writer import PieceWriter
from pretrain.storage.index import listed, read_index
from pretrain.tokenizer import TokenizerConfig, open_tokenizer
from pretrain.tokenizer import run as train_tokenizer
from tests.conftest import Prepared

KINDS = ("bert", "byte")
TIMEOUT_S = 120


def build(prepared: Prepared, kind: str, out: Path, **changes) -> Path:
    values = {"corpus": str(prepared.corpus), "tokenizer": str(prepared.tokenizer[kind]), "out": str(out)}
    run(ShardsConfig(**{**values, **changes}))
    return out


@pytest.fixture(scope="module")
def pieces(prepared, tmp_path_factory) -> dict[str, Path]:
    """The shards of `prepared`, cut into pieces of about 700 tokens."""
    root = tmp_path_factory.mktemp("pieces")
    return {kind: build(prepared, kind, root / kind, piece_tokens=700) for kind in KINDS}


@pytest.fixture
def copy(prepared, tmp_path) -> Path:
    """A shard folder that a test may damage."""
    return shutil.copytree(prepared.shards["bert"], tmp_path / "shards")


def contents(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.suffix != ".lock"
    }


def stream(found: Shards) -> np.ndarray:
    return found.gather(np.array([0]), found.tokens)[0]


def documents(folder: Path, side: str) -> list[np.ndarray]:
    """The stored documents of a side, read as any reader of the format does: by offsets and lengths of the .idx."""
    found = []
    for piece in read_index(folder, ShardError, "")["sides"][side]["pieces"]:
        dtype, lengths, offsets = read_idx(folder / f"{piece}.idx")
        data = (folder / f"{piece}.bin").read_bytes()
        found += [np.frombuffer(data, dtype, n, at) for n, at in zip(lengths.tolist(), offsets.tolist(), strict=True)]
    return found


# The format


def megatron_idx(lengths: list[int], code: int, itemsize: int) -> bytes:
    """The output of `_IndexWriter` in Megatron-LM's indexed_dataset.py for documents of one sequence each."""
    written = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", code)
    written += struct.pack("<Q", len(lengths)) + struct.pack("<Q", len(lengths) + 1)
    written += b"".join(struct.pack("<i", length) for length in lengths)
    pointer = 0
    for length in lengths:
        written += struct.pack("<q", pointer)
        pointer += length * itemsize
    return written + b"".join(struct.pack("<q", document) for document in range(len(lengths) + 1))


LENGTHS = ([5], [3, 1, 2], [1] * 100, [2**31 - 1, 7, 2**31 - 1, 2**31 - 1, 1])


@pytest.mark.parametrize("lengths", LENGTHS, ids=["one", "three", "hundred", "beyond-4-GiB"])
@pytest.mark.parametrize(("dtype", "code"), [(np.uint16, 8), (np.int32, 4)], ids=["uint16", "int32"])
def test_an_index_is_megatrons_byte_by_byte(tmp_path, lengths, dtype, code):
    path = tmp_path / "x.idx"
    with open(path, "wb") as file:
        stretches = [np.array(lengths[:1], np.int32), np.array(lengths[1:], np.int32)]
        write_idx(file.write, len(lengths), lambda: stretches, np.dtype(dtype))
    itemsize = np.dtype(dtype).itemsize
    assert path.read_bytes() == megatron_idx(lengths, code, itemsize)
    found, read_lengths, offsets = read_idx(path)
    assert found == dtype and read_lengths.tolist() == lengths
    assert offsets.tolist() == [itemsize * sum(lengths[:n]) for n in range(len(lengths))]


@pytest.mark.parametrize(("dtype", "code", "letter"), [(np.uint16, 8, "H"), (np.int32, 4, "i")])
def test_a_piece_is_its_ids_and_its_index(tmp_path, dtype, code, letter):
    documents = [[3, 1, 4], [1], list(range(65_400, 65_500))]
    with PieceWriter(tmp_path, "p", dtype, []) as piece:
        for ids in documents:
            piece.add(np.array(ids, np.int32))
        piece.close(3, lambda: [{"length": np.array(list(map(len, documents)), np.int32)}])
    written = b"".join(struct.pack(f"<{letter}", token) for ids in documents for token in ids)
    assert (tmp_path / "p.bin").read_bytes() == written
    assert (tmp_path / "p.idx").read_bytes() == megatron_idx([3, 1, 100], code, struct.calcsize(letter))


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (lambda b: b"", "is not a Megatron index"),
        (lambda b: b[:33], "is not a Megatron index"),
        (lambda b: b"MMIDIDY" + b[7:], "MMIDIDY"),
        (lambda b: b[:9] + struct.pack("<Q", 2) + b[17:], "version 2"),
        (lambda b: b[:17] + b"\x05" + b[18:], "dtype code 5"),
        (lambda b: b[:-1], "81 bytes"),
        (lambda b: b + b"\x00", "83 bytes"),
        (lambda b: b[:18] + struct.pack("<Q", 2**60) + b[26:], "cannot be read"),
    ],
)
def test_a_damaged_index_is_refused(tmp_path, damage, found):
    path = tmp_path / "x.idx"
    whole = megatron_idx([3, 1], 8, 2)
    assert len(whole) == 82
    path.write_bytes(damage(whole))
    with pytest.raises(ShardError) as error:
        read_idx(path)
    assert str(path) in str(error.value) and found in str(error.value)


# The documents


@pytest.mark.parametrize("kind", KINDS)
def test_stored_documents_are_the_tokenizers(prepared, pieces, kind):
    tokenizer, corpus = open_tokenizer(prepared.tokenizer[kind]), open_corpus(prepared.corpus)
    for side in SIDES:
        texts = [document.text for document in corpus.documents((side,))]
        stored, expected = documents(pieces[kind], side), tokenizer.encode_batch(texts)
        assert len(stored) == len(expected) == Shards(pieces[kind], side).documents
        assert all(np.array_equal(a, b) for a, b in zip(stored, expected, strict=True))
        if kind == "byte":
            assert [tokenizer.decode(ids) for ids in stored] == texts


@pytest.mark.parametrize("kind", KINDS)
def test_counts_are_those_of_the_stream(prepared, pieces, kind):
    corpus = open_corpus(prepared.corpus)
    for side in SIDES:
        found = Shards(pieces[kind], side)
        ids = np.concatenate(documents(pieces[kind], side))
        raw = [len(document.text.encode("utf-8")) for document in corpus.documents((side,))]
        stored = [np.load(pieces[kind] / f"{piece}.raw.npy") for piece in found.index["sides"][side]["pieces"]]
        assert np.concatenate(stored).tolist() == raw and found.raw_bytes == sum(raw) and stored[0].dtype == np.uint32
        assert found.tokens == len(ids)
        assert np.array_equal(found.unigram(), np.bincount(ids, minlength=found.vocab_size))
        assert found.unigram().dtype == np.int64


def test_the_sides_share_no_document(prepared, pieces):
    tokenizer = open_tokenizer(prepared.tokenizer["byte"])
    texts = {side: {tokenizer.decode(ids) for ids in documents(pieces["byte"], side)} for side in SIDES}
    assert texts["train"] and texts["heldout"] and not texts["train"] & texts["heldout"]
    assert all(side_of(text, 0.1) == side for side in SIDES for text in texts[side])


@pytest.mark.parametrize("kind", KINDS)
def test_several_pieces_are_the_stream_of_one(prepared, pieces, kind):
    for side in SIDES:
        one, several = Shards(prepared.shards[kind], side), Shards(pieces[kind], side)
        assert len(one.index["sides"][side]["pieces"]) == 1 and len(several.index["sides"][side]["pieces"]) > 2
        assert np.array_equal(stream(one), stream(several))
        assert np.array_equal(one.unigram(), several.unigram())
        assert one.tokens == several.tokens and one.specials == several.specials


def test_a_piece_is_closed_by_the_document_that_reaches_its_size(pieces):
    for side in SIDES:
        names = read_index(pieces["bert"], ShardError, "")["sides"][side]["pieces"]
        assert names == [f"{side}-{n:05d}" for n in range(len(names))]
        for name in names[:-1]:
            lengths = read_idx(pieces["bert"] / f"{name}.idx")[1]
            assert lengths.sum() >= 700 > lengths[:-1].sum()


def test_gather_across_pieces_equals_a_slow_loop(pieces):
    found = Shards(pieces["bert"])
    ids = np.concatenate(documents(pieces["bert"], "train")).tolist()
    ends = np.cumsum([np.memmap(p, np.uint16).size for p in sorted(pieces["bert"].glob("train-*.bin"))])
    near = [e + d for e in ends[:4].tolist() for d in (-2, -1, 0, 1)]
    for length in (1, 2, 37, 700, 2500):
        last = found.tokens - length
        starts = np.array([0, last, *(s for s in near if s <= last), *np.random.default_rng(0).integers(0, last, 20)])
        rows = found.gather(starts, length)
        assert rows.dtype == np.int32 and rows.shape == (len(starts), length)
        assert rows.tolist() == [[ids[start + i] for i in range(length)] for start in starts.tolist()]


def test_a_place_outside_the_stream_is_a_broken_invariant(prepared, pieces):
    for folder in (prepared.shards["bert"], pieces["bert"]):
        found = Shards(folder)
        for starts in ([-1], [0, found.tokens - 9]):
            with pytest.raises(AssertionError):
                found.gather(np.array(starts), 10)


# Identity


def test_two_builds_are_byte_identical(prepared, tmp_path):
    for kind in KINDS:
        a, b = (contents(build(prepared, kind, tmp_path / f"{kind}-{n}", piece_tokens=3000)) for n in range(2))
        assert a == b and len(a) > 10


def test_the_fingerprint_is_of_contents_and_not_of_places(prepared, tmp_path):
    moved = Prepared(
        shutil.copytree(prepared.corpus.parent, tmp_path / "moved") / "recipe.yaml",
        {"bert": shutil.copytree(prepared.tokenizer["bert"], tmp_path / "t")},
        {},
    )
    same, there = Shards(prepared.shards["bert"]).index, Shards(build(moved, "bert", tmp_path / "a")).index
    assert there["fingerprint"] == same["fingerprint"] and there["recorded"] != same["recorded"]

    (moved.corpus.parent / "en.txt").write_text("Another text.\n\nAnd one more.", encoding="utf-8")
    others = {
        "pieces": Shards(build(prepared, "bert", tmp_path / "b", piece_tokens=3000)).fingerprint,
        "corpus": Shards(build(moved, "bert", tmp_path / "c")).fingerprint,
        "tokenizer": Shards(prepared.shards["byte"]).fingerprint,
    }
    assert len({same["fingerprint"], *others.values()}) == 4


def test_the_index_names_tokenizer_and_corpus(prepared):
    for kind in KINDS:
        index, tokenizer = Shards(prepared.shards[kind]).index, open_tokenizer(prepared.tokenizer[kind])
        assert index["tokenizer"] == tokenizer.fingerprint and index["vocab_size"] == tokenizer.vocab_size
        assert index["specials"] == tokenizer.specials and index["kind"] == kind
        assert index["corpus"] == open_corpus(prepared.corpus).fingerprint()
        there = {name for name in contents(prepared.shards[kind]) if name != "index.json"}
        assert set(listed(index)) == there


def test_shards_of_another_tokenizer_are_refused_naming_both(prepared, tmp_path):
    config = {"corpus": str(prepared.corpus), "kind": "bert", "vocab_size": 2000, "plot": False}
    train_tokenizer(TokenizerConfig(**config, out=str(tmp_path / "other")))
    index = Shards(prepared.shards["bert"]).index
    own, other = open_tokenizer(prepared.tokenizer["bert"]), open_tokenizer(tmp_path / "other")
    check_tokenizer(index, prepared.shards["bert"], own)
    with pytest.raises(ShardError, match="built with another tokenizer") as error:
        check_tokenizer(index, prepared.shards["bert"], other)
    for fragment in (
        own.fingerprint[:12],
        other.fingerprint[:12],
        str(prepared.shards["bert"]),
        str(tmp_path / "other"),
    ):
        assert fragment in str(error.value)


# Damage


@pytest.mark.parametrize("name", ["train-00000.bin", "heldout-00000.idx", "train-00000.raw.npy", "train.unigram.npy"])
def test_a_truncated_or_missing_file_is_named_at_opening(copy, monkeypatch, name):
    monkeypatch.setattr("pretrain.storage.index.SMALL", 0)  # like a set that is too large for hashing at every opening
    path = copy / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(ShardError, match="truncated") as error:
        Shards(copy)
    assert str(path) in str(error.value) and f"{len(whole):,}" in str(error.value)
    path.unlink()
    with pytest.raises(ShardError, match="is missing") as error:
        Shards(copy)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("name", ["train-00000.bin", "heldout-00000.idx", "train-00000.raw.npy", "train.unigram.npy"])
def test_one_altered_bit_of_a_small_set_is_named_at_opening(copy, monkeypatch, name):
    path = copy / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ShardError, match="was altered after it was made") as error:
        Shards(copy)
    assert f"{name}: altered" in str(error.value) and "rebuild it" in str(error.value)
    monkeypatch.setattr("pretrain.storage.index.SMALL", 0)
    Shards(copy)  # a large set is checked by launch/check_files.py, not at every opening


def test_an_extra_file_is_named_at_opening(copy):
    (copy / "train-00001.bin").write_bytes(b"\x00")
    with pytest.raises(ShardError, match=r"train-00001.bin: extra"):
        Shards(copy)


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (lambda text: text.replace('"tokens": ', '"tokens": 1', 1), "its fingerprint does not match"),
        (lambda text: text[: len(text) // 2], "not JSON"),
        (lambda text: "", "not JSON"),
        (lambda text: "[]", "its fingerprint does not match"),
        (lambda text: None, "the folder is incomplete"),
    ],
)
def test_an_altered_index_is_refused(copy, damage, found):
    path = copy / "index.json"
    text = damage(path.read_text(encoding="utf-8"))
    path.unlink()
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(ShardError) as error:
        Shards(copy)
    assert str(path) in str(error.value) and found in str(error.value) and "launch/shards.py" in str(error.value)


def test_folders_that_hold_no_shards_are_refused(prepared, tmp_path):
    with pytest.raises(ShardError, match="is not of the stage shards") as error:
        Shards(prepared.tokenizer["bert"])
    assert '"tokenizer"' in str(error.value)
    for path in (tmp_path / "nosuch", prepared.corpus, prepared.corpus / "below"):
        with pytest.raises(ShardError, match="there is no such folder"):
            Shards(path)


# Publishing


def test_a_failed_build_leaves_the_earlier_result_as_it_was(prepared, tmp_path):
    out = build(prepared, "bert", tmp_path / "out")
    before = contents(tmp_path)
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"fine\n\n" * 10 + b"\xff")
    with pytest.raises(CorpusError, match="UTF-8"):
        build(prepared, "bert", out, corpus=str(bad), replace=True)
    bad.unlink()
    assert contents(tmp_path) == before


def test_a_new_build_replaces_an_earlier_one_and_even_a_damaged_one(prepared, tmp_path):
    out = build(prepared, "bert", tmp_path / "out", piece_tokens=700)
    build(prepared, "bert", out, replace=True)
    expected = contents(prepared.shards["bert"])
    assert contents(out) == expected
    (out / "index.json").write_text("{", encoding="utf-8")
    build(prepared, "bert", out)
    assert contents(out) == expected


def test_a_folder_that_holds_something_else_is_never_replaced(prepared, tmp_path):
    tokenizer = shutil.copytree(prepared.tokenizer["bert"], tmp_path / "tokenizer")
    site = tmp_path / "site"
    site.mkdir()
    (site / "index.json").write_text('{"name": "a page"}', encoding="utf-8")
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "notes.txt").write_text("mine", encoding="utf-8")
    before = contents(tmp_path)
    for out, found in (
        (tokenizer, "the result of stage tokenizer"),
        (site, "no index.json of ours"),
        (notes, "no index.json"),
    ):
        with pytest.raises(ShardError, match="the output folder holds something else") as error:
            build(prepared, "bert", out)
        assert found in str(error.value)
        assert str(out) in str(error.value) and "choose another out=" in str(error.value)
        assert contents(tmp_path) == before
    (tmp_path / "empty").mkdir()
    build(prepared, "bert", tmp_path / "empty")


def test_nothing_but_its_words_is_published_in_a_published_folder(prepared, copy, tmp_path):
    tokenizer = shutil.copytree(prepared.tokenizer["bert"], tmp_path / "tokenizer")
    (tmp_path / "link").symlink_to(copy)
    before = contents(tmp_path)
    for out, above, stage in (
        (copy / "again", copy, "shards"),
        (copy / "deep" / "again", copy, "shards"),
        (tokenizer / "shards", tokenizer, "tokenizer"),
        (tmp_path / "link" / "again", copy, "shards"),
    ):
        with pytest.raises(ShardError, match="the output folder lies in a published folder") as error:
            build(prepared, "bert", out)
        assert f"{out} is in {above}, the result of stage {stage}" in str(error.value)
        assert contents(tmp_path) == before
    segment.run(WordsConfig(shards=str(copy), tokenizer=str(tokenizer)))
    assert (copy / "words" / "index.json").exists()
    shutil.rmtree(copy / "words")
    (tmp_path / "index.json").write_text('{"stage": "of a rocket"}', encoding="utf-8")  # not an index of ours
    build(prepared, "bert", tmp_path / "out")
