"""The door to transformers: a folder that is damaged, brings code or lacks parts is refused before it is used."""

import shutil
import sys
from pathlib import Path

import pytest

from pretrain.errors import TaskError
from pretrain.finetune import run, train
from pretrain.huggingface import identity
from pretrain.prompting import generate
from pretrain.prompting.generate import GenerateConfig
from pretrain.storage.index import write_index
from tests.helpers.folders import TINY, changed, edit, settings


def flip(folder: Path) -> None:
    """Publish the folder as one of our stages does, then flip a bit in the middle of its weights."""
    write_index(folder, {"stage": "export"})
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[len(data) // 2] ^= 16
    (folder / "model.safetensors").write_bytes(data)


def cut_index(folder: Path) -> None:
    write_index(folder, {"stage": "export"})
    (folder / "index.json").write_bytes((folder / "index.json").read_bytes()[:-9])


def without(*names: str):
    return lambda folder: [(folder / name).unlink() for name in names]


BAD_FOLDERS = {
    "a flipped bit": (flip, "altered after it was made\n  model.safetensors: altered"),
    "a torn index": (cut_index, "index.json is damaged"),
    "code in config.json": (edit("config.json", auto_map={"AutoConfig": "evil.C"}), "asks to run code of its own"),
    "code for the tokenizer": (edit("tokenizer_config.json", auto_map={"AutoTokenizer": ["e.T", None]}), "asks to run"),
    "attention from a hub": (edit("config.json", attn_implementation="someone/kernel"), "asks to run code"),
    "settings that are no JSON": (lambda folder: (folder / "config.json").write_text("{"), "cannot be read as JSON"),
    "an unknown architecture": (edit("config.json", model_type="none"), "cannot open the configuration of"),
    "a setting of the wrong type": (edit("config.json", vocab_size=[1]), "cannot open the "),
    "another width": (edit("config.json", intermediate_size=96), "of another shape than config.json says"),
    "endless layers": (edit("config.json", num_hidden_layers=2**60), "more layers than the folder has weights"),
    "pickled weights": (lambda folder: (folder / "model.safetensors").rename(folder / "x.bin"), "weights are pickles"),
    "an adapter": (lambda folder: (folder / "adapter_config.json").write_text("{}"), "this folder holds an adapter"),
    "no tokenizer": (without("tokenizer.json", "tokenizer_config.json"), "has no tokenizer|open the tokenizer"),
    "no vocabulary": (without("tokenizer.json"), "has no tokenizer|open the tokenizer"),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_a_folder_that_is_altered_or_asks_for_code_or_lacks_parts_is_refused(case, encoder, decoder, task, tmp_path):
    change, said = BAD_FOLDERS[case]
    with pytest.raises(TaskError, match=said):
        run(settings(changed(change)(encoder, tmp_path / "e"), task, tmp_path / "out", **TINY))
    with pytest.raises(TaskError, match=said):
        generate.run(GenerateConfig(model=str(changed(change)(decoder, tmp_path / "d")), prompts=["x"]))
    assert not (tmp_path / "out").exists()


def test_the_tokenizer_of_another_model_is_refused(encoder, decoder, tmp_path):
    swapped = shutil.copytree(encoder, tmp_path / "swapped")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(decoder / name, swapped / name)
    with pytest.raises(TaskError, match=r"the tokenizer of another model\n  its ids go up to 257"):
        train.open_tokenizer(str(swapped), 8)


@pytest.mark.parametrize("name", ["transformers", "peft"])
def test_a_missing_library_is_an_error_that_says_what_to_install(name, encoder, decoder, monkeypatch, tmp_path, task):
    monkeypatch.setitem(sys.modules, name, None)  # `import` then fails as if the library were not installed
    said = rf"this stage needs {name}\n(.|\n)*pip install '\.\[finetune\]'"
    with pytest.raises(TaskError, match=said):
        run(settings(encoder, task, tmp_path / "out"))
    if name == "transformers":
        with pytest.raises(TaskError, match=said):
            generate.run(GenerateConfig(model=str(decoder), prompts=["x"]))


def test_a_base_that_our_export_made_is_known_by_its_fingerprint(encoder, tmp_path):
    ours = shutil.copytree(encoder, tmp_path / "ours")
    index = write_index(ours, {"stage": "export"})
    assert identity(str(ours)) == index["fingerprint"]
    (ours / "model.safetensors").write_bytes(b"shorter")
    with pytest.raises(TaskError, match="truncated"):
        identity(str(ours))
