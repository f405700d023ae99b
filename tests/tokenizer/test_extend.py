import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain import cli
from pretrain import tokenizer as stage
from pretrain.corpus import open_corpus
from pretrain.errors import TokenizerError
from pretrain.storage.index import read_index
from pretrain.tokenizer import TokenizerConfig, open_tokenizer, run
from pretrain.tools import check_files
from tests.conftest import SAMPLE
from tests.helpers.entries import entries
from tests.tokenizer.test_adopt import gpt2, vocab_txt

SETTINGS = {
    "bert": {"vocab_size": 1200, "special_tokens": ["[DOC]"], "reserved": 4},
    "byte": {"vocab_size": 900, "special_tokens": ["<|doc|>"], "reserved": 4, "multiple_of": 64},
    "folded": {"vocab_size": 1200, "digits": "single", "width": "fold", "lowercase": False},
}
NEW = {"bert": 3000, "byte": 1400, "folded": 3000}
# A domain with words and characters that the old text does not have.
MEDICINE = [
    f"Myocardial infarction with cardiogenic shock, ECG {n}: angioplasty of the coronary artery; antihypertensives."
    f" 心肌梗死伴心源性休克，冠状动脉造影{n}例。β-blocker"
    for n in range(200)
]


def corpus_of(folder: Path, documents: list[str]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.txt").write_text("\n\n".join(documents), encoding="utf-8")
    recipe = {"name": "made", "heldout_fraction": 0.1, "sources": [{"name": "made", "files": ["text.txt"]}]}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return str(folder)


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("texts")
    old = (SAMPLE / "en.txt").read_text(encoding="utf-8").split("\n\n")[:60]
    return {"old": corpus_of(root / "old", old), "new": corpus_of(root / "new", MEDICINE)}


@pytest.fixture(scope="module")
def parents(texts, tmp_path_factory) -> dict[str, stage.Tokenizer]:
    root = tmp_path_factory.mktemp("parents")
    for name, keys in SETTINGS.items():
        kind = "byte" if name == "byte" else "bert"
        run(TokenizerConfig(corpus=texts["old"], out=str(root / name), kind=kind, plot=False, **keys))
    return {name: open_tokenizer(root / name) for name in SETTINGS}


@pytest.fixture(scope="module")
def extended(texts, parents, tmp_path_factory) -> dict[str, stage.Tokenizer]:
    root = tmp_path_factory.mktemp("extended")
    return {name: extend(parent, texts["new"], root / name, NEW[name]) for name, parent in parents.items()}


def extend(parent: stage.Tokenizer, corpus: str, out: Path, size: int, **keys) -> stage.Tokenizer:
    values = {"corpus": corpus, "out": str(out), "extend": str(parent.folder), "vocab_size": size, "plot": False}
    run(TokenizerConfig(**{**values, **keys}))
    return open_tokenizer(out)


def rows(tokenizer: stage.Tokenizer) -> list[str]:
    return [tokenizer.vocabulary.engine.id_to_token(token) for token in range(tokenizer.vocab_size)]


def test_every_old_id_is_the_same_token(parents, extended):
    for name, parent in parents.items():
        child = extended[name]
        assert rows(child)[: parent.vocab_size] == rows(parent)
        assert child.vocab_size > parent.vocab_size + 50
        assert len(set(rows(child))) == child.vocab_size
        assert (child.specials, child.rules, child.kind) == (parent.specials, parent.rules, parent.kind)
        assert child.special_tokens == parent.special_tokens


def test_text_of_the_new_domain_takes_fewer_tokens_and_none_is_unknown(texts, parents, extended):
    held = [document.text for document in open_corpus(texts["new"]).documents(("heldout",))]
    for name, parent in parents.items():
        before, after = (sum(map(len, t.encode_batch(held))) for t in (parent, extended[name]))
        assert after < 0.6 * before or name != "byte"
        unknown = extended[name].specials["unk"]
        assert not any(unknown in ids for ids in extended[name].encode_batch(held))
        if name != "byte":
            assert any(unknown in ids for ids in parent.encode_batch(held)), "心 is new"
    row = rows(extended["bert"])
    assert {"myocardial", "infarction", "心", "β"} <= set(row)


def test_ids_of_the_old_vocabulary_mean_the_same_text_in_the_new(texts, parents, extended):
    held = [document.text for document in open_corpus(texts["old"]).documents(("heldout",))]
    for name, parent in parents.items():
        for text, ids in zip(held, parent.encode_batch(held), strict=True):
            assert extended[name].decode(ids) == parent.decode(ids)
            again = extended[name].encode_batch([text])[0]
            assert extended[name].decode(again) == parent.decode(ids), "cut otherwise, perhaps, but the same text"


@settings(max_examples=200, deadline=None)
@given(
    text=st.one_of(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=50),
        st.lists(st.sampled_from(["myocard", "ial", "心肌", "β", "<|doc|>", "<unused3>", " ", "‿"])).map("".join),
    )
)
def test_an_extended_byte_vocabulary_is_lossless(extended, text):
    tokenizer = extended["byte"]
    ids = tokenizer.encode_batch([text])[0]
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode("utf-8"))
    assert not tokenizer.vocabulary.marks & set(ids[:-1].tolist())


