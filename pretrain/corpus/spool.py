"""Documents put by on disk while a corpus is read, so that it need not be read again for them."""

import json
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path

from pretrain.corpus.documents import Document


class Aside:
    """Documents in the order in which they were put by. Memory: those of one `put`."""

    def __init__(self, folder: Path):
        """In a file of `folder` that has no name: nothing is left of it, whatever ends this process."""
        self._file = tempfile.TemporaryFile(dir=folder)
        weakref.finalize(self, self._file.close)  # a stage that fails never reads the documents

    def put(self, documents: list[Document]) -> None:
        for document in documents:
            self._file.write(json.dumps(list(vars(document).values())).encode() + b"\n")

    def __iter__(self) -> Iterator[Document]:
        """Once: then the file is gone."""
        with self._file:
            self._file.seek(0)
            for line in self._file:
                yield Document(*json.loads(line))
