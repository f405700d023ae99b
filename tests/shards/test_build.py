"""Building: the bytes equal a slow loop for any processes and any kills; documents in random order; origins."""

import fcntl
import gzip
import hashlib
import io
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import yaml

from pretrain.corpus import CHUNK_BYTES, SIDES, Chunk, Group, Skipped, open_corpus
from pretrain.errors import CorpusError, ShardError, TokenizerError, UserError
from pretrain.hashing import hash64
from pretrain.shards import Shards, ShardsConfig, run, stage
from pretrain.shards.build import blocks, shuffle
from pretrain.shards.build.blocks import (
    COUNT,
    ROW,
    BlockStretch,
    ShardPiece,
    begins,
    counted,
    items_of,
    read_block,
    write_block,
    write_piece,
)
from pretrain.shards.megatron import dtype_of, read_idx, write_idx
from pretrain.tokenizer import open_tokenizer
from tests.conftest import ROOT, SAMPLE
from tests.helpers.entries import entries
from tests.helpers.processes import started

CALLS = {"open", "write", "flush", "fsync", "close", "rename", "mkdir", "unlink", "rmdir", "chmod"}
TIMEOUT_S = 60


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A folder in memory, if possible: the tests sync hundreds of files, which takes minutes on a disk."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Text, compressed lines, and many files of one document: 230 documents, a tenth of them held out."""
    root = tmp_path_factory.mktemp("corpus")
    english, chinese = (
        (SAMPLE / f"{language}.txt").read_text(encoding="utf-8").split("\n\n") for language in ("en", "zh")
    )
    (root / "en.txt").write_text("\n\n".join(english[:100]), encoding="utf-8")
    lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in chinese[:100])
    (root / "zh.jsonl.gz").write_bytes(gzip.compress("".join(lines).encode(), mtime=0))
    (root / "one").mkdir()
    for number in range(30):
        (root / "one" / f"{number:02d}.txt").write_text(english[100 + number], encoding="utf-8")
    sources = [
        {"name": "zh", "files": ["zh.jsonl.gz"]},
        {"name": "one", "files": ["one"], "documents": "file"},
        {"name": "en", "files": ["en.txt"]},
    ]
    recipe = {"name": "three", "heldout_fraction": 0.1, "sources": sources}
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return root / "recipe.yaml"


def config(prepared, corpus: Path, out: Path, kind: str = "bert", **changes) -> ShardsConfig:
    values = {"corpus": str(corpus), "tokenizer": str(prepared.tokenizer[kind]), "out": str(out)}
    return ShardsConfig(**{**values, "piece_tokens": 20_000, "chunk_bytes": 20_000, **changes})


def recipe(path: Path, texts: list[str]) -> Path:
    """A corpus of one text file, with a tenth held out."""
    path.with_suffix(".txt").write_text("\n\n".join(texts), encoding="utf-8")
    values = {"name": "one", "heldout_fraction": 0.1, "sources": [{"name": "s", "files": [f"{path.stem}.txt"]}]}
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def reference(prepared, corpus, tmp_path_factory) -> dict[str, bytes]:
    """The result of an undisturbed build in this process."""
    out = tmp_path_factory.mktemp("reference") / "out"
    run(config(prepared, corpus, out))
    return contents(out)


# The files


