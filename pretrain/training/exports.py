"""Exports while training: a checkpoint that is saved is also written as a Hugging Face folder, with its certificate.

    OUT/exports/step_00000400/

Rank 0 starts the stage `export` as a process of its own, without the launcher's variables and without a GPU, and all
ranks wait for it. So an export changes no random number and no weight, and the training only pauses. An export that
fails, for any reason, gives a warning and the training goes on: the checkpoint is saved, and the stage `export` can be
run on it again. If rank 0 dies, the process ends, and the run makes the export again when it continues.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pretrain.processes.signals import Interrupt
from pretrain.storage.index import INDEX, intact
from pretrain.training.checkpoint import folder_of
from pretrain.training.engine.peers import Peers
from pretrain.training.engine.ranks import RANK_VARIABLES
from pretrain.training.watch.log import duration, say

FOLDER = "exports"
LOOK_S = 0.2  # seconds between two looks at the process and at the signals
# Its standard input is a pipe that only rank 0 can write to: if rank 0 dies, reading ends.
PROGRAM = """
import json, os, sys, threading
threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()
from pretrain.cli import guarded
from pretrain.export import ExportConfig, run
sys.exit(guarded(lambda: run(ExportConfig(**json.loads(sys.argv[1])))))
"""
LAUNCHED = (*RANK_VARIABLES, "LOCAL_SIZE", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "TORCHELASTIC_RUN_ID")


class Exports:
    """Writes checkpoints of a run as folders of `dialect`."""

    def __init__(self, run: Path, dialect: str, every_steps: int, peers: Peers):
        self.every_steps = every_steps
        self.wanted = False  # whether an export is due, and waits for the checkpoint of its step
        self._run, self._dialect, self._peers = run, dialect, peers

    def due_at(self, step: int) -> bool:
        return self.every_steps > 0 and step % self.every_steps == 0

    def catch_up(self, step: int, begun: int, interrupt: Interrupt) -> None:
        """Make the last export before `step`, if an earlier attempt was ended before it was complete; a collective.

        The run's own steps begin after step `begun`.
        """
        due = step // self.every_steps * self.every_steps if self.every_steps else 0
        if due > begun:
            self.make(due, interrupt)

    def make(self, step: int, interrupt: Interrupt) -> None:
        """Export the checkpoint of `step` unless that is done, or it is gone; a collective. All wait for rank 0."""
        self.wanted = False
        with self._peers.one_fate():
            if self._peers.world.speaks:
                checkpoint = folder_of(self._run, step)
                out = self._run / FOLDER / checkpoint.name
                source, index = intact(checkpoint / INDEX), intact(out / INDEX)
                if source and (index is None or index.get("checkpoint") != source["fingerprint"]):
                    _export(checkpoint, self._dialect, out, interrupt)


def _export(checkpoint: Path, dialect: str, out: Path, interrupt: Interrupt) -> None:
    """Run the stage `export`, and print its lines, or a warning. A request to stop ends it."""
    started = time.monotonic()
    settings = {"checkpoint": str(checkpoint), "dialect": dialect, "out": str(out)}
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    package = Path(__file__).parents[2]
    paths = [str(package), *filter(None, [environment.get("PYTHONPATH")])]
    environment |= {"PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": ""}
    python = str(Path(sys.executable).absolute())
    ours, theirs = os.pipe()
    try:
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
            command = [python, "-P", "-c", PROGRAM, json.dumps(settings)]
            with subprocess.Popen(command, stdin=ours, stdout=said, stderr=said, env=environment) as process:
                while process.poll() is None:
                    if interrupt.asked:
                        process.terminate()
                    time.sleep(LOOK_S)
            said.seek(0)
            lines = said.read().strip().splitlines()
    except OSError as error:
        say(f"warning: {out} was not made: {error.strerror or error}; the training goes on")
        return
    finally:
        os.close(ours)
        os.close(theirs)
    if process.returncode == 0:
        lines[-1:] = [f"{lines[-1]}, in {duration(time.monotonic() - started)}"] if lines else []
    elif interrupt.asked:
        lines = [f"{out} is not complete; it is made again when the run continues"]
    else:
        remedy = f"  the training goes on; once this is corrected: pretrain export CONFIG.yaml checkpoint={checkpoint}"
        lines = [f"warning: {out} was not made", *(f"  {line}" for line in lines[-12:]), remedy]
    say("\n".join(lines))
