"""Being asked to stop: SIGTERM, SIGINT, SIGUSR1, or the launcher's death. The run saves and ends cleanly.

`deepspeed` on one node does not forward SIGTERM: the launcher dies at once and its ranks would train on as orphans.
Ranks therefore watch their ancestors.
"""

import os
import signal
import time
from pathlib import Path

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
INSIST_S = 5.0


class Interrupt:
    """A context in which `asked` turns true instead of the process dying.

    A signal that comes again after INSIST_S is obeyed at once. Sooner it is the same wish: a signal to the process
    group reaches a rank directly, and once more through its launcher.
    """

    def __init__(self, watch_launcher: bool):
        self._signal: int | None = None
        self._lineage = _lineage() if watch_launcher else None

    @property
    def asked(self) -> bool:
        return self._signal is not None or (self._lineage is not None and _lineage() != self._lineage)

    @property
    def reason(self) -> str:
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
    """Which launcher started this process, from a variable that each of them alone sets; None: none of those known."""
    env = os.environ
    if "TORCHELASTIC_RUN_ID" in env:
        return "torchrun"
    if "CROSS_SIZE" in env:
        return "deepspeed"
    return "srun" if "SLURM_PROCID" in env and env.get("RANK", env["SLURM_PROCID"]) == env["SLURM_PROCID"] else None


def _lineage() -> tuple[int, int]:
    """Process ids of the parent and, where the parent is DeepSpeed's launcher, of the `deepspeed` command above it.

    Under torchrun the grandparent is the user's shell, which may end while the run goes on.
    """
    parent = os.getppid()
    try:
        command = Path(f"/proc/{parent}/cmdline").read_bytes()
        stat = Path(f"/proc/{parent}/stat").read_text()
    except OSError:
        return parent, 0
    return parent, int(stat.rpartition(")")[2].split()[1]) if b"deepspeed.launcher.launch" in command else 0
