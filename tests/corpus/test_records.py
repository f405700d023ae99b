"""Text files: their documents, in every compression and chunk size, and the treatment of bad records."""

import gzip
import itertools
import json
import random
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import yaml
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain import cli
from pretrain.corpus import Corpus, Skipped, open_corpus
from pretrain.corpus.bad_records import SAMPLES
from pretrain.corpus.recipe import Recipe, Source
from pretrain.corpus.records import BLANK_LINE, NoText, Record, parts_of, records_of, text_of
from pretrain.errors import CorpusError
from tests.conftest import ROOT
from tests.helpers.corpora import LONG, PACK, file, places, recipe, refused, skipped, source, texts

# Text between blank lines


@pytest.mark.parametrize("pack", PACK)
@pytest.mark.parametrize(
    ("content", "documents"),
    [
        ("one\n\ntwo\n", ["one", "two"]),
        ("one\n\ntwo", ["one", "two"]),
        ("one\r\nline two\r\n\r\ntwo\r\n", ["one\nline two", "two"]),
        ("\ufeffone\n\n\ufefftwo\n", ["one", "\ufefftwo"]),
        ("\n\n \n one \n\u3000\t\n\n  two\n three\n\n\n", [" one ", "  two\n three"]),
        ("one\rline two\r\rtwo\r", ["one\nline two", "two"]),
        ("one\r\r\nline two\r\r\n\r\r\ntwo", ["one\nline two", "two"]),
        ("a\u2028b\x0bc\x85d\n\ne", ["a\u2028b\x0bc\x85d", "e"]),
        ("床前明月光，\n疑是地上霜。\n\n静夜思", ["床前明月光，\n疑是地上霜。", "静夜思"]),
        ("\n \n\n", []),
        ("", []),
    ],
)
def test_a_txt_file_holds_the_blocks_between_blank_lines(tmp_path, pack, content, documents):
    path = file(tmp_path, f"text.txt{pack}", PACK[pack](content.encode("utf-8")))
    assert texts(path) == documents


def slowly(text: str) -> list[tuple[int, str]]:
    """(number of its first line, document): line by line (\\n, \\r\\n or \\r), as the format is defined."""
    found: list[tuple[int, list[str]]] = []
    blank = True
    for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), 1):
        if line.strip() and blank:
            found.append((number, []))
        if line.strip():
            found[-1][1].append(line)
        blank = not line.strip()
    return [(number, "\n".join(lines)) for number, lines in found]


SPACES = "".join(chr(c) for c in range(sys.maxunicode + 1) if chr(c).isspace())


@given(st.text(st.sampled_from("\n\n\n\r\r ab漢\ufeff" + SPACES), max_size=60), st.integers(1, 30))
@settings(deadline=None, derandomize=True, max_examples=600)
def test_blocks_are_those_of_a_slow_loop_whatever_the_size_of_a_chunk(tmp_path_factory, text, size):
    path = file(tmp_path_factory.getbasetemp(), "blocks.txt", text)
    parts = list(parts_of(path, "t", "blocks", size, limit=1000))
    text = re.sub("\r{1,2}\n|\r", "\n", text)
    assert b"".join(part.data for part in parts) == text.encode()
    found = [record for part in parts for record in records_of(part, ("text",), 1000)]
    assert found == [Record(document, f"t, line {line}") for line, document in slowly(text)]


def test_every_white_space_of_unicode_makes_a_blank_line():
    for c in itertools.chain(range(0xD800), range(0xE000, sys.maxunicode + 1)):
        blank = BLANK_LINE.fullmatch(f"\n{chr(c)}\n".encode()) is not None
        assert blank == (chr(c).isspace() and chr(c) != "\n"), hex(c)


def test_a_line_of_a_million_spaces_is_looked_at_once(tmp_path):
    space = " \u3000" * 500_000
    assert texts(file(tmp_path, "t.txt", f"a\n{space}b\n{space}\nc")) == [f"a\n{space}b", "c"]


