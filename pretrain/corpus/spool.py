"""Documents put by on disk while a corpus is read, so that it need not be read again for them."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pretrain.corpus.documents import Document


class Aside:
    """Documents in the order in which they were put by. Memory: those of one `put`."""

    def __init__(self, folder: Path):
        """In a file of `folder` that has no name: nothing is left of it, whatever ends this process."""
        self._file = tempfile.TemporaryFile(dir=folder)

    def put(self, documents: list[Document]) -> None:
        for document in documents:
            self._file.write(json.dumps(list(vars(document).values())).encode() + b"\n")

    def __iter__(self) -> Iterator[Document]:
        """Once: then the file is gone."""
        with self._file:
            self._file.seek(0)
            for line in self._file:
                yield Document(*json.loads(line))
