"""Checkpoints: whole fp32 tensors by name, independent of stage, rank count and engine.

    step_00000400/
      weights.safetensors      fp32 master weights, named as in model.py
      exp_avg.safetensors      AdamW's moments under the same names
      exp_avg_sq.safetensors
      config.yaml              the resolved configuration of the run
      index.json               step, tokens, fingerprints of shards and tokenizer, world; written last

There is one form, and every engine saves and restores it: a run continues on another ZeRO stage or rank count from
the same files it continues from bit by bit on the old ones. No generator or loader state is stored; both are
functions of the step.
"""

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pretrain import folders
from pretrain.engine import STATES, Engine
from pretrain.errors import ResumeError
from pretrain.ranks import World

CONFIG = "config.yaml"
STEP = re.compile(r"step_(\d{8})")


@dataclass(frozen=True)
class TrainState:
    """Where a run stands: `step` optimizer steps are behind it. The rest follows from it or is for reports."""

    step: int = 0
    steps_applied: int = 0  # less than step by the skipped ones: Adam's own count


def publish(run: Path, state: TrainState, engine: Engine, world: World, config_yaml: str, identity: dict) -> Path:
    """Write checkpoint `state.step` of `run`; a collective. Complete or absent, whenever a process dies."""
    folder = run / "checkpoints" / f"step_{state.step:08d}"
    if not world.speaks:
        for _, tensors in engine.state():
            for _ in tensors:
                pass
        return folder
    with folders.publish(folder, "checkpoint", ResumeError) as aside:
        for kind, tensors in engine.state():
            save_file({name: tensor.contiguous() for name, tensor in tensors}, aside / f"{kind}.safetensors")
        index = {"stage": "checkpoint", "step": state.step, "steps_applied": state.steps_applied, **identity}
        (aside / CONFIG).write_text(config_yaml, encoding="utf-8")
        index["recorded"] = {"world": world.size, "engine": engine.name, "torch": torch.__version__}
        folders.write_index(aside, index, recorded=(CONFIG,))
    return folder


def sweep(run: Path, state: TrainState) -> None:
    """Remove what a killed save left, and torn checkpoints newer than `state`, where the run continues."""
    for leftover in (run / "checkpoints").glob(".step_*"):
        shutil.rmtree(leftover)
    for folder in _numbered(run):
        if int(STEP.fullmatch(folder.name)[1]) > state.step:
            print(f"removing {folder}: not complete", flush=True)
            shutil.rmtree(folder)


def prune(run: Path, keep: int) -> None:
    """Remove all but the `keep` newest checkpoints."""
    for folder in _numbered(run)[:-keep]:
        shutil.rmtree(folder)


def newest(run: Path, speak: bool = True) -> Path | None:
    """The newest complete checkpoint of a run. A torn one (no index, a file missing or cut) is passed over."""
    for folder in reversed(_numbered(run)):
        try:
            folders.check_sizes(folder, _read(folder), ResumeError)
        except ResumeError as error:
            if speak:
                print(f"passing over {folder}: {error.what}", flush=True)
            continue
        return folder
    return None


class Checkpoint:
    """A complete checkpoint, opened for reading: sizes are checked, and checksums when it is small or `thorough`."""

    def __init__(self, folder: Path | str, thorough: bool = False):
        self.folder = Path(folder)
        self.index = _read(self.folder)
        folders.check(self.folder, self.index, ResumeError, "remove it to continue from the one before", thorough)
        self.state = TrainState(self.index["step"], self.index["steps_applied"])
        self.config_text = (self.folder / CONFIG).read_text(encoding="utf-8")

    def tensors(self) -> Callable[[str, str], Tensor]:
        """`load(kind, name)`: one whole fp32 tensor, mapped from "weights", "exp_avg" or "exp_avg_sq"."""
        files = {kind: safe_open(self.folder / f"{kind}.safetensors", "pt") for kind in ("weights", *STATES)}

        def load(kind: str, name: str) -> Tensor:
            try:
                return files[kind].get_tensor(name)
            except SafetensorError as error:
                raise ResumeError(f"{self.folder} has no {kind} of {name}", str(error)) from None

        return load

    def weights(self) -> dict[str, Tensor]:
        """Every weight by name, fp32."""
        with safe_open(self.folder / "weights.safetensors", "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)


def resolve(path: Path | str) -> Path:
    """A checkpoint folder from itself, from a run folder (its newest), or a ResumeError that says what was found."""
    path = Path(path)
    if (path / folders.INDEX).is_file():
        return path
    folder = newest(path)
    if folder is None:
        state = "no complete checkpoint in it" if path.is_dir() else "no such folder"
        raise ResumeError(f"{path}: {state}", "expected a run folder or one of its checkpoints/step_…")
    return folder


def _read(folder: Path) -> dict:
    return folders.read_index(folder, ResumeError, "launch/pretrain.py CONFIG.yaml", stage="checkpoint")


def _numbered(run: Path) -> list[Path]:
    found = [path for path in (run / "checkpoints").glob("step_*") if STEP.fullmatch(path.name)]
    return sorted(found)
