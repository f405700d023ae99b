"""Cut tables into parts: parquet files, Arrow files (also of `datasets.save_to_disk`), tables that `datasets` loads.

Only the columns with the text are kept. The process that makes the chunks decodes it and sends it on as Arrow. Decoding
is compiled code, and fast compared with the later work on the text. Sending row groups undecoded would not do: some of
them have a gigabyte, too much for a chunk.
"""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pretrain.corpus.chunks import FilePart
from pretrain.corpus.compressed import COPY_AGAIN, other_than
from pretrain.errors import CorpusError

ROWS = 256  # rows that are decoded at a time
END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"


def parts_of(path: Path, file: str, form: str, fields: tuple[str, ...], size: int) -> Iterator[FilePart]:
    """Cut a parquet or Arrow file into parts of at most about `size` bytes. A row is never cut.

    Raises CorpusError for a damaged file or a missing column. Memory: ROWS rows of the columns and their compressed
    pages; an Arrow file is mapped.
    """
    try:
        batches = _parquet(path, fields) if form == "parquet" else _arrow(path, fields)
        yield from cut(batches, file, size)
    except FileNotFoundError:
        raise CorpusError("no such text file", str(path)) from None
    except PermissionError as error:
        raise CorpusError("cannot read a text file", f"{path}: {error.strerror}") from None
    except (pa.ArrowException, OSError) as error:
        if found := other_than(b"PAR1" if form == "parquet" else b"ARROW1", path):
            remedy = "set format: in the recipe, or rename the file so that its ending names its format"
            raise CorpusError(f"a file is read as {form}, but is not", f"{path}: it is {found}", remedy) from None
        what = "a parquet file is damaged" if form == "parquet" else "an Arrow file is damaged"
        raise CorpusError(what, f"{path}: {str(error).splitlines()[0]}", COPY_AGAIN) from None


def cut(batches: Iterator[tuple[pa.RecordBatch, int]], file: str, size: int) -> Iterator[FilePart]:
    """Cut batches of some columns into parts of at most about `size` bytes.

    Each batch comes with the number of bytes of the file up to its end.
    """
    first, before = 1, 0
    for batch, at in batches:
        rows = max(1, batch.num_rows * size // max(size, batch.nbytes))
        for begin in range(0, batch.num_rows, rows):
            piece = batch.slice(begin, rows)
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, batch.schema) as stream:
                stream.write_batch(piece)
            yield FilePart(file, "rows", first + begin, sink.getvalue().to_pybytes(), stored=at - before)
            before = at
        first += batch.num_rows


def rows_of(data: bytes) -> Iterator[dict[str, pa.Scalar]]:
    """The values of each row of a part, by column."""
    table = pa.ipc.open_stream(data).read_all()
    for values in zip(*table.columns, strict=True):
        yield dict(zip(table.column_names, values, strict=True))


def columns(names: list[str], fields: tuple[str, ...], where: str) -> list[str]:
    """The columns that hold `fields`, each once: the text, or the input and the output of pairs."""
    keys = ("field", "output_field")
    return list(dict.fromkeys(_column(names, field, key, where) for key, field in zip(keys, fields, strict=False)))


def _column(names: list[str], field: str, key: str, where: str) -> str:
    """The column `field`, or the column before the first dot of `field`. Raises CorpusError if there is none."""
    for name in (field, field.partition(".")[0]):
        if names.count(name) > 1:
            raise CorpusError(f"a table has several columns {name!r}", where, "rename all but one")
        if name in names:
            return name
    found = f"its columns: {', '.join(names)}"
    raise CorpusError(f"a table has no column for {field!r}", where, found, f"set {key}: in the recipe")


def _parquet(path: Path, fields: tuple[str, ...]) -> Iterator[tuple[pa.RecordBatch, int]]:
    with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True) as file:
        chosen = columns(file.schema_arrow.names, fields, str(path))
        size, rows = path.stat().st_size, 0
        for batch in file.iter_batches(ROWS, columns=chosen):
            rows += batch.num_rows
            # With the column a, pyarrow also reads a column with the name a.b.
            yield batch.select(chosen), size * rows // file.metadata.num_rows


def _arrow(path: Path, fields: tuple[str, ...]) -> Iterator[tuple[pa.RecordBatch, int]]:
    """The batches of both kinds of Arrow files: those with `ARROW1` and an index at the end, and plain streams."""
    with pa.memory_map(str(path)) as file:
        if file.read(6) == b"ARROW1":
            reader = pa.ipc.open_file(file)
            batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
        else:
            file.seek(max(0, file.size() - len(END_OF_STREAM)))
            if file.read() != END_OF_STREAM:  # pyarrow accepts a stream that was cut between two batches
                raise pa.ArrowInvalid("it does not end as an Arrow file does")
            file.seek(0)
            reader = batches = pa.ipc.open_stream(file)
        chosen = columns(reader.schema.names, fields, str(path))
        count = getattr(reader, "num_record_batches", None)  # a stream does not have it
        for number, batch in enumerate(batches, 1):
            yield _sound(batch.select(chosen)), file.size() * number // count if count else file.tell()


def _sound(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Check a batch. Raises ArrowInvalid if offsets point outside of the data: reading there would kill the process."""
    try:
        batch.validate(full=True)
    except pa.ArrowInvalid as error:
        if "UTF8" not in str(error):  # invalid UTF-8 is the fault of a record, and is reported with its row later
            raise
    return batch
