import itertools
import json
import pickle
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, normalizers, processors

from pretrain.errors import TokenizerError
from pretrain.tokenizer import open_tokenizer
from pretrain.tokenizer.fast.encode import GROUP, SMALL, Encoder, split
from pretrain.tokenizer.fast.prefixes import PADDING, Prefixes
from pretrain.tokenizer.kinds import PREFIX, Rules, build

SAMPLE = Path(__file__).resolve().parents[2] / "data" / "sample"
STRINGS = 30_000
MORE = ["<|user|>", "[unused0]", "<tool>"]

STOCK = {"uncased": Rules("bert", lowercase=True, strip_accents=True), "cased": Rules("bert")}
BERT = {
    "accents kept": Rules("bert", lowercase=True),
    "width folded": Rules("bert", lowercase=True, strip_accents=True, width="fold"),
    "cased, digits single, width folded": Rules("bert", digits="single", width="fold"),
}
BYTE = {"byte": Rules("byte"), "byte, digits single": Rules("byte", digits="single")}
RULES = STOCK | BERT | BYTE

# The parts of a fuzzed string, one kind on each line.
PARTS = [
    *(chr(code) for code in range(0xA1)),
    *"éİßΣςÀÉẞǅŠñøæŁıſÅ\u212b\u1e9b\u0344",
    *["e\u0301", "a\u0338", "x\u0323\u0307", "\u0301", "\u0345", "\u20dd", "\u0488", "\u302e", "\U0001d165"],
    *"\xad\u034f\u061c\u180e\u200b\u200c\u200d\u200e\u2028\u2029\u202e\u2060\ufeff\ufe0f\ufff9\ufffd\U000e0041",
    *"\u1680\u2000\u200a\u202f\u205f\u3000\ue000\uf8ff\U000f0000\U0010fffd\uffff\U0003134a\u0378",
    *"漢字汉中文的一是不了在人有我他这㐀䶿鿿豈\ufa0e\U00020000\U0002a6d7\U0002b740\U0002b820\U0002ceb0\U0002f800",
    *"，。、！？；：“”‘’（）《》【】『』—…·￥％＋～々〇〻㍿㈱①⑩㎏㏬",
    *"ＡＢｚ０１９！（）￥｡｢ｱｶﾞﾊﾟーあがゔか\u3099ハ\u309aㇰ",
    *[
        "한",
        "국",
        "ㄱ",
        "\u1112\u1161\u11ab",
        "ᄒ",
        "\u1161",
        "\u11ab",
        "ไทย",
        "กำ",
        "हिन्दी",
        "ক্ষ",
        "עברית",
        "שָׁלוֹם",
        "العربية",
        "٣٤",
    ],
    *[
        "😀",
        "👩\u200d👧",
        "🇨🇳",
        "👍🏽",
        "1\ufe0f\u20e3",
        "\U0001fae8",
        "½",
        "Ⅷ",
        "ﬁ",
        "ﷺ",
        "™",
        "€",
        "µ",
        "ª",
        "′",
        "″",
        "≠",
        "=\u0338",
    ],
    *["'s", "'t", "'re", "'ll", "'d", "'VE", "''", "don't", "I'm", "...", "!!", "--", "3.14", "2024", "１２３"],
    *["[SEP]", "[CLS]", "[MASK]", "[UNK]", "[PAD]", "<eod>", "<pad>", "<unk>", *MORE, "##", "##a", "‿", "‿a", "Ġ"],
    *["a" * 23, "b" * 25, "x" * 101, "汉" * 25, "\n" * 26, " " * 25, "!" * 24, "9" * 49, "é" * 101],
]


def fuzzed(count: int, seed: int) -> list[str]:
    """Words of the sample, spaces, the parts above and any code point at all."""
    draw = np.random.default_rng(seed)
    sample = [(SAMPLE / name).read_text(encoding="utf-8")[:60_000] for name in ("en.txt", "zh.txt")]
    known = [chr(c) for c in range(0x20000) if unicodedata.category(chr(c)) not in ("Cn", "Cs")]
    words = sample[0].split() + [sample[1][i : i + 4] for i in range(0, len(sample[1]), 4)]
    pools = [PARTS, words, [" "], known]
    parts = [np.array(pool, object)[draw.integers(len(pool), size=5 * count)] for pool in pools]
    parts = np.choose(draw.choice(4, size=5 * count, p=[0.4, 0.3, 0.2, 0.1]), parts).tolist()
    sizes = draw.integers(1, 7, size=count)
    ends = np.minimum(np.cumsum(sizes), len(parts))
    return ["".join(parts[start:end]) for start, end in itertools.pairwise([0, *ends.tolist()])]


