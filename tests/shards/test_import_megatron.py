"""Importing Megatron's pairs: the documents stay the same, and get our marks and our split.

The tests write the pairs field by field, by the documentation of the layout. A comparison with Megatron-LM's own tool
and reader is in benchmarks/results/megatron.json.
"""

import re
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from pretrain import cli
from pretrain.config import build
from pretrain.corpus import open_corpus
from pretrain.corpus.sides import side_of
from pretrain.errors import ShardError
from pretrain.shards import Shards, check_tokenizer, import_megatron
from pretrain.shards.import_megatron import ImportConfig, run
from pretrain.tokenizer import TokenizerConfig, open_tokenizer
from pretrain.tokenizer import run as train_tokenizer
from pretrain.tools import check_files
from pretrain.training.config import RunConfig
from pretrain.training.run import run as pretrain
from tests.conftest import DECODER, run_values
from tests.helpers.entries import entries

Document = list[list[int]]  # its sequences


def write_pair(prefix: Path, documents: list[Document], code: int = 8) -> Path:
    letter, size = {8: ("H", 2), 4: ("i", 4)}[code]
    sequences = [ids for document in documents for ids in document]
    ends = np.cumsum([0, *(len(document) for document in documents)]).tolist()
    offsets = np.cumsum([0, *(len(ids) * size for ids in sequences)])[:-1].tolist()
    with open(f"{prefix}.bin", "wb") as file:
        file.writelines(struct.pack(f"<{len(ids)}{letter}", *ids) for ids in sequences)
    with open(f"{prefix}.idx", "wb") as file:
        file.write(b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", code))
        file.write(struct.pack("<QQ", len(sequences), len(ends)))
        file.write(struct.pack(f"<{len(sequences)}i", *map(len, sequences)))
        file.write(struct.pack(f"<{len(sequences)}q", *offsets) + struct.pack(f"<{len(ends)}q", *ends))
    return prefix


def texts(prepared) -> list[str]:
    return [document.text for document in open_corpus(prepared.corpus).documents()]


def bare(prepared, kind: str) -> list[list[int]]:
    """The ids of each document of the corpus without any mark."""
    tokenizer = open_tokenizer(prepared.tokenizer[kind])
    cut = slice(1, -1) if kind == "bert" else slice(0, -1)
    return [ids[cut].tolist() for ids in tokenizer.encode_batch(texts(prepared))]


def imported(prepared, kind: str, out: Path, *pairs: Path, **values) -> Path:
    values = {"heldout_fraction": 0.1, "tokenizer": str(prepared.tokenizer[kind]), **values}
    run(ImportConfig(pairs=[str(pair) for pair in pairs], out=str(out), **values))
    return out


def ids_of(folder: Path, side: str = "train") -> list[list[int]]:
    found = Shards(folder, side)
    return [found.document(number).tolist() for number in range(found.documents)]


def halves(ids: list[int]) -> Document:
    return [ids[: len(ids) // 3], ids[len(ids) // 3 :]]


EOD, PAD = 2, 0
FORMS = {
    "bare": lambda ids: [ids],
    "with-eod": lambda ids: [[*ids, EOD]],
    "two-eods": lambda ids: [[*ids, EOD, EOD]],
    "padded": lambda ids: [[*ids, EOD, PAD, PAD]],
    "sentences": halves,
    "sentences-with-eod": lambda ids: [[*part, EOD] for part in halves(ids)],
    "empty-sequences": lambda ids: [[], *halves(ids), [], [EOD]],
}


@pytest.mark.parametrize("code", [8, 4], ids=["uint16", "int32"])
@pytest.mark.parametrize("form", FORMS)
def test_a_pair_of_any_form_becomes_the_shards_of_its_text(prepared, tmp_path, form, code):
    """The bytes and sides equal the result of the shards stage for the same text."""
    specials = open_tokenizer(prepared.tokenizer["byte"]).specials
    assert (specials["eod"], specials["pad"]) == (EOD, PAD)
    pair = write_pair(tmp_path / "pair", [FORMS[form](ids) for ids in bare(prepared, "byte")], code)
    out = imported(prepared, "byte", tmp_path / "out", pair)
    assert check_files.check(out) == []
    check_tokenizer(Shards(out).index, out, open_tokenizer(prepared.tokenizer["byte"]))
    for side in ("train", "heldout"):
        made, ours = Shards(out, side), Shards(prepared.shards["byte"], side)
        for end in ("bin", "idx", "raw.npy"):
            assert (out / f"{side}-00000.{end}").read_bytes() == (ours.folder / f"{side}-00000.{end}").read_bytes()
        assert np.array_equal(made.unigram(), ours.unigram()) and made.unigram().dtype == np.int64
        assert (made.tokens, made.documents, made.raw_bytes) == (ours.tokens, ours.documents, ours.raw_bytes)
        assert made.specials == ours.specials and made.vocab_size == ours.vocab_size


@pytest.mark.parametrize("marks", [False, True], ids=["bare", "marked"])
def test_sentences_of_bert_are_joined_between_one_pair_of_marks(prepared, tmp_path, marks):
    """The hash of the ids decides the sides, because normalised text does not come back. Bytes of text are unknown."""
    cls, sep = (open_tokenizer(prepared.tokenizer["bert"]).specials[role] for role in ("cls", "sep"))
    plain = bare(prepared, "bert")
    marked = [[[cls, *part, sep] if marks else part for part in halves(ids)] for ids in plain]
    out = imported(prepared, "bert", tmp_path / "out", write_pair(tmp_path / "pair", marked))
    train, heldout = ids_of(out), ids_of(out, "heldout")
    assert sorted(train + heldout) == sorted([cls, *ids, sep] for ids in plain)
    assert train == [ids for ids in ([cls, *ids, sep] for ids in plain) if ids in train], "in order"
    assert 0.02 < len(heldout) / len(plain) < 0.25
    found = Shards(out)
    assert found.raw_bytes is None and found.index["sidecars"] == ["origin"] and not list(out.glob("*.raw.npy"))
    assert found.index["split"] == {"by": "ids", "heldout_fraction": 0.1}


def test_documents_know_their_pair_and_their_number_in_it(prepared, tmp_path):
    plain = bare(prepared, "byte")
    one = write_pair(tmp_path / "one", [[ids] for ids in plain[:50]])
    two = write_pair(tmp_path / "two", [[], *([ids] for ids in plain[50:]), [[EOD]]])
    out = imported(prepared, "byte", tmp_path / "out", one, two)
    expected = [f"{one}, document {n}" for n in range(50)] + [
        f"{two}, document {n + 1}" for n in range(len(plain) - 50)
    ]
    for side in ("train", "heldout"):
        found = Shards(out, side)
        chosen = [n for n, text in enumerate(texts(prepared)) if side_of(text, 0.1) == side]
        assert [found.origin(number) for number in range(found.documents)] == [expected[n] for n in chosen]


def test_how_much_is_read_at_once_does_not_show(prepared, tmp_path, monkeypatch):
    documents = [halves(ids) for ids in bare(prepared, "byte")]
    documents[5:5] = [[], [[]], [[EOD]]]
    documents += [[], []]
    pair = write_pair(tmp_path / "pair", documents)
    whole = imported(prepared, "byte", tmp_path / "whole", pair)
    for tokens in (1, 37, 1000):
        monkeypatch.setattr(import_megatron, "BATCH_TOKENS", tokens)
        out = imported(prepared, "byte", tmp_path / str(tokens), pair)
        assert all(path.read_bytes() == (out / path.name).read_bytes() for path in whole.iterdir())


def test_marks_in_the_middle_are_refused_or_removed(prepared, tmp_path, capsys):
    plain = bare(prepared, "byte")
    documents = [[ids] for ids in plain]
    documents[7] = [[*plain[7][:4], EOD, *plain[7][4:], EOD]]
    documents[9] = [[*plain[9][:2], PAD, EOD, *plain[9][2:]]]
    pair = write_pair(tmp_path / "pair", documents)
    with pytest.raises(ShardError, match="has <eod> in the middle of a sequence") as error:
        imported(prepared, "byte", tmp_path / "out", pair)
    assert "document 7, token 4: id 2" in str(error.value) and "inner_marks=remove" in str(error.value)
    assert entries(tmp_path) == ["pair.bin", "pair.idx"]
    out = imported(prepared, "byte", tmp_path / "out", pair, inner_marks="remove")
    assert "3 marks inside of documents removed" in capsys.readouterr().out
    assert ids_of(out) == ids_of(prepared.shards["byte"])


def test_ids_of_another_vocabulary_are_refused(prepared, tmp_path):
    size = open_tokenizer(prepared.tokenizer["byte"]).vocab_size
    for code, wrong in ((8, size), (4, size), (4, -1), (8, 65_535)):
        pair = write_pair(tmp_path / "pair", [[[5, 6]], [[7], [8, wrong]]], code)
        with pytest.raises(ShardError, match="has an id that no token has") as error:
            imported(prepared, "byte", tmp_path / "out", pair)
        assert f"document 1, token 2: id {wrong}" in str(error.value) and f"0 to {size - 1}" in str(error.value)
        assert str(prepared.tokenizer["byte"]) in str(error.value)


def test_a_pair_of_another_tokenizer_of_the_same_size_is_refused(prepared, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    english = f"{{name: en, files: [{prepared.corpus.parent / 'en.txt'}]}}"
    recipe.write_text(f"{{name: en, heldout_fraction: 0.2, sources: [{english}]}}", encoding="utf-8")
    config = {"corpus": str(recipe), "vocab_size": 1024, "kind": "byte", "plot": False}
    train_tokenizer(TokenizerConfig(out=str(tmp_path / "other"), **config))
    other = {"tokenizer": str(tmp_path / "other")}
    pair = write_pair(tmp_path / "pair", [[ids] for ids in bare(prepared, "byte")])
    good = write_pair(
        tmp_path / "good", [[ids.tolist()] for ids in open_tokenizer(tmp_path / "other").encode_batch(texts(prepared))]
    )
    with pytest.raises(ShardError, match="was probably made with another tokenizer than") as error:
        imported(prepared, "byte", tmp_path / "out", good, pair, **other)
    assert f"{pair}.bin" in str(error.value) and "lower min_returned" in str(error.value)
    share, own = map(float, re.findall(r"([0-9.]+)% (?:come|do)", str(error.value)))
    assert share < 95 and own > 99.9  # 89: few of 1,024 tokens have more than one letter
    assert not (tmp_path / "out").exists()
    imported(prepared, "byte", tmp_path / "out", pair, min_returned=0.1, **other)
    imported(prepared, "byte", tmp_path / "right", pair)


@pytest.mark.parametrize("kind", ["bert", "byte"])
def test_documents_that_were_cut_within_words_are_of_their_tokenizer(prepared, tmp_path, kind):
    cut = [[ids[n : n + 64]] for ids in bare(prepared, kind) for n in range(7, len(ids) - 64, 64)]
    imported(prepared, kind, tmp_path / "out", write_pair(tmp_path / "pair", cut))
    with pytest.raises(ShardError, match="was probably made with another tokenizer"):  # cut ones give back less
        imported(prepared, kind, tmp_path / "out", tmp_path / "pair", min_returned=1.0)


def change(path: Path, at: int, data: bytes) -> None:
    whole = bytearray(path.read_bytes())
    whole[at : at + len(data)] = data
    path.write_bytes(whole)


def without_documents(idx: Path) -> None:
    """Give the index of a pair of three sequences and two documents an empty document index."""
    data = idx.read_bytes()
    idx.write_bytes(data[:26] + bytes(8) + data[34:-24])


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (lambda bin_, idx: bin_.write_bytes(bin_.read_bytes()[:-2]), "does not fit pair.idx"),
        (lambda bin_, idx: bin_.write_bytes(bin_.read_bytes() + b"\x00\x00"), "does not fit pair.idx"),
        (lambda bin_, idx: change(idx, 34 + 4, struct.pack("<i", 3)), "sequence 1 of 3"),
        (lambda bin_, idx: change(idx, 34, struct.pack("<i", -1)), "sequence 0 of 3"),
        (lambda bin_, idx: change(idx, 34 + 12 + 8, struct.pack("<q", 6)), "sequence 0 of 3"),
        (lambda bin_, idx: change(idx, 34 + 36, struct.pack("<q", 1)), "document index"),
        (lambda bin_, idx: change(idx, 34 + 36 + 8, struct.pack("<q", 4)), "document index"),
        (lambda bin_, idx: change(idx, 34 + 36 + 16, struct.pack("<q", 2)), "document index"),
        (lambda bin_, idx: without_documents(idx), "document index"),
        (lambda bin_, idx: idx.write_bytes(idx.read_bytes()[:-1]), "cannot be read"),
        (lambda bin_, idx: change(idx, 17, b"\x05"), "dtype code 5"),
        (lambda bin_, idx: change(idx, 0, b"x"), "is not a Megatron index"),
        (lambda bin_, idx: idx.unlink(), "pair.idx is missing"),
        (lambda bin_, idx: bin_.unlink(), "pair.bin is missing"),
    ],
)
def test_a_damaged_pair_is_refused_naming_the_file(prepared, tmp_path, damage, found):
    pair = write_pair(tmp_path / "pair", [[[5, 6], [7]], [[8, 9, 10]]])
    damage(Path(f"{pair}.bin"), Path(f"{pair}.idx"))
    with pytest.raises(ShardError) as error:
        imported(prepared, "byte", tmp_path / "out", pair)
    assert found in str(error.value) and str(pair) in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_side_without_a_document_is_refused(prepared, tmp_path):
    pair = write_pair(tmp_path / "pair", [[[5, 6]], [[EOD]]])
    with pytest.raises(ShardError, match="side would be empty") as error:
        imported(prepared, "byte", tmp_path / "out", pair, heldout_fraction=0.001)
    assert "1 documents, heldout_fraction = 0.001" in str(error.value)


def test_a_pair_that_is_named_twice_is_refused(prepared, tmp_path):
    pairs = [write_pair(tmp_path / name, [[[5, 6]], [[7]]]) for name in ("one", "two")]
    with pytest.raises(ShardError, match="would be in the result twice") as error:
        imported(prepared, "byte", tmp_path / "out", *pairs)
    assert f"{pairs[0]}.bin and {pairs[1]}.bin" in str(error.value)


def test_a_pair_that_changes_while_it_is_read_is_refused(prepared, tmp_path, monkeypatch):
    one = write_pair(tmp_path / "one", [[ids] for ids in bare(prepared, "byte")])
    shown = import_megatron.documents

    def changing(*arguments):
        yield from shown(*arguments)
        change(Path(f"{one}.bin"), 0, b"\x40\x01")

    monkeypatch.setattr(import_megatron, "documents", changing)
    with pytest.raises(ShardError, match=r"a pair changed while it was read\n  .*one\n"):
        imported(prepared, "byte", tmp_path / "out", one)
    assert not (tmp_path / "out").exists()


def test_a_pair_without_a_token_adds_nothing(prepared, tmp_path):
    """A pair without documents, without sequences or without tokens adds nothing, and alone it is an error."""
    one = write_pair(tmp_path / "one", [[ids] for ids in bare(prepared, "byte")])
    empty = [
        write_pair(tmp_path / f"empty{n}", documents) for n, documents in enumerate(([], [[], []], [[[]], [[], []]]))
    ]
    alone = imported(prepared, "byte", tmp_path / "alone", one)
    assert ids_of(imported(prepared, "byte", tmp_path / "out", empty[0], one, *empty[1:])) == ids_of(alone)
    with pytest.raises(ShardError, match=r"no pair holds a token\n.*empty0"):
        imported(prepared, "byte", tmp_path / "none", *empty)


def test_a_pair_is_not_replaced_by_what_is_made_of_it(prepared, tmp_path):
    copy = shutil.copytree(prepared.shards["byte"], tmp_path / "copy")
    with pytest.raises(ShardError, match="the output folder holds a pair that it is made of"):
        imported(prepared, "byte", copy, copy / "train-00000")
    assert check_files.check(copy) == []


def test_an_imported_set_trains(prepared, tmp_path):
    """The command line imports a pair in the default form of Megatron's tool."""
    write_pair(tmp_path / "text_document", [[ids] for ids in bare(prepared, "byte")], 4)
    config = tmp_path / "import.yaml"
    values = {"tokenizer": prepared.tokenizer["byte"], "out": tmp_path / "shards", "heldout_fraction": 0.1}
    lines = [f"{key}: {value}" for key, value in values.items()]
    config.write_text("\n".join([f"pairs: [{tmp_path}/text_document]", *lines]), encoding="utf-8")
    assert cli.main("import_megatron", [str(config)]) == 0
    summaries = []
    for name, shards in (("theirs", tmp_path / "shards"), ("ours", prepared.shards["byte"])):
        data = {"shards": str(shards), "tokenizer": str(prepared.tokenizer["byte"])}
        phases = [{"steps": 2, "seq_len": 32, "batch_tokens": 128}]
        values = run_values(prepared, tmp_path / name, "causal_lm", data=data, model=DECODER)
        summaries.append(pretrain(build(RunConfig, {**values, "phases": phases}, "test")))
    theirs, ours = summaries
    assert theirs["last_loss"] == ours["last_loss"] and theirs["heldout_bits_per_byte"] == ours["heldout_bits_per_byte"]
