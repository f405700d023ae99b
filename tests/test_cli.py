"""The messages on the terminal when the system refuses something, or the terminal cannot show a character."""

import errno
import io
import os
import subprocess
import sys

import numpy as np
import pytest
import yaml
from safetensors import SafetensorError

from pretrain import cli
from pretrain.errors import UserError
from pretrain.storage.publish import publish
from pretrain.tools import check_files
from tests.conftest import ROOT, SAMPLE
from tests.helpers.corpora import source

ERRORS = {
    "disk": (OSError(errno.ENOSPC, "No space left on device", "runs/a"), "the disk is full", "runs/a"),
    "quota": (OSError(errno.EDQUOT, "Disk quota exceeded", "runs/a"), "the disk quota is used up", "runs/a"),
    "size": (OSError(errno.EFBIG, "File too large"), "a file may not become so large", "ulimit -f"),
    "read-only": (OSError(errno.EROFS, "Read-only file system", "runs/a"), "is read-only", "runs/a"),
    "broken disk": (OSError(errno.EIO, "Input/output error", b"runs/a"), "the disk or the network", "dmesg"),
    "name": (OSError(errno.ENAMETOOLONG, "File name too long", "a" * 300), "a name is longer", "choose a shorter"),
    "links": (RuntimeError("Symlink loop from 'runs/a'"), "symbolic links lead in a circle", "runs/a", "correct"),
    "folder": (OSError(errno.EISDIR, "Is a directory", "a.bin"), "a folder is where a file should be", "a.bin"),
    "descriptors": (OSError(errno.EMFILE, "Too many open files", "runs/a"), "too many files are open", "ulimit -n"),
    "safetensors": (SafetensorError("I/O error: File too large (os error 27)"), "a file may not become", "os error"),
    "safetensors, full": (SafetensorError("Error: No space left (os error 28)"), "the disk is full", "free some"),
    "arrow": (OSError("Error writing bytes to file. Detail: [errno 28] No space left"), "the disk is full", "Detail"),
    "NumPy": (OSError("4096 requested and 12 written"), "the disk is full", "12 written"),
    "memory": (MemoryError(), "there is not enough memory", "MemoryError"),
    "NumPy's memory": (np._core._exceptions._ArrayMemoryError((9, 9), np.dtype("i8")), "not enough memory", "(9, 9)"),
    "PyTorch's memory": (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "not enough memory", "Default"),
}


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("publishing", [False, True])
def test_what_the_system_refuses_is_said_without_a_traceback(tmp_path, capsys, name, publishing):
    error, *fragments = ERRORS[name]

    def work() -> None:
        if not publishing:
            raise error
        with publish(tmp_path / "out", "export", UserError):
            raise error

    assert cli.guarded(work) == 2
    said = capsys.readouterr().err
    for fragment in ["error: ", *fragments]:
        assert fragment in said
    assert len(said.splitlines()) == 3 and "Traceback" not in said
    assert not publishing or f"{tmp_path / 'out'} was not written" in said


def test_a_fault_of_ours_keeps_its_traceback():
    for fault in (KeyError("[key]"), OSError(errno.ENOTCONN, "not connected"), RuntimeError("shapes differ")):
        with pytest.raises(type(fault)):
            cli.guarded(lambda fault=fault: (_ for _ in ()).throw(fault))


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "gbk", "closed"])
def test_a_character_that_cannot_be_printed_costs_no_work(tmp_path, monkeypatch, encoding):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict") if encoding != "closed" else None
    monkeypatch.setattr(sys, "stdout", stream)
    if stream is None:
        monkeypatch.setattr(sys, "stderr", None)
    (tmp_path / "text.txt").write_text((SAMPLE / "zh.txt").read_text(encoding="utf-8")[:40_000], encoding="utf-8")
    path = source(tmp_path, files=["text.txt"], language="zh")
    values = {"corpus": str(path), "out": f"{tmp_path}/百…科", "duplicates": {"near": {"use": False}}}
    config = tmp_path / "百科.yaml"
    config.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    assert cli.main("clean", [str(config)]) == 0
    assert check_files.main([str(tmp_path / "百…科")]) == 0
    if stream is not None:
        stream.flush()
        assert b"intact" in stream.buffer.getvalue()


def test_a_file_size_limit_is_said(tmp_path):
    (tmp_path / "c.yaml").write_text(f"{{corpus: {SAMPLE}, out: {tmp_path}/out, kind: bert, vocab_size: 3000}}")
    command = f"ulimit -f 8; exec {sys.executable} {ROOT}/launch/tokenizer.py {tmp_path}/c.yaml plot=false"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "a file may not become so large" in done.stderr
