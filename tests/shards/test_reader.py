"""Opened shards: one stream of any number of pieces, the documents in it, and no cost that grows with the set."""

import json
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pretrain.errors import ShardError
from pretrain.shards import Shards
from pretrain.shards.reader import TokenFiles
from pretrain.storage.files import write_json
from pretrain.storage.index import write_index
from tests.conftest import ROOT
from tests.helpers.simulated import simulate

PIECES, PIECE_TOKENS = 4_000, 250_000_000


def write_pieces(folder: Path, side: str, documents: list[list[list[int]]], vocab_size: int) -> dict:
    """Write the pieces of one side byte by byte, by the documentation. Returns the side's entry in the index."""
    code, letter, size = (8, "H", 2) if vocab_size < 65_500 else (4, "i", 4)
    names = [f"{side}-{n:05d}" for n in range(len(documents))]
    for name, piece in zip(names, documents, strict=True):
        (folder / f"{name}.bin").write_bytes(b"".join(struct.pack(f"<{len(ids)}{letter}", *ids) for ids in piece))
        head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(piece), len(piece) + 1)
        offsets = [size * sum(map(len, piece[:n])) for n in range(len(piece))]
        arrays = struct.pack(f"<{len(piece)}i", *map(len, piece)) + struct.pack(f"<{len(piece)}q", *offsets)
        (folder / f"{name}.idx").write_bytes(head + arrays + struct.pack(f"<{len(piece) + 1}q", *range(len(piece) + 1)))
        np.save(folder / f"{name}.raw.npy", np.array([9 * len(ids) for ids in piece], np.uint32))
        origin = [(n % 2, 100 * int(name[-5:]) + n) for n in range(len(piece))]
        np.save(folder / f"{name}.origin.npy", np.array(origin, [("file", "<u4"), ("number", "<u8")]))
    ids = np.concatenate([document for piece in documents for document in piece])
    np.save(folder / f"{side}.unigram.npy", np.bincount(ids, minlength=vocab_size))
    return {"pieces": names, "documents": sum(map(len, documents)), "tokens": len(ids), "raw_bytes": 9 * len(ids)}


def index_of(sides: dict[str, dict]) -> dict:
    index = {"stage": "shards", "format": 2, "dtype": "uint16", "specials": {"eod": 0}, "sidecars": ["raw", "origin"]}
    return {**index, "kind": "byte", "tokenizer": "ab" * 32, "sides": sides}


def write_set(folder: Path, documents: list[list[list[int]]], vocab_size: int = 30_000, **changes) -> Path:
    """A shard folder with a training side: for each piece a list of documents, which are lists of ids."""
    folder.mkdir(parents=True)
    entry = write_pieces(folder, "train", documents, vocab_size)
    write_json(folder / "origins.json", ["en.jsonl, line", "zh.parquet, row"])
    index = {**index_of({"train": entry}), "vocab_size": vocab_size}
    index["dtype"] = "uint16" if vocab_size < 65_500 else "int32"
    write_index(folder, {**index, **changes}, recorded=("origins.json",))
    return folder


def draw(rng: np.random.Generator, pieces: int, most: int, top: int) -> list[list[list[int]]]:
    """Pieces of one to four documents of one to `most` ids below `top`."""
    lengths = [rng.integers(1, most, rng.integers(1, 5)) for _ in range(pieces)]
    return [[rng.integers(0, top, n).tolist() for n in piece] for piece in lengths]


@pytest.fixture(scope="module", params=[65_000, 100_000], ids=["uint16", "int32"])
def made(request, tmp_path_factory) -> tuple[Path, list[list[list[int]]]]:
    """A set of 300 pieces, from a few bytes to several pages each, and its documents."""
    top = request.param
    pieces = draw(np.random.default_rng(1), 280, 60, top) + draw(np.random.default_rng(2), 20, 6_000, top)
    pieces[7], pieces[8] = [[5]], [[6], [7]]  # shorter than any window
    return write_set(tmp_path_factory.mktemp("made") / "shards", pieces, request.param), pieces


