"""Results computed ahead by forked processes: in order, with their errors, and no process outlives its use."""

import os
import signal
import time
from pathlib import Path

import pytest

from pretrain.errors import PretrainError
from pretrain.processes.prefetch import Workers


def children() -> list[int]:
    """The process ids of the children of this process."""
    return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


@pytest.mark.parametrize("workers", [0, 1, 3, 20])
def test_results_come_in_order_and_processes_end(workers):
    before = set(children())
    assert list(Workers(lambda item: item * 2, workers, depth=1).results(range(10))) == list(range(0, 20, 2))
    assert list(Workers(lambda item: item, workers, depth=1).results(range(0))) == []
    stopped = Workers(lambda item: bytes(1 << 20), workers, depth=2).results(range(1000))
    next(stopped)
    stopped.close()
    assert set(children()) <= before


def test_what_a_worker_raises_is_raised_in_the_rank():
    found = Workers(lambda item: 12 // (3 - item), count=2, depth=3).results(range(9))
    assert [next(found) for _ in range(3)] == [4, 6, 12]
    with pytest.raises(ZeroDivisionError) as error:
        next(found)
    assert error.value.__notes__ == ["in a process of data.workers, at micro-batch 3"]


def test_a_worker_that_is_killed_in_the_middle_of_a_result_is_an_error():
    before = set(children())
    found = Workers(lambda item: bytes(4 << 20), count=1, depth=1).results(range(9))  # a pipe holds less than 1 MB
    next(found)
    time.sleep(0.2)
    os.kill(*set(children()) - before, signal.SIGKILL)
    with pytest.raises(PretrainError, match=r"a process of data\.workers died: process \d+ by SIGKILL"):
        list(found)


def test_a_worker_that_cannot_send_its_result_says_why(capfd):
    """The error asks for a reason above: a result that cannot be pickled is such a reason."""
    with pytest.raises(PretrainError, match="with exit status 1; is a reason printed above"):
        list(Workers(lambda item: lambda: item, count=2, depth=1).results(range(3)))
    assert "pickle" in capfd.readouterr().err


def test_processes_that_wait_for_their_items_end_with_the_block_or_say_that_they_died():
    before = set(children())
    with Workers(lambda item: item, count=3, depth=1):
        assert len(set(children()) - before) == 3
    assert set(children()) <= before
    with Workers(lambda item: item, count=2, depth=1) as workers:
        for pid in set(children()) - before:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
        with pytest.raises(PretrainError, match=r"a process of data\.workers died: process \d+ by SIGKILL"):
            next(workers.results(range(4)))
    assert set(children()) <= before
