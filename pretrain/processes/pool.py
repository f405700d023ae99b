"""Work on the processes of this machine or of a cluster, with the results in the order of the items."""

import atexit
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait
from typing import TypeVar

from pretrain.errors import PretrainError, UserError
from pretrain.processes.bus_error import explain_bus_errors
from pretrain.processes.memory import keep_freed

Item = TypeVar("Item")
Result = TypeVar("Result")
AHEAD = 2  # items in progress for each worker: bounds memory, and hides the time that making the next item takes
CONNECT_S = 30  # the longest wait for a scheduler
WATCH_S = 10.0  # the time between two checks of a cluster's workers


def ordered(
    work: Callable[[Item], Result], items: Iterable[Item], workers: int, executor: Executor | None = None
) -> Iterator[Result]:
    """Yield `work(item)` for each item, in the order of the items.

    With one worker, this process does the work. With more, it starts `workers` processes and only collects results. If
    you pass an `executor` (from `processes` or `cluster`), its workers do the work, and they begin before the first
    result is asked for. `work` and the items are pickled: pass a function of a module, or a partial of one.

    An exception in `work` is raised here, in the item's turn. Raises PretrainError when a process dies. At most
    AHEAD · workers items and results are held in memory.
    """
    keep_freed()
    if executor is not None:
        window = _Window(executor, work, items, AHEAD * workers)
        window.fill()
        return window.results()
    return map(work, items) if workers == 1 else _by_new_processes(work, items, workers)


def noted(items: Iterable[Item], note: Callable[[Item], object], notes: deque) -> Iterator[Item]:
    """Yield the items, and append `note(item)` to `notes` for each.

    `ordered` yields its results in the same order, so its caller can take a note for each result.
    """
    for item in items:
        notes.append(note(item))
        yield item


def _by_new_processes(work: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    with processes(workers) as executor:
        yield from _Window(executor, work, items, AHEAD * workers).results()


class _Window:
    """Up to `size` items that are in progress, or finished and waiting for their turn."""

    def __init__(self, executor: Executor, work: Callable, items: Iterable, size: int):
        self._executor, self._work, self._items, self._size = executor, work, iter(items), size
        self._futures: deque[Future] = deque()

    def fill(self) -> None:
        """Submit items until the window is full or there are no more."""
        while len(self._futures) < self._size:
            try:
                item = next(self._items)
            except StopIteration:
                return
            except Exception as error:  # raised in its turn, after the results of the items before it
                self._items = iter(())
                failed: Future = Future()
                failed.set_exception(error)
                self._futures.append(failed)
                return
            self._futures.append(_submitted(self._executor, self._work, item))

    def results(self) -> Iterator:
        """Yield the results in order. Raises PretrainError if a worker process dies."""
        futures = self._futures
        try:
            self.fill()
            while futures:
                result = futures.popleft().result()
                self.fill()
                yield result
        except BrokenProcessPool:
            reason = "if no reason is printed above, was it out of memory? Take fewer workers"
            raise PretrainError(f"a worker process died: {reason}") from None
        finally:
            # Our own pool is killed, and its thread then sets an exception on every future. A cancelled future would
            # end that thread with a traceback.
            if not isinstance(self._executor, ProcessPoolExecutor):
                for future in futures:
                    future.cancel()


def _submitted(executor: Executor, work: Callable, item: object) -> Future:
    # The pool starts its processes here, and they inherit the mask. So Ctrl-C, which the terminal sends to all
    # processes, never interrupts a worker. This process receives it when the mask is lifted, and ends the workers.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return executor.submit(work, item)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def processes(workers: int) -> Iterator[Executor]:
    """A pool of `workers` new processes of this machine. They are killed if the block ends with an exception."""
    # Not forked: a progress bar or a tokenizer may have started threads here, and a fork would copy their locks only.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_begin)
    try:
        yield pool
    except BaseException:
        _kill(pool)
        raise
    pool.shutdown()  # wait for the processes, so that the system adds their time to this process


def _kill(pool: ProcessPoolExecutor) -> None:
    """Kill the processes at once. The next run removes their temporary files."""
    results = pool._result_queue
    for process in list((pool._processes or {}).values()):
        process.kill()
    if results is not None:
        # A process that is killed while it sends a result leaves half of it in the pipe. The pool's thread would wait
        # for the other half as long as any process, also this one, holds the writing end.
        results._writer.close()  # type: ignore[attr-defined]  # typeshed omits private attributes
    pool.shutdown(cancel_futures=True)


def _begin() -> None:
    """Prepare a new worker process. It ends when the process that started it is gone.

    The workers of a pool hold the ends of each other's pipes. After a kill -9 of their parent none of them would ever
    read an end of file, and all of them would wait for work for ever.
    """
    keep_freed()
    explain_bus_errors()
    atexit.register(os._exit, 0)  # skip the end of every module, which takes 60 ms
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "only a worker process calls this"
    wait([parent.sentinel])
    os._exit(1)


@contextmanager
def cluster(scheduler: str) -> Iterator[tuple[Executor, int]]:
    """The executor of a running Dask cluster, and the number of its workers' threads. Raises UserError if it has none.

    If a worker is lost, Dask gives its task to another worker. So a task may run twice.
    """
    try:
        import distributed
    except ImportError:
        raise UserError("a cluster needs Dask's package distributed", "pip install '.[dask]'") from None
    try:
        client = distributed.Client(scheduler, timeout=CONNECT_S)
    except (OSError, ValueError) as error:  # TimeoutError is an OSError
        what = f"no Dask scheduler answers at {scheduler}"
        raise UserError(what, str(error), "start one: dask scheduler, and dask worker --nthreads 1 beside it") from None
    with client:
        workers = sum(client.nthreads().values())
        if not workers:
            remedy = f"start some: dask worker {scheduler} --nthreads 1"
            raise UserError(f"the Dask cluster at {scheduler} has no worker", remedy)
        try:
            with _watched(client.nthreads, scheduler):
                yield client.get_executor(pure=False), workers
        except (distributed.scheduler.KilledWorker, CancelledError) as error:
            raise PretrainError(f"the Dask cluster at {scheduler} lost its workers: {error}") from None


@contextmanager
def _watched(workers: Callable[[], dict], scheduler: str) -> Iterator[None]:
    """Print a message when a cluster has no worker left: Dask itself waits for new workers silently."""
    over = threading.Event()

    def watch() -> None:
        had = True
        while not over.wait(WATCH_S):
            try:
                has = bool(workers())
            except Exception:  # if the scheduler is gone, waiting for results fails with a message
                continue
            if had and not has:
                print(f"the Dask cluster at {scheduler} has no worker left: waiting for another", file=sys.stderr)
            had = has

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        over.set()
