"""Measure the stage shards and other programs that make token files from text, in turn; write the figures as JSON.

    python benchmarks/shards.py en=corpora/en.jsonl.zst zh=corpora/zh.txt.gz --megabytes 10 100 \\
        --megatron CHECKOUT --megatron-python PYTHON --out benchmarks/results/shards.json

A text is .txt (a blank line ends a document) or .jsonl (key `text`), plain, .gz or .zst, or several such files in
sequence: en=wiki.jsonl.zst,books.jsonl.zst. All contestants get the same documents as plain JSON lines, and the same
WordPiece vocabulary of 30,000 entries. It is trained on the first 20 MB of each text, unless `--vocabularies FOLDER`
has it from an earlier call:

    ours         launch/shards.py. It also splits off held-out documents, keeps origins, and hashes its output. `ours, 1
                 and 1` runs two builds of one worker at once; it shows how well the machine runs a second process
    Megatron-LM  its tools/preprocess_data.py with a Hugging Face tokenizer. PYTHON is an interpreter that can import
                 the checkout (torch, transformers, triton). Without --megatron it is left out
    datasets     `map` with the fast tokenizer, then `group_texts` to blocks of 512, as run_mlm.py does; Arrow files
    nanoGPT      `map` document by document, then one memmap, as its prepare.py does

`--only ours` leaves the others out. Every measurement is a whole process with its children. The contestants take turns,
round after round, and figures are medians over rounds. The time that a contestant needs for a single document counts as
its start: `mb_per_cpu_s` leaves the start out, `mb_per_cpu_s_with_start` includes it. Ratios are taken within a round.
The number of times that each id occurs, without the template's ids, shows whether all contestants make the same tokens;
`datasets` drops the end of every thousand documents.
"""

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from datetime import date
from functools import partial
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from benchmarks.measuring import (  # noqa: E402
    ONE_THREAD,
    at_once,
    documents,
    machine,
    medians,
    process,
    ratio,
    versions,
    write_recipe,
)

VOCABULARY, VOCABULARY_MEGABYTES, BLOCK = 30_000, 20, 512
TWICE = "ours, 1 and 1"
OFFLINE = ONE_THREAD | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
# The checkout imports typing.override, which came with Python 3.12.
MEGATRON = (
    "import runpy, sys, typing, typing_extensions; typing.override = typing_extensions.override\n"
    "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
)


def measure(arguments: argparse.Namespace, name: str, text: str, scratch: Path) -> list[dict]:
    """Measure one text; return one result for each size."""
    texts = [Path(file) for file in text.split(",")]
    tokenizer = Path(arguments.vocabularies or scratch) / f"{name}-bert"
    if not tokenizer.exists():
        _train(tokenizer, scratch, texts[0])
    contestants = _contestants(arguments)
    one = _write(scratch / "one", documents(texts[0], 0))
    _two_sides(one)
    for _, start in contestants:
        start(one, tokenizer, scratch / "out-one")  # not measured: some contestants compile code at their first start
    results = []
    for megabytes in arguments.megabytes:
        folder = _write(scratch / "corpus", _first(texts, megabytes))
        with open(folder / "text.jsonl", encoding="utf-8") as lines:
            sizes = [len(json.loads(line)["text"].encode("utf-8")) for line in lines]
        size = sum(sizes) / 1e6
        take = partial(_timed, one=one, folder=folder, tokenizer=tokenizer, scratch=scratch, size=size)
        rounds = [{who: take(who, start) for who, start in contestants} for _ in range(arguments.rounds)]
        results.append(
            {
                "text": name,
                "file": ", ".join(path.name for path in texts),
                "megabytes": round(size, 1),
                "documents": len(sizes),
                "contestants": medians(rounds),
                "ratios": _ratios(rounds),
                "ids": {who: found["ids"] for who, found in rounds[0].items()},
                "ids of a contestant equal in all rounds": all(
                    round_[who]["ids"] == rounds[0][who]["ids"] for round_ in rounds for who in round_
                ),
            }
        )
        print(json.dumps(results[-1], ensure_ascii=False, indent=1), flush=True)
    return results


def _timed(who: str, start, *, one: Path, folder: Path, tokenizer: Path, scratch: Path, size: float) -> dict:
    """Run a contestant; return its cost without its start, its rates, and a digest of its ids."""
    begun = start(one, tokenizer, scratch / "out-one")
    found = start(folder, tokenizer, scratch / "out")
    size *= 2 if who == TWICE else 1
    for figure in ("cpu_s", "wall_s"):
        found[f"start_{figure}"] = begun[figure]
        found[f"mb_per_{figure}"] = size / (found[figure] - begun[figure])
        found[f"mb_per_{figure}_with_start"] = size / found[figure]
    return found | {"ids": _ids(who, scratch / "out", tokenizer)}


