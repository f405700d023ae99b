"""Cut files into parts, and parts into records.

Parts make chunks (see chunks.py), and one process works on one chunk. A chunk is cheap to make, because nothing is
decoded or parsed, and cheap to send to another process, which then reads its records. Chunks do not depend on the
number of processes. The `cut` of a file says what a record is:

    blocks    the text between blank lines (lines of Unicode white space)
    file      the whole file
    lines     a line with a JSON object
    rows      a row of a table (parquet, Arrow); parts are Arrow streams, see tables.py
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
# The white space of str.isspace() without \n, in UTF-8. The pattern is possessive, so each run is read only once.
SPACES = (
    rb"(?:[\t\x0b\x0c\r\x1c-\x1f ]|\xc2[\x85\xa0]|\xe1\x9a\x80|"
    rb"\xe2\x80[\x80-\x8a\xa8\xa9\xaf]|\xe2\x81\x9f|\xe3\x80\x80)*+"
)
BLANK_LINE = re.compile(rb"\n%b\n" % SPACES)
LEADING = re.compile(rb"(?:%b\n)*+(?:%b\Z)?" % (SPACES, SPACES))  # blank lines before a block
LINE_END = re.compile(rb"\r{1,2}\n|\r")  # besides \n: of Windows (also if converted twice) and of old Macs
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
SHOWN_CHARACTERS = 200  # of the keys that a bad record has in place of the text
MOST_NESTED = 500  # objects and lists inside one another: Python's parser fails at a depth of about 1,000 calls
# A string of JSON, or a bracket. An unfinished string matches to the end of the text, so that it is read only once.
NESTING = re.compile(r'"(?:[^"\\]|\\.)*+"?|[\[{]|[\]}]')


@dataclass(frozen=True)
class Record:
    """The text of one record. That of a labelled pair is its input, a line break and its output."""

    text: str
    where: str  # "en.jsonl, line 12"
    input_characters: int | None = None  # of a pair: the length of its input

    @property
    def decisive(self) -> str:
        """The text whose hash decides the side: of a pair the input, so that all its outputs are on one side."""
        return self.text[: self.input_characters]


class NoText(Exception):
    """A record has no text; the message says what it has instead."""


def parts_of(
    path: Path, file: str, cut: str, size: int, limit: int, raw: HashedFile | None = None
) -> Iterator[FilePart]:
    """Cut a text file into parts of about `size` bytes with whole records. Raises CorpusError for a damaged file.

    If `raw` is given, a .zst file is read from it. A record longer than `size` is kept up to `limit` bytes; a still
    longer one is only measured. Memory: two parts.
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
            elif len(held) > limit + size:  # surely too long; `records_of` finds records a little over the limit
                length, lines, held = _past_record(held, pieces, cut)
                at = position(stream)
                yield FilePart(file, cut, first, b"", length, at - before)
                if cut == "file":
                    return
                before, first = at, first + lines
        at = position(stream)
    if held or cut == "file":
        yield FilePart(file, cut, first, held, stored=at - before)


def records_of(part: FilePart, fields: tuple[str, ...], limit: int) -> Iterator[Record | Bad]:
    """The records of a part, in order. Lines and rows have their text, or the two texts of a pair, under `fields`.

    A record of more than `limit` bytes gives a Bad, like every other record without usable text.
    """
    if part.too_long:
        yield Bad(TOO_LONG, f"{part.file}, line {part.first}", _too_long(part.too_long, limit))
    elif part.cut == "lines":
        yield from _json_lines(part, fields, limit)
    elif part.cut == "rows":
        yield from _rows(part, fields, limit)
    else:
        yield from _blocks(part, limit)


def _checked_beginning(pieces: Iterator[bytes], path: Path, cut: str) -> Iterator[bytes]:
    """Pass the pieces on. Raises CorpusError if the first one shows that the file is in another format."""
    for number, piece in enumerate(pieces):
        if number == 0:
            check_text(piece, path)
            if cut == "lines":
                _check_lines(piece, path)
        yield piece


