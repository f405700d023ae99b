"""The commands for a user's own corpus, run as printed in a fresh copy of the checkout.

This file is separate from test_readme.py so that the two can run at the same time.
"""

import json
import os
import subprocess
import sys

from pretrain.export.stage import OFFLINE
from pretrain.training.watch import metrics
from tests.road.test_readme import TUTORIAL, fences, walk


def test_the_tutorial_leads_from_a_folder_of_text_to_two_models_and_a_classifier(tmp_path):
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    walk(checkout, TUTORIAL)
    runs = checkout / "runs" / "small"
    funnel = json.loads((runs / "clean" / "report.json").read_text())
    assert [source["name"] for source in funnel["sources"]] == ["kjv", "poems"]
    index = json.loads((runs / "shards-byte" / "index.json").read_text())
    assert index["corpus"] == {"clean": json.loads((runs / "clean" / "index.json").read_text())["fingerprint"]}
    for name, steps in (("encoder", 4), ("decoder", 2)):
        assert metrics.reports(runs / name)[-1].step == steps
    assert json.loads((runs / "finetune" / "report.json").read_text())["labels"] == ["changed", "original"]
    for picture in ("clean/funnel.png", "clean/limits.png", "tokenizer-bert/report.png", "compare/report.png"):
        assert (runs / picture).read_bytes().startswith(b"\x89PNG")

    use = next(fence.text for fence in fences("README.md") if fence.language == "python")
    done = subprocess.run([sys.executable, "-c", use], cwd=checkout, env={**os.environ, **OFFLINE}, capture_output=True)
    assert done.returncode == 0 and done.stdout.decode().startswith("In the beginning"), done.stderr
