"""Contestants: processes that train in turn on one GPU, and what one of their steps spends its time on."""

import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

from benchmarks.gpu.common import settle, tail

TOGETHER = 4  # contestants that warm up, which compiles their models, at the same time
CLASSES = (  # of kernels, with words in their names; the first that fits. Inductor names a kernel by what it fuses
    ("norms and element-wise", ("triton_poi", "triton_per", "triton_red")),
    ("optimizer", ("multi_tensor", "adam")),
    ("attention", ("flash", "fmha", "attention", "sdpa")),
    ("matrix products", ("gemm", "nvjet", "cutlass", "cublas", "xmma", "mm", "linear", "splitk", "dot_kernel")),
    ("copies", ("memcpy", "memset", "copy", "clone", "catarray", "fill")),
    ("norms and element-wise", ("",)),
)
# Kernels that have such a name, or are started within such an operation, have the class of the operation.
SCOPES = {
    "head and loss": (
        "_SummedLoss",
        "cross_entropy",
        "CrossEntropy",
        "nll_loss",
        "NllLoss",
        "log_softmax",
        "LogSoftmax",
    ),
    "optimizer": ("Optimizer.step", "Optimizer.zero_grad"),
}


class Turns:
    """The contestant's side of the connection to the measuring program."""

    def __init__(self, address: str, name: str):
        self.connection = Client(address)
        self.connection.send(name)
        self.left = 0
        self.wait_s: float | None = None  # of the steps of this turn; None: the contestant does not measure it
        self.profiler: Any = None
        self.report: dict[str, Any] | None = None

    def over(self, device: Any) -> None:
        """Called before every step. At the end of a turn it reports the turn, and waits for the next one.

        The first step of a turn is not counted: it asks the driver for the memory that the turn before gave back.
        """
        import torch

        if self.left == 0:
            settle(device)
            if self.report is not None:
                self.connection.send(self._ended(device))
            if device.type == "cuda":
                torch.cuda.empty_cache()
            try:
                self.kind, self.count = self.connection.recv()
            except EOFError:  # the measurement is over
                os._exit(0)
            self.left, self.report = self.count + 1, {}
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
        if self.left == self.count:
            settle(device)
            if self.kind == "profile":
                activities = [torch.profiler.ProfilerActivity.CPU]
                activities += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
                self.profiler = torch.profiler.profile(activities=activities, acc_events=True)
                self.profiler.__enter__()
            self.wait_s, self.began = None, time.perf_counter()
        self.left -= 1

    def waited(self, seconds: float) -> None:
        """Note the time that a step waited for its batch."""
        self.wait_s = seconds + (self.wait_s or 0.0)

    def _ended(self, device: Any) -> dict[str, Any]:
        import torch

        took = time.perf_counter() - self.began
        report: dict[str, Any] = {"step_ms": 1e3 * took / self.count}
        if self.wait_s is not None:
            report["wait_share"] = self.wait_s / took
        if device.type == "cuda":
            report["peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        if self.profiler is not None:
            self.profiler.__exit__(None, None, None)
            report["ms_a_step"] = by_class(self.profiler.events(), took, self.count, device.type == "cuda")
            self.profiler = None
        return report


def by_class(events: Any, took: float, steps: int, cuda: bool) -> dict[str, float]:
    """The time of a step by class of kernel in ms, and the time in which the GPU had nothing to do.

    On a CPU operations take the place of kernels.
    """
    found: dict[str, float] = defaultdict(float)
    if not cuda:
        for event in events:
            found[_class(event, event.name)] += event.self_cpu_time_total
    else:
        left: dict[str, float] = defaultdict(float)  # by name: kernels that no operation is known to have started
        for event in events:
            kernel = event.device_type.name != "CPU" and not event.is_user_annotation
            if kernel and not event.name.startswith(("Optimizer.", "ProfilerStep")):
                left[event.name] += event.time_range.elapsed_us()
        for event in events:
            for kernel in event.kernels:
                if kernel.name in left:
                    found[_class(event, kernel.name)] += kernel.duration
                    left[kernel.name] -= kernel.duration
        for name, micros in left.items():
            found[_class(None, name)] += max(0.0, micros)
    shown = {name: found[name] / 1e3 / steps for name in dict.fromkeys([*(kind for kind, _ in CLASSES), *SCOPES])}
    return shown | {"idle": max(0.0, 1e3 * took / steps - sum(shown.values()))}


def _class(event: Any, kernel: str) -> str:
    """The class of a kernel that `event`, or an event around it, has started."""
    names = [kernel]
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    for name in names:
        for scope, words in SCOPES.items():
            if any(word in name for word in words):
                return scope
    return next(kind for kind, words in CLASSES if any(word in kernel.lower() for word in words))


class Contest:
    """The contestants of a group. One that ends before it should is left out from then on, with its output."""

    def __init__(self, commands: dict[str, list[str]], environment: dict[str, str], folder: Path):
        self.folder = folder
        self.failed: dict[str, str] = {}  # by name: the end of its output
        self.connections: dict[str, Connection] = {}
        self.processes = {}
        self.listener = Listener(str(folder / "socket"))
        self.listener._listener._socket.settimeout(2)  # type: ignore[attr-defined]
        for name, command in commands.items():
            with open(self._log(name), "w") as log:
                self.processes[name] = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        while len(self.connections) + len(self.failed) < len(commands):
            try:
                connection = self.listener.accept()
                self.connections[connection.recv()] = connection
            except TimeoutError:
                for name, process in self.processes.items():
                    if name not in self.connections and process.poll() is not None:
                        self._fail(name)

    def warm(self, steps: int) -> None:
        """Let every contestant take its first steps, a few contestants at once."""
        names = list(self.connections)
        for first in range(0, len(names), TOGETHER):
            some = names[first : first + TOGETHER]
            for name in some:
                self.connections[name].send(("warm", steps))
            for name in some:
                self._answer(name)

    def turn(self, kind: str, steps: int, first: int = 0) -> Iterator[tuple[str, dict]]:
        """Let one contestant after another take `steps` steps, and yield its report. They begin with number `first`."""
        names = list(self.connections)
        for name in names[first % len(names) :] + names[: first % len(names)] if names else []:
            self.connections[name].send((kind, steps))
            report = self._answer(name)
            if report is not None:
                yield name, report

    def end(self) -> None:
        """End all contestants. Their workers end by themselves."""
        for connection in self.connections.values():
            connection.close()
        for process in self.processes.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.listener.close()

    def _answer(self, name: str) -> dict | None:
        try:
            return self.connections[name].recv()
        except (EOFError, OSError):
            self._fail(name)
            return None

    def _fail(self, name: str) -> None:
        self.connections.pop(name, None)
        self.failed[name] = tail(self._log(name))

    def _log(self, name: str) -> Path:
        return self.folder / f"{name.replace(', ', '-').replace(' ', '_').replace('%', '')}.log"


def paced(steps: Callable, turns: Turns, device: Any) -> Callable:
    """`loader.steps` of ours, with a wait for the contestant's turn before every step."""

    def in_turn(*arguments: Any) -> Iterator:
        made = steps(*arguments)
        while True:
            turns.over(device)
            began = time.perf_counter()
            batch = next(made)
            turns.waited(time.perf_counter() - began)
            yield batch

    return in_turn


def ours(address: str, name: str, config: str) -> None:
    """Run launch/pretrain.py in this process, in turn with the others."""
    from pretrain.cli import main
    from pretrain.training import loader
    from pretrain.training.engine.ranks import World, device_of

    loader.steps = paced(loader.steps, Turns(address, name), device_of(World()))
    sys.argv = ["pretrain.py", config]
    sys.exit(main("pretrain"))
