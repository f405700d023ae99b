"""Reading a corpus: the files that a recipe names, the side of each document, and the corpus's fingerprint."""

import glob
import gzip
import hashlib
import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import unicodedata
from collections.abc import Callable
from itertools import accumulate, pairwise
from pathlib import Path

import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pretrain.cleaning.stage import CleanConfig
from pretrain.cleaning.stage import run as clean
from pretrain.corpus import SIDES, Chunk, Corpus, Shares, open_corpus
from pretrain.corpus.chunks import FilePart
from pretrain.corpus.recipe import Recipe, Source
from pretrain.corpus.records import Record, passages
from pretrain.corpus.sides import side_of
from pretrain.errors import ConfigError, CorpusError
from pretrain.processes.pool import ordered
from pretrain.storage.index import write_index
from tests.conftest import ROOT, SAMPLE
from tests.helpers.corpora import LONG, file, places, recipe, refused, skipped, source, texts

# The files that a recipe names


def test_another_field_and_a_stated_format_are_read(tmp_path):
    file(tmp_path, "a.data", '{"body": "in a", "text": 3}\n')
    file(tmp_path, "b.jsonl", "not JSON\n")
    path = recipe(
        tmp_path,
        {"name": "a", "files": ["a.data"], "format": "jsonl", "field": "body"},
        {"name": "b", "files": ["b.jsonl"], "format": "txt"},
    )
    assert [(d.text, d.source) for d in open_corpus(path).documents()] == [("in a", "a"), ("not JSON", "b")]


def test_a_corpus_opens_from_its_recipe_its_folder_or_one_file(tmp_path):
    one = file(tmp_path, "one.txt", "a\n\nb")
    path = recipe(tmp_path, {"name": "one", "files": ["one.txt"]})
    assert texts(path) == texts(tmp_path) == texts(one) == ["a", "b"]
    assert texts(recipe(tmp_path, {"name": "one", "files": [str(one.absolute())]})) == ["a", "b"]


def test_sources_and_files_come_in_the_order_of_the_recipe(tmp_path):
    for name in "abc":
        file(tmp_path, f"{name}.txt", f"{name}1\n\n{name}2")
    path = recipe(tmp_path, {"name": "x", "files": ["c.txt", "a.txt"]}, {"name": "y", "files": ["b.txt"]})
    found = [(d.text, d.source) for d in open_corpus(path).documents()]
    assert found == [("c1", "x"), ("c2", "x"), ("a1", "x"), ("a2", "x"), ("b1", "y"), ("b2", "y")]


def test_each_side_alone_is_the_part_of_both(tmp_path):
    corpus = Corpus(Recipe(name="r", heldout_fraction=0.3, sources=[Source(name="s", files=["t.txt"])]), tmp_path)
    file(tmp_path, "t.txt", LONG)
    both = list(corpus.documents())
    for side in ("train", "heldout"):
        assert list(corpus.documents((side,))) == [document for document in both if document.side == side]


def test_patterns_and_folders_are_the_files_in_them_sorted_by_name(tmp_path):
    for name in ("b.txt", "a/2.txt", "a/10.txt", "a/deep/er/x.txt", "a-b.txt", "Z.txt", "汉.txt", "é.txt", "a/n.jsonl"):
        file(tmp_path, name, '{"text": "x"}')
    for names, found in {
        ("*.txt",): ["Z.txt", "a-b.txt", "b.txt", "é.txt", "汉.txt"],
        ("a",): ["a/10.txt", "a/2.txt", "a/deep/er/x.txt", "a/n.jsonl"],
        ("a/**/*.txt",): ["a/10.txt", "a/2.txt", "a/deep/er/x.txt"],
        ("a/**",): ["a/10.txt", "a/2.txt", "a/deep/er/x.txt", "a/n.jsonl"],
        ("a/?.txt", "[A-Z].txt", "a/deep/"): ["a/2.txt", "Z.txt", "a/deep/er/x.txt"],
        (f"{tmp_path}/a/*.txt",): [f"{tmp_path}/a/10.txt", f"{tmp_path}/a/2.txt"],
    }.items():
        path = source(tmp_path, files=list(names))
        assert places(path) == [f"{file}, line 1" for file in found], names