def _check_lines(head: bytes, path: Path) -> None:
    """Raise CorpusError for a file of JSON that begins with an array or an object of several lines.

    The lines of such a file are no records, except by chance, such as the last line of an array.
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
    """Split long records into passages of `size` characters or a little more. Each passage is a record of its own.

    A passage ends with a paragraph: at the first blank line after `size` characters. If there is none within another
    `size` characters, it ends at the first end of a line. A line is never cut. A rest shorter than half of `size` joins
    the last passage. The passages depend on the text alone.
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
            number += passage.count("\n") if cut in ("blocks", "file") else 0  # JSON, tables: the record's own line
            begin = end


def _passage(text: str, begin: int, size: int) -> int:
    """The end of the passage that begins at `begin`, which is the beginning of the next one."""
    after = begin + size
    if len(text) - after < size // 2:
        return len(text)
    blank = BLANK_LINES.search(text, after, after + size)
    end = blank.end() if blank else text.find("\n", after) + 1
    return end if end and len(text) - end >= size // 2 else len(text)


def _line_ends(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Turn every line end into \\n. Yields no empty piece."""
    held = b""  # a \r at the end of a piece: the next piece may begin with its \n
    for piece in pieces:
        text = held + piece
        held = text[len(text.rstrip(b"\r")) :][-2:]
        text = text[: len(text) - len(held)]
        if text:
            yield LINE_END.sub(b"\n", text) if b"\r" in text else text
    if held:
        yield b"\n" * len(held)


def _last_end(data: bytes, cut: str) -> int:
    """The number of leading bytes of `data` that are certainly whole records."""
    if cut == "lines":
        return data.rfind(b"\n") + 1
    begin = len(data) if cut == "blocks" else 0
    while begin > 0:  # backwards, because the last blank line is near the end of nearly every text
        begin = max(0, begin - READ_BYTES)
        ends = [match.end() for match in BLANK_LINE.finditer(data, begin)]
        if ends:
            return ends[-1]
    return 0


def _past_record(held: bytes, pieces: Iterator[bytes], cut: str) -> tuple[int, int, bytes]:
    """Skip the record that `held` begins with. Returns its bytes, its lines, and the beginning of the next record."""
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
    """The blocks between blank lines; for `file`, all text from the first line that is not blank."""
    data, whole = part.data, part.cut == "file"
    leading = LEADING.match(data, _start(part))
    assert leading is not None  # the pattern also matches no blank line at all
    after = leading.end()
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


def _json_lines(part: FilePart, fields: tuple[str, ...], limit: int) -> Iterator[Record | Bad]:
    data, begin, line = part.data, _start(part), part.first
    while begin < len(data):
        end = data.find(b"\n", begin)
        end = len(data) if end < 0 else end
        found = _json_line(part, begin, end, line, fields, limit)
        if found is not None:
            yield found
        begin, line = end + 1, line + 1


def _json_line(
    part: FilePart, begin: int, end: int, line: int, fields: tuple[str, ...], limit: int
) -> Record | Bad | None:
    """The record of one line; None for a blank line."""
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
        if isinstance(value, list):  # probably a whole corpus written as one array
            return Bad(ARRAY, where, f"a list of {len(value):,}, not an object")
        texts = texts_of(value, fields)
    except json.JSONDecodeError as error:
        return Bad(NOT_JSON, where, f"{error.msg} at character {error.pos + 1}")
    except RecursionError:
        return Bad(TOO_DEEP, where, f"more than {MOST_NESTED} objects and lists inside one another")
    except NoText as found:
        return Bad(NO_TEXT, where, str(found), _unpacked(value, fields) or _set_both(fields))
    if "\\u" in stored:  # only an escape can make a lone surrogate
        for text in texts:
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                return Bad(NOT_UNICODE, where, f"a lone surrogate at character {error.start + 1}")
    return _checked(texts, where)


def _json(text: str) -> Any:
    """Parse JSON. Raises JSONDecodeError, or RecursionError if more than MOST_NESTED brackets are open at once.

    A whole number may have any number of digits. Python refuses to convert more than 4,300; the whole numbers of such a
    record are read as floats. This does not change its text.
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
    """The largest number of brackets of JSON that are open at once."""
    deepest = depth = 0
    for match in NESTING.finditer(text):
        if match[0] in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif match[0] in "]}":
            depth -= 1
    return deepest


def _unpacked(value: Any, fields: tuple[str, ...]) -> str | None:
    """The remedy for an object that holds a whole corpus as a list under a key: {"data": [{"text": …}, …]}."""
    for key, inside in value.items() if isinstance(value, dict) else ():
        if isinstance(inside, list) and inside and isinstance(inside[0], dict):
            try:
                texts_of(inside[0], fields)
            except NoText:
                continue
            return f"write one object a line: jq -c '.[{json.dumps(key)}][]' OLD > NEW.jsonl"
    return None


def _set_both(fields: tuple[str, ...]) -> str | None:
    """The remedy for a pair that lacks a text."""
    return "set field: and output_field: in the recipe (a.b is b inside a)" if len(fields) > 1 else None


def _rows(part: FilePart, fields: tuple[str, ...], limit: int) -> Iterator[Record | Bad]:
    from pretrain.corpus.tables import rows_of  # imports pyarrow

    for number, row in enumerate(rows_of(part.data), part.first):
        where = f"{part.file}, row {number}"
        try:
            texts = texts_of({name: value.as_py() for name, value in row.items()}, fields)
        except UnicodeDecodeError as error:
            byte = f"{where}, byte {error.start + 1} of the text"
            yield Bad(NOT_UTF8, byte, f"{error.object[error.start]:#04x}")
        except NoText as found:
            yield Bad(NO_TEXT, where, str(found), _set_both(fields))
        except (OverflowError, ValueError) as error:  # such as a date after the year 9999, beside the text
            yield Bad(NO_TEXT, where, f"a value that Python cannot hold: {error}")
        else:
            size = sum(len(text.encode("utf-8")) for text in texts) if 4 * sum(map(len, texts)) > limit else 0
            yield Bad(TOO_LONG, where, _too_long(size, limit)) if size > limit else _checked(texts, where)


def texts_of(value: Any, paths: tuple[str, ...]) -> list[str]:
    """`text_of` for each of the paths. With two of them, the message of NoText begins with the path."""
    if len(paths) == 1:
        return [text_of(value, paths[0])]
    found = []
    for path in paths:
        try:
            found.append(text_of(value, path))
        except NoText as error:
            raise NoText(f"{path}: {error}") from None
    return found


def text_of(value: Any, path: str) -> str:
    """The text under a dotted path in a JSON value. The items of a list on the path become lines. Raises NoText.

    A key that contains a dot itself is tried first. Lists of paragraphs are common, so they need no program of their
    own: `段落.内容` is the text of `{"段落": [{"内容": "…"}, …]}` (MNBVC's form).
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


def _checked(texts: list[str], where: str) -> Record | Bad:
    """The record of a text, or of the input and the output of a pair. A pair with an empty half is empty."""
    if any(not text or text.isspace() for text in texts):
        return Bad(EMPTY, where, "no text in it")
    return Record("\n".join(texts), where, len(texts[0]) if len(texts) > 1 else None)


def _decoded(part: FilePart, begin: int, end: int, line: int) -> str | Bad:
    """Decode bytes of a part. `line` is the line of the first byte."""
    try:
        return part.data[begin:end].decode("utf-8")
    except UnicodeDecodeError as error:
        at = begin + error.start
        line += part.data.count(b"\n", begin, at)
        byte = at - part.data.rfind(b"\n", 0, at)
        return Bad(NOT_UTF8, f"{part.file}, line {line}, byte {byte} of the line", f"{part.data[at]:#04x}")


def _start(part: FilePart) -> int:
    """Where the text of a part begins: after the byte order mark, if the file has one."""
    return len(BOM) if part.first == 1 and part.data.startswith(BOM) else 0


def _too_long(found: int, limit: int) -> str:
    return f"{found:,} bytes, max_record_bytes is {limit:,}"
