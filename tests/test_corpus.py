"""Text in: which documents a file holds, what is refused with its place, and that a document's side is its own."""

import gzip
import itertools
import json
import random
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import yaml
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.corpus import Corpus, Recipe, Source, open_corpus, side_of
from pretrain.errors import ConfigError, CorpusError
from tests.conftest import ROOT, SAMPLE

PACK = {"": bytes, ".gz": lambda data: gzip.compress(data, mtime=0), ".zst": zstandard.compress}
LONG = "\n\n".join(f"Document {n} of {'many' * (n % 7)}: {n**5:x} 漢字." for n in range(4000))


def texts(path: Path) -> list[str]:
    return [document.text for document in open_corpus(path).documents()]


def file(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return path


def recipe(folder: Path, *sources: dict, **keys) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"name": "made", "sources": list(sources), **keys}), encoding="utf-8")
    return path


def refused(path: Path) -> str:
    with pytest.raises(CorpusError) as error:
        texts(path)
    return str(error.value)


# Documents of a file


@pytest.mark.parametrize("pack", PACK)
@pytest.mark.parametrize(
    ("content", "documents"),
    [
        ("one\n\ntwo\n", ["one", "two"]),
        ("one\n\ntwo", ["one", "two"]),
        ("one\r\nline two\r\n\r\ntwo\r\n", ["one\nline two", "two"]),
        ("\ufeffone\n\n\ufefftwo\n", ["one", "\ufefftwo"]),
        ("\n\n \n one \n\u3000\t\n\n  two\n three\n\n\n", [" one ", "  two\n three"]),
        ("a\rb\u2028c\x0bd\x85e\n\nf", ["a\rb\u2028c\x0bd\x85e", "f"]),
        ("床前明月光，\n疑是地上霜。\n\n静夜思", ["床前明月光，\n疑是地上霜。", "静夜思"]),
        ("\n \n\n", []),
        ("", []),
    ],
)
def test_a_txt_file_holds_the_blocks_between_blank_lines(tmp_path, pack, content, documents):
    path = file(tmp_path, f"text.txt{pack}", PACK[pack](content.encode("utf-8")))
    assert texts(path) == documents


@pytest.mark.parametrize("pack", PACK)
def test_a_jsonl_file_holds_one_document_a_line(tmp_path, pack):
    lines = [
        '\ufeff{"text": "one\\n\\ntwo"}\r\n',
        "\n",
        '{"id": 3, "text": " 漢\\u5b57\\ud83d\\ude00 "}\n',
        '{"text": ""}\n',
    ]
    content = "".join([*lines, '{"text": " \\n"}\n', '{"text": "last"}']).encode("utf-8")
    path = file(tmp_path, f"text.jsonl{pack}", PACK[pack](content))
    assert texts(path) == ["one\n\ntwo", " 漢字\U0001f600 ", "last"]


def test_another_field_and_a_stated_format_are_read(tmp_path):
    file(tmp_path, "a.data", '{"body": "in a", "text": 3}\n')
    file(tmp_path, "b.jsonl", "not JSON\n")
    path = recipe(
        tmp_path,
        {"name": "a", "files": ["a.data"], "format": "jsonl", "field": "body"},
        {"name": "b", "files": ["b.jsonl"], "format": "txt"},
    )
    assert [(d.text, d.source) for d in open_corpus(path).documents()] == [("in a", "a"), ("not JSON", "b")]


