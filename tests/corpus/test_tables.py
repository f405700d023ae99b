"""Documents in the column of a table: parquet, Arrow, datasets saved on disk, and datasets loaded by name."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pretrain.corpus import Skipped, open_corpus
from pretrain.errors import ConfigError
from tests.conftest import ROOT
from tests.helpers.corpora import file, places, recipe, refused, skipped, source, texts
from tests.helpers.hub import COMMIT, hub

DOCUMENTS = [f"document {n} 漢字 " + "x" * (n % 13) for n in range(2000)]
TABLE = pa.table(
    {
        "id": list(range(2000)),
        "text": DOCUMENTS,
        "a": [{"b": [{"c": f"{n}"}, {"c": "."}]} for n in range(2000)],
        "a.b": [f"dotted {n}" for n in range(2000)],
    }
)


def write(path: Path, table: pa.Table = TABLE, rows: int = 700) -> Path:
    """Write a table in batches of `rows`. Its name tells the form: .parquet, .arrow (with an index), .stream.arrow."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=rows)
        return path
    new = pa.ipc.new_stream if ".stream" in path.suffixes else pa.ipc.new_file
    with pa.OSFile(str(path), "wb") as file, new(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)
    return path


FORMS = ["a.parquet", "a.arrow", "a.stream.arrow"]


@pytest.mark.parametrize("name", FORMS)
def test_each_row_of_a_table_is_a_document(tmp_path, name):
    path = write(tmp_path / name)
    assert texts(path) == DOCUMENTS
    assert places(path)[:2] + places(path)[-1:] == [f"{name}, row 1", f"{name}, row 2", f"{name}, row 2000"]


@pytest.mark.parametrize("name", FORMS)
def test_two_columns_of_a_table_are_pairs(tmp_path, name):
    write(tmp_path / name)
    pairs = source(tmp_path, files=[name], field="a.b", output_field="text")
    assert texts(pairs) == [f"dotted {n}\n{text}" for n, text in enumerate(DOCUMENTS)]
    assert texts(source(tmp_path, files=[name], field="a.b", output_field="a.b"))[7] == "dotted 7\ndotted 7"
    assert "set output_field: in the recipe" in refused(
        source(tmp_path, files=[name], field="text", output_field="reply")
    )


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize(("field", "first"), [("a.b", "dotted 0"), ("a.b.c", "0\n.")])
def test_the_column_may_have_a_dot_or_be_nested(tmp_path, name, field, first):
    write(tmp_path / name, TABLE if field == "a.b" else TABLE.drop_columns("a.b"))
    found = texts(source(tmp_path, files=[name], field=field))
    assert found[0] == first and len(found) == 2000


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_strings_of_any_arrow_type_are_text(tmp_path, name, kind):
    table = pa.table({"text": pa.array(["one", "two", "one"]).cast(kind)})
    assert texts(write(tmp_path / name, table, rows=3)) == ["one", "two", "one"]


@pytest.mark.parametrize("name", FORMS)
def test_chunks_of_a_table_are_of_the_size_asked_for(tmp_path, name):
    """The text is 64 KB, in batches of 16 KB, of which 256 rows are decoded at a time."""
    corpus = open_corpus(write(tmp_path / name))
    for size, least, most in ((1 << 12, 15, 40), (1 << 14, 4, 8), (1 << 20, 1, 1)):
        chunks = list(corpus.chunks(size))
        assert least <= len(chunks) <= most
        assert [document.text for chunk in chunks for document in corpus.read(chunk)] == DOCUMENTS


@pytest.mark.parametrize("name", FORMS)
def test_the_bytes_of_all_parts_are_those_of_the_file(tmp_path, name):
    """Progress is measured by stored bytes."""
    path = write(tmp_path / name)
    parts = [chunk.stored for chunk in open_corpus(path).chunks(5000)]
    assert sum(map(bool, parts)) >= 3 and sum(parts) <= path.stat().st_size <= sum(parts) + 16  # an end mark


