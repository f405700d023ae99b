"""The cleaning steps that drop documents and lines: one text on either side of every threshold."""

import time
from collections import Counter

import numpy as np
import pytest

from pretrain.cleaning.pipeline import Outcome, StepsConfig
from pretrain.cleaning.steps.repetition import ngram_fractions
from tests.helpers.cleaning import sample, step


def dropped(name: str, text: str, language: str = "en", **section) -> str | None:
    return step(name, language, **section)(text).dropped


def pages(words: list[str], n_words: int, per_line: int = 10) -> str:
    """`n_words` words, repeated in turn, in lines of `per_line`."""
    found = [words[i % len(words)] for i in range(n_words)]
    return "\n".join(" ".join(found[i : i + per_line]) for i in range(0, n_words, per_line))


# Language

GERMAN = (
    "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft und Gewissen begabt und "
    "sollen einander im Geist der Brüderlichkeit begegnen."
)
ENGLISH = (
    "All human beings are born free and equal in dignity and rights. They are endowed with reason and conscience and "
    "should act towards one another in a spirit of brotherhood."
)
JAPANESE = (
    "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。"
    "人間は、理性と良心とを授けられている。"
)
TRADITIONAL = (
    "人人生而自由，在尊嚴和權利上一律平等。他們賦有理性和良心，並應以兄弟關係的精神相對待。任何人不得使為奴隸或奴役。"
)


@pytest.mark.parametrize(
    ("source", "text", "found"),
    [
        ("en", GERMAN, "de"),
        ("zh", ENGLISH, "en"),
        ("zh-Hant", JAPANESE, "ja"),
        ("de", ENGLISH, "en"),
        ("en", TRADITIONAL, "zh"),
    ],
)
def test_a_document_in_another_language_goes_and_the_reason_names_it(source, text, found):
    outcome = step("language", source)(text)
    assert outcome.text == text
    assert outcome.dropped.startswith(f"language {found} ")
    assert outcome.dropped.endswith(f", not {source}")
    assert 0.65 <= float(outcome.dropped.split()[2].rstrip(",")) <= 1


def test_a_document_in_its_source_language_stays():
    for source, text in (
        ("en-GB", ENGLISH),
        ("de", GERMAN),
        ("ja", JAPANESE),
        ("zh-TW", TRADITIONAL),
        ("yue", TRADITIONAL),
    ):
        assert step("language", source)(text) == Outcome(text)
    assert step("language", "zh")("香港嘅天氣好熱，我哋去飲茶啦。" * 5).dropped is None


def test_short_text_is_never_dropped_for_its_language():
    ninety_nine_bytes = GERMAN[:98]  # with one ü
    assert step("language", "en")(ninety_nine_bytes).dropped is None
    assert step("language", "en")(ninety_nine_bytes + "t").dropped is not None


def test_code_and_tables_are_not_surely_another_language():
    numbers = "\n".join(f"{n} {n * n % 97} {n * 7 % 13}.{n % 10}" for n in range(200))
    for text in (numbers, "def f(x):\n    return x + 1\n" * 10, "1\t2\t3\n" * 50, "https://example.org/a?b=c " * 10):
        assert step("language", "en")(text).dropped is None


def test_of_a_long_document_passages_from_beginning_to_end_are_read():
    long = ENGLISH * 10 + GERMAN * 500
    assert step("language", "en")(long).dropped.startswith("language de")
    started = time.process_time()
    step("language", "en")(ENGLISH * 50_000)
    assert time.process_time() - started < 2  # 8 MB; read whole it takes 15 s


# Length and Gopher's quality rules: one text on either side of every threshold

GOOD = ["the", "cat", "and", "mouse", "have", "been", "seen", "together", "often", "here"]
GOOD_ZH = "他在北京的大学里学习中国历史，并且和朋友一起写了三本关于唐代诗人的书。"  # 35 characters