def test_a_file_can_be_one_document(tmp_path):
    file(tmp_path, "a.txt", "\ufeff\n \n  one\r\n\r\ntwo  \n\n")
    file(tmp_path, "b.txt.xz", PACK[".xz"]("漢字\n\n漢字".encode()))
    file(tmp_path, "empty.txt", "")
    file(tmp_path, "blank.txt", " \n\n")
    path = source(tmp_path, files=["*.txt*"], documents="file")
    assert skipped(path) == (["  one\n\ntwo", "漢字\n\n漢字"], {"s": {"empty": 2}})
    assert places(path) == ["a.txt, line 3", "b.txt.xz, line 1"]


def test_one_document_a_file_is_of_txt_only(tmp_path):
    file(tmp_path, "a.jsonl", '{"text": "a"}')
    message = refused(source(tmp_path, files=["a.jsonl"], documents="file"))
    assert "documents: file is for txt" in message and "a.jsonl, of source 's', is jsonl" in message


# JSON lines


@pytest.mark.parametrize("pack", PACK)
def test_a_jsonl_file_holds_one_document_a_line(tmp_path, pack):
    lines = [
        '\ufeff{"text": "one\\n\\ntwo"}\r\n',
        "\n",
        '{"id": 3, "text": " 漢\\u5b57\\ud83d\\ude00 "}\n',
        '{"text": ""}\n',
        "\u3000 \n",
    ]
    content = "".join([*lines, '{"text": " \\n"}\n', '{"text": "last"}']).encode("utf-8")
    path = file(tmp_path, f"text.jsonl{pack}", PACK[pack](content))
    assert texts(path) == ["one\n\ntwo", " 漢字\U0001f600 ", "last"]
    assert places(path) == [f"text.jsonl{pack}, line {line}" for line in (1, 3, 7)]