def test_extending_twice_gives_identical_bytes(texts, parents, extended, tmp_path):
    shuffled = corpus_of(tmp_path / "shuffled", MEDICINE[::-1])
    for name, parent in parents.items():
        again = extend(parent, shuffled, tmp_path / name, NEW[name])
        for file in ("tokenizer.json", "tokenizer_config.json", "report.json"):
            assert (again.folder / file).read_bytes() == (extended[name].folder / file).read_bytes()


def test_the_parent_is_on_record_and_verified(parents, extended, capsys):
    for name, child in extended.items():
        index = read_index(child.folder, TokenizerError, "")
        assert index["parent"] == parents[name].fingerprint
        assert index["recorded"]["parent"] == str(parents[name].folder)
        assert check_files.check(child.folder) == []
    assert "intact" in capsys.readouterr().out
    assert len({child.fingerprint for child in extended.values()}) == 3


def test_the_report_shows_what_was_gained(parents, extended):
    for child in extended.values():
        report = json.loads((child.folder / "report.json").read_text(encoding="utf-8"))
        before, after = report["parent"]["overall"], report["heldout"]["overall"]
        assert before["documents"] == after["documents"] and before["tokens"] > after["tokens"]
        assert report["merges"] > 20


def test_new_special_tokens_slots_and_a_multiple_come_behind_the_old(texts, parents, tmp_path):
    keys = {"special_tokens": ["[USER]"], "reserved": 2, "multiple_of": 64}
    child = extend(parents["bert"], texts["new"], tmp_path / "out", 1300, **keys)
    new = rows(child)[parents["bert"].vocab_size :]
    assert new[:3] == ["[USER]", "[unused4]", "[unused5]"]
    assert child.vocab_size % 64 == 0
    assert child.special_tokens == {"[DOC]": 5, "[USER]": parents["bert"].vocab_size}
    asked = child.encode_batch(["a [USER] [DOC]"], special_tokens=True)[0]
    assert {*child.special_tokens.values()} <= {*asked.tolist()}
    assert not {*child.special_tokens.values()} & {*child.encode_batch(["a [USER] [DOC]"])[0].tolist()}


def test_an_extended_vocabulary_is_extended_again(texts, extended, tmp_path):
    child = extend(extended["bert"], texts["old"], tmp_path / "out", extended["bert"].vocab_size + 40)
    assert rows(child)[: extended["bert"].vocab_size] == rows(extended["bert"])
    assert read_index(child.folder, TokenizerError, "")["parent"] == extended["bert"].fingerprint


def test_an_adopted_bert_vocabulary_is_extended(texts, tmp_path):
    adopted = {"corpus": texts["old"], "out": str(tmp_path / "adopted"), "plot": False}
    run(TokenizerConfig(adopt=str(vocab_txt(tmp_path / "vocab.txt")), **adopted))
    parent = open_tokenizer(tmp_path / "adopted")
    child = extend(parent, texts["new"], tmp_path / "out", 600)
    old = (tmp_path / "vocab.txt").read_text(encoding="utf-8").splitlines()
    assert (child.folder / "vocab.txt").read_text(encoding="utf-8").splitlines()[: len(old)] == old
    assert child.specials["cls"] == 101
    unused = read_index(child.folder, TokenizerError, "")["reserved"]
    assert unused == list(range(1, 100)), "slots stay what they were"


