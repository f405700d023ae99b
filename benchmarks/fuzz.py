"""Damage every kind of file that the project reads, and count the outcomes.

    python benchmarks/fuzz.py --inputs 20000 --seed 1 --out benchmarks/results/fuzz.json

The program first makes a small world: text, vocabularies, shards, words, work folders of killed builds, a run with
checkpoints, an export, a task and Megatron pairs. For each input it then damages one file (bits, lengths, structure,
types, huge numbers, NULs, lone surrogates, versions, another file's contents) and reads it in a forked process, in the
way the stage that a user would start reads it. The outcomes are:

    the same    the file was read, and its contents, as training would see them, are unchanged
    another     the file was read with other contents. This is allowed for text, tasks and configurations, which have no
                hash, and for an index that was signed again: whoever used the old index notices its new fingerprint
    refused     one of our errors: what is wrong, where, what was found, what to do
    traceback, died, hang, changed    faults, of which there must be none. `changed`: a file with a hash was read with
                other contents
"""

import argparse
import hashlib
import json
import os
import platform
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pretrain import cleaning, config, shards, tokenizer
from pretrain.cleaning import stage as cleaning_stage
from pretrain.corpus import open_corpus
from pretrain.errors import PretrainError, refusal
from pretrain.finetune.task import read_task
from pretrain.shards import Shards, import_megatron, segment, word_starts
from pretrain.shards import stage as shards_stage
from pretrain.shards.writer import PieceWriter
from pretrain.storage.index import checksum, fingerprint
from pretrain.tools import check_files

LIMIT_S = 60.0  # of one input
FAULTS = ("traceback", "died", "hang", "changed")
SAMPLE = Path(__file__).resolve().parent.parent / "data" / "sample"


@dataclass(frozen=True)
class Kind:
    """Some files, and the function that reads them. It returns a text that identifies their contents."""

    name: str
    files: list[Path]
    read: Callable[[], str]
    hashed: bool = True  # the files have hashes: reading them with other contents is a fault
    weight: float = 1.0  # the relative share of the inputs
    signs: bool = False  # give most damaged indexes a valid fingerprint again, as if another release had written them
    consumes: bool = False  # reading removes the files, as a build does with the work folder of a killed build


# Damage


def damaged(data: bytes, name: str, others: list[Path], rng: random.Random) -> bytes:
    """Return the bytes of a file after one random kind of damage."""
    structured = name.endswith((".json", ".jsonl", ".yaml"))
    ways = [_flipped, _cut, _longer, _zeroed, _repeated, _inserted]
    if structured:
        ways += [_restructured] * 12 + [_respelled] * 4
    if others:
        ways.append(lambda data, rng: rng.choice(others).read_bytes())
    if name.endswith(".jsonl"):
        ways.append(_one_line)
    return rng.choice(ways)(data, rng)