@pytest.fixture(scope="module")
def strings() -> list[str]:
    return fuzzed(STRINGS, seed=1)


@pytest.fixture(scope="module")
def tokens(prepared) -> dict[str, list[str]]:
    """Trained tokens, and for `bert` letters that are rare in the sample: otherwise most fuzzed text is unknown."""
    found = {}
    for kind, folder in prepared.tokenizer.items():
        vocabulary = json.loads((folder / "tokenizer.json").read_bytes())["model"]["vocab"]
        more = MORE.copy()
        if kind == "bert":
            letters = {c for part in PARTS for c in part + part.lower() if c.isalnum() or c.isprintable()}
            more += [
                *sorted(letters),
                *(PREFIX[kind] + c for c in sorted(letters)),
                "THE",
                "##ING",
                "PLAy",
                "éa",
                "##éb",
            ]
        found[kind] = [*vocabulary, *(token for token in more if token not in vocabulary)]
    return found


def engine_of(tokens: dict[str, list[str]], rules: Rules) -> tokenizers.Tokenizer:
    return build(tokens[rules.kind], rules, MORE)


def differing(encoder: Encoder, engine: tokenizers.Tokenizer, texts: list[str]) -> list[str]:
    """The texts whose ids are not those of `engine`, shortest first."""
    found, expected = split(*encoder.encode_flat(texts)), engine.encode_batch_fast(texts)
    pairs = zip(texts, found, expected, strict=True)
    return sorted((text for text, ids, right in pairs if ids.tolist() != right.ids), key=len)


# The same ids


@pytest.mark.parametrize("name", BERT | BYTE)
def test_ids_of_fuzzed_strings_are_those_of_the_library(tokens, strings, name):
    engine = engine_of(tokens, RULES[name])
    encoder = Encoder(engine)
    assert encoder.path == "fast" and len(strings) == STRINGS
    assert differing(encoder, engine, strings) == []


@pytest.mark.parametrize("name", STOCK)
def test_ids_of_fuzzed_strings_are_those_of_stock_bert(tokens, strings, name, tmp_path):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "vocab.txt").write_text("".join(token + "\n" for token in tokens["bert"]), encoding="utf-8")
    stock = transformers.BertTokenizer.from_pretrained(tmp_path, do_lower_case=name == "uncased")
    some = strings[:2000]
    called = stock(some, split_special_tokens=True)["input_ids"]
    stock.backend_tokenizer.encode_special_tokens = True  # the same: "[SEP]" in a text is text
    encoder = Encoder(engine_of(tokens, RULES[name]))
    assert encoder.path == "fast" and len(strings) == STRINGS
    assert differing(encoder, stock.backend_tokenizer, strings) == []
    assert [ids.tolist() for ids in split(*encoder.encode_flat(some))] == called


def test_few_fuzzed_strings_have_characters_that_are_left_to_the_library(strings):
    unknown = [text for text in strings if any(unicodedata.category(c) == "Cn" for c in text)]
    assert STRINGS // 100 < len(unknown) < STRINGS // 20


@pytest.mark.parametrize("name", BYTE)
@pytest.mark.parametrize("units", [" '1sleтx", " \n'l!\u3000", [" ", "\t", "a", "!" * 24, "'", "s", "²"]])
def test_every_order_of_blanks_apostrophes_letters_and_full_runs_is_cut_alike(tokens, name, units):
    texts = ["".join(parts) for size in range(1, 6) for parts in itertools.product(units, repeat=size)]
    engine = engine_of(tokens, RULES[name])
    assert differing(Encoder(engine), engine, texts) == []


@pytest.mark.parametrize("name", STOCK | BERT)
def test_every_order_of_letters_marks_and_signs_is_cut_alike(tokens, name):
    units = ["a", "É", "汉", ",", " ", "\u0301", "\x0b", "1", "한", "\u1161", "Ａ", "=", "\u0338"]
    texts = ["".join(parts) for size in range(1, 5) for parts in itertools.product(units, repeat=size)]
    engine = engine_of(tokens, RULES[name])
    assert differing(Encoder(engine), engine, texts) == []