def test_compressed_members_follow_one_another(tmp_path):
    """As `cat a.gz b.gz`, pigz and pzstd make them; the cut falls inside a character."""
    data = LONG.encode("utf-8")
    cuts = [0, 1000, 1001, len(data) // 2, len(data)]
    parts = [data[a:b] for a, b in itertools.pairwise(cuts)]
    skippable = b"\x50\x2a\x4d\x18\x04\x00\x00\x00skip"
    for suffix in (".gz", ".zst"):
        whole = b"".join([*map(PACK[suffix], parts), PACK[suffix](b""), skippable if suffix == ".zst" else b""])
        assert texts(file(tmp_path, f"text.txt{suffix}", whole)) == LONG.split("\n\n")


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


# What is refused


@pytest.mark.parametrize("pack", PACK)
@pytest.mark.parametrize(
    ("content", "line", "byte", "found"),
    [
        (b"fine\n\nr\xe9sum\xe9\n", 3, 2, "0xe9"),
        (b"\xff\xfea\x00", 1, 1, "0xff"),
        (b"fine\r\nab \xed\xa0\x80", 2, 4, "0xed"),
        ("fine\n漢".encode()[:-1], 2, 1, "0xe6"),
        (b"a\n" * 999 + b"\xc0\x80\n", 1000, 1, "0xc0"),
    ],
)
def test_invalid_utf8_is_refused_with_file_line_and_byte(tmp_path, pack, content, line, byte, found):
    path = file(tmp_path, f"text.txt{pack}", PACK[pack](content))
    message = refused(path)
    assert message.startswith("the text is not valid UTF-8\n")
    assert f"{path}, line {line}, byte {byte} of the line: {found}\n" in message and "iconv" in message


@pytest.mark.parametrize(
    ("line", "fragments"),
    [
        ('{"body": "a", "id": 1}', ("no text under 'text'", "found: body, id", "set field:")),
        ("{}", ("no text under 'text'", "found: nothing")),
        ('{"text": null}', ("no text under 'text'", "found: text")),
        ('{"text": ["a"]}', ("no text under 'text'",)),
        ('["a"]', ("no text under 'text'", "found: list")),
        ("{'text': 'a'}", ("a line is not JSON",)),
        ('{"text": "a"', ("a line is not JSON",)),
        ("[" * 100_000, ("a line is not JSON",)),
        ('{"text": "a", "n": ' + "9" * 5000 + "}", ("a line is not JSON",)),
        ('{"text": "ab\\ud800c"}', ("not valid Unicode", "a lone surrogate at character 3")),
        ('{"text": "\\udc00\\ud800"}', ("not valid Unicode", "a lone surrogate at character 1")),
    ],
)
def test_a_bad_record_is_refused_with_file_and_line(tmp_path, line, fragments):
    path = file(tmp_path, "text.jsonl", '{"text": "fine"}\n\n' + line + "\n")
    message = refused(path)
    for fragment in (f"{path}, line 3", *fragments):
        assert fragment in message


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_truncated_compressed_file_is_refused_wherever_it_was_cut(tmp_path, suffix):
    data = PACK[suffix](LONG.encode("utf-8"))
    for size in (0, 1, 5, 20, len(data) // 2, len(data) - 1):
        path = file(tmp_path, f"text.txt{suffix}", data[:size])
        message = refused(path)
        assert message.startswith(f"a compressed file is damaged\n  {path}: "), size
        assert "copy or compress it again" in message


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_damaged_compressed_file_is_refused(tmp_path, suffix):
    """Any byte of gzip (its trailer is a checksum); of zstd, written with its checksum, too."""
    data = LONG.encode("utf-8")
    packed = zstandard.ZstdCompressor(write_checksum=True).compress(data) if suffix == ".zst" else gzip.compress(data)
    draw = random.Random(0)
    header = 10 if suffix == ".gz" else 0  # a flag or the time in the header of gzip may differ without harm
    for _ in range(40):
        damaged = bytearray(packed)
        damaged[draw.randrange(header, len(packed))] ^= 1 << draw.randrange(8)
        path = file(tmp_path, f"text.txt{suffix}", bytes(damaged))
        try:
            assert texts(path) == LONG.split("\n\n")  # a bit that says nothing
        except CorpusError as error:
            assert str(path) in str(error)
    assert refused(file(tmp_path, f"text.txt{suffix}", b"plain text")).startswith("a compressed file is damaged")


def test_a_file_of_no_known_format_is_refused_before_any_work(tmp_path):
    for name in ("text.csv", "text", "text.txt.bz2", "text.gz"):
        path = file(tmp_path, name, "a")
        with pytest.raises(CorpusError, match="cannot tell the format") as error:
            open_corpus(path)
        assert str(path) in str(error.value) and "set format: txt or jsonl" in str(error.value)


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
    with pytest.raises(ConfigError, match="no such configuration file"):
        open_corpus(tmp_path / "folder")


@pytest.mark.parametrize(
    ("keys", "fragment"),
    [
        ({"heldout_fraction": 0}, "heldout_fraction = '0'"),
        ({"heldout_fraction": 1}, "heldout_fraction = '1'"),
        ({"heldout_fraction": "nan"}, "heldout_fraction = 'nan'"),
        ({"sources": []}, "sources = []"),
        ({"sources": [{"name": "a", "files": []}]}, "sources.0.files = []"),
        ({"sources": [{"name": "a", "files": ["a.txt"]}] * 2}, "two sources share a name: a, a"),
        ({"sources": [{"name": "a", "files": ["a.txt"], "format": "csv"}]}, "sources.0.format = 'csv'"),
    ],
)
def test_a_senseless_recipe_is_refused(tmp_path, keys, fragment):
    file(tmp_path, "a.txt", "a")
    with pytest.raises(ConfigError) as error:
        open_corpus(recipe(tmp_path, {"name": "a", "files": ["a.txt"]}, **keys))
    assert str(tmp_path / "recipe.yaml") in str(error.value) and fragment in str(error.value)


def test_without_zstandard_a_zst_file_says_what_to_install(tmp_path):
    path = file(tmp_path, "text.txt.zst", zstandard.compress(b"a"))
    code = (
        "import sys; sys.modules['zstandard'] = None  # as if it were not installed\n"
        "from pretrain.corpus import open_corpus\n"
        "list(open_corpus(sys.argv[1]).documents())"
    )
    done = subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, capture_output=True, text=True)
    assert f"CorpusError: {path} needs the package zstandard" in done.stderr and "pip install '.[data]'" in done.stderr


# Sides


def test_the_side_is_written_out_once_and_for_all():
    """These sides may never change: scores of different months are compared on them."""
    held = [n for n in range(40) if side_of(f"document {n}", 0.25) == "heldout"]
    assert held == [0, 3, 6, 16, 17, 18, 20, 24, 26, 34, 36]


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
    others = [
        fingerprint("d", content=b"one\n\ntwo\n"),
        fingerprint("e", source={"format": "jsonl"}),
        fingerprint("f", source={"field": "body"}),
        fingerprint("g", source={"name": "t"}),
        fingerprint("h", heldout_fraction=0.02),
        fingerprint("i", "a.txt.gz", gzip.compress(b"one\n\ntwo", mtime=0)),
    ]
    distinct = {json.dumps(found, sort_keys=True) for found in [same, *others]}
    assert len(distinct) == 7


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


# The committed sample


def test_the_sample_has_both_languages_on_both_sides():
    found = {(document.source, document.side) for document in open_corpus(SAMPLE).documents()}
    assert found == {(source, side) for source in ("kjv", "poems") for side in ("train", "heldout")}


def test_reading_a_corpus_imports_neither_torch_nor_a_compressor():
    code = (
        "import sys; from pretrain.corpus import open_corpus; found = list(open_corpus(sys.argv[1]).documents()); "
        "print(len(found) > 100, {'torch', 'datasets', 'zstandard'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, SAMPLE], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "True set()\n"