def test_a_row_longer_than_a_chunk_is_not_cut(tmp_path):
    documents = ["short", "long " * 10_000, "short"]
    corpus = open_corpus(write(tmp_path / "a.parquet", pa.table({"text": documents})))
    chunks = list(corpus.chunks(100))
    assert [document.text for chunk in chunks for document in corpus.read(chunk)] == documents and len(chunks) == 3


# Bad rows


def bad_table() -> pa.Table:
    raw = pa.array([b"fine", b"caf\xe9", None, b"", b"x" * 500, b"last"], pa.binary())
    return pa.table({"text": pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())})


@pytest.mark.parametrize("name", FORMS)
def test_bad_rows_are_refused_or_counted(tmp_path, name):
    write(tmp_path / name, bad_table())
    message = refused(source(tmp_path, files=[name]))
    assert f"{tmp_path / name}, row 2, byte 4 of the text: the text is not valid UTF-8: 0xe9" in message
    assert f"{tmp_path / name}, row 3: a record has no text" in message
    path = source(tmp_path, files=[name], bad_records="skip", max_record_bytes=100)
    counts = {"not UTF-8": 1, "no text": 1, "empty": 1, "too long": 1}
    assert skipped(path) == (["fine", "last"], {"s": counts})
    found = Skipped()
    list(open_corpus(path).documents(skipped=found))
    samples = found.report()["s"]
    assert samples["no text"]["samples"] == [{"where": f"{name}, row 3", "found": "null"}]
    assert samples["too long"]["samples"] == [
        {"where": f"{name}, row 5", "found": "500 bytes, max_record_bytes is 100"}
    ]


@pytest.mark.parametrize("name", FORMS)
def test_a_row_with_a_date_that_python_does_not_have_is_a_bad_record(tmp_path, name):
    days = pa.array([0, 10**8], pa.date32())
    column = pa.StructArray.from_arrays([pa.array(["fine", "far"]), days], names=["text", "day"])
    write(tmp_path / name, pa.table({"page": column}))
    message = refused(source(tmp_path, files=[name], field="page.text"))
    assert "no text under 'page.text'" in message and f"{tmp_path / name}, row 2: " in message
    path = source(tmp_path, files=[name], field="page.text", bad_records="skip")
    assert skipped(path) == (["fine"], {"s": {"no text": 1}})


@pytest.mark.parametrize("name", FORMS)
def test_a_column_that_is_not_there_is_refused_and_no_bad_record(tmp_path, name):
    write(tmp_path / name)
    for policy in ("stop", "skip"):
        message = refused(source(tmp_path, files=[name], field="body", bad_records=policy))
        for fragment in ("no column for 'body'", str(tmp_path / name), "id, text, a, a.b", "set field:"):
            assert fragment in message
    assert "row 1: a number" in refused(source(tmp_path, files=[name], field="id"))


@pytest.mark.parametrize("name", FORMS)
def test_two_columns_of_one_name_are_refused(tmp_path, name):
    write(tmp_path / name, pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]))
    message = refused(source(tmp_path, files=[name]))
    assert "a table has several columns 'text'" in message and str(tmp_path / name) in message


@pytest.mark.parametrize(
    "state",
    [
        *("{", '{"_data_files": 3}', '{"_data_files": [{"name": "a"}]}', '{"splits": 3}', '{"splits": [3]}'),
        *('{"_data_files": [{"filename": "a\\u0000b"}]}', '{"splits": ["\\ud800"]}', '{"splits": ' + "[" * 100_000),
    ],
    ids=range(8),
)
def test_a_damaged_record_of_a_saved_dataset_is_refused(tmp_path, state):
    name = "dataset_dict.json" if "splits" in state else "state.json"
    file(tmp_path, f"f/{name}", state)
    for keys in ({"files": ["f"]}, {"dataset": {"name": "f"}}):
        message = refused(source(tmp_path, **keys))
        assert "a saved dataset is damaged" in message and f"f/{name}" in message, message


