"""Mistakes of a user on the real command lines: each gives a helpful message and exit status 2, and writes nothing."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from pretrain import cli, shards
from pretrain.config import build
from pretrain.training import checkpoint
from pretrain.training.config import RunConfig
from pretrain.training.run import run as pretrain
from tests.conftest import ROOT, SAMPLE, Prepared, run_values
from tests.helpers.entries import entries

SHORT = {"phases": [{"steps": 2, "seq_len": 32, "batch_tokens": 128}], "evaluate": {"max_tokens": 64}}


@dataclass(frozen=True)
class Work:
    """A folder with a configuration for each stage. Each configuration is valid and writes to `out`."""

    folder: Path
    prepared: Prepared
    trained: Path

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def values(self, stage: str) -> dict:
        places = {"corpus": str(self.prepared.corpus), "out": str(self.out)}
        match stage:
            case "tokenizer":
                return {**places, "kind": "bert", "vocab_size": 2048}
            case "shards":
                return {**places, "tokenizer": str(self.prepared.tokenizer["bert"])}
            case "pretrain":
                return run_values(self.prepared, self.out, **SHORT)
            case "export":
                return {"checkpoint": str(self.trained), "dialect": "bert", "out": str(self.out)}

    def config(self, stage: str) -> Path:
        path = self.folder / f"{stage}.yaml"
        path.write_text(yaml.safe_dump(self.values(stage)), encoding="utf-8")
        return path

    def file(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        return path

    def copy(self, name: str, source: Path) -> Path:
        return shutil.copytree(source, self.folder / name)

    def resumed(self) -> None:
        """Copy a finished run to `out`, so that the configuration continues it."""
        self.copy("out", self.trained)


@pytest.fixture(scope="module")
def trained(prepared, tmp_path_factory) -> Path:
    """The folder of a run of two steps."""
    out = tmp_path_factory.mktemp("trained") / "run"
    pretrain(build(RunConfig, run_values(prepared, out, **SHORT), "test"))
    return out


@pytest.fixture
def work(prepared, trained, tmp_path) -> Work:
    return Work(tmp_path, prepared, trained)


def contents(path: Path) -> dict[str, bytes] | bytes | None:
    if path.is_dir():
        return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}
    return path.read_bytes() if path.exists() else None


def altered(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


# Damage: each function damages something and returns overrides for the command line.


def invalid_utf8(work: Work) -> list[str]:
    return [f"corpus={work.file('bad.txt', b'fine' + bytes(10) + b'line' + bytes([10, 10]) + b'caf' + bytes([233]))}"]


def empty_heldout(work: Work) -> list[str]:
    return [f"corpus={work.file('one.txt', 'document 1')}"]


def corpus_of(content: str | bytes = "", **source) -> Callable[[Work], list[str]]:
    """Use a recipe with one source `s`, and write `content` to `bad.jsonl` and `bad.parquet`."""

    def damage(work: Work) -> list[str]:
        for name in ("bad.jsonl", "bad.parquet"):
            work.file(name, content)
        recipe = {"name": "bad", "sources": [{"name": "s", **source}]}
        return [f"corpus={work.file('bad.yaml', yaml.safe_dump(recipe))}"]

    return damage


def truncated_shards(work: Work) -> list[str]:
    truncated(work.copy("copy", work.prepared.shards["bert"]) / "train-00000.bin")
    return [f"data.shards={work.folder / 'copy'}"]


def altered_shards(work: Work) -> list[str]:
    altered(work.copy("copy", work.prepared.shards["bert"]) / "heldout-00000.bin")
    return [f"data.shards={work.folder / 'copy'}"]


def altered_tokenizer(work: Work) -> list[str]:
    altered(work.copy("copy", work.prepared.tokenizer["bert"]) / "tokenizer.json")
    return [f"tokenizer={work.folder / 'copy'}"]


def other_corpus(work: Work) -> list[str]:
    work.resumed()
    recipe = {"name": "other", "heldout_fraction": 0.1, "sources": [{"name": "all", "files": [str(SAMPLE / "zh.txt")]}]}
    corpus, tokenizer = work.file("other.yaml", yaml.safe_dump(recipe)), work.prepared.tokenizer["bert"]
    shards.run(shards.ShardsConfig(corpus=str(corpus), tokenizer=str(tokenizer), out=str(work.folder / "other")))
    return [f"data.shards={work.folder / 'other'}"]


def resumed(*overrides: str) -> Callable[[Work], list[str]]:
    def damage(work: Work) -> list[str]:
        work.resumed()
        return list(overrides)

    return damage


def damaged_checkpoint(work: Work) -> list[str]:
    work.resumed()
    altered(work.out / "checkpoints/step_00000002/exp_avg.safetensors")
    return []


def out_holds_something_else(work: Work) -> list[str]:
    work.out.mkdir()
    (work.out / "thesis.txt").write_text("years of work", encoding="utf-8")
    return []


def out_is_a_file(work: Work) -> list[str]:
    work.file("out", "years of work")
    return []


def out_is_another_stage(work: Work) -> list[str]:
    work.copy("out", work.prepared.tokenizer["bert"])
    return []


def nothing_but(*overrides: str) -> Callable[[Work], list[str]]:
    return lambda work: [override.format(work=work, prepared=work.prepared) for override in overrides]


def corpora_of(*entries: str, also: tuple[str, ...] = ()) -> Callable[[Work], list[str]]:
    """Replace data.shards by data.corpora. Each entry is the inside of a YAML mapping, without its braces."""
    listed = ", ".join(f"{{{{{entry}}}}}" for entry in entries)
    return nothing_but("data.shards=null", f"data.corpora=[{listed}]", *also)


BERT, BYTE = "shards: {prepared.shards[bert]}, weight: 1", "shards: {prepared.shards[byte]}, weight: 1"
TWICE = "seed: 1\nout: a\nseed: 2\n"
WIDE = ("model.max_positions=262144", "phases.0.seq_len={0}", "phases.0.batch_tokens={0}", "engine.micro_batch=1")

ROWS = [  # the mistake, the stage, the damage, and fragments of the message: where, found, what to do
    ("an unknown key", "pretrain", nothing_but("optim.warmup_step=3"),
     ["override 'optim.warmup_step=3'", "did you mean optim.warmup_steps?"]),
    ("an unknown key of another stage", "shards", nothing_but("vocab_size=3"),
     ["unknown key vocab_size", "known here: corpus, tokenizer, out, piece_tokens"]),
    ("a malformed value", "tokenizer", nothing_but("vocab_size=8k"),
     ["override 'vocab_size=8k'", "vocab_size = '8k'", "valid integer"]),
    ("an override that is none", "shards", nothing_but("out"),
     ["an override is written key=value, not 'out'"]),
    ("a missing corpus", "tokenizer", nothing_but("corpus={work.folder}/nosuch.txt"),
     ["no such text file", "{folder}/nosuch.txt"]),
    ("a missing corpus", "shards", nothing_but("corpus={work.folder}/nosuch.yaml"),
     ["no such configuration file", "looked for: {folder}/nosuch.yaml"]),
    ("a corpus of no known format", "shards", lambda work: [f"corpus={work.file('a.csv', 'a,b')}"],
     ["cannot tell the format", "{folder}/a.csv", "set format: to one of txt, jsonl"]),
    ("an empty corpus", "tokenizer", lambda work: [f"corpus={work.file('none.txt', '')}"],
     ["needs train documents", "{folder}/none.txt has 0 train", "add documents"]),
    ("an empty corpus", "shards", lambda work: [f"corpus={work.file('none.txt', '')}"],
     ["the train side of the corpus is empty", "{folder}/none.txt has 0 documents", "add text"]),
    ("an empty held-out side", "tokenizer", empty_heldout,
     ["held-out ones", "{folder}/one.txt has 1 train and 0 held-out", "set heldout_fraction"]),
    ("an empty held-out side", "shards", empty_heldout,
     ["the heldout side of the corpus is empty", "{folder}/one.txt has 1 documents", "heldout_fraction 0.01"]),
    ("invalid UTF-8", "tokenizer", invalid_utf8,
     ["not valid UTF-8", "{folder}/bad.txt, line 3, byte 4 of the line: 0xe9", "iconv"]),
    ("invalid UTF-8", "shards", invalid_utf8,
     ["not valid UTF-8", "{folder}/bad.txt, line 3, byte 4 of the line: 0xe9", "iconv"]),
    ("a pattern without files", "shards", corpus_of(files=["*.txt"]),
     ["no text file matches a pattern", "{folder}/*.txt, of source 's'", "relative to the recipe"]),
    ("a file that comes twice", "tokenizer", corpus_of(files=["bad.jsonl", "*.jsonl"]),
     ["a file comes twice in a source", "{folder}/bad.jsonl, of source 's'", "name it once"]),
    ("broken JSON", "shards", corpus_of('{"text": "a"}\n{"text": ', files=["bad.jsonl"]),
     ["a line is not JSON", "{folder}/bad.jsonl, line 2: ", "or set bad_records: skip"]),
    ("a record without text", "tokenizer", corpus_of('{"body": "a"}', files=["bad.jsonl"]),
     ["no text under 'text'", "{folder}/bad.jsonl, line 1: its keys: body", "set field:"]),
    ("a record that is too long", "shards", corpus_of("x" * 99, files=["bad.jsonl"], max_record_bytes=64),
     ["longer than max_record_bytes", "{folder}/bad.jsonl, line 1: 99 bytes, max_record_bytes is 64"]),
    ("a damaged table", "shards", corpus_of("PAR1", files=["bad.parquet"]),
     ["a parquet file is damaged", "{folder}/bad.parquet: ", "copy or compress it again"]),
    ("a dataset out of reach", "tokenizer", corpus_of(dataset={"name": "no/such"}),
     ["the dataset no/such cannot be read", "offline mode", "HF_ENDPOINT names a mirror"]),
    ("files and a dataset at once", "shards", corpus_of(dataset={"name": "a/b"}, files=["bad.jsonl"]),
     ["{folder}/bad.yaml: the source 's' needs either files: or dataset:"]),
    ("a vocabulary smaller than the alphabet", "tokenizer", nothing_but("vocab_size=100"),
     ["vocab_size", "100", "alphabet_min_count"]),
    ("a vocabulary smaller than the bytes", "tokenizer", nothing_but("kind=byte", "vocab_size=500"),
     ["vocab_size", "500", "515"]),
    ("no tokenizer", "shards", nothing_but("tokenizer={work.folder}/nosuch"),
     ["{folder}/nosuch: there is no such folder", "launch/tokenizer.py"]),
    ("an altered tokenizer", "shards", altered_tokenizer,
     ["{folder}/copy is not the tokenizer that was published", "tokenizer.json: altered"]),
    ("shards in place of the tokenizer", "shards", nothing_but("tokenizer={prepared.shards[bert]}"),
     ["is not of the stage tokenizer", 'says stage "shards"']),
    ("no shards", "pretrain", nothing_but("data.shards={work.folder}/nosuch"),
     ["{folder}/nosuch: there is no such folder", "launch/shards.py"]),
    ("a file in place of shards", "pretrain", nothing_but("data.shards={prepared.corpus}"),
     ["there is no such folder", "launch/shards.py"]),
    ("shards of another tokenizer", "pretrain", nothing_but("data.tokenizer={prepared.tokenizer[byte]}"),
     ["built with another tokenizer", "{bert}", "{byte}", "rebuild the shards"]),
    ("truncated shards", "pretrain", truncated_shards,
     ["{folder}/copy/train-00000.bin has", "truncated?", "rebuild"]),
    ("altered shards", "pretrain", altered_shards,
     ["{folder}/copy was altered", "heldout-00000.bin: altered", "rebuild"]),
    ("a window longer than the model", "pretrain",
     nothing_but("phases.0.seq_len=128", "phases.0.batch_tokens=256"),
     ["seq_len = 128 is longer than model.max_positions = 64"]),
    ("a window longer than the train side", "pretrain", nothing_but(*(text.format(262144) for text in WIDE)),
     ["the train side is shorter than one block", "data.block_tokens = 262,144", "add text, lower data.block_tokens"]),
    ("a window longer than the held-out side", "pretrain", nothing_but(*(text.format(32768) for text in WIDE)),
     ["the heldout side is shorter than one window", "seq_len = 32,768", "hold out a larger fraction"]),
    ("one corpus and several", "pretrain", nothing_but("data.corpora=[{{name: en, shards: a, weight: 1}}]"),
     ["data.shards (one corpus) or data.corpora (several) says what to read: both are given"]),
    ("a mixture of an unnamed corpus", "pretrain", nothing_but("phases.0.mixture={{en: 1}}"),
     ["phases: mixture names corpora, but data.shards has no name: use data.corpora"]),
    ("a mixture with a misspelt name", "pretrain",
     corpora_of(f"name: wiki, {BERT}", also=("phases.0.mixture={{wki: 1}}",)),
     ["mixture has 'wki'", "no name in data.corpora: did you mean wiki?"]),
    ("a corpus that nothing draws from", "pretrain",
     corpora_of(f"name: a, {BERT}", "name: b, shards: {prepared.shards[byte]}"),
     ["nothing draws from 'b'", "give it a weight, or name it in phases: mixture"]),
    ("weights that are too fine", "pretrain", corpora_of(f"name: a, {BERT}000", f"name: b, {BYTE}0001"),
     ["adds up to 11001 in lowest terms, the most is 4096", "for example {{a: 372, b: 3724}}"]),
    ("two corpora of one name", "pretrain", corpora_of(f"name: a, {BERT}", f"name: a, {BYTE}"),
     ["data.corpora: two corpora are named 'a'"]),
    ("corpora of different tokenizers", "pretrain", corpora_of(f"name: a, {BERT}", f"name: b, {BYTE}"),
     ["the corpora a and b were built with different tokenizers", "says {bert}", "says {byte}", "rebuild one"]),
    ("the same shards twice", "pretrain", corpora_of(f"name: a, {BERT}", f"name: b, {BERT}"),
     ["the corpora a and b are the same shards", "list it once"]),
    ("a corpus that would be seen too often", "pretrain", corpora_of(f"name: a, {BERT}, max_epochs: 0.001"),
     ["a corpus would be seen too often", "data.corpora.0, a: 256 of the run's 256 tokens", "max_epochs = 0.001",
      "lower its weight, run fewer steps, add text, or raise max_epochs"]),
    ("a batch of broken windows", "pretrain", nothing_but("phases.0.batch_tokens=100"),
     ["batch_tokens = 100", "seq_len = 32", "take 96 or 128"]),
    ("a batch that does not divide among the ranks", "pretrain", nothing_but("engine.micro_batch=3"),
     ["engine.micro_batch takes 3 of them at once, on 1 ranks 3", "set batch_tokens to 96 or 192"]),
    ("an objective without its mask token", "pretrain",
     nothing_but("data.shards={prepared.shards[byte]}", "data.tokenizer={prepared.tokenizer[byte]}"),
     ["needs a vocabulary with a mask token", "pad, unk, eod", "objective.kind=causal_lm"]),
    ("an objective that the model cannot serve", "pretrain", nothing_but("model.causal=true"),
     ["objective.kind = masked_lm needs model.causal = false"]),
    ("a model that its dialect cannot express", "pretrain", nothing_but("export.dialect=qwen3"),
     ["cannot be exported as qwen3", "model.norm = layernorm: qwen3 has rmsnorm"]),
    ("an unknown dialect", "pretrain", nothing_but("export.dialect=bret"),
     ["export.dialect = 'bret'", "'bert', 'electra', "]),
    ("an unknown dialect", "export", nothing_but("dialect=bret"),
     ["dialect = 'bret'", "'bert', 'electra', "]),
    ("a model that the dialect cannot express", "export", nothing_but("dialect=qwen3"),
     ["cannot be exported as qwen3", "model.norm = layernorm: qwen3 has rmsnorm"]),
    ("no checkpoint", "export", nothing_but("checkpoint={work.folder}/nosuch"),
     ["{folder}/nosuch", "expected a run folder"]),
    ("an output folder that is a file", "pretrain", out_is_a_file,
     ["the output folder cannot be made", "{folder}/out is a file", "choose another out="]),
    ("bf16 without ZeRO", "pretrain", nothing_but("engine.precision=bf16", "engine.zero_stage=0"),
     ["engine.precision = bf16 needs engine.zero_stage = 1, 2 or 3, found 0"]),
    ("another seed", "pretrain", resumed("seed=8", "optim.lr=2e-3"),
     ["{folder}/out was begun with other settings", "seed: 7 → 8", "optim.lr: 0.001 → 0.002", "choose another out="]),
    ("another objective and model", "pretrain",
     resumed("objective={kind: causal_lm}", "model.causal=true"),
     ["begun with other settings", "model.causal: False → True", "objective.kind: masked_lm → causal_lm"]),
    ("another corpus", "pretrain", other_corpus,
     ["{folder}/out was begun with other settings", "shards: this run began with {shards}", "{folder}/other has"]),
    ("a damaged checkpoint", "pretrain", damaged_checkpoint,
     ["step_00000002 was altered", "exp_avg.safetensors: altered", "remove {folder}/out/checkpoints/step_00000002"]),
    *(("an output folder that holds something else", stage, out_holds_something_else,
       ["the output folder holds something else", "{folder}/out", "choose another out="])
      for stage in ("tokenizer", "shards", "pretrain", "export")),
    *(("an output folder that is a file", stage, out_is_a_file,
       ["the output folder cannot be made", "{folder}/out is a file", "choose another out="])
      for stage in ("tokenizer", "shards", "pretrain", "export")),
    ("an output folder of another stage", "shards", out_is_another_stage,
     ["the output folder holds something else", "has the result of stage tokenizer", "choose another out="]),
    ("an output folder that cannot be made", "shards", nothing_but("out=/proc/nosuch/out"),
     ["the output folder cannot be made", "/proc/nosuch", "choose another out="]),
]  # fmt: skip


def name_of(row) -> str:
    wrong, stage, *_ = getattr(row, "values", row)
    return f"{stage}: {wrong}"


@pytest.mark.parametrize(("wrong", "stage", "damage", "fragments"), ROWS, ids=[name_of(row) for row in ROWS])
def test_the_message_helps_and_nothing_is_written(work, capsys, wrong, stage, damage, fragments):
    overrides = damage(work)
    before, beside = contents(work.out), entries(work.folder)
    config = work.config(stage)
    capsys.readouterr()
    assert cli.main(stage, [str(config), *overrides]) == 2
    said = capsys.readouterr().err
    head, error, message = said.rpartition("error: ")
    assert error and "Traceback" not in said
    progress = ("documents, ", "tokens, ", "reading on")
    assert all(any(said in line for said in progress) for line in head.splitlines()), "only progress comes before"
    names = {kind: shards.open_index(work.prepared.shards[kind])["tokenizer"][:12] for kind in ("bert", "byte")}
    names["shards"] = shards.open_index(work.prepared.shards["bert"])["fingerprint"][:12]
    for fragment in fragments:
        assert fragment.format(folder=work.folder, **names) in message
    assert contents(work.out) == before
    assert entries(work.folder) == sorted([*beside, config.name])


def test_every_configuration_of_the_table_works_as_it_stands(work, trained):
    """Otherwise a row of the table could fail for another reason than the one it names."""
    for stage in ("tokenizer", "shards"):
        assert cli.main(stage, [str(work.config(stage)), f"out={work.folder / stage}"]) == 0
    assert checkpoint.newest(trained).name == "step_00000002"
    build(RunConfig, work.values("pretrain"), "test")


@pytest.mark.parametrize(
    ("command", "fragments"),
    [
        (["launch/shards.py", "nosuch.yaml"], ["no such configuration file", "looked for: nosuch.yaml"]),
        (["launch/tokenizer.py", "{config}", "kind=brt"], ["override 'kind=brt': kind = 'brt'", "'bert' or 'byte'"]),
        (["launch/check_files.py", "nosuch"], ["nosuch: there is no such folder"]),
    ],
    ids=lambda value: value[0] if value[0].startswith("launch") else "",
)
def test_a_real_process_says_it_on_standard_error_and_exits_2(work, command, fragments):
    script, *rest = (part.format(config=work.config("tokenizer")) for part in command)
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *rest], cwd=work.folder, capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    assert all(fragment in done.stderr for fragment in fragments), done.stderr
    assert not work.out.exists()


def test_a_command_line_without_configuration_shows_its_form(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main("shards", [])
    assert ended.value.code == 2 and "launch/shards.py" in capsys.readouterr().err


def test_control_c_ends_a_stage_without_a_traceback(capsys):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs with SIGINT ignored
    assert cli.guarded(lambda: signal.raise_signal(signal.SIGINT)) == 130
    assert capsys.readouterr().err.startswith("interrupted")
