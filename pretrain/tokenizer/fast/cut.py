r"""Split text into words with array operations, exactly as `tokenizers` splits it: one class for each kind.

    \xfeHe plays.\xff…      a buffer of UTF-8, each document between two bytes that do not occur in UTF-8
    \xfehe plays.\xff…      bert: every character as the normaliser leaves it
        ^  ^                words begin here; the id of a single-character word, like the full stop, is known at once

There is no Unicode table here. When a character first occurs, the `tokenizers` object is tried on it: the character is
dropped, changed, isolated, or treated as a letter.
"""

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import tokenizers
from tokenizers import Regex, pre_tokenizers

from pretrain.tokenizer.fast.prefixes import PADDING
from pretrain.tokenizer.kinds import byte_of_symbol

BEGIN, END = 0xFE, 0xFF  # around each document: bytes that do not occur in UTF-8
CODE_POINTS = 0x110000
RUN = 24  # code points, as in kinds.BYTE_WORDS


@dataclass
class CutText:
    """A batch of documents in one buffer, and where its words are."""

    buffer: np.ndarray  # (bytes + PADDING,) uint8: the documents, normalised, each between BEGIN and END
    starts: np.ndarray  # (words,) int64, in order
    ends: np.ndarray  # (words,) int64
    ids: np.ndarray  # (bytes + PADDING,) int32: the token that begins here if it is already known, else -1
    foreign: np.ndarray  # (some,) int64: places of characters whose documents the library must encode


class Roles:
    """The role of each character. `ask(code points)` is called once for each character. Role 0 means not asked yet."""

    def __init__(self, ask: Callable[[np.ndarray], Sequence[int] | np.ndarray]):
        self._known = np.zeros(CODE_POINTS, np.uint8)
        self._ask = ask

    def __getitem__(self, codes: np.ndarray) -> np.ndarray:
        roles = self._known[codes]
        if not roles.all():
            new = np.unique(codes[roles == 0])
            self._known[new] = self._ask(new)
            roles = self._known[codes]
        return roles


