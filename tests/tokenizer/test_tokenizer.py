import gzip
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain import cli
from pretrain import tokenizer as ours
from pretrain.config import build, dump, load
from pretrain.corpus.sides import side_of
from pretrain.errors import ConfigError, CorpusError, TokenizerError
from pretrain.tokenizer import TokenizerConfig, kinds, open_tokenizer, run
from pretrain.tokenizer.compare import CompareConfig
from pretrain.tokenizer.compare import run as compare
from pretrain.tokenizer.kinds import PREFIX
from tests.helpers.entries import entries
from tests.tokenizer.test_merge import naive_merges

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "data" / "sample"

# Everything that BERT treats in its own way, or that Python, Rust and the word pattern might cut differently.
ODDITIES = [
    *(chr(c) for c in range(0x20)),
    *"\x7f\x80\x85\x9f\xa0\xad\u0301\u0338\u1680\u180e\u2000\u200a\u200b\u200c\u200d\u200e\u2028\u2029\u202f\u203f",
    *"\u205f\u2060\u3000\u3001\u3400\u4dc0\u9fff\ue000\uf8ff\uf900\ufa0e\ufe0f\ufeff\ufffd\uffff\U0001f642\U00020000",
    *"\U0002a6d7\U0002b820\U0002f800\U000e0041\U0010ffff",
    *"éİßΣςﬁÅＡ１Ⅷ²ы×，。《…漢字# []'_-$~`a",
    *["e\u0301", "\U0001f469\u200d\U0001f467", "한국", "ひら", "ไทย", "हिन्दी", "עברית", "汉字", "##", "'t", "don't"],
]


def corpus_of(folder: Path, *files: list[str], heldout_fraction: float = 0.1) -> str:
    """A recipe of one source with exactly these documents, in this order, each list in a file."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ["text.jsonl"] if len(files) == 1 else [f"{number}.jsonl" for number in range(len(files))]
    for name, documents in zip(names, files, strict=True):
        lines = (json.dumps({"text": text}) + "\n" for text in documents)
        (folder / name).write_text("".join(lines), encoding="utf-8")
    sources = [{"name": "made", "files": names}]
    recipe = json.dumps({"name": "made", "heldout_fraction": heldout_fraction, "sources": sources})  # JSON is YAML
    (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
    return str(folder)


def documents_of(name: str, count: int) -> list[str]:
    return (SAMPLE / name).read_text(encoding="utf-8").split("\n\n")[:count]


def train(folder: Path, documents: list[str] | None = None, **settings) -> ours.Tokenizer:
    corpus = str(SAMPLE) if documents is None else corpus_of(folder / "text", documents)
    run(TokenizerConfig(corpus=corpus, out=str(folder / "tokenizer"), **{"plot": False, **settings}))
    return open_tokenizer(folder / "tokenizer")


def odd_texts(count: int, seed: int) -> list[str]:
    """Real words and oddities, joined with and without spaces."""
    draw = random.Random(seed)
    words = " ".join(documents_of("en.txt", 5) + documents_of("zh.txt", 20)).split()
    parts = (draw.choice((draw.choice(ODDITIES), draw.choice(words), " ")) for _ in range(12 * count))
    return ["".join(itertools.islice(parts, 12)) for _ in range(count)]


@pytest.fixture(scope="module")
def uncased(tmp_path_factory) -> ours.Tokenizer:
    return train(tmp_path_factory.mktemp("uncased"), kind="bert", vocab_size=6000)


@pytest.fixture(scope="module")
def cased(tmp_path_factory) -> ours.Tokenizer:
    documents = [*documents_of("en.txt", 60), *documents_of("zh.txt", 100), *odd_texts(300, seed=1)]
    return train(tmp_path_factory.mktemp("cased"), documents, kind="bert", vocab_size=4000, lowercase=False)


@pytest.fixture(scope="module")
def byte(tmp_path_factory) -> ours.Tokenizer:
    return train(tmp_path_factory.mktemp("byte"), kind="byte", vocab_size=4000)


# Training


def test_a_bert_vocabulary_of_real_text_equals_a_naive_one(tmp_path):
    documents = documents_of("en.txt", 12)
    tokenizer = train(tmp_path, documents, kind="bert", vocab_size=300)
    words = Counter()
    for text in documents:
        if side_of(text, 0.1) == "train":
            words.update(re.findall(r"[a-z]+|[0-9]+|[^\sa-z0-9]", text.lower()))
    assert all(word.isalpha() or word.isdigit() or len(word) == 1 for word in words), "letters and digits do not touch"
    starts = sorted(set("".join(words)))
    continuations = ["##" + c for c in starts if any(c in word[1:] for word in words)]
    seeds = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *starts, *continuations]
    found = (tokenizer.folder / "vocab.txt").read_text(encoding="utf-8").split("\n")[:-1]
    assert found == naive_merges(words, seeds, 300, "##")


# Each in a process of its own: hash seed, threads, order of the documents, files they are spread over, bytes of a
# chunk, processes that count.
TRAININGS = [
    ("0", 1, "as they are", 1, 4 << 20, 1),
    ("2", 2, "shuffled", 1, 1000, 1),
    ("5", 1, "reversed", 60, 10_000, 1),
    ("7", 1, "shuffled", 2, 5000, 2),
    ("8", 2, "reversed", 20, 3000, 3),
    ("random", 4, "shuffled", 5, 4 << 20, 1),
]
TRAIN = """
import json, sys
from pathlib import Path
from pretrain.tokenizer import TokenizerConfig, run
from pretrain.tokenizer.training import count
if __name__ == "__main__":
    count.SLACK, count.CHUNK_BYTES = 1.0, int(sys.argv[1])
    for name, values in json.loads(Path(sys.argv[2]).read_text()).items():
        run(TokenizerConfig(out=str(Path(sys.argv[2]).parent / name), plot=False, **values))