def slow(prepared, corpus: Path, out: Path, piece_tokens: int) -> dict[str, bytes]:
    """Every file of a build except its index, made by a loop that holds all documents."""
    tokenizer = open_tokenizer(prepared.tokenizer["bert"])
    out.mkdir()
    places: dict[str, int] = {}
    for document in open_corpus(corpus).documents():
        places.setdefault(document.where.rpartition(" ")[0], len(places))
    for side in SIDES:
        pieces, filled, unigram = [[]], 0, np.zeros(tokenizer.vocab_size, np.int64)
        for document in open_corpus(corpus).documents((side,)):
            if filled >= piece_tokens:
                pieces, filled = [*pieces, []], 0
            (ids,) = tokenizer.encode_batch([document.text])
            place, _, number = document.where.rpartition(" ")
            pieces[-1].append((ids, len(document.text.encode()), (places[place], int(number))))
            filled += len(ids)
            np.add.at(unigram, ids, 1)
        for number, piece in enumerate(pieces):
            ids, raw, origin = zip(*piece, strict=True)
            prefix = out / f"{side}-{number:05d}"
            prefix.with_suffix(".bin").write_bytes(np.concatenate(ids).astype(np.uint16).tobytes())
            lengths = np.array([len(i) for i in ids], np.int32)
            with open(prefix.with_suffix(".idx"), "wb") as file:
                write_idx(file.write, len(lengths), lambda lengths=lengths: [lengths], np.dtype(np.uint16))
            np.save(out / f"{prefix.name}.raw.npy", np.array(raw, np.uint32))
            np.save(out / f"{prefix.name}.origin.npy", np.array(list(origin), [("file", "<u4"), ("number", "<u8")]))
        np.save(out / f"{side}.unigram.npy", unigram)
    (out / "origins.json").write_text(json.dumps(list(places), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return contents(out)


def test_every_file_is_that_of_a_slow_loop(prepared, corpus, reference, tmp_path):
    found = {name: data for name, data in reference.items() if name != "index.json"}
    assert found == slow(prepared, corpus, tmp_path / "slow", 20_000)
    assert sum(name.endswith(".bin") for name in found) > 6


@pytest.mark.parametrize(
    "changes",
    [
        {"workers": 3},
        {"workers": 2, "chunk_bytes": CHUNK_BYTES},
        {"workers": 1, "chunk_bytes": 1024},
        {"workers": 1, "chunk_bytes": 70_000},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_neither_processes_nor_chunks_show_in_the_output(prepared, corpus, reference, tmp_path, changes):
    run(config(prepared, corpus, tmp_path / "out", **changes))
    assert contents(tmp_path / "out") == reference


def test_the_digests_taken_while_writing_are_those_of_the_files(prepared, corpus, reference, tmp_path):
    index = json.loads(reference["index.json"])
    listed = index["files"] | index["recorded"]["files"]
    assert set(listed) == set(reference) - {"index.json"}
    for name, entry in listed.items():
        assert entry == {"bytes": len(reference[name]), "sha256": hashlib.sha256(reference[name]).hexdigest()}


def test_every_document_says_where_it_came_from(prepared, corpus, tmp_path):
    out = tmp_path / "out"
    run(config(prepared, corpus, out))
    for side in SIDES:
        expected = [document.where for document in open_corpus(corpus).documents((side,))]
        found = Shards(out, side)
        assert [found.origin(number) for number in range(found.documents)] == expected
    assert {"zh.jsonl.gz, line", "one/07.txt, line", "en.txt, line"} <= set(
        json.loads((out / "origins.json").read_text())
    )


def test_where_files_are_called_otherwise_the_fingerprint_stays(prepared, tmp_path):
    text = (SAMPLE / "en.txt").read_text(encoding="utf-8")[:100_000]
    fingerprints = set()
    for name in ("a", "b"):
        index = run(config(prepared, recipe(tmp_path / f"{name}.yaml", [text]), tmp_path / name))
        assert json.loads((tmp_path / name / "origins.json").read_text()) == [f"{name}.txt, line"]
        fingerprints.add(index["fingerprint"])
    assert len(fingerprints) == 1


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_499, "uint16"), (65_500, "int32"), (250_000, "int32")])
def test_ids_of_a_large_vocabulary_are_int32(tmp_path, vocab_size, dtype):
    """Training a vocabulary of this size takes minutes, so the test makes the ids itself."""
    assert dtype_of(vocab_size) == dtype
    ids = [np.random.default_rng(side).integers(0, vocab_size, 30).astype(dtype) for side in range(2)]
    ids[1][0] = vocab_size - 1
    rows = [np.zeros(3, ROW), np.zeros(2, ROW)]
    for side, lengths in enumerate(([10, 5, 15], [29, 1])):
        rows[side]["length"], rows[side]["begin"] = lengths, begins(np.array(lengths))
    times = [np.bincount(i, minlength=vocab_size) for i in ids]
    counts = [np.array([(n, side[n]) for n in side.nonzero()[0]], COUNT) for side in times]
    block = write_block(tmp_path / "block", rows, [[i] for i in ids], ("a.txt, line",), Skipped(), counts)
    assert np.array_equal(counted(np.dtype(dtype), vocab_size, [block, read_block(block.path)]), 2 * np.array(times))
    for side, name in enumerate(SIDES):
        documents = block.sides[side].documents
        parts = [BlockStretch(block, side, *ends, np.array([4])) for ends in ((0, 1), (1, documents))]
        write_piece(tmp_path, np.dtype(dtype), ShardPiece.of(side, 0, documents, parts))
        data = np.fromfile(tmp_path / f"{name}-00000.bin", dtype)
        assert np.array_equal(data, ids[side])
        found, lengths, offsets = read_idx(tmp_path / f"{name}-00000.idx")
        assert found == dtype and lengths.tolist() == rows[side]["length"].tolist()
        assert offsets.tolist() == [n * found.itemsize for n in begins(lengths).tolist()]
        assert set(np.load(tmp_path / f"{name}-00000.origin.npy")["file"].tolist()) == {4}


def test_files_are_read_by_the_process_that_tokenises_them_when_there_are_enough(corpus):
    opened = open_corpus(corpus)
    alone, many = list(items_of(opened, 1500, 1)), list(items_of(opened, 1500, 2))
    assert alone == list(opened.chunks(1500))
    sent = [item for item in many if isinstance(item, Chunk)]
    assert {part.file for chunk in sent for part in chunk.parts} == {"en.txt"}  # more than a fair share
    assert sum(isinstance(item, Group) for item in many) > 3

    def chunks(items):
        for item in items:
            yield from [item] if isinstance(item, Chunk) else opened.chunks(1500, item)

    assert list(chunks(many)) == alone


def test_memory_does_not_grow_with_the_corpus(prepared, tmp_path):
    text = (SAMPLE / "en.txt").read_text(encoding="utf-8")
    peaks = []
    for times in (4, 24):  # of 0.3 MB
        path = recipe(tmp_path / "recipe.yaml", [text] * times)
        values = config(prepared, path, tmp_path / "out", chunk_bytes=1 << 20, piece_tokens=1 << 30)
        peaks.append(_peak_mb(tmp_path, values))
    assert peaks[1] < peaks[0] + 12, peaks


def _peak_mb(tmp_path: Path, values: ShardsConfig) -> float:
    command = _command(tmp_path, values)
    code = (
        "import resource, subprocess, sys; done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL)\n"
        "print(done.returncode, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    done = subprocess.run([sys.executable, "-c", code, *command], stdout=subprocess.PIPE, text=True, check=True)
    status, peak = map(int, done.stdout.split())
    assert status == 0
    return peak / 1024


# Interruptions


def test_a_build_killed_at_any_moment_goes_on_to_the_same_bytes(prepared, few, tmp_path):
    """Kills at 36 places: before or after a call that opens, writes, syncs, closes, renames or removes a file.

    The first kills of all builds are spread evenly over an undisturbed build. Later kills come at any place.
    """
    rng, kills = random.Random(0), 0
    values = config(prepared, few, tmp_path / "straight")
    calls = _calls(values)
    expected = contents(tmp_path / "straight")
    assert calls > 150
    for number in range(18):
        out = tmp_path / f"out-{number}"
        at, tries = int(calls * (number + rng.random()) / 18), 0
        while _killed(values.model_copy(update={"out": str(out)}), at, rng.choice(("c_call", "c_return"))):
            kills, tries = kills + 1, tries + 1
            assert not out.exists() or contents(out) == expected
            at = rng.randrange(calls) if tries < 3 else 2 * calls  # replacing a folder takes more calls than making it
        assert contents(out) == expected
        assert not [name for name in entries(tmp_path) if name.startswith(".")], "work is left"
    assert kills >= 36


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> Path:
    texts = [(SAMPLE / f"{language}.txt").read_text(encoding="utf-8").split("\n\n")[:25] for language in ("en", "zh")]
    return recipe(tmp_path_factory.mktemp("few") / "recipe.yaml", [*texts[0], *texts[1]])


def _calls(values: ShardsConfig) -> int:
    """The number of calls in an undisturbed build that change files."""
    count = 0

    def hook(frame, event, function):
        nonlocal count
        count += event == "c_call" and function.__name__ in CALLS

    sys.setprofile(hook)
    try:
        run(values)
    finally:
        sys.setprofile(None)
    return count


def _killed(values: ShardsConfig, at: int, event: str) -> bool:
    """Build in another process, which dies by SIGKILL at its call number `at`. Returns False if it finished before."""
    child = os.fork()
    if not child:
        left = at

        def hook(frame, happened, function):
            nonlocal left
            if happened == event and function.__name__ in CALLS:
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            sys.setprofile(hook)
            run(values)
            sys.setprofile(None)
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


def test_a_launcher_that_is_killed_leaves_finished_chunks_which_any_number_of_workers_takes(
    prepared, corpus, reference, tmp_path
):
    out, work = tmp_path / "out", tmp_path / ".out.work"
    command = _command(tmp_path, config(prepared, corpus, out, chunk_bytes=5000))
    states = []
    for workers in (2, 1):
        enough = len(_finished(work)) + 3
        with started([*command, f"workers={workers}"], stderr=subprocess.DEVNULL) as process:
            deadline = time.monotonic() + TIMEOUT_S
            while len(_finished(work)) < enough:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.001)
            process.kill()
        assert not out.exists()
        states.append(_finished(work))
    assert all(before.items() <= after.items() for before, after in pairwise(states))  # not made again
    done = subprocess.run([*command, "workers=3"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert contents(out) == reference
    assert entries(tmp_path) == ["config.yaml", "out"]


def _command(tmp_path: Path, values: ShardsConfig) -> list[str]:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values.model_dump()), encoding="utf-8")
    return [sys.executable, str(ROOT / "launch/shards.py"), str(tmp_path / "config.yaml")]


def _finished(work: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in work.glob("chunks-*/[!.]*")}


@pytest.mark.parametrize("size", ["200k", "1200k"])  # full in the first step, and in the second
def test_a_full_disk_is_said_to_be_full_and_the_build_goes_on_when_there_is_space(
    prepared, corpus, tmp_path, reference, size
):
    disk = tmp_path / "disk"
    disk.mkdir()
    command = " ".join(_command(tmp_path, config(prepared, corpus, disk / "out")))
    line = (
        f"mount -t tmpfs -o size={size} none {disk} && {command} workers=2; echo $? > {tmp_path}/status; "
        f"ls -A -I .out.lock {disk} > {tmp_path}/left; ls {disk}/.out.work/chunks-* | wc -l >> {tmp_path}/left; "
        f"mount -o remount,size=20m {disk} && {command} && cp -r {disk}/out {tmp_path}/copy"
    )
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    done = subprocess.run(["unshare", "-rm", "sh", "-c", line], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "status").read_text() == "2\n"
    assert "the disk is full" in done.stderr and "free some space and start again" in done.stderr
    assert "finished chunks are kept in" in done.stderr and "Traceback" not in done.stderr
    work, chunks = (tmp_path / "left").read_text().split()
    assert work == ".out.work" and int(chunks) > 3
    assert contents(tmp_path / "copy") == reference


@pytest.mark.parametrize("workers", [1, 2])
def test_a_limit_of_the_size_of_files_is_said_and_the_build_goes_on_without_it(
    prepared, corpus, tmp_path, reference, workers
):
    out = tmp_path / "made" / "out"
    command = " ".join([*_command(tmp_path, config(prepared, corpus, out)), f"workers={workers}"])
    done = subprocess.run(["bash", "-c", f"ulimit -f 8; {command}"], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "a file may not become so large" in done.stderr and "ulimit -f" in done.stderr
    assert entries(out.parent) in ([".out.work"], [])
    run(config(prepared, corpus, out))
    assert contents(out) == reference


def test_chunks_of_other_settings_are_not_taken(prepared, corpus, reference, tmp_path, monkeypatch):
    out, work = tmp_path / "out", tmp_path / ".out.work"
    _interrupted(monkeypatch, config(prepared, corpus, out, kind="byte"), after=4)
    assert len(_finished(work)) == 4
    _interrupted(monkeypatch, config(prepared, corpus, out), after=5)
    assert len(_finished(work)) == 5  # the chunks of the other tokenizer are gone
    before = _finished(work)
    _interrupted(monkeypatch, config(prepared, corpus, out, piece_tokens=100, shuffle_seed=1), after=9)
    assert before.items() < _finished(work).items()  # chunks do not depend on pieces or their order
    run(config(prepared, corpus, out))
    assert contents(out) == reference


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(data)


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


class Planted:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path.parent / "code-ran"),)


