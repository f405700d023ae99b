"""Repair characters: encoding errors, the Unicode form, control and invisible characters, the Chinese script."""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from typing import Literal

from pretrain.cleaning.step import Outcome, Section, Use, library, primary
from pretrain.errors import ConfigError


class Mojibake(Section):
    """Repair text that was decoded with the wrong encoding."""


class Unicode(Section):
    """Bring text into one Unicode normal form."""

    form: Literal["NFC", "NFKC"] = "NFC"
    """NFC changes nothing that a reader sees. NFKC also folds full-width letters, ligatures and the like: for OCR."""


class Control(Section):
    """Remove control and invisible characters; write line ends and spaces in one way."""


class Script(Section):
    """Convert Chinese to one script. `use: true` covers every source in Chinese."""

    use: Use = False
    to: Literal["simplified", "traditional"] = "simplified"
    """The script to convert to. Simplified is the safer choice: conversion to traditional has to guess words."""

    def covers(self, language: str) -> bool:
        return (primary(language) == "zh" or self.use is not True) and super().covers(language)


def replaced(old: str, new: str) -> int:
    """How many characters of `old` are missing in `new`; at least 1 if the texts differ."""
    return 0 if old == new else max(1, (Counter(old) - Counter(new)).total())


# Encoding errors


def mojibake(section: Mojibake, language: str) -> Callable[[str], Outcome]:
    """Repair text that was decoded with the wrong encoding, a line at a time, and count the repaired lines.

    `ftfy.fix_encoding` repairs UTF-8 read as Latin-1, Windows-1252 or another single-byte encoding, also if it happened
    twice or lost bytes. ftfy never repairs GBK ("a huge loss in accuracy": rspeer/python-ftfy#34), because it does not
    know the language. Here, a source in Chinese allows one more repair: GBK read as Latin-1 or Windows-1252, `ÖÐÎÄ` for
    中文, if the whole line converts without loss into common Chinese characters.

    Two kinds cannot be repaired: characters that a decoder already replaced (U+FFFD, 锟斤拷), and UTF-8 read as GBK
    (鍙ゆ枃). The latter loses bytes because it reads three-byte characters in pairs: of 5,000 lines of Chinese
    Wikipedia none survives it.
    """
    ftfy = library("ftfy")
    badness = library("ftfy.badness")
    chinese = primary(language) == "zh"
    common = _repertoire("gb2312", LEVEL_1)
    # BADNESS_RE reads 7 MB/s of English. It can only match text with one of its telling characters, so look for these.
    kinds = (chars for kind, chars in badness.MOJIBAKE_CATEGORIES.items() if kind != "common")
    telling = re.compile(f"[{''.join(kinds)}]")

    def repair(line: str) -> str:
        for _ in range(MIXED_UP):
            before = line
            if chinese and LATIN_PAIRS.search(line) and (fixed := _gbk_undone(line, common)):
                line = fixed
            elif badness.BADNESS_RE.search(line):
                line = ftfy.fix_encoding(line)
            if line == before:
                break
        return line

    def apply(text: str) -> Outcome:
        if text.isascii() or not telling.search(text):
            return Outcome(text)
        ended = _line_feeds(text, chinese)
        lines = ended.split("\n")
        fixed = [line if line.isascii() else repair(line) for line in lines]
        changes = sum(map(str.__ne__, lines, fixed)) + text.count("\x85") - ended.count("\x85")
        return Outcome("\n".join(fixed), changes)

    return apply


def _gbk_undone(line: str, common: frozenset[str]) -> str | None:
    """The Chinese of a line of GBK that was read as Latin-1 or Windows-1252; None for any other line."""
    for wrong in ("latin-1", "sloppy-windows-1252"):
        try:
            code = line.encode(wrong)
            fixed = code.decode("gbk")
        except UnicodeError:
            continue
        if _is_utf_8(code):  # ftfy repairs it: UTF-8 read twice as Latin-1 also decodes into common characters
            return None
        usual, foreign = sum(map(common.__contains__, fixed)), sum(not char.isascii() for char in fixed)
        if usual >= 4 and usual >= 0.7 * foreign:  # the other 30 % may be punctuation and rarer characters
            return fixed
    return None


def _line_feeds(text: str, chinese: bool) -> str:
    """Replace each U+0085 that ends a line, as in text of mainframes, by \\n. A U+0085 inside mojibake stays.

    In UTF-8 read as Latin-1, U+0085 is part of a sequence of two to four characters (Å is `Ã\\x85`). In GBK read as
    Latin-1 it can be part of any pair, so in Chinese it ends a line only if no character from U+0080 to U+00FF stands
    beside it.
    """
    if "\x85" not in text:
        return text
    kept = BESIDE_NEL if chinese else UTF_8_AS_LATIN_1
    return kept.sub(lambda match: match[0] if match[0].strip("\x85") else "\n" * len(match[0]), text)


