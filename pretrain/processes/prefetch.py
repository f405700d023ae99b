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
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, Pipe
from typing import Generic, TypeVar

from pretrain.errors import PretrainError, ShardError
from pretrain.processes import bus_error
from pretrain.processes.signals import SIGNALS

T = TypeVar("T")


class Workers(Generic[T]):
    """Processes that compute `work(item)` ahead. They are forked now, and wait until `results` says for which items.

    Fork them before this process starts threads: another thread may hold a lock at that moment, for which the child
    would wait without end. Each of `count` processes holds up to `depth` results. With a `count` of 0 this process
    computes each result when it is asked for. In a `with` block the processes end with the block.
    """

    def __init__(self, work: Callable[[int], T], count: int, depth: int):
        self._work = work
        self._workers: list[_Worker[T]] = []
        for _ in range(count):
            self._workers.append(_Worker(work, depth, self._workers))

    def results(self, items: range) -> Iterator[T]:
        """Yield `work(item)` for each of `items`, in order. The processes serve one call, and end with it.

        Results are pickled. An exception in `work` is raised here. Raises PretrainError if a process dies.
        """
        if not self._workers:
            yield from map(self._work, items)
            return
        try:
            for number, worker in enumerate(self._workers):
                worker.begin(items[number :: len(self._workers)])
            for turn in range(len(items)):
                yield self._workers[turn % len(self._workers)].take()
        finally:
            self.end()

    def end(self) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.end()

    def __enter__(self) -> "Workers[T]":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


class _Worker(Generic[T]):
    """One forked process and this end of the pipe to it."""

    def __init__(self, work: Callable[[int], T], depth: int, earlier: Sequence["_Worker"]):
        self.pipe, theirs = Pipe()
        self.pid = os.fork()
        if not self.pid:
            try:
                # An earlier worker notices that the rank is gone only if no process has this end of its pipe.
                for connection in (self.pipe, *(worker.pipe for worker in earlier)):
                    connection.close()
                # A signal to the process group reaches workers too. A worker that died of it would end the rank before
                # the rank has saved.
                for number in SIGNALS:
                    signal.signal(number, signal.SIG_IGN)
                _compute(theirs, work, depth)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)  # never return into the rank's code
        theirs.close()

    def begin(self, items: range) -> None:
        """Let the process compute the results of `items`. Raises the error for a dead process."""
        try:
            self.pipe.send(items)
        except OSError:
            raise self._death() from None

    def take(self) -> T:
        """The next result. Raises the exception of `work`, or the error for a dead process."""
        try:
            done, result = pickle.loads(self.pipe.recv_bytes())
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
        self.pipe.close()
        if not self.pid:
            return 0
        pid, self.pid = self.pid, 0
        over, status = os.waitpid(pid, os.WNOHANG)
        if not over:
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
        return os.waitstatus_to_exitcode(status)


def _compute(pipe: Connection, work: Callable[[int], T], depth: int) -> None:
    """In the forked process: wait for the items, and put their results into a queue of `depth`. A thread sends them."""
    result: tuple[bool, object]
    try:
        items: range = pipe.recv()
    except (EOFError, OSError):  # the rank is gone, or needs no results
        os._exit(0)
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
