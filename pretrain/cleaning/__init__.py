"""The stage `clean`: it cleans a corpus and reports what it removed. The output folder is a corpus itself:

    part-00000.jsonl.zst …  the cleaned documents in the recipe's order: text, source, language, side, where
    report.json             the funnel: documents and bytes in and out of every step, per source, with samples
    funnel.png              the funnel as a picture
    limits.png              how much other limits of the filters would drop; written only if a filter was on
    index.json              counts, options, fingerprints; written last

The stage makes three passes. In the first, processes clean one chunk each: every document goes through the steps of its
language (pipeline.py), is compared with the evaluation texts (contamination.py) and gets hashes and signatures
(chunk.py). The second pass runs in this process and compares the hashes and signatures of the whole corpus
(decisions.py, duplicates.py). In the third, processes write the files of the output.

Finished pieces are kept in a folder `.NAME.work` beside `out`, under a hash of their content and settings. A run that
is started again after a kill takes them over. The output is the same, byte for byte, for any number of workers and
after any interruption.

Memory. First pass: 350 MB a worker with the default steps and chunks (the language identifier takes 120 MB of that).
A document longer than a chunk takes 13 times its size: 0.84 GB with 42 MB of Chinese, 0.90 GB with 50 MB of English in
a single line. Second pass: 110 bytes a document, and more for near-duplicates (duplicates.py). Evaluation texts take
12 bytes an n-gram, shared by all processes, and 16 MB a process.
"""

from pretrain.cleaning.stage import CleanConfig, run

__all__ = ["CleanConfig", "run"]
