"""Read text: a recipe names files, `documents` streams their documents, and a document's hash decides its side.

A recipe is a YAML file beside the text that it describes (`data/sample/recipe.yaml`). A single text file is also a
corpus, with one source, and so is a folder that the stage `clean` published. The formats:

    txt        documents between blank lines, or one document a file (`documents: file`)
    jsonl      one JSON object a line, with the document under `field`; datatrove writes this format
    parquet    the document is in the column `field`
    arrow      the same, in any Arrow file or in a folder that `datasets.save_to_disk` wrote
    dataset    in place of files: a dataset that the library `datasets` streams from the Hugging Face hub by its name

txt and jsonl may be compressed (.gz .zst .xz .bz2). Text must be UTF-8. A record with other bytes, or without text,
stops the run with its file and line. With `bad_records: skip` in its source, it is counted and left out. Nothing is
repaired silently: in pre-training that would show at step 40,000.

The hash of a document's text decides whether it is held out. In a source of a few long documents, a fraction may hold
out nothing: at 1 %, perhaps none of 54 novels. Such a source can have its own fraction or a least number of held-out
documents, or its documents can be split into passages at ends of paragraphs.

Memory does not depend on the size of the corpus: a few chunks of CHUNK_BYTES. A longer document is held whole, up to
`max_record_bytes`; of a parquet file, tables.ROWS rows are decoded together.
"""

from pretrain.corpus.bad_records import Skipped
from pretrain.corpus.chunks import Chunk
from pretrain.corpus.cleaned import CleanedCorpus
from pretrain.corpus.corpus import Corpus, check_apart, listing, open_corpus
from pretrain.corpus.documents import CHUNK_BYTES, Document, Group
from pretrain.corpus.shares import SIDES, Shares

__all__ = [
    "CHUNK_BYTES",
    "SIDES",
    "Chunk",
    "CleanedCorpus",
    "Corpus",
    "Document",
    "Group",
    "Shares",
    "Skipped",
    "check_apart",
    "listing",
    "open_corpus",
]
