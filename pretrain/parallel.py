"""Work over processes: results in the order of the items, whatever the number of workers."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing.connection import wait
from typing import TypeVar

from pretrain.errors import PretrainError

Item, Result = TypeVar("Item"), TypeVar("Result")
AHEAD = 2  # items in flight for each worker: bounds memory, and hides the time it takes to make the next


def ordered(work: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """`work(item)` of each item, in order; in `workers` processes, or in this one when `workers` is 1.

    `work` and the items are pickled: a function of a module, or a partial of one. What it raises is raised here.
    Raises PretrainError when a process dies. Memory: at most AHEAD · workers items and results.
    """
    if workers == 1:
        yield from map(work, items)
        return
    # Not forked: a progress bar or a tokenizer may have started threads here, which a fork would leave half-alive.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_begin) as pool:
        submitted = _submitted(pool, work, items)
        try:
            flying = deque(islice(submitted, AHEAD * workers))
            while flying:
                result = flying.popleft().result()
                flying.extend(islice(submitted, 1))
                yield result
        except BrokenProcessPool:
            raise PretrainError("a worker process died: was it out of memory? Take fewer workers") from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _submitted(pool: ProcessPoolExecutor, work: Callable, items: Iterable) -> Iterator[Future]:
    """A future of each item. What making an item raises comes in its turn, as it does with one worker."""
    try:
        for item in items:
            yield pool.submit(work, item)
    except Exception as error:
        failed: Future = Future()
        failed.set_exception(error)
        yield failed


def _begin() -> None:
    """A worker lives no longer than who started it, and leaves Ctrl-C to that process.

    The pool's workers hold each other's ends of its pipes: after a kill -9 of their parent none of them ever reads an
    end of file, and all of them wait for work for ever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