def test_what_other_programs_leave_beside_text_is_passed_over_unless_it_is_named(tmp_path):
    file(tmp_path, "out/00000.jsonl", '{"text": "a"}')
    for name in (
        *("_SUCCESS", ".00000.jsonl.crc", ".cache/old.jsonl", "README.md", "README", "LICENSE.txt", "recipe.yaml"),
        *("index.json", "state.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "cache-1.arrow"),
    ):
        file(tmp_path, f"out/{name}", '{"text": "not text"}')
    for name in ("out", "out/*", "out/**"):
        assert places(source(tmp_path, files=[name])) == ["out/00000.jsonl, line 1"]
    assert texts(source(tmp_path, files=["out/index.json", "out/LICENSE.txt"])) == ["not text", '{"text": "not text"}']


def test_a_name_with_the_characters_of_a_pattern_is_a_name_where_such_a_file_is(tmp_path):
    file(tmp_path, "a[1].txt", "named")
    file(tmp_path, "a1.txt", "matched")
    assert texts(source(tmp_path, files=["a[1].txt"])) == ["named"]
    assert texts(source(tmp_path, files=["a[[]1].txt"])) == ["named"]
    assert texts(source(tmp_path, files=["a[1-9].txt"])) == ["matched"]


def test_names_that_stand_for_nothing_or_for_a_file_again_are_refused(tmp_path, capsys):
    file(tmp_path, "a/1.txt", "a")
    (tmp_path / "empty").mkdir()
    (tmp_path / "again.txt").symlink_to(tmp_path / "a/1.txt")
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone" / "lost.txt").symlink_to(tmp_path / "nosuch")
    for files, fragments in {
        ("*.jsonl",): ("no text file matches a pattern", "*.jsonl, of source 's'"),
        ("empty",): ("a folder holds no text", "empty, of source 's'"),
        ("empty/**",): ("no text file matches a pattern",),
        ("gone",): ("no such text file", "gone/lost.txt, of source 's'"),
        ("a/1.txt", "a/1.txt"): ("a file comes twice in a source", "a/1.txt, of source 's'"),
        ("a/1.txt", "a"): ("a file comes twice",),
        ("a/*.txt", "a/**"): ("a file comes twice",),
        ("a/1.txt", "./a/../a/1.txt"): ("a file comes twice",),
        ("a", "again.txt"): ("a file comes twice in a source", "again.txt, of source 's', is a/1.txt"),
    }.items():
        message = refused(source(tmp_path, files=list(files)))
        assert all(fragment in message for fragment in fragments), message
    twice = [{"name": name, "files": ["a/1.txt"]} for name in "xy"]
    assert texts(recipe(tmp_path, *twice)) == ["a", "a"]  # allowed in two sources, which may read two fields
    assert f"{tmp_path}/a/1.txt is in two sources: 'x' and 'y'" in capsys.readouterr().err


@pytest.mark.parametrize("files", ["t", "t/**/*.txt", "t/**", "**/*.txt", "t/*/**/*.txt", "t/**/inner/*.txt"])
def test_links_that_make_a_loop_are_followed_once(tmp_path, files):
    """Links to the folder itself, to the folder above it and between folders: every file comes once, by one path."""
    for name in ("a", "b", "c", "inner"):
        file(tmp_path, f"t/{name}/{name}.txt", name)
        for other in ("a", "b", "c"):
            (tmp_path / "t" / name / f"to-{other}").symlink_to(tmp_path / "t" / other)
        (tmp_path / "t" / name / "up").symlink_to("..")
    file(tmp_path, "t/inner/deep.txt", "deep")
    file(tmp_path, "elsewhere/far.txt", "far")
    (tmp_path / "t" / "x").symlink_to(".")
    (tmp_path / "t" / "y").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "t" / "broken").symlink_to("broken")
    names = ["a/a.txt", "b/b.txt", "c/c.txt", "inner/deep.txt", "inner/inner.txt", "y/far.txt"]
    names = [name for name in names if "inner" not in files or name.startswith("inner")]
    found = [f"t/{name}" for name in names]
    if files in ("t", "t/**"):
        (tmp_path / "t" / "broken").unlink()  # a link to nothing is refused as a missing file
    if files == "**/*.txt":
        found = ["elsewhere/far.txt", *found[:-1]]  # its own path needs no link
    corpus = open_corpus(source(tmp_path, files=[files]))
    assert corpus.files(corpus.recipe.sources[0]) == found


def test_patterns_match_what_glob_matches(tmp_path):
    for name in ("a.txt", "b/a.txt", "b/c/a.txt", "b/c/d.txt", ".hidden/a.txt", "b/.hidden.txt", "[x]/a.txt"):
        file(tmp_path, f"t/{name}", name)
    patterns = ("t/**/*.txt", "t/**", "**/c/*.txt", "t/**/c/**", "**/**/a.txt", "t/**/.hidden/*", "t/**/[[]x]/*.txt")
    for pattern in patterns:
        matched = glob.glob(pattern, root_dir=tmp_path, recursive=True)
        corpus = open_corpus(source(tmp_path, files=[pattern], format="txt"))
        found = corpus.files(corpus.recipe.sources[0])
        assert found and found == sorted({name for name in matched if (tmp_path / name).is_file()}), pattern