def test_a_state_of_another_program_is_passed_over(tmp_path):
    file(tmp_path, "f/a.txt", "a")
    for state in ("[]", '{"step": 3}', "3"):
        file(tmp_path, "f/state.json", state)
        assert texts(source(tmp_path, files=["f"])) == ["a"]


@pytest.mark.parametrize("name", FORMS)
def test_a_truncated_table_is_refused_wherever_it_was_cut(tmp_path, name):
    data = write(tmp_path / name).read_bytes()
    for size in (0, 1, 7, 8, 100, len(data) // 2, len(data) - 8, len(data) - 1):
        path = tmp_path / f"cut.{name}"
        path.write_bytes(data[:size])
        message = refused(path)
        assert message.startswith(("a parquet file is damaged\n", "an Arrow file is damaged\n")), size
        assert str(path) in message and "copy or compress it again" in message


@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_a_file_that_is_no_table_is_said_to_be_what_it_is(tmp_path, form):
    whole = write(tmp_path / ("a.arrow" if form == "parquet" else "a.parquet")).read_bytes()
    other = "an Arrow file" if form == "parquet" else "a parquet file"
    for content, found in ((gzip.compress(whole), "compressed (gzip)"), (whole, other), (b'{"text": 1}', "plain text")):
        (tmp_path / f"b.{form}").write_bytes(content)
        path = tmp_path / f"b.{form}"
        assert refused(path).startswith(f"a file is read as {form}, but is not\n  {path}: it is {found}")


def test_an_arrow_file_whose_offsets_lead_outside_is_refused(tmp_path):
    """The third offset of the text column is set to 2 GB. Reading there would end the process."""
    path = write(tmp_path / "a.arrow", pa.table({"text": ["aaaa", "bbbb", "cccc"]}))
    data = path.read_bytes()
    offsets = b"".join(n.to_bytes(4, "little") for n in (0, 4, 8, 12))
    assert data.count(offsets) == 1
    path.write_bytes(data.replace(offsets, offsets[:8] + b"\xff\xff\xff\x7f" + offsets[12:]))
    assert refused(path).startswith("an Arrow file is damaged\n")


# Datasets saved on disk, and datasets by name


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """one/ and several/ as `save_to_disk` makes them, and tables/ of parquet files that `load_dataset` understands."""
    root = tmp_path_factory.mktemp("datasets")
    texts = {"train": [f"train {n}" for n in range(10)], "test": ["test 0", "test 1"]}
    splits = {split: datasets.Dataset.from_dict({"text": found}) for split, found in texts.items()}
    splits["train"].save_to_disk(root / "one", num_shards=3)
    splits["train"].filter(lambda row: "1" in row["text"], cache_file_name=str(root / "one" / "cache-1.arrow"))
    datasets.DatasetDict(splits).save_to_disk(root / "several")
    (root / "tables").mkdir()
    for split, found in texts.items():
        write(root / "tables" / f"{split}-00000.parquet", pa.table({"text": found}))
    return root


TRAIN = [f"train {n}" for n in range(10)]


@pytest.mark.parametrize(
    ("keys", "documents"),
    [
        ({"files": ["one"]}, TRAIN),
        ({"files": ["several/train"]}, TRAIN),
        ({"dataset": {"name": "one"}}, TRAIN),
        ({"dataset": {"name": "several"}}, TRAIN),
        ({"dataset": {"name": "several", "split": "test"}}, ["test 0", "test 1"]),
        ({"dataset": {"name": "tables"}}, TRAIN),
        ({"dataset": {"name": "tables", "split": "test"}}, ["test 0", "test 1"]),
    ],
)
def test_a_dataset_of_this_machine_is_read_by_its_folder(folders, keys, documents):
    assert texts(source(folders, **keys)) == documents


@pytest.mark.parametrize(
    ("keys", "fragments"),
    [
        ({"files": ["several"]}, ("a saved dataset has several splits", "several/train, several/test")),
        ({"dataset": {"name": "several", "split": "dev"}}, ("no split 'dev'", "its splits: train, test")),
        ({"dataset": {"name": "tables", "split": "dev"}}, ("no split 'dev'", "its splits: train, test")),
        ({"dataset": {"name": "tables", "config": "en"}}, ("tables cannot be read", "'en' not found")),
        ({"dataset": {"name": "one", "config": "en"}}, ("a saved dataset has no configs", "remove config:")),
        ({"dataset": {"name": "one", "revision": "main"}}, ("a folder has no revisions", "remove revision:")),
        ({"dataset": {"name": "tables"}, "field": "body"}, ("no column for 'body'", "tables (train)")),
        ({"dataset": {"name": "no/such"}}, ("the dataset no/such cannot be read", "offline mode", "HF_ENDPOINT")),
        ({"dataset": {"name": "./nosuch"}}, ("the dataset ./nosuch cannot be read", "check the name")),
    ],
)
def test_a_dataset_that_cannot_be_read_is_refused(folders, keys, fragments):
    message = refused(source(folders, **keys))
    assert all(fragment in message for fragment in fragments), message


@pytest.mark.parametrize(
    ("keys", "fragment"),
    [
        ({}, "needs either files: or dataset:"),
        ({"files": ["a.txt"], "dataset": {"name": "one"}}, "needs either files: or dataset:"),
        ({"dataset": {"name": "one"}, "format": "txt"}, "so remove format: and documents:"),
        ({"dataset": {"name": "one", "splt": "test"}}, "did you mean sources.0.dataset.split?"),
        ({"dataset": "one"}, "sources.0.dataset"),
    ],
)
def test_a_senseless_source_is_refused(folders, keys, fragment):
    with pytest.raises(ConfigError) as error:
        open_corpus(source(folders, **keys))
    assert fragment in str(error.value)


def test_a_dataset_here_is_identified_by_its_files_and_split(folders):
    def identity(**keys) -> dict:
        return open_corpus(source(folders, **keys)).fingerprint()["sources"][0]

    assert identity(files=["one"]) == identity(dataset={"name": "one"})
    assert len(identity(files=["one"])["sha256"]) == 3
    train, test = (identity(dataset={"name": "tables", "split": split}) for split in ("train", "test"))
    assert len(train["sha256"]) == len(test["sha256"]) == 1 and train["sha256"] != test["sha256"]


READ = """
import json, sys
from pretrain.corpus import open_corpus
corpus = open_corpus(sys.argv[1])
found = [(document.text, document.where) for document in corpus.documents()]
print(json.dumps({"documents": found, "identity": corpus.fingerprint()["sources"][0]["dataset"]}))
"""


def test_a_dataset_of_the_hub_is_streamed_at_the_commit_it_is_identified_by(folders, tmp_path):
    with hub(folders / "tables") as address:
        environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}

        def read(**keys) -> subprocess.CompletedProcess:
            command = [sys.executable, "-c", READ, recipe(tmp_path, {"name": "s", "dataset": keys})]
            return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)

        done = read(name="org/tiny", split="test", revision="v1")
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert found["documents"] == [[f"test {n}", f"org/tiny (test), row {n + 1}"] for n in range(2)]
        assert found["identity"] == {"name": "org/tiny", "config": None, "split": "test", "revision": COMMIT}
        for keys, fragment in (
            ({"name": "org/nosuch"}, "404"),
            ({"name": "org/tiny", "split": "dev"}, "['train', 'test']"),
        ):
            stderr = read(**keys).stderr
            assert f"CorpusError: the dataset {keys['name']} cannot be read" in stderr and fragment in stderr
