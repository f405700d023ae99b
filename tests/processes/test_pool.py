"""Results of several processes: in order, with their errors, and no process outlives its use."""

import multiprocessing
import os
import platform
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from pretrain.errors import CorpusError, PretrainError
from pretrain.processes.pool import AHEAD, ordered
from tests.conftest import ROOT
from tests.helpers.processes import started


def square(number: int) -> int:
    time.sleep(0.02 * (number % 3 == 0))  # later items overtake earlier ones
    return number * number


def count_and_last(data: bytes) -> tuple[int, bytes]:
    return len(data), data[-1:]


def late(number: int) -> int:
    time.sleep(0.3 * (number == 0))
    return number


begun: list[str] = []


def refuse(number: int, bad: int) -> int:
    if number == bad:
        raise CorpusError(f"{number} is bad")
    return number


def die(how: int, first: Path, number: int) -> int:
    """Kill the first process that calls this function."""
    time.sleep(0.02)
    with suppress(FileExistsError):
        first.touch(exist_ok=False)
        os.kill(os.getpid(), how)
    return number


def place(met: Path, workers: int, number: int) -> int:
    """The id of the process. No call returns before `workers` processes have called."""
    (met / str(os.getpid())).touch()
    deadline = time.monotonic() + 60
    while len(list(met.iterdir())) < workers and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(0.01)
    return os.getpid()


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_results_come_in_the_order_of_the_items(workers):
    assert list(ordered(square, range(20), workers)) == [n * n for n in range(20)]


def test_no_items_give_no_results():
    assert list(ordered(square, [], 2)) == []


def test_all_workers_work(tmp_path):
    done = set(ordered(partial(place, tmp_path, 2), range(20), 2))
    assert len(done) == 2 and os.getpid() not in done


def _blocked(number: int) -> tuple[int, bool]:
    time.sleep(0.05)
    return os.getpid(), signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_ctrl_c_is_kept_from_workers_before_they_run_a_line_of_python():
    """The process that started them receives Ctrl-C itself and ends them."""
    assert all(blocked for _, blocked in ordered(_blocked, range(4), 2))
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_error_in_order_is_raised_whether_an_item_or_its_work_raises_it(workers):
    def items():
        yield from range(4)
        raise CorpusError("the file ends here")

    results = ordered(partial(refuse, bad=2), items(), workers)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(CorpusError, match="2 is bad"):
        next(results)
    results = ordered(partial(refuse, bad=9), items(), workers)
    assert [next(results) for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(CorpusError, match="the file ends here"):
        next(results)


@pytest.mark.parametrize("workers", [2, 3])
def test_items_are_made_only_a_little_ahead(workers):
    made = []

    def items():
        for number in range(100):
            made.append(number)
            yield number

    results = ordered(late, items(), workers)
    for number in range(100):
        assert next(results) == number
        assert len(made) - number - 1 <= AHEAD * workers
    assert next(results, None) is None


def test_work_for_an_executor_begins_before_its_results_are_asked_for():
    with ThreadPoolExecutor(1) as executor:
        first, second = (ordered(begun.append, [name], 1, executor) for name in ("first", "second"))
        assert list(second) == [None] and begun == ["first", "second"]
        assert list(first) == [None]


def test_large_items_arrive_whole_and_what_is_not_wanted_ends():
    items = [bytes([n]) * (size * 1_000_003) for n, size in enumerate((9, 0, 1, 12, 5))]
    assert list(ordered(count_and_last, items, 2)) == [(len(item), item[-1:]) for item in items]
    results = ordered(count_and_last, iter(lambda: b"x" * 1_000_003, None), 2)
    assert next(results) == (1_000_003, b"x")
    results.close()
    assert not multiprocessing.active_children()


def test_any_executor_does_the_work_and_is_left_to_whoever_made_it():
    with ThreadPoolExecutor(3) as executor:
        assert list(ordered(square, range(20), 3, executor)) == [n * n for n in range(20)]
        results = ordered(partial(refuse, bad=2), range(100), 3, executor)
        assert [next(results), next(results)] == [0, 1]
        with pytest.raises(CorpusError, match="2 is bad"):
            next(results)
        assert executor.submit(square, 5).result() == 25


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_that_dies_is_said_to_have_and_the_others_end(tmp_path, how):
    with pytest.raises(PretrainError, match="a worker process died"):
        list(ordered(partial(die, how, tmp_path / "first"), range(10**9), 3))
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("work", ["time.sleep(3600)", "return bytes(1 << 24)"])
def test_ctrl_c_waits_neither_for_work_nor_for_the_other_half_of_a_large_result(tmp_path, work):
    (tmp_path / "slow.py").write_text(
        "import os, time\n"
        "from pretrain.config import Config\n"
        "from pretrain.processes.pool import ordered\n"
        "def work(number):\n"
        "    print(os.getpid(), flush=True)\n"
        f"    {work}\n"
        "def run(config):\n"
        "    for _ in ordered(work, range(10**9), 3):\n"
        "        pass\n"
    )
    script, config = tmp_path / "main.py", tmp_path / "config.yaml"
    script.write_text(
        "import signal, sys\n"
        "from pretrain import cli\n"
        "if __name__ == '__main__':\n"
        "    signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell starts background jobs without it
        "    cli.STAGES['clean'] = cli.Stage('slow', 'slow.Config', '')\n"
        f"    sys.exit(cli.main('clean', [{str(config)!r}]))\n"
    )
    config.write_text("{}")
    out, err = tmp_path / "out", tmp_path / "err"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    with (
        open(out, "w") as stdout,
        open(err, "w") as stderr,
        started([sys.executable, script], env=environment, cwd=tmp_path, stdout=stdout, stderr=stderr) as process,
    ):
        deadline = time.monotonic() + 60
        while len(workers := set(out.read_text().split())) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    assert len(workers) == 3 and not any(is_running(int(worker)) for worker in workers)
    assert err.read_text() == "interrupted; no incomplete folder was published\n"


def test_workers_end_when_their_parent_is_killed(tmp_path):
    script, met = tmp_path / "main.py", tmp_path / "met"
    met.mkdir()
    script.write_text(
        f"import sys; sys.path[0] = {str(ROOT)!r}\n"
        "from functools import partial\nfrom pathlib import Path\n"
        "from tests.processes.test_pool import place\nfrom pretrain.processes.pool import ordered\n"
        "if __name__ == '__main__':\n"
        f"    for pid in ordered(partial(place, Path({str(met)!r}), 2), range(10**9), 2):\n"
        "        print(pid, flush=True)\n"
    )
    with started([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as parent:
        workers = {int(parent.stdout.readline()) for _ in range(20)}
        parent.kill()
    assert len(workers) == 2
    deadline = time.monotonic() + 10
    while any(map(is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_running, workers))


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"  # a zombie is dead
    except FileNotFoundError:
        return False


def _faults(_: int) -> tuple[int, int]:
    """The id of the process, and the page faults of 100 rounds that each make three arrays of 2 MB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(100):
        [np.ones(1 << 18) for _ in range(3)]
    return os.getpid(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is set where it is glibc's")
def test_workers_keep_the_memory_that_their_arrays_leave():
    pages = 3 * (1 << 21) // os.sysconf("SC_PAGE_SIZE")
    found = [faults for _, faults in ordered(_faults, range(3), workers=2)]
    assert 0 < max(found) < 3 * pages