def test_a_file_whose_name_is_no_text_is_refused(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("a")
    message = refused(source(tmp_path, files=["*.txt"]))
    assert "a file's name is not valid UTF-8" in message and "caf\\udce9.txt" in message and "rename" in message
    message.encode()
    assert "File name too long" in refused(source(tmp_path, files=["x" * 5000]))


@pytest.mark.parametrize("files", [["f"], ["f/**/*.txt"], ["f/g/b.txt"]])
def test_a_folder_that_may_not_be_read_is_refused_rather_than_passed_over(files):
    def message() -> str:
        if os.getuid() == 0:  # root may read everything
            os.setuid(65534)
        return refused(source(folder, files=files))

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file(folder, "f/a.txt", "a")
        file(folder, "f/g/b.txt", "b")
        file(folder, "recipe.yaml", "")
        for path, mode in ((folder, 0o755), (folder / "recipe.yaml", 0o666), (folder / "f/g", 0)):
            path.chmod(mode)
        said = in_child(message)
        (folder / "f/g").chmod(0o755)
    assert "cannot read a text file" in said and "f/g" in said and "of source 's': Permission denied" in said


def in_child(work: Callable[[], str]) -> str:
    """Call `work` in a forked process and return its result."""
    reading, writing = os.pipe()
    if not os.fork():
        try:
            os.write(writing, work().encode())
        finally:
            os._exit(0)
    os.close(writing)
    os.wait()
    with open(reading, "rb") as stream:
        return stream.read().decode()


def test_a_folder_with_a_file_of_no_known_format_is_refused_rather_than_read_in_part(tmp_path):
    file(tmp_path, "a/1.txt", "a")
    file(tmp_path, "a/2.pdf", "b")
    message = refused(source(tmp_path, files=["a"]))
    assert "cannot tell the format" in message and "a/2.pdf" in message and "folder/**/*.txt" in message
    assert texts(source(tmp_path, files=["a"], format="txt")) == ["a", "b"]


def test_what_a_stage_wrote_beside_the_text_is_not_read_unless_it_is_named(tmp_path):
    file(tmp_path, "a/1.jsonl", '{"text": "a"}')
    file(tmp_path, "clean/part-00000.jsonl", '{"text": "b"}')
    write_index(tmp_path / "clean", {"stage": "clean"})
    for names in (["**/*.jsonl"], ["."], ["*/*.jsonl"], [f"{tmp_path}/**"]):
        message = refused(source(tmp_path, files=names))
        assert "the output of a stage" in message and f"{tmp_path / 'clean'}, of source 's'" in message
    for names in (["a", "clean"], ["a/*.jsonl", "clean/part-*"], ["a", "clean/part-00000.jsonl"]):
        assert texts(source(tmp_path, files=names)) == ["a", "b"]
    file(tmp_path, "index.json", "[]")
    assert texts(source(tmp_path, files=["[a]/*"])) == ["a"]


def test_a_file_of_no_known_format_is_refused_before_any_work(tmp_path):
    for name in ("text.csv", "text", "text.txt.lz4", "text.gz", "text.parquet.gz", "text.arrow.zst"):
        path = file(tmp_path, name, "a")
        with pytest.raises(CorpusError, match="cannot tell the format") as error:
            open_corpus(path)
        assert str(path) in str(error.value) and "set format: to one of txt, jsonl, parquet, arrow" in str(error.value)


def test_a_missing_file_is_refused_before_any_work(tmp_path):
    file(tmp_path, "there.txt", b"\xff")
    path = recipe(tmp_path, {"name": "s", "files": ["there.txt", "nosuch.txt"]})
    with pytest.raises(CorpusError, match="no such text file") as error:
        open_corpus(path)
    assert f"{tmp_path / 'nosuch.txt'}, of source 's'" in str(error.value)
    with pytest.raises(CorpusError, match="no such text file"):
        open_corpus(tmp_path / "nosuch.txt")
    with pytest.raises(ConfigError, match="no such configuration file"):
        open_corpus(tmp_path / "nosuch.yaml")
    (tmp_path / "folder").mkdir()
    with pytest.raises(
        CorpusError, match=r"(?s)the folder has no recipe\.yaml.*folder.*beside the text .*, or name one file"
    ):
        open_corpus(tmp_path / "folder")


@pytest.mark.parametrize(
    ("keys", "fragment"),
    [
        ({"heldout_fraction": 0}, "heldout_fraction = '0'"),
        ({"heldout_fraction": 1}, "heldout_fraction = '1'"),
        ({"heldout_fraction": "nan"}, "heldout_fraction = 'nan'"),
        ({"sources": []}, "sources = []"),
        ({"sources": [{"name": "a", "files": ["a.txt"], "heldout_fraction": 1.1}]}, "heldout_fraction = '1.1'"),
        ({"sources": [{"name": "a", "files": ["a"], "heldout_fraction": 0, "heldout_documents": 2}]}, "remove one"),
        ({"sources": [{"name": "a", "files": ["a.txt"], "split_characters": 5}]}, "split_characters = '5'"),
        ({"sources": [{"name": "a", "files": []}]}, "the source 'a' needs either files: or dataset:"),
        ({"sources": [{"name": n, "files": ["a.txt"]} for n in "aba"]}, "two sources share a name: a: rename one"),
        ({"sources": [{"name": "a", "files": ["a.txt"], "format": "csv"}]}, "sources.0.format = 'csv'"),
        ({"sources": [{"name": "a", "files": ["a.txt"], "language": "English"}]}, "no tag such as en, zh-Hant or und"),
    ],
)
def test_a_senseless_recipe_is_refused(tmp_path, keys, fragment):
    file(tmp_path, "a.txt", "a")
    with pytest.raises(ConfigError) as error:
        open_corpus(recipe(tmp_path, {"name": "a", "files": ["a.txt"]}, **keys))
    assert str(tmp_path / "recipe.yaml") in str(error.value) and fragment in str(error.value)


# Sides


def test_the_side_is_written_out_once_and_for_all():
    """These sides may never change: scores of different months are compared on them."""
    held = [n for n in range(40) if side_of(f"document {n}", 0.25) == "heldout"]
    assert held == [0, 3, 6, 16, 17, 18, 20, 24, 26, 34, 36]


@given(st.text(st.sampled_from("ab漢é\u0301 \n\t\x1c\x85\xa0\u2003\u3000"), max_size=40))
@example(" a  b   c" * 99 + "\n")
@settings(deadline=None, derandomize=True, max_examples=400)
def test_the_side_is_that_of_the_hash_of_the_folded_text(text):
    folded = " ".join(unicodedata.normalize("NFC", text).split())
    draw = int.from_bytes(hashlib.blake2b(folded.encode(), digest_size=8).digest(), "little")
    for fraction in (0.01, 0.3, 0.7):
        assert side_of(text, fraction) == ("heldout" if draw < int(fraction * 2**64) else "train")


@given(st.text(st.characters(exclude_categories=["Cs"])), st.integers(0, 2**32))
@settings(deadline=None, derandomize=True)
def test_white_space_and_composition_do_not_move_a_document(text, seed):
    draw = random.Random(seed)
    spaces = "".join(draw.choice((" ", "\n", "\r\n", "\t", "\u3000", "  ")) if c.isspace() else c for c in text)
    for other in (spaces, f"\n{text} ", *(unicodedata.normalize(form, text) for form in ("NFC", "NFD"))):
        assert side_of(other, 0.5) == side_of(text, 0.5)


def test_a_document_held_out_stays_so_when_the_fraction_grows():
    for text in map(str, range(300)):
        sides = [side_of(text, fraction) for fraction in (0.01, 0.1, 0.3, 0.9)]
        assert sides == sorted(sides, reverse=True)  # "train" … "heldout"


@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.3])
def test_the_heldout_share_is_near_its_fraction(fraction):
    n = 20_000
    held = sum(side_of(f"{i} 文 {i * i}", fraction) == "heldout" for i in range(n))
    assert abs(held - n * fraction) < 4 * (n * fraction * (1 - fraction)) ** 0.5


