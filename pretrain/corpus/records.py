"""Files into chunks, chunks into records.

A chunk is what one process works on: whole records of one source, as stored but decompressed. It is cheap to make
(nothing is decoded or parsed), cheap to send to another process, and the same however many processes there are. Its
records are read wherever it is sent. How a file is cut into records is its `cut`:

    blocks    text between blank lines (lines of white space, as Unicode has it)
    file      the whole file is one
    lines     one JSON object a line
    rows      the rows of a table (parquet, Arrow), kept as an Arrow stream: see tables.py
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.corpus.bad_records import ARRAY, EMPTY, NO_TEXT, NOT_JSON, NOT_UNICODE, NOT_UTF8, TOO_DEEP, TOO_LONG, Bad
from pretrain.corpus.chunks import FilePart
from pretrain.corpus.compressed import READ_BYTES, HashedFile, check_text, open_file, position, read
from pretrain.errors import CorpusError

BOM = b"\xef\xbb\xbf"
# White space as str.isspace() has it, but for \n, as UTF-8; possessive, so that a run of it is looked at once.
SPACES = (
    rb"(?:[\t\x0b\x0c\r\x1c-\x1f ]|\xc2[\x85\xa0]|\xe1\x9a\x80|"
    rb"\xe2\x80[\x80-\x8a\xa8\xa9\xaf]|\xe2\x81\x9f|\xe3\x80\x80)*+"
)
BLANK_LINE = re.compile(rb"\n%b\n" % SPACES)
LEADING = re.compile(rb"(?:%b\n)*+(?:%b\Z)?" % (SPACES, SPACES))  # blank lines before a block
LINE_END = re.compile(rb"\r{1,2}\n|\r")  # besides \n: of Windows (also what was converted twice), of old Macs
BREAK = re.compile(rb"\n(?:(?:%b\n)++(?:%b\Z)?|%b\Z)" % (SPACES, SPACES, SPACES))  # between blocks, after the last
BLANK_LINES = re.compile(r"\n(?:[^\S\n]*\n)+")  # of decoded text
JSON_NAMES = {
    str: "a text",
    dict: "an object",
    list: "a list",
    bool: "a truth value",
    int: "a number",
    float: "a number",
}
SHOWN_CHARACTERS = 200  # of what a bad record has instead
MOST_NESTED = 500  # objects and lists inside one another: Python's parser gives up at about 1,000, less what called it
# A string of JSON, an opening bracket, a closing one. A string that is cut goes to the end: looked at once, not again
# from each of the quotation marks in it.
NESTING = re.compile(r'"(?:[^"\\]|\\.)*+"?|[\[{]|[\]}]')


@dataclass(frozen=True)
class Record:
    text: str
    where: str  # "en.jsonl, line 12"


class NoText(Exception):
    """What a record has where its text should be."""


def parts_of(
    path: Path, file: str, cut: str, size: int, limit: int, raw: HashedFile | None = None
) -> Iterator[FilePart]:
    """A text file in stretches of about `size` bytes, each a whole number of records. Raises CorpusError if damaged.

    A .zst file is read from `raw` if it is given. Memory: two stretches. A longer record is kept up to `limit` bytes;
    when it is longer than that it is only measured.
    """
    first, held, before = 1, b"", 0
    with open_file(path, raw) as stream:
        pieces = _checked_beginning(read(stream, path, size), path, cut)
        pieces = pieces if cut == "lines" else _line_ends(pieces)
        for piece in pieces:
            held += piece
            end = _last_end(held, cut) if len(held) >= size else 0
            at = position(stream)
            if end:
                yield FilePart(file, cut, first, held[:end], stored=at - before)
                before, first, held = at, first + held.count(b"\n", 0, end), held[end:]
            elif len(held) > limit + size:  # surely too long; what is a little longer is found when it is read
                length, lines, held = _past_record(held, pieces, cut)
                at = position(stream)
                yield FilePart(file, cut, first, b"", length, at - before)
                if cut == "file":
                    return
                before, first = at, first + lines
        at = position(stream)
    if held or cut == "file":
        yield FilePart(file, cut, first, held, stored=at - before)


def records_of(part: FilePart, field: str, limit: int) -> Iterator[Record | Bad]:
    """The records of a part, in order, each of at most `limit` bytes; lines and rows have their text under `field`."""
    if part.too_long:
        yield Bad(TOO_LONG, f"{part.file}, line {part.first}", _too_long(part.too_long, limit))
    elif part.cut == "lines":
        yield from _json_lines(part, field, limit)
    elif part.cut == "rows":
        yield from _rows(part, field, limit)
    else:
        yield from _blocks(part, limit)


def _checked_beginning(pieces: Iterator[bytes], path: Path, cut: str) -> Iterator[bytes]:
    """The same pieces. Raises CorpusError when the first one shows that the file is not what it is read as."""
    for number, piece in enumerate(pieces):
        if number == 0:
            check_text(piece, path)
            if cut == "lines":
                _check_lines(piece, path)
        yield piece


def _check_lines(head: bytes, path: Path) -> None:
    """Raise CorpusError for a file of JSON that begins with an array or an object of several lines.

    No line of it is a record, or those that are by chance (the last one of an array, say) are not what was meant.
    """
    line = head.removeprefix(BOM).lstrip().partition(b"\n")[0].rstrip()
    if line == b"{":
        what, remedy = "an object", f"jq -c . {path.name} > NEW.jsonl"
    elif line == b"[" or (line.startswith(b"[") and line.endswith(b",")):
        what, remedy = "one array", f"jq -c '.[]' {path.name} > NEW.jsonl"
    else:
        return
    found = f"{path} begins with {what} that is written over several lines"
    raise CorpusError("a .jsonl file holds one JSON object a line", found, f"write one object a line: {remedy}")


def passages(records: Iterable[Record | Bad], size: int, cut: str) -> Iterator[Record | Bad]:
    """The records, longer ones in passages of `size` characters or a little more, each a record of its own.

    A passage ends with a paragraph: at the first blank line behind `size` characters, or where there is none within
    another `size`, at the first end of a line; a line is never cut. What is left at the end joins the last passage if
    it is shorter than half of `size`. All of this follows from the text alone.
    """
    for record in records:
        if isinstance(record, Bad) or len(record.text) < size * 3 // 2:
            yield record
            continue
        file, _, line = record.where.rpartition(" ")
        text, begin, number = record.text, 0, int(line)
        while begin < len(text):
            end = _passage(text, begin, size)
            passage = text[begin:end]
            if not passage.isspace():
                yield Record(passage.rstrip(), f"{file} {number}")
            number += passage.count("\n") if cut in ("blocks", "file") else 0  # of JSON and tables: line of the record
            begin = end


def _passage(text: str, begin: int, size: int) -> int:
    """Where the passage that begins at `begin` ends: where the next one begins."""
    after = begin + size
    if len(text) - after < size // 2:
        return len(text)
    blank = BLANK_LINES.search(text, after, after + size)
    end = blank.end() if blank else text.find("\n", after) + 1
    return end if end and len(text) - end >= size // 2 else len(text)


def _line_ends(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Text with every line ended by \\n. None of the pieces is empty."""
    held = b""  # what the next piece may continue
    for piece in pieces:
        text = held + piece
        held = text[len(text.rstrip(b"\r")) :][-2:]
        text = text[: len(text) - len(held)]
        if text:
            yield LINE_END.sub(b"\n", text) if b"\r" in text else text
    if held:
        yield b"\n" * len(held)


