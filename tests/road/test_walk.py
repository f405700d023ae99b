"""The walk from `run` to the first step that CONTRIBUTING.md describes, followed in a real run."""

import re
import sys
from types import FrameType

from pretrain import config
from pretrain.training.config import RunConfig
from pretrain.training.run import run
from tests.conftest import ROOT, run_values

MOST_FILES = 8


def test_a_run_enters_the_files_of_the_walk_once_and_in_their_order(prepared, tmp_path):
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    walk = re.findall(r"^\| `(pretrain/[\w/]+\.py)` \| `([\w.]+)` \|", text, re.MULTILINE)
    files = [file for file, _ in walk]
    assert files[0] == "pretrain/training/run.py" and files[-1] == "pretrain/training/trainer.py"
    assert len(set(files)) == len(files) <= MOST_FILES

    entered = []  # every function of the project that run.py calls until the first step, directly or through a library

    def note(frame: FrameType, event: str, _: object) -> None:
        place = _place(frame)
        if event != "call" or not place[0].startswith("pretrain/") or walk[-1] in entered:
            return
        caller = frame.f_back
        while caller and not _place(caller)[0].startswith(("pretrain/", "tests/")):
            caller = caller.f_back
        if place == walk[0] or (caller and _place(caller)[0] == files[0]):
            entered.append(place)

    cfg = config.build(
        RunConfig,
        run_values(prepared, tmp_path / "run", phases=[{"steps": 1, "seq_len": 32, "batch_tokens": 256}]),
        "test",
    )
    before = sys.getprofile()
    sys.setprofile(note)
    try:
        run(cfg)
    finally:
        sys.setprofile(before)
    assert entered == walk


def _place(frame: FrameType) -> tuple[str, str]:
    """The file of a function, relative to the checkout, and the name of the function."""
    return frame.f_code.co_filename.removeprefix(f"{ROOT}/"), frame.f_code.co_qualname
