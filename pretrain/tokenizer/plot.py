"""Plot how often the tokens of vocabularies occur in a text, and how long they are; needs matplotlib."""

import importlib.util
from pathlib import Path

import numpy as np

from pretrain.display.plots import families, label
from pretrain.display.plots import figure as new_figure
from pretrain.errors import TokenizerError

INCHES = (10, 4.2)
DPI = 110


def check() -> None:
    """Raise TokenizerError unless plots can be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise TokenizerError("the plot needs matplotlib", "pip install '.[data]', or set plot=false")


def write(path: Path, counts: dict[str, np.ndarray], lengths: dict[str, np.ndarray]) -> None:
    """Write a PNG of two plots: tokens by frequency, and entries by length.

    `counts` has for each curve (V,) how often each token was produced, `lengths` how many characters each entry has.
    """
    counts, lengths = (
        {label(name, f"curve {number}"): found for number, (name, found) in enumerate(part.items(), 1)}
        for part in (counts, lengths)
    )
    figure = new_figure(INCHES)
    frequency, length = figure.subplots(1, 2)
    for name, found in counts.items():
        found = np.sort(found[found > 0])[::-1]
        frequency.loglog(np.arange(1, len(found) + 1), found, label=name, linewidth=1.2)
    frequency.set(title="Tokens by frequency", xlabel="rank", ylabel="times on held-out text")
    longest = max((int(found.max(initial=0)) for found in lengths.values()), default=0)
    for name, found in lengths.items():
        length.plot(np.arange(1, longest + 1), np.bincount(found, minlength=longest + 1)[1:], label=name, marker=".")
    length.set(title="Entries by length", xlabel="characters", ylabel="entries", yscale="symlog")
    length.xaxis.get_major_locator().set_params(integer=True)
    for axes in (frequency, length):
        axes.grid(alpha=0.3)
        axes.legend(prop={"family": families("".join((*counts, *lengths)))})
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
