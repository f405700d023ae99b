"""Work over processes, of this machine or a cluster: results in the order of the items, however many there are."""

import atexit
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from typing import TypeVar

from pretrain.errors import PretrainError, UserError
from pretrain.processes.bus_error import explain_bus_errors
from pretrain.processes.memory import keep_freed

Item, Result = TypeVar("Item"), TypeVar("Result")
AHEAD = 2  # items in flight for each worker: bounds memory, and hides the time it takes to make the next
OWN = 8  # results of this process that wait for those of others: what it makes while these start
FILE_BYTES = 8 << 20  # of a file in memory, that it keeps for the item that is next put there
CONNECT_S = 30  # to a scheduler
WATCH_S = 10.0  # between two looks at the workers of a cluster
LEAVE = signal.SIGUSR1  # tells a worker to leave what it is at; SIGTERM ends it, as the pool expects when one has died


def ordered(
    work: Callable[[Item], Result], items: Iterable[Item], workers: int, executor: Executor | None = None
) -> Iterator[Result]:
    """`work(item)` of each item, in order; by `workers` processes, of which this is one.

    The others are new, or those of `executor`, whoever provides it: that is all that is asked of a cluster, whose
    `workers` do not count this process. These begin at once, before the first result is asked for. `work` and the items
    are pickled: a function of a module, or a partial of one. What it raises is raised here. Raises PretrainError when a
    process dies. Memory: at most AHEAD · workers items and results, and OWN results.
    """
    keep_freed()
    if executor is not None:
        return _begun(executor, work, items, AHEAD * workers)
    return map(work, items) if workers == 1 else _by_new_processes(work, items, workers)


def noted(items: Iterable[Item], note: Callable[[Item], object], notes: deque) -> Iterator[Item]:
    """The items; `note(item)` is put into `notes` when an item is taken: their results come in the same order."""
    for item in items:
        notes.append(note(item))
        yield item


