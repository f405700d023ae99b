"""Keep some documents in a file while a corpus is read, so that the corpus need not be read again for them."""

import json
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path

from pretrain.corpus.documents import Document


class Spool:
    """Documents in a temporary file, in the order of `put`. Memory: the documents of one `put`."""

    def __init__(self, folder: Path):
        """Open an unnamed file in `folder`. It vanishes with this process, even if the process is killed."""
        self._file = tempfile.TemporaryFile(dir=folder)
        weakref.finalize(self, self._file.close)  # a stage that fails never reads the documents

    def put(self, documents: list[Document]) -> None:
        for document in documents:
            self._file.write(json.dumps(list(vars(document).values())).encode() + b"\n")

    def __iter__(self) -> Iterator[Document]:
        """Yield the documents. This works once, because the file is closed at the end."""
        with self._file:
            self._file.seek(0)
            for line in self._file:
                yield Document(*json.loads(line))