@pytest.mark.parametrize(
    ("language", "section", "kept", "gone", "reason"),
    [
        ("en", {}, "ten  charss!", "nine  chars", "characters 9 < 10"),
        ("zh", {}, "床前明月光，疑是地上", "床前 明月光，疑是地", "characters 9 < 10"),
        ("en", {"max_characters": 12}, "a" * 12, "a" * 13, "characters 13 > 12"),
        ("en", {"min_words": 3}, "three little words", "two wordssss", "words 2 < 3"),
        ("en", {"max_words": 2}, "two wordssss", "three little words", "words 3 > 2"),
        ("zh", {"min_words": 3}, "中文没有空格来分开词", "中文没有空格来分", "characters 8 < 10"),
    ],
)
def test_length_is_counted_in_the_units_of_the_language(language, section, kept, gone, reason):
    assert dropped("length", kept, language, **section) is None
    assert dropped("length", gone, language, **section) == reason


def lines(odd: str, n_odd: int, even: str) -> str:
    """Ten lines, of which the first `n_odd` are `odd`."""
    return "\n".join([odd] * n_odd + [even] * (10 - n_odd))


MICE = "The cat and the mouse were seen"


@pytest.mark.parametrize(
    ("kept", "gone", "reason"),
    [
        (pages(GOOD, 50), pages(GOOD, 49), "words 49 < 50"),
        (pages(GOOD, 100_000), pages(GOOD, 100_001), "words 1e+05 > 100000"),
        (pages(["the", "and"], 60), pages(["the", "of"], 60), "mean word length 2.5 < 3"),
        (pages(["the", "and", "x" * 24], 60), pages(["the", "with", "x" * 24], 60), "mean word length 10.33 > 10"),
        (pages(GOOD, 60) + " #####", pages(GOOD, 60) + " #######", "# per word 0.1148 > 0.1"),
        (pages(GOOD, 60) + " ...... …… x", pages(GOOD, 60) + " ......... … … … …", "ellipses per word 0.1077 > 0.1"),
        (lines(f"- {MICE} often", 9, MICE), lines(f"• {MICE} often", 10, MICE), "bullet lines 1 > 0.9"),
        (lines(f"{MICE}…", 3, MICE), lines(f"{MICE}...", 4, MICE), "lines ending in an ellipsis 0.4 > 0.3"),
        (pages(["the", "and", "cats", "mouse", "1999"], 60), pages(["the", "and", "1998"], 60), "words with a letter"),
        (pages(["the", "with", "cats"], 60), pages(["The", "cats"], 60), "stop words 1 < 2"),
    ],
)
def test_gopher_quality_on_either_side_of_each_threshold(kept, gone, reason):
    assert dropped("gopher_quality", kept) is None
    assert dropped("gopher_quality", gone).startswith(reason)


@pytest.mark.parametrize(
    ("kept", "gone", "reason"),
    [
        ("春眠不觉晓，处处闻啼鸟。夜来风雨声，花落", "春眠不觉晓，处处闻啼鸟。夜来风雨声，花", "characters 19 < 20"),
        (GOOD_ZH * 5000, GOOD_ZH * 6000, "characters 2.1e+05 > 200000"),
        ("的他，我们大，" * 8, "的他，我们，" * 8, "mean clause length 2 < 2.5"),
        ("的他" * 15 + "。", "的他" * 16 + "。", "mean clause length 32 > 30"),
        (GOOD_ZH + "##", GOOD_ZH + "###", "# per character 0.07895 > 0.06"),
        (GOOD_ZH + "……好……。", GOOD_ZH + "……好……不…好…。", "ellipses per character 0.08889 > 0.06"),
        (lines(f"● {GOOD_ZH}", 9, GOOD_ZH), lines(f"● {GOOD_ZH}", 10, GOOD_ZH), "bullet lines 1 > 0.9"),
        (lines(f"{GOOD_ZH}……", 3, GOOD_ZH), lines(f"{GOOD_ZH}……", 4, GOOD_ZH), "lines ending in an ellipsis 0.4 > 0.3"),
        ("他在北京大学学习，" * 3 + "1" * 9, "他在北京大学学习，" * 3 + "1" * 18, "letters 0.5333 < 0.6"),
        ("春眠不觉晓，处处闻啼鸟，风雨声，花落知。", "春眠未觉晓，处处闻啼鸟，风雨声，花落知。", "stop words 0 < 1"),
    ],
)
def test_gopher_quality_in_chinese_counts_characters(kept, gone, reason):
    assert dropped("gopher_quality", kept, "zh") is None
    assert dropped("gopher_quality", gone, "zh") == reason