def _flipped(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data or b"\0")
    for _ in range(rng.choice([1, 1, 1, 8])):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.choice([0, 1, len(data) // 2, max(0, len(data) - 1), rng.randrange(len(data) + 1)])]


def _longer(data: bytes, rng: random.Random) -> bytes:
    return data + rng.choice([b"\0", b"\n", b"\0" * 4096, rng.randbytes(100), data[:1000]])


def _zeroed(data: bytes, rng: random.Random) -> bytes:
    at, size = rng.randrange(len(data) + 1), rng.choice([1, 8, 512, 4096])
    return data[:at] + bytes(len(data[at : at + size])) + data[at + size :]


def _repeated(data: bytes, rng: random.Random) -> bytes:
    at, size = rng.randrange(len(data) + 1), rng.choice([1, 8, 100, 4096])
    return data[:at] + data[at : at + size] + data[at:]


def _inserted(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    what = [
        b"\0",
        b"\xff\xfe",
        b"\xed\xa0\x80",
        b"\xef\xbb\xbf",
        b"\r",
        b"{",
        b'"',
        b"\\ud800",
        b"9" * 5000,
        b"[" * 3000,
    ]
    return data[:at] + rng.choice(what) + data[at:]


NUMBERS = [0, -1, 1, 99, 2**31, 2**63, 2**64, -(2**63), 10**40, 1.5, -0.0, 1e308, float("inf"), float("nan")]
TEXTS = ["", "\0", "x", "\ud800", "\udcff", "../../x", "/", "a" * 300, "a" * 5000, "null", "1e5", "0" * 64]
VALUES = [None, True, False, *NUMBERS, *TEXTS, [], {}, [[]], [None], {"": None}, {"a": {"b": []}}, ["x"] * 50]


def _restructured(data: bytes, rng: random.Random) -> bytes:
    """Remove or rename one value of a JSON or YAML file, or give it another type or a value far out of range."""
    try:
        text = data.decode("utf-8")
        lines = text.splitlines() if text.count("\n") > 1 and not text.startswith(("{\n", "[\n")) else [text]
        number = rng.randrange(len(lines)) if lines and lines[0].startswith("{") else 0
        value = json.loads(lines[number]) if lines[0].startswith(("{", "[")) else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError, IndexError):
        return _flipped(data, rng)
    place, key = _place(value, rng)
    if place is None:
        return json.dumps(rng.choice(VALUES)).encode()
    way = rng.randrange(5)
    if way == 0 and isinstance(place, dict):
        del place[key]
    elif way == 1 and isinstance(place, dict):
        place[rng.choice([f"{key}x", "format", "stage", "\ud800", ""])] = place.pop(key)
    elif way == 2 and isinstance(place[key], int) and not isinstance(place[key], bool):
        place[key] += rng.choice([1, -1, 97, -(10**6), 2**40])
    elif way == 3:
        place[key] = [place[key]]
    else:
        place[key] = rng.choice(VALUES)
    if lines[0].startswith(("{", "[")):
        lines[number] = json.dumps(value)
        return ("\n".join(lines) + "\n").encode()
    return yaml.safe_dump(value).encode(errors="surrogatepass")


def _place(value: object, rng: random.Random) -> tuple[object, object]:
    """Choose a container inside of `value` and one of its keys; (None, None) if there is none."""
    found = (None, None)
    while isinstance(value, (dict, list)) and value:
        key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        found = (value, key)
        if rng.random() < 0.3:
            break
        value = value[key]
    return found


def _respelled(data: bytes, rng: random.Random) -> bytes:
    """Replace one number or word of the text by something that a parser may stumble over."""
    spots = list(re.finditer(rb"-?\d+(?:\.\d+)?|true|false|null|\"[^\"\n]*\"", data))
    if not spots:
        return _flipped(data, rng)
    spot = rng.choice(spots)
    what = [
        b"1" + b"0" * 5000,
        b"NaN",
        b"-Infinity",
        b"1e999",
        b"0x10",
        b"!!python/object:os.system {}",
        b"&a [*a]",
        b"[" * 2000,
    ]
    what += [b"'", b"\t", b'"\\u0000"', b'"\\ud83d"', b"- " * 500, b"{{}}", b"<<: *x"]
    return data[: spot.start()] + rng.choice(what) + data[spot.end() :]


def _one_line(data: bytes, rng: random.Random) -> bytes:
    lines = data.splitlines(keepends=True) or [b"\n"]
    at = rng.randrange(len(lines))
    what = [
        b"\n",
        b"[]\n",
        b"{}\n",
        b"null\n",
        b"1\n",
        b'{"text": 1}\n',
        b'{"a": ' * 200 + b"1" + b"}" * 200 + b"\n",
        lines[0] * 2,
    ]
    return b"".join([*lines[:at], rng.choice(what), *lines[at + 1 :]])


def signed(data: bytes) -> bytes:
    """Give a damaged index the fingerprint and checksum of its new contents. Unreadable bytes stay as they are."""
    try:
        index = json.loads(data)
        index["fingerprint"] = fingerprint(index)
        index["checksum"] = checksum(index)
        return json.dumps(index).encode()
    except (ValueError, TypeError, AttributeError, RecursionError):
        return data


# Readers


def _digest(*parts: object) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part.tobytes() if isinstance(part, np.ndarray) else repr(part).encode(errors="surrogatepass"))
    return found.hexdigest()


def read_tokenizer(folder: Path) -> str:
    check_files.check(folder)
    opened = tokenizer.open_tokenizer(folder)
    return _digest(
        *opened.encode_batch(["In the beginning", "床前明月光 [SEP] 12"]), opened.specials, opened.vocab_size
    )


def read_shards(folder: Path) -> str:
    found = []
    for side in ("train", "heldout"):
        opened = Shards(folder, side)
        found += [opened.gather(np.arange(0, opened.tokens - 64, 64), 64), opened.unigram(), opened.specials]
        found += [opened.origin(opened.documents - 1), opened.span(opened.documents - 1), opened.raw_bytes]
        opened.check_unchanged()
    if check_files.check(folder):
        raise PretrainError("check_files names a fault")
    return _digest(*found)


def read_words(folder: Path, vocabulary: Path) -> str:
    opened = word_starts.open_words(Shards(folder), tokenizer.open_tokenizer(vocabulary))
    return _digest(opened.gather(np.arange(0, opened.tokens - 64, 64), 64))


def read_text(path: Path) -> str:
    corpus = open_corpus(path)
    documents = [(document.text, document.side) for document in corpus.documents()]
    corpus.fingerprint()
    return _digest(*documents)


def build(stage: Callable, values: config.Config) -> str:
    """Let a stage finish the work of a killed run, and return a digest of its output."""
    out = Path(values.out)
    index = stage(values)
    files = {
        path.name: path.read_bytes() for path in out.iterdir() if path.name.startswith(("train", "heldout", "part"))
    }
    return _digest(index["fingerprint"], *sorted(files.items()))


def read_pair(prefix: Path, vocabulary: Path, out: Path) -> str:
    values = {"pairs": [str(prefix)], "tokenizer": str(vocabulary), "out": str(out), "heldout_fraction": 0.5}
    return import_megatron.run(config.build(import_megatron.ImportConfig, values, "fuzz"))["fingerprint"]


def read_config(name: str, path: Path) -> str:
    from pretrain.cli import config_of

    return repr(config.load(config_of(name), path))


# The world


def _write_text(folder: Path) -> Path:
    """Write a small corpus in several formats, and return its recipe."""
    recipe = folder / "recipe.yaml"
    folder.mkdir(parents=True)
    texts = {name: (SAMPLE / f"{name}.txt").read_text(encoding="utf-8").split("\n\n")[:40] for name in ("en", "zh")}
    (folder / "en.txt").write_text("\n\n".join(texts["en"]), encoding="utf-8")
    lines = "".join(json.dumps({"text": text, "n": n}) + "\n" for n, text in enumerate(texts["zh"]))
    (folder / "zh.jsonl").write_text(lines, encoding="utf-8")
    import gzip

    (folder / "en.txt.gz").write_bytes(gzip.compress("\n\n".join(texts["en"][:10]).encode()))
    sources = [{"name": "en", "language": "en", "files": ["en.txt"]}, {"name": "zh", "files": ["zh.jsonl"]}]
    sources += [{"name": "zip", "files": ["en.txt.gz"], "bad_records": "skip"}]
    sources += _table(folder, texts["en"])
    recipe.write_text(yaml.safe_dump({"name": "t", "heldout_fraction": 0.2, "sources": sources}), encoding="utf-8")
    return recipe


def _run_stages(root: Path, corpus: str) -> None:
    """Make everything that the data stages make of a corpus, a task, and a pair of Megatron's files."""
    for kind, size in (("bert", 2000), ("byte", 900)):
        values = {"corpus": corpus, "out": str(root / f"tok-{kind}"), "kind": kind, "vocab_size": size, "plot": False}
        tokenizer.run(config.build(tokenizer.TokenizerConfig, values, "fuzz"))
        values = {"corpus": corpus, "tokenizer": values["out"], "out": str(root / f"sh-{kind}"), "piece_tokens": 9000}
        shards.run(config.build(shards.ShardsConfig, values, "fuzz"))
    segment.run(segment.WordsConfig(shards=str(root / "sh-bert"), tokenizer=str(root / "tok-bert")))
    cleaned = {
        "corpus": corpus,
        "out": str(root / "clean"),
        "duplicates": {"near": {"use": False}},
        "part_bytes": 20000,
    }
    cleaning.run(config.build(cleaning.CleanConfig, cleaned, "fuzz"))
    opened = Shards(root / "sh-byte")
    documents = [opened.document(number) for number in range(opened.documents)]
    with PieceWriter(root, "pair", np.uint16, []) as writer:
        writer.add(np.concatenate(documents))
        writer.close(len(documents), lambda: [{"length": np.array(list(map(len, documents)), np.int32)}])
    task = shutil.copytree(next(path for path in sorted((SAMPLE / "tasks").iterdir()) if path.is_dir()), root / "task")
    for split in task.glob("*.jsonl"):
        split.write_text("".join(split.read_text(encoding="utf-8").splitlines(keepends=True)[:60]), encoding="utf-8")


def world(root: Path) -> list[Kind]:
    """Make small examples of every file that is read before a run exists."""
    recipe = _write_text(root / "text")
    _run_stages(root, str(recipe))
    bert, byte, kinds = root / "tok-bert", root / "tok-byte", []

    def files(folder: Path) -> list[Path]:
        return sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))

    for folder, read in ((bert, read_tokenizer), (byte, read_tokenizer)):
        kinds.append(Kind("tokenizer", files(folder), lambda folder=folder, read=read: read(folder)))
        kinds.append(Kind("tokenizer index", [folder / "index.json"], kinds[-1].read, signs=True))
    for name in ("sh-bert", "sh-byte"):
        kinds.append(Kind("shards", files(root / name), lambda name=name: read_shards(root / name), weight=2))
        kinds.append(Kind("shards index", [root / name / "index.json"], kinds[-1].read, signs=True))
    held = root / "sh-bert" / "words"
    kinds.append(Kind("words", files(held), lambda: read_words(root / "sh-bert", bert), weight=0.7))
    kinds.append(Kind("words index", [held / "index.json"], kinds[-1].read, signs=True, weight=0.5))
    kinds.append(Kind("cleaned corpus", files(root / "clean"), lambda: read_text(root / "clean"), weight=0.7))
    kinds.append(Kind("cleaned index", [root / "clean" / "index.json"], kinds[-1].read, signs=True, weight=0.5))
    kinds.append(Kind("text and recipe", files(recipe.parent), lambda: read_text(recipe), hashed=False, weight=2))
    kinds.append(Kind("recipe", [recipe], lambda: read_text(recipe), hashed=False))
    kinds.append(Kind("task", files(root / "task"), lambda: repr(read_task(root / "task")), hashed=False))
    pair, out = [root / "pair.bin", root / "pair.idx"], root / "imported"
    kinds.append(Kind("Megatron pair", pair, lambda: read_pair(root / "pair", byte, out), hashed=False, weight=0.1))
    kinds += _configurations(root, torch=False)
    return kinds + _killed(root, str(recipe), byte)


