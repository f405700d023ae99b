"""Progress of long work: finished share, remaining time, and the time and memory of a stage."""

import re
import subprocess
import sys

import pytest

from pretrain.display import progress as module
from pretrain.display.progress import closing_line, progress
from tests.conftest import ROOT


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the test advances, so that the numbers of the lines can be checked."""

    class Clock:
        now = 0.0

        def monotonic(self) -> float:
            return self.now

    found = Clock()
    monkeypatch.setattr(module, "time", found)
    return found


def test_lines_say_the_share_of_the_bytes_that_are_read_and_the_time_that_is_left(clock, capsys):
    with progress("cleaning", "documents", reads=1000) as advance:
        for seconds, documents, read in ((5, 10, 100), (5, 10, 150), (10, 5, 250), (200, 1, 100), (10, 3, 400)):
            clock.now += seconds
            advance(documents, read=read)
    assert capsys.readouterr().err.splitlines() == [
        "cleaning: 20 documents, 25%, 10 s, eta 30 s",
        "cleaning: 25 documents, 50%, 20 s, eta 20 s",
        "cleaning: 26 documents, 60%, 220 s, eta 800 s",  # by the recent rate
        "cleaning: 29 documents, 100%, 230 s",
        "cleaning: 29 documents, 100%, 230 s",
    ]


def test_units_are_counted_where_no_bytes_are_read_and_nothing_is_promised_without_a_total(clock, capsys):
    with progress("writing", "files", 4) as advance:
        clock.now += 10
        advance(1, "loss 1.5")
        advance(3)
    with progress("measuring", "documents") as advance:
        advance(1234)
    assert capsys.readouterr().err.splitlines() == [
        "writing: 1/4 files, 25%, 10 s, eta 30 s, loss 1.5",
        "writing: 4/4 files, 100%, 10 s, loss 1.5",
        "measuring: 1,234 documents, 0 s",
    ]


def test_a_terminal_shows_a_bar_with_the_share_and_the_time_that_is_left():
    code = (
        "import time\nfrom pretrain.display.progress import progress\n"
        "with progress('cleaning', 'documents', reads=1000) as advance:\n"
        "    for _ in range(4):\n        advance(1234, read=200)\n        time.sleep(0.3)\n"
    )
    terminal = f"import pty, sys; sys.exit(pty.spawn([sys.executable, '-c', {code!r}]) >> 8)"
    done = subprocess.run([sys.executable, "-c", terminal], cwd=ROOT, capture_output=True, stdin=subprocess.DEVNULL)
    said = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", done.stdout.decode())
    assert done.returncode == 0 and re.search(r"cleaning ━.* 60%.*3,702 documents.*eta 0:0", said), said


def test_a_stage_ends_with_its_time_and_the_largest_memory_of_any_process():
    code = (
        "import sys, subprocess, time\nfrom pretrain.display.progress import closing_line\n"
        "data = bytearray(300_000_000)\n"
        "subprocess.run([sys.executable, '-c', 'data = bytearray(500_000_000)'])\n"
        "closing_line('clean', time.monotonic() - 2)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    found = re.fullmatch(r"clean: (2\.\d) s, largest memory (0\.3\d) GB, of a worker (0\.5\d) GB\n", done.stderr)
    assert found, done.stderr


def test_every_long_stage_ends_with_that_line():
    for name in ("cleaning/stage", "tokenizer/stage", "shards/stage", "shards/segment", "shards/import_megatron"):
        assert f"{closing_line.__name__}(" in (ROOT / f"pretrain/{name}.py").read_text(encoding="utf-8")
