"""Fonts of this machine for the labels of plots; needs matplotlib."""

from functools import cache


@cache
def families(text: str) -> list[str]:
    """Fonts that can write `text` together; none if there are not."""
    from matplotlib import font_manager, ft2font

    usual = "DejaVu Sans"  # comes with matplotlib
    missing = {ord(char) for char in text} - set(ft2font.FT2Font(font_manager.findfont(usual)).get_charmap())
    if not missing:
        return [usual]
    for font in sorted(font_manager.fontManager.ttflist, key=lambda font: font.name):
        # matplotlib's last resort has a box for every character.
        if not font.name.startswith("Last Resort") and missing <= set(ft2font.FT2Font(font.fname).get_charmap()):
            return [usual, font.name]
    return []


def label(name: str, otherwise: str) -> str:
    """`name`, or `otherwise` where no font here can write it."""
    return name if families(name) else otherwise
