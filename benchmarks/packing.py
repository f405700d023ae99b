"""Compare packed windows of whole documents with windows of the stream, and write the figures as JSON.

    python benchmarks/packing.py en_wiki=corpora/en.jsonl.zst zh_poems=corpora/poems.jsonl.zst --out OUT.json

A text is .txt (a blank line ends a document) or .jsonl (key `text`), plain, .gz or .zst. A vocabulary of kind bert is
trained on its first `--megabytes`, and shards are built. Two shares are counted over an epoch for each kind of window:
documents that would fit into a window but are cut, and padding. The speed is measured on masked batches of 64 Ki tokens
as a run's loader makes them. Both kinds take turns in one process; figures are medians over rounds, in millions of
window positions per CPU second of one thread.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # so that no file of this folder shadows a library

import numpy as np  # noqa: E402

from benchmarks.measuring import documents, machine, pairs, versions, write_recipe  # noqa: E402
from pretrain import shards, tokenizer  # noqa: E402
from pretrain.objectives.masked_lm import MaskedLMConfig  # noqa: E402
from pretrain.order.packed import BLOCK_WINDOWS, PackedWindows  # noqa: E402
from pretrain.order.phases import Phase  # noqa: E402
from pretrain.order.stream import Windows  # noqa: E402
from pretrain.shards import Shards  # noqa: E402
from tests.helpers.batches import batches as batches_of  # noqa: E402

SEQ_LENS = (128, 512, 2048)
BATCH_TOKENS = 1 << 16
VOCABULARY = 30_000
SECONDS = 1.0  # CPU time that a round measures each kind for


def prepare(text: Path, folder: Path, megabytes: float) -> Shards:
    with open(folder / "text.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": document}) + "\n" for document in documents(text, megabytes))
    corpus = str(write_recipe(folder, "text.jsonl"))
    made = {"corpus": corpus, "out": str(folder / "tokenizer"), "kind": "bert", "vocab_size": VOCABULARY}
    tokenizer.run(tokenizer.TokenizerConfig(**made, plot=False))
    shards.run(shards.ShardsConfig(corpus=corpus, tokenizer=made["out"], out=str(folder / "shards")))
    return Shards(folder / "shards")


def cut(held: Shards, windows: Windows, seq_len: int) -> tuple[float | None, float]:
    """Two shares of an epoch: documents that are cut although they fit a window, and padding."""
    numbers = np.arange(windows.blocks)[:, None] * windows.block_tokens
    numbers = numbers + np.arange(windows.per_block(seq_len)) * windows.apart(seq_len)
    parts = [part for start in windows.starts(numbers.ravel()).tolist() for part in windows.parts(start, seq_len)]
    begins, lengths = np.array([(part.start, part.tokens) for part in parts]).T
    every = np.concatenate([np.stack(held.spans(*stretch), axis=1) for stretch in _pieces(held)])
    # Windows leave the end of a block out.
    inside = (every[:, 0] >= begins.min()) & (every[:, 1] <= (begins + lengths).max())
    short = every[inside & (every[:, 1] - every[:, 0] <= seq_len)]
    order = np.argsort(begins)
    part = order[np.searchsorted(begins, short[:, 0], side="right", sorter=order) - 1]
    broken = short[:, 1] > begins[part] + lengths[part]
    padding = round(1 - lengths.sum() / numbers.size / seq_len, 4)
    return (round(float(broken.mean()), 5) if len(short) else None), padding


def _pieces(held: Shards):
    begin = 0
    for tokens in held.piece_tokens.tolist():
        yield begin, begin + tokens
        begin += tokens


def speed(kinds: dict[str, Windows], seq_len: int, rounds: int) -> dict[str, list[float]]:
    """[median, minimum, maximum] of each kind."""
    made = {
        name: batches_of(
            {"": windows},
            MaskedLMConfig(kind="masked_lm"),
            [Phase(steps=10**9, seq_len=seq_len, batch_tokens=BATCH_TOKENS)],
            *(1, BATCH_TOKENS // seq_len),
        )
        for name, windows in kinds.items()
    }
    found, at = {name: [] for name in made}, 0
    for _ in range(rounds + 1):  # the first warms up
        for name, batches in made.items():
            started, count = time.process_time(), 0
            while time.process_time() - started < SECONDS:
                batches[at + count]
                count += 1
            found[name].append(count * BATCH_TOKENS / (time.process_time() - started) / 1e6)
        at += 10_000
    return {name: [round(f(v[1:]), 1) for f in (statistics.median, min, max)] for name, v in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+", help="name=file")
    parser.add_argument("--megabytes", type=float, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    load, results = os.getloadavg(), []
    for name, text in pairs(arguments.texts).items():
        with tempfile.TemporaryDirectory() as folder:
            held = prepare(text, Path(folder), arguments.megabytes)
            for seq_len in SEQ_LENS:
                block_tokens = BLOCK_WINDOWS * seq_len
                kinds = {"stream": Windows(held, seq_len, 1), "documents": PackedWindows(held, block_tokens, 1)}
                shares = {kind: cut(held, windows, seq_len) for kind, windows in kinds.items()}
                results.append(
                    {
                        "text": name,
                        "seq_len": seq_len,
                        "documents": held.documents,
                        "tokens": held.tokens,
                        "cut_of_those_that_fit": {kind: share for kind, (share, _) in shares.items()},
                        "padding": {kind: share for kind, (_, share) in shares.items()},
                        "million_places_per_cpu_s": speed(kinds, seq_len, arguments.rounds),
                    }
                )
                print(json.dumps(results[-1]), flush=True)
    report = {
        "command": f"OMP_NUM_THREADS=1 python benchmarks/packing.py {' '.join(sys.argv[1:])}",
        "date": date.today().isoformat(),
        "machine": machine(),
        "versions": versions("numpy"),
        "rounds": arguments.rounds,
        "load_average_before": [round(value, 1) for value in load],
        "figures": "shares of an epoch; [median, least, most] over rounds",
        "results": results,
    }
    Path(arguments.out).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