def _last_end(data: bytes, cut: str) -> int:
    """How many leading bytes of `data` are surely whole records."""
    if cut == "lines":
        return data.rfind(b"\n") + 1
    begin = len(data) if cut == "blocks" else 0
    while begin > 0:  # backwards, a stretch at a time: the last blank line is near the end of nearly every text
        begin = max(0, begin - READ_BYTES)
        ends = [match.end() for match in BLANK_LINE.finditer(data, begin)]
        if ends:
            return ends[-1]
    return 0


def _past_record(held: bytes, pieces: Iterator[bytes], cut: str) -> tuple[int, int, bytes]:
    """Read over the record that `held` begins with: (its bytes, its lines, what was read of the next one)."""
    length = lines = 0
    while True:
        match = BLANK_LINE.search(held) if cut == "blocks" else None
        end = match.end() if match else held.find(b"\n") + 1 if cut == "lines" else 0
        if end:
            return length + end, lines + held.count(b"\n", 0, end), held[end:]
        kept = held[held.rfind(b"\n") :] if cut == "blocks" and b"\n" in held else b""  # a blank line may begin there
        kept = kept if len(kept) <= READ_BYTES else b""
        length += len(held) - len(kept)
        lines += held.count(b"\n", 0, len(held) - len(kept))
        piece = next(pieces, b"")
        if not piece:
            return length + len(kept), lines + kept.count(b"\n"), b""
        held = kept + piece


