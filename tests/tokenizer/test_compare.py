import json
from collections import Counter
from pathlib import Path

import pytest
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from pretrain import cli
from pretrain import tokenizer as stage
from pretrain.config import build
from pretrain.corpus import Document, open_corpus
from pretrain.errors import PretrainError
from pretrain.tokenizer import TokenizerConfig, kinds
from pretrain.tokenizer.compare import CompareConfig, counted, differences, overlap, run
from pretrain.tokenizer.report import texts_of
from pretrain.tokenizer.vocabulary import Vocabulary, vocabulary_of
from tests.conftest import SAMPLE
from tests.helpers.entries import entries

MARKS = list(kinds.SPECIALS["bert"].values())


def wordpieces(*tokens: str) -> Vocabulary:
    return vocabulary_of(kinds.build([*MARKS, *tokens], kinds.Rules("bert", True, True)))


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, str]:
    """The places of two vocabularies of ours, of the vocab.txt of one of them, and of a byte-level BPE file."""
    root = tmp_path_factory.mktemp("places")
    for kind in ("bert", "byte"):
        settings = {"alphabet_min_count": 3} if kind == "bert" else {}
        stage.run(
            TokenizerConfig(
                corpus=str(SAMPLE), out=str(root / kind), kind=kind, vocab_size=4000, plot=False, **settings
            )
        )
    engine = Tokenizer(models.BPE())
    engine.pre_tokenizer, engine.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=800, initial_alphabet=alphabet, show_progress=False)
    engine.train([str(SAMPLE / "en.txt")], trainer)
    engine.save(str(root / "bpe.json"))
    return {
        "bert": str(root / "bert"),
        "byte": str(root / "byte"),
        "text": str(root / "bert" / "vocab.txt"),
        "bpe": str(root / "bpe.json"),
    }


