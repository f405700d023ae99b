"""Work over processes, of this machine or a cluster: results in the order of the items, however many there are."""

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

Item, Result = TypeVar("Item"), TypeVar("Result")
AHEAD = 2  # items in flight for each worker: bounds memory, and hides the time it takes to make the next
CONNECT_S = 30  # to a scheduler
WATCH_S = 10.0  # between two looks at the workers of a cluster


def ordered(
    work: Callable[[Item], Result], items: Iterable[Item], workers: int, executor: Executor | None = None
) -> Iterator[Result]:
    """`work(item)` of each item, in the order of the items.

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
    """The items; `note(item)` is put into `notes` when an item is taken: their results come in the same order."""
    for item in items:
        notes.append(note(item))
        yield item


def _by_new_processes(work: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    with processes(workers) as executor:
        yield from _Window(executor, work, items, AHEAD * workers).results()


class _Window:
    """Up to `size` items that are being worked on, or whose results wait for their turn."""

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
        futures = self._futures
        try:
            self.fill()
            while futures:
                result = futures.popleft().result()
                self.fill()
                yield result
        except BrokenProcessPool:
            reason = "if it did not say why, was it out of memory? Take fewer workers"
            raise PretrainError(f"a worker process died: {reason}") from None
        finally:
            # A pool of ours is killed, and its thread then fails all its futures: one that was cancelled meanwhile
            # would end that thread with a traceback.
            if not isinstance(self._executor, ProcessPoolExecutor):
                for future in futures:
                    future.cancel()


def _submitted(executor: Executor, work: Callable, item: object) -> Future:
    # A pool starts its processes here, and they inherit the mask: Ctrl-C, which the terminal sends to all of them,
    # never interrupts a worker. This process hears it when the mask is lifted, and ends the workers.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return executor.submit(work, item)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def processes(workers: int) -> Iterator[Executor]:
    """A pool of `workers` new processes of this machine. They are killed if the block ends with an exception."""
    # Not forked: a progress bar or a tokenizer may have started threads here, which a fork would leave half-alive.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_begin)
    try:
        yield pool
    except BaseException:
        _kill(pool)
        raise
    pool.shutdown()  # waits for the processes, so that the system counts their time as ours


def _kill(pool: ProcessPoolExecutor) -> None:
    """End the processes at once, whatever they are doing. The next run removes the temporary files that they leave."""
    results = pool._result_queue
    for process in list((pool._processes or {}).values()):
        process.kill()
    if results is not None:
        # A process that is killed while it sends a result leaves half of it in the pipe. The pool's thread would wait
        # for the other half as long as anybody, this process too, holds the end for writing.
        results._writer.close()
    pool.shutdown(cancel_futures=True)


def _begin() -> None:
    """Prepare a new worker process, which ends when the process that started it is gone.

    The pool's workers hold each other's ends of its pipes. After a kill -9 of their parent none of them would ever read
    an end of file, and all of them would wait for work for ever.
    """
    keep_freed()
    explain_bus_errors()
    atexit.register(os._exit, 0)  # not to take every module down, which is 60 ms
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


@contextmanager
def cluster(scheduler: str) -> Iterator[tuple[Executor, int]]:
    """The workers of a running Dask cluster, and how many of them there are. Raises UserError if there are none.

    A task whose worker is lost is given to another one, so that its work must bear to be done twice.
    """
    try:
        import distributed
    except ImportError:
        raise UserError("a cluster needs Dask", "not installed: distributed", "pip install '.[dask]'") from None
    try:
        client = distributed.Client(scheduler, timeout=CONNECT_S)
    except (OSError, ValueError) as error:  # TimeoutError is an OSError
        what = f"no Dask scheduler answers at {scheduler}"
        raise UserError(what, str(error), "start one: dask scheduler, and dask worker --nthreads 1 beside it") from None
    with client:
        workers = sum(client.nthreads().values())
        if not workers:
            raise UserError(f"the Dask cluster at {scheduler} has no worker", "start some: dask worker --nthreads 1")
        try:
            with _watched(client.nthreads, scheduler):
                yield client.get_executor(pure=False), workers
        except (distributed.scheduler.KilledWorker, CancelledError) as error:
            raise PretrainError(f"the Dask cluster at {scheduler} lost its workers: {error}") from None


@contextmanager
def _watched(workers: Callable[[], dict], scheduler: str) -> Iterator[None]:
    """Say it when a cluster has no worker any more: Dask waits for others without a word."""
    over = threading.Event()

    def watch() -> None:
        had = True
        while not over.wait(WATCH_S):
            try:
                has = bool(workers())
            except Exception:  # if the scheduler is gone, who waits for results is told
                continue
            if had and not has:
                print(f"the Dask cluster at {scheduler} has no worker left: waiting for another", file=sys.stderr)
            had = has

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        over.set()