# Records of text


def _blocks(part: FilePart, limit: int) -> Iterator[Record | Bad]:
    """What is between blank lines, or between the first line that is not blank and the end of the file."""
    data, whole = part.data, part.cut == "file"
    after = LEADING.match(data, _start(part)).end()
    line = part.first + data.count(b"\n", 0, after)
    if whole and after == len(data):
        yield Bad(EMPTY, f"{part.file}, line 1", "no text in it")
    while after < len(data):
        begin = after
        match = None if whole else BREAK.search(data, begin)
        end, after = match.span() if match else (len(data), len(data))
        yield _block(part, begin, end, line, limit)
        line += data.count(b"\n", begin, after)


def _block(part: FilePart, begin: int, end: int, line: int, limit: int) -> Record | Bad:
    where = f"{part.file}, line {line}"
    if end - begin > limit:
        return Bad(TOO_LONG, where, _too_long(end - begin, limit))
    text = _decoded(part, begin, end, line)
    if isinstance(text, Bad):
        return text
    return Record(text.rstrip() if part.cut == "file" else text, where)


def _json_lines(part: FilePart, field: str, limit: int) -> Iterator[Record | Bad]:
    data, begin, line = part.data, _start(part), part.first
    while begin < len(data):
        end = data.find(b"\n", begin)
        end = len(data) if end < 0 else end
        found = _json_line(part, begin, end, line, field, limit)
        if found is not None:
            yield found
        begin, line = end + 1, line + 1


def _json_line(part: FilePart, begin: int, end: int, line: int, field: str, limit: int) -> Record | Bad | None:
    """None for a blank line."""
    where = f"{part.file}, line {line}"
    if end - begin > limit:
        return Bad(TOO_LONG, where, _too_long(end - begin, limit))
    stored = _decoded(part, begin, end, line)
    if isinstance(stored, Bad):
        return stored
    if not stored.strip():
        return None
    try:
        value = _json(stored)
        if isinstance(value, list):  # a whole corpus, written as one array, is no document
            return Bad(ARRAY, where, f"a list of {len(value):,}, not an object")
        text = text_of(value, field)
    except json.JSONDecodeError as error:
        return Bad(NOT_JSON, where, f"{error.msg} at character {error.pos + 1}")
    except RecursionError:
        return Bad(TOO_DEEP, where, f"more than {MOST_NESTED} objects and lists inside one another")
    except NoText as found:
        return Bad(NO_TEXT, where, str(found), _unpacked(value, field))
    if "\\u" in stored:  # only an escape can make a lone surrogate
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            return Bad(NOT_UNICODE, where, f"a lone surrogate at character {error.start + 1}")
    return _checked(text, where)


def _json(text: str) -> Any:
    """The value of JSON. Raises JSONDecodeError, or RecursionError where more than MOST_NESTED brackets are open.

    A whole number may have any number of digits: Python refuses to convert more than 4,300, so that all whole numbers
    of such a record are read as floats. They are no part of the text.
    """
    if text.count("[") + text.count("{") > MOST_NESTED and _depth(text) > MOST_NESTED:
        raise RecursionError
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except ValueError:
        return json.loads(text, parse_int=float)


