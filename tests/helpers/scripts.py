"""Run scripts of a copy of the checkout, as a user starts them."""

import itertools
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from tests.helpers.ranks import free_port

BIN = Path(sys.executable).parent
# Runs scripts one after another in one process, because each start of Python with torch costs seconds. A rank ends
# itself with os._exit where its script ends; here its next script begins there.
IN_TURN = """
import json, os, runpy, sys

end = os._exit

def end_of_script(status):
    if sys._getframe(1).f_globals["__name__"] == "pretrain.cli":
        sys.exit(status)
    end(status)

if __name__ == "__main__":
    os._exit = end_of_script
    *given, every = sys.argv[1:]  # a launcher gives --local_rank
    for words in json.loads(every):
        sys.argv = [words[0], *given, *words[1:]]
        try:
            runpy.run_path(words[0], run_name="__main__")
        except SystemExit as ended:
            if ended.code:
                print(f"exit status {ended.code} from {words}", file=sys.stderr, flush=True)
                end(1)
    if "RANK" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        end(0)
"""


def run(checkout: Path, commands: Iterable[str], laid_over: dict[str, list[str]]) -> str:
    """Run the commands in turn, which must succeed, and return their output.

    A command that has a word of `laid_over` gets the overrides of that word at its end. Successive commands `python
    SCRIPT …` run in one process. Successive commands `deepspeed --num_accelerators N SCRIPT …` with equal N run under
    one launcher, which has a port of its own, because two test files run at once.
    """
    every = [shlex.split(line) for line in commands]
    every = [[*words, *(more for word in words for more in laid_over.get(word, []))] for words in every]
    said = []
    for launcher, group in itertools.groupby(every, _launcher):
        scripts = json.dumps([words[len(launcher) :] for words in group])
        if launcher == ("python",):
            said.append(_started(checkout, [sys.executable, "-c", IN_TURN, scripts]))
            continue
        assert launcher[:2] == ("deepspeed", "--num_accelerators"), launcher
        (checkout / "in_turn.py").write_text(IN_TURN, encoding="utf-8")
        ranks = [str(BIN / "deepspeed"), "--master_port", str(free_port()), *launcher[1:]]
        said.append(_started(checkout, [*ranks, "in_turn.py", scripts]))
    return "".join(said)


def _launcher(words: list[str]) -> tuple[str, ...]:
    """The words of a command before its script."""
    return tuple(words[:1] if words[0] == "python" else words[:3])


def _started(checkout: Path, command: list[str]) -> str:
    env = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=checkout, env=env, text=True, capture_output=True, timeout=600)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr, f"{command}\n{done.stderr}"
    return done.stdout