def _table(folder: Path, texts: list[str]) -> list[dict]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        return []
    pyarrow.parquet.write_table(pyarrow.table({"text": texts[:10]}), folder / "en.parquet")
    return [{"name": "table", "files": ["en.parquet"]}]


def _configurations(root: Path, torch: bool) -> list[Kind]:
    """The sample configurations of stages that need torch, or of the other stages. They are only read, not run."""
    (root / "configs").mkdir(exist_ok=True)
    kinds = []
    for path in sorted((SAMPLE.parent.parent / "configs" / "sample").glob("*.yaml")):
        stage = path.stem.split("-")[0]
        stage = {"encoder": "pretrain", "decoder": "pretrain", "compare": "compare_tokenizers"}.get(stage, stage)
        if (stage in ("pretrain", "export")) != torch:
            continue
        copy = Path(shutil.copy(path, root / "configs" / path.name))
        read = lambda stage=stage, copy=copy: read_config(stage, copy)  # noqa: E731
        kinds.append(Kind("configuration", [copy], read, hashed=False, weight=0.15))
    return kinds


def _killed(root: Path, corpus: str, byte: Path) -> list[Kind]:
    """Work folders of builds that were killed while they wrote. Every input lets a build continue from one of them."""
    found = []
    values = {"corpus": corpus, "tokenizer": str(byte), "out": str(root / "k" / "sh"), "chunk_bytes": 8000}
    values |= {"piece_tokens": 5000, "shuffle_seed": 5}
    built = config.build(shards.ShardsConfig, values, "fuzz")
    _interrupt(shards_stage, "write_piece", lambda: shards.run(built))
    work = root / "k" / ".sh.work"
    found.append(
        Kind("killed shards build", _below(work), lambda: build(shards.run, built), weight=0.15, consumes=True)
    )
    values = {"corpus": corpus, "out": str(root / "k" / "cl"), "chunk_bytes": 20000, "part_bytes": 20000}
    values |= {"duplicates": {"near": {"use": False}}}
    clean = config.build(cleaning.CleanConfig, values, "fuzz")
    _interrupt(cleaning_stage, "write_part", lambda: cleaning.run(clean))
    work = root / "k" / ".cl.work"
    found.append(Kind("killed cleaning", _below(work), lambda: build(cleaning.run, clean), weight=0.02, consumes=True))
    return found


