"""Compare the stage tokenizer and the encoder with the library `tokenizers`, in turn; write the figures as JSON.

    python benchmarks/tokenizer.py train en=corpora/en.jsonl.zst --out benchmarks/results/tokenizer-train.json
    python benchmarks/tokenizer.py encode en=corpora/en.jsonl.zst zh=corpora/zh.jsonl.zst \\
        --megabytes 10 100 --out benchmarks/results/tokenizer-encode.json

A text is .txt (a blank line ends a document) or .jsonl (key `text`), plain, .gz or .zst. `encode` trains a vocabulary
of each kind on the first 20 MB of each text, unless `--vocabularies FOLDER` has them from an earlier call.

Every measurement is a process of its own. The contestants take turns, round after round, and figures are medians over
rounds. For `train`, CPU seconds are those of the whole process and its children; for `encode`, those of the calls to
the encoder, on one thread. `cold` is a first pass, which builds the encoder's tables; `warm` is a second pass. Ratios
are taken within a round.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # so that no file of this folder shadows a library

from benchmarks.measuring import (  # noqa: E402
    ONE_THREAD,
    documents,
    machine,
    medians,
    pairs,
    process,
    ratio,
    versions,
    write_recipe,
)

BATCH_CHARACTERS = 1 << 20  # as in the stage shards
VOCABULARY, VOCABULARY_MEGABYTES = 30_000, 20


# Text


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
    """Write the text file that both trainers read, and a recipe that holds out 1 % of its documents."""
    folder.mkdir(parents=True)
    with open(folder / "text.txt", "w", encoding="utf-8") as file:
        for text in texts:
            file.write("\n".join(line for line in text.split("\n") if line.strip()) + "\n\n")
    write_recipe(folder, "text.txt")
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
            result["contestants"] = medians(rounds)
            result["ratios"] = {
                "CPU, tokenizers / ours": ratio(rounds, "tokenizers, 1 thread", "ours, 1 worker", "cpu_s"),
                "wall on two": ratio(rounds, "tokenizers, 2 threads", "ours, 2 workers", "wall_s"),
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
        found[f"ours, {workers} worker{'s' * (workers > 1)}"] = _made(command, ONE_THREAD, out / "tokenizer.json")
    for threads in (1, 2):
        out = scratch / "theirs.json"
        command = [sys.executable, __file__, "their-trainer", str(file), str(vocab_size), str(out)]
        environment = ONE_THREAD | {"RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true"}
        found[f"tokenizers, {threads} thread{'s' * (threads > 1)}"] = _made(command, environment, out)
    return found


def _made(command: list[str], environment: dict[str, str], product: Path) -> dict:
    """Run a command; return its cost and the hash of the vocabulary that it made."""
    product.unlink(missing_ok=True)
    return {**process(command, environment), "vocabulary": hashlib.sha256(product.read_bytes()).hexdigest()}


def their_trainer(file: str, vocab_size: str, out: str) -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    # Its alphabet has 1,000 characters by default; ours keeps all characters.
    trainer = trainers.WordPieceTrainer(
        vocab_size=int(vocab_size), special_tokens=specials, limit_alphabet=100_000, show_progress=False
    )
    tokenizer.train([file], trainer)
    tokenizer.save(out)


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
    """Measure one contestant in this process, ours in two passes, and print the figures."""
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
    from pretrain.processes.memory import keep_freed
    from pretrain.tokenizer import open_tokenizer

    keep_freed()  # the stages do it too
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
    contestants = medians(rounds)
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
            f"{who} / tokenizers": ratio(rounds, who, "tokenizers", "mb_per_cpu_s")
            for who in contestants
            if who != "tokenizers"
        },
    }


# Figures


def _peak_mb() -> float:
    """The peak memory of this process. `getrusage` would start from the peak of its parent."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024


def _shown(result: dict) -> dict:
    print(json.dumps(result, ensure_ascii=False, indent=1), flush=True)
    return result


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
    arguments.texts = pairs(arguments.texts)
    command = " ".join(["python benchmarks/tokenizer.py", *sys.argv[1:]])
    head = {
        "command": command,
        "date": str(date.today()),
        "machine": machine(),
        "versions": versions("tokenizers", "numpy", "tokie"),
    }
    head |= {"rounds": arguments.rounds, "load_average_before": [round(load, 1) for load in os.getloadavg()]}
    head["figures"] = "[median, least, most] over rounds; rates in millions of bytes per CPU second"
    results = arguments.section(arguments)
    arguments.out.write_text(json.dumps({**head, "results": results}, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    main()
