"""Measure the tokenizer stage and the encoder beside `tokenizers`, in turn, and write the figures as JSON.

    python benchmarks/tokenizer.py train en=corpora/en.jsonl.zst --out benchmarks/results/tokenizer-train.json
    python benchmarks/tokenizer.py encode en=corpora/en.jsonl.zst zh=corpora/zh.jsonl.zst \\
        --megabytes 10 100 --out benchmarks/results/tokenizer-encode.json

A text is .txt (a blank line ends a document) or .jsonl (key `text`), plain, .gz or .zst. `encode` trains a vocabulary
of each kind on the first 20 MB of each text, unless `--vocabularies FOLDER` has them from an earlier call.

Every measurement is a process of its own; the contestants take turns, round after round, and the figures are medians
over rounds. CPU seconds are those of a process and its children: of the whole process for `train`; for `encode` of the
calls alone, on one thread. `cold` is a first pass, building of tables included, `warm` a second one. Ratios are taken
within a round.
"""

import argparse
import gzip
import hashlib
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from datetime import date
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # this file has the name of a library

BATCH_CHARACTERS = 1 << 20  # as the shards stage
VOCABULARY, VOCABULARY_MEGABYTES = 30_000, 20
ONE_THREAD = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}


# Text


def documents(path: Path, megabytes: float) -> Iterator[str]:
    """The first documents of a file, as many as reach `megabytes` of UTF-8."""
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


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def write_corpus(folder: Path, texts: Iterable[str]) -> Path:
    """A recipe of one text file, one document in a hundred held out: what both trainers read."""
    folder.mkdir(parents=True)
    with open(folder / "text.txt", "w", encoding="utf-8") as file:
        for text in texts:
            file.write("\n".join(line for line in text.split("\n") if line.strip()) + "\n\n")
    recipe = {"name": "benchmark", "heldout_fraction": 0.01, "sources": [{"name": "text", "files": ["text.txt"]}]}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return folder / "text.txt"


# train


def train(arguments: argparse.Namespace) -> list[dict]:
    results = []
    for name, text in arguments.texts.items():
        for megabytes in arguments.megabytes:
            with tempfile.TemporaryDirectory() as scratch:
                file = write_corpus(Path(scratch) / "corpus", documents(text, megabytes))
                size = file.stat().st_size / 1e6
                rounds = [_train_round(file, Path(scratch), arguments.vocab_size) for _ in range(arguments.rounds)]
            result = {"text": name, "file": text.name, "megabytes": round(size, 1), "vocab_size": arguments.vocab_size}
            result["contestants"] = _medians(rounds)
            result["ratios"] = {
                "CPU, tokenizers / ours": _ratio(rounds, "tokenizers, 1 thread", "ours, 1 worker", "cpu_s"),
                "wall on two": _ratio(rounds, "tokenizers, 2 threads", "ours, 2 workers", "wall_s"),
            }
            made = {who: {round_[who]["vocabulary"] for round_ in rounds} for who in rounds[0]}
            result["different vocabularies made"] = {who: len(found) for who, found in made.items()}
            result["ours all equal"] = len(made["ours, 1 worker"] | made["ours, 2 workers"]) == 1
            results.append(_shown(result))
    return results


def _train_round(file: Path, scratch: Path, vocab_size: int) -> dict[str, dict]:
    found = {}
    for workers in (1, 2):
        out = scratch / "tokenizer"
        values = {"kind": "bert", "vocab_size": vocab_size, "workers": workers, "plot": False}
        config = scratch / "config.yaml"
        config.write_text(json.dumps({"corpus": str(file.parent / "recipe.yaml"), "out": str(out), **values}))
        command = [sys.executable, str(ROOT / "launch" / "tokenizer.py"), str(config)]
        found[f"ours, {workers} worker{'s' * (workers > 1)}"] = _process(command, ONE_THREAD, out / "tokenizer.json")
    for threads in (1, 2):
        out = scratch / "theirs.json"
        command = [sys.executable, __file__, "their-trainer", str(file), str(vocab_size), str(out)]
        environment = ONE_THREAD | {"RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true"}
        found[f"tokenizers, {threads} thread{'s' * (threads > 1)}"] = _process(command, environment, out)
    return found


