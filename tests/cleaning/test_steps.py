"""The cleaning steps that repair, mask and rewrite text: the changes are known by construction."""

import hashlib
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from itertools import accumulate, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.cleaning.pipeline import STEPS, Outcome, StepsConfig, steps
from pretrain.config import build, dump, parse
from pretrain.errors import ConfigError
from tests.conftest import ROOT, SAMPLE
from tests.helpers.cleaning import NAMES, config, sample, step

# Which steps, in which order


def test_the_default_steps_repair_mask_and_drop_only_what_is_surely_wrong():
    default = ["html", "mojibake", "unicode", "control", "pii", "language", "length"]
    for language in ("en", "zh", "zh-Hans", "zh-Hant", "zh-TW", "cmn", "fr", "ja"):
        assert [s.name for s in steps(StepsConfig(), language)] == default
    for language in ("und", "tlh"):
        assert [s.name for s in steps(StepsConfig(), language)] == [name for name in default if name != "language"]


def test_steps_run_in_the_order_of_the_configuration():
    assert list(STEPS) == NAMES
    everything = config(**dict.fromkeys(NAMES, "true"))
    assert [s.name for s in steps(everything, "zh")] == NAMES
    assert [s.name for s in steps(everything, "en")] == [name for name in NAMES if name != "script"]


def test_a_section_may_be_a_switch_or_a_list_of_languages():
    values = config(pii="false", c4=["en"], length={"use": "null", "min_words": "3"} | {"use": "no"}, unicode="null")
    assert (values.pii.use, values.c4.use, values.length.use, values.unicode.use) == (False, ["en"], False, False)
    assert "c4" in [s.name for s in steps(values, "en-GB")]
    assert "c4" not in [s.name for s in steps(values, "zh")]
    assert build(StepsConfig, parse(dump(values), "dumped"), "dumped") == values


