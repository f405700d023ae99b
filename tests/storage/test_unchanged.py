"""Files that change, shrink or are copied again during a run: a run trains only on the bytes of the index."""

import os
import shutil
import subprocess
import sys

import pytest

from pretrain.config import build
from pretrain.errors import ShardError
from pretrain.shards import Shards
from pretrain.training.config import RunConfig
from pretrain.training.run import run as pretrain
from tests.conftest import ROOT, run_values

READ = """
import os, sys
import numpy as np
from pretrain import cli
from pretrain.processes.prefetch import Workers
from pretrain.shards import Shards

def read(shards, item):
    if item:
        os.truncate(shards.folder / "train-00000.bin", 4096)
    return int(shards.gather(np.arange(0, shards.tokens - 8, 4096), 8).sum())

def work():
    shards, workers = Shards(sys.argv[1]), int(sys.argv[2])
    read(shards, 0)  # all is mapped, as it is in the course of a run
    print(list(Workers(lambda item: read(shards, item), workers, 1).results(range(2))))

sys.exit(cli.guarded(work))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the handler is for Linux")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_is_cut_while_it_is_read_is_named(prepared, tmp_path, workers):
    folder = shutil.copytree(prepared.shards["bert"], tmp_path / "shards")
    command = [sys.executable, "-c", READ, str(folder), str(workers)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    assert "a file became shorter while it was read" in done.stderr
    assert f"{folder}/train-00000.bin has 4,096 bytes left" in done.stderr
    assert "memory" not in done.stderr and "Traceback" not in done.stderr
    assert not workers or "of data.workers named it above" in done.stderr


def altered(path):
    with open(path, "r+b") as file:
        file.seek(100)
        byte = file.read(1)[0]
        file.seek(100)
        file.write(bytes([byte ^ 2]))
    os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))


def cut(path):
    os.truncate(path, path.stat().st_size - 2)


def swapped(path):
    shutil.copy(path.with_name("heldout-00000" + path.name[len("train-00000") :]), path)


@pytest.mark.parametrize("change", [altered, cut, swapped, os.remove])
@pytest.mark.parametrize("name", ["train-00000.bin", "train-00000.idx", "train-00000.origin.npy"])
def test_a_file_that_changed_since_it_was_opened_is_named(prepared, tmp_path, change, name):
    folder = shutil.copytree(prepared.shards["bert"], tmp_path / "shards")
    shards = Shards(folder)
    shards.check_unchanged()
    change(folder / name)
    with pytest.raises(ShardError, match=name):
        shards.check_unchanged()


def test_a_file_that_was_copied_again_is_the_same(prepared, tmp_path):
    folder = shutil.copytree(prepared.shards["bert"], tmp_path / "shards")
    shards = Shards(folder)
    shutil.copy(prepared.shards["bert"] / "train-00000.bin", tmp_path / "again")
    os.replace(tmp_path / "again", folder / "train-00000.bin")
    shards.check_unchanged()
    os.utime(folder / "train-00000.idx")
    shards.check_unchanged()


def test_no_checkpoint_is_published_of_steps_that_may_have_read_changed_text(prepared, tmp_path, monkeypatch):
    from pretrain.training.saving import Writer

    folder = shutil.copytree(prepared.shards["bert"], tmp_path / "shards")
    values = run_values(prepared, tmp_path / "run", data={"shards": str(folder)}, checkpoint={"every_steps": 4})
    begin = Writer.begin

    def begun(*arguments):
        begin(*arguments)
        altered(folder / "train-00000.bin")  # after the copy for the first checkpoint, while it is written

    monkeypatch.setattr(Writer, "begin", begun)
    with pytest.raises(ShardError, match=r"train-00000\.bin is not what it was when it was opened"):
        pretrain(build(RunConfig, values, "test"))
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step_00000004"]
