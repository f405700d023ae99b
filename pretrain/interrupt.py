"""Being asked to stop: SIGTERM, SIGINT, SIGUSR1, or the launcher's death. The run saves and ends cleanly.

`deepspeed` on one node does not forward SIGTERM: the launcher dies at once and its ranks would train on as orphans.
Ranks therefore watch their ancestors.
"""

import os
import signal
from pathlib import Path

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Interrupt:
    """A context in which `asked` turns true instead of the process dying. A second signal is obeyed at once."""

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
        self._signal = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _lineage() -> tuple[int, int]:
    """Process ids of parent and grandparent: launcher and its runner."""
    parent = os.getppid()
    try:
        stat = Path(f"/proc/{parent}/stat").read_text()
    except OSError:
        return parent, 0
    return parent, int(stat.rpartition(")")[2].split()[1])
