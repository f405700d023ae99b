"""Shared by the benchmarks: reading text, measuring the cost of whole processes, and medians over rounds."""

import gzip
import io
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

# Starts a process and prints its exit status, its CPU and wall seconds, and the peak memory of its largest process in
# MB. A child's peak begins at the peak of the process that forked it, so this program must stay small.
METER = """
import json, os, subprocess, sys, time
started = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, used = os.wait4(process.pid, 0)
wall = time.perf_counter() - started
print(json.dumps([os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime, wall, used.ru_maxrss / 1024]))
"""
# One thread for every library. The first variable keeps bytecode even where the environment turns it off: otherwise
# every process would compile all modules again.
ONE_THREAD = {
    "PYTHONDONTWRITEBYTECODE": "",
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
}


def documents(path: Path, megabytes: float) -> Iterator[str]:
    """Yield documents from the start of a file until their UTF-8 text reaches `megabytes`."""
    size = 0
    for text in _read(path):
        yield text
        size += len(text.encode("utf-8"))
        if size >= megabytes * 1e6:
            return


def _read(path: Path) -> Iterator[str]:
    with _opened(path) as lines:
        if ".jsonl" in path.suffixes:
            yield from (json.loads(line)["text"] for line in lines)
            return
        document = []
        for line in lines:
            if line.strip():
                document.append(line)
            elif document:
                yield "".join(document).rstrip("\n")
                document = []
        if document:
            yield "".join(document).rstrip("\n")


def _opened(path: Path) -> io.TextIOBase:
    if path.suffix == ".zst":
        import zstandard

        reader = zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(open(path, "rb"))
        return io.TextIOWrapper(reader, encoding="utf-8")
    return (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8")


def write_recipe(folder: Path, file: str) -> Path:
    """Write `recipe.yaml` for a corpus of one file with 1 % of its documents held out, and return its path."""
    recipe = {"name": "benchmark", "heldout_fraction": 0.01, "sources": [{"name": "text", "files": [file]}]}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return folder / "recipe.yaml"


def process(command: list[str], environment: dict[str, str]) -> dict[str, float]:
    """Run a command and return the cost of its process and all its children, as `at_once` does."""
    return at_once([command], environment)


def at_once(commands: list[list[str]], environment: dict[str, str]) -> dict[str, float]:
    """Start several commands at once; return the cost of all their processes, and the CPU time of other programs."""
    busy, environment = _busy_s(), os.environ | environment
    meters = [
        subprocess.Popen([sys.executable, "-S", "-c", METER, *command], env=environment, stdout=subprocess.PIPE)
        for command in commands
    ]
    found = [json.loads(meter.communicate()[0]) for meter in meters]
    for command, (status, *_) in zip(commands, found, strict=True):
        if status:
            raise SystemExit(f"{' '.join(command)} ended with {status}")
    cpu_s = sum(used for _, used, _, _ in found)
    return {
        "cpu_s": cpu_s,
        "wall_s": max(wall for _, _, wall, _ in found),
        "cpu_s_of_others": max(0.0, _busy_s() - busy - cpu_s),
        "peak_mb_of_largest_process": max(peak for *_, peak in found),
    }


def _busy_s() -> float:
    """Seconds that all cores were busy since the machine started, for any program (Linux counts hundredths)."""
    try:
        ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    except FileNotFoundError:
        return 0.0
    idle, waiting_for_disk = ticks[3], ticks[4]
    return (sum(ticks[:8]) - idle - waiting_for_disk) / os.sysconf("SC_CLK_TCK")


def medians(rounds: list[dict[str, dict]]) -> dict[str, dict]:
    """[median, minimum, maximum] over the rounds, for every figure of every contestant."""
    found = {}
    for who, first in rounds[0].items():
        found[who] = {}
        for figure in (key for key, value in first.items() if isinstance(value, float)):
            values = [round_[who][figure] for round_ in rounds]
            found[who][figure] = [round(f(values), 3) for f in (statistics.median, min, max)]
    return found


def ratio(rounds: list[dict[str, dict]], above: str, below: str, figure: str) -> float:
    return round(statistics.median(round_[above][figure] / round_[below][figure] for round_ in rounds), 2)


def machine() -> dict:
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = next((line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")), "?")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return {"processor": model, "cores": os.cpu_count(), "memory_gb": round(memory), "system": platform.system()}


def versions(*names: str) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def pairs(values: list[str]) -> dict[str, Path]:
    return {name: Path(path) for name, path in (value.split("=", 1) for value in values)}
