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
# Runs scripts one after another in one process, because each start of Python with torch costs seconds.
IN_TURN = """
import json, runpy, sys
for words in json.loads(sys.argv[1]):
    sys.argv = words
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            sys.exit(f"exit status {end.code} from {words}")
"""


def run(checkout: Path, commands: Iterable[str], laid_over: dict[str, list[str]]) -> str:
    """Run the commands in turn, which must succeed, and return their output.

    A command that has a word of `laid_over` gets the overrides of that word at its end. Successive commands `python
    SCRIPT …` run in one process. Each `deepspeed` command has a port of its own, because two test files run at once.
    """
    every = [shlex.split(line) for line in commands]
    every = [[*words, *(more for word in words for more in laid_over.get(word, []))] for words in every]
    said = []
    for script, group in itertools.groupby(every, lambda words: words[0] == "python"):
        if script:
            said.append(_started(checkout, [sys.executable, "-c", IN_TURN, json.dumps([words[1:] for words in group])]))
            continue
        for words in group:
            assert words[0] == "deepspeed", words
            launcher = [str(BIN / "deepspeed"), "--master_port", str(free_port())]
            said.append(_started(checkout, [*launcher, *words[1:]]))
    return "".join(said)


def _started(checkout: Path, command: list[str]) -> str:
    env = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=checkout, env=env, text=True, capture_output=True, timeout=600)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr, f"{command}\n{done.stderr}"
    return done.stdout