def test_stop_words_are_those_of_the_language():
    french = pages(["le", "chat", "et", "la", "souris", "sont", "dans", "maison", "verte"], 60)
    assert dropped("gopher_quality", french, "fr") is None
    assert dropped("gopher_quality", pages(["chat", "souris", "maison", "verte"], 60), "fr") == "stop words 0 < 2"


# Repetition


def test_ngram_fractions_equal_a_slow_count():
    rng = np.random.default_rng(0)
    for _ in range(150):
        units = rng.integers(0, 4, size=rng.integers(1, 40))
        lengths = rng.integers(1, 5, size=len(units))
        top, duplicate = ngram_fractions(units, lengths, {2, 3, 4}, {3, 5, 6, 7})
        for n in (2, 3, 4):
            grams = [tuple(units[i : i + n]) for i in range(len(units) - n + 1)]
            best, count = Counter(grams).most_common(1)[0] if grams else (None, 0)  # most_common keeps first occurrence
            covered = {i + k for i, gram in enumerate(grams) if gram == best for k in range(n)} if count > 1 else ()
            assert top[n] == sum(lengths[i] for i in covered) / lengths.sum()
        for n in (3, 5, 6, 7):
            grams, seen, covered = [tuple(units[i : i + n]) for i in range(len(units) - n + 1)], set(), set()
            for i, gram in enumerate(grams):
                covered |= set(range(i, i + n)) if gram in seen else set()
                seen.add(gram)
            assert duplicate[n] == sum(lengths[i] for i in covered) / lengths.sum()


def numbered(n: int, start: int = 0) -> list[str]:
    """`n` different words of five characters."""
    return [f"w{i:04}" for i in range(start, start + n)]


OFF = {
    **dict.fromkeys(
        ["duplicate_lines", "duplicate_paragraphs", "duplicate_line_characters", "duplicate_paragraph_characters"],
        "null",
    ),
    "top_ngrams": {},
    "duplicate_ngrams": {},
}


def repetition(text: str, language: str = "en", **rule) -> str | None:
    """The reason why a single rule drops the text, or None."""
    return dropped("gopher_repetition", text, language, **{"words" if language == "en" else "chinese": OFF | rule})