def their_trainer(file: str, vocab_size: str, out: str) -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    # Its alphabet is 1,000 characters unless told otherwise; ours keeps all.
    trainer = trainers.WordPieceTrainer(
        vocab_size=int(vocab_size), special_tokens=specials, limit_alphabet=100_000, show_progress=False
    )
    tokenizer.train([file], trainer)
    tokenizer.save(out)


def _process(command: list[str], environment: dict[str, str], product: Path) -> dict:
    """What a whole process and its children took, and the hash of what they made."""
    product.unlink(missing_ok=True)
    started = time.perf_counter()
    process = subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return {
        "cpu_s": used.ru_utime + used.ru_stime,
        "wall_s": time.perf_counter() - started,
        "peak_mb_of_largest_process": used.ru_maxrss / 1024,
        "vocabulary": hashlib.sha256(product.read_bytes()).hexdigest(),
    }


# encode


def encode(arguments: argparse.Namespace) -> list[dict]:
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(arguments.vocabularies or scratch)
        for name, text in arguments.texts.items():
            for kind in arguments.kinds:
                tokenizer = folder / f"{name}-{kind}"
                if not tokenizer.exists():
                    _make(tokenizer, Path(scratch) / f"corpus-{name}-{kind}", text, kind)
                for megabytes in arguments.megabytes:
                    rounds = [_encode_round(tokenizer, text, megabytes) for _ in range(arguments.rounds)]
                    results.append(_shown(_encoded(name, text, kind, rounds)))
    return results


def _make(tokenizer: Path, scratch: Path, text: Path, kind: str) -> None:
    from pretrain.tokenizer import TokenizerConfig, run

    file = write_corpus(scratch, documents(text, VOCABULARY_MEGABYTES))
    corpus = str(file.parent / "recipe.yaml")
    run(TokenizerConfig(corpus=corpus, out=str(tokenizer), kind=kind, vocab_size=VOCABULARY, plot=False))


CONTESTANTS = ("ours", "tokenizers", "tokie")


def _encode_round(tokenizer: Path, text: Path, megabytes: float) -> dict[str, dict]:
    found = {}
    for who in CONTESTANTS:
        command = [sys.executable, __file__, "encode-one", who, str(tokenizer), str(text), str(megabytes)]
        done = subprocess.run(command, env=os.environ | ONE_THREAD, stdout=subprocess.PIPE, check=True)
        found |= json.loads(done.stdout)
    return found


def encode_one(who: str, tokenizer: str, text: str, megabytes: str) -> None:
    """One contestant in a process of its own: a pass, or for ours two. Prints what it took."""
    import numpy as np

    encoder = {"ours": _ours, "tokenizers": _theirs, "tokie": _tokie}[who](Path(tokenizer))
    specials = json.loads((Path(tokenizer) / "index.json").read_bytes())["specials"]
    template = [number for role, number in specials.items() if role in ("cls", "sep", "eod")]
    found = {}
    for label in ("ours, cold", "ours, warm") if who == "ours" else (who,) if encoder else ():
        cpu, size, tokens, whole, bare = 0.0, 0, 0, hashlib.sha256(), hashlib.sha256()
        for batch in _batches(documents(Path(text), float(megabytes))):
            before = time.process_time()
            ids, lengths = encoder(batch)
            cpu += time.process_time() - before
            size += sum(len(document.encode("utf-8")) for document in batch)
            tokens += len(ids)
            whole.update(ids.astype("<i4").tobytes() + lengths.astype("<i8").tobytes())
            bare.update(ids[~np.isin(ids, template)].astype("<i4").tobytes())
        found[label] = {
            "megabytes": size / 1e6,
            "tokens": tokens,
            "cpu_s": cpu,
            "mb_per_cpu_s": size / 1e6 / cpu,
            "peak_mb": _peak_mb(),
            "ids": whole.hexdigest(),
            "ids but for the template": bare.hexdigest(),
        }
    print(json.dumps(found))


def _ours(folder: Path):
    from pretrain.tokenizer import open_tokenizer

    return open_tokenizer(folder).encode_flat