def test_rows_out_of_many_pieces_equal_a_slow_loop(made):
    folder, pieces = made
    found, ids = Shards(folder), [token for piece in pieces for document in piece for token in document]
    rng = np.random.default_rng(0)
    for length in (1, 2, 37, 512, 9_000):
        last = len(ids) - length
        for starts in (np.array([last, 0]), rng.integers(0, last + 1, 64), np.full(3, last // 2)):
            rows = found.gather(starts, length)
            assert rows.dtype == np.int32 and rows.flags.c_contiguous
            assert rows.tolist() == [ids[start : start + length] for start in starts.tolist()]
    assert found.gather(np.array([0]), len(ids)).tolist() == [ids]
    for length in (2, 37):  # at the very end of every piece, and one and two past it
        starts = np.concatenate([np.cumsum(found.piece_tokens)[10:-10] - length + past for past in (0, 1, 2)])
        assert found.gather(starts, length).tolist() == [ids[start : start + length] for start in starts.tolist()]


def test_every_position_is_found_in_its_document(made):
    folder, pieces = made
    found = Shards(folder)
    documents = [document for piece in pieces for document in piece]
    begin = 0
    for number, ids in enumerate(documents):
        assert found.span(number) == (begin, begin + len(ids))
        assert found.document(number).tolist() == ids and found.document(number).dtype == np.int32
        for offset in {0, len(ids) // 2, len(ids) - 1}:
            assert found.document_at(begin + offset) == (number, offset)
        begin += len(ids)
    assert begin == found.tokens and len(documents) == found.documents


def test_a_document_says_where_it_came_from(made):
    folder, pieces = made
    found, number = Shards(folder), 0
    for piece, documents in enumerate(pieces):
        for inside in range(len(documents)):
            place = ("en.jsonl, line", "zh.parquet, row")[inside % 2]
            assert found.origin(number) == f"{place} {100 * piece + inside}"
            number += 1


def test_a_set_without_origins_says_so(tmp_path):
    folder = write_set(tmp_path / "shards", [[[1, 2, 0]]], sidecars=["raw"])
    with pytest.raises(ShardError, match="does not say where its documents came from"):
        Shards(folder).origin(0)


def test_documents_outside_the_set_are_broken_invariants(made):
    found = Shards(made[0])
    for number in (-1, found.documents):
        with pytest.raises(AssertionError):
            found.document(number)
    for position in (-1, found.tokens):
        with pytest.raises(AssertionError):
            found.document_at(position)


def test_pieces_may_outnumber_the_files_a_process_may_open(made):
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n"
        "import numpy as np; from pretrain.shards import Shards; found = Shards(sys.argv[1])\n"
        "for _ in range(2):\n"
        "    assert found.gather(found._ids.begins, 1).shape == (len(found.pieces), 1) and len(found.pieces) > 64\n"
        "assert sum(len(found.document(number)) for number in range(found.documents)) == found.tokens\n"
    )
    subprocess.run([sys.executable, "-c", code, str(made[0])], cwd=ROOT, check=True)


def test_another_process_opens_the_set_for_itself(made):
    found = Shards(made[0])
    sent = pickle.dumps(found)
    assert len(sent) < 500
    assert np.array_equal(pickle.loads(sent).gather(np.array([3]), 50), found.gather(np.array([3]), 50))


def test_rows_outlive_the_set_they_were_read_from(made):
    folder, pieces = made
    expected = [token for piece in pieces for document in piece for token in document][:100]
    rows, document = Shards(folder).gather(np.array([0]), 100), Shards(folder).document(0)
    assert rows[0].tolist() == expected and document.tolist() == pieces[0][0]


def test_a_piece_that_changes_after_opening_is_named_and_does_not_end_the_process(tmp_path):
    folder = write_set(tmp_path / "shards", [[[1] * 5000], [[2] * 5000]])
    found = Shards(folder)
    path = folder / "train-00001.bin"
    path.write_bytes(path.read_bytes()[:4096])
    with pytest.raises(ShardError, match="was changed while it was in use") as error:
        found.gather(np.array([6000]), 10)
    assert str(path) in str(error.value)
    path.unlink()
    with pytest.raises(ShardError, match="cannot be read any more"):
        found.gather(np.array([6000]), 10)
    assert found.gather(np.array([0]), 5000).tolist() == [[1] * 5000]


def test_positions_outside_of_the_files_are_never_read(tmp_path):
    np.arange(10, dtype=np.uint16).tofile(tmp_path / "a")
    found = TokenFiles([tmp_path / "a"], np.array([10]), np.dtype(np.uint16))
    assert found.rows(np.array([0, 5]), 5).tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    for starts, length in (([-1], 2), ([9], 2), ([0], 11)):
        with pytest.raises(AssertionError):
            found.rows(np.array(starts), length)


def bytes_from_disk() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def test_rows_from_the_disk_bring_no_neighbours_along(tmp_path):
    """By default the system would read most of this file for 200 rows of a kilobyte. Hints change no row."""
    path = tmp_path / "ids"
    ids = np.random.default_rng(0).integers(0, 65_000, 32 << 20, np.uint16)
    ids.tofile(path)
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    found = TokenFiles([path], np.array([len(ids)]), ids.dtype)
    starts = np.random.default_rng(1).integers(0, len(ids) - 512, 200)
    starts[0] = len(ids) - 512
    before = bytes_from_disk()
    found.ahead(starts[:100], 512)
    rows = found.rows(starts, 512)
    assert bytes_from_disk() - before < 8 << 20  # 0 if files are in memory
    assert np.array_equal(rows, np.stack([ids[start : start + 512] for start in starts]))


def test_checksums_on_request_find_what_sizes_cannot(made, tmp_path, monkeypatch):
    monkeypatch.setattr("pretrain.storage.index.SMALL", 0)  # like a set that is too large for hashing at every opening
    folder = write_set(tmp_path / "shards", [[[1, 2, 3]], [[4, 5]]])
    (folder / "train-00001.bin").write_bytes(struct.pack("<HH", 4, 6))
    assert Shards(folder).gather(np.array([3]), 2).tolist() == [[4, 6]]
    with pytest.raises(ShardError, match="was altered") as error:
        Shards(folder, checksums=True)
    assert "train-00001.bin: altered, its SHA-256 differs" in str(error.value)


# A simulated set of 10¹² tokens

MEASURE = """
import json, os, sys
opened, read = [], lambda: int(open("/proc/self/io").read().split()[1])
memory = lambda: int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGESIZE")
import numpy as np
from pretrain.shards import Shards
from pretrain.order.stream import Windows
folder, found, torch = sys.argv[1], {}, "torch" in sys.modules
sys.addaudithook(lambda event, values: opened.append(str(values[0])) if event == "open" else None)
def note(what):
    inside = [os.path.basename(path) for path in opened if path.startswith(folder)]
    found[what] = {"opened": inside, "read": read(), "memory": memory()}
note("start")
shards = Shards(folder)
note("opened")
windows = Windows(shards, 512, 7)
for step in (0, 10**9):
    windows.rows(windows.starts(np.arange(step * 32, step * 32 + 32) * 512), 512)
    note(f"step {step}")
    opened.clear()
found["documents"] = [shards.document_at(position) for position in (0, 10**11 + 5, shards.tokens - 1)]
found["origin"] = shards.origin(shards.documents - 1)
note("asked")
print(json.dumps([torch, found]))
"""


@pytest.fixture(scope="module")
def trillion(tmp_path_factory) -> Path:
    return simulate(tmp_path_factory.mktemp("trillion") / "shards", PIECES, PIECE_TOKENS)


def test_a_set_of_a_trillion_tokens_opens_without_being_read(trillion):
    """The test counts work: files opened, bytes read, memory. benchmarks/reading.py measures the time, 0.2 s."""
    command = [sys.executable, "-c", MEASURE, str(trillion)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    torch, found = json.loads(done.stdout)
    assert not torch
    start, opened, first, later, asked = (found[k] for k in ("start", "opened", "step 0", "step 1000000000", "asked"))
    assert opened["opened"] == ["index.json"]
    index = (trillion / "index.json").stat().st_size
    assert opened["read"] - start["read"] < index + 100_000
    assert len(first["opened"]) - 1 <= 2 * 32 + 1  # a piece for each row, another for the token before it
    assert len(later["opened"]) <= 2 * 32 + 1
    assert asked["read"] - start["read"] < index + 1_000_000  # the modules of NumPy alone take 400,000
    # The parsed index takes a few times its bytes; the set itself has 2 TB.
    assert asked["memory"] - start["memory"] < 20 * index
    piece, token = divmod(10**11 + 5, PIECE_TOKENS)
    inside, offset = divmod(token, PIECE_TOKENS // 4)
    assert found["documents"] == [[0, 0], [4 * piece + inside, offset], [4 * PIECES - 1, PIECE_TOKENS // 4 - 1]]
    assert found["origin"] == "b.parquet, row 13"


def test_one_missing_or_truncated_file_among_thousands_is_named(trillion):
    for name, found in (("train-02345.bin", "truncated"), ("train-03999.origin.npy", "is missing")):
        path = trillion / name
        size = path.stat().st_size
        kept = path.rename(path.with_suffix(".kept"))
        if found == "truncated":
            with open(path, "wb") as file:
                file.truncate(size - 1)
        with pytest.raises(ShardError, match=found) as error:
            Shards(trillion)
        assert str(path) in str(error.value)
        kept.rename(path)
    Shards(trillion)