def test_text_that_offers_nothing_new_gives_the_parent_and_fewer_than_asked(texts, parents, tmp_path):
    text = corpus_of(
        tmp_path / "text", [f"the {'a' if n % 2 else 'i'}" for n in range(50)] + [f"{n}" for n in range(10)]
    )
    child = extend(parents["bert"], text, tmp_path / "out", 5000)
    assert child.vocab_size < parents["bert"].vocab_size + 20


# Mistakes that are refused


ROWS = [
    ("a smaller size", ["vocab_size=1000"], ["leaves no room", "already has 1,200 tokens", "above 1200"]),
    ("the same size", ["vocab_size=1200"], ["leaves no room"]),
    ("no room for characters", ["vocab_size=1210"], ["too small for the alphabet", "1200 old tokens", "alphabet_min"]),
    ("no size", ["vocab_size=null"], ["vocab_size is missing"]),
    ("another kind", ["kind=byte"], ["kind = byte contradicts extend = ", "which has its own", "remove kind"]),
    ("other rules", ["lowercase=false"], ["lowercase = false contradicts extend"]),
    ("other digits", ["digits=single"], ["digits = single contradicts extend"]),
    ("a token of the parent", ["special_tokens=['[DOC]']"], ["'[DOC]' is already a token", "id 5 of"]),
    ("an old slot", ["special_tokens=['[unused1]']"], ["'[unused1]' is already a token"]),
    ("a word", ["special_tokens=[doc]"], ["'doc' could not be told from text"]),
    ("nobody", ["extend=nowhere"], ["nowhere: there is no such folder"]),
    ("a foreign folder", ["extend={gpt2}"], ["the folder is incomplete", "index.json"]),
    ("an adopted BPE", ["extend={adopted}"], ["cannot be extended", "no WordPiece vocabulary"]),
    ("nothing held out", ["corpus={one}"], ["1 train and 0 held-out documents"]),
]


@pytest.fixture(scope="module")
def others(texts, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("others")
    keys = {"corpus": texts["old"], "out": str(root / "adopted"), "plot": False}
    run(TokenizerConfig(adopt=str(gpt2(root / "gpt2")), **keys))
    (root / "one.txt").write_text("just one document", encoding="utf-8")
    return {"gpt2": root / "gpt2", "adopted": root / "adopted", "one": root / "one.txt"}


@pytest.mark.parametrize(("wrong", "overrides", "fragments"), ROWS, ids=[row[0] for row in ROWS])
def test_the_message_helps_and_nothing_is_written(
    texts, parents, others, tmp_path, capsys, wrong, overrides, fragments
):
    config = tmp_path / "tokenizer.yaml"
    values = {"corpus": texts["new"], "out": str(tmp_path / "out"), "vocab_size": 3000}
    config.write_text(yaml.safe_dump(values | {"extend": str(parents["bert"].folder)}), encoding="utf-8")
    assert cli.main("tokenizer", [str(config), *(override.format(**others) for override in overrides)]) == 2
    said = capsys.readouterr().err
    assert "error: " in said and "Traceback" not in said
    for fragment in fragments:
        assert fragment in said
    assert entries(tmp_path) == [config.name]


def test_a_vocabulary_with_a_gap_in_its_ids_cannot_be_extended(texts, parents, tmp_path):
    values = json.loads((parents["bert"].folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = values["model"]["vocab"]
    last = max(vocab, key=vocab.get)
    vocab[last] += 1
    (tmp_path / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")
    keys = {"corpus": texts["new"], "plot": False}
    run(TokenizerConfig(out=str(tmp_path / "adopted"), adopt=str(tmp_path / "tokenizer.json"), **keys))
    with pytest.raises(TokenizerError) as error:
        run(TokenizerConfig(out=str(tmp_path / "out"), extend=str(tmp_path / "adopted"), vocab_size=3000, **keys))
    assert "an id without a token" in error.value.what
    assert f"has no token with the id {vocab[last] - 1:,}" in error.value.details[0]
