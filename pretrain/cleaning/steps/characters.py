"""Characters put right: encoding errors repaired, one Unicode form, no invisible characters, one Chinese script."""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from typing import Literal

from pretrain.cleaning.step import Outcome, Section, library, primary
from pretrain.errors import ConfigError


class Mojibake(Section):
    pass


class Unicode(Section):
    form: Literal["NFC", "NFKC"] = "NFC"


class Control(Section):
    pass


class Script(Section):
    """`use: true` means wherever the source is Chinese."""

    use: bool | list[str] = False
    to: Literal["simplified", "traditional"] = "simplified"

    def covers(self, language: str) -> bool:
        return (primary(language) == "zh" or self.use is not True) and super().covers(language)


def replaced(old: str, new: str) -> int:
    """How many characters of `old` are no longer there; at least 1 when the texts differ."""
    return 0 if old == new else max(1, (Counter(old) - Counter(new)).total())


# Encoding errors


def mojibake(section: Mojibake, language: str) -> Callable[[str], Outcome]:
    """Repair text that was decoded with the wrong encoding, a line at a time; counts repaired lines.

    UTF-8 read as Latin-1, Windows-1252 or another single-byte encoding: `ftfy.fix_encoding`, also when it happened
    twice or lost bytes. ftfy leaves all of GBK alone ("a huge loss in accuracy": rspeer/python-ftfy#34), as it must
    where the language is unknown; a source that says it is Chinese allows one repair more: GBK read as Latin-1 or
    Windows-1252, `ÖÐÎÄ` for 中文, where the whole line converts without loss into common Chinese characters.

    Beyond repair: what a decoder already replaced (U+FFFD, 锟斤拷), and UTF-8 read as GBK (鍙ゆ枃): two bytes do not
    divide three, so bytes are lost (of 5,000 lines of Chinese Wikipedia not one survives it).
    """
    ftfy = library("ftfy")
    badness = library("ftfy.badness")
    chinese = primary(language) == "zh"
    common = _repertoire("gb2312", LEVEL_1)
    # BADNESS_RE walks through 7 MB/s of English; without one of its telling characters it cannot match.
    kinds = (chars for kind, chars in badness.MOJIBAKE_CATEGORIES.items() if kind != "common")
    telling = re.compile(f"[{''.join(kinds)}]")

    def gbk_undone(line: str) -> str | None:
        for wrong in ("latin-1", "sloppy-windows-1252"):
            try:
                code = line.encode(wrong)
                fixed = code.decode("gbk")
            except UnicodeError:
                continue
            if _is_utf_8(code):  # for ftfy: UTF-8 read twice as Latin-1 makes common characters too
                return None
            usual, foreign = sum(map(common.__contains__, fixed)), sum(not char.isascii() for char in fixed)
            if usual >= 4 and usual >= 0.7 * foreign:  # the rest: punctuation, rarer characters
                return fixed
        return None

    def repair(line: str) -> str:
        for _ in range(MIXED_UP):
            before = line
            if chinese and LATIN_PAIRS.search(line) and (fixed := gbk_undone(line)):
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