def test_the_thresholds_of_repetition_are_those_of_table_a1():
    words, chinese = StepsConfig().gopher_repetition.words, StepsConfig().gopher_repetition.chinese
    for found in (words, chinese):
        assert (found.duplicate_lines, found.duplicate_paragraphs) == (0.30, 0.30)
        assert (found.duplicate_line_characters, found.duplicate_paragraph_characters) == (0.20, 0.20)
    assert words.top_ngrams == {2: 0.20, 3: 0.18, 4: 0.16}
    assert words.duplicate_ngrams == {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
    assert [2 * n for n in (*words.top_ngrams, *words.duplicate_ngrams)] == [
        *chinese.top_ngrams,
        *chinese.duplicate_ngrams,
    ]


@pytest.mark.parametrize(
    ("rule", "limit", "separator", "kept", "reason"),
    [
        ("duplicate_lines", 0.30, "\n", 3, "duplicate lines 0.4 > 0.3"),
        ("duplicate_paragraphs", 0.30, "\n\n", 3, "duplicate paragraphs 0.4 > 0.3"),
        ("duplicate_line_characters", 0.20, "\n", 2, "characters in duplicate lines 0.3 > 0.2"),
        ("duplicate_paragraph_characters", 0.20, "\n\n", 2, "characters in duplicate paragraphs 0.3 > 0.2"),
    ],
)
@pytest.mark.parametrize("language", ["en", "zh"])
def test_repeated_lines_and_paragraphs_on_either_side_of_the_threshold(rule, limit, separator, kept, reason, language):
    def document(repeats: int) -> str:
        return separator.join([*numbered(10 - repeats), *["w0000"] * repeats])

    assert repetition(document(kept), language, **{rule: str(limit)}) is None
    assert repetition(document(kept + 1), language, **{rule: str(limit)}) == reason


def characters(n: int, start: int = 0) -> list[str]:
    """`n` different Chinese characters."""
    return [chr(0x4E00 + i) for i in range(start, start + n)]


@pytest.mark.parametrize(
    ("language", "n", "limit", "total", "kept"),
    [
        *[("en", 2, 0.20, 100, 10), ("en", 3, 0.18, 100, 6), ("en", 4, 0.16, 100, 4)],
        *[("zh", 4, 0.256, 500, 32), ("zh", 6, 0.201, 1000, 33), ("zh", 8, 0.171, 1000, 21)],
    ],
)
def test_the_top_ngram_on_either_side_of_its_threshold(language, n, limit, total, kept):
    unit, space = (numbered, " ") if language == "en" else (characters, "")

    def document(copies: int) -> str:
        others = unit(total - copies * n, start=n)
        between = [others[i::copies] for i in range(copies)]
        return space.join(word for piece in between for word in [*unit(n), *piece])

    assert repetition(document(kept), language, top_ngrams={str(n): str(limit)}) is None
    fraction = (kept + 1) * n / total
    assert (
        repetition(document(kept + 1), language, top_ngrams={str(n): str(limit)})
        == f"top {n}-gram {fraction:.4g} > {limit:g}"
    )


@pytest.mark.parametrize(
    ("language", "n", "limit"),
    [
        *[("en", 5, 0.15), ("en", 6, 0.14), ("en", 7, 0.13), ("en", 8, 0.12), ("en", 9, 0.11), ("en", 10, 0.10)],
        *[("zh", 10, 0.50), ("zh", 12, 0.45), ("zh", 14, 0.42), ("zh", 16, 0.40), ("zh", 18, 0.38), ("zh", 20, 0.36)],
    ],
)
def test_duplicate_ngrams_on_either_side_of_their_thresholds(language, n, limit):
    unit, space = (numbered, " ") if language == "en" else (characters, "")

    def document(repeated: int) -> str:  # 100 units; the last `repeated` ones repeat the first
        different = unit(100 - repeated)
        return space.join(different[i % len(different)] for i in range(100))

    kept = round(100 * limit)
    assert repetition(document(kept), language, duplicate_ngrams={str(n): str(limit)}) is None
    reason = f"duplicate {n}-gram {(kept + 1) / 100:.4g} > {limit:g}"
    assert repetition(document(kept + 1), language, duplicate_ngrams={str(n): str(limit)}) == reason


def test_a_short_text_without_repetition_has_none():
    for text in ("", "one", "just two", "a few words only", "床前明月光"):
        assert dropped("gopher_repetition", text, "en") is None
        assert dropped("gopher_repetition", text, "zh") is None


# C4

LINE = "This line has five words."
LINE_ZH = "这一行有八个汉字。"


@pytest.mark.parametrize(
    ("language", "line"),
    [
        ("en", "This line has no period at its end"),
        ("en", "This line ends in an ellipsis..."),
        ("en", "Only four words here."),
        ("en", "Please enable JavaScript to see this page."),
        ("en", "Read our Privacy Policy before you go on."),
        ("en", "This word is too long: " + "x" * 1001 + "."),
        ("zh", "没有句号的一行"),
        ("zh", "四个字。"),
        ("zh", "请启用JavaScript以浏览本页。"),
        ("zh", "请阅读我们的隐私政策。"),
    ],
)
def test_c4_drops_lines_that_are_no_sentences(language, line):
    good = [LINE if language == "en" else LINE_ZH] * 3
    outcome = step("c4", language)("\n".join([good[0], line, good[1], "", good[2]]))
    assert outcome == Outcome("\n".join([good[0], good[1], "", good[2]]), 1)


@pytest.mark.parametrize(
    ("language", "line"),
    [
        *[("en", f"This line has five words{end}") for end in ('."', "?", "!", ".)", ".”", ".'")],
        *[("zh", f"这一行有八个汉字{end}") for end in ("？", "！", "……", "；", "：", "。”", "。」", "。）", "”", ".")],
    ],
)
def test_c4_keeps_lines_that_end_a_sentence(language, line):
    good = LINE if language == "en" else LINE_ZH
    assert step("c4", language)(f"{good}\n{line}\n{good}\n{good}") == Outcome(f"{good}\n{line}\n{good}\n{good}")


def test_c4_takes_citation_marks_out():
    text = f"{LINE[:-1]}[12].\nIt was said.[citation needed] Said it was.[edit]\n{LINE}"
    assert step("c4")(text) == Outcome(f"{LINE}\nIt was said. Said it was.\n{LINE}", 2)


@pytest.mark.parametrize(
    ("language", "kept", "gone", "reason"),
    [
        ("en", "\n".join([LINE] * 3), "\n".join([LINE] * 2), "sentences 2 < 3"),
        ("en", "One two three four five. Six? Seven!", "One two three four five. Six seven, eight!", "sentences 2 < 3"),
        ("zh", "床前明月光，疑是地上霜。\n举头望明月，低头思故乡。", "床前明月光，疑是地上霜……", "sentences 1 < 2"),
        ("en", "\n".join([LINE] * 4), "\n".join([LINE, "Lorem Ipsum dolor sit amet.", LINE, LINE]), "lorem ipsum"),
        ("en", "\n".join([LINE] * 3), "\n".join([LINE, "f(x) {", LINE, LINE]), "curly bracket"),
        ("zh", "\n".join([LINE_ZH] * 3), "\n".join([LINE_ZH, "{", LINE_ZH, LINE_ZH]), "curly bracket"),
    ],
)
def test_c4_drops_documents(language, kept, gone, reason):
    assert dropped("c4", kept, language) is None
    assert dropped("c4", gone, language) == reason


def test_c4_without_terminal_punctuation_as_fineweb_uses_it():
    text = "\n".join(["A heading of five whole words", LINE, LINE, LINE])
    assert step("c4", terminal_punctuation="false")(text) == Outcome(text)
    assert step("c4")(text).text == "\n".join([LINE] * 3)


# FineWeb


def page(n_lines: int, n_odd: int, odd: str, even: str) -> str:
    """Lines told apart by their number, of which the first `n_odd` are `odd`."""
    return "\n".join((odd if i < n_odd else even).format(i) for i in range(n_lines))


SAME = "the same" * 4 + "." * 5  # 37 characters


@pytest.mark.parametrize(
    ("language", "kept", "gone", "reason"),
    [
        ("en", page(100, 13, "{:040}.", "{:040}"), page(100, 12, "{:040}.", "{:040}"), "punctuated lines 0.12 ≤ 0.12"),
        ("zh", page(1000, 107, "{}。", "{}"), page(1000, 106, "{}。", "{}"), "punctuated lines 0.106 ≤ 0.106"),
        ("en", page(20, 2, SAME, "{:036}."), page(10, 2, SAME, "{:036}."), "characters in duplicate lines 0.1 ≥ 0.1"),
        (
            "zh",
            page(20, 2, "一样的。", "{:03}。"),
            page(10, 2, "一样的。", "{:03}。"),
            "characters in duplicate lines 0.1 ≥ 0.1",
        ),
        ("en", page(100, 66, "{:028}.", "{:029}."), page(100, 67, "{:028}.", "{:029}."), "short lines 0.67 ≥ 0.67"),
    ],
)
def test_fineweb_on_either_side_of_each_threshold(language, kept, gone, reason):
    assert dropped("fineweb", kept, language) is None
    assert dropped("fineweb", gone, language) == reason


def test_short_lines_are_no_fault_in_chinese_unless_asked():
    poem = "\n".join(chr(0x4E00 + i) * 5 + "。" for i in range(8))
    assert dropped("fineweb", poem, "zh") is None
    assert dropped("fineweb", poem, "zh", chinese={"short_lines": "0.67"}) == "short lines 1 ≥ 0.67"


@pytest.mark.parametrize("name", ["gopher_repetition", "fineweb"])
def test_poems_pass_the_chinese_filters(name):
    apply = step(name, "zh")
    assert [text for text in sample("zh") if apply(text).dropped] == []


def test_few_poems_fail_the_rules_of_prose():
    quality, c4 = step("gopher_quality", "zh"), step("c4", "zh")
    assert sum(quality(text).dropped is not None for text in sample("zh")) <= 0.03 * len(sample("zh"))
    assert sum(c4(text).dropped is not None for text in sample("zh")) <= 0.03 * len(sample("zh"))