def test_what_datatrove_writes_is_read_as_it_comes(tmp_path):
    """Its JsonlWriter: 00000.jsonl.gz … of {"text", "id", "media", "metadata"}, beside logs and _SUCCESS marks."""
    for rank in range(3):
        rows = [{"text": f"{rank}-{n}", "id": str(n), "media": [], "metadata": {"url": "u"}} for n in range(2)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        file(tmp_path / "output", f"{rank:05d}.jsonl.gz", gzip.compress(lines.encode()))
    assert texts(source(tmp_path, files=["output"])) == ["0-0", "0-1", "1-0", "1-1", "2-0", "2-1"]


@pytest.mark.parametrize(
    ("record", "field", "text"),
    [
        ({"text": "a"}, "text", "a"),
        ({"article": {"body": "a"}}, "article.body", "a"),
        ({"article.body": "literal", "article": {"body": "a"}}, "article.body", "literal"),
        ({"a": {"b.c": "literal", "b": {"c": "a"}}}, "a.b.c", "literal"),
        ({"text": ["one", "two"]}, "text", "one\ntwo"),
        ({"text": []}, "text", ""),
        ({"段落": [{"行号": 1, "内容": "一"}, {"行号": 2, "内容": "二"}]}, "段落.内容", "一\n二"),
        ({"a": [{"b": ["1", "2"]}, {"b": "3"}]}, "a.b", "1\n2\n3"),
    ],
)
def test_the_text_may_be_nested_and_in_lists(record, field, text):
    assert text_of(record, field) == text


@pytest.mark.parametrize(
    ("record", "field", "found"),
    [
        ({"body": "a", "id": 1}, "text", "its keys: body, id"),
        ({}, "text", "its keys: none"),
        ({"a": {"x": "1"}}, "a.b", "its keys: x"),
        ({"a": "text"}, "a.b", "a text"),
        ({"text": None}, "text", "null"),
        ({"text": 3}, "text", "a number"),
        ({"text": True}, "text", "a truth value"),
        ({"text": {"a": 1}}, "text", "an object"),
        ({"text": ["a", None]}, "text", "null"),
        ({"text": [["a"]]}, "text", "a list of lists"),
        ([{"text": "a"}] * 2, "text.", "its keys: text"),
        ("a", "text", "a text"),
    ],
)
def test_a_record_without_text_says_what_it_has_instead(record, field, found):
    with pytest.raises(NoText) as error:
        text_of(record, field)
    assert str(error.value) == found


def test_what_a_bad_record_has_is_shown_in_short():
    with pytest.raises(NoText) as error:
        text_of({"k" * 10_000: 1}, "text")
    assert len(str(error.value)) == 200


# Compression


@pytest.mark.parametrize("cut", ["blocks", "file", "lines"])
@pytest.mark.parametrize("pack", PACK)
def test_the_bytes_of_all_parts_are_those_of_the_file_as_stored(tmp_path, pack, cut):
    """Progress is measured by stored bytes, of compressed files and of records that are too long as well."""
    draw = random.Random(0)
    text = "\n\n".join(f"Document {n} {draw.randbytes(200).hex()}" for n in range(2000)) + "\n\n" + "x" * 50_000
    path = file(tmp_path, f"text.txt{pack}", PACK[pack](text.encode()))
    for limit in (1000, 1 << 20):
        parts = list(parts_of(path, path.name, cut, 1 << 14, limit))
        assert sum(part.stored for part in parts) == path.stat().st_size
        assert sum(part.stored > 0 for part in parts) > 3 or cut == "file" or pack in (".bz2", ".xz")  # in one piece


def test_compressed_members_follow_one_another(tmp_path):
    """`cat a.gz b.gz`, pigz, pzstd, pbzip2 and pixz make such files. One cut falls inside a character."""
    data = LONG.encode("utf-8")
    cuts = [0, 1000, 1001, len(data) // 2, len(data)]
    parts = [data[a:b] for a, b in itertools.pairwise(cuts)]
    between = {".zst": b"\x50\x2a\x4d\x18\x04\x00\x00\x00skip", ".xz": bytes(8)}  # a skippable frame; padding
    for suffix in (".gz", ".zst", ".bz2", ".xz"):
        whole = between.get(suffix, b"").join([*map(PACK[suffix], parts), PACK[suffix](b""), b""])
        assert texts(file(tmp_path, f"text.txt{suffix}", whole)) == LONG.split("\n\n")


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".bz2", ".xz"])
def test_a_truncated_compressed_file_is_refused_wherever_it_was_cut(tmp_path, suffix):
    whole = PACK[suffix](LONG.encode("utf-8"))
    for data, sizes in ((whole, (0, 1, 5, 20, len(whole) // 2, len(whole) - 1)), (2 * whole, (2 * len(whole) - 9,))):
        for size in sizes:
            path = file(tmp_path, f"text.txt{suffix}", data[:size])
            message = refused(path)
            assert message.startswith(f"a compressed file is damaged\n  {path}: "), size
            assert "copy or compress it again" in message


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".bz2", ".xz"])
def test_a_damaged_compressed_file_is_refused(tmp_path, suffix):
    """Damage any byte, also of the checksums (zstd writes one when asked), or append bytes to the stream."""
    data = LONG.encode("utf-8")
    packed = PACK[suffix](data)
    if suffix == ".zst":
        packed = zstandard.ZstdCompressor(write_checksum=True).compress(data)
    draw = random.Random(0)
    header = 10 if suffix == ".gz" else 0  # a flag or the time in the header of gzip may differ without harm
    for _ in range(40):
        damaged = bytearray(packed)
        damaged[draw.randrange(header, len(packed))] ^= 1 << draw.randrange(8)
        path = file(tmp_path, f"text.txt{suffix}", bytes(damaged))
        try:
            assert texts(path) == LONG.split("\n\n")  # the bit has no meaning
        except CorpusError as error:
            assert str(path) in str(error)
    after = packed + b"plain text"
    assert refused(file(tmp_path, f"text.txt{suffix}", after)).startswith("a compressed file is damaged")


JSONL = b'{"text": "one"}\n{"text": "two"}\n'
TAR = b"a.txt".ljust(257, b"\0") + b"ustar".ljust(255, b"\0") + LONG.encode()
MISNAMED = [  # name, what is in it, fragments of the message
    ("a.txt", PACK[".gz"](b"one"), ("it is gzip", "rename it to a.txt.gz")),
    ("a.jsonl", PACK[".zst"](JSONL), ("it is zstd", "rename it to a.jsonl.zst")),
    ("a.txt", PACK[".xz"](b"one"), ("it is xz", "rename it to a.txt.xz")),
    ("a.txt", PACK[".bz2"](b"one"), ("it is bzip2", "rename it to a.txt.bz2")),
    ("a.txt", b"\x04\x22\x4d\x18" + bytes(20), ("it is lz4", "compress it in one of these ways: .gz .zst")),
    ("a.txt.gz", PACK[".zst"](b"one"), ("in another way than its name says", "it is zstd: rename it to a.txt.zst")),
    ("a.txt.GZ", b"plain text", ("is not compressed, although", "rename it to a.txt, or compress it")),
    ("a.txt.zst", "中文".encode() * 2000, ("is not compressed, although", "rename it to a.txt")),
    ("a.txt.gz", PACK[".gz"](PACK[".gz"](b"one")), ("a file is compressed twice", "(gzip)")),
    ("a.txt", b"PK\x03\x04" + bytes(20), ("a zip archive", "unpack it")),
    ("a.txt.gz", PACK[".gz"](TAR), ("a tar archive", "tar -xf")),
    ("a.txt", b"PAR1\x15" + bytes(20), ("a parquet file", "format: parquet")),
    ("a.txt", "one\r\n".encode("utf-16"), ("UTF-16 text", "iconv -f UTF-16 -t UTF-8")),
    ("a.jsonl", JSONL.decode().encode("utf-16-be"), ("without a byte order mark (UTF-16BE)", "iconv -f UTF-16BE")),
    ("a.txt", "one two".encode("utf-32"), ("UTF-32 text", "iconv -f UTF-32")),
    ("a.json", b'[\n  {"text": "one"}\n]', ("one array that is written over several lines", "jq -c '.[]' a.json")),
    ("a.json", b'[{"text": "one"},\r\n {"text": "two"}]', ("one array that is written over", "jq -c '.[]' a.json")),
    ("a.json", b'\n{\n "text": "one"\n}', ("an object that is written over several lines", "jq -c . a.json")),
]


@pytest.mark.parametrize(("name", "content", "fragments"), MISNAMED)
def test_a_file_that_is_not_what_its_name_says_is_refused_with_what_it_is(tmp_path, name, content, fragments):
    """The source's `bad_records: skip` does not help, because the whole file is wrong."""
    path = file(tmp_path, name, content)
    message = refused(source(tmp_path, files=[name], bad_records="skip"))
    for fragment in (str(path), *fragments):
        assert fragment in message


@pytest.mark.parametrize("name", ["a.JSONL", "a.Json", "a.jsonl.GZ", "a.NDJSON.gzip", "a.jsonl.zstd", "a.jsonl.BZ2"])
def test_other_spellings_of_an_ending_mean_the_same(tmp_path, name):
    pack = {".gzip": ".gz", ".zstd": ".zst"}.get(suffix := Path(name).suffix.lower(), suffix)
    path = file(tmp_path, name, PACK.get(pack, bytes)(JSONL))
    assert texts(path) == texts(source(tmp_path, files=[name], format="jsonl")) == ["one", "two"]


def test_a_line_with_a_number_of_any_length_is_read(tmp_path):
    path = file(tmp_path, "a.jsonl", b'{"id": -' + b"9" * 5000 + b', "n": [1, 2], "text": "one"}\n{"text": "two"}')
    assert texts(path) == ["one", "two"]


def test_without_zstandard_a_zst_file_says_what_to_install(tmp_path):
    path = file(tmp_path, "text.txt.zst", zstandard.compress(b"a"))
    code = (
        "import sys; sys.modules['zstandard'] = None  # as if it were not installed\n"
        "from pretrain.corpus import open_corpus\n"
        "list(open_corpus(sys.argv[1]).documents())"
    )
    done = subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, capture_output=True, text=True)
    assert f"CorpusError: {path} needs the package zstandard" in done.stderr and "pip install '.[data]'" in done.stderr


