import json
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.corpus import Skipped, open_corpus
from pretrain.corpus.spool import Spool
from pretrain.errors import TokenizerError
from pretrain.tokenizer import kinds
from pretrain.tokenizer.kinds import Rules
from pretrain.tokenizer.training import count
from pretrain.tokenizer.training.count import alphabet, count_corpus, drop_unspellable
from pretrain.tokenizer.training.tally import BLOCK, Tally, mixed
from tests.tokenizer.test_tokenizer import corpus_of, documents_of, odd_texts

BERT = [
    Rules("bert", lowercase, accents, digits, width)
    for lowercase, accents in ((True, True), (False, False), (True, False), (False, True))
    for digits in ("whole", "single")
    for width in ("keep", "fold")
]
RULES = [*BERT, Rules("byte"), Rules("byte", digits="single")]


def words_of(texts: list[str], rules: Rules) -> Counter[str]:
    """Count the words of one text after another, by `tokenizers` alone."""
    engine = kinds.build(list(kinds.SPECIALS[rules.kind].values()), rules)
    return Counter(word for text in texts for word in kinds.words_of(text, engine))


def count_words(texts: list[str], rules: Rules) -> Counter[str]:
    """Count the words of texts as the stage counts those of a chunk."""
    return count._spelled(count._cutter(rules).tally(texts), rules.kind)


# Words


@pytest.mark.parametrize("rules", RULES, ids=lambda rules: "-".join(map(str, vars(rules).values())))
def test_words_are_those_that_the_tokenizer_cuts(rules):
    texts = ["", "a" + " " * 100 + "b", "\n" * 60, "汉" * 60 + "\t\t x", "\x0b a\x0b", "x\x85 \x1cy", "q" * 150]
    texts += [
        "１ ２\u3000３",
        "x²½ Ⅷ\x0b1",
        "汉\u0301a ﷺ \u00b4a",
        "12 34\x8556",
        "=\u0338 ＝\u0338",
        "か\u3099",
        "don't 's",
    ]
    texts += odd_texts(1000, seed=2)
    assert count_words(texts, rules) == words_of(texts, rules)


@pytest.mark.parametrize("rules", [Rules("bert", True, True), Rules("byte")], ids=lambda rules: rules.kind)
def test_a_long_text_is_counted_in_parts_without_cutting_a_word(rules, monkeypatch):
    monkeypatch.setattr(count, "BATCH", 10)
    texts = ["\n\n".join(documents_of("en.txt", 3) + documents_of("zh.txt", 9)), *odd_texts(200, seed=3)]
    texts += ["a\n\n  b \n\nc\n\n d\n\x0be\n'll\n\u0301x\n" * 9]
    assert count_words(texts, rules) == words_of(texts, rules)


