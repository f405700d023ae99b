"""Every byte is compared with the index, and every folder with the folders that it was made with."""

import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain import tokenizer
from pretrain.config import build
from pretrain.errors import UserError
from pretrain.shards import Shards, ShardsConfig
from pretrain.shards import run as build_shards
from pretrain.storage.files import write_json
from pretrain.storage.index import read_index, write_index
from pretrain.storage.publish import publish
from pretrain.tools import check_files
from pretrain.training.config import RunConfig
from pretrain.training.run import run as pretrain
from tests.conftest import ROOT, Prepared, run_values


def published(folder: Path, stage: str, **made_with: Path) -> None:
    """Publish a folder as a later stage does, with its source. The contents of the folder do not matter here."""
    ((what, source),) = made_with.items()
    fingerprint = read_index(source, UserError, "")["fingerprint"]
    recorded = {"model" if what == "base" else what: str(source)}
    with publish(folder, stage, UserError) as aside:
        (aside / "model.safetensors").write_bytes(b"weights")
        write_index(aside, {"stage": stage, what: fingerprint, "recorded": recorded})


@pytest.fixture(scope="module")
def chain(prepared, tmp_path_factory) -> Path:
    """A folder of each stage: tokenizer, shards, a run of two checkpoints, and two in the form of later ones."""
    root = tmp_path_factory.mktemp("chain")
    corpus, vocabulary = str(prepared.corpus), str(root / "tokenizer")
    shutil.copytree(prepared.tokenizer["bert"], vocabulary)
    build_shards(ShardsConfig(corpus=corpus, tokenizer=vocabulary, out=str(root / "shards")))
    made = Prepared(prepared.corpus, {"bert": Path(vocabulary)}, {"bert": root / "shards"})
    short = {"phases": [{"steps": 2, "seq_len": 32, "batch_tokens": 64}], "checkpoint": {"every_steps": 1}}
    pretrain(build(RunConfig, run_values(made, root / "run", evaluate={"max_tokens": 64}, **short), "test"))
    published(root / "export", "export", checkpoint=root / "run/checkpoints/step_00000002")
    published(root / "finetuned", "finetune", base=root / "export")
    return root


@pytest.fixture
def damaged(chain, tmp_path) -> Path:
    """A copy of `chain` to be damaged. Its folders still name the folders of `chain` as their sources."""
    return shutil.copytree(chain, tmp_path / "copy")


def test_an_intact_folder_of_any_stage_is_one_line(chain, capsys):
    steps = [f"run/checkpoints/step_0000000{n}" for n in (1, 2)]
    stages = {"tokenizer": "tokenizer", "shards": "shards", **dict.fromkeys(steps, "checkpoint")}
    stages |= {"export": "export", "finetuned": "finetune"}
    paths = [chain / name for name in ("tokenizer", "shards", "run", "export", "finetuned")]
    assert check_files.main([str(path) for path in paths]) == 0
    expected = []
    for name, stage in stages.items():
        files = [path for path in (chain / name).iterdir() if path.name != "index.json"]
        size = sum(path.stat().st_size for path in files)
        expected.append(f"{chain / name}: {stage}, {len(files)} files, {size:,} bytes: intact")
    assert capsys.readouterr().out.splitlines() == expected