@pytest.mark.parametrize("name", ["uncased", "width folded", "byte, digits single"])
def test_every_seventh_character_is_treated_alike(tokens, name):
    """All 1,112,064 code points were compared once, in uncased, cased, folded and byte: that takes six minutes."""
    characters = [chr(code) for code in range(0, 0x30000, 7) if not 0xD800 <= code < 0xE000]
    texts = [f"a{c}b {c} 1{c}.{c}{c}{after}'{c}s" for c, after in itertools.pairwise(characters)]
    engine = engine_of(tokens, RULES[name])
    assert differing(Encoder(engine), engine, texts) == []


@pytest.mark.parametrize("name", RULES)
def test_long_runs_are_encoded_alike(tokens, name):
    units, rests = ["a", "汉", "🙂", "\u0301", "\n", " ", "'", "９", "ก", "a'"], ("", "'s", " x")
    engine = engine_of(tokens, RULES[name])
    texts = [unit * size + rest for unit in units for size in (99, 100, 101, 2500) for rest in rests]
    assert differing(Encoder(engine), engine, texts) == []


TOKENS = st.dictionaries(st.binary(min_size=1, max_size=20).map(lambda b: bytes(x % 3 for x in b)), st.integers(0, 99))


def check_matches(starts: dict[bytes, int], continuations: dict[bytes, int], words: list[bytes]) -> None:
    """`Prefixes.match` finds the same tokens as a loop over every word."""
    ends = np.cumsum([len(word) for word in words])
    buffer = np.frombuffer(b"".join(words) + bytes(PADDING), np.uint8)
    ids = np.full(len(buffer), -1, np.int32)
    stuck = Prefixes(starts, continuations).match(buffer, np.append(0, ends[:-1]), ends, ids)
    lost = set(np.searchsorted(ends, stuck, side="right").tolist())
    for number, word in enumerate(words):
        place, expected = 0, {}
        while place < len(word):
            table = continuations if place else starts
            size = next((n for n in range(len(word) - place, 0, -1) if word[place : place + n] in table), None)
            if size is None:
                break
            expected[place] = table[word[place : place + size]]
            place += size
        assert (place < len(word)) == (number in lost)
        if number not in lost:
            found = ids[ends[number] - len(word) : ends[number]]
            assert {n: int(token) for n, token in enumerate(found) if token >= 0} == expected


@settings(max_examples=100, deadline=None)
@given(starts=TOKENS, continuations=TOKENS, draw=st.randoms(use_true_random=False))
def test_the_longest_tokens_are_those_that_a_loop_finds(starts, continuations, draw):
    pieces = [*starts, *continuations, b"\0", b"\1"]
    check_matches(starts, continuations, [b"".join(draw.choices(pieces, k=draw.randint(1, 5))) for _ in range(20)])


def test_the_same_bytes_after_other_blocks_are_another_prefix():
    blocks = [f"{number:07}".encode() for number in range(2000)]
    starts = {block: number for number, block in enumerate(blocks)}
    starts |= {block + (b"x", b"y")[number % 2]: 2000 + number for number, block in enumerate(blocks)}
    check_matches(starts, {b"x": 4000, b"y": 4001}, [block + letter for block in blocks for letter in (b"x", b"y")])


# Batches


@pytest.mark.parametrize("name", ["uncased", "byte"])
def test_ids_do_not_depend_on_the_batch(tokens, strings, name):
    texts = [*strings[:3000], "", " ", "\0", "x" * GROUP, *strings[3000:6000], ""]
    encoder = Encoder(engine_of(tokens, RULES[name]))
    together = split(*encoder.encode_flat(texts))
    assert sum(map(len, texts)) > GROUP and len(together) == len(texts)
    again = split(*encoder.encode_flat(texts[::-1]))[::-1]  # the tables have met the characters in another order
    alone = [encoder.encode_flat([text])[0] for text in texts]  # most are small
    other = Encoder(engine_of(tokens, RULES[name])).encode_flat(texts[::-1])
    assert all(map(np.array_equal, together, again)) and all(map(np.array_equal, together, alone))
    assert all(map(np.array_equal, together, split(*other)[::-1]))