def planted(path: Path) -> None:
    """A pickle at the places where an earlier version read pickles: behind the data, or as the whole file."""
    head = pickle.dumps(Planted(path))
    path.write_bytes(path.read_bytes() + head + len(head).to_bytes(8, "little") if "chunks" in str(path) else head)


def swapped(path: Path) -> None:
    """The undamaged file of another chunk, run or piece."""
    others = [other for other in path.parent.iterdir() if other.suffix == path.suffix and other != path]
    shutil.copy(others[0], path) if others else flipped(path)


@pytest.fixture(scope="module")
def straight(prepared, few, tmp_path_factory) -> dict[str, bytes]:
    """The same build without a kill."""
    out = tmp_path_factory.mktemp("straight") / "out"
    run(config(prepared, few, out, shuffle_seed=3, piece_tokens=500))
    return contents(out)


@pytest.mark.parametrize(
    ("kept", "damage"),
    [
        ("chunks-*/[!.]*", flipped),
        ("chunks-*/[!.]*", truncated),
        ("chunks-*/[!.]*", planted),
        ("chunks-*/[!.]*", swapped),
        ("runs-*/[!.]*", flipped),
        ("pieces-*/*.done", planted),
        ("pieces-*/*.done", swapped),
        ("pieces-*/*.bin", flipped),
    ],
)
def test_what_a_killed_build_left_is_made_again_if_it_was_damaged_since(
    prepared, few, straight, tmp_path, monkeypatch, capsys, kept, damage
):
    values = config(prepared, few, tmp_path / "out", shuffle_seed=3, piece_tokens=500)
    real, made = stage.write_piece, []

    def write(*rest):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(real(*rest))
        return made[-1]

    with monkeypatch.context() as patch:
        patch.setattr(stage, "write_piece", write)
        with pytest.raises(KeyboardInterrupt):
            run(values)
    path = sorted((tmp_path / ".out.work").glob(kept))[0]
    damage(path)
    capsys.readouterr()
    run(values)
    assert f"{path} is not what was written: it was damaged since, and is made again" in capsys.readouterr().err
    assert not list(tmp_path.rglob("code-ran"))
    assert contents(tmp_path / "out") == straight


