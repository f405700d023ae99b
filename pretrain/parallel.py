"""Work over processes: results in the order of the items, whatever the number of workers."""

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
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
    items = iter(items)
    # Not forked: a progress bar or a tokenizer may have started threads here, which a fork would leave half-alive.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        try:
            flying: deque[Future] = deque(pool.submit(work, item) for item in islice(items, AHEAD * workers))
            while flying:
                result = flying.popleft().result()
                flying.extend(pool.submit(work, item) for item in islice(items, 1))
                yield result
        except BrokenProcessPool:
            raise PretrainError("a worker process died: was it out of memory? Take fewer workers") from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
