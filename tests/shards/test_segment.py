"""Beginnings of words: in English, Chinese and mixed text, around unknown tokens, in both kinds of vocabulary."""

import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from pretrain.errors import ConfigError, ShardError
from pretrain.objectives.masked_lm import MaskedLM, MaskedLMConfig
from pretrain.order.stream import Windows
from pretrain.shards import Shards, segment, word_starts
from pretrain.shards.segment import Segmenter, WordsConfig
from pretrain.shards.word_starts import HAN, StoredWordStarts, open_words
from pretrain.tokenizer import Tokenizer, open_tokenizer
from pretrain.tokenizer.report import han_in
from tests.conftest import ROOT
from tests.helpers.entries import entries
from tests.helpers.processes import started

jieba = pytest.importorskip("jieba")


@pytest.fixture(scope="module")
def found(prepared, tmp_path_factory) -> dict:
    """Copies of the shards of both kinds, with their words."""
    root = tmp_path_factory.mktemp("words")
    made = {}
    for kind, folder in prepared.shards.items():
        made[kind] = shutil.copytree(folder, root / kind)
        segment.run(WordsConfig(shards=str(made[kind]), tokenizer=str(prepared.tokenizer[kind])))
    return made


def split(text: str, tokenizer: Tokenizer) -> list[str]:
    """The words of a text by its tokens, with `|` between the tokens of a word and without marks."""
    ids = tokenizer.encode_batch([text])[0]
    begins = word_starts.TokenKinds(tokenizer).begins(ids, Segmenter("jieba", b"").cut())
    assert len(begins) == len(ids) and begins[0]
    found = []
    for token, begin in zip(ids.tolist(), begins.tolist(), strict=True):
        if begin:
            found.append([])
        found[-1].append(tokenizer.token_text(token))
    specials = {
        tokenizer.token_text(tokenizer.specials[role]) for role in ("cls", "sep", "eod") if role in tokenizer.specials
    }
    return ["|".join(word) for word in found if word[0] not in specials]


@pytest.fixture(scope="module")
def bert(prepared) -> Tokenizer:
    return open_tokenizer(prepared.tokenizer["bert"])


@pytest.fixture(scope="module")
def byte(prepared) -> Tokenizer:
    return open_tokenizer(prepared.tokenizer["byte"])


def joined(text: str, tokenizer: Tokenizer) -> list[str]:
    """`split`, with the tokens of each word joined to text."""
    ids = tokenizer.encode_batch([text])[0]
    begins = np.flatnonzero(word_starts.TokenKinds(tokenizer).begins(ids, Segmenter("jieba", b"").cut()))
    ends = [*begins[1:].tolist(), len(ids)]
    raw = [tokenizer.vocabulary.raw(token) for token in ids.tolist()]
    return [text for text in (b"".join(raw[a:b]).decode() for a, b in zip(begins, ends, strict=True)) if text]


def test_chinese_characters_join_to_words_and_english_pieces_to_theirs(bert):
    text = "中国人民在天下, the learner unbelievably 年春风"
    chinese = [*jieba.lcut("中国人民在天下")]
    assert chinese == ["中国", "人民", "在", "天下"]
    assert joined(text, bert) == [*chinese, ",", "the", "learner", "unbelievably", *jieba.lcut("年春风")]
    assert split("unbelievably 天下", bert)[-1] == "天|下" and "|##" in split("unbelievably", bert)[0]


def test_an_unknown_character_is_a_word_and_parts_its_neighbours(bert):
    unknown = "𪚥"
    assert bert.specials["unk"] in bert.encode_batch([unknown])[0]
    assert split(f"中国{unknown}人民", bert) == ["中|国", "[UNK]", "人|民"]
    assert split(f"hello{unknown}", bert)[-1] == "[UNK]"


def test_punctuation_digits_and_emoji_are_words_of_their_own(bert):
    found = split("人民。人民，18 人民😀人民!", bert)
    assert [word for word in found if "人" in word] == ["人|民"] * 4
    assert "。" in found and "，" in found and "!" in found
    assert not any("民" in word and word != "人|民" for word in found)


def test_the_bytes_of_a_word_stay_together(byte):
    text = "low 中国人民学习 lowest, 2024年😀."
    found = joined(text, byte)
    assert "".join(found) == text
    chinese = [word for word in found if HAN.search(word)]
    assert [word.strip() for word in chinese] == [*jieba.lcut("中国人民学习"), "年"]
    assert " lowest" in found and chinese[0].startswith(" ")  # a space belongs to the next word in both


@pytest.mark.parametrize("kind", ["bert", "byte"])
def test_any_text_is_cut_between_characters_and_every_chinese_word_of_jieba_is_whole(kind, bert, byte):
    tokenizer = {"bert": bert, "byte": byte}[kind]
    text = (ROOT / "data/sample/zh.txt").read_text(encoding="utf-8")[:6000]
    found = joined(text, tokenizer)  # decodes: no character is cut
    if kind == "byte":
        assert "".join(found) == text
    expected = [word for run in HAN.findall(text) for word in jieba.lcut(run)]
    ours = [run for word in found for run in HAN.findall(word)]
    known = [word for word in expected if bert.specials["unk"] not in bert.encode_batch([word])[0]]
    whole = sum(word in set(ours) for word in known) / len(known)
    # A few `byte` tokens hold characters of two words, which then become one. [UNK] divides a few runs of `bert`.
    assert ours == expected if kind == "bert" and len(known) == len(expected) else whole > 0.9, whole