def _theirs(folder: Path):
    import numpy as np
    import tokenizers

    engine = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    engine.encode_special_tokens = True

    def encoded(batch: list[str]):
        rows = [np.array(encoding.ids, np.int32) for encoding in engine.encode_batch_fast(batch)]
        return np.concatenate(rows), np.array([len(row) for row in rows])

    return encoded


def _tokie(folder: Path):
    try:
        import tokie
    except ImportError:
        return None
    engine = tokie.Tokenizer.from_json(str(folder / "tokenizer.json"))
    return lambda batch: engine.encode_batch_flat(batch, add_special_tokens=True)


def _encoded(name: str, text: Path, kind: str, rounds: list[dict]) -> dict:
    theirs = rounds[0]["tokenizers"]
    contestants = _medians(rounds)
    for who, found in contestants.items():
        for ids in ("ids", "ids but for the template"):
            found[f"{ids} equal"] = all(round_[who][ids] == theirs[ids] for round_ in rounds)
    return {
        "text": name,
        "file": text.name,
        "kind": kind,
        "megabytes": round(theirs["megabytes"], 1),
        "tokens": theirs["tokens"],
        "contestants": contestants,
        "ratios": {
            f"{who} / tokenizers": _ratio(rounds, who, "tokenizers", "mb_per_cpu_s")
            for who in contestants
            if who != "tokenizers"
        },
    }


# Figures


def _peak_mb() -> float:
    """Of this process; `getrusage` would begin with the peak of the parent."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024


def _medians(rounds: list[dict[str, dict]]) -> dict[str, dict]:
    """Median, least and most of every figure of every contestant."""
    found = {}
    for who, first in rounds[0].items():
        found[who] = {}
        for figure in (key for key, value in first.items() if isinstance(value, float)):
            values = [round_[who][figure] for round_ in rounds]
            found[who][figure] = [round(f(values), 3) for f in (statistics.median, min, max)]
    return found


def _ratio(rounds: list[dict[str, dict]], above: str, below: str, figure: str) -> float:
    return round(statistics.median(round_[above][figure] / round_[below][figure] for round_ in rounds), 2)


def _shown(result: dict) -> dict:
    print(json.dumps(result, ensure_ascii=False, indent=1), flush=True)
    return result


def _machine() -> dict:
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = next((line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")), "?")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return {"processor": model, "cores": os.cpu_count(), "memory_gb": round(memory), "system": platform.system()}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("tokenizers", "numpy", "tokie"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _pairs(values: list[str]) -> dict[str, Path]:
    return {name: Path(path) for name, path in (value.split("=", 1) for value in values)}


def main() -> None:
    if sys.argv[1:2] == ["their-trainer"]:
        return their_trainer(*sys.argv[2:])
    if sys.argv[1:2] == ["encode-one"]:
        return encode_one(*sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sections = parser.add_subparsers(required=True)
    for section, megabytes in ((train, [100]), (encode, [10, 100])):
        options = sections.add_parser(section.__name__)
        options.set_defaults(section=section)
        options.add_argument("texts", nargs="+", help="NAME=FILE")
        options.add_argument("--megabytes", nargs="+", type=float, default=megabytes)
        options.add_argument("--rounds", type=int, default=5)
        options.add_argument("--out", type=Path, required=True)
        if section is train:
            options.add_argument("--vocab-size", type=int, default=VOCABULARY)
        else:
            options.add_argument("--kinds", nargs="+", default=["bert", "byte"])
            options.add_argument("--vocabularies")
    arguments = parser.parse_args()
    arguments.texts = _pairs(arguments.texts)
    command = " ".join(["python benchmarks/tokenizer.py", *sys.argv[1:]])
    head = {"command": command, "date": str(date.today()), "machine": _machine(), "versions": _versions()}
    head |= {"rounds": arguments.rounds, "load_average_before": [round(load, 1) for load in os.getloadavg()]}
    head["figures"] = "[median, least, most] over rounds; rates in millions of bytes per CPU second"
    results = arguments.section(arguments)
    arguments.out.write_text(json.dumps({**head, "results": results}, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    main()