@pytest.fixture(scope="module")
def compared(places, tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("compared") / "out"
    return out, run(CompareConfig(corpus=str(SAMPLE), out=str(out), vocabularies=places))


def test_ours_is_measured_as_its_own_report_says(compared, places):
    for kind in ("bert", "byte"):
        own = json.loads((Path(places[kind]) / "report.json").read_text(encoding="utf-8"))
        said = compared[1]["vocabularies"][kind]
        assert said["heldout"] == own["heldout"] and said["entries"] == own["entries"]
        assert said["dead"]["heldout"] == own["dead"]["heldout"]


def test_a_vocab_txt_alone_is_the_same_as_the_folder_it_lies_in(compared):
    said = compared[1]["vocabularies"]
    assert said["text"] == said["bert"]


def test_any_tokenizer_json_is_measured(compared, places):
    said = compared[1]["vocabularies"]["bpe"]
    assert said["vocab_size"] == 800
    engine = Tokenizer.from_file(places["bpe"])
    held = [d.text for d in open_corpus(SAMPLE).documents(("heldout",))]
    assert said["heldout"]["overall"]["tokens"] == sum(len(engine.encode(text).ids) for text in held)
    assert said["heldout"]["overall"]["unknown_rate"] == 0


def test_the_folder_holds_all_of_it_and_says_what_was_compared(compared, places):
    out, found = compared
    assert json.loads((out / "report.json").read_text(encoding="utf-8")) == found
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    index = json.loads((out / "index.json").read_text(encoding="utf-8"))
    assert index["stage"] == "compare"
    assert index["vocabularies"]["bert"] == stage.open_tokenizer(places["bert"]).fingerprint
    assert list(index["vocabularies"]["text"]) == ["vocab.txt"]
    assert index["recorded"]["vocabularies"] == places


def test_the_same_comparison_is_the_same_folder(compared, places, tmp_path, capsys):
    run(CompareConfig(corpus=str(SAMPLE), out=str(tmp_path / "again"), vocabularies=places))
    fingerprints = [
        json.loads((out / "index.json").read_text())["fingerprint"] for out in (compared[0], tmp_path / "again")
    ]
    assert fingerprints[0] == fingerprints[1]
    said = capsys.readouterr().out
    assert "bert and byte share" in said and "cut alike by all" in said and "en: bpe" in said


def test_overlap_by_hand():
    """`low` and `est` are shared: an entry counts once, whether it begins a word or continues one."""
    a, b = wordpieces("low", "##est", "cat"), wordpieces("##low", "est", "dog", "hen")
    texts = {"a": texts_of(a), "b": texts_of(b)}
    counts = {"a": [0] * 8, "b": [0, 0, 0, 0, 0, 9, 9, 1, 5]}
    (found,) = overlap(texts, counts)
    assert (found["shared"], found["jaccard"], found["only"]) == (2, 2 / 5, {"a": 1, "b": 2})
    assert found["examples"] == {"a": ["cat"], "b": ["hen", "dog"]}, "the more frequent first"


def test_words_cut_differently_by_hand():
    a, b = wordpieces("low", "##est", "cat", "汉"), wordpieces("lo", "##w", "##est", "cat", "字")
    found = differences({"a": a, "b": b}, Counter({"cat": 5, "lowest": 3, "low": 4, "汉": 1}))
    assert (found["looked_at"], found["cut_alike"]) == (13, 5 / 13)
    assert found["examples"] == [
        {"word": "low", "count": 4, "cuts": {"a": "low", "b": "lo·w"}},
        {"word": "lowest", "count": 3, "cuts": {"a": "low·est", "b": "lo·w·est"}},
        {"word": "汉", "count": 1, "cuts": {"a": "汉", "b": "?"}},
    ]


def test_a_character_of_several_tokens_is_shown_once():
    symbols = sorted(kinds.byte_of_symbol())
    seeds = [*kinds.SPECIALS["byte"].values(), *symbols, *("‿" + c for c in symbols)]
    byte = vocabulary_of(kinds.build(seeds, kinds.Rules("byte")))
    found = differences({"byte": byte, "other": wordpieces("龘")}, Counter(["龘"]))
    assert found["examples"][0]["cuts"] == {"byte": "龘×3", "other": "龘"}


def test_words_are_runs_of_letters_and_short_runs_of_han():
    document = Document(f"low low, x2y 汉字。{'长' * 9} é\u0301t", "made", "en", "heldout", "nowhere")
    words = Counter()
    assert list(counted([document, document], words)) == [document, document]
    assert words == {"low": 4, "x": 2, "y": 2, "汉字": 2, "é\u0301t": 2}


# Mistakes that are refused


ROWS = [
    ("one", {"byte": "{byte}"}, ["two or more are compared, found byte"]),
    ("none", {}, ["two or more are compared, found none"]),
    ("no such place", {"byte": "{byte}", "x": "nowhere"}, ["no such tokenizer", "looked for: nowhere"]),
    ("damaged", {"byte": "{byte}", "x": "{damaged}"}, ["is not the tokenizer that was published", "report.json"]),
    ("no tokenizer", {"byte": "{byte}", "x": str(SAMPLE / "recipe.yaml")}, ["is not JSON", "recipe.yaml"]),
]


@pytest.mark.parametrize(("wrong", "vocabularies", "fragments"), ROWS, ids=[row[0] for row in ROWS])
def test_the_message_helps_and_nothing_is_written(places, tmp_path, capsys, wrong, vocabularies, fragments):
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in Path(places["byte"]).iterdir():
        (damaged / file.name).write_bytes(file.read_bytes()[: None if file.name != "report.json" else -9])
    named = {name: place.format(damaged=damaged, **places) for name, place in vocabularies.items()}
    config = tmp_path / "compare.yaml"
    values = {"corpus": str(SAMPLE), "out": str(tmp_path / "out"), "vocabularies": named}
    config.write_text(yaml.safe_dump(values), encoding="utf-8")
    before = entries(tmp_path)
    assert cli.main("compare_tokenizers", [str(config)]) == 2
    said = capsys.readouterr().err
    assert "error: " in said and "Traceback" not in said
    assert all(fragment in said for fragment in fragments)
    assert entries(tmp_path) == before


def test_text_without_a_heldout_side_is_refused(places, tmp_path):
    (tmp_path / "one.txt").write_text("just one document", encoding="utf-8")
    values = {"corpus": str(tmp_path / "one.txt"), "out": str(tmp_path / "out"), "vocabularies": places}
    with pytest.raises(PretrainError, match="held-out documents"):
        run(build(CompareConfig, values, "test"))
    assert not (tmp_path / "out").exists()