@pytest.mark.parametrize(
    ("sections", "language", "said"),
    [
        ({"gopher": "true"}, "en", "unknown key gopher: did you mean"),
        ({"pii": {"mail": "x"}}, "en", "unknown key pii.mail: did you mean pii.email?"),
        ({"unicode": {"form": "NFD"}}, "en", "unicode.form = 'NFD'"),
        ({"c4": "true"}, "ja", "a source is in 'ja', which is written without spaces"),
        ({"gopher_quality": "true"}, "th", "a source is in 'th'"),
        (
            {"gopher_repetition": {"use": "true", "words": {"top_ngrams": {"1": "0.2"}}}},
            "en",
            "greater than or equal to 2",
        ),
        ({"script": ["en"]}, "en", "only Chinese has two scripts"),
        ({"language": ["tlh"]}, "tlh", "does not know 'tlh'"),
        ({"language": ["en", "xx"]}, "en", "does not know 'xx'\n  leave it out; known: ace, af, am, an, ar"),
        ({"language": ["cn"]}, "zh", "does not know 'cn'\n  did you mean zh? Else leave it out; known: ace, af"),
        ({"stopwords": ["xx"]}, "en", "known for 'xx'\n  say for which languages, of these: af, ar"),
        ({"stopwords": "true"}, "tlh", "no list of stop words is known for 'tlh'"),
    ],
)
def test_a_wrong_setting_is_named(sections, language, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        steps(config(**sections), language)


def test_a_document_of_which_nothing_is_left_is_dropped_by_the_step_that_took_it():
    assert step("html")("<!-- only a comment -->") == Outcome("", 1, "nothing left")
    assert step("control")("\ufeff\u200b \r\n") == Outcome("", 5, "nothing left")


# Mojibake

ENGLISH = [
    "It’s a naïve façade — “très cher”, he said.",
    "The café in Düsseldorf costs 3 € or £2.",
    "Curaçao, Malmö, Łódź: déjà vu",
]
CHINESE = ["床前明月光，疑是地上霜。", "中华人民共和国宪法（1982年）", "他说：“今天天气很好……”", "臺灣的繁體字也一樣"]


@pytest.mark.parametrize("wrong", ["latin-1", "sloppy-windows-1252"])
@pytest.mark.parametrize(("language", "good"), [("en", ENGLISH), ("zh", CHINESE)])
def test_utf_8_read_as_a_single_byte_encoding_comes_back_exactly(language, good, wrong):
    repair = step("mojibake", language)
    once = [line.encode().decode(wrong) for line in good]
    twice = [line.encode().decode(wrong) for line in once]
    for bad in (once, twice):
        assert repair("\n".join(["plain", *bad])) == Outcome("\n".join(["plain", *good]), len(good))


def test_gbk_read_as_latin_1_comes_back_where_the_source_is_chinese():
    good = CHINESE[:2]
    bad = "\n".join(line.encode("gbk").decode("latin-1") for line in good)
    assert step("mojibake", "zh")(bad) == Outcome("\n".join(good), 2)
    assert step("mojibake", "en")("ÖÐÎÄËÎÌå").text == "ÖÐÎÄËÎÌå"


def test_a_line_of_mojibake_among_good_ones_is_repaired_alone():
    text = f"{CHINESE[0]}\n{ENGLISH[1].encode().decode('latin-1')}\n{ENGLISH[0]}"
    assert step("mojibake", "zh")(text) == Outcome(f"{CHINESE[0]}\n{ENGLISH[1]}\n{ENGLISH[0]}", 1)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_line_end_of_mainframes_is_no_mojibake(language):
    """U+0085: a line end unless it is a part of a character that was read as Latin-1."""
    repair = step("mojibake", language)
    assert repair("line one\x85line two\x85\x85中文\x85床前") == Outcome("line one\nline two\n\n中文\n床前", 4)
    if language == "en":
        assert repair("café\x85naïve") == Outcome("café\nnaïve", 1)
    bad = "\n".join(line.encode().decode("latin-1") for line in ("Åse och 公园", "公共"))
    assert "\x85" in bad and repair(bad) == Outcome("Åse och 公园\n公共", 2)
    gbk = "我们的朋友厖大在学校里读书".encode("gbk").decode("latin-1")
    assert "\x85" in gbk and (language != "zh" or repair(gbk) == Outcome("我们的朋友厖大在学校里读书", 1))


@pytest.mark.parametrize("language", ["en", "zh"])
def test_good_text_is_no_mojibake(language):
    repair = step("mojibake", language)
    good = [
        *ENGLISH,
        *CHINESE,
        *sample(language),
        "ÀÉÈ ÊËÌ grand prix",
        "“‘’” – — … • © ® ™",
        "naïveté",
        "ÅÄÖ åäö",
    ]
    assert [text for text in good if repair(text) != Outcome(text)] == []


# Remains of HTML


@pytest.mark.parametrize(
    ("text", "clean", "changes"),
    [
        ("<p>Hello <b>wor</b>ld</p>", "\nHello world\n", 4),
        ("a<br>b<br/>c<BR />d", "a\nb\nc\nd", 3),
        ('<a href="x>y" title=\'it\'>link</a>, <img src="a.png"/>', "link, ", 3),
        ("<table><tr><td>1</td><td>2</td></tr></table>", "\n\n1 2 \n\n", 8),
        ("x<!-- a > b -->y<!DOCTYPE html>z", "xyz", 2),
        ("a<script>if (a<b) { '<p>' }</script>b<style type='text/css'>p {}</style >c", "abc", 2),
        ("AT&amp;T &lt;&#51; &#x1F600; caf&eacute; &#150; a&nbsp;b&nbsp c", "AT&T <3 😀 café – a\xa0b\xa0 c", 8),
        ("AT&amp;amp;T &amp;lt;p&amp;gt;feed&amp;lt;/p&amp;gt;", "AT&T \nfeed\n", 7),
        ("<![CDATA[text]]> <?xml version='1.0'?><o:p></o:p>", "text ", 4),
        ("x<span>y", "x<span>y", 0),  # opened only: a word in angle brackets
    ],
)
def test_markup_is_taken_out_and_counted(text, clean, changes):
    assert step("html")(text) == Outcome(clean, changes)


NOT_MARKUP = [
    "a < b and c > d, x<y>z, i<p>j, p<0.05, I <3 you, 1 <2> 3, ->, <-, <=>, <<EOF",
    "vector<int> List<String> Map<K, V> #include <stdio.h> template <typename T> for (i=0; i<b && b>c; i++)",
    "use the <title> tag, cp <source> <path>, <user@example.org>, <http://example.org/>, <|endoftext|>, <s",
    "R&D, AT&T, ?a=1&copy=2&lt=3, Q&A; a&b; &unknown; &; &&, fish & chips;",
    "<!-- never closed, <script> never closed",
    "《红楼梦》<清>曹雪芹 ＜ ＞ 〈〉",
]


@pytest.mark.parametrize("text", NOT_MARKUP)
def test_what_only_looks_like_markup_stays(text):
    assert step("html")(text) == Outcome(text)


# Unicode form and invisible characters


def test_nfc_joins_and_nfkc_folds():
    assert step("unicode")("e\u0301a\u0323\u0302 \u1112\u1161\u11ab \uf90a x² ①ＡＢ") == Outcome("éậ 한 金 x² ①ＡＢ", 9)
    folded = step("unicode", form="NFKC")("ＡＢＣ１２３，。x²㎡ﬁ①").text
    assert folded == "ABC123,。x2m2fi1"


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("a\x00b\x1fc\x7fd\x9fe\ufffef\ue000g\ud800h", "ab cdefgh"),
        ("001\x1e\x1d10\x1faone\x1c\n\x1ftwo \x1d three", "001 10 aone\ntwo three"),
        ("\x1b[1;31mred\x1b[0m", "red"),
        ("\ufeffword\u200bword so\u00adft \u2060\u180e\u202eabc\u202c\u2066\u061c", "wordword soft abc"),
        ("a\r\nb\rc\u2028d\u0085e\x0bf\x0cg", "a\nb\nc\nd\ne\nf\ng"),
        ("a  \nb\t\n\n\n\n\nc \n\n", "a\nb\n\nc"),
        ("one\u00a0two \u2009\u202f three", "one two three"),
        ("\u3000\u3000第一段　第二句\n \u3000第三段", "第一段 第二句\n第三段"),
        ("if x:\n\u00a0\u00a0\u00a0\u00a0return  y", "if x:\n    return  y"),
        ("葛\U000e0100城 a\ufe0fb", "葛城 ab"),
        ("zero\u200dwidth\u200cjoiners 中\u200d文", "zerowidthjoiners 中文"),
        ("hidden\U000e0041\U000e0042 tags", "hidden tags"),
    ],
)
def test_what_cannot_be_seen_goes(text, clean):
    outcome = step("control")(text)
    assert outcome.text == clean
    assert outcome.changes == (Counter(text) - Counter(clean)).total()