def test_every_fault_of_every_folder_is_named_at_once(damaged, capsys):
    (damaged / "tokenizer/vocab.txt").unlink()
    (damaged / "shards/train-00000.idx").write_bytes(b"")
    with open(damaged / "shards/heldout-00000.bin", "r+b") as file:
        file.seek(100)
        byte = file.read(1)
        file.seek(100)
        file.write(bytes([byte[0] ^ 1]))
    with open(damaged / "shards/train.unigram.npy", "ab") as file:
        file.write(b"more")
    (damaged / "shards/notes").mkdir()
    (damaged / "shards/notes/mine.txt").write_text("", encoding="utf-8")
    weights = damaged / "run/checkpoints/step_00000001/weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])

    assert check_files.main([str(damaged / name) for name in ("tokenizer", "run", "shards", "export")]) == 2
    said = capsys.readouterr()
    assert [line.split(":")[0] for line in said.out.splitlines()] == [
        str(damaged / "run/checkpoints/step_00000002"),
        str(damaged / "export"),
    ]
    error, *lines = said.err[said.err.index("error:") :].splitlines()
    assert error == "error: damaged, altered or missing: 3 of 5 folders"
    size = weights.stat().st_size
    unigram = (damaged / "shards/train.unigram.npy").stat().st_size
    index = read_index(damaged / "shards", UserError, "")["files"]
    assert sorted(line.strip() for line in lines[:-1]) == sorted(
        [
            f"{damaged}/tokenizer/vocab.txt: missing",
            f"{weights}: truncated, {size:,} bytes instead of {size + 1:,}",
            f"{damaged}/shards/heldout-00000.bin: altered, its SHA-256 differs",
            f"{damaged}/shards/train-00000.idx: truncated, 0 bytes instead of {index['train-00000.idx']['bytes']:,}",
            f"{damaged}/shards/train.unigram.npy: altered, {unigram:,} bytes instead of {unigram - 4:,}",
            f"{damaged}/shards/notes/mine.txt: extra, not in the index",
        ]
    )
    assert lines[-1].strip() == "copy each of them again from where it was made, or make it again"


def test_a_derived_folder_without_its_index_is_named_not_its_files(damaged):
    (damaged / "shards/words").mkdir()
    (damaged / "shards/words/train.bits").write_bytes(b"bits")
    assert check_files.check(damaged / "shards") == [f"{damaged}/shards/words/index.json: missing"]


def test_any_single_bit_of_any_file_is_noticed(damaged):
    draw = random.Random(0)
    files = [path for path in sorted(damaged.glob("shards/*")) if path.name != "index.json"]
    assert check_files.check(damaged / "shards") == []
    for path in files * 4:
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        assert check_files.check(damaged / "shards") == [f"{path}: altered, its SHA-256 differs"]
        path.write_bytes(whole)