def _line_feeds(text: str, chinese: bool) -> str:
    """`text` with \\n for each U+0085 that ends a line, as in text of mainframes, and is no part of mojibake.

    Read as Latin-1, UTF-8 has U+0085 in sequences of two to four characters (Å is `Ã\\x85`), GBK has it in any pair:
    in Chinese it ends a line where no character from U+0080 to U+00FF stands beside it.
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


LEVEL_1 = (0xB0, 0xD8)  # rows of GB2312 with its 3,755 common characters
MIXED_UP = 3  # one line, several wrong encodings on top of each other
LATIN_PAIRS = re.compile("[\xa1-\xff]{4}")
UTF_8_AS_LATIN_1 = re.compile("[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}|\x85")
BESIDE_NEL = re.compile("[\x80-\xff]+")


# Unicode form


def unicode(section: Unicode, language: str) -> Callable[[str], Outcome]:
    """Unicode normal form (UAX #15); counts characters replaced.

    NFC joins what is written in several ways (é, Å, Hangul, CJK compatibility ideographs) and loses no distinction a
    reader sees. NFKC also folds what looks different: full-width letters and digits to ASCII (ＡＢＣ１２３ → ABC123),
    the ideographic space to a space, half-width katakana to full, ﬁ → fi, ① → 1, ㎡ → m2, x² → x2, ½ → 1⁄2. In Chinese
    text it turns ，：；！？（） into , : ; ! ? ( ) but not 。、「」, so sentences end with a mixture: choose it for
    OCR or East Asian legacy text, not for prose.
    """

    def apply(text: str) -> Outcome:
        if text.isascii() or unicodedata.is_normalized(section.form, text):
            return Outcome(text)
        new = unicodedata.normalize(section.form, text)
        return Outcome(new, replaced(text, new))

    return apply


# Control and invisible characters


def control(section: Control, language: str) -> Callable[[str], Outcome]:
    """Drop what cannot be seen, and write line ends and spaces one way; counts characters dropped or replaced.

    Dropped: C0 and C1 controls but white space, terminal colour sequences, soft hyphens, zero-width spaces, byte order
    marks, word joiners, bidirectional controls, tag characters, lone surrogates, noncharacters, private-use characters
    (icon fonts and vendors' gaiji; no agreed meaning, Unicode 15.0 section 23.5). BERT's own tokenizers drop all these
    categories too (`BasicTokenizer._clean_text`). U+FFFD stays: it says that something is missing.

    Kept where they mean something, dropped elsewhere (after UAX #31, section 2.3): ZWJ and ZWNJ after a letter of an
    Arabic, Indic or other joining script, ZWJ between emoji, U+FE0E and U+FE0F after a symbol or in a keycap, the tag
    letters of a flag, the zero-width space between Thai, Lao, Myanmar or Khmer letters, where it is a word boundary.
    Variation selectors of ideographs go: they choose a glyph, not a character.

    Line ends (\\r\\n, \\r, \\v, \\f, U+0085, U+2028, U+2029) become \\n, at most two in a row. No-break, thin and
    ideographic spaces become a space, as do U+001C to U+001F, which separate fields and records in library catalogues
    and old databases; a run with one of them inside a line becomes a single space. Separators and ideographic spaces
    that begin a line go. Runs of plain spaces stay: they are the layout of code and verse. Lines and documents end
    without white space.
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


DROPPED = (
    "\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u061c\u180e\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff0-\ufffb"
    "\ud800-\udfff\ue000-\uf8ff\ufdd0-\ufdef\ufffe\uffff\U000e0000-\U000e001f\U000e0080-\U000e0fff\U000f0000-\U0010ffff"
)
LINE_END = "\r\x0b\x0c\x85\u2028\u2029"
JOINING = "\u200b-\u200d\ufe00-\ufe0f\U000e0020-\U000e007f"  # dropped or kept by what stands before and after
INVISIBLE = re.compile(f"[{DROPPED}{LINE_END}{JOINING}]")
DROPPED = re.compile(f"[{DROPPED}]+")
LINE_END = re.compile(f"\r\n|[{LINE_END}]")
JOINING = re.compile(f"[{JOINING}]+")
TERMINAL_SEQUENCE = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
UNUSUAL = "\x1c-\x1f\xa0\u1680\u2000-\u200a\u202f\u205f\u3000"
UNUSUAL_SPACE = re.compile(f"[{UNUSUAL}]")
SPACES = re.compile(f"[ \t{UNUSUAL}]+")
NO_INDENT = re.compile("[\x1c-\x1f\u3000]")
MANY_LINES = re.compile(r"\n{3,}")
# Hebrew to Thaana and Arabic extended; Devanagari to Sinhala; Tibetan, Myanmar; Khmer, Mongolian; presentation forms.
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
    """What a run of joiners and selectors comes down to between its two neighbours."""
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
STANDARD = {"simplified": "gb2312", "traditional": "big5"}  # the characters of either script, those of both in both


def script(section: Script, language: str) -> Callable[[str], Outcome]:
    """Chinese in one script by OpenCC; counts characters replaced. Off by default: it changes what the author wrote.

    To simplified: `t2s`, or `tw2s`, `hk2s` where the source says zh-TW or zh-HK, whose standards write some characters
    another way. To traditional: `s2t`, one to many, by words (头发 → 頭髮, 发展 → 發展) and not always right; for one
    vocabulary of both scripts convert to simplified. Words are not translated (软件 does not become 軟體).

    A document stays as it is when conversion would touch only characters that its script has too. OpenCC alone would
    spoil text that is simplified already: 乾清宫 → 干清宫, 打坏 → 打坯, and traditional text: 天后 → 天後.
    """
    if primary(language) != "zh":
        raise ConfigError("only Chinese has two scripts to choose from", f"a source is in {language!r}", "script: [zh]")
    region = {"tw": "tw2s", "hk": "hk2s", "mo": "hk2s"}
    config = next((region[part] for part in language.lower().split("-") if part in region), "t2s")
    convert = library("opencc").OpenCC(config if section.to == "simplified" else "s2t").convert
    han = "\n".join(map(chr, range(0x3400, 0xA000)))
    own = _repertoire(STANDARD[section.to]).union(
        convert(han)
    )  # what conversion makes is never converted again: 薴 → 苧

    def apply(text: str) -> Outcome:
        if text.isascii():
            return Outcome(text)
        new = convert(SURROGATE.sub("\ufffd", text))  # OpenCC speaks UTF-8
        foreign = any(old != char and old not in own for old, char in zip(text, new, strict=False))
        return Outcome(new, replaced(text, new)) if foreign else Outcome(text)

    return apply


def _repertoire(encoding: str, rows: tuple[int, int] = (0x81, 0xFF)) -> frozenset[str]:
    """The characters that two bytes stand for in an encoding."""
    pairs = (bytes([row, cell]) for row in range(*rows) for cell in range(0x40, 0xFF))
    return frozenset(pair.decode(encoding, "ignore") for pair in pairs) - {""}