VISIBLE = [
    "👩‍👩‍👧 ❤️ 👁️‍🗨️ 🏳️‍🌈 🧑🏽‍💻 ☺︎ 1️⃣ #️⃣ 🇨🇳 🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
    "می‌خواهم کتاب‌ها ه‍",  # Persian: ZWNJ within a word, ZWJ at its end
    "क्‍ष क्‌ष ശ്‍",  # Devanagari and Malayalam
    "ភាសា\u200bខ្មែរ ภาษา\u200bไทย",  # zero-width spaces are word boundaries
    "def f():\n    return  1\n\n\tx",  # layout of code
    "Æther, naïve, 中文，日本語，한국어, עברית, العربية; � stays",
]


@pytest.mark.parametrize("text", VISIBLE)
def test_what_means_something_stays(text):
    assert step("control")(text) == Outcome(text)


@pytest.mark.parametrize("name", ["html", "mojibake", "unicode", "control", "pii"])
@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_samples_are_left_alone(name, language):
    apply = step(name, language)
    assert [text[:40] for text in sample(language) if apply(text) != Outcome(text)] == []


@pytest.mark.parametrize("language", ["en", "zh"])
def test_no_document_of_the_samples_is_dropped_by_default(language):
    on = steps(StepsConfig(), language)
    assert [(s.name, text[:40]) for text in sample(language) for s in on if s.apply(text).dropped] == []


# Chinese script


def test_both_scripts_become_one():
    simplified, traditional = step("script", "zh"), step("script", "zh", to="traditional")
    assert simplified("軟體與硬體，頭髮發展") == Outcome("软体与硬体，头发发展", 7)
    assert traditional("头发发展，皇后之后") == Outcome("頭髮發展，皇后之後", 4)
    assert step("script", "zh-TW")("裡面台灣").text == "里面台湾"


def test_text_in_the_wanted_script_stays_where_a_character_has_two_readings():
    for text in ("乾清宫里宫商角徵羽，打坏了", "山河表里，皇天后土"):
        assert step("script", "zh")(text) == Outcome(text)
    for text in ("皇后和太后都來了，公里之後", "山谷裡的麵與面子"):
        assert step("script", "zh", to="traditional")(text) == Outcome(text)


# Personal data


def luhn_digit(digits: str) -> str:
    """The check digit that makes `digits` a card number: Luhn's table, digit by digit."""
    total = sum(int("0246813579"[int(d)]) if i % 2 == 0 else int(d) for i, d in enumerate(reversed(digits)))
    return str(-total % 10)