def test_a_batch_is_flat_and_in_rows(prepared):
    tokenizer = open_tokenizer(prepared.tokenizer["bert"])
    words = tokenizer.encode_batch(["the lord"])[0].tolist()
    assert words[0] == tokenizer.specials["cls"] and words[-1] == tokenizer.specials["sep"]
    for texts in ([], [""], ["the lord", "", "the lord"], ["the lord", ""] * SMALL):
        ids, lengths = tokenizer.encode_flat(texts)
        rows = tokenizer.encode_batch(texts)
        assert ids.dtype == np.int32 and lengths.dtype == np.int64
        assert lengths.tolist() == [len(words) if text else 2 for text in texts] == [len(row) for row in rows]
        assert ids.tolist() == [token for row in rows for token in row.tolist()]
        assert {tuple(row.tolist()) for row in rows} <= {tuple(words), (words[0], words[-1])}


@pytest.mark.parametrize("kind", ["bert", "byte"])
def test_a_lone_surrogate_in_a_large_batch_is_refused_with_its_place(prepared, kind):
    tokenizer = open_tokenizer(prepared.tokenizer[kind])
    assert tokenizer._encoder.path == "fast"
    with pytest.raises(TokenizerError, match=r"text 1 of the batch, character 3: lone surrogate '\\ud800'"):
        tokenizer.encode_batch(["fine " * SMALL, "ab\ud800"])
    assert len(tokenizer.encode_batch(["fine " * SMALL, "ab"])) == 2


def test_special_tokens_in_a_large_batch_are_text_unless_asked_for(prepared):
    tokenizer = open_tokenizer(prepared.tokenizer["bert"])
    texts = ["a [SEP] b"] * SMALL
    text, asked = tokenizer.encode_batch(texts)[-1], tokenizer.encode_batch(texts, special_tokens=True)[-1]
    assert text.tolist() == tokenizer.encode_batch(["a [ SEP ] b"])[0].tolist()
    assert asked.tolist().count(tokenizer.specials["sep"]) == 2 and len(asked) < len(text)
    assert tokenizer.encode_batch(texts)[-1].tolist() == text.tolist()


def test_an_encoder_is_pickled_without_its_tables(tokens, strings):
    encoder = Encoder(engine_of(tokens, RULES["uncased"]))
    fresh = len(pickle.dumps(encoder))
    ids, _ = encoder.encode_flat(strings[:5000])
    assert len(pickle.dumps(encoder)) == fresh
    other = pickle.loads(pickle.dumps(encoder))
    other._engine.encode_special_tokens = True  # `tokenizers` does not store it
    assert other.path == "fast" and np.array_equal(other.encode_flat(strings[:5000])[0], ids)


# Where the library encodes


def two_tokens_before_a_text(engine):
    engine.post_processor = processors.TemplateProcessing(
        single="[CLS] [CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )


def a_token_that_is_looked_for_in_text(engine):
    engine.add_tokens([AddedToken("lord god", normalized=False)])


def a_normaliser_of_another_kind(engine):
    engine.normalizer = normalizers.Sequence([normalizers.Replace("lo", "l"), engine.normalizer])


def another_word_limit(engine):
    vocabulary = engine.get_vocab(with_added_tokens=False)
    engine.model = models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=5)


def truncation(engine):
    engine.enable_truncation(4)


def special_tokens_in_text(engine):
    engine.encode_special_tokens = False


def another_model(engine):
    engine.model = models.WordLevel({"[UNK]": 0, "the": 1}, unk_token="[UNK]")


@pytest.mark.parametrize(
    "change, path",
    [
        (two_tokens_before_a_text, "library"),
        (a_token_that_is_looked_for_in_text, "library"),
        (a_normaliser_of_another_kind, "library"),
        (truncation, "library"),
        (special_tokens_in_text, "library"),
        (another_model, "library"),
        (another_word_limit, "fast"),
    ],
)
def test_an_engine_that_does_otherwise_is_used_as_it_is(tokens, strings, change, path):
    engine = engine_of(tokens, RULES["uncased"])
    usual = Encoder(engine_of(tokens, RULES["uncased"])).encode_flat(texts := [*strings[:3000], "the lord god [SEP]"])
    change(engine)
    encoder = Encoder(engine)
    assert encoder.path == path
    assert differing(encoder, engine, texts) == []
    assert not np.array_equal(encoder.encode_flat(texts)[0], usual[0])


def test_a_vocabulary_of_another_kind_is_encoded_by_the_library():
    engine = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    encoder = Encoder(engine)
    assert encoder.path == "library"
    ids, lengths = encoder.encode_flat(["abab", "", "ba"] * SMALL)
    assert ids[:4].tolist() == [2, 2, 1, 0] and lengths[:3].tolist() == [2, 0, 2]