def _by_new_processes(work: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    with processes(workers) as executor:
        yield from _begun(executor, work, items, AHEAD * workers)


def _begun(executor: Executor, work: Callable[[Item], Result], items: Iterable[Item], ahead: int) -> Iterator[Result]:
    flow = _Flow(executor, work, items, ahead)
    flow.fill()
    return flow.results()


class _Flow:
    """Items on their way, and results that wait for their turn.

    Where this process is one of the workers it takes an item itself whenever all others have theirs and the next one,
    and it would only wait.
    """

    def __init__(self, executor: Executor, work: Callable, items: Iterable, ahead: int):
        self._executor, self._work, self._items = executor, work, iter(items)
        self._helps = isinstance(executor, _Pool)
        self._ahead = ahead + OWN * self._helps
        self._flying: deque[Future] = deque()

    def fill(self) -> None:
        """Give the others what they may have."""
        while len(self._flying) < self._ahead and not (self._helps and self._executor.has_enough()):
            if not self._take(partial(self._executor.submit, self._work)):
                break

    def results(self) -> Iterator:
        flying = self._flying
        try:
            while True:
                self.fill()
                waits = self._helps and not (flying and flying[0].done()) and len(flying) < self._ahead
                if waits and self._take(self._done_here):
                    continue
                if not flying:
                    return
                result = flying.popleft().result()
                self.fill()
                yield result
        except _Unwanted:
            raise PretrainError(f"a worker process was told to leave its work ({LEAVE.name})") from None
        except BrokenProcessPool:
            flying.clear()  # the pool is failing them: to cancel them meanwhile would end its thread with a traceback
            reason = "if it did not say why, was it out of memory? Take fewer workers"
            raise PretrainError(f"a worker process died: {reason}") from None
        finally:
            for future in flying:
                future.cancel()

    def _take(self, given: Callable[[object], Future]) -> bool:
        """Whether there was another item. What making one raises comes in its turn, as it does with one worker."""
        try:
            for item in self._items:
                self._flying.append(given(item))
                return True
        except Exception as error:
            self._items = iter(())
            self._flying.append(_failed(error))
            return True
        return False

    def _done_here(self, item: object) -> Future:
        done: Future = Future()
        try:
            done.set_result(self._work(item))
        except Exception as error:
            done.set_exception(error)
        return done


def _failed(error: Exception) -> Future:
    failed: Future = Future()
    failed.set_exception(error)
    return failed


@contextmanager
def processes(workers: int) -> Iterator[Executor]:
    """`workers` processes of this machine, this one among them: `ordered` has it work when it would wait."""
    # Not forked: a progress bar or a tokenizer may have started threads here, which a fork would leave half-alive.
    pool = _Pool(workers - 1, multiprocessing.get_context("spawn"), initializer=_begin)
    try:
        yield pool
    except BaseException:
        pool.end()
        raise
    pool.shutdown()  # their time is then part of ours, as the system counts it


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


class _Pool(ProcessPoolExecutor):
    """Workers that find an item in memory which they share with this process, and that can be told to stop.

    Through the pool's pipe 6 MB of text take 25 ms of two busy cores, an eighth of the work on them: three copies, and
    a worker that waits for every 64 kB. In a file in memory they take 2, if it is used again; a new one takes 8, for
    the system finds and zeroes its pages. So the files of all items under way are kept, each with up to FILE_BYTES.
    """

    def __init__(self, workers: int, context: BaseContext, initializer: Callable[[], None]):
        super().__init__(workers, context, initializer)
        self._most, self._given = AHEAD * workers, set()
        self._files: list[int] = []  # in memory, free

    def has_enough(self) -> bool:
        """Whether every process has an item and the next one."""
        self._given = {future for future in self._given if not future.done()}
        return len(self._given) >= self._most

    def submit(self, work: Callable, item: object) -> Future:
        # A process that this starts inherits the mask: a signal would end it before it knows what to do about one.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, LEAVE})
        try:
            future = self._submit(work, item)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._given.add(future)
        return future

    def _submit(self, work: Callable, item: object) -> Future:
        if not os.path.isdir("/proc/self/fd"):
            return super().submit(_wanted, work, item)
        try:
            shared = self._files.pop() if self._files else os.memfd_create("item")
        except (AttributeError, OSError):  # not Linux, or too many files are open
            return super().submit(_wanted, work, item)
        try:
            with open(shared, "wb", closefd=False) as file:
                file.seek(0)
                pickle.dump(item, file, pickle.HIGHEST_PROTOCOL)
            future = super().submit(_on_shared, work, f"/proc/{os.getpid()}/fd/{shared}")
        except BaseException:
            os.close(shared)
            raise
        future.add_done_callback(lambda _: self._files.append(shared))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        super().shutdown(wait, cancel_futures=cancel_futures)
        while self._files:
            os.close(self._files.pop())

    def end(self) -> None:
        """After Ctrl-C or an error: have workers leave what they are at, and wait until they have."""
        for process in list((self._processes or {}).values()):
            with suppress(ProcessLookupError):
                os.kill(process.pid, LEAVE)
        self.shutdown(cancel_futures=True)


def _on_shared(work: Callable, path: str) -> object:
    with open(path, "r+b") as file:
        item = pickle.load(file)
        if file.tell() > FILE_BYTES:
            file.truncate(0)  # its memory is free while the work is done
    return _wanted(work, item)


class _Unwanted(BaseException):
    """Raised in work that is to be left, which unwinds it: no half-written file stays behind."""


class _Worker:
    """What this process is at, where it is a worker."""

    at_work = told_to_leave = False


def _wanted(work: Callable, item: object) -> object:
    """`work(item)`, unless this process is told to leave it: not while it hands over a result, which must be whole."""
    try:
        _Worker.at_work = True
        if _Worker.told_to_leave:
            raise _Unwanted
        return work(item)
    finally:
        _Worker.at_work = False


def _leave(*_: object) -> None:
    _Worker.told_to_leave = True
    if _Worker.at_work:
        raise _Unwanted


def _begin() -> None:
    """A worker lives no longer than who started it, and leaves Ctrl-C to that process.

    The pool's workers hold each other's ends of its pipes: after a kill -9 of their parent none of them ever reads an
    end of file, and all of them wait for work for ever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(LEAVE, _leave)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {LEAVE})
    keep_freed()
    explain_bus_errors()
    atexit.register(os._exit, 0)  # not to take every module down, which is 60 ms
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