def _below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _interrupt(module: object, name: str, work: Callable[[], object]) -> None:
    """Do `work` in a forked process and end that process, like kill -9, at the third call of `module.name`."""
    pid = os.fork()
    if not pid:
        real, calls = getattr(module, name), []

        def call(*arguments: object) -> object:
            if len(calls) == 2:
                os._exit(0)  # like kill -9: nothing is tidied up
            calls.append(1)
            return real(*arguments)

        setattr(module, name, call)
        work()
        os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0, f"{name} was not called three times"


def _train(root: Path) -> dict:
    """Make a finished run and its export; return the run's configuration."""
    from pretrain import export
    from pretrain.training.config import RunConfig
    from pretrain.training.run import run as pretrain

    model = {"causal": True, "layers": 1, "width": 32, "heads": 4, "kv_heads": 2, "head_width": 8, "mlp_width": 32}
    model |= {"max_positions": 32, "norm": "rmsnorm", "norm_position": "pre", "norm_eps": 1e-6, "positions": "rope"}
    model |= {"mlp": "swiglu", "bias": False, "qk_norm": True}
    values = {
        "out": str(root / "run"), "seed": 7,
        "data": {"shards": str(root / "sh-byte"), "tokenizer": str(root / "tok-byte")},
        "model": model, "objective": {"kind": "causal_lm"}, "optim": {"lr": 1e-3, "warmup_steps": 2},
        "phases": [{"steps": 6, "seq_len": 32, "batch_tokens": 64}], "engine": {"micro_batch": 2},
        "evaluate": {"max_tokens": 256}, "checkpoint": {"every_steps": 3}, "log_every": 2,
    }  # fmt: skip
    made = config.build(RunConfig, values, "fuzz")
    exported = export.ExportConfig(checkpoint=str(root / "run"), dialect="qwen3", out=str(root / "export"))
    for work in (lambda: pretrain(made), lambda: export.run(exported)):  # in a child: who has trained cannot fork
        pid = os.fork()
        if not pid:
            work()
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0, "the run or its export failed"
    return values