def _ratios(rounds: list[dict]) -> dict[str, float]:
    found = {}
    for figure, said in (("mb_per_wall_s", "wall"), ("mb_per_wall_s_with_start", "wall with start")):
        found[f"{said}, ours with 2 workers / 1"] = ratio(rounds, "ours, 2", "ours, 1", figure)
        found[f"{said}, two builds at once / one"] = ratio(rounds, "ours, 1 and 1", "ours, 1", figure)
    found["MB per CPU second, ours with 2 workers / 1"] = ratio(rounds, "ours, 2", "ours, 1", "mb_per_cpu_s")
    for who in rounds[0]:
        if who.endswith(", 1") and not who.startswith("ours"):
            found[f"MB per CPU second, ours / {who}"] = ratio(rounds, "ours, 1", who, "mb_per_cpu_s")
            found[f"the same, with start, ours / {who}"] = ratio(rounds, "ours, 1", who, "mb_per_cpu_s_with_start")
    return found


# Contestants: each takes a folder with text.jsonl and recipe.yaml, a tokenizer, and the prefix of its output


def _contestants(arguments: argparse.Namespace) -> list[tuple]:
    found = [("ours", _ours), ("datasets", partial(_theirs, "grouped")), ("nanoGPT", partial(_theirs, "flat"))]
    if arguments.megatron:
        found.insert(1, ("Megatron-LM", partial(_megatron, arguments)))
    taken = [(who, start) for who, start in found if arguments.only in (None, who)]
    made = [(f"{who}, {workers}", partial(start, workers)) for who, start in taken for workers in (1, 2)]
    return [*made[:2], (TWICE, _ours_twice), *made[2:]]


def _ours(workers: int, folder: Path, tokenizer: Path, out: Path) -> dict:
    return process(_our_command(workers, folder, tokenizer, out), OFFLINE)


def _ours_twice(folder: Path, tokenizer: Path, out: Path) -> dict:
    return at_once([_our_command(1, folder, tokenizer, place) for place in (out, out.with_name("out-too"))], OFFLINE)


def _our_command(workers: int, folder: Path, tokenizer: Path, out: Path) -> list[str]:
    config = {"corpus": str(folder / "recipe.yaml"), "tokenizer": str(tokenizer), "out": str(out), "workers": workers}
    config["replace"] = True
    if folder.name == "one":
        config |= {"corpus": str(folder / "two.yaml"), "chunk_bytes": 1024}
    path = folder / f"{out.name}.yaml"
    path.write_text(json.dumps(config))
    return [sys.executable, str(ROOT / "launch/shards.py"), str(path)]


def _two_sides(folder: Path) -> None:
    """Write a recipe with one document on each side, each in a chunk of its own: an empty side is an error."""
    from pretrain.corpus.sides import side_of

    text = json.loads((folder / "text.jsonl").read_text(encoding="utf-8"))["text"]
    text = text if len(text) >= 1024 else text * 1024
    side = side_of(text, 0.01)
    other = next(words for n in range(10**6) if side_of(words := f"variant {n} " * 128, 0.01) != side)
    (folder / "two.jsonl").write_text("".join(json.dumps({"text": found}) + "\n" for found in (text, other)))
    write_recipe(folder, "two.jsonl").rename(folder / "two.yaml")
    write_recipe(folder, "text.jsonl")


def _megatron(arguments: argparse.Namespace, workers: int, folder: Path, tokenizer: Path, out: Path) -> dict:
    tool = arguments.megatron.resolve() / "tools/preprocess_data.py"
    options = ["--input", folder / "text.jsonl", "--output-prefix", out, "--workers", workers, "--append-eod"]
    options += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer]
    command = [arguments.megatron_python, "-W", "ignore", "-c", MEGATRON, tool, *options]
    return process(list(map(str, command)), OFFLINE | {"PYTHONPATH": str(arguments.megatron.resolve())})


def _theirs(form: str, workers: int, folder: Path, tokenizer: Path, out: Path) -> dict:
    shutil.rmtree(out.with_name("cache"), ignore_errors=True)  # or `map` would find its earlier result
    cache = {"HF_DATASETS_CACHE": str(out.with_name("cache"))}
    command = [sys.executable, __file__, form, folder / "text.jsonl", tokenizer / "tokenizer.json", out, workers]
    return process(list(map(str, command)), OFFLINE | cache)


def their_grouped(file: str, tokenizer: str, out: str, workers: str) -> None:
    """Do the same as run_mlm.py of transformers without `line_by_line`: a thousand documents at a time."""
    fast, dataset = _opened(file, tokenizer)
    processes = int(workers) if int(workers) > 1 else None
    tokenised = dataset.map(
        lambda batch: fast(batch["text"], return_special_tokens_mask=True),
        batched=True,
        num_proc=processes,
        remove_columns=["text"],
    )

    def grouped(batch):
        joined = {key: [item for row in rows for item in row] for key, rows in batch.items()}
        whole = len(joined["input_ids"]) // BLOCK * BLOCK
        return {key: [row[n : n + BLOCK] for n in range(0, whole, BLOCK)] for key, row in joined.items()}

    tokenised.map(grouped, batched=True, num_proc=processes).save_to_disk(out)