def test_the_characters_of_every_extension_are_chinese():
    """Unicode 17, which may be newer than the data of this Python: here and in the report of a vocabulary."""
    first = [0x3400, 0x4E00, 0x20000, 0x2A700, 0x2B740, 0x2B820, 0x2CEB0, 0x2EBF0, 0x30000, 0x31350, 0x323B0]
    last = [0x4DBF, 0x9FFF, 0x2A6DF, 0x2B73F, 0x2B81D, 0x2CEAD, 0x2EBE0, 0x2EE5D, 0x3134A, 0x323AF, 0x33479]
    characters = [chr(point) for point in first + last]
    assert all(map(HAN.fullmatch, characters)) and han_in(characters) == set(characters)


def test_a_run_of_a_hundred_thousand_characters_is_cut(bert):
    started = time.process_time()
    found = joined("中国人民" * 25_000, bert)
    assert set(found) <= {"中国", "人民", "中国人民", "国人"} and time.process_time() - started < 20


# The stage


@pytest.mark.parametrize("kind", ["bert", "byte"])
@pytest.mark.parametrize("side", ["train", "heldout"])
def test_the_stage_says_of_every_document_what_its_ids_say(kind, side, found, prepared):
    shards, tokens = Shards(found[kind], side), word_starts.TokenKinds(open_tokenizer(prepared.tokenizer[kind]))
    cut = Segmenter("jieba", b"").cut()
    read = StoredWordStarts(shards)
    for document in range(shards.documents):
        begin, end = shards.span(document)
        expected = tokens.begins(shards.document(document), cut)
        assert np.array_equal(read.gather(np.array([begin]), end - begin)[0], expected), document


def test_windows_are_read_from_any_position_whatever_their_length(found):
    shards = Shards(found["bert"])
    read = StoredWordStarts(shards)
    stream = read.gather(np.zeros(1, np.int64), shards.tokens)[0]
    rng = np.random.default_rng(0)
    for length in (1, 7, 8, 9, 64, 513):
        starts = np.concatenate([rng.integers(0, shards.tokens - length, 40), [0, shards.tokens - length]])
        assert np.array_equal(read.gather(starts, length), stream[starts[:, None] + np.arange(length)])
    with pytest.raises(AssertionError):
        read.gather(np.array([shards.tokens - 3]), 4)


def test_workers_and_stretches_change_no_byte(found, prepared, tmp_path, monkeypatch):
    shards = shutil.copytree(prepared.shards["bert"], tmp_path / "shards")
    config = WordsConfig(shards=str(shards), tokenizer=str(prepared.tokenizer["bert"]), workers=2)
    segment.run(config)
    files = ["train.bits", "heldout.bits"]
    whole = [(found["bert"] / "words" / name).read_bytes() for name in files]
    assert [(shards / "words" / name).read_bytes() for name in files] == whole
    monkeypatch.setattr(segment, "STRETCH_TOKENS", 100)
    segment.run(config.model_copy(update={"workers": 1}))
    assert [(shards / "words" / name).read_bytes() for name in files] == whole
    first, second = (json.loads((f / "words/index.json").read_text())["fingerprint"] for f in (found["bert"], shards))
    assert first == second


def counted(function, calls: list):
    def call(*arguments):
        calls.append(arguments)
        return function(*arguments)

    return call


KILLED = """
import sys
sys.path.insert(0, {root!r})
from pretrain.shards import segment
segment.STRETCH_TOKENS = 100
segment.run(segment.WordsConfig(shards={shards!r}, tokenizer={tokenizer!r}))
"""