def heldout_of(folder: Path, texts: list[str], **keys) -> set[str]:
    content = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    file(folder, "a.jsonl", content)
    corpus = open_corpus(source(folder, files=["a.jsonl"], **keys))
    found = {document.text for document in corpus.documents(("heldout",))}
    there = pickle.loads(pickle.dumps(corpus))  # another process gets the bounds and does not read the corpus for them
    (folder / "a.jsonl").unlink()
    assert found == {d.text for chunk in chunks_of_lines(content) for d in there.read(chunk) if d.side == "heldout"}
    return found


def chunks_of_lines(content: str) -> list[Chunk]:
    return [Chunk(0, (FilePart("a.jsonl", "lines", 1, content.encode()),))]


def test_a_source_may_hold_out_a_fraction_of_its_own_or_a_least_number_of_documents(tmp_path):
    texts = [f"novel {n}" for n in range(60)]
    by_hash = sorted(texts, key=lambda t: int.from_bytes(hashlib.blake2b(t.encode(), digest_size=8).digest(), "little"))
    assert heldout_of(tmp_path, texts, heldout_fraction=0) == set()
    assert heldout_of(tmp_path, texts, heldout_fraction=1) == set(texts)
    assert heldout_of(tmp_path, texts, heldout_fraction=0.3) == {t for t in texts if side_of(t, 0.3) == "heldout"}
    for least in (1, 5, 60, 1000):
        assert heldout_of(tmp_path, [*texts, *texts], heldout_fraction=1e-9, heldout_documents=least) == set(
            by_hash[:least]
        )
    some = heldout_of(tmp_path, texts, heldout_fraction=0.3)
    assert len(some) > 5 and heldout_of(tmp_path, texts, heldout_fraction=0.3, heldout_documents=5) == some
    before = heldout_of(tmp_path, texts[:50], heldout_documents=4)
    for n in range(50, 60):  # a new document moves at most one other document, to train
        after = heldout_of(tmp_path, texts[: n + 1], heldout_documents=4)
        assert after - {texts[n]} <= before and len(after) == 4
        before = after


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from(["x" * 30, "y" * 130, "\u3000indented", "", " ", "中" * 60]), max_size=40),
    st.sampled_from(["\n", "\n\n", "\n \n"]),
)
@example(["x" * 30, "", "", "中" * 60, "", "", "x" * 30, "x" * 30], "\n\n")  # the first passage ends in blank lines
def test_passages_are_the_text_in_order_cut_at_ends_of_lines(lines, between):
    text = between.join(lines).strip()
    record = Record(text, "a.txt, line 7")
    found = list(passages([record], 100, "file"))
    assert [line for passage in found for line in passage.text.split("\n") if line.strip()] == [
        line for line in text.split("\n") if line.strip()
    ]
    at = dict(enumerate(text.split("\n"), 7))
    for passage in found:
        assert at[int(passage.where.removeprefix("a.txt, line "))] == passage.text.split("\n")[0]
    if len(text) < 150:
        assert [passage.text for passage in found] == [text][: len(found)]
    # White space at the end of a passage is left out, so measure from where it begins to where the next one begins.
    begins = dict(enumerate(accumulate((len(line) + 1 for line in text.split("\n")), initial=0), 7))
    places = [begins[int(passage.where.removeprefix("a.txt, line "))] for passage in found]
    assert all(after - before >= 100 for before, after in pairwise(places))
    for passage in found[:-1]:
        assert len(passage.text) <= 200 + max(map(len, passage.text.split("\n"))) + 3


