"""The stage `tokenizer`: a corpus in, a vocabulary and a report about it out."""

import platform
import time
from pathlib import Path

import numpy as np
import tokenizers

from pretrain.corpus import CleanedCorpus, Corpus, open_corpus
from pretrain.display.progress import closing_line
from pretrain.errors import TokenizerError
from pretrain.storage.files import write_json
from pretrain.storage.index import write_index
from pretrain.storage.publish import publish
from pretrain.tokenizer import files, plot, report
from pretrain.tokenizer.adopt import adopt
from pretrain.tokenizer.config import TokenizerConfig
from pretrain.tokenizer.extend import extend
from pretrain.tokenizer.training.learn import MadeVocabulary, train

FORMAT = 2  # 1 had no rules


def run(config: TokenizerConfig) -> dict:
    """Make a vocabulary and measure it on held-out text, publish `config.out`, return the report (report.json).

    Raises CorpusError when a side is empty, TokenizerError when the vocabulary cannot be made.
    """
    began = time.monotonic()
    if config.plot:
        plot.check()
    corpus = open_corpus(config.corpus)
    with publish(Path(config.out), "tokenizer", TokenizerError, config) as folder:
        made = {"train": train, "adopt": adopt, "extend": extend}[config.way](config, corpus)
        vocabulary, skipped = made.vocabulary, made.skipped
        measured, *before = report.measure([vocabulary, *made.parents], made.heldout)
        found = {"kind": made.kind, "vocab_size": vocabulary.size, "vocab_size_asked": config.vocab_size}
        found |= made.report | report.report(vocabulary, measured, made.words, made.characters)
        if before:
            found["parent"] = report.rates(before[0])
        if skipped:
            found["skipped"] = skipped.report()
        files.write(folder, made)
        write_json(folder / "report.json", found)
        if config.plot:
            report.draw(folder / "report.png", {"entries": vocabulary}, {"entries": measured})
        write_index(folder, _index(config, corpus, made), recorded=("report.png",) if config.plot else ())
    report.show({config.out: found})
    made.shares.show(corpus.meant)
    if skipped:
        print(skipped.line())
    closing_line("tokenizer", began)
    return found


def _index(config: TokenizerConfig, corpus: Corpus | CleanedCorpus, made: MadeVocabulary) -> dict:
    return {
        "stage": "tokenizer",
        "format": FORMAT,
        "kind": made.kind,
        "vocab_size": made.vocabulary.size,
        "options": config.options,
        "rules": made.rules and vars(made.rules),
        "specials": made.specials,
        "special_tokens": made.special_tokens,
        "reserved": made.reserved,
        "lossless": made.lossless,
        "counts_bytes": made.counts_bytes,
        "corpus": corpus.fingerprint(),
        **made.identity,
        "recorded": {
            "corpus": config.corpus,
            **made.recorded,
            "shares": made.shares.counts,
            "tokenizers": tokenizers.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }
