"""Real ranks for tests: processes forked from a warm forkserver and connected by gloo.

They are never forked from pytest itself: the child of a process that has run a backward pass hangs, because OpenMP's
threads do not survive a fork.
"""

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

TIMEOUT_S = 120

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.helpers.preload"])


class Ranks:
    """`world` processes that run `work(*args)`, with the environment variables that a launcher sets.

    As a context manager, it ends them with kill -9 after the block.
    """

    def __init__(self, world: int, work: Callable, *args: Any, log: Path, launched: bool = True):
        port = free_port()
        self._pipes, self.processes = [], []
        log.parent.mkdir(parents=True, exist_ok=True)
        for rank in range(world):
            ours, theirs = _context.Pipe(duplex=False)
            env = {}
            if launched:
                env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_SIZE": world}
                env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            output = log.with_suffix(f".{rank}.log")
            process = _context.Process(target=_rank, args=(theirs, env, str(output), work, args))
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self.processes.append(process)
        self._log = log

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    def kill(self) -> None:
        """End all ranks with kill -9."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.join()

    def result(self, rank: int, within: float) -> tuple[bool, Any]:
        """Return (True, the value that this rank returned), or (False, its traceback)."""
        assert self._pipes[rank].poll(within), f"rank {rank} did not end within {within} s\n{self.logs()}"
        return self._pipes[rank].recv()

    def results(self) -> list:
        """Return the value of each rank. AssertionError with the logs: a rank failed or did not end in time."""
        deadline = time.monotonic() + TIMEOUT_S
        results = []
        try:
            for rank, pipe in enumerate(self._pipes):
                assert pipe.poll(max(0.0, deadline - time.monotonic())), f"rank {rank} did not end\n{self.logs()}"
                try:
                    done, value = pipe.recv()
                except EOFError:
                    done, value = False, "died without a word"
                assert done, f"rank {rank}: {value}\n{self.logs()}"
                results.append(value)
        finally:
            for process in self.processes:
                process.join(5)
            self.kill()
        return results

    def logs(self) -> str:
        names = (self._log.with_suffix(f".{rank}.log") for rank in range(len(self.processes)))
        return "\n".join(f"--- {name.name}\n{name.read_text()}" for name in names if name.exists())


def on_ranks(world: int, work: Callable, *args: Any, log: Path, launched: bool = True) -> list:
    """Run `work(*args)` on `world` ranks to its end and return the list of their values."""
    return Ranks(world, work, *args, log=log, launched=launched).results()


def _rank(pipe, env: dict, output: str, work: Callable, args: tuple) -> None:
    os.environ.update({name: str(value) for name, value in env.items()})
    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        pipe.send((True, work(*args)))
    except BaseException:
        traceback.print_exc()
        with contextlib.suppress(Exception):
            pipe.send((False, traceback.format_exc()))
    pipe.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