def test_a_set_of_shards_says_which_sources_have_rules_of_their_own(tmp_path):
    """The stage reshard then searches joined sets for documents that are on both sides."""
    file(tmp_path, "a.txt", "one\n\ntwo")
    plain = {"by": "text", "heldout_fraction": 0.01}
    assert open_corpus(source(tmp_path, files=["a.txt"])).split == plain
    corpus = open_corpus(source(tmp_path, files=["a.txt"], heldout_documents=1, split_characters=500))
    assert corpus.split == {**plain, "sources": {"s": {"heldout_documents": 1, "split_characters": 500}}}


def test_passages_of_a_book_are_held_out_where_a_source_says_so(tmp_path):
    """A paragraph in front of the book moves no passage that lies far behind it."""
    paragraphs = [f"Chapter {n}. " + " ".join(f"word{n * k % 97}" for k in range(120)) for n in range(200)]
    file(tmp_path, "book.txt", "\n\n".join(paragraphs))
    file(tmp_path, "book.jsonl", json.dumps({"text": "\n".join(paragraphs)}))
    for keys in ({"files": ["book.txt"], "documents": "file"}, {"files": ["book.jsonl"]}):
        path = source(tmp_path, **keys, split_characters=1500, heldout_fraction=0.2)
        documents = list(open_corpus(path).documents())
        joined = "\n\n".join(d.text for d in documents) if "documents" in keys else "\n".join(d.text for d in documents)
        assert joined == ("\n\n" if "documents" in keys else "\n").join(paragraphs)
        held = [document for document in documents if document.side == "heldout"]
        assert 60 < len(documents) < 110 and 5 < len(held) < 35
        assert all(side_of(document.text, 0.2) == document.side for document in documents)


def test_a_source_that_is_on_one_side_alone_is_said(capsys):
    shares = Shares()
    for name, *documents in (("novels", 54, 0), ("web", 990, 10), ("tests", 0, 3), ("meant", 7, 0), ("none", 0, 0)):
        for side, count in zip(SIDES, documents, strict=True):
            shares.add(name, side, count, 100 * count)
    assert list(shares.lacking(frozenset({"meant"}))) == [
        "source 'novels': none of its 54 documents (5.1% of all bytes) is held out",
        "source 'tests': none of its 3 documents (0.3% of all bytes) is left to train on",
    ]
    shares.show(frozenset({"meant"}))
    said = capsys.readouterr()
    assert re.search(r"novels +54 +5,400 +0 +0 +0\.00%\nweb +990 +99,000 +10 +1,000 +1\.00%", said.out)
    assert "heldout_documents: 1 (or more)" in said.err and "split_characters: 4000" in said.err


PAIR = {"field": "input", "output_field": "reply.text"}


def pair(given: object, answer: object, **more: object) -> str:
    return json.dumps({"input": given, "reply": {"text": answer}, **more}, ensure_ascii=False) + "\n"