def _is_utf_8(code: bytes) -> bool:
    try:
        return bool(code.decode("utf-8"))
    except UnicodeDecodeError:
        return False


LEVEL_1 = (0xB0, 0xD8)  # the rows of GB2312 with its 3,755 common characters
MIXED_UP = 3  # repairs of one line, which may have gone through several wrong encodings
LATIN_PAIRS = re.compile("[\xa1-\xff]{4}")
UTF_8_AS_LATIN_1 = re.compile("[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}|\x85")
BESIDE_NEL = re.compile("[\x80-\xff]+")


# Unicode form


def unicode(section: Unicode, language: str) -> Callable[[str], Outcome]:
    """Bring text into a Unicode normal form (UAX #15) and count the replaced characters.

    NFC gives one spelling to characters that have several (é, Å, Hangul, CJK compatibility ideographs), and a reader
    sees no difference. NFKC also folds characters that look different: full-width letters and digits to ASCII
    (ＡＢＣ１２３ → ABC123), the ideographic space to a space, half-width katakana to full, ﬁ → fi, ① → 1, ㎡ → m2,
    x² → x2, ½ → 1⁄2. In Chinese text it turns ，：；！？（） into , : ; ! ? ( ) but leaves 。、「」, so the punctuation
    becomes a mixture: choose NFKC for OCR or East Asian legacy text, not for prose.
    """

    def apply(text: str) -> Outcome:
        if text.isascii() or unicodedata.is_normalized(section.form, text):
            return Outcome(text)
        new = unicodedata.normalize(section.form, text)
        return Outcome(new, replaced(text, new))

    return apply


# Control and invisible characters


def control(section: Control, language: str) -> Callable[[str], Outcome]:
    """Drop invisible characters, write line ends and spaces in one way, and count dropped and replaced characters.

    Always dropped: C0 and C1 controls other than white space, terminal colour sequences, soft hyphens, byte order
    marks, word joiners, bidirectional controls, lone surrogates, noncharacters, and private-use characters (icon fonts
    and vendors' gaiji, which have no agreed meaning: Unicode 15.0, section 23.5). BERT's own tokenizers drop all these
    categories too (`BasicTokenizer._clean_text`). U+FFFD stays: it marks a missing character.

    Dropped unless they have a meaning (after UAX #31, section 2.3). These are kept: ZWJ and ZWNJ after a letter of an
    Arabic, Indic or other joining script; ZWJ between emoji; U+FE0E and U+FE0F after a symbol or in a keycap; the tag
    letters of a flag; the zero-width space between Thai, Lao, Myanmar or Khmer letters, where it is a word boundary.
    Variation selectors of ideographs are dropped: they choose a glyph, not a character.

    Line ends (\\r\\n, \\r, \\v, \\f, U+0085, U+2028, U+2029) become \\n, at most two in a row. No-break, thin and
    ideographic spaces become a space, and so do U+001C to U+001F, which separate fields and records in library
    catalogues and old databases; a run of spaces with one of these inside a line becomes a single space. Separators and
    ideographic spaces at the beginning of a line are dropped. Runs of plain spaces stay: they are the layout of code
    and verse. White space at the end of lines, and around the document, is dropped.
    """

    def apply(text: str) -> Outcome:
        new = text
        if INVISIBLE.search(text):
            new = _visible(text)
        if UNUSUAL_SPACE.search(new):
            new = "\n".join(_plain_spaces(line) for line in new.split("\n"))
        if " \n" in new or "\t\n" in new:
            new = "\n".join(line.rstrip(" \t") for line in new.split("\n"))
        if "\n\n\n" in new:
            new = MANY_LINES.sub("\n\n", new)
        new = new.strip(" \t\n")
        return Outcome(new, replaced(text, new))

    return apply


ALWAYS_DROPPED = (
    "\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u061c\u180e\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff0-\ufffb"
    "\ud800-\udfff\ue000-\uf8ff\ufdd0-\ufdef\ufffe\uffff\U000e0000-\U000e001f\U000e0080-\U000e0fff\U000f0000-\U0010ffff"
)
LINE_ENDS = "\r\x0b\x0c\x85\u2028\u2029"
JOINERS = "\u200b-\u200d\ufe00-\ufe0f\U000e0020-\U000e007f"  # their two neighbours decide
INVISIBLE = re.compile(f"[{ALWAYS_DROPPED}{LINE_ENDS}{JOINERS}]")
DROPPED = re.compile(f"[{ALWAYS_DROPPED}]+")
LINE_END = re.compile(f"\r\n|[{LINE_ENDS}]")
JOINING = re.compile(f"[{JOINERS}]+")
TERMINAL_SEQUENCE = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
UNUSUAL = "\x1c-\x1f\xa0\u1680\u2000-\u200a\u202f\u205f\u3000"
UNUSUAL_SPACE = re.compile(f"[{UNUSUAL}]")
SPACES = re.compile(f"[ \t{UNUSUAL}]+")
NO_INDENT = re.compile("[\x1c-\x1f\u3000]")
MANY_LINES = re.compile(r"\n{3,}")
# Hebrew to Thaana and Arabic Extended; Devanagari to Sinhala; Tibetan, Myanmar; Khmer, Mongolian; presentation forms.
JOINING_SCRIPT = re.compile(
    "[\u0590-\u08ff\u0900-\u0dff\u0f00-\u109f\u1780-\u18af\uaa60-\uaa7f\ufb50-\ufdcf\ufe70-\ufefc]"
)
UNSPACED_SCRIPT = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\uaa60-\uaa7f]")


