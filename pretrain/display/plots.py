"""The one door to matplotlib: figures, and fonts of this machine that have the characters of their labels."""

import sys
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

USUAL = "DejaVu Sans"  # comes with matplotlib
INSTALL = (
    "install a font that has them (Chinese: apt-get install fonts-noto-cjk, dnf install google-noto-sans-cjk-fonts)"
    " and remove matplotlib's list of fonts (~/.cache/matplotlib)"
)

_said: list[str] = []  # the first name that no font can write, once its message is printed


def figure(inches: tuple[float, float]) -> "Figure":
    """An empty figure. It is independent of pyplot: no window opens, and no global state changes."""
    from matplotlib.figure import Figure

    return Figure(figsize=inches, layout="constrained")


@cache
def families(text: str) -> list[str]:
    """Fonts that together have all characters of `text`, in the order in which to try them; empty if there are none."""
    from matplotlib import font_manager

    missing = {ord(char) for char in text} - _characters(font_manager.findfont(USUAL))
    # matplotlib's font of last resort has only a box for every character.
    fonts = [font for font in font_manager.fontManager.ttflist if missing and not font.name.startswith("Last Resort")]
    fonts.sort(key=lambda font: font.name)
    found = [USUAL]
    while missing:
        best = max(fonts, key=lambda font: len(missing & _characters(font.fname)), default=None)
        if best is None or not missing & _characters(best.fname):
            return []
        found.append(best.name)
        missing -= _characters(best.fname)
    return found


def label(name: str, otherwise: str) -> str:
    """`name`, or `otherwise` if no font of this machine can write it. The first such name prints a message."""
    if families(name):
        return name
    if not _said:
        _said.append(name)
        print(f"no font of this machine can write {name!r}: plots call it {otherwise!r}", file=sys.stderr)
        print(f"  plots replace other such names in the same way; {INSTALL}", file=sys.stderr)
    return otherwise


@cache
def _characters(path: str) -> frozenset[int]:
    """The code points of the font in a file."""
    from matplotlib import ft2font

    return frozenset(ft2font.FT2Font(path).get_charmap())