def trained(root: Path) -> list[Kind]:
    """Make a finished run and its export; resume, export and generation read them. Needs torch."""
    import torch

    from pretrain.prompting import generate
    from pretrain.tools import explain
    from pretrain.training import checkpoint
    from pretrain.training.config import RunConfig
    from pretrain.training.run import run as pretrain

    torch.set_num_threads(1)
    values = _train(root)
    longer = values | {"phases": [{**values["phases"][0], "steps": 7}]}

    def weights() -> str:
        folder = checkpoint.newest(root / "run", speak=False)
        opened = checkpoint.Checkpoint(folder or root / "run")
        check_files.check(folder)
        return _digest(*(tensor.numpy() for tensor in opened.weights().values()))

    def resume() -> str:
        with tempfile.TemporaryDirectory() as copy:
            shutil.copytree(root / "run", f"{copy}/run")
            run = config.build(RunConfig, {**longer, "out": f"{copy}/run"}, "fuzz")
            pretrain(run)
            opened = checkpoint.Checkpoint(Path(f"{copy}/run/checkpoints/step_00000007"))
            return _digest(*(tensor.numpy() for tensor in opened.weights().values()))

    def look() -> str:
        status = explain.main([str(root / "run"), "--step", "2"])
        if status == 2:
            raise PretrainError("refused")
        return str(status)

    def prompted() -> str:
        values = {"model": str(root / "export"), "prompts": ["In the"], "max_new_tokens": 8, "temperature": 0}
        return _digest(generate.run(generate.GenerateConfig(**values)))

    newest = _below(root / "run/checkpoints/step_00000006")
    logs = [path for path in (root / "run").iterdir() if path.is_file()]
    index = [next(path for path in newest if path.name == "index.json")]
    exported = [path for path in _below(root / "export") if path.suffix in (".json", ".safetensors")]
    return [
        *_configurations(root, torch=True),
        Kind("checkpoint", newest, weights, hashed=False),  # damaged: the one before is read
        Kind("checkpoint index", index, weights, hashed=False, signs=True),
        Kind("resume from a damaged checkpoint", newest, resume, weight=0.12),
        Kind("resume from a damaged index", index, resume, weight=0.08, signs=True),
        Kind("resume with damaged records", logs, resume, weight=0.12),
        Kind("explain a run", [*logs, *newest], look, hashed=False, weight=0.08),
        Kind("export", exported, prompted, weight=0.12),
        Kind("export index", [root / "export" / "index.json"], prompted, weight=0.08, signs=True),
    ]


