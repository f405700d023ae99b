"""Adopted vocabularies. The tests make them in the forms in which others publish theirs: nothing comes from a hub."""

import json
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from pretrain import cli, export, shards
from pretrain import tokenizer as stage
from pretrain.config import build
from pretrain.corpus import open_corpus
from pretrain.errors import TokenizerError
from pretrain.storage.index import write_index
from pretrain.tokenizer import TokenizerConfig, open_tokenizer, run
from pretrain.tokenizer.adopt import opened
from pretrain.training.config import RunConfig
from pretrain.training.run import run as pretrain
from tests.conftest import SAMPLE, run_values
from tests.helpers.entries import entries

TEXTS = [
    *(
        "In the beginning God created",
        "don't  stop\n\n\tnow ",
        " x",
        "",
        "１２，ＡＢ ﬁ",
        "Élan naïve İ",
        "床前明月光，疑是地上霜。",
    ),
    *(
        "e\u0301 \u0301",
        "한국어 ไทย עברית",
        "😀👩\u200d👩\u200d👧",
        "\u2581 \u200b\ufeff\x00\x85\U0010ffff",
        "2024 3.14 1,000",
    ),
]
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def sample(documents: int = 80) -> list[str]:
    return [text for name in ("en", "zh") for text in (SAMPLE / f"{name}.txt").read_text().split("\n\n")[:documents]]


def gpt2(folder: Path) -> Path:
    """Byte-level BPE, one special token that is everything, and a length limit left in the file."""
    engine = Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    engine.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    engine.train_from_iterator(sample(), trainer)
    engine.enable_truncation(8)
    engine.enable_padding(length=8)
    end = "<|endoftext|>"
    return saved(folder, engine, {"eos_token": end, "bos_token": end, "unk_token": end, "model_max_length": 1024})


def qwen(folder: Path) -> Path:
    """Byte-level BPE over NFC text; its special tokens are added behind the model's own."""
    engine = Tokenizer(models.BPE())
    engine.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(QWEN), behavior="isolated")
    engine.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    engine.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    engine.train_from_iterator(
        sample(), trainers.BpeTrainer(vocab_size=580, initial_alphabet=alphabet, show_progress=False)
    )
    engine.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    engine.add_tokens([AddedToken("<tool_call>", normalized=False)])
    eos = {"content": "<|im_end|>", "lstrip": False}
    return saved(folder, engine, {"eos_token": eos, "pad_token": "<|endoftext|>", "unk_token": None})


def llama(folder: Path) -> Path:
    """SentencePiece-like BPE: spaces as ▁, bytes as a last resort, a begin mark in its template."""
    engine = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    engine.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    engine.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    marks = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=marks, limit_alphabet=60, show_progress=False)
    engine.train_from_iterator((word for text in sample() for word in text.split()), trainer)
    found = json.loads(engine.to_str())  # the bytes are entries of the model, not special tokens
    found["added_tokens"] = [added for added in found["added_tokens"] if added["id"] < 3]
    engine = Tokenizer.from_str(json.dumps(found))
    engine.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return saved(folder, engine, {"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"})


