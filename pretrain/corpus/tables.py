"""Tables into parts: parquet files, Arrow files (as `datasets.save_to_disk` makes them), anything `datasets` loads.

Only the column that holds the text is kept. It is decoded here, in the process that makes the chunks, and sent on as
Arrow: that is compiled code, fast beside what is done with the text, and row groups, of a gigabyte at times, are no
size for a chunk.
"""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pretrain.corpus.chunks import FilePart
from pretrain.corpus.compressed import COPY_AGAIN, other_than
from pretrain.errors import CorpusError

ROWS = 256  # decoded at a time
END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"


def parts_of(path: Path, file: str, form: str, field: str, size: int) -> Iterator[FilePart]:
    """A parquet or Arrow file in parts of at most about `size` bytes; a row is never cut.

    Raises CorpusError for a damaged file or a missing column. Memory: ROWS rows of the column and the compressed
    pages they come from; an Arrow file is mapped.
    """
    try:
        batches = _parquet(path, field) if form == "parquet" else _arrow(path, field)
        yield from cut(batches, file, size)
    except FileNotFoundError:
        raise CorpusError("no such text file", str(path)) from None
    except PermissionError as error:
        raise CorpusError("cannot read a text file", f"{path}: {error.strerror}") from None
    except (pa.ArrowException, OSError) as error:
        if found := other_than(b"PAR1" if form == "parquet" else b"ARROW1", path):
            remedy = "set format: in the recipe, or give the file the name of what it is"
            raise CorpusError(f"a file is read as {form}, and is not", f"{path}: it is {found}", remedy) from None
        what = "a parquet file is damaged" if form == "parquet" else "an Arrow file is damaged"
        raise CorpusError(what, f"{path}: {str(error).splitlines()[0]}", COPY_AGAIN) from None


def cut(batches: Iterator[tuple[pa.RecordBatch, int]], file: str, size: int) -> Iterator[FilePart]:
    """Batches of one column, each with the bytes of the file up to its end, as parts of at most about `size` bytes."""
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


def column_of(data: bytes) -> tuple[str, pa.ChunkedArray]:
    """The name and the values of the one column of a part."""
    table = pa.ipc.open_stream(data).read_all()
    return table.column_names[0], table.column(0)


def column(names: list[str], field: str, where: str) -> str:
    """The column that `field` names or is inside of. Raises CorpusError when there is none."""
    for name in (field, field.partition(".")[0]):
        if names.count(name) > 1:
            raise CorpusError(f"a table has several columns {name!r}", where, "rename all but one")
        if name in names:
            return name
    found = f"its columns: {', '.join(names)}"
    raise CorpusError(f"a table has no column for {field!r}", where, found, "set field: in the recipe")


def _parquet(path: Path, field: str) -> Iterator[tuple[pa.RecordBatch, int]]:
    with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True) as file:
        name = column(file.schema_arrow.names, field, str(path))
        size, rows = path.stat().st_size, 0
        for batch in file.iter_batches(ROWS, columns=[name]):
            rows += batch.num_rows
            # A column a is asked for together with one that is called a.b.
            yield batch.select([name]), size * rows // file.metadata.num_rows


def _arrow(path: Path, field: str) -> Iterator[tuple[pa.RecordBatch, int]]:
    """The batches of either kind of file, `ARROW1` with an index at its end and a stream that begins at once."""
    with pa.memory_map(str(path)) as file:
        if file.read(6) == b"ARROW1":
            reader = pa.ipc.open_file(file)
            batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
        else:
            file.seek(max(0, file.size() - len(END_OF_STREAM)))
            if file.read() != END_OF_STREAM:  # pyarrow takes a stream cut between batches for a whole one
                raise pa.ArrowInvalid("it does not end as an Arrow file does")
            file.seek(0)
            reader = batches = pa.ipc.open_stream(file)
        name = column(reader.schema.names, field, str(path))
        count = getattr(reader, "num_record_batches", None)  # a stream does not know it
        for number, batch in enumerate(batches, 1):
            yield _sound(batch.select([name])), file.size() * number // count if count else file.tell()


def _sound(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Raises ArrowInvalid where offsets point outside of the data: reading there would end the process."""
    try:
        batch.validate(full=True)
    except pa.ArrowInvalid as error:
        if "UTF8" not in str(error):  # of a record, and said with its row when it is read
            raise
    return batch
