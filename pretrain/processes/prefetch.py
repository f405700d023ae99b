"""Results computed ahead by forked processes, in order.

Every process has a pipe of its own and shares no lock. So the death of a process (the kernel may kill it when memory
runs out) blocks neither the other processes nor the rank: its pipe ends, and the rank notices at once. PyTorch's
DataLoader instead raises a RuntimeError from a signal handler, at any line of the rank. In a test with PyTorch 2.7 that
killed a process at eight moments in turn, the DataLoader once waited for ever for its other processes to end.
"""

import os
import pickle
import queue
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, Pipe
from typing import Generic, TypeVar

from pretrain.errors import PretrainError, ShardError
from pretrain.processes import bus_error
from pretrain.processes.signals import SIGNALS

T = TypeVar("T")


def ahead(work: Callable[[int], T], items: range, workers: int, depth: int) -> Iterator[T]:
    """Yield `work(item)` for each of `items`, in order. Each of `workers` processes holds up to `depth` results.

    Results are pickled. An exception in `work` is raised here. Raises PretrainError if a process dies.
    """
    crew: list[_Worker[T]] = []
    try:
        for number in range(min(workers, len(items))):
            crew.append(_Worker(work, items[number::workers], depth, crew))
        for turn in range(len(items)):
            yield crew[turn % workers].take()
    finally:
        for worker in crew:
            worker.end()


class _Worker(Generic[T]):
    """One forked process and the reading end of its pipe."""

    def __init__(self, work: Callable[[int], T], items: range, depth: int, earlier: list["_Worker"]):
        self.results, theirs = Pipe(duplex=False)
        self.pid = os.fork()
        if not self.pid:
            try:
                # An earlier worker notices that the rank is gone only if no process has the reading end of its pipe.
                for connection in (self.results, *(worker.results for worker in earlier)):
                    connection.close()
                # A signal to the process group reaches workers too. A worker that died of it would end the rank before
                # the rank has saved.
                for number in SIGNALS:
                    signal.signal(number, signal.SIG_IGN)
                _compute(theirs, work, items, depth)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)  # never return into the rank's code
        theirs.close()

    def take(self) -> T:
        """The next result. Raises the exception of `work`, or the error for a dead process."""
        try:
            done, result = pickle.loads(self.results.recv_bytes())
        except (EOFError, OSError):  # between two results, or in the middle of one
            raise self._death() from None
        if not done:
            raise result
        return result

    def _death(self) -> PretrainError:
        """The error for a process that ended before its work was done."""
        pid, code = self.pid, self.end()
        if code == bus_error.STATUS:  # the process has printed the message
            return ShardError(f"a token file can no longer be read (process {pid} of data.workers named it above)")
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit status {code}"
        reason = (
            "was it out of memory? Fewer workers need less."
            if code == -signal.SIGKILL
            else "is a reason printed above?"
        )
        what = f"a process of data.workers died: process {pid} {how}; {reason}"
        return PretrainError(f"{what} The run continues from its newest checkpoint")

    def end(self) -> int:
        """Stop the process, which has no state to save. Returns its exit status, or minus the signal that ended it."""
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
    """In the forked process: put results into a queue of `depth`. A thread sends them from there."""
    result: tuple[bool, object]
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
    """The thread of `_compute`: send each result to the rank, until None."""
    while (result := finished.get()) is not None:
        try:
            pipe.send_bytes(result)
        except OSError:  # the rank is gone, or needs no more results
            os._exit(0)
