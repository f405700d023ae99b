"""Fills the marks of the pages when the site is built, so that no key and no figure is typed twice.

    <!-- keys -->                 the keys of every stage's configuration      (reference.py)
    <!-- card -->                 the keys of model_card.json                  (reference.py)
    <!-- table tokenizer-train --> a table of figures of benchmarks/results (tables.py)
    <!-- text clean-default -->   benchmarks/results/clean-default.txt as it is
    <!-- picture clean-default --> benchmarks/results/clean-default.png
    <!-- presets summary -->     what the presets need: one table, or `each` of them (presets.py)

A mark that nothing fills ends the build.
"""

import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import measured  # noqa: E402
import presets  # noqa: E402
import reference  # noqa: E402
import tables  # noqa: E402

MARK = re.compile(r"^<!-- (keys|card|table|text|picture|presets) ?(\S*) -->$", re.MULTILINE)
# A line's end between two Chinese characters, or signs of Chinese punctuation.
BROKEN = re.compile(
    "(?<=[\u3000-\u303f\u4e00-\u9fff\uff01-\uff60“”‘’])\n *(?=[\u3000-\u303f\u4e00-\u9fff\uff01-\uff60“”‘’])"
)
FILL = {
    "keys": lambda name, language: reference.page(language),
    "card": lambda name, language: reference.card(language),
    "table": tables.table,
    "text": measured.text,
    "picture": measured.picture,
    "presets": lambda name, language: {"summary": presets.summary, "each": presets.each}[name](language),
}


def filled(markdown: str, language: str) -> str:
    """The page with every mark replaced."""
    return MARK.sub(lambda mark: FILL[mark[1]](mark[2], language), markdown)


def joined(markdown: str) -> str:
    """Chinese text without the white space that a browser shows where a line of the source ends."""
    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)  # every second one is a code block
    return "".join(part if number % 2 else BROKEN.sub("", part) for number, part in enumerate(parts))


def on_page_markdown(markdown, page, config, files):
    language = page.file.src_uri.split("/")[0]
    return filled(joined(markdown) if language == "zh" else markdown, language)


def on_post_build(config):
    """Pictures lie once in the site, beside the pages of both languages, and so does the schema of model_card.json."""
    (Path(config.site_dir) / "model_card.schema.json").write_text(reference.card_schema(), encoding="utf-8")
    pictures = Path(config.site_dir) / measured.PICTURES
    pictures.mkdir(parents=True, exist_ok=True)
    for path in sorted(measured.RESULTS.glob("*.png")):
        shutil.copy(path, pictures)