def resident_digit(digits: str) -> str:
    """GB 11643-1999, with the weights and check letters of its table."""
    weights = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
    return "10X98765432"[sum(int(d) * w for d, w in zip(digits, weights, strict=True)) % 11]


def planted(rng: random.Random) -> dict[str, list[str]]:
    """Personal data of each kind, made up, valid by its own rule."""

    def digits(n: int) -> str:
        return "".join(rng.choices("0123456789", k=n))

    def card(prefix: str, size: int, groups: tuple[int, ...] = (), separator: str = "") -> str:
        number = prefix + digits(size - 1 - len(prefix))
        number += luhn_digit(number)
        ends = accumulate(groups, initial=0)
        return separator.join(number[a:b] for a, b in pairwise(ends)) if groups else number

    def resident() -> str:
        number = rng.choice(["110101", "310115", "440305", "510104", "820000"])
        number += f"{rng.randint(1930, 2020)}{rng.randint(1, 12):02}{rng.randint(1, 28):02}{digits(3)}"
        return number + resident_digit(number)

    def ip() -> str:
        return f"{rng.choice([23, 58, 93, 203, 223])}.{rng.randint(10, 99)}.{rng.randint(0, 255)}.{rng.randint(0, 255)}"

    mobile = f"1{rng.choice('3456789')}{rng.choice('0123456789')}"
    four = [digits(4) for _ in range(4)]
    return {
        "EMAIL_ADDRESS": [
            f"user{digits(3)}@mail{digits(1)}.example.com",
            "first.last+tag@sub-domain.co.uk",
            "zhang_san@163.com",
            "renée@ecole-x.fr",
            "o'brien@mail.example.ie",
            f"{digits(9)}@qq.com",
        ],
        "IP_ADDRESS": [ip(), "2001:4860:4860::8888", "2400:3200:0:0:0:0:0:1", "240e:56:4000:8000::69"],
        "RESIDENT_ID": [resident(), resident(), resident().replace("X", "x")],
        "SOCIAL_SECURITY_NUMBER": [f"{rng.randint(100, 665)}-{rng.randint(10, 99)}-{four[0][:3]}1"],
        "CARD_NUMBER": [
            card("4", 16),
            card("4", 16, (4, 4, 4, 4), " "),
            card("5" + rng.choice("12345"), 16, (4, 4, 4, 4), "-"),
            card("37", 15, (4, 6, 5), " "),
            card("6222", 19),
            card("62", 19, (4, 4, 4, 4, 3), " "),
            card("36", 14),
            card("3530", 16),
        ],
        "PHONE_NUMBER": [
            f"+1 415-555-{four[0]}",
            f"+44 20 7946 {four[0]}",
            f"+33 6 12 34 {four[1][:2]} {four[1][2:]}",
            f"+86 {mobile} {four[0]} {four[1]}",
            f"+49 (0)30 1234{four[2]}",
            f"(212) 555-{four[1]}",
            f"212-555-{four[2]}",
            f"212.555.{four[3]}",
            f"1-800-555-{four[0]}",
            f"212 555 {four[1]}",
            f"(212) 555 {four[2]}",
            f"(+852) 8177 {four[3]}",
            f"+86（10）6234{four[0]}",
            f"（+86）{mobile}{four[0]}{four[1]}",
            f"{mobile}{four[0]}{four[1]}",
            f"{mobile}-{four[0]}-{four[1]}",
            f"{mobile} {four[0]} {four[1]}",
            f"0086{mobile}{four[0]}{four[1]}",
            f"010-6234{four[3]}",
            f"0755-2345{four[3]}",
            f"（021）5555 {four[2]}",
            f"(021)5555{four[2]}",
        ],
    }


@pytest.mark.parametrize(
    "sentence",
    ["Write to {} or ask Bob.", "（{}）", "联系：{}，谢谢。", "{}", "{};", "see\n{}\nbelow", "号码{}。", "at {}."],
)
def test_every_planted_item_is_masked_in_whole_and_nothing_else(sentence):
    rng, missed = random.Random(7), []
    mask = step("pii", "zh")
    for _ in range(40):
        for kind, items in planted(rng).items():
            for item in items:
                outcome = mask(sentence.format(item))
                if outcome != Outcome(sentence.format(f"|||{kind}|||"), 1):
                    missed.append((item, outcome.text))
    assert missed == []


