"""The stage `clean`: a corpus in, the same corpus without what should not be learned, and a report of what went.

    part-00000.jsonl.zst …  what is left, in the recipe's order: text, source, language, side, where; a corpus itself
    report.json             the funnel: documents and bytes in and out of every step, per source, with samples
    funnel.png              the same as a picture
    limits.png              what other limits of the filters would drop, to choose them by; where a filter was on
    index.json              counts, options, fingerprints; written last

Three passes. The first takes chunks of the corpus to processes: each document goes through the steps of its language
(pipeline.py) and past the evaluation texts (contamination.py), and leaves hashes and signatures behind (chunk.py). The
second compares those of the whole corpus in this process (decisions.py, duplicates.py). The third writes, in processes.

What a run has finished when it is killed lies in a folder `.NAME.work` beside `out`, by content and settings, and is
not done again. The output is the same, byte for byte, for any number of workers and after any interruption.

Memory: in the first pass 350 MB a worker with the default steps (the language identifier takes 120 of them) and chunks,
and 13 times the size of a document longer than a chunk (0.84 GB with one of 42 MB of Chinese, 0.90 GB with one of 50 MB
of English in a single line); in the second 110 bytes a document, more for near-duplicates (duplicates.py); of
evaluation texts 12 bytes an n-gram, shared by all processes, and 16 MB a process.
"""

from pretrain.cleaning.stage import CleanConfig, run

__all__ = ["CleanConfig", "run"]
