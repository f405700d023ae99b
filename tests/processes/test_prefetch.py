"""Results computed ahead by forked processes: in order, with their errors, and no process outlives its use."""

import os
import signal
import time
from pathlib import Path

import pytest

from pretrain.errors import PretrainError
from pretrain.processes.prefetch import ahead


def children() -> list[int]:
    """The process ids of the children of this process."""
    return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


@pytest.mark.parametrize("workers", [1, 3, 20])
def test_results_come_in_order_and_processes_end(workers):
    before = set(children())
    assert list(ahead(lambda item: item * 2, range(10), workers, depth=1)) == list(range(0, 20, 2))
    assert list(ahead(lambda item: item, range(0), workers, depth=1)) == []
    stopped = ahead(lambda item: bytes(1 << 20), range(1000), workers, depth=2)
    next(stopped)
    stopped.close()
    assert set(children()) <= before


def test_what_a_worker_raises_is_raised_in_the_rank():
    found = ahead(lambda item: 12 // (3 - item), range(9), workers=2, depth=3)
    assert [next(found) for _ in range(3)] == [4, 6, 12]
    with pytest.raises(ZeroDivisionError) as error:
        next(found)
    assert error.value.__notes__ == ["in a process of data.workers, at micro-batch 3"]


def test_a_worker_that_is_killed_in_the_middle_of_a_result_is_an_error():
    before = set(children())
    found = ahead(lambda item: bytes(4 << 20), range(9), workers=1, depth=1)  # a pipe holds 64 kB
    next(found)
    time.sleep(0.2)
    os.kill(*set(children()) - before, signal.SIGKILL)
    with pytest.raises(PretrainError, match=r"a process of data\.workers died: process \d+ by SIGKILL"):
        list(found)


def test_a_worker_that_cannot_send_its_result_says_why(capfd):
    """The error asks for a reason above: a result that cannot be pickled is such a reason."""
    with pytest.raises(PretrainError, match="with exit status 1; is a reason printed above"):
        list(ahead(lambda item: lambda: item, range(3), workers=2, depth=1))
    assert "pickle" in capfd.readouterr().err