def test_an_input_and_an_output_are_one_document_on_the_side_of_the_input(tmp_path):
    file(tmp_path, "a.jsonl", "".join(pair(f"问 {n % 400}", f"answer {n}") for n in range(800)))
    corpus = open_corpus(source(tmp_path, files=["a.jsonl"], **PAIR, heldout_fraction=0.25))
    documents = list(corpus.documents())
    assert [d.text for d in documents] == [f"问 {n % 400}\nanswer {n}" for n in range(800)]
    assert {d.text[: d.input_characters] for d in documents} == {f"问 {n}" for n in range(400)}
    assert all(d.side == side_of(d.text.split("\n")[0], 0.25) for d in documents)
    assert 50 < sum(d.side == "heldout" for d in documents) < 350
    assert corpus.recipe.paired == ["s"] and "output_field" in corpus.fingerprint()["sources"][0]
    held = open_corpus(source(tmp_path, files=["a.jsonl"], **PAIR, heldout_fraction=1e-9, heldout_documents=7))
    assert sum(d.side == "heldout" for d in held.documents()) == 14, "7 inputs, each with two outputs"


def test_records_that_are_no_pairs_are_bad_and_empty_halves_are_left_out(tmp_path):
    lines = [pair("a", "b"), pair("a", None), pair(3, "b"), pair("  ", "b"), pair("a", ""), '{"input": "a"}\n']
    file(tmp_path, "a.jsonl", "".join([*lines, pair("a", "\\ud800").replace("\\\\", "\\")]))
    said = refused(source(tmp_path, files=["a.jsonl"], **PAIR))
    assert "a record has no text under 'input' and 'reply.text': reply.text: null" in said
    assert "set field: and output_field: in the recipe" in said and "a lone surrogate" in said
    found, counts = skipped(source(tmp_path, files=["a.jsonl"], **PAIR, bad_records="skip"))
    assert found == ["a\nb"] and counts == {"s": {"no text": 3, "empty": 2, "not Unicode": 1}}


def test_pairs_are_refused_where_they_cannot_be_read(tmp_path):
    file(tmp_path, "a.txt", "one\n\ntwo")
    with pytest.raises(CorpusError, match="output_field: is for records") as error:
        open_corpus(source(tmp_path, files=["a.txt"], **PAIR))
    assert "name it .jsonl" in str(error.value)
    with pytest.raises(ConfigError, match="never split: remove split_characters"):
        open_corpus(source(tmp_path, files=["a.txt"], **PAIR, split_characters=500))


def test_pairs_are_refused_by_cleaning_before_any_work(tmp_path):
    file(tmp_path, "a.jsonl", pair("a", "b"))
    path = source(tmp_path, files=["a.jsonl"], **PAIR)
    with pytest.raises(CorpusError, match="labelled pairs cannot be cleaned") as error:
        clean(CleanConfig(corpus=str(path), out=str(tmp_path / "out")))
    assert "source 's' has output_field:" in str(error.value) and not (tmp_path / "out").exists()


def test_renaming_reordering_splitting_and_adding_files_move_nobody(tmp_path):
    documents = LONG.split("\n\n")[:500]
    half, more = len(documents) // 2, [f"added {n}" for n in range(300)]
    layouts = {
        "one": {"a.txt": documents},
        "renamed": {"folder/z.txt": documents},
        "split": {"b.txt": documents[half:], "a.txt": documents[:half]},
        "reversed": {"a.txt": documents[::-1]},
        "added": {"0.txt": more, "a.txt": documents},
    }
    found = {}
    for layout, files in layouts.items():
        (tmp_path / layout / "folder").mkdir(parents=True)
        for name, lines in files.items():
            file(tmp_path / layout, name, "\n\n".join(lines))
        path = recipe(tmp_path / layout, {"name": layout, "files": list(files)}, heldout_fraction=0.2)
        found[layout] = {d.text: d.side for d in open_corpus(path).documents()}
    assert {"train", "heldout"} == set(found["one"].values())
    for layout, sides in found.items():
        assert {text: sides[text] for text in documents} == found["one"], layout


# Identity


def test_the_fingerprint_is_of_contents_and_not_of_places(tmp_path):
    def fingerprint(
        folder: str, name: str = "a.txt", content: bytes = b"one\n\ntwo", source: dict | None = None, **keys
    ):
        (tmp_path / folder).mkdir(exist_ok=True)
        file(tmp_path / folder, name, content)
        return open_corpus(
            recipe(tmp_path / folder, {"name": "s", "files": [name], **(source or {})}, **keys)
        ).fingerprint()

    same = fingerprint("a")
    assert fingerprint("b", "other.txt") == same
    assert fingerprint("c", source={"language": "en", "licence": "x"}, name="n.txt") == same
    assert fingerprint("l", source={"bad_records": "skip"}) == same
    assert fingerprint("m", source={"files": ["*"]}) == fingerprint("n", source={"files": ["."]}) == same
    others = [
        fingerprint("d", content=b"one\n\ntwo\n"),
        fingerprint("e", source={"format": "jsonl"}),
        fingerprint("f", source={"field": "body"}),
        fingerprint("j", source={"documents": "file"}),
        fingerprint("k", source={"max_record_bytes": 100}),
        fingerprint("g", source={"name": "t"}),
        fingerprint("h", heldout_fraction=0.02),
        fingerprint("i", "a.txt.gz", gzip.compress(b"one\n\ntwo", mtime=0)),
        fingerprint("l", source={"heldout_fraction": 0.01}),
        fingerprint("m", source={"heldout_documents": 1}),
        fingerprint("n", source={"split_characters": 100}),
    ]
    distinct = {json.dumps(found, sort_keys=True) for found in [same, *others]}
    assert len(distinct) == 12


