"""Measure how fast shards are read, from one piece and from many, and how fast a set of 10¹² tokens opens. Run with:

    python benchmarks/reading.py --out benchmarks/results/reading.json

`gather` measures reading rows at random starts, without masks or segments. The contestants take turns, round after
round; figures are medians in millions of tokens per CPU second. The files are in the page cache. `floor` copies the
same number of ids from one contiguous stretch, 16 bits to 32: no reader can be faster.
`start` opens a simulated set in a new process each round: 4,000 pieces of 250 million tokens in sparse files.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from benchmarks.measuring import machine, versions  # noqa: E402

SHAPES = ((32, 512), (32, 513), (8, 2048), (256, 128))
BATCHES = 200
PIECES, PIECE_TOKENS = 4_000, 250_000_000


def gather(scratch: Path, rounds: int) -> list[dict]:
    results = []
    for pieces in (1, 400):
        sizes = np.full(pieces, 100_000_000 // pieces) + np.arange(pieces)
        paths = [scratch / f"{pieces}-{n}.bin" for n in range(pieces)]
        rng = np.random.default_rng(0)
        for path, size in zip(paths, sizes.tolist(), strict=True):
            rng.integers(0, 30_000, size, np.uint16).tofile(path)
        contestants = _contestants(paths, sizes)
        for batch, length in SHAPES:
            starts = [rng.integers(0, sizes.sum() - length, batch) for _ in range(BATCHES)]
            found: dict[str, list[float]] = {name: [] for name in contestants}
            for _ in range(rounds):
                for name, read in contestants.items():
                    before = time.process_time()
                    for these in starts:
                        read(these, length)
                    found[name].append(BATCHES * batch * length / (time.process_time() - before) / 1e6)
            ours = contestants["ours"](starts[0], length)
            assert all(
                np.array_equal(ours, read(starts[0], length)) for name, read in contestants.items() if name != "floor"
            )
            figures = {name: [round(f(v)) for f in (statistics.median, min, max)] for name, v in found.items()}
            results.append(
                {"pieces": pieces, "rows": batch, "tokens a row": length, "million tokens a CPU second": figures}
            )
            print(json.dumps(results[-1]), flush=True)
    return results


def _contestants(paths: list[Path], sizes: np.ndarray) -> dict:
    from pretrain.shards.reader import TokenFiles

    mapped, ends = TokenFiles(paths, sizes, np.dtype(np.uint16)), np.cumsum(sizes)
    maps = [np.memmap(path, np.uint16, "r") for path in paths]
    stretch = np.array(maps[0][: 1 << 16])

    def loop(starts: np.ndarray, length: int) -> np.ndarray:
        """Read one row at a time from NumPy memory maps."""
        rows = np.empty((len(starts), length), np.int32)
        for row, start in zip(rows, starts.tolist(), strict=True):
            done = 0
            while done < length:
                piece = int(np.searchsorted(ends, start + done, side="right"))
                first = start + done - (int(ends[piece - 1]) if piece else 0)
                part = maps[piece][first : first + length - done]
                row[done : done + len(part)] = part
                done += len(part)
        return rows

    def floor(starts: np.ndarray, length: int) -> np.ndarray:
        return stretch[: len(starts) * length].astype(np.int32)

    found = {"ours": mapped.rows, "loop": loop, "floor": floor}
    if len(paths) == 1:
        found["indices"] = lambda starts, length: maps[0][starts[:, None] + np.arange(length)].astype(np.int32)
    return found


START = """
import json, os, sys, time
import numpy as np
from pretrain.shards import Shards
from pretrain.order.stream import Windows
found = {"start of the process and imports, CPU": time.process_time()}
memory = lambda: int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6
empty = memory()
def clock(name, work):
    begin, cpu = time.perf_counter(), time.process_time()
    result = work()
    found[name], found[f"{name}, CPU"] = time.perf_counter() - begin, time.process_time() - cpu
    return result
shards = clock("open", lambda: Shards(sys.argv[1]))
windows = Windows(shards, 512, 7)
def batch(step):
    return windows.rows(windows.starts(np.arange(step * 32, step * 32 + 32) * 512), 512)
clock("first batch, step 0", lambda: batch(0))
for step in (10**9, 1, 10**9 + 1, 2, 10**9 + 2):
    clock(f"batch of step {step}", lambda: batch(step))
clock("document at a position", lambda: shards.document_at(10**11 + 5))
found["memory, MB more than the modules"] = memory() - empty
print(json.dumps(found))
"""


def start(scratch: Path, rounds: int) -> dict:
    from tests.helpers.simulated import simulate

    folder = simulate(scratch / "shards", PIECES, PIECE_TOKENS)
    command = [sys.executable, "-c", START, str(folder)]
    runs = [
        json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout) for _ in range(rounds)
    ]
    files = len(json.loads((folder / "index.json").read_bytes())["files"])
    head = {"tokens": PIECES * PIECE_TOKENS, "pieces": PIECES, "files": files}
    head["bytes of index.json"] = (folder / "index.json").stat().st_size
    figures = {key: [round(f(run[key] for run in runs), 4) for f in (statistics.median, min, max)] for key in runs[0]}
    print(json.dumps(figures), flush=True)
    return head | {"seconds": figures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    load = [round(value, 1) for value in os.getloadavg()]
    with tempfile.TemporaryDirectory() as name:
        results = {"gather": gather(Path(name), arguments.rounds), "start": start(Path(name), arguments.rounds)}
    head = {
        "command": f"python benchmarks/reading.py --rounds {arguments.rounds} --out benchmarks/results/reading.json",
        "date": str(date.today()),
        "machine": machine(),
        "versions": versions("numpy"),
        "load_average_before": load,
        "figures": "[median, least, most] over rounds",
    }
    arguments.out.write_text(json.dumps({**head, **results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