def _interrupted(monkeypatch, values: ShardsConfig, after: int) -> None:
    """Ctrl-C after some chunks are finished."""
    real = blocks.write_block

    def write(path, *rest):
        if len(list(path.parent.glob("[!.]*"))) >= after:
            raise KeyboardInterrupt
        return real(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(blocks, "write_block", write)
        with pytest.raises(KeyboardInterrupt):
            run(values)


def test_what_another_process_builds_is_left_alone(prepared, corpus, tmp_path):
    out = tmp_path / "out"
    theirs, chunk = tmp_path / ".out.tmp", tmp_path / ".out.work" / "chunks-0" / "a"
    for folder in (theirs, chunk.parent):
        folder.mkdir(parents=True)
    chunk.touch()
    lock = os.open(tmp_path / ".out.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)  # as in the process that makes it
    with pytest.raises(ShardError, match="another process is making this folder"):
        run(config(prepared, corpus, out))
    assert chunk.exists() and theirs.exists()
    os.close(lock)


def test_an_output_folder_that_holds_the_corpus_is_refused(prepared, corpus, tmp_path):
    out = tmp_path / "out"
    run(config(prepared, corpus, out))
    path = recipe(out / "recipe.yaml", ["some text"] * 9)
    with pytest.raises(CorpusError, match="the output folder holds a file of the corpus"):
        run(config(prepared, path, out))
    assert path.exists() and entries(tmp_path) == ["out"]


def test_a_tokenizer_that_changes_while_it_is_used_is_refused(prepared):
    folder = prepared.tokenizer["bert"]
    with pytest.raises(TokenizerError, match="the tokenizer changed"):
        blocks.opened(folder, "0" * 64)


# Random order


@pytest.fixture(scope="module")
def shuffled(prepared, corpus, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("shuffled") / "out"
    run(config(prepared, corpus, out, shuffle_seed=7))
    return out


def documents(found: Shards) -> list[tuple[str, bytes]]:
    return [(found.origin(number), found.document(number).tobytes()) for number in range(found.documents)]


def test_shuffled_documents_are_those_of_the_corpus_in_the_order_of_their_keys(prepared, corpus, shuffled, tmp_path):
    run(config(prepared, corpus, tmp_path / "out"))
    for number, side in enumerate(SIDES):
        straight, found = documents(Shards(tmp_path / "out", side)), documents(Shards(shuffled, side))
        keys = [int(hash64(shuffle.SHUFFLE, 7, number, n)) for n in range(len(straight))]
        assert found == [straight[n] for n in sorted(range(len(keys)), key=keys.__getitem__)]
        assert found != straight
        pieces = Shards(shuffled, side).pieces
        for piece in pieces[:-1]:
            lengths = read_idx(shuffled / f"{piece}.idx")[1]
            assert lengths.sum() >= 20_000 > lengths[:-1].sum()
        assert np.array_equal(Shards(shuffled, side).unigram(), Shards(tmp_path / "out", side).unigram())


def test_neither_processes_nor_chunks_show_in_a_random_order(prepared, corpus, shuffled, tmp_path):
    run(config(prepared, corpus, tmp_path / "out", shuffle_seed=7, workers=2, chunk_bytes=11_000))
    assert contents(tmp_path / "out") == contents(shuffled)


@pytest.mark.parametrize("tokens", [1, 9000])
def test_runs_do_not_show_in_a_random_order(prepared, corpus, shuffled, tmp_path, monkeypatch, tokens):
    for name in ("RUN_TOKENS", "GATHER_TOKENS", "PLAN_DOCUMENTS"):
        monkeypatch.setattr(shuffle, name, tokens)
    run(config(prepared, corpus, tmp_path / "out", shuffle_seed=7, chunk_bytes=50_000))
    assert contents(tmp_path / "out") == contents(shuffled)


def test_a_random_order_is_resumed_where_it_was_killed(prepared, few, tmp_path):
    values = config(prepared, few, tmp_path / "straight", shuffle_seed=7)
    calls, rng, kills = _calls(values), random.Random(1), 0
    for number, at in enumerate((0.6, 0.7, 0.8, 0.9)):
        out = tmp_path / f"out-{number}"
        while _killed(values.model_copy(update={"out": str(out)}), int(at * calls), "c_return"):
            kills, at = kills + 1, rng.random() * 2
        assert contents(out) == contents(tmp_path / "straight")
    assert kills >= 4


def test_orders_of_different_seeds_put_each_document_everywhere():
    """Chi-square of the place of document d of 8 over 4,000 seeds: 7 degrees of freedom, p = 1e-4 at 29.9."""
    keys = np.stack([hash64(shuffle.SHUFFLE, seed, 0, np.arange(8)) for seed in range(4000)])
    places = np.argsort(np.argsort(keys, axis=1), axis=1)  # (seeds, documents)
    for document in range(8):
        counts = np.bincount(places[:, document], minlength=8)
        assert ((counts - 500) ** 2 / 500).sum() < 29.9
    pairs = np.bincount(places[:, 0] * 8 + places[:, 1], minlength=64).reshape(8, 8)
    off = pairs[~np.eye(8, dtype=bool)]
    assert ((off - 4000 / 56) ** 2 / (4000 / 56)).sum() < 105  # 55 degrees of freedom, p = 1e-4 at 104


# A cluster


@pytest.fixture(scope="module")
def scheduler():
    distributed = pytest.importorskip("distributed", reason="needs Dask: pip install '.[dask]'")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, host="127.0.0.1"
    ) as cluster:
        yield cluster


def test_a_dask_cluster_gives_the_same_bytes(prepared, corpus, reference, shuffled, tmp_path, scheduler, monkeypatch):
    monkeypatch.chdir(tmp_path)  # workers have another current folder
    address = scheduler.scheduler_address
    index = run(config(prepared, os.path.relpath(corpus), Path("out"), scheduler=address))
    assert index["fingerprint"] == json.loads(reference["index.json"])["fingerprint"]
    assert {**contents(tmp_path / "out"), "index.json": reference["index.json"]} == reference
    assert entries(tmp_path) == ["out"]
    command = _command(tmp_path, config(prepared, corpus, tmp_path / "out", shuffle_seed=7, replace=True))
    done = subprocess.run([*command, "--scheduler", address], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == contents(shuffled)


def test_the_work_of_a_lost_worker_is_done_by_another(prepared, corpus, reference, tmp_path, scheduler):
    def kill():
        while len(_finished(tmp_path / ".out.work")) < 4:
            time.sleep(0.002)
        os.kill(scheduler.workers[0].pid, signal.SIGKILL)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    run(config(prepared, corpus, tmp_path / "out", scheduler=scheduler.scheduler_address, chunk_bytes=4000))
    thread.join(TIMEOUT_S)
    assert contents(tmp_path / "out") == reference


def test_a_cluster_without_workers_is_waited_for_and_said_to_be(prepared, corpus, reference, tmp_path, monkeypatch):
    distributed = pytest.importorskip("distributed", reason="needs Dask: pip install '.[dask]'")
    monkeypatch.setattr("pretrain.processes.pool.WATCH_S", 0.05)
    said = io.StringIO()
    monkeypatch.setattr("sys.stderr", said)
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, processes=True, dashboard_address=":0", host="127.0.0.1"
    ) as cluster:

        def away_for_a_while(*arguments):
            cluster.scale(0)
            deadline = time.monotonic() + TIMEOUT_S
            while "has no worker left" not in said.getvalue() and time.monotonic() < deadline:
                time.sleep(0.02)
            cluster.scale(1)
            return plan(*arguments)

        plan = stage._plan  # between tokenising and writing
        monkeypatch.setattr("pretrain.shards.stage._plan", away_for_a_while)
        run(config(prepared, corpus, tmp_path / "out", scheduler=cluster.scheduler_address))
    assert said.getvalue().count("has no worker left") == 1
    assert contents(tmp_path / "out") == reference


def test_what_is_wrong_with_the_text_is_said_by_a_cluster_too(prepared, tmp_path, scheduler):
    path = recipe(tmp_path / "recipe.yaml", ["some text"] * 9)
    (tmp_path / "recipe.txt").write_bytes(b"text\n\n" * 99 + b"\xff")
    with pytest.raises(CorpusError, match="not valid UTF-8") as error:
        run(config(prepared, path, tmp_path / "out", scheduler=scheduler.scheduler_address))
    assert "line 199" in str(error.value)
    assert entries(tmp_path) == ["recipe.txt", "recipe.yaml"]


def test_a_cluster_that_is_not_there_is_said_to_be_missing(prepared, corpus, tmp_path, monkeypatch):
    pytest.importorskip("distributed", reason="needs Dask: pip install '.[dask]'")
    monkeypatch.setattr("pretrain.processes.pool.CONNECT_S", 0.5)
    for address in ("tcp://127.0.0.1:9", "nonsense://x"):
        with pytest.raises(UserError, match="no Dask scheduler answers at"):
            run(config(prepared, corpus, tmp_path / "out", scheduler=address))
    assert not entries(tmp_path)