def test_the_fingerprint_of_a_single_file_is_not_of_its_name(tmp_path):
    a, b = file(tmp_path, "a.txt", "one"), file(tmp_path, "b.more.txt", "one")
    assert open_corpus(a).fingerprint() == open_corpus(b).fingerprint()
    assert open_corpus(a).fingerprint() != open_corpus(file(tmp_path, "c.txt", "two")).fingerprint()


def test_the_order_of_files_is_part_of_the_fingerprint(tmp_path):
    file(tmp_path, "a.txt", "one")
    file(tmp_path, "b.txt", "two")
    ab = open_corpus(recipe(tmp_path, {"name": "s", "files": ["a.txt", "b.txt"]})).fingerprint()
    ba = open_corpus(recipe(tmp_path, {"name": "s", "files": ["b.txt", "a.txt"]})).fingerprint()
    assert ab != ba


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path):
    path = file(tmp_path, "a.txt", "one\n\ntwo")
    corpus = open_corpus(path)
    list(corpus.documents())
    with open(path, "a") as out:
        out.write("\n\nthree")
    with pytest.raises(CorpusError, match="a file changed while it was read") as error:
        corpus.fingerprint()
    assert str(path) in str(error.value)


@pytest.mark.parametrize("replaced", [False, True])
def test_a_change_is_seen_where_size_and_time_are_kept(tmp_path, replaced):
    path = file(tmp_path, "a.txt", "alpha\n\ntwo")
    before = path.stat()
    corpus = open_corpus(path)
    assert [document.text for document in corpus.documents()] == ["alpha", "two"]
    while time.time_ns() < before.st_ctime_ns + 20_000_000:  # the clock of a file system has steps of some milliseconds
        time.sleep(0.005)
    other = file(tmp_path, "other.txt", "OMEGA\n\ntwo")
    other.replace(path) if replaced else path.write_bytes(other.read_bytes())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(CorpusError, match="a file changed while it was read"):
        corpus.fingerprint()
    shutil.copytree(tmp_path, tmp_path.with_name(f"{tmp_path.name}-copy"))
    moved = tmp_path.with_name(f"{tmp_path.name}-copy").rename(tmp_path.with_name(f"{tmp_path.name}-moved"))
    # Between two runs, times and places may change.
    assert open_corpus(moved / "a.txt").fingerprint() == open_corpus(path).fingerprint()


def test_a_file_is_hashed_once(tmp_path):
    path = file(tmp_path, "a.txt", "one")
    corpus = open_corpus(path)
    first = corpus.fingerprint()
    path.unlink()
    assert corpus.fingerprint() == first


# Chunks, in other processes


def _read(work: tuple) -> list:
    corpus, chunk = work
    return list(corpus.read(chunk))


def test_chunks_read_in_other_processes_give_the_documents_in_order(tmp_path):
    file(tmp_path, "a.txt", LONG)
    file(tmp_path, "b.jsonl.gz", gzip.compress("".join(json.dumps({"text": t}) + "\n" for t in LONG.split()).encode()))
    file(tmp_path, "many/0.txt", "0")
    for n in range(1, 50):
        file(tmp_path, f"many/{n:02d}.txt", str(n))
    path = recipe(tmp_path, *({"name": name, "files": [name]} for name in ("a.txt", "b.jsonl.gz", "many")))
    corpus = open_corpus(path)
    chunks = list(corpus.chunks(20_000))
    assert pickle.loads(pickle.dumps(chunks)) == chunks
    assert [chunk.source for chunk in chunks] == sorted(chunk.source for chunk in chunks)
    assert sum(chunk.source == 2 for chunk in chunks) == 1  # small files share one
    assert sum(chunk.bytes for chunk in chunks if chunk.source == 0) == len(LONG.encode())
    in_order = [d for found in ordered(_read, ((corpus, chunk) for chunk in chunks), workers=2) for d in found]
    assert in_order == list(corpus.documents())


# Corpora that the stage `clean` published