def _depth(text: str) -> int:
    """How many brackets of JSON are open at once, at most."""
    deepest = depth = 0
    for match in NESTING.finditer(text):
        if match[0] in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif match[0] in "]}":
            depth -= 1
    return deepest


def _unpacked(value: Any, field: str) -> str | None:
    """The remedy for an object that holds a whole corpus as a list under a key: {"data": [{"text": …}, …]}."""
    for key, inside in value.items() if isinstance(value, dict) else ():
        if isinstance(inside, list) and inside and isinstance(inside[0], dict):
            try:
                text_of(inside[0], field)
            except NoText:
                continue
            return f"write one object a line: jq -c '.[{json.dumps(key)}][]' OLD > NEW.jsonl"
    return None


def _rows(part: FilePart, field: str, limit: int) -> Iterator[Record | Bad]:
    from pretrain.corpus.tables import column_of  # imports pyarrow

    name, values = column_of(part.data)
    for number, value in enumerate(values, part.first):
        where = f"{part.file}, row {number}"
        try:
            text = text_of({name: value.as_py()}, field)
        except UnicodeDecodeError as error:
            byte = f"{where}, byte {error.start + 1} of the text"
            yield Bad(NOT_UTF8, byte, f"{error.object[error.start]:#04x}")
        except NoText as found:
            yield Bad(NO_TEXT, where, str(found))
        else:
            size = len(text.encode("utf-8")) if 4 * len(text) > limit else 0
            yield Bad(TOO_LONG, where, _too_long(size, limit)) if size > limit else _checked(text, where)


def text_of(value: Any, path: str) -> str:
    """The text under a dotted path of what JSON can hold; lists on it are gone through, a line each. Raises NoText.

    A key that has a dot in it is found before the parts of it are. Paragraphs in a list are so common that nobody
    should have to write a program for them: `段落.内容` is the text of `{"段落": [{"内容": "…"}, …]}` (MNBVC's form).
    """
    if path and isinstance(value, dict) and path in value:
        inside = value[path]
        return inside if isinstance(inside, str) else text_of(inside, "")
    if isinstance(value, list) and not any(isinstance(item, list) for item in value):
        return "\n".join(text_of(item, path) for item in value)
    if not path and isinstance(value, str):
        return value
    if not path or not isinstance(value, dict):
        raise NoText(_name(value))
    key, _, rest = path.partition(".")
    if rest and key in value:
        return text_of(value[key], rest)
    keys = ", ".join(map(str, value)) or "none"
    shown = f"its keys: {keys}"[:SHOWN_CHARACTERS]
    raise NoText(shown.encode(errors="backslashreplace").decode())  # a key may be a lone surrogate


def _name(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, list):
        return "a list of lists"
    return JSON_NAMES.get(type(value), type(value).__name__)


def _checked(text: str, where: str) -> Record | Bad:
    return Bad(EMPTY, where, "no text in it") if not text or text.isspace() else Record(text, where)


def _decoded(part: FilePart, begin: int, end: int, line: int) -> str | Bad:
    """Text of some bytes of a part, of which the first is in line `line`."""
    try:
        return part.data[begin:end].decode("utf-8")
    except UnicodeDecodeError as error:
        at = begin + error.start
        line += part.data.count(b"\n", begin, at)
        byte = at - part.data.rfind(b"\n", 0, at)
        return Bad(NOT_UTF8, f"{part.file}, line {line}, byte {byte} of the line", f"{part.data[at]:#04x}")


def _start(part: FilePart) -> int:
    """A file's leading byte-order mark is no text."""
    return len(BOM) if part.first == 1 and part.data.startswith(BOM) else 0


def _too_long(found: int, limit: int) -> str:
    return f"{found:,} bytes, max_record_bytes is {limit:,}"
