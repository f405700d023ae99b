"""Token files: Megatron's indexed dataset (`.bin` + `.idx`) with an `index.json` that says what they are.

    index.json              counts, checksums, fingerprints of tokenizer and corpus; written last
    train-00000.bin/.idx    one Megatron sequence a document: the ids, as the tokenizer's template makes them
    train-00000.raw.npy     (documents,) uint32: bytes of raw text of each document, for bits per byte
    train-00000.origin.npy  (documents,) of `file`, `number`: where each came from, as 12 of "en.jsonl, line"
    origins.json            what `file` stands for; not part of the identity, as no name or place is
    train.unigram.npy       (V,) int64: how often each id occurs on this side
    heldout-…               the same for the other side

Documents are stored without regard to the objective: no mask, no shift, no padding. They are in the recipe's order, or
shuffled by a seed.

The build (blocks.py) is done by any number of processes and can be killed at any moment: what is finished lies in a
folder `.NAME.work` beside the output, and the same command goes on from there. With `scheduler` they are the workers of
a Dask cluster; corpus, tokenizer and output must then be on a file system that all of them see under the same names.
"""

from pretrain.shards.reader import Shards, check_tokenizer, open_index
from pretrain.shards.stage import ShardsConfig, run

__all__ = ["Shards", "ShardsConfig", "check_tokenizer", "open_index", "run"]
