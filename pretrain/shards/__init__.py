"""Token files: Megatron's indexed dataset (`.bin` + `.idx`) with an `index.json` that describes it.

    index.json              counts, checksums, fingerprints of tokenizer and corpus; written last
    train-00000.bin/.idx    one Megatron sequence a document: its ids, with the marks of the tokenizer's template
    train-00000.raw.npy     (documents,) uint32: bytes of raw text of each document, for bits per byte
    train-00000.origin.npy  (documents,) of `file`, `number`: the origin of each document, such as en.jsonl, line 12
    origins.json            the name of each `file`; names and places are not part of the set's identity
    train.unigram.npy       (V,) int64: the count of each id on this side
    heldout-…               the same files for the held-out side

Documents are stored independently of the objective: no mask, no shift, no padding. They are in the recipe's order, or
shuffled by a seed.

Any number of processes build a set (blocks.py), and the build can be killed at any moment: finished work lies in a
folder `.NAME.work` beside the output, and the same command continues from there. With `scheduler` the processes are the
workers of a Dask cluster; corpus, tokenizer and output must then be on a file system that all of them see under the
same names.
"""

from pretrain.shards.reader import Shards, check_tokenizer, open_index
from pretrain.shards.stage import ShardsConfig, run

__all__ = ["Shards", "ShardsConfig", "check_tokenizer", "open_index", "run"]