"""


def test_six_trainings_give_identical_bytes(tmp_path):
    """Both kinds, three languages, both criteria, all of the text and a sample."""
    texts = {"en": [text[:2000] for text in documents_of("en.txt", 10)], "zh": documents_of("zh.txt", 30)}
    texts["mixed"] = [*texts["en"][:6], *texts["zh"][:16], *odd_texts(16, seed=3)]
    kinds_of = {"bert": {"alphabet_min_count": 2}, "cased": {"lowercase": False}, "byte": {}}
    script = tmp_path / "train.py"
    script.write_text(TRAIN, encoding="utf-8")
    results = []
    for number, (seed, threads, order, files, chunk_bytes, workers) in enumerate(TRAININGS):
        folder, jobs = tmp_path / str(number), {}
        for language, documents in texts.items():
            documents = documents[::-1] if order == "reversed" else list(documents)
            if order == "shuffled":
                random.Random(number).shuffle(documents)
            corpus = corpus_of(
                folder / "text" / language, *(documents[n::files] for n in range(files)), heldout_fraction=0.3
            )
            values = {"corpus": corpus, "vocab_size": 1200}
            for name, keys in kinds_of.items():
                if name == "cased" and language != "mixed":
                    continue
                keys = values | {"kind": "byte" if name == "byte" else "bert"} | keys
                jobs[f"{language}-{name}"] = keys | {"criterion": "wordpiece" if language == "zh" else "bpe"}
                if language == "mixed" and name != "cased":
                    sampled = {"criterion": "wordpiece", "max_distinct": 600, "workers": workers}
                    jobs[f"{language}-{name}-sampled"] = keys | sampled
        (folder / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
        environment = {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed, "TOKENIZERS_PARALLELISM": "true"}
        environment |= {"RAYON_NUM_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, str(script), str(chunk_bytes), str(folder / "jobs.json")]
        subprocess.run(command, env=os.environ | environment, check=True, capture_output=True)
        names = ("tokenizer.json", "tokenizer_config.json", "report.json")
        results.append({(job, name): (folder / job / name).read_bytes() for job in jobs for name in names})
    assert len(results) == 6 and len(results[0]) == 27
    assert all(result == results[0] for result in results[1:])
    left_out = {
        job: json.loads(report)["train"]["counted"]["levels_left_out"]
        for (job, name), report in results[0].items()
        if name == "report.json"
    }
    assert all((levels > 0) == job.endswith("sampled") for job, levels in left_out.items())


def test_training_sees_only_the_train_side(tmp_path):
    documents = documents_of("en.txt", 60)
    kept = [text for text in documents if side_of(text, 0.1) == "train"]
    others = [t for t in (f"zyzzyva {n} 龘 ꙮ" for n in range(200)) if side_of(t, 0.1) == "heldout"]
    assert len(kept) < len(documents) and others
    for kind in ("bert", "byte"):
        a = train(tmp_path / kind / "a", documents, kind=kind, vocab_size=1500)
        b = train(tmp_path / kind / "b", [*kept, *others], kind=kind, vocab_size=1500)
        assert (a.folder / "tokenizer.json").read_bytes() == (b.folder / "tokenizer.json").read_bytes()
        assert a.fingerprint != b.fingerprint, "the text is another"


def test_chinese_characters_have_no_continuation_row(uncased, cased):
    for tokenizer in (uncased, cased):
        rows = [tokenizer.token_text(i) for i in range(tokenizer.vocab_size)]
        assert any("\u4e00" <= row <= "\u9fff" for row in rows)
        assert not [row for row in rows if re.match("##[\u3400-\u4dbf\u4e00-\u9fff]", row)]


def test_ids_are_specials_then_alphabet_by_code_point_then_merges(uncased, byte):
    for tokenizer, specials in ((uncased, "[PAD] [UNK] [CLS] [SEP] [MASK]"), (byte, "<pad> <unk> <eod>")):
        prefix, specials = PREFIX[tokenizer.kind], specials.split()
        vocabulary = json.loads((tokenizer.folder / "tokenizer.json").read_bytes())["model"]["vocab"]
        rows = sorted(vocabulary, key=vocabulary.get)
        assert list(vocabulary.values()) == list(range(tokenizer.vocab_size))
        assert rows[: len(specials)] == specials
        rows = rows[len(specials) :]
        starts = sum(len(row) == 1 for row in rows)
        continuations = sum(row.startswith(prefix) and len(row) == len(prefix) + 1 for row in rows)
        assert starts and continuations
        assert rows[:starts] == sorted(row for row in rows if len(row) == 1)
        single = rows[starts : starts + continuations]
        assert single == sorted(single) and all(len(row) == len(prefix) + 1 for row in single)
        merged = rows[starts + continuations :]
        assert merged and all(len(row.removeprefix(prefix)) > 1 for row in merged)


def test_too_few_merges_give_a_smaller_vocabulary_and_say_so(tmp_path):
    documents = [f"the cat sat {n}" for n in range(40)]
    corpus = corpus_of(tmp_path / "text", documents)
    report = run(TokenizerConfig(corpus=corpus, out=str(tmp_path / "out"), kind="bert", vocab_size=5000, plot=False))
    tokenizer = open_tokenizer(tmp_path / "out")
    assert report["vocab_size"] == tokenizer.vocab_size < 100
    assert report["vocab_size_asked"] == 5000
    assert len(tokenizer.encode_batch(["the cat sat"])[0]) == 5


def test_words_longer_than_bert_reads_are_not_learned_from(tmp_path):
    long = "q" * 101
    tokenizer = train(tmp_path, [f"the cat {long} {n}" for n in range(60)], kind="bert", vocab_size=5000)
    vocabulary = (tokenizer.folder / "vocab.txt").read_text(encoding="utf-8").split("\n")
    assert "cat" in vocabulary and "q" not in vocabulary
    assert tokenizer.encode_batch([long])[0].tolist() == [2, 1, 3]


def test_rare_characters_are_left_out_of_the_alphabet_and_become_unknown(tmp_path):
    documents = [f"the cat {n}" for n in range(60)] + ["the zebra the zebra", "a 龘 龘 龘"]
    assert all(side_of(text, 0.1) == "train" for text in documents[-2:])
    everything = train(tmp_path / "all", documents, kind="bert", vocab_size=5000)
    frequent = train(tmp_path / "frequent", documents, kind="bert", vocab_size=5000, alphabet_min_count=3)
    unknown = everything.specials["unk"]
    assert unknown not in everything.encode_batch(["zebra 龘"])[0]
    found = frequent.encode_batch(["zebra 龘 the"])[0].tolist()  # z and b occur twice, 龘 three times
    assert [token == unknown for token in found] == [False, True, False, False, False]
    vocabulary = (frequent.folder / "vocab.txt").read_text(encoding="utf-8").split("\n")
    assert not [row for row in vocabulary if "z" in row or "eb" in row], "nothing is learned from an unknown word"


# Use: bert


@pytest.mark.parametrize("name", ["uncased", "cased"])
def test_ids_equal_the_stock_bert_tokenizer(name, request, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = request.getfixturevalue(name)
    shutil.copy(tokenizer.folder / "vocab.txt", tmp_path)
    stock = transformers.BertTokenizer.from_pretrained(tmp_path, do_lower_case=name == "uncased")
    texts = [*odd_texts(3000, seed=4), *documents_of("en.txt", 30), *documents_of("zh.txt", 100), "", " ", "x" * 101]
    ours_ids = [ids.tolist() for ids in tokenizer.encode_batch(texts)]
    assert ours_ids == stock(texts)["input_ids"]


@pytest.mark.parametrize("name", ["uncased", "cased"])
def test_ids_of_real_text_equal_the_original_python_bert(name, request):
    legacy = pytest.importorskip("transformers.models.bert.tokenization_bert_legacy")
    tokenizer = request.getfixturevalue(name)
    path = str(tokenizer.folder / "vocab.txt")
    python = legacy.BertTokenizerLegacy(path, do_lower_case=name == "uncased")
    texts = documents_of("en.txt", 20) + documents_of("zh.txt", 100)
    texts += ["Élan vital, naïve—don't! İstanbul ﬁne 汉字abc汉"]
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert python(text)["input_ids"] == ids.tolist()


def test_bert_ids_by_hand(uncased):
    row = {uncased.token_text(i): i for i in range(uncased.vocab_size)}
    ids = uncased.encode_batch(["The LÓRD, 人"])[0]
    assert ids.dtype == np.int32
    assert ids.tolist() == [2, row["the"], row["lord"], row[","], row["人"], 3]
    assert uncased.decode(ids) == "the lord, 人"
    assert uncased.specials == {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}


def test_bert_refuses_to_say_how_many_bytes_a_token_stands_for(uncased):
    with pytest.raises(TokenizerError, match="normalises text"):
        uncased.token_bytes()


# Use: byte

LOSSLESS = st.one_of(
    st.text(max_size=60),
    st.lists(st.one_of(st.sampled_from(ODDITIES), st.characters(exclude_categories=["Cs"])), max_size=30).map("".join),
    st.lists(st.sampled_from(["<eod>", "<pad>", "<unk>", "‿", "‿a", "Ġ", "\0", " "]), max_size=40).map("".join),
    st.tuples(st.sampled_from(ODDITIES), st.integers(1, 120)).map(lambda pair: pair[0] * pair[1]),
)


@pytest.fixture(scope="module")
def sizes(byte) -> np.ndarray:
    return byte.token_bytes()


@settings(max_examples=250, deadline=None)
@given(text=LOSSLESS)
def test_byte_decodes_to_the_text_that_was_encoded(byte, sizes, text):
    ids = byte.encode_batch([text])[0]
    assert byte.decode(ids) == text
    assert ids[-1] == byte.specials["eod"]
    assert not set(ids[:-1].tolist()) & set(byte.specials.values())
    assert sizes[ids].sum() == len(text.encode("utf-8"))


def test_byte_is_lossless_on_every_scalar_value(byte):
    """Every value of the planes that hold characters, and every 61st of the others, which have all bytes among them."""
    others = set(range(0x40000, 0xE0000)) | set(range(0xF0000, 0x110000))
    left_out = others - {*range(0x40000, 0x110000, 61)}
    text = "".join(chr(c) for c in (*range(0xD800), *range(0xE000, 0x110000)) if c not in left_out)
    pairs = [text[i : i + 2] for i in range(0, len(text), 2)]  # short words: long ones of rare bytes are slow to encode
    parts = [" ".join(pairs[i : i + 2000]) for i in range(0, len(pairs), 2000)]
    assert [byte.decode(ids) for ids in byte.encode_batch(parts)] == parts


@pytest.mark.parametrize("unit", ["a", "汉", "🙂", "\u0301", "\n"])
def test_a_run_without_spaces_costs_the_same_for_every_24_code_points(byte, unit):
    length = 10**6 if unit in "a汉" else 10**5
    ids = byte.encode_batch([unit * length])[0][:-1]
    assert byte.decode(ids) == unit * length
    piece, rest = byte.encode_batch([unit * 24, unit * (length % 24)])
    assert len(ids) == length // 24 * (len(piece) - 1) + len(rest) - 1
    assert byte.specials["unk"] not in ids


def test_runs_of_up_to_24_code_points_are_cut_as_gpt2_cuts_them(byte):
    from tokenizers.pre_tokenizers import ByteLevel

    gpt2 = ByteLevel(add_prefix_space=False, use_regex=True)
    engine = kinds.build(list(kinds.SPECIALS["byte"].values()), kinds.Rules("byte"))
    texts = [t for t in odd_texts(2000, seed=5) if not re.search(r"\S{24}|\s{24}", t)]
    texts += ["a   b\n\n c", "don't  we'll", " x", "x ", "\t\ty", *documents_of("en.txt", 20)]
    assert len(texts) > 500
    for text in texts:
        assert kinds.words_of(text, engine) == [word for word, _ in gpt2.pre_tokenize_str(text)]


def test_tokens_of_byte_can_be_looked_at(byte):
    row = {byte.token_text(i): i for i in range(byte.vocab_size)}
    assert len(row) == byte.vocab_size
    assert [byte.token_text(i) for i in range(3)] == ["<pad>", "<unk>", "<eod>"]
    assert " the" in row and "‿a" in row and "\\xe6" in row and "‿\\x80" in row
    assert byte.token_bytes()[[0, 1, 2, row[" the"], row["‿a"], row["\\xe6"]]].tolist() == [0, 0, 0, 4, 1, 1]
    with pytest.raises(TokenizerError, match="no token has the id"):
        byte.token_text(byte.vocab_size)


# Use: both


@pytest.mark.parametrize("name", ["uncased", "cased"])
def test_special_tokens_in_text_are_text_for_bert(name, request):
    tokenizer = request.getfixturevalue(name)
    found = tokenizer.encode_batch(["a [SEP] b", "[CLS][PAD]x[MASK]", "<eod> [sep] [UNK]"])
    spaced = tokenizer.encode_batch(["a [ SEP ] b", "[ CLS ] [ PAD ] x [ MASK ]", "< eod > [ sep ] [ UNK ]"])
    assert [ids.tolist() for ids in found] == [ids.tolist() for ids in spaced]
    special = {tokenizer.specials[role] for role in ("pad", "cls", "sep", "mask")}
    assert not any(special & set(ids[1:-1].tolist()) for ids in found)


def test_special_tokens_in_text_are_text_for_byte(byte):
    for ids in byte.encode_batch(["<eod> a<eod>b <pad><unk>", "<eod>", "[SEP]"]):
        assert ids[-1] == byte.specials["eod"] and min(ids[:-1]) > max(byte.specials.values())


@pytest.mark.parametrize("name", ["uncased", "cased", "byte"])
def test_auto_tokenizer_opens_the_folder_with_the_same_ids(name, request):
    transformers = pytest.importorskip("transformers")
    tokenizer = request.getfixturevalue(name)
    stock = transformers.AutoTokenizer.from_pretrained(tokenizer.folder)
    texts = [*odd_texts(1000, seed=6), *documents_of("en.txt", 10), *documents_of("zh.txt", 20), "", "\ta  b\n"]
    ids = [row.tolist() for row in tokenizer.encode_batch(texts)]
    assert ids == stock(texts)["input_ids"]
    assert len(stock) == tokenizer.vocab_size
    assert stock.model_max_length > 10**20
    roles = {"eod": "eos"}
    for role, token in tokenizer.specials.items():
        assert getattr(stock, f"{roles.get(role, role)}_token_id") == token
    if name == "byte":
        assert [stock.decode(row, skip_special_tokens=True) for row in ids] == texts
        assert set(stock("a")) == {"input_ids", "attention_mask"}
    else:
        assert type(stock).__name__ in ("BertTokenizer", "BertTokenizerFast")
        assert stock("a", "b")["token_type_ids"] == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("name", ["uncased", "byte"])
def test_a_lone_surrogate_is_refused_with_its_place(name, request):
    with pytest.raises(TokenizerError, match=r"text 1 of the batch, character 3: lone surrogate '\\ud800'"):
        request.getfixturevalue(name).encode_batch(["fine", "ab\ud800"])


# Settings

SETTINGS = {
    "stock": {"kind": "bert"},
    "cased": {"kind": "bert", "lowercase": False},
    "accents": {"kind": "bert", "strip_accents": False},
    "stripped": {"kind": "bert", "lowercase": False, "strip_accents": True},
    "digits": {"kind": "bert", "digits": "single"},
    "folded": {"kind": "bert", "width": "fold"},
    "everything": {
        "kind": "bert",
        "digits": "single",
        "width": "fold",
        "strip_accents": False,
        "special_tokens": ["[DOC]", "<|user|>", "[unused7]"],
        "reserved": 3,
        "multiple_of": 64,
    },
    "marked": {"kind": "bert", "special_tokens": ["[DOC]", "<|user|>"], "reserved": 5},
    "byte": {"kind": "byte", "special_tokens": ["[DOC]", "<|user|>"], "reserved": 5, "multiple_of": 64},
    "byte digits": {"kind": "byte", "digits": "single"},
}


@pytest.fixture(scope="module")
def variants(tmp_path_factory) -> dict[str, ours.Tokenizer]:
    """One small vocabulary for each of SETTINGS."""
    root = tmp_path_factory.mktemp("variants")
    documents = [*documents_of("en.txt", 40), *documents_of("zh.txt", 60), *odd_texts(150, seed=9)]
    documents += [f"In {n} naïve Élan, ＡＢＣ１２, ﬁne Ａ１ 漢字 café {n}." for n in range(1990, 2030)]
    return {
        name: train(root / name.replace(" ", "-"), documents, vocab_size=2400, plot=False, **settings)
        for name, settings in SETTINGS.items()
    }


def words_in(tokenizer: ours.Tokenizer, text: str) -> list[str]:
    return kinds.words_of(text, tokenizer.vocabulary.engine)


def test_case_and_accents_are_two_settings(variants):
    text = "Élan NAÏVE"
    assert words_in(variants["stock"], text) == ["elan", "naive"]
    assert words_in(variants["cased"], text) == ["Élan", "NAÏVE"]
    assert words_in(variants["accents"], text) == ["élan", "naïve"]
    assert words_in(variants["stripped"], text) == ["Elan", "NAIVE"]


def test_single_digits_are_words_of_their_own(variants):
    assert words_in(variants["stock"], "in 2024, x86") == ["in", "2024", ",", "x86"]
    assert words_in(variants["digits"], "in 2024, x86") == ["in", "2", "0", "2", "4", ",", "x", "8", "6"]
    assert words_in(variants["byte"], "in 2024, x86") == ["in", "Ġ2024", ",", "Ġx", "86"]
    assert words_in(variants["byte digits"], "in 2024, x86") == ["in", "Ġ", "2", "0", "2", "4", ",", "Ġx", "8", "6"]
    for name in ("digits", "byte digits"):
        rows = [variants[name].token_text(token) for token in range(variants[name].vocab_size)]
        assert not [row for row in rows if len(re.findall(r"\d", row)) > 1 and "\\x" not in row]
    for text in ("1234567890", " 1\n22 ３３ ½Ⅷ٣"):
        assert variants["byte digits"].decode(variants["byte digits"].encode_batch([text])[0]) == text


def test_full_width_is_folded_to_half(variants):
    assert words_in(variants["stock"], "ＡＢＣ，１２ ﬁ") == ["ａｂｃ", "，", "１２", "ﬁ"]
    assert words_in(variants["folded"], "ＡＢＣ，１２ ﬁ") == ["abc", ",", "12", "fi"]
    assert words_in(variants["everything"], "ＡＢ１２ é") == ["ab", "1", "2", "é"]
    full, half = variants["folded"].encode_batch(["Ａ１", "a1"])
    assert full.tolist() == half.tolist()


def test_traditional_characters_are_kept(variants):
    for name in ("stock", "folded", "everything"):
        assert words_in(variants[name], "漢字汉字") == ["漢", "字", "汉", "字"]
        assert variants[name].decode(variants[name].encode_batch(["漢字"])[0]) == "漢 字"
    for tokenizer in variants.values():
        assert tokenizer.encode_batch(["漢"])[0].tolist() != tokenizer.encode_batch(["汉"])[0].tolist()


def test_ids_are_ours_then_special_tokens_then_reserved_slots(variants):
    rows = [variants["marked"].token_text(token) for token in range(13)]
    assert rows[:12] == [*kinds.SPECIALS["bert"].values(), "[DOC]", "<|user|>", *(f"[unused{n}]" for n in range(5))]
    assert variants["marked"].special_tokens == {"[DOC]": 5, "<|user|>": 6}
    rows = [variants["byte"].token_text(token) for token in range(11)]
    assert rows[:10] == ["<pad>", "<unk>", "<eod>", "[DOC]", "<|user|>", *(f"<unused{n}>" for n in range(5))]
    assert not variants["byte"].token_bytes()[:10].any() and variants["byte"].token_bytes()[10:].all()
    names = [variants["everything"].token_text(token) for token in range(11)]
    assert names[5:] == ["[DOC]", "<|user|>", "[unused7]", "[unused0]", "[unused1]", "[unused2]"]


@pytest.mark.parametrize("name", ["marked", "everything", "byte"])
def test_special_tokens_of_the_user_are_text_unless_asked_for(variants, name):
    tokenizer = variants[name]
    ids = tokenizer.special_tokens
    own = tokenizer.specials["mask" if tokenizer.kind == "bert" else "eod"]
    text = f"a[DOC]b <|user|> {tokenizer.token_text(own)} [unused1]<unused1>"
    plain, asked = tokenizer.encode_batch([text])[0], tokenizer.encode_batch([text], special_tokens=True)[0]
    marks = {*tokenizer.specials.values(), *ids.values()} - {tokenizer.specials["unk"]}
    template = 1 if tokenizer.kind == "byte" else 2
    assert sum(token in marks for token in plain.tolist()) == template
    assert [token for token in asked.tolist() if token in marks and token != asked[0]][:3] == [
        *[*ids.values()][:2],
        own,
    ]
    reserved = [token for token in range(tokenizer.vocab_size) if "unused" in tokenizer.token_text(token)]
    assert len(reserved) >= 3 and not {*reserved} - {*ids.values()} & {*plain.tolist(), *asked.tolist()}
    if name == "byte":
        assert tokenizer.decode(plain) == text
        assert tokenizer.decode(asked) == "ab   [unused1]<unused1>"
    again = tokenizer.encode_batch([text])[0]
    assert again.tolist() == plain.tolist(), "asking once changes nothing later"


@given(text=st.lists(st.sampled_from(["[DOC]", "[unused0]", "<unused1>", "<|user|>", "<eod>", " ", "a", "[", "汉"])))
@settings(max_examples=200, deadline=None)
def test_no_text_becomes_a_mark(variants, text):
    for name in ("marked", "everything", "byte"):
        tokenizer = variants[name]
        ids = tokenizer.encode_batch(["".join(text)])[0].tolist()
        inside = ids[1:-1] if tokenizer.kind == "bert" else ids[:-1]
        assert not tokenizer.vocabulary.marks - {tokenizer.specials["unk"]} & set(inside)


def test_every_setting_is_in_the_index_and_changes_the_identity(variants):
    assert len({tokenizer.fingerprint for tokenizer in variants.values()}) == len(variants)
    for name, tokenizer in variants.items():
        index = json.loads((tokenizer.folder / "index.json").read_text(encoding="utf-8"))
        said = index["options"] | index["rules"]
        for key, value in SETTINGS[name].items():
            assert said[key] == value, (name, key)
        assert tokenizer.rules == kinds.Rules(**index["rules"])
    assert variants["stock"].rules == kinds.Rules("bert", True, True, "whole", "keep")
    assert variants["byte"].rules == kinds.Rules("byte", False, False, "whole", "keep")


STOCK = """
import json, sys
import transformers
transformers.logging.set_verbosity_error()
texts = json.loads(open(sys.argv[1], encoding="utf-8").read())
for folder in sys.argv[2:]:
    stock = transformers.AutoTokenizer.from_pretrained(folder)
    rows = stock(texts, split_special_tokens=True)["input_ids"]
    print(json.dumps({
        "ids": rows,
        "asked": stock(texts)["input_ids"],
        "decoded": [stock.decode(row, skip_special_tokens=True) for row in rows],
        "pair": stock("a", "b").get("token_type_ids"),
        "columns": sorted(stock("a")),
        "class": type(stock).__name__,
        "len": len(stock),
    }))
