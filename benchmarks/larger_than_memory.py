"""Run the stages clean, tokenizer and shards on a generated corpus that is larger than their memory limit.

    python benchmarks/larger_than_memory.py en=corpora/en.jsonl.zst zh=corpora/zh.jsonl.zst \\
        --copies 6 --megabytes 600 --scratch runs/larger > benchmarks/results/larger-than-memory.txt

The corpus has every text once unchanged, and `--copies` - 1 times changed so much that the copies are not duplicates: a
third of their words (in Chinese: characters) is replaced by other words of the same document. At the end of the corpus,
as far from the originals as possible, stand true duplicates: a copy of every 500th document, alternately exact and with
a changed ending. No process may have more than `--megabytes` of private memory (RLIMIT_DATA, which does not count
mapped files and shared memory; the printed peak of resident memory does). If `--scratch` already holds a corpus, it is
used again, so that an interrupted measurement can continue.
"""

import argparse
import json
import math
import random
import shutil
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from benchmarks.measuring import ONE_THREAD, documents, machine, pairs, process  # noqa: E402

EVERY = 500  # one document in this many has a copy at the end


def changed(text: str, language: str, seed: str) -> str:
    """Replace every third word by a random word of the same text."""
    draw = random.Random(seed)
    units = list(text) if language == "zh" else text.split(" ")
    for place in range(draw.randrange(3), len(units), 3):
        units[place] = draw.choice(units)
    return ("" if language == "zh" else " ").join(units)


def texts_of(file: Path, language: str, copies: int) -> Iterator[str]:
    for copy in range(copies):
        for number, text in enumerate(documents(file, math.inf)):
            yield changed(text, language, f"{copy} {number}") if copy else text


def planted(file: Path, language: str) -> Iterator[str]:
    for number, text in enumerate(documents(file, math.inf)):
        if number % (2 * EVERY) == 0:
            yield text
        elif number % EVERY == 0:
            yield text + ("这是另一个结尾。" if language == "zh" else " It ends in another way.")


def write(file: Path, texts: Iterator[str]) -> tuple[int, int]:
    """Write the texts as JSON lines; return the number of documents and of bytes of text."""
    count = size = 0
    with open(file, "w", encoding="utf-8") as out:
        for text in texts:
            out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            count, size = count + 1, size + len(text.encode())
    return count, size


def make(scratch: Path, files: dict[str, Path], copies: int) -> None:
    """Write the corpus, with the duplicates in its last files, and its recipe and size."""
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    names = [*files, *(f"{language}-copies" for language in files)]
    texts = [texts_of(file, language, copies) for language, file in files.items()]
    texts += [planted(file, language) for language, file in files.items()]
    sizes = [write(scratch / f"{name}.jsonl", some) for name, some in zip(names, texts, strict=True)]
    sources = [{"name": name, "files": [f"{name}.jsonl"], "language": name.split("-")[0]} for name in names]
    (scratch / "size.json").write_text(json.dumps([sum(column) for column in zip(*sizes, strict=True)]))
    (scratch / "recipe.yaml").write_text(json.dumps({"name": "larger", "heldout_fraction": 0.01, "sources": sources}))


def run(stage: str, limit: int, *settings: str) -> str:
    """Run one stage under the memory limit and return its line of the table."""
    command = [sys.executable, f"{ROOT}/launch/{stage}.py", *settings]
    used = process(["bash", "-c", f'ulimit -d {limit // 1024}; exec "$@"', "bash", *command], ONE_THREAD)
    return f"{stage:10}{used['peak_mb_of_largest_process']:12.0f} MB{used['cpu_s']:9.0f} s{used['wall_s']:8.0f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+", metavar="LANGUAGE=FILE")
    parser.add_argument("--copies", type=int, default=6)
    parser.add_argument("--megabytes", type=int, default=600, help="private memory that each process may have")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--set", nargs="*", default=[], help="overrides for the stage clean, as key=value")
    chosen = parser.parse_args()
    scratch, limit, workers = chosen.scratch.resolve(), chosen.megabytes * 10**6, f"workers={chosen.workers}"
    recipe = scratch / "recipe.yaml"
    if not recipe.exists():
        make(scratch, pairs(chosen.texts), chosen.copies)
    count, size = json.loads((scratch / "size.json").read_text(encoding="utf-8"))
    print(f"$ python benchmarks/larger_than_memory.py {' '.join(sys.argv[1:])}\n")
    found = machine()
    print(f"{date.today()}, {found['cores']} cores of an {found['processor']}, {found['memory_gb']} GB.")
    print(f"{count:,} documents, {size / 1e6:,.0f} MB of text; no process may have more than {limit / 1e6:.0f} MB")
    print("of memory of its own (RLIMIT_DATA).\n\nstage      largest process        CPU      wall", flush=True)
    small = ROOT / "configs/small"
    clean, vocabulary = f"{scratch}/clean", f"{scratch}/vocabulary"
    settings = (f"corpus={recipe}", f"out={clean}", workers, *chosen.set)
    print(run("clean", limit, f"{small}/clean.yaml", *settings), flush=True)
    settings = (f"corpus={clean}", f"out={vocabulary}", "vocab_size=30000", workers)
    print(run("tokenizer", limit, f"{small}/tokenizer-bert.yaml", *settings), flush=True)
    settings = (f"corpus={clean}", f"tokenizer={vocabulary}", f"out={scratch}/shards", workers)
    print(run("shards", limit, f"{small}/shards-bert.yaml", *settings), flush=True)
    report = json.loads((scratch / "clean/report.json").read_text(encoding="utf-8"))
    for copies in (False, True):
        of = [source for source in report["sources"] if source["name"].endswith("-copies") == copies]
        read = sum(source["steps"][0]["documents_in"] for source in of)
        gone = {
            name: sum(
                step["documents_in"] - step["documents_out"] for s in of for step in s["steps"] if step["step"] == name
            )
            for name in ("duplicate documents", "near-duplicates")
        }
        what = "the copies planted at the end" if copies else "the corpus"
        print(f"\nOf {what}, {read:,} documents: {', '.join(f'{n:,} {name}' for name, n in gone.items())}.")


if __name__ == "__main__":
    main()
