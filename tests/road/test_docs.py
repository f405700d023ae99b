"""The documentation site: it builds strictly, in two languages, and asks no other server for anything."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    """The built site. `--strict` fails on a dead link, a missing anchor, and a page that mkdocs.yml does not name."""
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