def their_flat(file: str, tokenizer: str, out: str, workers: str) -> None:
    """Do the same as prepare.py of nanoGPT, with our vocabulary and with [SEP] for its end of text."""
    import numpy as np

    fast, dataset = _opened(file, tokenizer)

    def encoded(example):
        ids = [*fast.encode(example["text"], add_special_tokens=False), fast.sep_token_id]
        return {"ids": ids, "len": len(ids)}

    tokenised = dataset.map(encoded, remove_columns=["text"], num_proc=int(workers) if int(workers) > 1 else None)
    array = np.memmap(f"{out}.bin", np.uint16, "w+", shape=(int(np.sum(tokenised["len"], dtype=np.uint64)),))
    done, batches = 0, min(1024, len(tokenised))
    for number in range(batches):
        batch = tokenised.shard(batches, number, contiguous=True).with_format("numpy")
        ids = np.concatenate(batch["ids"])
        array[done : done + len(ids)] = ids
        done += len(ids)
    array.flush()


def _opened(file: str, tokenizer: str):
    from datasets import Features, Value, load_dataset
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_file=tokenizer, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]"
    )
    return fast, load_dataset("json", data_files=file, split="train", features=Features({"text": Value("string")}))


def _ids(who: str, out: Path, tokenizer: Path) -> dict:
    """Count the ids, and hash the number of times that each id occurs. The template's ids are left out."""
    import hashlib

    import numpy as np

    specials = json.loads((tokenizer / "index.json").read_bytes())["specials"]
    if who.startswith("ours"):
        counts = sum(np.load(out / f"{side}.unigram.npy") for side in ("train", "heldout"))
    elif who.startswith("datasets"):
        from datasets import load_from_disk

        counts = np.bincount(load_from_disk(str(out)).data["input_ids"].combine_chunks().values.to_numpy())
    else:
        path = out.with_name("out_text_document.bin") if who.startswith("Megatron") else out.with_suffix(".bin")
        counts = np.bincount(np.fromfile(path, np.uint16))
    counts = np.pad(counts, (0, 1 << 16))[: 1 << 16]
    counts[[specials["cls"], specials["sep"]]] = 0
    return {"tokens": int(counts.sum()), "counts": hashlib.sha256(counts.astype("<i8").tobytes()).hexdigest()[:16]}


# Text and vocabulary


def _first(texts: list[Path], megabytes: float) -> Iterator[str]:
    """Yield the documents of all files in sequence until their UTF-8 text reaches `megabytes`."""
    size = 0
    for text in chain.from_iterable(documents(path, math.inf) for path in texts):
        yield text
        size += len(text.encode("utf-8"))
        if size >= megabytes * 1e6:
            return


def _write(folder: Path, texts) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "text.jsonl", "w", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    write_recipe(folder, "text.jsonl")
    return folder


def _train(tokenizer: Path, scratch: Path, text: Path) -> None:
    folder = _write(scratch / "vocabulary", documents(text, VOCABULARY_MEGABYTES))
    config = {"corpus": str(folder / "recipe.yaml"), "out": str(tokenizer), "kind": "bert", "plot": False}
    (folder / "tokenizer.yaml").write_text(json.dumps(config | {"vocab_size": VOCABULARY}))
    process([sys.executable, str(ROOT / "launch/tokenizer.py"), str(folder / "tokenizer.yaml")], {})


def main() -> None:
    forms = {"grouped": their_grouped, "flat": their_flat}
    if sys.argv[1:2] and sys.argv[1] in forms:
        return forms[sys.argv[1]](*sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+", help="NAME=FILE")
    parser.add_argument("--megabytes", nargs="+", type=float, default=[10, 100])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--vocabularies")
    parser.add_argument("--megatron", type=Path, help="a checkout of Megatron-LM")
    parser.add_argument("--megatron-python", default=sys.executable)
    parser.add_argument("--megatron-commit", default="unknown")
    parser.add_argument("--only", choices=["ours"])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    head = {
        "command": " ".join(["python benchmarks/shards.py", *sys.argv[1:]]),
        "date": str(date.today()),
        "machine": machine(),
        "versions": versions("tokenizers", "numpy", "datasets", "transformers")
        | {"Megatron-LM": arguments.megatron and arguments.megatron_commit},
        "rounds": arguments.rounds,
        "load_average_before": [round(load, 1) for load in os.getloadavg()],
        "figures": "[median, least, most] over rounds; rates in millions of bytes of text",
    }
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, text in (value.split("=", 1) for value in arguments.texts):
            results += measure(arguments, name, text, Path(scratch))
    arguments.out.write_text(json.dumps({**head, "results": results}, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    main()
