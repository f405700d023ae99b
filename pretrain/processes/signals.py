"""Requests to stop: SIGTERM, SIGINT, SIGUSR1, or the launcher's death. The run saves and ends cleanly.

`deepspeed` on one node does not forward SIGTERM: the launcher dies at once, and its ranks would continue as orphans. So
the ranks watch their ancestors.
"""

import os
import signal
import time
from pathlib import Path

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
INSIST_S = 5.0  # a second signal within this time counts as the same request


class Interrupt:
    """A context in which a signal sets `asked` instead of ending the process.

    A second signal after INSIST_S ends the process at once. A second signal before that counts as the same request,
    because a signal to the process group reaches a rank directly and once more through its launcher.
    """

    def __init__(self, watch_launcher: bool):
        self._signal: int | None = None
        self._lineage = _lineage() if watch_launcher else None

    @property
    def asked(self) -> bool:
        """Whether a signal came, or the launcher is gone."""
        return self._signal is not None or (self._lineage is not None and _lineage() != self._lineage)

    @property
    def reason(self) -> str:
        """The name of the signal, or a text about the launcher."""
        return signal.Signals(self._signal).name if self._signal is not None else "the launcher is gone"

    def __enter__(self) -> "Interrupt":
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, number: int, _: object) -> None:
        if self._signal is None:
            self._signal, self._since = number, time.monotonic()
        elif time.monotonic() - self._since > INSIST_S:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def launcher() -> str | None:
    """The launcher that started this process, known by an environment variable that it alone sets; None if unknown."""
    env = os.environ
    if "TORCHELASTIC_RUN_ID" in env:
        return "torchrun"
    if "CROSS_SIZE" in env:
        return "deepspeed"
    return "srun" if "SLURM_PROCID" in env and env.get("RANK", env["SLURM_PROCID"]) == env["SLURM_PROCID"] else None


def _lineage() -> tuple[int, int]:
    """The process id of the parent and, if the parent is DeepSpeed's launcher, of the `deepspeed` command above it.

    Under torchrun the grandparent is the user's shell, which may end while the run continues.
    """
    parent = os.getppid()
    try:
        command = Path(f"/proc/{parent}/cmdline").read_bytes()
        stat = Path(f"/proc/{parent}/stat").read_text()
    except OSError:
        return parent, 0
    return parent, int(stat.rpartition(")")[2].split()[1]) if b"deepspeed.launcher.launch" in command else 0