def t5(folder: Path) -> Path:
    """SentencePiece's Unigram model, its special tokens entries of the best score."""
    engine = Tokenizer(models.Unigram())
    engine.normalizer, engine.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    engine.decoder = decoders.Metaspace()
    marks = ["<pad>", "</s>", "<unk>", "<extra_id_0>"]
    trainer = trainers.UnigramTrainer(vocab_size=3000, special_tokens=marks, unk_token="<unk>", show_progress=False)
    engine.train_from_iterator([*sample(), "< / > _ 0 1"], trainer)
    engine.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return saved(folder, engine, {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"})


def modernbert(folder: Path) -> Path:
    """Byte-level BPE with the special tokens of an encoder."""
    engine = Tokenizer.from_file(str(gpt2(folder) / "tokenizer.json"))
    engine.add_special_tokens(["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"])
    return saved(
        folder, engine, {f"{role}_token": f"[{role.upper()}]" for role in ("unk", "cls", "sep", "pad", "mask")}
    )


def saved(folder: Path, engine: Tokenizer, config: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    engine.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def vocab_txt(path: Path, *words: str) -> Path:
    """A vocab.txt as BERT's are: unused slots, special tokens at 100, characters, and `words`."""
    tokens = ["[PAD]", *(f"[unused{n}]" for n in range(1, 100)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokens += [chr(c) for c in range(0x21, 0x7F) if not chr(c).isupper()]
    tokens += [f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz0123456789"]
    tokens += ["床", "前", "明", "月", "光", "，", "the", "##ing", "god", *words]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{token}\n" for token in tokens), encoding="utf-8")
    return path


MADE = {"gpt2": gpt2, "qwen": qwen, "llama": llama, "t5": t5, "modernbert": modernbert}


@pytest.fixture(scope="module")
def foreign(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("foreign")
    return {name: make(root / name) for name, make in MADE.items()}


@pytest.fixture(scope="module")
def adopted(foreign, tmp_path_factory) -> dict[str, stage.Tokenizer]:
    root = tmp_path_factory.mktemp("adopted")
    return {name: adopt(place, root / name) for name, place in foreign.items()}


def adopt(place: Path, out: Path, **keys) -> stage.Tokenizer:
    run(TokenizerConfig(corpus=str(SAMPLE), out=str(out), adopt=str(place), plot=False, **keys))
    return open_tokenizer(out)


def whole(place: Path) -> Tokenizer:
    """The tokenizer of the folder without truncation and padding."""
    engine = Tokenizer.from_file(str(place / "tokenizer.json"))
    engine.no_truncation()
    engine.no_padding()
    return engine


# Byte-level and other vocabularies


def test_adopted_ids_are_those_of_the_files_with_our_template(adopted, foreign):
    for name, tokenizer in adopted.items():
        engine = whole(foreign[name])
        for text, ids in zip(TEXTS + sample(3), tokenizer.encode_batch(TEXTS + sample(3)), strict=True):
            theirs = engine.encode(text, add_special_tokens=False).ids
            marks = tokenizer.specials
            wanted = [marks["cls"], *theirs, marks["sep"]] if name == "modernbert" else [*theirs, marks["eod"]]
            assert ids.tolist() == wanted, (name, text)


def test_kind_and_roles_come_from_the_files(adopted):
    said = {name: (tokenizer.kind, tokenizer.specials) for name, tokenizer in adopted.items()}
    assert said["gpt2"] == ("byte", {"pad": 0, "unk": 0, "eod": 0})
    assert said["qwen"] == ("byte", {"pad": 580, "eod": 582})
    assert said["llama"] == ("byte", {"pad": 2, "unk": 0, "eod": 2}), "no pad token: the end mark pads"
    assert said["t5"] == ("byte", {"pad": 0, "unk": 2, "eod": 1})
    assert said["modernbert"] == ("bert", {"pad": 603, "unk": 600, "cls": 601, "sep": 602, "mask": 604})
    assert adopted["qwen"].special_tokens == {"<|im_start|>": 581}
    assert adopted["qwen"].vocab_size == 584


def test_what_a_vocabulary_does_to_text_is_found_out(adopted):
    found = {name: (tokenizer.lossless, tokenizer.counts_bytes) for name, tokenizer in adopted.items()}
    assert found == {
        "gpt2": (True, True),
        "qwen": (False, True),
        "llama": (False, False),
        "t5": (False, False),
        "modernbert": (True, False),
    }
    for text, ids in zip(TEXTS, adopted["gpt2"].encode_batch(TEXTS), strict=True):
        assert adopted["gpt2"].decode(ids) == text
    with pytest.raises(TokenizerError, match=r"(?s)no fixed number of bytes.*not spell it in bytes.*shards"):
        adopted["llama"].token_bytes()


SCALARS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=60),
    st.lists(st.sampled_from(["<|endoftext|>", "<|im_end|>", "<tool_call>", "the ", " ", "汉", "\u0301"])).map("".join),
)


@settings(max_examples=300, deadline=None)
@given(text=SCALARS)
def test_bytes_of_adopted_tokens_add_up(adopted, text):
    for name, normal in (("gpt2", text), ("qwen", unicodedata.normalize("NFC", text))):
        ids = adopted[name].encode_batch([text])[0]
        assert adopted[name].decode(ids) == normal
        assert adopted[name].token_bytes()[ids].sum() == len(normal.encode("utf-8"))
        marks = {*adopted[name].specials.values(), *adopted[name].special_tokens.values()}
        assert not marks & set(ids[:-1].tolist())


def test_tokens_can_be_looked_at(adopted):
    row = {adopted["gpt2"].token_text(token): token for token in range(adopted["gpt2"].vocab_size)}
    assert " the" in row and "\\xe6" in row and "<|endoftext|>" in row
    assert adopted["gpt2"].token_bytes()[[row[" the"], row["\\xe6"], row["<|endoftext|>"]]].tolist() == [4, 1, 0]
    assert adopted["qwen"].token_text(583) == "<tool_call>" and adopted["qwen"].token_bytes()[583] == 11
    assert "▁the" in {adopted["llama"].token_text(token) for token in range(adopted["llama"].vocab_size)}


def test_special_tokens_become_control_tokens_when_asked(adopted):
    tokenizer = adopted["qwen"]
    text = "a<|im_start|>b<|endoftext|>"
    assert set(tokenizer.encode_batch([text])[0].tolist()) & {580, 581} == set()
    assert [token for token in tokenizer.encode_batch([text], special_tokens=True)[0].tolist() if token >= 580] == [
        *(581, 580, 582)
    ]


def test_text_is_no_special_token_that_the_model_itself_could_make_of_it(adopted, foreign):
    loose, tokenizer = whole(foreign["t5"]), adopted["t5"]
    loose.encode_special_tokens = True
    assert 1 in loose.encode("a</s>", add_special_tokens=False).ids, "the library alone"
    texts = ["</s>", "a</s>b </s>", "<extra_id_0> <pad></s></s>", "<extra_id_1> < /s>", "＜/s＞"]
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        found = "".join(map(tokenizer.token_text, ids[:-1].tolist()))
        assert found.replace("▁", " ").strip() == unicodedata.normalize("NFKC", text)
        assert ids[-1] == 1 and not {0, 1, 2, 3} & set(ids[:-1].tolist())
    assert tokenizer.encode_batch(["a</s>b"], special_tokens=True)[0].tolist().count(1) == 2


def test_the_report_of_an_adopted_vocabulary(adopted):
    for tokenizer in adopted.values():
        report = json.loads((tokenizer.folder / "report.json").read_text(encoding="utf-8"))
        assert report["vocab_size"] == tokenizer.vocab_size and report["kind"] == tokenizer.kind
        overall = report["heldout"]["overall"]
        held = [document.text for document in open_corpus(SAMPLE).documents(("heldout",))]
        template = 2 if tokenizer.kind == "bert" else 1
        assert overall["tokens"] == sum(len(ids) - template for ids in tokenizer.encode_batch(held))
        assert overall["unknown_rate"] == 0 or tokenizer is adopted["t5"], "all others spell what they do not know"
        assert "train" not in report["dead"], "it was not trained on this text"


def test_auto_tokenizer_opens_what_was_adopted_with_the_same_ids(adopted):
    """In a fresh process."""
    script = """
import json, sys
from transformers import AutoTokenizer
texts = json.loads(sys.argv[1])
for folder in sys.argv[2:]:
    stock = AutoTokenizer.from_pretrained(folder)
    print(json.dumps([stock(texts, split_special_tokens=True)["input_ids"], len(stock)]))
"""
    texts = [*TEXTS, *sample(5), "a<|endoftext|>[SEP]</s>"]
    folders = [str(tokenizer.folder) for tokenizer in adopted.values()]
    done = subprocess.run([sys.executable, "-c", script, json.dumps(texts), *folders], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    for tokenizer, line in zip(adopted.values(), done.stdout.splitlines(), strict=True):
        ids, size = json.loads(line)
        assert ids == [row.tolist() for row in tokenizer.encode_batch(texts)]
        assert size == tokenizer.vocab_size


# vocab.txt


def test_a_vocab_txt_is_cut_as_bert_cuts_it(tmp_path):
    transformers = pytest.importorskip("transformers")
    path = vocab_txt(tmp_path / "vocab.txt")
    tokenizer = adopt(path, tmp_path / "out")
    stock = transformers.BertTokenizer.from_pretrained(tmp_path)
    texts = [*TEXTS, *sample(5), "[SEP] the [unused1] ＡＢ"]
    ids = [row.tolist() for row in tokenizer.encode_batch(texts)]
    assert ids == stock(texts, split_special_tokens=True)["input_ids"]
    assert tokenizer.kind == "bert" and tokenizer.rules == stage.Rules("bert", True, True)
    assert tokenizer.specials == {"pad": 0, "unk": 100, "cls": 101, "sep": 102, "mask": 103}
    assert (tokenizer.folder / "vocab.txt").read_bytes() == path.read_bytes()
    settings = json.loads((tokenizer.folder / "tokenizer_config.json").read_text())
    assert (settings["tokenizer_class"], settings["do_lower_case"]) == ("BertTokenizer", True)
    again = transformers.AutoTokenizer.from_pretrained(tokenizer.folder)
    assert again(texts, split_special_tokens=True)["input_ids"] == ids
    index = json.loads((tokenizer.folder / "index.json").read_text())
    assert index["reserved"] == list(range(1, 100))


def test_line_ends_and_a_mark_of_byte_order_are_no_part_of_a_vocab_txt(tmp_path):
    path = vocab_txt(tmp_path / "vocab.txt")
    expected = opened(str(path)).engine.get_vocab()
    text = path.read_text(encoding="utf-8")
    for number, data in enumerate(("\ufeff" + text, text.replace("\n", "\r\n"), text.removesuffix("\n"))):
        other = tmp_path / f"{number}.txt"
        other.write_bytes(data.encode("utf-8"))
        assert opened(str(other)).engine.get_vocab() == expected


def test_case_is_what_is_said_then_what_the_folder_says_then_what_the_vocabulary_shows(tmp_path):
    uncased, cased = vocab_txt(tmp_path / "uncased" / "vocab.txt"), vocab_txt(tmp_path / "cased" / "vocab.txt", "God")
    config = tmp_path / "cased" / "tokenizer_config.json"
    assert adopt(uncased, tmp_path / "1").rules == stage.Rules("bert", True, True)
    assert adopt(cased.parent, tmp_path / "2").rules == stage.Rules("bert", False, False)
    assert adopt(cased, tmp_path / "3", lowercase=True, strip_accents=False).rules == stage.Rules("bert", True, False)
    config.write_text('{"do_lower_case": true, "strip_accents": false}', encoding="utf-8")
    assert adopt(cased.parent, tmp_path / "4").rules == stage.Rules("bert", True, False)
    assert adopt(cased, tmp_path / "5").rules == stage.Rules("bert", False, False), "a file alone is read alone"
    assert adopt(cased.parent, tmp_path / "6", lowercase=False).rules == stage.Rules("bert", False, False)


def test_the_tokenizer_json_of_a_bert_folder_is_recognised(tmp_path):
    transformers = pytest.importorskip("transformers")
    vocab_txt(tmp_path / "vocab.txt")
    stock = transformers.BertTokenizer.from_pretrained(tmp_path)
    stock.save_pretrained(tmp_path / "saved")
    tokenizer = adopt(tmp_path / "saved", tmp_path / "out")
    assert tokenizer.rules == stage.Rules("bert", True, True)
    ids = [row.tolist() for row in tokenizer.encode_batch(TEXTS)]
    assert ids == stock(TEXTS)["input_ids"]
    assert (tokenizer.folder / "vocab.txt").read_bytes() == (tmp_path / "vocab.txt").read_bytes()


def test_where_a_vocabulary_came_from_is_part_of_it(foreign, adopted, tmp_path):
    again = adopt(shutil.copytree(foreign["gpt2"], tmp_path / "elsewhere"), tmp_path / "out")
    assert again.fingerprint == adopted["gpt2"].fingerprint
    index = json.loads((again.folder / "index.json").read_text())
    assert sorted(index["adopted"]) == ["tokenizer.json", "tokenizer_config.json"]
    assert index["recorded"]["adopted"] == str(tmp_path / "elsewhere")
    other = adopt(foreign["gpt2"] / "tokenizer.json", tmp_path / "file")
    assert other.specials == {"pad": 0, "eod": 0}, "the file alone says nothing of an unknown token"
    assert other.fingerprint != again.fingerprint


def test_ids_that_no_token_has_stay_unused(foreign, tmp_path):
    values = json.loads((foreign["gpt2"] / "tokenizer.json").read_text())
    last = max(values["model"]["vocab"], key=values["model"]["vocab"].get)
    values["model"]["vocab"][last] = 605
    (tmp_path / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")
    tokenizer = adopt(tmp_path, tmp_path / "out")
    assert tokenizer.vocab_size == 606
    assert tokenizer.token_text(600) == "<no token 600>" and tokenizer.token_bytes()[600] == 0
    assert tokenizer.token_text(605) == adopted_text(foreign["gpt2"], last)


@pytest.mark.parametrize("name", ["gpt2", "vocab.txt"])
def test_new_special_tokens_and_slots_come_behind_what_was_adopted(name, foreign, tmp_path):
    place = foreign["gpt2"] if name == "gpt2" else vocab_txt(tmp_path / "vocab.txt")
    plain = adopt(place, tmp_path / "plain")
    more = adopt(place, tmp_path / "more", special_tokens=["<|user|>"], reserved=2, multiple_of=64)
    size, slot = plain.vocab_size, "<unused{}>" if name == "gpt2" else "[unused{}]"
    assert more.vocab_size % 64 == 0 and size + 3 <= more.vocab_size < size + 3 + 64
    assert more.special_tokens["<|user|>"] == size
    free = 0 if name == "gpt2" else 100  # the vocab.txt has [unused1] to [unused99]
    numbers = [0, *range(free, 999)] if free else range(999)
    rows = [more.token_text(token) for token in range(size + 1, more.vocab_size)]
    assert rows == [slot.format(number) for number, _ in zip(numbers, rows, strict=False)]
    text = "a<|user|>b <unused0>[unused0]"
    assert more.encode_batch([text])[0].tolist() == plain.encode_batch([text])[0].tolist()
    assert size in more.encode_batch([text], special_tokens=True)[0]
    transformers = pytest.importorskip("transformers")
    stock = transformers.AutoTokenizer.from_pretrained(more.folder)
    assert stock(TEXTS, split_special_tokens=True)["input_ids"] == [row.tolist() for row in more.encode_batch(TEXTS)]
    assert len(stock) == more.vocab_size and stock.convert_tokens_to_ids("<|user|>") == size


def adopted_text(place: Path, token: str) -> str:
    return whole(place).decode([whole(place).token_to_id(token)])


# In a run


@pytest.mark.parametrize("name", ["qwen", "llama"])
def test_a_decoder_with_an_adopted_vocabulary_trains_and_its_export_verifies(name, adopted, prepared, tmp_path):
    made = shards.run(
        build(
            shards.ShardsConfig,
            {"corpus": str(prepared.corpus), "tokenizer": str(adopted[name].folder), "out": str(tmp_path / "shards")},
            "test",
        )
    )
    assert made["specials"] == adopted[name].specials
    values = run_values(
        prepared, tmp_path / "run", "causal_lm", phases=[{"steps": 2, "seq_len": 32, "batch_tokens": 64}]
    )
    values["data"] = {"shards": str(tmp_path / "shards"), "tokenizer": str(adopted[name].folder)}
    values["export"] = {"dialect": "qwen3"}
    summary = pretrain(build(RunConfig, values, "test"))
    assert (summary["heldout_bits_per_byte"] is None) == (name == "llama")
    config = {"checkpoint": str(tmp_path / "run"), "dialect": "qwen3", "out": str(tmp_path / "hf")}
    certificate = export.run(build(export.ExportConfig, config, "test"))
    assert certificate["max_logit_diff"] < 1e-4
    card = (tmp_path / "hf" / "README.md").read_text(encoding="utf-8")
    end = adopted[name].token_text(adopted[name].specials["eod"])
    assert f"**`{end}` begins and ends a document.**" in card
    assert "No text is changed" not in card


def test_bits_per_byte_of_an_adopted_vocabulary_are_of_the_bytes_of_its_text(adopted):
    for name in ("gpt2", "qwen"):
        held = [document.text for document in open_corpus(SAMPLE).documents(("heldout",))]
        ids = np.concatenate(adopted[name].encode_batch(held))
        normal = "".join(held) if name == "gpt2" else unicodedata.normalize("NFC", "".join(held))
        assert adopted[name].token_bytes()[ids].sum() == len(normal.encode("utf-8"))


def test_an_encoder_with_an_adopted_vocabulary_trains_and_its_export_verifies(adopted, prepared, tmp_path):
    folder = str(adopted["modernbert"].folder)
    made = {"corpus": str(prepared.corpus), "tokenizer": folder, "out": str(tmp_path / "shards")}
    shards.run(build(shards.ShardsConfig, made, "test"))
    values = run_values(prepared, tmp_path / "run", phases=[{"steps": 2, "seq_len": 32, "batch_tokens": 64}])
    values["data"] = {"shards": str(tmp_path / "shards"), "tokenizer": folder}
    pretrain(build(RunConfig, values, "test"))
    config = {"checkpoint": str(tmp_path / "run"), "dialect": "bert", "out": str(tmp_path / "hf")}
    assert export.run(build(export.ExportConfig, config, "test"))["max_logit_diff"] < 1e-4


# Mistakes that are refused: each function makes one and returns the overrides for the command line.


def nothing_but(*overrides: str) -> Callable:
    return lambda folder: list(overrides)


def file(name: str, content: str | bytes) -> Callable:
    def make(folder: Path) -> list[str]:
        (folder / name).write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        return [f"adopt={folder / name}"]

    return make


def empty_folder(folder: Path) -> list[str]:
    (folder / "empty").mkdir()
    (folder / "empty" / "vocab.json").touch()
    return [f"adopt={folder / 'empty'}"]


def said_in_words(folder: Path) -> list[str]:
    vocab_txt(folder / "bert" / "vocab.txt")
    (folder / "bert" / "tokenizer_config.json").write_text('{"do_lower_case": "yes"}', encoding="utf-8")
    return [f"adopt={folder / 'bert'}"]


def one_of_ours(folder: Path) -> list[str]:
    adopt(vocab_txt(folder / "vocab.txt"), folder / "ours")
    return [f"adopt={folder / 'ours'}"]


def one_of_ours_after_a_crash(folder: Path) -> list[str]:
    overrides = one_of_ours(folder)
    (folder / "ours" / "index.json").write_bytes(b"")
    return overrides


def nothing_held_out(folder: Path) -> list[str]:
    (folder / "one.txt").write_text("just one document", encoding="utf-8")
    return [f"corpus={folder / 'one.txt'}"]


def model(**keys: object) -> Callable:
    """A tokenizer.json with nothing but a model: WordPiece if no type is said."""
    values = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##"}
    whole = {"model": values | {"max_input_chars_per_word": 100} | keys}
    parts = ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    return file("tokenizer.json", json.dumps({"version": "1.0", "added_tokens": [], **dict.fromkeys(parts), **whole}))


LINES = "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n"
ROWS = [
    ("no such place", nothing_but("adopt=nowhere"), ["no such tokenizer", "looked for: nowhere", "vocab.txt"]),
    ("a folder without", empty_folder, ["no tokenizer.json and no vocab.txt", "empty has vocab.json"]),
    ("no JSON", file("tokenizer.json", '{"model": '), ["is not JSON", "{folder}/tokenizer.json: Expecting value"]),
    ("half a surrogate pair", file("tokenizer.json", '{"model": {}, "x": "\\ud800"}'),
     ["not valid Unicode", "{folder}/tokenizer.json: a lone surrogate", "save the tokenizer again"]),
    ("deep JSON", file("tokenizer.json", "[" * 100_000), ["is not JSON", "{folder}/tokenizer.json"]),
    ("a SentencePiece file", file("spiece.model", bytes([10, 14, 10, 5, 60, 255])), ["is not JSON", "spiece.model"]),
    ("a JSON list", file("tokenizer.json", "[1, 2]"), ["not what its name says", "holds no JSON object"]),
    ("a broken model", file("tokenizer.json", '{"model": {"type": "BPE"}}'), ["`tokenizers` can open"]),
    ("no tokens", model(vocab={}), ["tokenizer.json has no tokens"]),
    ("one id for two", model(vocab={"[UNK]": 0, "</s>": 1, "a": 1}), ["one id to two tokens", "id 1: '</s>' and 'a'"]),
    ("a far id", model(vocab={"[UNK]": 0, "</s>": 4_000_000_000}), ["too large for a model", "the id 4,000,0"]),
    ("an unknown token it lacks", model(vocab={"</s>": 0, "a": 1}), ["no token for unknown text", "[UNK]"]),
    ("no unknown token", model(type="Unigram", unk_id=None, vocab=[["</s>", 0.0], ["a", -1.0]]),
     ["no token for unknown text", "make it name an existing one"]),
    ("another JSON", file("config.json", '{"model_type": "bert"}'), ["no key `model`; its keys: model_type"]),
    ("a vocab.txt in GBK", file("vocab.txt", LINES.encode() + "汉".encode("gbk")), ["must be UTF-8", "byte 34"]),
    ("a token twice", file("vocab.txt", LINES + "b\na\n"), ["new token on every line", "line 8: 'a' of line 6 again"]),
    ("an empty line", file("vocab.txt", LINES + "\nb\n"), ["needs a new token on every line", "line 7: nothing"]),
    ("case in words", said_in_words, ["do_lower_case must be true or false", "vocab.txt has 'yes'"]),
    ("no mask", file("vocab.txt", "[PAD]\n[UNK]\n[CLS]\n[SEP]\na\n"), ["special tokens of BERT", "not in it: [MASK]"]),
    ("an encoder without roles", nothing_but("kind=bert"), ["an encoder needs", "cls, sep, mask", "eod <|endoftext|>"]),
    ("a role of nobody", nothing_but("roles={{end: x}}"), ["roles.end", "one of the roles pad, unk, cls"]),
    ("a token it does not have", nothing_but("roles={{eod: </s>}}"), ["roles.eod = '</s>' is not a token"]),
    ("an ordinary token", nothing_but("roles={{eod: a}}"), ["'a' could not be told from text", "ordinary entry"]),
    ("case of a tokenizer.json", nothing_but("lowercase=true"), ["already defines how it normalises", "remove lower"]),
    ("a size", nothing_but("vocab_size=100"), ["vocab_size = 100 contradicts adopt = ", "taken as it is"]),
    ("digits", nothing_but("digits=single"), ["digits = single contradicts adopt"]),
    ("a token of its own", nothing_but("special_tokens=['<|endoftext|>']"), ["is already a token", "id 0 of"]),
    ("a word of a vocab.txt", lambda folder: [f"adopt={vocab_txt(folder / 'vocab.txt')}", "special_tokens=[doc]"],
     ["'doc' could not be told from text"]),
    ("two ways", nothing_but("extend=x"), ["adopt and extend are two ways"]),
    ("roles alone", nothing_but("adopt=null", "kind=byte", "vocab_size=600", "roles={{eod: x}}"),
     ["roles = {{'eod': 'x'}} is for adopted vocabularies"]),
    ("one of ours", one_of_ours, ["made by this stage", "use that folder as it is"]),
    ("an emptied one of ours", one_of_ours_after_a_crash, ["made by this stage", "use that folder as it is"]),
    ("nothing held out", nothing_held_out, ["needs held-out documents", "{folder}/one.txt", "heldout_fraction"]),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "damage", "fragments"), ROWS, ids=[row[0] for row in ROWS])
def test_the_message_helps_and_nothing_is_written(foreign, tmp_path, capsys, wrong, damage, fragments):
    overrides = [override.format() for override in damage(tmp_path)]
    config = tmp_path / "tokenizer.yaml"
    values = {"corpus": str(SAMPLE), "out": str(tmp_path / "out"), "adopt": str(foreign["gpt2"])}
    config.write_text(yaml.safe_dump(values), encoding="utf-8")
    before = entries(tmp_path)
    assert cli.main("tokenizer", [str(config), *overrides]) == 2
    said = capsys.readouterr().err
    assert "error: " in said and "Traceback" not in said
    for fragment in fragments:
        assert fragment.format(folder=tmp_path) in said
    assert entries(tmp_path) == before


def test_an_export_whose_tokenizer_was_altered_is_refused(foreign, tmp_path):
    copy = shutil.copytree(foreign["gpt2"], tmp_path / "export")
    write_index(copy, {"stage": "export"})
    assert opened(str(copy)).engine.get_vocab_size() > 0
    path = copy / "tokenizer.json"
    path.write_bytes(path.read_bytes().replace(b"th", b"ht", 1))
    with pytest.raises(TokenizerError, match=r"was altered after it was made\n  changed: tokenizer\.json"):
        opened(str(copy))


def test_a_decoder_without_an_end_mark_is_refused_and_a_role_helps(foreign, tmp_path):
    values = json.loads((foreign["gpt2"] / "tokenizer.json").read_text())
    text = json.dumps(values).replace("<|endoftext|>", "<|stop|>")
    (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
    with pytest.raises(TokenizerError, match=r"(?s)a decoder needs .*: eod.*has: none.*roles\.eod=…"):
        adopt(tmp_path, tmp_path / "out")
    assert adopt(tmp_path, tmp_path / "out", roles={"eod": "<|stop|>"}).specials == {"pad": 0, "eod": 0}


def test_a_byte_level_vocabulary_with_three_marks_becomes_an_encoders_and_stays_lossless(prepared, tmp_path):
    keys = {"corpus": str(prepared.corpus), "plot": False}
    marks = ["[CLS]", "[SEP]", "[MASK]"]
    run(TokenizerConfig(**keys, kind="byte", vocab_size=560, special_tokens=marks, out=str(tmp_path / "byte")))
    run(TokenizerConfig(**keys, adopt=str(tmp_path / "byte/tokenizer.json"), out=str(tmp_path / "encoder")))
    tokenizer = open_tokenizer(tmp_path / "encoder")
    assert tokenizer.kind == "bert" and tokenizer.lossless
    assert [tokenizer.token_text(tokenizer.specials[role]) for role in ("cls", "sep", "mask")] == marks
    for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        assert (ids[0], ids[-1]) == (tokenizer.specials["cls"], tokenizer.specials["sep"])
        assert tokenizer.decode(ids) == text
