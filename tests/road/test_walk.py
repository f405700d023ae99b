"""The walk from `run` to the first step that CONTRIBUTING.md describes, followed in a real run."""

import re
import sys
from types import FrameType

from pretrain import config
from pretrain.training.config import RunConfig
from pretrain.training.run import run
from tests.conftest import ROOT, run_values

MOST_FILES = 8


def test_a_run_goes_through_the_files_of_the_walk_once_and_in_their_order(prepared, tmp_path):
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    walk = re.findall(r"^\| `(pretrain/[\w/]+\.py)` \| `([\w.]+)` \|", text, re.MULTILINE)
    files = [file for file, _ in walk]
    assert files[0] == "pretrain/training/run.py" and files[-1] == "pretrain/training/trainer.py"
    assert len(set(files)) == len(files) <= MOST_FILES

    entered = []

    def note(frame: FrameType, event: str, _: object) -> None:
        file, caller = (at.f_code.co_filename.removeprefix(f"{ROOT}/") for at in (frame, frame.f_back))
        place = (file, frame.f_code.co_qualname)
        if event == "call" and place in walk and (place == walk[0] or caller == files[0]):
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
