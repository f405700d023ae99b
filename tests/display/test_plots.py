"""Labels of plots: in the fonts of the machine, or replaced with a message."""

from pathlib import Path

import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager

from pretrain.display import plots


def font(folder: Path, name: str, characters: str) -> Path:
    """A font with only these `characters`."""
    names = [".notdef", *(f"uni{ord(c):X}" for c in characters)]
    builder = FontBuilder(1000)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(c): f"uni{ord(c):X}" for c in characters})
    builder.setupGlyf(dict.fromkeys(names, TTGlyphPen(None).glyph()))
    builder.setupHorizontalMetrics(dict.fromkeys(names, (500, 0)))
    builder.setupHorizontalHeader()
    builder.setupNameTable({"familyName": name, "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(folder / f"{name}.ttf")
    return folder / f"{name}.ttf"


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with only matplotlib's own font and the fonts that a test adds."""
    manager = font_manager.fontManager
    usual = [entry for entry in manager.ttflist if entry.name == plots.USUAL]
    monkeypatch.setattr(manager, "ttflist", usual)
    monkeypatch.setattr(plots, "_said", [])
    plots.families.cache_clear()
    yield lambda name, characters: (manager.addfont(font(tmp_path, name, characters)), plots.families.cache_clear())
    plots.families.cache_clear()


def test_labels_of_several_scripts_are_written_in_a_font_of_each(machine):
    assert plots.families("plain") == [plots.USUAL] and plots.families("百科") == []
    machine("Chinese", "百科书")
    machine("Gothic", "\U00010330\U00010331")
    machine("A", "百")  # the font with most of the missing characters is taken, not the first one
    assert plots.families("a 百科") == [plots.USUAL, "Chinese"]
    assert plots.families("百科 \U00010330") == [plots.USUAL, "Chinese", "Gothic"]
    assert plots.families("百科 \U00010332") == []


def test_a_name_that_no_font_can_write_is_said_once_with_what_to_install(machine, capsys):
    machine("Chinese", "百科")
    assert [plots.label("百科", "source 1"), plots.label("书", "source 2"), plots.label("典", "source 3")] == [
        "百科",
        "source 2",
        "source 3",
    ]
    said = capsys.readouterr().err
    assert said.startswith("no font of this machine can write '书': plots call it 'source 2'\n")
    assert "fonts-noto-cjk" in said and said.count("no font of this machine") == 1
