"""The command line: its help, its exit codes, and its messages if the system refuses something."""

import contextlib
import errno
import io
import os
import subprocess
import sys

import numpy as np
import pytest
import yaml
from safetensors import SafetensorError

from pretrain import __version__, cli, config
from pretrain.config_reference import keys
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
    if stream is None:  # cli.py has opened /dev/null in their places
        sys.stdout.close()
        sys.stderr.close()
    else:
        stream.flush()
        assert b"intact" in stream.buffer.getvalue()


@pytest.mark.parametrize("stage", cli.STAGES)
def test_help_shows_every_key_with_its_meaning_and_starts_at_once(stage, capsys):
    assert cli.main(stage, ["--help"]) == 0
    said = capsys.readouterr().out
    for key in keys(cli.config_of(stage)):
        assert f"\n  {key.name}: {key.type}" in said
        assert not key.description or key.description.split()[0] in said


def test_the_configuration_is_printed_as_a_run_would_have_it_and_loads_back(tmp_path, capsys):
    overrides = ["phases.0.objective.mask_ratio=0.4", "optim.lr=1e-3"]
    assert cli.main("pretrain", [f"{ROOT}/configs/sample/encoder.yaml", *overrides, "--print-config"]) == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    kind = cli.config_of("pretrain")
    printed = config.load(kind, tmp_path / "printed.yaml")
    assert printed == config.load(kind, ROOT / "configs/sample/encoder.yaml", overrides).resolved()
    assert printed.phases[0].objective.mask_ratio == 0.4 and printed.phases[1].objective is None


def test_the_command_knows_every_stage_and_tool_by_its_name(tmp_path, capsys):
    assert cli.command(["--help"]) == 0
    said = capsys.readouterr().out
    scripts = {path.stem for path in (ROOT / "launch").glob("*.py")}
    assert scripts == {*cli.STAGES, *cli.TOOLS} and all(f"\n  {name} " in said for name in scripts)
    assert cli.command(["tokeniser", "x.yaml"]) == 2
    assert "there is no command 'tokeniser'\n  did you mean tokenizer?" in capsys.readouterr().err
    assert cli.command(["tokenizer", f"{tmp_path}/x.yaml"]) == 2
    assert "no such configuration file" in capsys.readouterr().err
    assert cli.command(["check_files", str(tmp_path)]) == 2
    assert cli.command([]) == 2


@pytest.mark.parametrize("name", [*cli.STAGES, *cli.TOOLS])
def test_the_help_of_a_command_shows_the_command_that_was_typed(name, capsys):
    with contextlib.suppress(SystemExit):  # argparse ends the process itself in the tools
        cli.command([name, "--help"])
    assert capsys.readouterr().out.startswith(f"usage: pretrain {name} ")


def test_a_command_without_its_file_asks_for_the_file_alone(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.command(["tokenizer", "--print-config"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith("the following arguments are required: config\n")


def test_the_demo_outside_of_the_repository_says_where_it_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.command(["demo", f"{ROOT}/configs/sample/demo.yaml"]) == 2
    assert "the demo runs in the folder of the repository" in capsys.readouterr().err


def test_the_package_is_a_program():
    done = subprocess.run([sys.executable, "-m", "pretrain", "--version"], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == f"{__version__}\n" and done.returncode == 0


def test_a_file_size_limit_is_said(tmp_path):
    (tmp_path / "c.yaml").write_text(f"{{corpus: {SAMPLE}, out: {tmp_path}/out, kind: bert, vocab_size: 3000}}")
    command = f"ulimit -f 8; exec {sys.executable} {ROOT}/launch/tokenizer.py {tmp_path}/c.yaml plot=false"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "a file may not become so large" in done.stderr