def test_a_number_after_a_word_for_telephone_is_masked_in_any_form():
    mask = step("pii")
    for text in (
        "Tel: 04567-230079",
        "phone no.: 123 4567",
        "电话12345678",
        "传真：6234 5678",
        "手机号码：12345678901",
    ):
        assert "|||PHONE_NUMBER|||" in mask(text).text
    assert mask("Tel: 04567-230079").text == "Tel: |||PHONE_NUMBER|||"


def test_two_numbers_side_by_side_are_two_items():
    assert step("pii", "zh")("13800138000/13900139000、010-62345678").changes == 3


LOOK_ALIKES = [
    "version 1.2.3.4, v10.20.30.40, Chrome/49.10.20.30, section 10.11.12.13, 第10.11.12.13条, 3.3.3.11",
    "10.0.0.1 192.168.1.254 127.0.0.1 172.16.5.4 0.0.0.0 255.255.255.0 224.0.0.251 256.300.1.2 1.2.3.4.5.6 012.34.56.7",
    "fe80::1 ::1 2001:db8::1 12:34:56 2010::2015 std::vector abc::def 2020:10:11",
    "ISBN 978-7-02-000220-7, ISBN 0-306-40615-2, ISSN 2049-3630, doi:10.1038/s41586-020-2649-2, arXiv:2112.11446",
    "1990-1995, 2001-2010, 1949年10月1日, 2020-01-02 03:04:05, 20200102, 1999/12/31, 12.05.1987, 100 BC",
    "1,234,567,890 3.14159265358979 0.13800138000 299792458 1234567890123 6.02214076e23 13800138000元 15000000000人",
    "DFARS 252.211-7003, +10 000 000, +8613, C++11 2014 2017, UTC+08:00, 24/7/365, 5-4-3-2-1, 2 + 2 = 4, 第1234567号",
    "logo@2x.png getty@tty1.service git@github.com:user/repo.git @user user@host a@b @app.route foo@ @ bar",
    "4111 1111 1111 1112 (no card), 4111-1111 1111-1111, 1234567812345670, 110101199001011234 (no resident)",
    "990101199001010010 110101199013010010 11010119900230",  # no province, no month, too short
    "000-12-3456, 666-12-3456, 912-12-3456, 123-00-4567, 123-45-0000, 1123-45-6789, 123-45-67890, 123-45-6789-1",
    "212 345 678 and 234 567 8901 2345, 12 212 555 1234, 1,212 555 1234, (+) 123, (+1) 2345",
    "0x138001380001, abc13800138000, 13800138000abc, 138001380001, 1380013800, 12800138000",
    "Phone 2010-2015, call 1990-1995, mobile phones in 2010, the telephone of 1876",
]


@pytest.mark.parametrize("text", LOOK_ALIKES)
@pytest.mark.parametrize("language", ["en", "zh"])
def test_look_alikes_are_not_masked(text, language):
    assert step("pii", language)(text) == Outcome(text)


def test_each_kind_has_its_placeholder_and_can_be_left_alone():
    text = "a@b.com 8.8.100.100 13800138000"
    assert step("pii", email="<MAIL>", phone="null")(text) == Outcome("<MAIL> |||IP_ADDRESS||| 13800138000", 2)
    assert step("pii", email="email@example.com")("a@b.com c@d.org") == Outcome(
        "email@example.com email@example.com", 2
    )


# Stop words


def test_stop_words_are_taken_out_only_when_asked():
    assert step("stopwords", "en")("The cat isn't on the mat, and I saw it.") == Outcome("cat mat, .", 8)
    assert step("stopwords", "zh")("我们在北京大学学习，他的书很好。") == Outcome("北京大学学习，书。", 6)
    assert step("stopwords", "de")("Der Hund und die Katze").text == "Hund Katze"


# Properties

