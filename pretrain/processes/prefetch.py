"""Results computed ahead by forked processes, in order.

Every process has a pipe of its own and shares no lock, so the death of one (the kernel's, when memory runs out) can
block neither the others nor the rank: its pipe ends, which is seen at once, wherever in its work it was. PyTorch's
DataLoader reports such a death as a RuntimeError out of a signal handler, at whatever line the rank is at; killed at
eight moments one after the other, once it never came back from ending the other processes (2.7).
"""

import os
import pickle
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, Pipe
from typing import TypeVar

from pretrain.errors import PretrainError, ShardError
from pretrain.processes import bus_error
from pretrain.processes.signals import SIGNALS

T = TypeVar("T")


def ahead(work: Callable[[int], T], items: range, workers: int, depth: int) -> Iterator[T]:
    """`work(item)` for each of `items`, in order; `workers` processes hold up to `depth` finished results each.

    Results travel pickled. What `work` raises is raised here. Raises PretrainError when a process dies.
    """
    crew: list[_Worker] = []
    try:
        for number in range(min(workers, len(items))):
            crew.append(_Worker(work, items[number::workers], depth, crew))
        for turn in range(len(items)):
            yield crew[turn % workers].take()
    finally:
        for worker in crew:
            worker.end()


class _Worker:
    """One forked process and the reading end of its pipe."""

    def __init__(self, work: Callable[[int], T], items: range, depth: int, earlier: list["_Worker"]):
        self.results, theirs = Pipe(duplex=False)
        self.pid = os.fork()
        if not self.pid:
            try:
                # An end that a sibling keeps open would hide from an earlier worker that the rank is gone.
                for connection in (self.results, *(worker.results for worker in earlier)):
                    connection.close()
                # A signal to the process group reaches workers too; one that died of it would end the rank before it
                # has saved.
                for number in SIGNALS:
                    signal.signal(number, signal.SIG_IGN)
                _compute(theirs, work, items, depth)
            finally:
                os._exit(1)  # never back into the rank's code
        theirs.close()

    def take(self) -> T:
        try:
            done, result = pickle.loads(self.results.recv_bytes())
        except (EOFError, OSError):  # between two results, or in the middle of one
            raise self._death() from None
        if not done:
            raise result
        return result

    def _death(self) -> PretrainError:
        """The error text for a process that ended before its work was done."""
        pid, code = self.pid, self.end()
        if code == bus_error.STATUS:  # it has said so itself
            return ShardError(f"a token file can no longer be read (process {pid} of data.workers named it above)")
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit status {code}"
        reason = (
            "was it out of memory? Fewer workers need less." if code == -signal.SIGKILL else "is it said above why?"
        )
        what = f"a process of data.workers died: process {pid} {how}; {reason}"
        return PretrainError(f"{what} The run continues from its newest checkpoint")

    def end(self) -> int:
        """Stop the process; its exit status, negative: the signal that ended it. It has no state to save."""
        self.results.close()
        if not self.pid:
            return 0
        pid, self.pid = self.pid, 0
        over, status = os.waitpid(pid, os.WNOHANG)
        if not over:
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
        return os.waitstatus_to_exitcode(status)


def _compute(pipe: Connection, work: Callable[[int], T], items: range, depth: int) -> None:
    """In the forked process: results into a queue of `depth`, from which a thread sends them."""
    finished: queue.Queue[bytes | None] = queue.Queue(depth)
    sender = threading.Thread(target=_send, args=(pipe, finished))
    sender.start()
    for item in items:
        try:
            result = (True, work(item))
        except Exception as error:
            error.add_note(f"in a process of data.workers, at micro-batch {item}")
            result = (False, error)
        finished.put(pickle.dumps(result, protocol=5))
        if not result[0]:
            break
    finished.put(None)
    sender.join()
    os._exit(0)


def _send(pipe: Connection, finished: queue.Queue) -> None:
    while (result := finished.get()) is not None:
        try:
            pipe.send_bytes(result)
        except OSError:  # the rank is gone, or wants no more
            os._exit(0)