# Bad records: refused, or counted and left out


@pytest.mark.parametrize("pack", PACK)
@pytest.mark.parametrize(
    ("content", "line", "byte", "found"),
    [
        (b"fine\n\nr\xe9sum\xe9\n", 3, 2, "0xe9"),
        (b"\xef\xbb\xbfa\xff", 1, 5, "0xff"),
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


BAD_LINES = [
    (b'{"body": "a", "id": 1}', "no text", ("no text under 'text'", "its keys: body, id", "set field:")),
    (b'{"text": null}', "no text", ("no text under 'text'", "null")),
    (b'[{"text": "a"}, {"text": "b"}]', "a JSON array", ("a line is a JSON array", "a list of 2", "jq -c '.[]'")),
    (b'{"data": [{"text": "a"}]}', "no text", ("no text under 'text'", "its keys: data", "jq -c '.[\"data\"][]'")),
    (b'{"\\ud800": "a"}', "no text", ("no text under 'text'", "its keys: \\ud800")),
    (b"{'text': 'a'}", "not JSON", ("a line is not JSON",)),
    (b'{"text": "' + b"[" * 501 + b'\\"a' * 45_000, "not JSON", ("a line is not JSON", "Unterminated string")),
    (b"[" * 100_000, "nested too deeply", ("nested too deeply", "more than 500 objects and lists", "flatten")),
    (b'{"text": "a", "n": ' + b"[" * 500 + b"]" * 500 + b"}", "nested too deeply", ("nested too deeply",)),
    (b'{"text": ' + b"9" * 5000 + b"}", "no text", ("no text under 'text'", "a number")),
    (b'{"text": "ab\\ud800c"}', "not Unicode", ("not valid Unicode", "a lone surrogate at character 3")),
    (b'{"text": "\\udc00\\uD800"}', "not Unicode", ("not valid Unicode", "a lone surrogate at character 1")),
    (b'{"text": "caf\xe9"}', "not UTF-8", ("not valid UTF-8", "byte 14 of the line: 0xe9")),
    (b'{"text": "' + b"a" * 200_000 + b'"}', "too long", ("longer than max_record_bytes", "200,012 bytes")),
]


@pytest.mark.parametrize(("line", "kind", "fragments"), BAD_LINES)
def test_a_bad_record_is_refused_with_file_and_line(tmp_path, line, kind, fragments):
    file(tmp_path, "text.jsonl", b'{"text": "fine"}\n\n' + line + b"\n")
    message = refused(source(tmp_path, files=["text.jsonl"], max_record_bytes=150_000))
    for fragment in (f"{tmp_path}/text.jsonl, line 3", "bad_records: skip", *fragments):
        assert fragment in message


def test_bad_records_are_counted_and_left_out_when_the_source_says_so(tmp_path):
    lines = [b'{"text": "first"}', *(line for line, _, _ in BAD_LINES), b'{"text": ""}', b'{"text": "last"}']
    file(tmp_path, "text.jsonl", b"\n".join(lines))
    path = source(tmp_path, files=["text.jsonl"], bad_records="skip", max_record_bytes=150_000)
    found = Skipped()
    assert [document.text for document in open_corpus(path).documents(skipped=found)] == ["first", "last"]
    counts = {"no text": 5, "a JSON array": 1, "not JSON": 2, "nested too deeply": 2, "not Unicode": 2}
    counts |= {"not UTF-8": 1, "too long": 1, "empty": 1}
    assert found.counts == {"s": counts}
    assert found.report()["s"]["not Unicode"] == {
        "records": 2,
        "samples": [
            {"where": f"text.jsonl, line {line}", "found": f"a lone surrogate at character {character}"}
            for line, character in ((12, 3), (13, 1))
        ],
    }
    json.dumps(found.report(), ensure_ascii=False).encode()
    assert found.line() == (
        "no document from 15 records: s 5 no text, 1 a JSON array, 2 not JSON, 2 nested too deeply, 2 not Unicode, "
        "1 not UTF-8, 1 too long, 1 empty (first: text.jsonl, line 2)"
    )


@pytest.mark.parametrize("stage", ["clean", "tokenizer", "shards", "compare_tokenizers"])
def test_the_first_bad_record_of_each_kind_and_source_is_named_before_a_stage_ends(tmp_path, prepared, capsys, stage):
    """So is the file that cannot be read to its end. Sources that skip bad records are not named."""
    file(tmp_path, "a.jsonl", '{"text": "fine"}\n{"body": 1}\nno JSON\n{"body": 2}\n{"text": ""}\n')
    file(tmp_path, "b.txt", b"fine\n\nbad \xff\n\nfine\n\nworse \xfe")
    file(tmp_path, "c.jsonl", "no JSON either")
    file(tmp_path, "d.txt.gz", PACK[".gz"](LONG.encode())[:-9])
    sources = [{"name": name[0], "files": [name]} for name in ("a.jsonl", "b.txt", "c.jsonl", "d.txt.gz")]
    sources[2]["bad_records"] = "skip"
    values = {"corpus": str(recipe(tmp_path, *sources)), "out": str(tmp_path / "out")}
    if stage == "tokenizer":
        values |= {"kind": "byte", "vocab_size": 600}
    elif stage != "clean":
        key = "tokenizer" if stage == "shards" else "vocabularies"
        place = str(prepared.tokenizer["byte"])
        values[key] = place if stage == "shards" else {"one": place, "two": place}
    file(tmp_path, "config.yaml", yaml.safe_dump(values))
    assert cli.main(stage, [str(tmp_path / "config.yaml")]) == 2
    said = capsys.readouterr().err
    assert f"a record has no text under 'text' ({tmp_path}/a.jsonl, line 2: its keys: body): reading on" in said
    assert said.split("error: ")[1].splitlines() == [
        "5 records cannot be read; the first of each kind and source:",
        f"  {tmp_path}/a.jsonl, line 2: a record has no text under 'text': its keys: body (and 1 more in source 'a')",
        f"  {tmp_path}/a.jsonl, line 3: a line is not JSON: Expecting value at character 1",
        f"  {tmp_path}/b.txt, line 3, byte 5 of the line: the text is not valid UTF-8: 0xff (and 1 more in source 'b')",
        "  set field: in the recipe (a.b is b inside a)",
        "  a .jsonl file holds one JSON object a line: repair or remove the line",
        "  convert the file (iconv -f … -t utf-8); nothing is repaired silently",
        "  or set bad_records: skip for this source, and they are counted and left out",
        "  then: a compressed file is damaged",
        f"  {tmp_path}/d.txt.gz: Compressed file ended before the end-of-stream marker was reached",
    ]


def test_a_bad_txt_document_is_left_out_whole_and_nothing_else(tmp_path):
    file(tmp_path, "t.txt", b"one\n\ntwo\nbad \xff\nline\n\nthree")
    assert skipped(source(tmp_path, files=["t.txt"], bad_records="skip")) == (["one", "three"], {"s": {"not UTF-8": 1}})


def test_empty_records_never_stop_a_run_but_are_counted(tmp_path):
    path = file(tmp_path, "t.jsonl", '{"text": ""}\n{"text": "a"}\n{"text": " \\n\\u3000"}\n\n')
    assert skipped(path) == (["a"], {"text": {"empty": 2}})


def test_what_chunks_skipped_adds_up_to_what_one_reading_skips(tmp_path):
    lines = ["no JSON" if n % 3 == 0 else json.dumps({"text": "" if n % 5 == 0 else str(n)}) for n in range(400)]
    file(tmp_path, "t.jsonl", "\n".join(lines))
    corpus = open_corpus(source(tmp_path, files=["t.jsonl"], bad_records="skip"))
    whole, added = Skipped(), Skipped()
    list(corpus.documents(skipped=whole))
    assert not added
    for chunk in corpus.chunks(500):
        one = Skipped()
        list(corpus.read(chunk, one))
        added.merge(one)
    assert added == whole and whole.counts == {"s": {"not JSON": 134, "empty": 53}}
    first = [f"t.jsonl, line {n + 1}" for n in range(0, 400, 3)][:SAMPLES]
    assert [bad.where for bad in added.samples["s"]["not JSON"]] == first


# Records that are too long


def test_chunks_of_a_long_file_are_of_one_size(tmp_path):
    lines = (json.dumps({"text": "x" * (20 + n % 7)}) + "\n" for n in range(3000))
    (tmp_path / "a.jsonl").write_text("".join(lines))
    *chunks, _ = open_corpus(tmp_path / "a.jsonl").chunks(4096)
    assert len(chunks) > 20 and all(4000 < chunk.bytes < 4200 for chunk in chunks)  # no chunk holds two parts


@pytest.mark.parametrize("size", [16, 50, 64, 1 << 12])
@pytest.mark.parametrize("cut", ["blocks", "lines"])
def test_a_record_is_too_long_whatever_the_size_of_a_chunk(tmp_path, cut, size):
    end = "\n\u3000\n" if cut == "blocks" else "\n"
    records = [json.dumps({"text": "x" * (1 + 37 * n % 300)}) for n in range(60)]
    path = file(tmp_path, "t", end.join(records) + end)
    parts = parts_of(path, "t", cut, size, limit=100)
    found = [found for part in parts for found in records_of(part, ("text",), 100)]
    lines = 2 if cut == "blocks" else 1
    for n, (record, one) in enumerate(zip(records, found, strict=True)):
        assert one.where == f"t, line {1 + lines * n}"
        assert isinstance(one, Record) == (len(record) <= 100), record


MEMBER = 8 << 20


@pytest.mark.parametrize(
    ("name", "documents", "limit"),
    [
        ("t.txt", "blocks", 40),
        ("t.txt", "file", 40),
        ("t.jsonl", "blocks", 40),
        ("t.jsonl.gz", "blocks", 40),
        ("t.jsonl.bz2", "blocks", 40),
        ("t.jsonl.xz", "blocks", 40),
        ("t.jsonl.zst", "blocks", 80),  # 1 KiB decompresses to 32 MiB at once
    ],
)
def test_a_record_of_any_length_is_passed_over_in_little_memory(tmp_path, name, documents, limit):
    """The record is 256 MiB long and has no line end. As zstd it has 8 kilobytes."""
    last, suffix = b'\n\n{"text": "last"}\n', Path(name).suffix
    if suffix == ".zst":
        member, members = zstandard.compress(bytes(32 * MEMBER)), 1
    else:
        member, members = PACK[suffix](bytes(MEMBER)) if suffix in PACK else b"", 32
    with open(tmp_path / name, "wb") as out:
        for _ in range(members):
            out.write(member)
        if not member:
            out.truncate(32 * MEMBER)
            out.seek(32 * MEMBER)
        out.write(PACK.get(suffix, bytes)(last))
    skip = Source(name="s", files=[name], documents=documents, bad_records="skip", max_record_bytes=1 << 20)
    found = Skipped()
    tracemalloc.start()
    try:
        read = [document.where for document in Corpus(Recipe(name="r", sources=[skip]), tmp_path).documents((), found)]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert read == [] and found.counts == {"s": {"too long": 1}}
    assert found.samples["s"]["too long"][0].where == f"{name}, line 1"
    assert peak < limit << 20
