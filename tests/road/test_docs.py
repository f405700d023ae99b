"""The documentation site builds strictly, in two languages, and loads nothing from other servers."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.cli import STAGES, config_of
from pretrain.config_reference import keys
from pretrain.dialects import DIALECTS
from pretrain.export.facts import Facts
from pretrain.export.reference import TOLERANCE
from pretrain.objectives import OBJECTIVES
from tests.conftest import ROOT


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    """Build the site. `--strict` fails on a dead link, a missing anchor, and a page that mkdocs.yml does not name."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    built = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def pages(language: str) -> set[str]:
    folder = ROOT / "docs" / language
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*.md")}


def test_every_page_is_in_both_languages():
    assert pages("en") == pages("zh")
    assert "index.md" in pages("en")


def test_the_built_site_has_every_page_in_both_languages(site):
    for page in pages("en"):
        html = Path(page).with_suffix(".html")
        assert (site / html).is_file(), html
        assert (site / "zh" / html).is_file(), html


def test_a_reader_needs_no_other_server(site):
    loads = re.compile(
        r'<(?:script|img|iframe)[^>]* src="(?:https?:)?//|<link[^>]* rel="(?:stylesheet|preconnect)"[^>]*//'
    )
    for html in site.rglob("*.html"):
        assert not loads.search(html.read_text(encoding="utf-8")), html


def test_every_measurement_is_on_a_page():
    written = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs/en/numbers").glob("*.md"))
    sources = (ROOT / "docs/tables/tables.py").read_text(encoding="utf-8")
    for path in (ROOT / "benchmarks/results").iterdir():
        mark = {".json": "table", ".txt": "text", ".png": "picture"}[path.suffix]
        beside = path.with_suffix(".txt").is_file()  # the text file has the figures of the JSON file
        shown = f'"{path.stem}"' in sources if mark == "table" else f"<!-- {mark} {path.stem} -->" in written
        assert shown or (mark == "table" and beside), path.name


def test_pages_show_the_figures_of_the_results(site):
    handoff = json.loads((ROOT / "benchmarks/results/handoff.json").read_text(encoding="utf-8"))
    kills = json.loads((ROOT / "benchmarks/results/kills.json").read_text(encoding="utf-8"))
    decoder = json.loads((ROOT / "benchmarks/results/demo-cpu.json").read_text(encoding="utf-8"))["summary"]["decoder"]
    for folder in (site, site / "zh"):
        cells = re.findall(r"<td[^>]*>(.*?)</td>", (folder / "numbers/training.html").read_text(encoding="utf-8"))
        assert f"{decoder['parameters']:,}" in cells and f"{decoder['heldout_bits_per_byte']:.3f}" in cells
        cells = re.findall(r"<td[^>]*>(.*?)</td>", (folder / "numbers/robustness.html").read_text(encoding="utf-8"))
        assert str(kills["kills"]) in cells
        cells = re.findall(r"<td[^>]*>(.*?)</td>", (folder / "guide/export.html").read_text(encoding="utf-8"))
        for opener in handoff["openers"].values():
            assert list(opener["dialects"]) == list(DIALECTS)
            for one in opener["dialects"].values():
                shown = f"{one['difference']:.0e}" if one.get("difference") else "0" if one["outcome"] == "yes" else ""
                assert any(cell.startswith(shown) for cell in cells)


def test_the_table_of_objectives_has_each_objective_and_dialect_trained_exported_and_resumed():
    rows = json.loads((ROOT / "benchmarks/results/objectives-cpu.json").read_text(encoding="utf-8"))["rows"].values()
    assert {row["objective"] for row in rows} == OBJECTIVES.keys()
    assert {dialect for row in rows for dialect in row["dialects"]} == DIALECTS.keys()
    for row in rows:
        assert row["train"]["heldout_gain"] > 0, row
        assert list(row["export"]) == row["dialects"], row
        assert all(made["max_logit_diff"] <= TOLERANCE for made in row["export"].values()), row
        assert list(row["resume"]) == ["1", "3"] and all(resumed["same"] for resumed in row["resume"].values()), row


def test_pictures_of_the_results_are_in_the_site(site):
    for html in site.rglob("numbers/*.html"):
        for picture in re.findall(r'<img src="([^"]*assets/results[^"]*)"', html.read_text(encoding="utf-8")):
            assert (html.parent / picture).resolve().is_file(), (html, picture)


def test_the_configuration_page_lists_every_key_of_every_stage(site):
    for folder in (site, site / "zh"):
        html = (folder / "reference/config.html").read_text(encoding="utf-8")
        for stage in STAGES:
            for key in keys(config_of(stage)):
                assert f'<code id="{stage}.{key.name}">' in html, (stage, key.name)


def test_the_page_of_formats_lists_every_fact_of_a_model_card_and_the_site_has_its_schema(site):
    for folder in (site, site / "zh"):
        html = (folder / "reference/files-and-formats.html").read_text(encoding="utf-8")
        for key in keys(Facts):
            assert f'<code id="card.{key.name}">' in html, key.name
    assert json.loads((site / "model_card.schema.json").read_text(encoding="utf-8")) == Facts.model_json_schema()


def test_messages_of_the_troubleshooting_page_are_those_of_the_code():
    source = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "pretrain").rglob("*.py")))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # join strings that span several lines
    lines = [line for line in source.splitlines() if '"' in line]
    for language in ("en", "zh"):
        page = (ROOT / f"docs/{language}/troubleshooting.md").read_text(encoding="utf-8")
        messages = [line for block in re.findall(r"```text\n(.*?)```", page, re.DOTALL) for line in block.splitlines()]
        assert len(messages) > 20
        for message in messages:
            constant = re.compile(".*".join(map(re.escape, message.split("…"))))
            assert any(map(constant.search, lines)), message


def test_each_stage_has_its_line_on_the_page_of_commands():
    for language in ("en", "zh"):
        page = (ROOT / f"docs/{language}/reference/commands.md").read_text(encoding="utf-8")
        table = page.split("{#stages}")[1].split("{#explain}")[0]
        assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == list(STAGES)


def test_files_that_contributing_names_are_there():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:pretrain|tests|docs|benchmarks)/[\w/.-]*)`", text)
    assert len(named) > 20
    assert [name for name in named if not (ROOT / name).exists()] == []
