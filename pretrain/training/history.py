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

import numpy as np
import torch

from pretrain import __version__
from pretrain.order import branch
from pretrain.order.order import Order
from pretrain.order.phases import done_in
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
        before, now = text_read(self.data, self.since), text_read(self.data, step)
        total = {entry["shards"]: entry for entry in self.read_before}
        for shards, entry in now.items():
            known, earlier = total.get(shards, {}), before.get(shards, {})
            counts = {
                count: known.get(count, 0) + entry[count] - earlier.get(count, 0) for count in ("tokens", "padding")
            }
            total[shards] = entry | counts
        return {"attempts": self.attempts, "read": list(total.values())}


def text_read(data: RunData, step: int) -> dict[str, dict]:
    """The text that the first `step` steps of a run read, by the fingerprint of each corpus that they read.

    `tokens` are the tokens of text, `padding` the free places of the windows, and `pass_tokens` the tokens of one pass
    over the corpus. Windows of packed documents count with the mean tokens of a window.
    """
    done = done_in(data.phases, step)
    begun = [phase.model_copy(update={"steps": n}) for phase, n in zip(data.phases, done, strict=False)]
    longer = branch.reading(begun, [skip for skip in data.skips if skip[0] <= step])
    order, found = Order(data.order.corpora, longer), {}
    tokens = places = np.zeros(len(data.corpora))
    for number, (phase, n) in enumerate(zip(longer, done, strict=True)):
        windows = order.windows_drawn(number) * (n / phase.steps)  # without those of the skipped steps
        places = places + windows * phase.seq_len
        tokens = tokens + windows * data.order.block_tokens / order.per_block[number]
    for number, corpus in enumerate(data.corpora):
        if places[number]:
            source = order.windows[number]
            found[corpus.train.fingerprint] = {
                "name": corpus.name,
                "shards": corpus.train.fingerprint,
                "tokens": round(tokens[number]),
                "padding": round(places[number]) - round(tokens[number]),
                "pass_tokens": source.blocks * source.block_tokens,
            }
    return found


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
