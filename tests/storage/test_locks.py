"""One process at a time makes a folder, and a process that ends in any way releases its lock."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import AbstractContextManager

import pytest

from pretrain.errors import ConfigError, UserError
from pretrain.storage.index import faults, read_index, write_index
from pretrain.storage.locks import locked
from pretrain.storage.publish import publish
from tests.conftest import ROOT
from tests.helpers.processes import started

OWNER = """
import os, sys, time
from pathlib import Path
from pretrain.storage.locks import locked
with locked(Path(sys.argv[1]), "pretrain"):
    if os.fork() == 0:  # as a loader's worker is
        time.sleep(30)
        os._exit(0)
    print("has it", flush=True)
    time.sleep(30)
"""
RACER = """
import os, sys, time
from pathlib import Path
from pretrain.storage.index import write_index
from pretrain.storage.publish import publish
from pretrain.errors import UserError
root, rounds, parent = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
for number in range(rounds):
    while not (root / str(number)).exists():
        if os.getppid() != parent:
            sys.exit("the test has ended")
    try:
        with publish(root / str(number) / "o", "export") as aside:
            for name in range(4):
                (aside / f"{os.getpid()}-{name}").write_text("x")
            write_index(aside, {"stage": "export"})
        print("done", flush=True)
    except UserError as error:
        print("refused" if "another process is making this folder" in str(error) else error, flush=True)
"""


def start(code: str, *arguments: object) -> AbstractContextManager[subprocess.Popen]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return started(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_of_processes_that_begin_at_once_one_makes_the_folder_and_its_files_alone_are_in_it(tmp_path):
    rounds = 60
    with start(RACER, tmp_path, rounds, os.getpid()) as one, start(RACER, tmp_path, rounds, os.getpid()) as other:
        for number in range(rounds):
            left = tmp_path / f"{number}.aside" / ".o.tmp"  # by a killed process
            left.mkdir(parents=True)
            for name in range(20):
                (left / str(name)).touch()
            (tmp_path / f"{number}.aside").rename(tmp_path / str(number))
            said = sorted(racer.stdout.readline().strip() for racer in (one, other))
            assert said in (["done", "refused"], ["done", "done"]), said  # the second may come later
            out = tmp_path / str(number) / "o"
            index = read_index(out, UserError, "")
            assert len(index["files"]) == 4 and not faults(out, index)


def test_the_owner_is_named_and_its_death_frees_the_folder_though_a_forked_process_lives(tmp_path):
    with start(OWNER, tmp_path / "run") as owner:
        assert owner.stdout.readline() == "has it\n"
        with pytest.raises(ConfigError) as refused, locked(tmp_path / "run", "pretrain", ConfigError):
            pass
        assert f"run: pretrain, process {owner.pid} on {os.uname().nodename} since 20" in str(refused.value)
        with locked(tmp_path / "other", "pretrain"):  # the lock of another folder
            pass
        os.kill(owner.pid, signal.SIGKILL)
        owner.wait()
        with locked(tmp_path / "run", "export"):
            assert json.loads((tmp_path / ".run.lock").read_text())["command"] == "export"
        os.killpg(owner.pid, signal.SIGKILL)  # the forked process lived all the time


def test_a_forked_process_releases_nothing(tmp_path):
    with locked(tmp_path / "run", "pretrain"):
        child = os.fork()
        if not child:
            os._exit(0)
        os.waitpid(child, 0)
        with pytest.raises(UserError, match="another process is making this folder"), locked(tmp_path / "run", "x"):
            pass


def test_what_is_made_in_a_locked_folder_needs_no_lock_of_its_own(tmp_path):
    with locked(tmp_path / "run", "pretrain"):
        with publish(tmp_path / "run" / "checkpoints" / "step_1", "checkpoint") as aside:
            write_index(aside, {"stage": "checkpoint"})
        assert [path.name for path in (tmp_path / "run").rglob(".*")] == []
    assert [path.name for path in tmp_path.glob(".*")] == [".run.lock"]


def test_a_lock_file_that_is_removed_meanwhile_is_made_again(tmp_path, monkeypatch):
    from pretrain.storage import locks

    real, times = locks._open, []

    def removed(path):  # somebody deletes the file the first time
        descriptor = real(path)
        if not times:
            path.unlink()
        times.append(time.monotonic())
        return descriptor

    monkeypatch.setattr(locks, "_open", removed)
    with locked(tmp_path / "run", "pretrain"):
        assert len(times) == 2 and (tmp_path / ".run.lock").exists()