def flip(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


DAMAGES = {
    "flipped": flip,
    "truncated": lambda path, draw: path.write_bytes(path.read_bytes()[: -draw.randrange(1, 4)]),
    "emptied": lambda path, draw: path.write_bytes(b""),
    "longer": lambda path, draw: path.write_bytes(path.read_bytes() + b"\n"),
    "deleted": lambda path, draw: path.unlink(),
    "extra": lambda path, draw: path.with_name(f"{path.name}.bak").write_bytes(path.read_bytes()),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("folder", ["tokenizer", "shards", "run/checkpoints/step_00000002"])
def test_every_damage_to_every_file_names_it_and_exits_2(damaged, capsys, folder, damage):
    draw = random.Random(1)
    for path in sorted(p for p in (damaged / folder).rglob("*") if p.is_file()):
        whole = path.read_bytes()
        DAMAGES[damage](path, draw)
        assert check_files.main([str(damaged / folder)]) == 2, path
        name = f"{path.name}.bak" if damage == "extra" else path.name
        said = capsys.readouterr()
        assert name in said.err or (name == "index.json" and str(damaged / folder) in said.err), said.err
        assert "intact" not in said.out
        path.with_name(f"{path.name}.bak").unlink(missing_ok=True)
        path.write_bytes(whole)
    assert check_files.main([str(damaged / folder)]) == 0


def test_any_single_bit_of_an_index_is_noticed(damaged, capsys):
    """A bit of `recorded`, which is not part of the fingerprint, and a bit of white space are noticed too."""
    path, draw = damaged / "shards/index.json", random.Random(2)
    whole = path.read_bytes()
    at = whole.index(b'"recorded"')
    for place in [*draw.sample(range(len(whole)), 100), *range(at, at + 100)]:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << draw.randrange(7)
        path.write_bytes(flipped)
        assert check_files.main([str(damaged / "shards")]) == 2, (place, whole[place - 20 : place + 20])
        assert f"{damaged}/shards" in capsys.readouterr().err


def test_a_folder_derived_inside_another_is_no_part_of_it_and_is_checked_with_it(damaged, capsys):
    shards = damaged / "shards"
    published(shards / "words", "words", shards=shards)
    assert check_files.main([str(shards)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines] == [f"{shards}: shards", f"{shards}/words: words"]
    (shards / ".words.tmp").mkdir()
    (shards / ".words.tmp/train.bits").write_bytes(b"of a run that was killed")
    Shards(shards)  # not extra files to the reader either
    assert check_files.main([str(shards)]) == 0
    capsys.readouterr()
    flip(shards / "words/model.safetensors", random.Random(0))
    (shards / "words/more").write_bytes(b"")
    assert check_files.main([str(shards)]) == 2
    said = capsys.readouterr().err
    assert f"{shards}/words/model.safetensors: altered" in said and f"{shards}/words/more: extra" in said


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (lambda index: index.unlink(), "the folder is incomplete"),
        (lambda index: index.write_bytes(index.read_bytes()[:-20]), "is damaged: not JSON"),
        (lambda index: index.write_text(index.read_text().replace("sha256", "sha512", 1)), "was altered"),
        (lambda index: shutil.rmtree(index.parent), "there is no such folder"),
    ],
)
def test_a_folder_without_a_sound_index_is_a_fault_and_the_others_are_still_checked(damaged, capsys, damage, found):
    damage(damaged / "tokenizer/index.json")
    assert check_files.main([str(damaged / "tokenizer"), str(damaged / "shards")]) == 2
    said = capsys.readouterr()
    assert said.out.startswith(f"{damaged / 'shards'}: shards, ")
    assert f"{damaged / 'tokenizer'}" in said.err and found in said.err and "1 of 2 folders" in said.err


def test_a_run_stands_for_its_checkpoints_and_a_torn_one_is_a_fault(damaged, capsys):
    (damaged / "run/checkpoints/step_00000001/index.json").unlink()
    assert check_files.main([str(damaged / "run")]) == 2
    said = capsys.readouterr()
    assert "step_00000002: checkpoint" in said.out and "step_00000001: the folder is incomplete" in said.err
    shutil.rmtree(damaged / "run/checkpoints")
    (damaged / "run/checkpoints").mkdir()
    assert check_files.main([str(damaged / "run")]) == 2
    assert f"{damaged / 'run'}: the folder is incomplete" in capsys.readouterr().err


def test_a_folder_made_with_another_tokenizer_than_the_one_there_is_refused(prepared, tmp_path, capsys):
    corpus, vocabulary, out = str(prepared.corpus), tmp_path / "tokenizer", tmp_path / "shards"
    shutil.copytree(prepared.tokenizer["bert"], vocabulary)
    build_shards(ShardsConfig(corpus=corpus, tokenizer=str(vocabulary), out=str(out)))
    tokenizer.run(
        tokenizer.TokenizerConfig(
            corpus=corpus, out=str(vocabulary), kind="bert", vocab_size=2000, plot=False, replace=True
        )
    )
    assert check_files.main([str(vocabulary), str(out)]) == 2
    said = capsys.readouterr()
    own = tokenizer.open_tokenizer(prepared.tokenizer["bert"]).fingerprint[:12]
    other = tokenizer.open_tokenizer(vocabulary).fingerprint[:12]
    assert f"{out}: made with tokenizer {own}…, but {vocabulary} is now {other}…" in said.err
    assert str(out) not in said.out and "1 of 2 folders" in said.err

    shutil.rmtree(vocabulary)
    assert check_files.main([str(out)]) == 0
    intact, note = capsys.readouterr().out.splitlines()
    assert intact.endswith(": intact")
    assert note == f"  made with tokenizer {own}…, not checked: {vocabulary} has no index of ours"


@pytest.mark.parametrize(
    ("folder", "source"),
    [
        ("shards", "tokenizer"),
        ("run/checkpoints/step_00000001", "tokenizer"),
        ("run/checkpoints/step_00000001", "shards"),
        ("export", "run/checkpoints/step_00000002"),
        ("finetuned", "export"),
    ],
)
def test_every_link_of_the_chain_is_followed(chain, capsys, folder, source):
    check_files.run([chain / folder])
    assert len(capsys.readouterr().out.splitlines()) == 1
    index = chain / source / "index.json"
    whole = index.read_bytes()
    try:
        index.unlink()
        assert check_files.check(chain / folder) == []
        assert f"not checked: {chain / source} has no index of ours" in capsys.readouterr().out
        other = read_index(chain / "finetuned", UserError, "")
        write_json(index, other)
        assert f"but {chain / source} is now {other['fingerprint'][:12]}…" in check_files.check(chain / folder)[0]
    finally:
        index.write_bytes(whole)


def test_every_corpus_of_a_run_that_mixes_some_is_followed(prepared, tmp_path, capsys):
    sets = {"wiki": shutil.copytree(prepared.shards["bert"], tmp_path / "wiki")}
    sets["web"] = shutil.copytree(prepared.shards["bert"], tmp_path / "web")
    index = read_index(sets["web"], UserError, "")
    write_index(sets["web"], {key: index[key] for key in index if key != "files"} | {"corpus": "another"})
    prints = {name: read_index(place, UserError, "")["fingerprint"] for name, place in sets.items()}
    with publish(tmp_path / "step", "checkpoint", UserError) as aside:
        corpora = [f"  - {{name: {name}, shards: {place}}}" for name, place in sets.items()]
        (aside / "config.yaml").write_text("data:\n  shards: null\n  corpora:\n" + "\n".join(corpora), encoding="utf-8")
        index = {"stage": "checkpoint", "corpora": [list(pair) for pair in prints.items()], "settings": {}}
        index |= {"step": 1, "steps_applied": 1, "vocab_size": 9, "tokenizer": "ab" * 32}
        write_index(aside, index, recorded=("config.yaml",))
    assert check_files.check(tmp_path / "step") == [] and len(capsys.readouterr().out.splitlines()) == 1
    shutil.rmtree(sets["web"])
    shutil.copytree(sets["wiki"], sets["web"])
    (fault,) = check_files.check(tmp_path / "step")
    assert f"made with corpus web {prints['web'][:12]}…, but {sets['web']} is now {prints['wiki'][:12]}…" in fault


def test_nothing_is_written_and_torch_is_not_needed(chain):
    before = {path: path.stat().st_mtime_ns for path in chain.rglob("*")}
    code = "import sys; from pretrain.tools.check_files import main; print(main(sys.argv[1:]), 'torch' in sys.modules)"
    command = [sys.executable, "-c", code, chain / "shards", chain / "run"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "0 False", done.stderr
    assert {path: path.stat().st_mtime_ns for path in chain.rglob("*")} == before


STRAYS = [
    ".DS_Store",
    "._index.json",
    "Thumbs.db",
    "desktop.ini",
    ".nfs000000000012ab",
    ".directory",
    "@eaDir/x@SynoEAStream",
]


@pytest.mark.parametrize("name", [*STRAYS, ".Trash-0/info", "lost+found/a", ".train.bin.swp", ".smbdelete12", "Icon\r"])
def test_what_a_file_manager_leaves_is_harmless(tmp_path, capsys, name):
    out = tmp_path / "out"
    with publish(out, "export", UserError) as aside:
        write_index(aside, {"stage": "export"})
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).touch()
    assert check_files.main([str(out)]) == 0
    assert f"  {name}: not of this folder, and harmless" in capsys.readouterr().out.replace("\r:", "\r:")
    (out / "notes.txt").touch()
    assert check_files.main([str(out)]) == 2
    said = capsys.readouterr().err
    assert "notes.txt: extra, not in the index" in said and f"{name}: extra" not in said