@settings(max_examples=100, deadline=None)
@given(
    words=st.dictionaries(st.text("ab漢é\x00", min_size=1, max_size=6).map(lambda s: s * len(s)), st.integers(1, 9)),
    long=st.integers(110, 140),
    pieces=st.integers(1, 4),
)
def test_a_tally_counts_what_a_counter_counts(words, long, pieces):
    words = {**words, "x" * long: 3, "é" * long: 1}
    strings = [word.encode() for word in Counter(words).elements()]
    random.Random(len(strings)).shuffle(strings)
    tally = Tally()
    for part in range(pieces):
        more = Tally()
        add(more, strings[part::pieces])
        tally.update(more)
    assert counts_of(tally) == {word.encode(): count for word, count in words.items()}
    assert tally.size == sum(-(-len(word.encode()) // BLOCK) for word in words) <= tally.most


def test_a_tally_keeps_strings_of_equal_hash_apart():
    """Two rows of two numbers have one hash: the second numbers cancel the difference of the first."""
    rows = np.frombuffer(b"abcdefghABCDEFGH" + b"abcdefgzABCDEFGH", dtype="<u8").reshape(2, 2).copy()
    rows[1:2, 1] += mixed(rows)[:1] - mixed(rows)[1:2]
    assert mixed(rows)[0] == mixed(rows)[1] and 0xFF not in rows.tobytes() and 0xFE not in rows.tobytes()
    first, second = rows[0].tobytes(), rows[1].tobytes()
    tally = Tally()
    for _ in range(3):
        add(tally, [first, second, first, b"abcdefgh1", second, first])
    assert counts_of(tally) == {first: 9, second: 6, b"abcdefgh1": 3}


def test_a_tally_counts_beyond_32_bits():
    tally = Tally()
    for _ in range(2):
        tally.add(b"abcdefghij", np.array([0, 0]), np.array([2, 10]), np.array([2**40, 2**62 - 1]))
    assert counts_of(tally) == {b"ab": 2**41, b"abcdefghij": 2**63 - 2}


def add(tally: Tally, strings: list[bytes]) -> None:
    ends = np.cumsum([0, *map(len, strings)])
    tally.add(b"".join(strings), ends[:-1], ends[1:])


def counts_of(tally: Tally) -> dict[bytes, int]:
    parts = [(raw.tobytes().split(b"\xfe")[:-1], counts) for raw, counts in tally.items()]
    found = [pair for strings, counts in parts for pair in zip(strings, counts, strict=True)]
    assert len(found) == len(dict(found))
    return dict(found)


def test_the_alphabet_is_what_a_loop_over_characters_finds():
    words = count_words([*documents_of("zh.txt", 30), *odd_texts(300, seed=4), "q" * 101], Rules("bert", True, True))
    counts, inside = Counter(), set()
    for word, seen in words.items():
        if len(word) <= 100:
            counts.update(dict.fromkeys(word, 0))
            for place, character in enumerate(word):
                counts[character] += seen
                if place:
                    inside.add(character)
    for least in (1, 3):
        starts = sorted(c for c in counts if counts[c] >= least)
        assert alphabet(words, "bert", least) == (starts, ["##" + c for c in starts if c in inside])
    kept = {word: count for word, count in words.items() if len(word) <= 100 and set(word) <= set(starts)}
    assert len(kept) < len(words)
    drop_unspellable(words, set(starts))
    assert words == kept


# Corpora

DOCUMENTS = [*documents_of("en.txt", 150), *documents_of("zh.txt", 250)]


def train_texts(corpus: str) -> list[str]:
    return [document.text for document in open_corpus(corpus).documents(("train",))]


def test_all_of_the_train_side_is_counted_while_there_is_room(tmp_path):
    corpus = corpus_of(tmp_path / "text", DOCUMENTS)
    for rules in (Rules("bert", True, True), Rules("byte")):
        found = count_corpus(open_corpus(corpus), rules, Spool(tmp_path))
        texts = train_texts(corpus)
        assert found.words == words_of(texts, rules)
        size = sum(len(text.encode()) for text in texts)
        assert found.sample == {
            "documents": len(texts),
            "bytes": size,
            "share_of_documents": 1.0,
            "share_of_bytes": 1.0,
            "levels_left_out": 0,
        }
        seen = {"documents": len(texts), "characters": sum(map(len, texts)), "bytes": size}
        assert found.seen["train"] == seen
        assert found.report() == {"train": {**seen, "distinct_words": len(found.words), "counted": found.sample}}
        assert sum(side["documents"] for side in found.seen.values()) == len(DOCUMENTS)


@pytest.mark.parametrize("workers", [1, 2])
def test_held_out_documents_and_bad_records_are_met_while_counting(tmp_path, monkeypatch, workers):
    """Counting spools held-out documents to a hidden file: the same documents as `documents()` reads, in order."""
    monkeypatch.setattr(count, "CHUNK_BYTES", 4000)
    folder = tmp_path / "text"
    folder.mkdir()
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in DOCUMENTS[:120]]
    (folder / "a.jsonl").write_text("\n".join([*lines[:50], "{broken", *lines[50:], '{"no": "text"}']))
    source = {"name": "a", "files": ["a.jsonl"], "bad_records": "skip"}
    (folder / "recipe.yaml").write_text(json.dumps({"name": "n", "heldout_fraction": 0.3, "sources": [source]}))
    corpus, spool, skipped = open_corpus(folder), Spool(tmp_path), Skipped()
    found = count_corpus(corpus, Rules("byte"), spool, workers=workers)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text"]
    heldout = list(corpus.documents(("heldout",), skipped))
    assert len(list(corpus.chunks(4000))) > 4 and len(heldout) > 20
    assert list(spool) == heldout
    assert found.seen["heldout"]["documents"] == len(heldout)
    assert found.skipped == skipped and len(skipped.counts["a"]) == 2


@pytest.mark.parametrize("rules", [Rules("bert", True, True), Rules("byte")], ids=lambda rules: rules.kind)
@pytest.mark.parametrize("bound", [300, 1500, 5000])
def test_a_full_tally_leaves_out_the_lowest_levels_of_documents(tmp_path, monkeypatch, rules, bound):
    """The rule, written independently: the fewest lowest levels are left out so that the others fit at the end."""
    monkeypatch.setattr(count, "SLACK", 1.0)
    corpus = corpus_of(tmp_path / "text", DOCUMENTS)
    texts = train_texts(corpus)
    levels = [count._level(text.encode(), 0) for text in texts]

    def held(level: int) -> int:
        """8-byte blocks of the distinct words of a level."""
        words = words_of([text for text, found in zip(texts, levels, strict=True) if found == level], rules)
        sizes = (len(word if rules.kind == "byte" else word.encode()) for word in words)
        return sum(-(-size // 8) for size in sizes)

    lowest = next(n for n in range(20) if sum(map(held, range(n, 20))) <= bound)
    kept = [text for text, level in zip(texts, levels, strict=True) if level >= lowest]
    found = count_corpus(open_corpus(corpus), rules, Spool(tmp_path), max_distinct=bound)
    assert found.sample["levels_left_out"] == lowest > 0
    assert found.words == words_of(kept, rules)
    assert found.sample["documents"] == len(kept) > 0
    assert found.sample["share_of_bytes"] == sum(len(t.encode()) for t in kept) / sum(len(t.encode()) for t in texts)
    assert found.seen["train"]["documents"] == len(texts)


def test_levels_halve_and_follow_the_seed():
    texts = [f"document {number}".encode() for number in range(4000)]
    levels = [[count._level(text, seed) for text in texts] for seed in (0, 1)]
    for found in levels:
        shares = [found.count(level) / len(texts) for level in range(4)]
        assert shares == pytest.approx([1 / 2, 1 / 4, 1 / 8, 1 / 16], abs=0.03)
    both = sum(a == b == 0 for a, b in zip(*levels, strict=True)) / len(texts)
    assert both == pytest.approx(1 / 4, abs=0.03), "the seeds draw independently"


def test_a_bound_that_no_sample_fits_in_is_refused(tmp_path):
    corpus = open_corpus(corpus_of(tmp_path / "text", DOCUMENTS[:20]))
    with pytest.raises(TokenizerError, match=r"(?s)max_distinct = 5 is too small.*use the default of 12,000,000"):
        count_corpus(corpus, Rules("byte"), Spool(tmp_path), max_distinct=5)