def _visible(text: str) -> str:
    if "\x1b" in text:
        text = TERMINAL_SEQUENCE.sub("", text)
    text = LINE_END.sub("\n", text)
    return JOINING.sub(_joining, DROPPED.sub("", text))


def _joining(match: re.Match) -> str:
    """The characters that remain of a run of joiners, selectors and tag letters, given its two neighbours."""
    run, text = match[0], match.string
    before, after = text[match.start() - 1 : match.start()], text[match.end() : match.end() + 1]
    if not before:
        return ""
    if before == "\U0001f3f4" and (tags := FLAG_TAGS.search(run)):
        return tags[0]
    if JOINING_SCRIPT.match(before) and (joiner := JOINER.search(run)):
        return joiner[0]
    if UNSPACED_SCRIPT.match(before) and UNSPACED_SCRIPT.match(after):
        return "\u200b" if "\u200b" in run else ""
    if (
        unicodedata.category(before) in ("So", "Sk", "Sm", "Sc")
        or before in "‼⁉〰〽"
        or (before in KEYCAPS and after == "\u20e3")
    ):
        selector = run[0] if run[0] in "\ufe0e\ufe0f" else ""
        return selector + ("\u200d" if "\u200d" in run and unicodedata.category(after or " ") == "So" else "")
    return ""


FLAG_TAGS = re.compile("[\U000e0030-\U000e007a]{1,6}\U000e007f")  # RGI subdivision flags: England, Scotland, Wales
JOINER = re.compile("[\u200c\u200d]")
KEYCAPS = "#*0123456789"


def _plain_spaces(line: str) -> str:
    def plain(match: re.Match) -> str:
        run = match[0]
        if not UNUSUAL_SPACE.search(run):
            return run
        if match.start() > 0:
            return " "
        return "" if NO_INDENT.search(run) else " " * len(run)  # no-break spaces may indent code

    return SPACES.sub(plain, line) if UNUSUAL_SPACE.search(line) else line


# Chinese script

SURROGATE = re.compile("[\ud800-\udfff]")
STANDARD = {"simplified": "gb2312", "traditional": "big5"}  # each has the characters of its script, also shared ones


def script(section: Script, language: str) -> Callable[[str], Outcome]:
    """Convert Chinese to one script by OpenCC and count the replaced characters.

    The step is off by default, because it changes the author's own characters.

    To simplified: `t2s`, or `tw2s` and `hk2s` if the source is zh-TW or zh-HK, where some characters are written
    differently. To traditional: `s2t`, which has several choices for a character, decides by words (头发 → 頭髮, 发展 →
    發展) and is not always right. To share one vocabulary between both scripts, convert to simplified. Words are not
    translated (软件 does not become 軟體).

    A document is left as it is if conversion would only change characters that belong to the wanted script. OpenCC
    alone would spoil text that is already simplified (乾清宫 → 干清宫, 打坏 → 打坯) or traditional (天后 → 天後).
    """
    if primary(language) != "zh":
        raise ConfigError("only Chinese has two scripts to choose from", f"a source is in {language!r}", "script: [zh]")
    region = {"tw": "tw2s", "hk": "hk2s", "mo": "hk2s"}
    config = next((region[part] for part in language.lower().split("-") if part in region), "t2s")
    convert = library("opencc").OpenCC(config if section.to == "simplified" else "s2t").convert
    han = "\n".join(map(chr, range(0x3400, 0xA000)))
    # With the results of conversion, so that these are never converted again: 薴 → 苧
    own = _repertoire(STANDARD[section.to]).union(convert(han))

    def apply(text: str) -> Outcome:
        if text.isascii():
            return Outcome(text)
        new = convert(SURROGATE.sub("\ufffd", text))  # OpenCC takes UTF-8, which has no surrogates
        foreign = any(old != char and old not in own for old, char in zip(text, new, strict=False))
        return Outcome(new, replaced(text, new)) if foreign else Outcome(text)

    return apply


def _repertoire(encoding: str, rows: tuple[int, int] = (0x81, 0xFF)) -> frozenset[str]:
    """The characters that an encoding writes with two bytes, the first of them in `rows`."""
    pairs = (bytes([row, cell]) for row in range(*rows) for cell in range(0x40, 0xFF))
    return frozenset(pair.decode(encoding, "ignore") for pair in pairs) - {""}
