"""Previews: the predictions of the model for one held-out window of each corpus, as text for TensorBoard.

The ranks divide the corpora among themselves, and each computes all of its windows in one batch. The objective sets the
number of forward passes: it does not depend on the length of the windows or on the number of corpora.
"""

from collections.abc import Sequence

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
    """The observer that shows the predictions for one window of each corpus of the phase."""

    name = "previews"

    def __init__(
        self, every_steps: int, phases: Sequence[Phase], sides: list[Sides], world: World, tokenizer: Tokenizer
    ):
        """`sides`: the held-out windows of every corpus by name, for each phase."""
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
    """Markdown for one window of each of `heldout`, which share an objective; a collective.

    ZeRO 3 needs equally many forward passes on every rank, so a rank without a corpus repeats that of another rank.
    """
    objective = heldout[0].objective
    count = -(-len(heldout) // world.size)  # windows for each rank
    mine = [(world.rank * count + n) % len(heldout) for n in range(count)]
    once = slice(0, max(0, min(count, len(heldout) - world.rank * count)))
    windows = [found.batch(found.spread[:1]) for found in heldout]  # the same for every max_tokens

    def ask(batch: Batch) -> dict[str, np.ndarray]:
        return {name: found.cpu().numpy() for name, found in engine(objective, batch, each=True).items()}

    engine.train(False)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # few passes: compiling for them takes longer
        predicted = torch.from_numpy(objective.preview([windows[n] for n in mine], ask))
    engine.train(True)
    sums = torch.zeros((len(heldout), *predicted.shape[1:]), dtype=torch.int64)
    sums[mine[once]] = predicted[once]
    every = engine.total(sums).numpy()
    return [objective.preview_text(window, row, tokenizer) for window, row in zip(windows, every, strict=True)]
