"""Previews: what the model predicts for one held-out window of each corpus, as text for TensorBoard.

The ranks divide the corpora among themselves and forward all of their windows at once. A preview costs as many forwards
as the objective asks for, whatever the length of the window and the number of corpora.
"""

import numpy as np
import torch

from pretrain.objectives.batch import Batch
from pretrain.order.phases import Phase
from pretrain.processes.signals import Interrupt
from pretrain.tokenizer import Tokenizer
from pretrain.training.engine.engine import Engine
from pretrain.training.engine.ranks import World
from pretrain.training.heldout import HeldOut, Sides
from pretrain.training.watch.observer import Findings, Moment


class Previews:
    """The observer that shows what the model predicts for one window of each corpus of the phase."""

    name = "previews"

    def __init__(self, every_steps: int, phases: list[Phase], sides: list[Sides], world: World, tokenizer: Tokenizer):
        """`sides`: for each phase the held-out windows of every corpus by name."""
        self.every_steps = every_steps
        self._phases, self._sides, self._world, self._tokenizer = phases, sides, world, tokenizer

    def measure(self, engine: Engine, moment: Moment, interrupt: Interrupt) -> Findings:
        sides = self._sides[moment.phase]
        weights = self._phases[moment.phase].weights(list(sides))
        drawn = {name: side for (name, side), weight in zip(sides.items(), weights, strict=True) if weight}
        texts = preview_texts(list(drawn.values()), engine, self._world, self._tokenizer)
        return Findings(
            texts={f"sample/{name}" if name else "sample": text for name, text in zip(drawn, texts, strict=True)}
        )


def preview_texts(heldout: list[HeldOut], engine: Engine, world: World, tokenizer: Tokenizer) -> list[str]:
    """Markdown for a window of each of `heldout`, which share an objective; a collective.

    Every rank makes as many forwards, which ZeRO 3 needs: a rank that has no corpus repeats another rank's.
    """
    objective = heldout[0].objective
    count = -(-len(heldout) // world.size)  # windows of a rank
    mine = [(world.rank * count + n) % len(heldout) for n in range(count)]
    once = slice(0, max(0, min(count, len(heldout) - world.rank * count)))
    windows = [found.batch(found.spread[:1]) for found in heldout]  # the same one, however many windows are scored

    def ask(batch: Batch) -> np.ndarray:
        _, likeliest = engine(objective, batch, each=True)
        return likeliest.cpu().numpy()

    engine.train(False)
    with torch.no_grad():
        predicted = torch.from_numpy(objective.preview([windows[n] for n in mine], ask))
    engine.train(True)
    every = torch.zeros((len(heldout), *predicted.shape[1:]), dtype=torch.int64)
    every[mine[once]] = predicted[once]
    every = engine.total(every).numpy()
    return [objective.preview_text(window, row, tokenizer) for window, row in zip(windows, every, strict=True)]