def _characters(buffer: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The places and the code points of all characters of more than one byte, both int64."""
    places = np.flatnonzero(buffer - np.uint8(0xC2) < 0xF5 - 0xC2)
    word = np.ndarray(len(buffer) - 3, "<u4", buffer, strides=(1,))[places]
    codes = (word & 0xF) << 12 | word >> 2 & 0xFC0 | word >> 16 & 0x3F  # as if of three bytes, like most Chinese
    others = np.flatnonzero(word & 0xF0 != 0xE0)
    if len(others):
        word = word[others]
        two = (word & 0x1F) << 6 | word >> 8 & 0x3F
        four = (word & 0x7) << 18 | (word & 0x3F00) << 4 | word >> 10 & 0xFC0 | word >> 24 & 0x3F
        codes[others] = np.where(word & 0xF0 == 0xF0, four, two)
    return places, codes.astype(np.int64)


def _spread(array: np.ndarray, places: np.ndarray, codes: np.ndarray, values: np.ndarray | int) -> None:
    """Write `values` at every byte of the characters `codes` that begin at `places`."""
    array[places] = array[places + 1] = values
    for more, least in ((2, 0x800), (3, 0x10000)):
        long = codes >= least
        if not long.all():
            places, codes = places[long], codes[long]
            values = values[long] if isinstance(values, np.ndarray) else values
        array[places + more] = values


class BertWords:
    """Splits as `BertPreTokenizer` does, after a normaliser that treats most characters one by one.

    The normaliser is `BertNormalizer` or, with `composes`, NFKC followed by it. Characters whose normal form depends on
    their neighbours are FOREIGN: marks that are reordered, marks and Hangul vowels that compose with the character
    before them, and characters that this version of Python does not know.
    """

    LETTER, ALONE, CHANGED, FOREIGN = range(1, 5)

    def __init__(self, engine: tokenizers.Tokenizer, vocabulary: dict[str, int], composes: bool):
        self._normalise = engine.normalizer.normalize_str
        self._cut = engine.pre_tokenizer.pre_tokenize_str
        self._vocabulary = vocabulary
        self._unknown = vocabulary[engine.model.unk_token]
        self._composes = composes
        self._ids = np.zeros(CODE_POINTS, np.int32)  # of the characters that are words of their own
        self._changes: dict[int, bytes] = {}
        self._roles = Roles(self._ask)
        roles = self._roles[np.arange(128)]
        changes = {code: self._changes[code] for code in np.flatnonzero(roles == self.CHANGED).tolist()}
        self._dropped = bytes(code for code, text in changes.items() if not text)
        self._changed = b"".join(changes.get(code, b"")[:1] or bytes([code]) for code in range(256))
        letters = bytearray(roles.tobytes() + bytes([self.LETTER]) * 128)
        letters[BEGIN] = letters[END] = letters[ord(" ")] = 0
        self._classes = bytes(letters)

    def __call__(self, documents: list[bytes]) -> CutText:
        raw = _joined(documents).translate(self._changed, self._dropped) + bytes(PADDING)
        buffer = np.frombuffer(raw, np.uint8)
        places, codes = _characters(buffer)
        roles = self._roles[codes]
        changed = np.flatnonzero(roles == self.CHANGED)
        if len(changed):
            raw = self._spliced(raw, places[changed].tolist(), codes[changed].tolist())
            buffer = np.frombuffer(raw, np.uint8)
            places, codes = _characters(buffer)
            roles = self._roles[codes]
        classes = np.frombuffer(bytearray(raw.translate(self._classes)), np.uint8)
        classes[-PADDING:] = 0
        ids = np.full(len(buffer), -1, np.int32)
        foreign = places[roles >= self.CHANGED]  # also a changed character that would be changed again
        alone = np.flatnonzero(roles == self.ALONE)
        places, codes = places[alone], codes[alone]
        _spread(classes, places, codes, 0)
        ids[places] = self._ids[codes]
        alone = np.flatnonzero(classes == self.ALONE)  # characters of one byte
        ids[alone] = self._ids[buffer[alone]]
        letters = classes == self.LETTER
        starts = np.flatnonzero(letters[1:] > letters[:-1]) + 1
        ends = np.flatnonzero(letters[1:] < letters[:-1]) + 1
        return CutText(buffer, starts, ends, ids, foreign)

    @staticmethod
    def spelled(token: str) -> bytes:
        """The bytes of a token in the buffer."""
        return token.encode()

    def _spliced(self, raw: bytes, places: list[int], codes: list[int]) -> bytes:
        parts: list[bytes] = []
        done = 0
        for place, code in zip(places, codes, strict=True):
            parts += raw[done:place], self._changes[code]
            done = place + (2 if code < 0x800 else 3 if code < 0x10000 else 4)
        return b"".join([*parts, raw[done:]])

    def _ask(self, codes: np.ndarray) -> list[int]:
        return [self._role(code, chr(code)) for code in codes.tolist()]

    def _role(self, code: int, character: str) -> int:
        normal = self._normalise(f"a{character}a")
        words = [word for word, _ in self._cut(normal)]
        if self._foreign(character) or normal[0] + normal[-1] != "aa":
            return self.FOREIGN
        if words == [f"a{character}a"]:
            return self.LETTER
        if len(words) == 3 and words[::2] == ["a", "a"] and len(words[1]) == 1:
            self._ids[code] = self._vocabulary.get(words[1], self._unknown)
            return self.ALONE
        self._changes[code] = b" " if words == ["a", "a"] else normal[1:-1].encode()
        return self.CHANGED

    def _foreign(self, character: str) -> bool:
        """Whether the normal form of the character depends on its neighbours, or might (unknown characters)."""
        category = unicodedata.category(character)
        if category == "Cn":  # unknown to this Python: an ideograph or emoji in these planes, elsewhere anything
            return not "\U0001f000" <= character <= "\U0003ffff"
        if self._composes:
            return category[0] == "M" or "\u1160" <= character <= "\u11ff"
        return category != "Mn" and unicodedata.combining(character) > 0


class ByteWords:
    """Splits as one of the patterns in BYTE_WORDS, in which every word except contractions is a run of one class.

    `single`: every digit is a word of its own, without a leading space.
    """

    LETTER, NUMBER, OTHER, BLANK, MARK = range(1, 6)

    def __init__(self, single: bool):
        self._single = single
        self._roles = Roles(self._ask)
        classes = bytearray(self._roles[np.arange(128)].tobytes() + bytes([self.LETTER]) * 128)
        classes[BEGIN] = classes[END] = self.MARK
        self._classes = bytes(classes)
        self._byte = byte_of_symbol()

    def __call__(self, documents: list[bytes]) -> CutText:
        raw = _joined(documents)
        size = len(raw)
        raw += bytes(PADDING)
        buffer = np.frombuffer(raw, np.uint8)
        classes = np.frombuffer(bytearray(raw.translate(self._classes)), np.uint8)
        places, codes = _characters(buffer)
        roles = self._roles[codes]
        odd = np.flatnonzero(roles != self.LETTER)
        _spread(classes, places[odd], codes[odd], roles[odd])
        begins = np.ones(size + 1, bool)  # whether a word begins here; the last element is the end of the last word
        begins[1:size] = classes[1:size] != classes[: size - 1]
        self._attach_spaces(buffer, classes, begins)
        self._contract(buffer, classes, begins)
        if self._single:
            begins[:size] |= (classes[:size] == self.NUMBER) & (buffer[:size] & 0xC0 != 0x80)
        self._cut_runs(buffer, classes, begins)
        borders = np.flatnonzero(begins)
        words = np.flatnonzero(classes[borders[:-1]] != self.MARK)
        ids = np.full(len(buffer), -1, np.int32)
        return CutText(buffer, borders[words], borders[words + 1], ids, np.zeros(0, np.int64))

    def spelled(self, token: str) -> bytes:
        """The bytes of a token in the buffer; b"" if it has other symbols, like prefixes and special tokens."""
        try:
            return bytes(map(self._byte.__getitem__, token))
        except KeyError:
            return b""

    def _attach_spaces(self, buffer: np.ndarray, classes: np.ndarray, begins: np.ndarray) -> None:
        """`\\s+(?!\\S)` and ` ?`: split the last blank before a word from the other blanks; a space joins the word."""
        text = np.flatnonzero(begins[1:-1] & (classes[: len(begins) - 2] == self.BLANK)) + 1
        text = text[classes[text] != self.MARK]
        blank = text - 1
        for _ in range(2):  # blanks have up to three bytes
            blank -= buffer[blank] & 0xC0 == 0x80
        begins[blank] = True
        begins[text[buffer[blank] == ord(" ")]] = False

    def _contract(self, buffer: np.ndarray, classes: np.ndarray, begins: np.ndarray) -> None:
        """`'s|'t|'re|'ve|'m|'ll|'d` if the apostrophe begins a word: alone, or after a full run of its class."""
        quote = np.flatnonzero(buffer == ord("'"))
        quote = quote[classes[quote + 1] == self.LETTER]
        first, second = buffer[quote + 1], buffer[quote + 2]
        letters = np.isin(first, list(b"stmd")).astype(np.int64)
        letters[np.isin(first, list(b"rv")) & (second == ord("e")) | (first == ord("l")) & (second == ord("l"))] = 2
        quote, letters = quote[letters > 0], letters[letters > 0]
        late = np.flatnonzero(~begins[quote] & (classes[quote - 1] == self.OTHER))
        if len(late):
            borders = np.flatnonzero(begins)
            runs = borders[np.searchsorted(borders, quote[late], side="right") - 1]
            runs += buffer[runs] == ord(" ")
            for n in np.flatnonzero(quote[late] - runs >= RUN):
                run, mark = runs[n], quote[late[n]]
                begins[mark] = np.count_nonzero(buffer[run:mark] & 0xC0 != 0x80) % RUN == 0
        alone = begins[quote]
        quote, letters = quote[alone], letters[alone]
        begins[quote + 1] = False
        begins[quote + 1 + letters] = True

    def _cut_runs(self, buffer: np.ndarray, classes: np.ndarray, begins: np.ndarray) -> None:
        """Split runs into parts of RUN code points, not counting a leading space."""
        borders = np.flatnonzero(begins)
        long = np.flatnonzero(np.diff(borders) > RUN)
        starts, ends = borders[long], borders[long + 1]
        starts += (buffer[starts] == ord(" ")) & (classes[starts + 1] != self.BLANK)
        heads = buffer[: len(begins)] & 0xC0 != 0x80
        number = np.cumsum(heads, dtype=np.int32)  # the number of characters up to each byte
        cuts = (number[ends - 1] - number[starts]) // RUN  # int32, like the other arrays here
        starts, cuts = starts[cuts > 0], cuts[cuts > 0]
        if len(starts):
            nth = np.arange(1, cuts.sum() + 1, dtype=np.int32) - np.repeat(np.cumsum(cuts, dtype=np.int32) - cuts, cuts)
            begins[np.searchsorted(number, np.repeat(number[starts], cuts) + RUN * nth)] = True

    def _ask(self, codes: np.ndarray) -> np.ndarray:
        text = "".join(map(chr, codes.tolist()))
        roles = np.full(len(codes), self.OTHER, np.uint8)
        for role, pattern in ((self.LETTER, r"\p{L}"), (self.NUMBER, r"\p{N}"), (self.BLANK, r"\s")):
            here = np.ones(len(codes), bool)
            for _, (start, end) in pre_tokenizers.Split(Regex(pattern), "removed").pre_tokenize_str(text):
                here[start:end] = False
            roles[here] = role
        return roles


def _joined(documents: list[bytes]) -> bytes:
    return b"\xfe" + b"\xff\xfe".join(documents) + b"\xff"
