"""The history of a run, which its checkpoints record under `recorded`: its attempts, and the text that it has read.

    attempts   one entry for each start that led to this checkpoint: the step it went on from, the command, the hardware
    read       one entry for each corpus: the tokens of text and the padding in the windows of all steps so far

An export shows both in the model card. Neither is part of a checkpoint's identity: on other hardware, or after a kill,
a run is the same run. An attempt that was killed before it saved anything leaves no entry.
"""

import platform
import re
import shlex
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from pretrain import __version__
from pretrain.order.run_data import RunData
from pretrain.processes.signals import launcher
from pretrain.storage.index import RECORDED
from pretrain.training.engine.peers import Peers
from pretrain.training.resume import Start


@dataclass(frozen=True)
class History:
    """The attempts of a run up to now, and the text that it had read before this attempt began."""

    attempts: list[dict]
    data: RunData
    since: int  # the step at which this attempt began
    read_before: list[dict] | None  # None: the checkpoint that this attempt began from does not say it

    def at(self, step: int) -> dict:
        """The entries under `recorded` in the index of the checkpoint of `step`."""
        if self.read_before is None:
            return {"attempts": self.attempts}
        before, now = self.data.read(self.since), self.data.read(step)
        total = {(entry["name"], entry["shards"]): dict(entry) for entry in self.read_before}
        for key, entry in now.items():
            known = total.setdefault(key, entry | {"tokens": 0, "padding": 0})
            earlier = before.get(key, {})
            for count in ("tokens", "padding"):
                known[count] += entry[count] - earlier.get(count, 0)
            known["pass_tokens"] = entry["pass_tokens"]
        return {"attempts": self.attempts, "read": list(total.values())}


def history_of(start: Start, data: RunData, engine: str, precision: str, device: torch.device, peers: Peers) -> History:
    """The history of a run that goes on from `start`; a collective."""
    nodes = len(set(peers.share(socket.gethostname())))
    attempt = {
        "from_step": start.state.step,
        "branched": start.branches,
        "command": command(),
        "launcher": launcher(),
        "ranks": peers.world.size,
        "nodes": nodes,
        "device": device_name(device),
        "engine": engine,
        "precision": precision,
        "torch": torch.__version__,
        "pretrain": __version__,
    }
    before = start.checkpoint.index.get(RECORDED, {}) if start.checkpoint else {"read": []}
    attempts = [*before.get("attempts", []), {key: value for key, value in attempt.items() if value is not None}]
    return History(attempts, data, start.state.step, before.get("read"))


def command() -> str | None:
    """The command of this process as one types it in this folder; None if there is none. The launcher is left out."""
    program = Path(sys.argv[0]).absolute()
    if not program.is_file():  # an interpreter or `python -c`
        return None
    name = program.relative_to(Path.cwd()) if program.is_relative_to(Path.cwd()) else program.name
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]  # the deepspeed launcher inserts it
    return shlex.join([str(name), *words])


def device_name(device: torch.device) -> str:
    """The name of the GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.machine()