# Running


def attempt(read: Callable[[], str], place: Path) -> tuple[str, str]:
    """Read in a forked process with a time limit. Return the outcome, and the digest or message."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(ours)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        os.environ["TMPDIR"] = str(place)
        try:
            found = ["read", read()]
        except PretrainError as error:
            found = ["refused", str(error)]
        except BaseException as error:
            if isinstance(error, Exception) and refusal(error) is not None:
                found = ["refused", str(error)]
            else:
                last = traceback.extract_tb(error.__traceback__)[-4:]
                where = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(last))
                found = ["traceback", f"{type(error).__name__}: {str(error)[:150]} at {where}"]
        os.write(theirs, json.dumps(found).encode()[:60_000])
        os._exit(0)
    os.close(theirs)
    deadline = time.monotonic() + LIMIT_S
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    try:
        with open(ours, "rb") as pipe:
            said = pipe.read()
    except TimeoutError:
        said = b""
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    if time.monotonic() >= deadline:
        os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if time.monotonic() >= deadline:
        return "hang", f"more than {LIMIT_S:.0f} s"
    return tuple(json.loads(said)) if said else ("died", f"exit status {status}")


def fuzz(
    root: Path, kinds: list[Kind], inputs: int, seed: int, until: float = float("inf")
) -> tuple[dict[str, Counter], list[dict]]:
    """Read `inputs` damaged files, or fewer if time.monotonic() reaches `until`. Return the number of each outcome by
    kind, and every fault."""
    signal.signal(signal.SIGALRM, _late)
    before = {path: path.read_bytes() for kind in kinds for path in kind.files}
    scratch = root / "scratch"
    scratch.mkdir(exist_ok=True)
    clean = _snapshot(root)
    right = {}
    for number, kind in enumerate(kinds):
        outcome, right[number] = attempt(kind.read, scratch)
        assert outcome == "read", (kind.name, outcome, right[number])
        _restore(root, clean, before)
    counts: dict[str, Counter] = {}
    faults = []
    rng = random.Random(seed)
    chosen = rng.choices(range(len(kinds)), [kind.weight for kind in kinds], k=inputs)
    for turn, number in enumerate(chosen):
        if time.monotonic() > until:
            break
        kind = kinds[number]
        path = rng.choice(kind.files)
        others = [other for other in kind.files if other != path]
        data = damaged(before[path], path.name, others, rng)
        signs = kind.signs and rng.random() < 0.8
        data = signed(data) if signs else data
        path.write_bytes(data)
        outcome, said = attempt(kind.read, scratch)
        if outcome == "read":
            same = said == right[number]
            outcome = "the same" if same else "changed" if kind.hashed and not signs else "another"
        counts.setdefault(kind.name, Counter())[outcome] += 1
        if outcome in FAULTS:
            faults.append({"input": turn, "kind": kind.name, "file": path.name, "outcome": outcome, "said": said})
            print(json.dumps(faults[-1])[:400], flush=True)
        taken = [other for other in kind.files if other == path or kind.consumes or not other.exists()]
        _restore(root, clean, {other: before[other] for other in taken})
        if (turn + 1) % 1000 == 0:
            print(f"{turn + 1:,} of {inputs:,} inputs, {len(faults)} faults", flush=True)
    return counts, faults


def _late(number: int, frame: object) -> None:
    raise TimeoutError


def _snapshot(root: Path) -> set[Path]:
    return set(root.rglob("*"))


def _restore(root: Path, clean: set[Path], before: dict[Path, bytes]) -> None:
    """Restore the files in `before`, and remove every file that the reader made."""
    for path in sorted(_snapshot(root) - clean, reverse=True):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    for path, data in before.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def one(inputs: int, seed: int, trained_share: float, only: str, until: float) -> dict:
    """Do the share of one process: it makes its own world and its own run."""
    counts: dict[str, Counter] = {}
    faults = []
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as root:
        slow = round(inputs * trained_share)
        for make, share in ((world, inputs - slow), (trained, slow)):
            kinds = [kind for kind in make(Path(root)) if only in kind.name]
            if kinds and share:
                found, wrong = fuzz(Path(root), kinds, share, seed, until)
                counts = {name: counts.get(name, Counter()) + found.get(name, Counter()) for name in counts | found}
                faults += wrong
    return {"counts": {name: dict(found) for name, found in counts.items()}, "faults": faults}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=1, help="processes; number n uses the seed --seed + n")
    parser.add_argument("--minutes", type=float, default=1e6, help="stop after so many minutes and report")
    parser.add_argument("--only", default="", help="only kinds with this in their name")
    parser.add_argument(
        "--trained", type=float, default=0.03, help="share of the (slow) inputs that need a trained run"
    )
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    begun = time.monotonic()
    each = arguments.inputs // arguments.processes
    with tempfile.TemporaryDirectory() as results:
        children = {}
        for number in range(arguments.processes):
            pid = os.fork()
            if not pid:
                seed, until = arguments.seed + number, begun + 60 * arguments.minutes
                found = one(each, seed, arguments.trained, arguments.only, until)
                Path(results, str(number)).write_text(json.dumps(found))
                os._exit(0)
            children[pid] = number
        while children:
            pid, status = os.wait()
            assert status == 0, f"process {children.pop(pid)} failed"
            children.pop(pid, None)
        parts = [json.loads(path.read_text()) for path in sorted(Path(results).iterdir())]
    counts: dict[str, Counter] = {}
    for part in parts:
        for name, found in part["counts"].items():
            counts.setdefault(name, Counter()).update(found)
    total = sum(counts.values(), Counter())
    found = {
        "command": f"python benchmarks/fuzz.py {' '.join(sys.argv[1:])}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "inputs": sum(total.values()),
        "seconds": round(time.monotonic() - begun),
        "outcomes": dict(sorted(total.items())),
        "kinds": {name: dict(sorted(found.items())) for name, found in sorted(counts.items())},
        "faults": [fault for part in parts for fault in part["faults"]],
    }
    print(json.dumps(found, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    sys.exit(1 if found["faults"] else 0)


if __name__ == "__main__":
    main()
