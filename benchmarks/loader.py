"""Measure how fast several loaders make batches, in turn, and write the figures as JSON.

    python benchmarks/loader.py en=corpora/en.jsonl.zst zh=corpora/zh.jsonl.zst --out benchmarks/results/loader.json \\
        --streaming-python /elsewhere/bin/python

A text is .txt (a blank line ends a document) or .jsonl (key `text`), plain, .gz or .zst. A vocabulary is trained on its
first `--megabytes`, shards with word starts are built, and the same ids are written in the formats of the other
loaders. A batch has `--windows` windows of 512 tokens.

Every measurement is a process of its own. The contestants take turns, round after round, and figures are medians over
rounds, in millions of tokens per CPU second of one thread. `ours` reads random windows from the memory map, masks them,
and numbers documents and positions; the others make only ids and labels. `as trained` is everything that a run's loader
does, so it includes the order of the windows and the batch digest. MosaicML streaming may need library versions of its
own: `--streaming-python` is an interpreter that has it; without this option it is left out.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # so that no file of this folder shadows a library

import numpy as np  # noqa: E402

from benchmarks.measuring import ONE_THREAD, documents, machine, medians, pairs, ratio, versions, write_recipe  # noqa: E402

T = 512
VOCABULARY = 30_000
SECONDS = 2.0  # CPU time that a contestant is measured for, after WARM batches
WARM = 20
OURS = {
    "ours, causal": {"kind": "causal_lm"},
    "ours, masked": {"kind": "masked_lm"},
    "ours, masked words": {"kind": "masked_lm", "unit": "word"},
    "ours, masked spans": {"kind": "masked_lm", "span": {}},
    "ours, masked spans of words": {"kind": "masked_lm", "unit": "word", "span": {}},
}
TRAINED = [f"{who}, as trained" for who in ("ours, causal", "ours, masked", "ours, masked words")]
CAUSAL = ("nanoGPT's way", "HF datasets, torch format", "MosaicML streaming")
MASKED = ("HF collator", "HF collator, NumPy", "HF datasets and collator")
WORDS = ("HF collator, whole words",)


# Preparing


def prepare(text: Path, folder: Path, megabytes: float, streaming: str | None) -> None:
    """Make the vocabulary, shards and word starts of a text in `folder`, and its ids in the formats of the others."""
    from pretrain import shards, tokenizer
    from pretrain.shards import segment

    with open(folder / "text.txt", "w", encoding="utf-8") as file:
        for document in documents(text, megabytes):
            file.write("\n".join(line for line in document.split("\n") if line.strip()) + "\n\n")
    corpus = str(write_recipe(folder, "text.txt"))
    made = {"corpus": corpus, "out": str(folder / "tokenizer"), "kind": "bert", "vocab_size": VOCABULARY}
    tokenizer.run(tokenizer.TokenizerConfig(**made, plot=False))
    shards.run(shards.ShardsConfig(corpus=corpus, tokenizer=made["out"], out=str(folder / "shards")))
    segment.run(segment.WordsConfig(shards=str(folder / "shards"), tokenizer=made["out"]))

    opened = shards.Shards(folder / "shards")
    rows = opened.gather(np.arange(opened.tokens // T) * T, T)
    rows.astype(np.uint16).tofile(folder / "train.bin")
    import datasets

    data = datasets.Dataset.from_dict({"input_ids": rows})
    data.save_to_disk(folder / "rows")
    if streaming:
        subprocess.run([streaming, __file__, "write-mds", str(folder)], check=True)


def write_mds(folder: str) -> None:
    from streaming import MDSWriter

    rows = np.fromfile(Path(folder) / "train.bin", np.uint16).reshape(-1, T)
    with MDSWriter(out=str(Path(folder) / "mds"), columns={"input_ids": f"ndarray:uint16:{T}"}) as writer:
        for row in rows:
            writer.write({"input_ids": row})


# Contestants: each takes the folder and returns a function that makes one batch


def ours(folder: Path, who: str, count: int):
    from pretrain.objectives import OBJECTIVES
    from pretrain.order.phases import Phase
    from pretrain.order.stream import Windows
    from pretrain.processes.memory import keep_freed
    from pretrain.shards import Shards
    from pretrain.shards.word_starts import StoredWordStarts
    from tests.helpers.batches import batches as batches_of

    keep_freed()  # the processes of our loader do it too
    shards = Shards(folder / "shards")
    wanted = OURS[who.removesuffix(", as trained")]
    config = OBJECTIVES[wanted["kind"]].Config(**wanted)
    windows = Windows(shards, T, 1, StoredWordStarts(shards))
    if who in TRAINED:
        phase = Phase(steps=10**6, seq_len=T, batch_tokens=count * T)
        batches, number = batches_of({"": windows}, config, [phase], 1, count), iter(range(10**6))
        return lambda: batches[next(number)].batch
    objective = OBJECTIVES[config.kind](config, shards.specials, shards.vocab_size, T, 1)
    rng = np.random.default_rng(0)

    def batch():
        starts = rng.integers(1, shards.tokens - T, count)
        return objective.batch(windows.rows(starts, T, objective.wants_words), starts)

    return batch


def nanogpt(folder: Path, who: str, count: int):
    """Copy random windows row by row from a flat file, mapped anew for each batch, as nanoGPT's train.py does."""
    import torch

    def batch():
        data = np.memmap(folder / "train.bin", dtype=np.uint16, mode="r")
        starts = torch.randint(len(data) - T, (count,))
        x = torch.stack([torch.from_numpy(data[i : i + T].astype(np.int64)) for i in starts])
        y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + T].astype(np.int64)) for i in starts])
        return x, y

    return batch


