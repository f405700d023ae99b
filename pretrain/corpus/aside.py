"""Documents put by on disk while a corpus is read, so that it need not be read again for them."""

import pickle
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pretrain.corpus import Document


class Aside:
    """Documents in the order in which they were put by. Memory: those of one `put`."""

    def __init__(self, folder: Path):
        """In a file of `folder` that has no name: nothing is left of it, whatever ends this process."""
        self._file = tempfile.TemporaryFile(dir=folder)

    def put(self, documents: list[Document]) -> None:
        pickle.dump([tuple(vars(document).values()) for document in documents], self._file, pickle.HIGHEST_PROTOCOL)

    def __iter__(self) -> Iterator[Document]:
        """Once: then the file is gone."""
        with self._file:
            end = self._file.tell()
            self._file.seek(0)
            while self._file.tell() < end:
                for values in pickle.load(self._file):
                    yield Document(*values)