"""


def opened_by_transformers(folders: list[Path], texts: list[str], scratch: Path, **environment) -> list[dict]:
    """Encode the texts with AutoTokenizer in a fresh process."""
    scratch.write_text(json.dumps(texts), encoding="utf-8")
    command = [sys.executable, "-c", STOCK, str(scratch), *map(str, folders)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check_stock(variants: dict[str, ours.Tokenizer], scratch: Path, **environment) -> None:
    texts = [
        *odd_texts(200, seed=10),
        *documents_of("en.txt", 3),
        *documents_of("zh.txt", 5),
        "",
        "in 2024 Élan ＡＢ１２",
    ]
    texts += ["a [DOC] b<|user|>c [unused0]<unused1> [MASK]<eod>[unused7]"]
    found = opened_by_transformers([t.folder for t in variants.values()], texts, scratch, **environment)
    for (name, tokenizer), said in zip(variants.items(), found, strict=True):
        ids = [row.tolist() for row in tokenizer.encode_batch(texts)]
        assert said["ids"] == ids, name
        assert said["asked"] == [row.tolist() for row in tokenizer.encode_batch(texts, special_tokens=True)], name
        assert said["decoded"] == [tokenizer.decode(row) for row in ids], name
        assert said["len"] == tokenizer.vocab_size
        if tokenizer.kind == "bert":
            assert said["pair"] == [0, 0, 0, 1, 1]
            stock = tokenizer.rules.digits == "whole" and tokenizer.rules.width == "keep"
            assert said["class"].startswith("BertTokenizer") == stock, name
        else:
            assert said["columns"] == ["attention_mask", "input_ids"]


def test_auto_tokenizer_opens_every_setting_with_the_same_ids(variants, tmp_path):
    pytest.importorskip("transformers")
    check_stock(variants, tmp_path / "texts.json")


@pytest.mark.skipif("TRANSFORMERS4" not in os.environ, reason="set TRANSFORMERS4 to a folder with transformers 4")
def test_auto_tokenizer_of_transformers_4_does_too(variants, tmp_path):
    check_stock(variants, tmp_path / "texts.json", PYTHONPATH=os.environ["TRANSFORMERS4"])


def test_the_size_is_a_multiple_whatever_the_text_offers(tmp_path):
    documents = [f"the cat sat {n}" for n in range(40)]
    small = train(tmp_path / "small", documents, kind="bert", vocab_size=5000, multiple_of=64)
    rows = [small.token_text(token) for token in range(small.vocab_size)]
    filler = [row for row in rows if row.startswith("[unused")]
    assert small.vocab_size == 64 and rows[-len(filler) :] == [f"[unused{n}]" for n in range(len(filler))]
    assert [rows[token] for token in small.encode_batch(["the cat sat"])[0]] == ["[CLS]", "the", "cat", "sat", "[SEP]"]
    documents = documents_of("en.txt", 30)
    for multiple, size in ((64, 640), (100, 700), (1, 620)):
        found = train(tmp_path / str(multiple), documents, kind="byte", vocab_size=620, multiple_of=multiple)
        assert found.vocab_size == size and "unused" not in found.token_text(size - 1)
    both = train(tmp_path / "both", ["a"] * 3 + ["b c"] * 30, kind="byte", vocab_size=620, reserved=2, multiple_of=64)
    slots = [token for token in range(both.vocab_size) if "unused" in both.token_text(token)]
    assert both.vocab_size % 64 == 0 and both.token_text(both.vocab_size - 1) == f"<unused{len(slots) - 1}>"
    assert slots[:2] == [3, 4] and len(slots) > 2


SPELLED = {
    "bert": ["doc", "DOC", "##x", "[", "汉", "e\u0301"],
    "byte": ["doc", "‿x", "‿[", "Ġthe", "é", "<|", "'l", "ä½ł"],
}


@pytest.mark.parametrize(("kind", "token"), [(kind, token) for kind, tokens in SPELLED.items() for token in tokens])
def test_a_special_token_that_text_could_spell_is_refused(tmp_path, kind, token):
    message = refused(tmp_path, TokenizerError, str(SAMPLE), kind=kind, vocab_size=1000, special_tokens=[token])
    assert re.search("(?s)could not be told from text.*choose a string that no word begins with", message), message


@pytest.mark.parametrize("kind", ["bert", "byte"])
def test_special_tokens_that_text_cannot_spell_are_taken(tmp_path, kind):
    tokens = ["[DOC]", "<|user|>", "<s>", "[a_b-c]", "<|汉|>", "a.b", "{x}", "汉字"]
    documents = documents_of("en.txt", 10) + ["".join(tokens) * 3] * 3
    tokenizer = train(tmp_path, documents, kind=kind, vocab_size=1000, special_tokens=tokens)
    assert list(tokenizer.special_tokens) == tokens
    for token, number in tokenizer.special_tokens.items():
        plain, asked = tokenizer.encode_batch([token])[0], tokenizer.encode_batch([token], special_tokens=True)[0]
        assert number not in plain and number in asked


# Folders


def test_the_fingerprint_ignores_places_and_follows_every_option(tmp_path):
    documents = [*documents_of("en.txt", 15), *odd_texts(10, seed=7)]
    first = train(tmp_path / "a", documents, kind="bert", vocab_size=700)
    again = train(tmp_path / "elsewhere" / "b", documents, kind="bert", vocab_size=700)
    assert first.fingerprint == again.fingerprint
    others = [
        train(tmp_path / "c", documents, kind="bert", vocab_size=701),
        train(tmp_path / "d", documents, kind="bert", vocab_size=700, lowercase=False),
        train(tmp_path / "e", documents, kind="bert", vocab_size=700, alphabet_min_count=2),
        train(tmp_path / "f", documents, kind="byte", vocab_size=700),
        train(tmp_path / "g", documents[1:], kind="bert", vocab_size=700),
    ]
    assert len({first.fingerprint, *(other.fingerprint for other in others)}) == 6


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.txt", "tokenizer_config.json", "report.json", "index.json"])
def test_a_damaged_folder_is_refused_naming_the_file(uncased, tmp_path, name):
    def copy(case: str) -> Path:
        return Path(shutil.copytree(uncased.folder, tmp_path / case)) / name

    flipped, cut, missing = copy("flipped"), copy("cut"), copy("missing")
    data = bytearray(flipped.read_bytes())
    data[-10] ^= 1
    flipped.write_bytes(data)
    cut.write_bytes(cut.read_bytes()[:-7])
    missing.unlink()
    for path in (flipped, cut, missing):
        with pytest.raises(TokenizerError, match=re.escape(name)):
            open_tokenizer(path.parent)
    assert open_tokenizer(shutil.copytree(uncased.folder, tmp_path / "whole")).fingerprint == uncased.fingerprint


def test_a_folder_of_an_older_version_says_so(uncased, tmp_path):
    from pretrain.storage.index import write_index

    old = Path(shutil.copytree(uncased.folder, tmp_path / "old"))
    index = json.loads((old / "index.json").read_text(encoding="utf-8"))
    (old / "index.json").unlink()
    write_index(old, {key: index[key] for key in ("stage", "kind", "vocab_size", "specials", "corpus")})
    with pytest.raises(TokenizerError, match=r"made by another version(.|\n)*its format is 1, this version reads 2"):
        open_tokenizer(old)


def test_a_folder_of_another_stage_is_refused(tmp_path):
    from pretrain.storage.index import write_index

    write_index(tmp_path, {"stage": "shards"})
    with pytest.raises(TokenizerError, match="is not of the stage tokenizer"):
        open_tokenizer(tmp_path)


def refused(tmp_path: Path, expected: type[Exception], corpus: str, **settings) -> str:
    """The message of a run that must fail with this very error, and leave nothing behind."""
    out = tmp_path / "results" / "out"
    with pytest.raises(expected) as error:
        run(TokenizerConfig(corpus=corpus, out=str(out), **settings))
    assert type(error.value) is expected
    assert not out.parent.exists() or not entries(out.parent)
    return str(error.value)


def test_a_vocabulary_smaller_than_its_alphabet_is_refused(tmp_path):
    corpus = corpus_of(tmp_path / "text", [f"abc {n}" for n in range(100)])
    # a b c and ten digits begin; b c and ten digits continue
    message = refused(tmp_path, TokenizerError, corpus, kind="bert", vocab_size=20)
    assert re.search(
        "(?s)vocab_size = 20 is too small.*5 specials and 25 symbols.*need 30.*alphabet_min_count above 1", message
    ), message
    message = refused(tmp_path, TokenizerError, corpus, kind="byte", vocab_size=514)
    assert re.search(
        "(?s)vocab_size = 514 .*3 specials and 512 symbols.*need 515.*set vocab_size to 515 or more$", message
    ), message


def test_a_corpus_without_train_or_heldout_documents_is_refused(tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n\n")
    assert "0 train and 0 held-out" in refused(tmp_path, CorpusError, str(empty), kind="bert", vocab_size=500)
    one = tmp_path / "one.txt"
    one.write_text("just one document\n")
    message = refused(tmp_path, CorpusError, str(one), kind="byte", vocab_size=600)
    assert re.search("(?s)1 train and 0 held-out.*heldout_fraction", message), message
    held = corpus_of(tmp_path / "held", ["just one document"], heldout_fraction=0.999999)
    assert "0 train and 1 held-out" in refused(tmp_path, CorpusError, held, kind="bert", vocab_size=500)


@pytest.mark.parametrize("character", ["\u200b", "\x01", "\ue000", "\u0301", "x" * 101])
def test_train_text_without_a_word_is_refused(tmp_path, character):
    corpus = corpus_of(tmp_path / "text", [" ".join([character] * n) for n in range(1, 40)])
    message = refused(tmp_path, CorpusError, corpus, kind="bert", vocab_size=500)
    assert re.search("(?s)no word to learn from.*control characters, words of more than 100.*byte", message), message
    assert train(tmp_path, kind="byte", vocab_size=600, documents=[character * n for n in range(1, 40)]).lossless


def test_text_that_breaks_off_leaves_nothing_half_written(tmp_path):
    path = tmp_path / "text.txt.gz"
    path.write_bytes(gzip.compress(("\n\n".join(documents_of("en.txt", 50))).encode())[:-100])
    message = refused(tmp_path, CorpusError, str(path), kind="bert", vocab_size=500)
    assert "damaged" in message and str(path) in message


@pytest.mark.parametrize("way", ["train", "adopt", "extend", "compare"])
def test_records_that_give_no_document_are_counted_printed_and_on_record(byte, uncased, tmp_path, capsys, way):
    corpus = Path(corpus_of(tmp_path / "text", [*documents_of("en.txt", 40), ""]))
    with open(corpus / "text.jsonl", "a", encoding="utf-8") as file:
        file.write('{broken\n{"words": 1}\n')
    recipe = json.loads((corpus / "recipe.yaml").read_text())
    recipe["sources"][0]["bad_records"] = "skip"
    (corpus / "recipe.yaml").write_text(json.dumps(recipe))
    values = {"corpus": str(corpus), "out": str(tmp_path / "out"), "plot": False}
    if way == "compare":
        found = compare(CompareConfig(**values, vocabularies={"a": str(byte.folder), "b": str(uncased.folder)}))
    else:
        keys = {"train": {"kind": "byte", "vocab_size": 600}, "adopt": {"adopt": str(uncased.folder / "vocab.txt")}}
        keys["extend"] = {"extend": str(byte.folder), "vocab_size": 4001}
        found = run(TokenizerConfig(**values, **keys[way]))
    assert {kind: part["records"] for kind, part in found["skipped"]["made"].items()} == {
        "empty": 1,
        "not JSON": 1,
        "no text": 1,
    }
    assert json.loads((tmp_path / "out" / "report.json").read_bytes())["skipped"] == found["skipped"]
    said = capsys.readouterr().out
    assert "no document from 3 records: made 1 empty, 1 not JSON, 1 no text (first: text.jsonl, line 41)" in said


def test_an_earlier_result_survives_a_failed_run_and_yields_to_a_good_one(tmp_path):
    first = train(tmp_path, [f"abc {n}" for n in range(100)], kind="bert", vocab_size=60)
    with pytest.raises(TokenizerError, match="too small"):
        train(tmp_path, [f"abc {n}" for n in range(100)], kind="bert", vocab_size=10, replace=True)
    assert open_tokenizer(tmp_path / "tokenizer").fingerprint == first.fingerprint
    second = train(tmp_path, [f"abd {n}" for n in range(100)], kind="byte", vocab_size=520, replace=True)
    assert open_tokenizer(tmp_path / "tokenizer").fingerprint == second.fingerprint != first.fingerprint
    assert not (second.folder / "vocab.txt").exists()


@pytest.mark.parametrize(
    ("name", "way"), [("bert", "train"), ("byte", "train"), ("adopt", "adopt"), ("extend", "extend")]
)
def test_the_sample_configurations_are_the_three_ways(name, way, tmp_path):
    config = load(TokenizerConfig, ROOT / "configs" / "sample" / f"tokenizer-{name}.yaml")
    assert config.way == way
    (tmp_path / "resolved.yaml").write_text(dump(config), encoding="utf-8")
    assert load(TokenizerConfig, tmp_path / "resolved.yaml") == config


def test_sentinels_of_a_file_or_the_command_line_are_special_tokens():
    """Every value of YAML is a text until it is validated."""
    sample = ROOT / "configs" / "sample" / "tokenizer-byte.yaml"
    config = load(TokenizerConfig, sample, ["special_tokens=[<output>]", "sentinels=3"])
    assert config.special_tokens == ["<output>", "<extra_id_0>", "<extra_id_1>", "<extra_id_2>"]


BAD = [
    ("no kind", ["kind=null"], ["kind is missing (or adopt, or extend)"]),
    ("no size", ["vocab_size=null"], ["vocab_size is missing"]),
    ("an unknown key", ["digit=single"], ["unknown key digit: did you mean digits?"]),
    ("an unknown width", ["width=half"], ["width = 'half'", "'keep' or 'fold'"]),
    ("accents of byte", ["kind=byte", "strip_accents=true"], ["strip_accents = true contradicts kind = byte"]),
    ("width of byte", ["kind=byte", "width=fold"], ["width = fold contradicts kind = byte"]),
    ("no multiple", ["multiple_of=0"], ["multiple_of = '0'", "greater than 0"]),
    ("slots without end", ["reserved=100000000000"], ["reserved = '100000000000'", "less than or equal to 1048576"]),
    ("a multiple without end", ["multiple_of=100000000"], ["multiple_of = '100000000'", "less than or equal to 65536"]),
    ("fewer than no slots", ["reserved=-1"], ["reserved = '-1'", "greater than or equal to 0"]),
    ("an empty special token", ["special_tokens=['']"], ["special_tokens.0 = ''", "white space"]),
    ("white space", ["special_tokens=['[A]', '[A B]']"], ["special_tokens.1 = '[A B]'", "white space"]),
    ("an ideographic space", ["special_tokens=['[A\u3000B]']"], ["special_tokens.0", "white space"]),
    ("an invisible one", ["special_tokens=['[A\u200b]']"], ["invisible characters are text"]),
    ("one of ours", ["special_tokens=['[SEP]']"], ["'[SEP]' is one of ours already"]),
    ("one twice", ["special_tokens=['[A]', '[A]']"], ["special_tokens.1 = '[A]' is in the list already"]),
    ("a slot", ["special_tokens=['[unused1]']", "reserved=2"], ["'[unused1]' is a reserved slot already"]),
    ("a word", ["special_tokens=[doc]"], ["'doc' could not be told from text", "such as [DOC]"]),
    ("slots that fill it", ["reserved=1990", "multiple_of=64"],
     ["vocab_size = 2048 is too small", "1995 specials (1990 of them reserved slots)", "set vocab_size to"]),
    ("roles", ["roles={eod: x}"], ["is for adopted vocabularies: set adopt, or remove roles"]),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "overrides", "fragments"), BAD, ids=[row[0] for row in BAD])
def test_the_message_helps_and_nothing_is_written(tmp_path, capsys, wrong, overrides, fragments):
    config = tmp_path / "tokenizer.yaml"
    values = {"corpus": corpus_of(tmp_path / "text", documents_of("en.txt", 12)), "out": str(tmp_path / "out")}
    config.write_text(json.dumps(values | {"kind": "bert", "vocab_size": 2048}), encoding="utf-8")
    assert cli.main("tokenizer", [str(config), *overrides]) == 2
    said = capsys.readouterr().err
    assert "error: " in said and "Traceback" not in said
    for fragment in fragments:
        assert fragment in said
    assert entries(tmp_path) == sorted(["text", config.name])


def test_settings_that_contradict_byte_are_refused(tmp_path):
    values = {"corpus": "x", "out": "y", "kind": "byte", "vocab_size": "1000"}
    with pytest.raises(ConfigError, match="lowercase = true contradicts kind = byte"):
        build(TokenizerConfig, {**values, "lowercase": "true"}, "test.yaml")
    with pytest.raises(ConfigError, match="alphabet_min_count = 2 contradicts kind = byte"):
        build(TokenizerConfig, {**values, "alphabet_min_count": "2"}, "test.yaml")
    for extra in ({}, {"lowercase": "false"}, {"alphabet_min_count": "1"}, {"kind": "bert", "lowercase": "true"}):
        config = build(TokenizerConfig, {**values, **extra}, "test.yaml")
        (tmp_path / "resolved.yaml").write_text(dump(config), encoding="utf-8")
        assert load(TokenizerConfig, tmp_path / "resolved.yaml") == config