def cleaned(folder: Path, documents: list[dict], parts: int = 2) -> Path:
    """A cleaned corpus as the stage writes it: the documents are dealt out in order over `parts` files."""
    folder.mkdir()
    for part in range(parts):
        lines = documents[part * len(documents) // parts : (part + 1) * len(documents) // parts]
        data = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
        (folder / f"part-{part:05d}.jsonl.zst").write_bytes(zstandard.compress(data))
    (folder / "report.json").write_text("{}", encoding="utf-8")
    sources = [{"name": name, "language": name, "licence": "none"} for name in ("en", "zh")]
    index = {"stage": "clean", "name": "made", "heldout_fraction": 0.25, "sources": sources}
    write_index(folder, index)
    return folder


def records(n: int) -> list[dict]:
    """All documents but one are held out. No hash gives these sides, so they must come from the folder."""
    return [
        {
            "text": f"文 {i}",
            "source": "en",
            "language": "en",
            "side": "heldout" if i else "train",
            "where": f"a, line {i}",
            "input_characters": None,
        }
        for i in range(n)
    ]


def test_a_cleaned_corpus_is_read_as_it_was_written(tmp_path):
    folder = cleaned(tmp_path / "clean", records(9))
    corpus = open_corpus(folder)
    assert [vars(document) for document in corpus.documents()] == records(9)
    assert [d.text for d in corpus.documents(("train",))] == ["文 0"]
    chunks = list(pickle.loads(pickle.dumps(corpus)).chunks(100))
    assert len(chunks) > 2 and [d for c in chunks for d in corpus.read(c)] == list(corpus.documents())
    assert corpus.fingerprint() == {"clean": json.loads((folder / "index.json").read_text())["fingerprint"]}
    assert corpus.recipe.heldout_fraction == 0.25 and [s.name for s in corpus.recipe.sources] == ["en", "zh"]


def test_a_damaged_cleaned_corpus_is_refused(tmp_path):
    folder = cleaned(tmp_path / "clean", records(9))
    part = folder / "part-00001.jsonl.zst"
    whole = part.read_bytes()
    for damaged, fragment in ((whole[:-1], "truncated?"), (whole[:-1] + b"x", "part-00001.jsonl.zst: altered")):
        part.write_bytes(damaged)
        message = refused(folder)
        assert fragment in message and str(folder) in message
    part.unlink()
    assert "is missing" in refused(folder)
    for wrong in ({"text": "a"}, {**records(1)[0], "more": 1}, [1]):
        again = cleaned(tmp_path / f"wrong{len(list(tmp_path.iterdir()))}", [*records(1), wrong], parts=1)
        assert f"a cleaned corpus is damaged\n  {again}/part-00000.jsonl.zst, line 2: " in refused(again)


def test_a_part_that_is_altered_while_a_large_cleaned_corpus_is_read_is_refused(tmp_path, monkeypatch):
    """A folder that is too large to be hashed when it is opened: the parts are hashed while they are read."""
    monkeypatch.setattr("pretrain.storage.index.SMALL", 0)
    folder = cleaned(tmp_path / "clean", records(9))
    corpus = open_corpus(folder)
    assert len(list(corpus.documents())) == 9
    part = folder / "part-00001.jsonl.zst"
    data = zstandard.decompress(part.read_bytes())
    part.write_bytes(zstandard.compress(data.replace("文 8".encode(), "书 8".encode())))
    read = []
    with pytest.raises(CorpusError, match="altered after it was made") as error:
        read.extend(document.text for document in pickle.loads(pickle.dumps(corpus)).documents())
    assert str(part) in str(error.value) and "书 8" not in read
    part.unlink()
    with pytest.raises(CorpusError, match="cannot read a text file"):
        list(corpus.documents())


def test_a_folder_of_another_stage_is_refused(tmp_path):
    write_index(tmp_path, {"stage": "shards"})
    message = refused(tmp_path)
    assert "is not of the stage clean" in message and 'stage "shards"' in message and "launch/clean.py" in message


# The committed sample


def test_the_sample_has_both_languages_on_both_sides():
    found = {(document.source, document.side) for document in open_corpus(SAMPLE).documents()}
    assert found == {(source, side) for source in ("kjv", "poems") for side in ("train", "heldout")}


def test_reading_a_corpus_imports_no_library_that_it_does_not_need():
    code = (
        "import sys; from pretrain.corpus import open_corpus; found = list(open_corpus(sys.argv[1]).documents()); "
        "print(len(found) > 100, {'torch', 'datasets', 'pyarrow', 'zstandard'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, SAMPLE], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "True set()\n"


def test_a_link_that_leads_nowhere_is_no_text_file(tmp_path):
    """The error is about the missing file, not about its name, which does not tell a format either."""
    file(tmp_path, "a/x.txt", "one\n\ntwo\n")
    (tmp_path / "a/self").symlink_to("self")
    with pytest.raises(CorpusError, match=r"no such text file\n.*a/self, of source 's'"):
        open_corpus(source(tmp_path, files=["a"]))