def test_a_killed_stage_goes_on_where_it_was(found, prepared, tmp_path, monkeypatch):
    shards = shutil.copytree(prepared.shards["bert"], tmp_path / "shards")
    code = KILLED.format(root=str(ROOT), shards=str(shards), tokenizer=str(prepared.tokenizer["bert"]))
    quiet = {"stderr": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    with started([sys.executable, "-c", code], **quiet) as process:
        while process.poll() is None and len(list(shards.glob(".words.work/stretches-*/*"))) < 20:
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    made = [path for path in shards.glob(".words.work/stretches-*/*") if path.suffix != ".tmp"]
    Shards(shards)  # unfinished work is not part of the set
    made[0].write_bytes(bytes([made[0].read_bytes()[0] ^ 1]) + made[0].read_bytes()[1:])  # so it is made again
    monkeypatch.setattr(segment, "STRETCH_TOKENS", 100)
    segmented = []
    monkeypatch.setattr(word_starts.TokenKinds, "begins", counted(word_starts.TokenKinds.begins, segmented))
    segment.run(WordsConfig(shards=str(shards), tokenizer=str(prepared.tokenizer["bert"])))
    opened = [Shards(shards, side) for side in segment.SIDES]
    assert len(segmented) == sum(len(list(segment._stretches(one))) for one in opened) - len(made) + 1
    for name in ("train.bits", "heldout.bits"):
        assert (shards / "words" / name).read_bytes() == (found["bert"] / "words" / name).read_bytes()
    assert not [name for name in entries(shards) if name.startswith(".")]


def test_a_users_dictionary_joins_what_it_names(prepared, tmp_path, bert):
    text = "春风又绿江南岸"
    assert text not in jieba.lcut(text)
    dictionary = tmp_path / "mine.txt"
    dictionary.write_text(f"{text} 100000 n\n", encoding="utf-8")
    cut = Segmenter("jieba", segment._dictionary(str(dictionary))).cut()
    assert cut(text) == [text]
    dictionary.write_text("春风 many words here\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="line 1"):
        segment._dictionary(str(dictionary))
    with pytest.raises(ConfigError, match="cannot be read"):
        segment._dictionary(str(tmp_path / "nosuch.txt"))


# Use


def test_chinese_without_its_words_is_refused(prepared, found, bert, byte):
    with pytest.raises(ShardError, match=r"(?s)Chinese words are not seen from the ids.*are Chinese.*launch/words.py"):
        open_words(Shards(prepared.shards["bert"]), bert)
    with pytest.raises(ShardError, match="are bytes"):
        open_words(Shards(prepared.shards["byte"]), byte)
    assert isinstance(open_words(Shards(found["bert"]), bert), StoredWordStarts)


def test_english_needs_no_stage(tmp_path, prepared, bert):
    from pretrain import shards

    english = (ROOT / "data/sample/en.txt").read_text(encoding="utf-8").split("\n\n")[:30]
    (tmp_path / "en.txt").write_text("\n\n".join(english), encoding="utf-8")
    (tmp_path / "recipe.yaml").write_text("name: en\nheldout_fraction: 0.2\nsources: [{name: en, files: [en.txt]}]\n")
    out = tmp_path / "shards"
    shards.run(shards.ShardsConfig(corpus=str(tmp_path), tokenizer=str(prepared.tokenizer["bert"]), out=str(out)))
    opened = Shards(out)
    read = open_words(opened, bert)
    starts = np.array([0, 11, 300])
    ids = opened.gather(starts, 40)
    text = [[not bert.token_text(i).startswith("##") for i in row] for row in ids.tolist()]
    assert read.gather(starts, 40).tolist() == text
    segment.run(WordsConfig(shards=str(out), tokenizer=str(prepared.tokenizer["bert"])))
    assert np.array_equal(open_words(opened, bert).gather(starts, 40), read.gather(starts, 40))


def test_words_of_other_shards_are_refused(found, prepared, tmp_path):
    other = shutil.copytree(prepared.shards["byte"], tmp_path / "shards")
    shutil.copytree(found["bert"] / "words", other / "words")
    with pytest.raises(ShardError, match="found in other shards"):
        StoredWordStarts(Shards(other))


def test_damaged_words_are_refused(found, prepared, tmp_path):
    shards = shutil.copytree(found["bert"], tmp_path / "shards")
    path = shards / "words" / "train.bits"
    data = bytearray(path.read_bytes())
    data[50] ^= 4
    path.write_bytes(data)
    with pytest.raises(ShardError, match=r"(?s)altered.*train\.bits"):
        StoredWordStarts(Shards(shards))
    path.write_bytes(data[:-1])
    with pytest.raises(ShardError, match="truncated"):
        StoredWordStarts(Shards(shards))


def test_whole_chinese_and_english_words_are_masked(found, bert):
    """Windows are cut anywhere: except for two words a window, a word is masked whole or not at all."""
    shards, T = Shards(found["bert"]), 64
    read = StoredWordStarts(shards)
    starts = np.arange(0, shards.tokens - T, 37)
    rows = Windows(shards, T, 5, read).rows(starts, T, words=True)
    ids, begins = rows.ids, rows.words
    config = MaskedLMConfig(kind="masked_lm", mask_ratio=0.2, mask_share=1, random_share=0, unit="word")
    objective = MaskedLM(config, shards.specials, shards.vocab_size, T, seed=5)
    assert objective.wants_words
    batch = objective.batch(rows, starts)
    masked = batch.inputs == shards.specials["mask"]
    assert batch.inputs.shape == ids.shape and (masked.sum(axis=1) <= 13).all()
    assert (masked.sum(axis=1) == 13).mean() > 0.95  # except in windows with almost only marks or [UNK]
    whole_characters = cut = 0
    special = np.isin(ids, list(shards.specials.values()))
    special[:, [0, -1]] = True
    for row in range(len(ids)):
        at, broken = 1, 0
        while at < T - 1:
            end = at + 1
            while end < T - 1 and not begins[row, end] and not special[row, end - 1] and not special[row, end]:
                end += 1
            taken = masked[row, at:end]
            broken += bool(taken.any() and not taken.all())
            whole_characters += int(taken.all() and end - at > 1)
            at = end
        assert broken <= 2, row
        cut += broken
    assert whole_characters > 200
