import itertools
import json
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from pretrain import tokenizer as stage
from pretrain.corpus import Document, open_corpus
from pretrain.errors import TokenizerError
from pretrain.tokenizer import TokenizerConfig, kinds, open_tokenizer, report, run
from pretrain.tokenizer.vocabulary import vocabulary_of
from tests.conftest import SAMPLE


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, stage.Tokenizer]:
    """Both kinds on the whole sample."""
    root = tmp_path_factory.mktemp("trained")
    for kind, settings in (("bert", {"alphabet_min_count": 2}), ("byte", {})):
        run(
            TokenizerConfig(
                corpus=str(SAMPLE), out=str(root / kind), kind=kind, vocab_size=6000, plot=False, **settings
            )
        )
    return {kind: open_tokenizer(root / kind) for kind in ("bert", "byte")}


def found(tokenizer: stage.Tokenizer) -> dict:
    return json.loads((tokenizer.folder / "report.json").read_text(encoding="utf-8"))


def documents(*texts: str, source: str = "made", language: str = "en") -> list[Document]:
    return [Document(text, source, language, "heldout", "nowhere") for text in texts]


# Held-out text


def runs_of(text: str) -> dict[str, list[tuple[int, int]]]:
    """Words, Han characters and numbers of a text, by the Unicode names of its characters."""

    def kind(c: str) -> str:
        if c == "〇" or (unicodedata.name(c, "").startswith("CJK ") and unicodedata.category(c) == "Lo"):
            return "han"
        return {"L": "word", "M": "word"}.get(unicodedata.category(c)[0], "number" if c.isdecimal() else "")

    runs: dict[str, list] = {"word": [], "han": [], "number": []}
    for name, group in itertools.groupby(enumerate(text), key=lambda pair: kind(pair[1])):
        places = [place for place, _ in group]
        if name:
            runs[name].append((places[0], places[-1] + 1))
    return runs


@pytest.mark.parametrize("kind", ["bert", "byte"])
def test_the_report_is_what_a_slow_loop_over_the_heldout_side_gives(trained, kind):
    tokenizer, corpus = trained[kind], open_corpus(SAMPLE)
    engine, unknown = tokenizer.vocabulary.engine, tokenizer.specials["unk"]
    tallies = {"kjv": Counter(), "poems": Counter()}
    for document in corpus.documents(("heldout",)):
        tally, text = tallies[document.source], document.text
        encoding = engine.encode(text, add_special_tokens=False)
        tally.update(documents=1, characters=len(text), bytes=len(text.encode()), tokens=len(encoding.ids))
        tally["unknown"] += encoding.ids.count(unknown)
        tally["unknown_characters"] += sum(
            e - s for token, (s, e) in zip(encoding.ids, encoding.offsets, strict=True) if token == unknown
        )
        for name, runs in runs_of(text).items():
            for first, last in runs:
                touching = [
                    token
                    for token, (s, e) in zip(encoding.ids, encoding.offsets, strict=True)
                    if s < last and e > first
                ]
                tally[name] += 1
                tally[f"{name}_characters"] += last - first
                tally[f"{name}_tokens"] += len(touching)
                tally[f"{name}_whole"] += len(touching) == 1 and touching != [unknown]
    said = found(tokenizer)["heldout"]
    for source, tally in tallies.items():
        rates = said["sources"][source]
        for key in ("documents", "characters", "bytes", "tokens"):
            assert rates[key] == tally[key]
        assert (rates["words"], rates["han"]) == (tally["word"], tally["han_characters"])
        assert rates["characters_per_token"] == tally["characters"] / tally["tokens"]
        assert rates["bytes_per_token"] == tally["bytes"] / tally["tokens"]
        assert rates["unknown_rate"] == tally["unknown"] / tally["tokens"]
        assert rates["unknown_characters"] == tally["unknown_characters"] / tally["characters"]
        if tally["word"]:
            assert rates["tokens_per_word"] == tally["word_tokens"] / tally["word"]
            assert rates["whole_word_share"] == tally["word_whole"] / tally["word"]
        if tally["han"]:
            assert rates["tokens_per_han"] == tally["han_tokens"] / tally["han_characters"]
    assert tallies["kjv"]["word"] > 1000 and tallies["poems"]["han_characters"] > 1000
    assert said["languages"]["en"] == said["sources"]["kjv"]
    assert said["overall"]["tokens"] == sum(tally["tokens"] for tally in tallies.values())