PIECES = {
    "html": [
        *["<", "</", ">", "/>", "b", "p", "a ", "script", "<!--", "-->", "&", "amp;", "lt;", "gt;", "#60;", "#38;"],
        *[
            "nbsp",
            "x",
            "=",
            '"',
            "'",
            " ",
            "div",
            "</b>",
            "<b>",
            "<br>",
            "]]>",
            "<![CDATA[",
            "</script>",
            "<?xml",
            "?>",
        ],
    ],
    "mojibake": [
        *["Ã", "©", "â", "€", "™", "\u009d", "ÖÐ", "ÎÄ", "Â", " ", "\u00a0", "é", "ä", "¸", "\xad", "–", "“"],
        *["中", "a", "\n", "\x93", "ï»¿", "ËÎÌå", "\ud800"],
    ],
    "unicode": ["e", "\u0301", "\u0323", "é", "\u212b", "\uf90a", "Ａ", "ﬁ", "①", "\u1100", "\u1161", "가", "中", " "],
    "control": [
        *["\u200b", "\u200c", "\u200d", "\ufe0f", "\ufe0e", "\u00a0", "\u3000", "\n", "\r", "\t", " ", "\u2028"],
        *["\x1b[31m", "\x1b", "[31m", "👩", "🏽", "♂", "❤", "🏴", "\U000e0067", "\U000e007f", "ک", "क", "्", "ម", "ไ"],
        *["1", "\u20e3", "中", "a", "\ue000", "\ufeff", "\x00", "\x85", "\ud800", "#"],
    ],
    "script": list("乾清宮髮發后後裏里臺台於徵隻只麼麽么面麵薴a\n"),
    "pii": [
        *["1", "3", "8", "0013", "8000", "-", " ", ".", "+", "86", "(", "010", ")", "62345678", "a", "@", "b.com"],
        *["8.8.", "223.50", "电话：", "tel: ", "4111", "1111", "110101", "19900101", "X", "2001:", "4860:", "::", "v"],
        *["元", "555", "|||EMAIL_ADDRESS|||", "13800138000", "415-555-0132"],
    ],
    "c4": [
        *["This is a good line of words.", "x\n", "\n", " [1]", "[edit]", "short.", "javascript is in this line."],
        *["…", "...", '"', "这一行有八个汉字。", "）", " "],
    ],
    "stopwords": ["the", " ", "The", "of", "cat", "’s", "don't", "\n", "，", "的", "中文", "不是", "我们", ".", "and"],
}


VARIANTS = [
    (name, language, {}) for name in PIECES for language in ("en", "zh") if (name, language) != ("script", "en")
]
VARIANTS += [("unicode", "zh", {"form": "NFKC"}), ("script", "zh", {"to": "traditional"})]


@pytest.mark.parametrize(("name", "language", "section"), VARIANTS)
def test_a_rewriting_step_has_nothing_left_to_do_the_second_time(name, language, section):
    apply = step(name, language, **section)

    @settings(max_examples=150, deadline=None, derandomize=True, database=None)
    @given(st.lists(st.sampled_from(PIECES[name]), max_size=14).map("".join))
    def check(text):
        outcome = apply(text)
        assert (outcome.changes > 0) == (outcome.text != text)
        if not outcome.dropped:
            assert apply(outcome.text) == Outcome(outcome.text)

    check()


LONG = 300_000  # characters
HUGE = [" " * LONG + "x", "x@" + "a." * (LONG // 2)]
HUGE += [piece * (LONG // len(piece)) for piece in ("a", "<", "@", "1.", "a@", "a.", "&amp;", "<!--", "<a ", "1 ")]
HUGE += [piece * (LONG // len(piece)) for piece in ("+1", "2001:", "Ã©", "ÖÐ", "\u200d", "a\u3000", "e\u0301", "[1]")]
HUGE += [piece * (LONG // len(piece)) for piece in ("汉", "。", ".", '. "', "\n", "tel: 1234567", "<script>")]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "stopwords"])
def test_a_long_text_of_anything_takes_seconds(name):
    """A quadratic pattern takes many minutes on these; linear ones 0.3 s on the machine they were written on."""
    apply = step(name, "zh")
    for text in HUGE[::5] if name == "gopher_repetition" else HUGE:  # it sorts
        started = time.process_time()
        apply(text)
        assert time.process_time() - started < 5, text[:20]


def digest_of_cleaned_text() -> str:
    """The SHA-256 of everything that all steps say about Chinese documents, one of them long and damaged."""
    everything = StepsConfig.model_validate(dict.fromkeys(StepsConfig.model_fields, "true"))
    text = (SAMPLE / "zh.txt").read_text(encoding="utf-8")
    documents = [*text.split("\n\n")[:200], text + "<p>ÖÐÎÄ 13800138000</p>\x00"]
    found = [step.apply(document) for step in steps(everything, "zh") for document in documents]
    return hashlib.sha256(repr(found).encode()).hexdigest()


def test_every_process_cleans_alike():
    """The other process has another hash seed."""
    program = "from tests.cleaning.test_steps import digest_of_cleaned_text; print(digest_of_cleaned_text())"
    env = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": str(ROOT)}
    said = subprocess.check_output([sys.executable, "-c", program], cwd=ROOT, env=env, text=True)
    assert said == digest_of_cleaned_text() + "\n"