def hf_datasets(folder: Path, who: str, count: int):
    import datasets

    data = datasets.load_from_disk(str(folder / "rows")).with_format("torch")
    rng = np.random.default_rng(0)
    return lambda: data[rng.integers(0, len(data), count).tolist()]["input_ids"]


def streaming(folder: Path, who: str, count: int):
    import torch
    from streaming import StreamingDataset
    from torch.utils.data import DataLoader

    data = StreamingDataset(local=str(folder / "mds"), shuffle=True, batch_size=count)
    made = iter(DataLoader(data, batch_size=count, drop_last=True))

    def batch():
        nonlocal made
        try:
            ids = next(made)["input_ids"]
        except StopIteration:
            made = iter(DataLoader(data, batch_size=count, drop_last=True))
            ids = next(made)["input_ids"]
        return ids.to(torch.int64)

    return batch


def hf_collator(folder: Path, who: str, count: int):
    import datasets
    from transformers import AutoTokenizer, DataCollatorForLanguageModeling

    tokenizer = AutoTokenizer.from_pretrained(str(folder / "tokenizer"))
    words, form = "whole words" in who, "np" if "NumPy" in who else "pt"
    collator = DataCollatorForLanguageModeling(
        tokenizer, mlm_probability=0.15, whole_word_mask=words, return_tensors=form
    )
    data = datasets.load_from_disk(str(folder / "rows"))
    if "datasets" in who:
        rng = np.random.default_rng(0)
        data = data.with_format("torch")
        return lambda: collator([data[int(i)] for i in rng.integers(0, len(data), count)])
    rows = []
    for ids in data[:count]["input_ids"]:
        row = {"input_ids": ids}
        if words:  # the collator joins tokens whose offsets touch
            tokens = tokenizer.convert_ids_to_tokens(ids)
            ends = np.cumsum([2 if token.startswith("##") else 3 for token in tokens])
            row["offset_mapping"] = [(int(end) - 2, int(end)) for end in ends]
        rows.append(row)
    return lambda: collator([dict(row) for row in rows])


def contestant(who: str):
    known = {"nanoGPT": nanogpt, "HF datasets, torch": hf_datasets, "MosaicML": streaming, "HF": hf_collator}
    return next((make for name, make in known.items() if who.startswith(name)), ours)


def measure(who: str, folder: str, windows: str) -> None:
    """Measure one contestant in this process and print its rate."""
    import torch

    torch.set_num_threads(1)
    batch = contestant(who)(Path(folder), who, int(windows))
    for _ in range(WARM):
        batch()
    made, began = 0, time.process_time()
    while time.process_time() - began < SECONDS:
        for _ in range(10):
            batch()
        made += 10
    print(json.dumps({"m_tokens_per_cpu_s": made * int(windows) * T / 1e6 / (time.process_time() - began)}))


# Figures


def rounds_of(folder: Path, windows: int, arguments: argparse.Namespace) -> list[dict[str, dict]]:
    others = [] if arguments.only else [*CAUSAL, *MASKED, *WORDS]
    contestants = [*OURS, *TRAINED, *others]
    rounds = []
    for _ in range(arguments.rounds):
        found = {}
        for who in contestants:
            python = arguments.streaming_python if who.startswith("MosaicML") else sys.executable
            if python:
                command = [python, __file__, "measure", who, str(folder), str(windows)]
                done = subprocess.run(command, env=os.environ | ONE_THREAD, stdout=subprocess.PIPE, check=True)
                found[who] = json.loads(done.stdout.splitlines()[-1])
        rounds.append(found)
    return rounds


def result(name: str, text: Path, windows: int, rounds: list[dict[str, dict]]) -> dict:
    figure = "m_tokens_per_cpu_s"
    beside = {"ours, causal": CAUSAL, "ours, masked": MASKED, "ours, masked words": WORDS}
    ratios = {
        f"{mine} / {other}": ratio(rounds, mine, other, figure)
        for mine, others in beside.items()
        for other in others
        if other in rounds[0]
    }
    shown = {
        "text": name,
        "file": text.name,
        "batch": f"{windows} x {T}",
        "contestants": medians(rounds),
        "ratios": ratios,
    }
    print(json.dumps(shown, indent=1), flush=True)
    return shown


def main() -> None:
    if sys.argv[1:2] == ["measure"]:
        return measure(*sys.argv[2:])
    if sys.argv[1:2] == ["write-mds"]:
        return write_mds(*sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+", help="NAME=FILE")
    parser.add_argument("--megabytes", type=float, default=50)
    parser.add_argument("--windows", nargs="+", type=int, default=[32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streaming-python")
    parser.add_argument("--only", choices=["ours"])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    head = {"command": " ".join(["python benchmarks/loader.py", *sys.argv[1:]]), "date": str(date.today())}
    head |= {"machine": machine(), "versions": versions("numpy", "torch", "transformers", "datasets")}
    if arguments.streaming_python:
        said = "from importlib.metadata import version as v; print(v('mosaicml-streaming'), v('torch'), v('numpy'))"
        done = subprocess.run([arguments.streaming_python, "-c", said], capture_output=True, text=True, check=True)
        head["versions"]["mosaicml-streaming, with its torch and numpy"] = done.stdout.strip()
    head["rounds"] = arguments.rounds
    head["load_average_before"] = [round(load, 1) for load in os.getloadavg()]
    head["figures"] = "[median, least, most] over rounds, in millions of tokens per CPU second"
    results = []
    for name, text in pairs(arguments.texts).items():
        with tempfile.TemporaryDirectory() as scratch:
            prepare(text, Path(scratch), arguments.megabytes, arguments.streaming_python)
            for windows in arguments.windows:
                results.append(result(name, text, windows, rounds_of(Path(scratch), windows, arguments)))
    arguments.out.write_text(json.dumps({**head, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
