"""Text in: a recipe names files, `documents` streams them, a document's own hash decides its side.

A recipe is a YAML file beside the text it describes (`data/sample/recipe.yaml`); a single text file does as well
and is then a recipe of one source; so does a folder that the stage `clean` published. The formats:

    txt        documents between blank lines, or one document a file (`documents: file`)
    jsonl      one JSON object a line, the document under `field`: what datatrove writes, too
    parquet    the document in the column `field`
    arrow      the same, as `datasets.save_to_disk` writes it (its folder can be named) and any Arrow file
    dataset    instead of files: what the library `datasets` loads by name from the Hugging Face hub, streamed

txt and jsonl may be compressed (.gz .zst .xz .bz2). Text is UTF-8; what is not, and any other record that gives no
text, stops the run with file and line, or is counted and left out where the source says `bad_records: skip`:
pre-training on silently repaired text is the kind of surprise that shows at step 40,000.

A document is held out by the hash of its text. A fraction of documents says little of a source of few long ones: of 54
novels none may be held out at 1 %. Such a source can have a fraction of its own, a least number of documents, or its
documents can be split into passages at ends of paragraphs, of which the fraction is then taken.

Memory, whatever the size of a corpus: a few chunks of CHUNK_BYTES; a longer document is held whole, up to
`max_record_bytes` (of parquet, the rows that are decoded together: tables.ROWS).
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