def test_rates_by_hand():
    """Ten tokens: play ##ing [UNK] , 20 ##24 汉 [UNK] a ##b; the words are playing zzz ab."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "play", "##ing", ",", "20", "##24", "汉", "a", "##b"]
    vocabulary = vocabulary_of(kinds.build(tokens, kinds.Rules("bert", True, True)))
    (measured,) = report.measure([vocabulary], documents("Playing zzz, 2024\n汉龘 ab"))
    rates = report.rates(measured)["overall"]
    assert (rates["tokens"], rates["words"], rates["han"], rates["numbers"]) == (10, 3, 2, 1)
    assert rates["tokens_per_word"] == 5 / 3
    assert rates["whole_word_share"] == 0, "an unknown word is not whole"
    assert rates["tokens_per_han"] == 1
    assert (rates["tokens_per_number"], rates["digits_per_number"]) == (2, 4)
    assert rates["unknown_rate"] == 2 / 10
    assert rates["unknown_characters"] == 4 / 23
    assert (rates["ascii_written"], rates["han_written"]) == (14 / 17, 1 / 2)
    assert report.report(vocabulary, measured)["coverage"]["ascii"] == {
        "characters": len(set("Playing,2024zab")),
        "written": 2,  # , a: the others only stand inside words
        "running": 14 / 17,
    }


def test_a_token_over_several_han_characters_counts_once():
    byte = sorted(kinds.byte_of_symbol())
    seeds = [*kinds.SPECIALS["byte"].values(), *byte, *("‿" + c for c in byte)]
    symbol = {number: c for c, number in kinds.byte_of_symbol().items()}
    word = "".join(symbol[b] for b in "中国".encode())
    vocabulary = vocabulary_of(kinds.build([*seeds, word], kinds.Rules("byte")))
    (measured,) = report.measure([vocabulary], documents("中国人，中国"))
    rates = report.rates(measured)["overall"]
    assert rates["tokens_per_han"] == (1 + 3 + 1) / 5
    entries = report.report(vocabulary, measured)["entries"]
    assert (entries["han_words"], entries["marks"], entries["parts_of_characters"]) == (1, 3, 256)


def test_text_of_nothing_but_control_characters_has_no_rates(capsys):
    tokens = [*kinds.SPECIALS["bert"].values(), "a"]
    vocabulary = vocabulary_of(kinds.build(tokens, kinds.Rules("bert")))
    made = report.report(vocabulary, *report.measure([vocabulary], documents("\x01\x02")))
    assert made["heldout"]["overall"]["tokens"] == 0
    assert made["heldout"]["overall"]["unknown_rate"] is None
    report.show({"x": {"vocab_size": 6, **made}})
    assert "– characters a token, – unknown" in capsys.readouterr().out


def test_a_long_document_is_measured_in_stretches_that_cut_no_word(trained, monkeypatch):
    held = [document for document in open_corpus(SAMPLE).documents(("heldout",)) if document.source == "kjv"]
    for tokenizer in trained.values():
        (whole,) = report.measure([tokenizer.vocabulary], held)
        with monkeypatch.context() as patch:
            patch.setattr(report, "BATCH_CHARACTERS", 100)
            (cut,) = report.measure([tokenizer.vocabulary], held)
        assert cut.characters == whole.characters
        assert report.rates(cut) == report.rates(whole)
    assert list(report._pieces("")) == [""]


# The vocabulary


def test_coverage_counts_what_can_be_written(trained):
    for kind, tokenizer in trained.items():
        cover = found(tokenizer)["coverage"]
        assert cover["gb2312_level_1"]["characters"] == 3755
        text = "".join(d.text for d in open_corpus(SAMPLE).documents(("train",)))
        han = {c for c in text if "\u4e00" <= c <= "\u9fff"}
        assert abs(cover["han_of_train"]["characters"] - len(han)) < 20, "and a few of the extensions"
        if kind == "byte":
            assert all(part["written"] == part["characters"] for part in cover.values())
            assert cover["ascii"]["running"] == cover["han"]["running"] == 1
        else:
            rows = {tokenizer.token_text(token) for token in range(tokenizer.vocab_size)}
            assert cover["han"]["written"] == len({c for c in report.han_in(held_text()) if c in rows})
            assert 0.95 < cover["han"]["running"] < 1


def held_text() -> str:
    return "".join(document.text for document in open_corpus(SAMPLE).documents(("heldout",)))


def test_dead_tokens_are_those_that_encoding_never_gives(trained):
    for tokenizer in trained.values():
        dead = found(tokenizer)["dead"]
        texts = set(report.texts_of(tokenizer.vocabulary))
        assert not texts & set(tokenizer.specials.values())
        for side in ("heldout", "train"):
            rows = tokenizer.encode_batch([d.text for d in open_corpus(SAMPLE).documents((side,))])
            missing = [tokenizer.token_text(token) for token in sorted(texts - set(np.concatenate(rows).tolist()))]
            assert dead[side]["tokens"] == len(missing)
            assert set(dead[side]["examples"]) <= set(missing)
        assert dead["train"]["share_of_running_words"] == 1
        assert 0 < len(dead["heldout"]["examples"]) <= report.EXAMPLES


def test_of_more_words_than_are_looked_at_the_frequent_ones_are_taken_whatever_their_order():
    words = {"a": 5, "b": 3, "c": 3, "d": 2, "e": 2, "f": 1}
    for order in itertools.permutations(words):
        often, share = report._frequent(Counter({word: words[word] for word in order}), 4)
        assert (set(often), share) == (set("abc"), 11 / 16)
    assert report._frequent(Counter(words), 6) == (list("abcdef"), 1)


@pytest.mark.parametrize("kind", ["bert", "byte"])
def test_no_token_is_impossible(trained, kind):
    """For each entry a text that is encoded with it: its own, or one behind a character that joins no longer token."""
    tokenizer = trained[kind]
    vocabulary = tokenizer.vocabulary
    model = vocabulary.engine.model
    left = set()
    for token in report.texts_of(vocabulary):
        text = vocabulary.engine.id_to_token(token)
        if not text.startswith(vocabulary.prefix):
            assert [piece.id for piece in model.tokenize(text)] == [token]
        else:
            left.add(token)
    texts = (document.text for document in open_corpus(SAMPLE).documents(("train",)))
    words = dict.fromkeys(word for text in texts for word in kinds.words_of(text, vocabulary.engine))
    for word in words:
        left -= {piece.id for piece in model.tokenize(word)}
    for token in sorted(left):
        rest = vocabulary.engine.id_to_token(token).removeprefix(vocabulary.prefix)
        firsts = (word[:size] for word in words for size in (1, 2, 3) if len(word) >= size)
        assert any(token in [piece.id for piece in model.tokenize(first + rest)] for first in firsts), rest


# The files that are written


def test_the_plot_is_a_picture_beside_the_report_and_no_part_of_its_identity(tmp_path, capsys):
    settings = {"corpus": str(SAMPLE), "kind": "bert", "vocab_size": 6000, "alphabet_min_count": 3}
    run(TokenizerConfig(out=str(tmp_path / "with"), **settings))
    run(TokenizerConfig(out=str(tmp_path / "without"), plot=False, **settings))
    assert (tmp_path / "with" / "report.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "without" / "report.png").exists()
    assert open_tokenizer(tmp_path / "with").fingerprint == open_tokenizer(tmp_path / "without").fingerprint
    (tmp_path / "with" / "report.png").write_bytes(b"another picture")
    with pytest.raises(TokenizerError, match=r"report\.png"):
        open_tokenizer(tmp_path / "with")
    said = capsys.readouterr().out
    for part in ("6,000 entries", "kjv", "poems", "GB 2312 level 1 that", "never produced on held-out text", "whole"):
        assert part in said


def test_a_plot_without_matplotlib_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = {"corpus": "nowhere", "out": str(tmp_path / "out"), "kind": "byte", "vocab_size": 600}
    with pytest.raises(TokenizerError, match=r"(?s)needs matplotlib.*\.\[data\].*plot=false"):
        run(TokenizerConfig(**config))
    assert not list(Path(tmp_path).iterdir())
