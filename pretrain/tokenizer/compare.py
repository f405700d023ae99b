"""Compare vocabularies on the held-out text of a corpus: ours, or any vocab.txt, tokenizer.json or folder with one.

report.json   the report of each vocabulary, the entries that two share, words that they split differently
report.png    frequency by rank, and lengths of the entries
index.json    written last
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from pydantic import field_validator

from pretrain.config import StageConfig
from pretrain.corpus import Document, Shares, Skipped, open_corpus
from pretrain.display import tables
from pretrain.errors import CorpusError, TokenizerError
from pretrain.storage.files import digest, write_json
from pretrain.storage.index import write_index
from pretrain.storage.publish import publish
from pretrain.tokenizer import plot, report
from pretrain.tokenizer.adopt import is_ours, opened
from pretrain.tokenizer.kinds import is_reserved
from pretrain.tokenizer.tokenizer import open_tokenizer
from pretrain.tokenizer.vocabulary import Vocabulary, vocabulary_of

DISTINCT_WORDS = 50_000  # the most frequent words of the held-out text, which are split with every vocabulary
LONGEST_HAN = 8  # characters; a longer run is a sentence rather than a word
EXAMPLES = 10


class CompareConfig(StageConfig):
    """The configuration of the comparison of vocabularies."""

    corpus: str
    """A recipe.yaml, a folder that holds one, a folder of the stage `clean`, or a text file. Its held-out side is
    encoded.
    """
    out: str
    """The folder that the report is published in."""
    vocabularies: dict[str, str]
    """A name for each vocabulary, and its place: a folder of the tokenizer stage, or a place that the
    stage's key `adopt` accepts.
    """
    plot: bool = True
    """Whether to draw report.png; needs matplotlib."""

    @field_validator("vocabularies")
    @classmethod
    def _several(cls, vocabularies: dict[str, str]) -> dict[str, str]:
        if len(vocabularies) < 2:
            found = ", ".join(vocabularies) or "none"
            raise ValueError(f"vocabularies: two or more are compared, found {found}: write them as name: place")
        return vocabularies


def run(config: CompareConfig) -> dict:
    """Compare, publish `config.out`, return the report. Raises CorpusError or TokenizerError."""
    if config.plot:
        plot.check()
    corpus, skipped, shares = open_corpus(config.corpus), Skipped(), Shares()
    known = {name: vocabulary_at(place) for name, place in config.vocabularies.items()}
    vocabularies = {name: vocabulary for name, (vocabulary, _) in known.items()}
    with publish(Path(config.out), "compare", TokenizerError, config) as folder:
        words: Counter[str] = Counter()
        documents = counted(corpus.documents(("heldout",), skipped, shares), words)
        measured = dict(zip(vocabularies, report.measure(list(vocabularies.values()), documents), strict=True))
        _check_heldout(config.corpus, next(iter(measured.values())))
        texts = {name: report.texts_of(vocabulary) for name, vocabulary in vocabularies.items()}
        found = {
            "vocabularies": {
                name: {"vocab_size": vocabulary.size, **report.report(vocabulary, measured[name])}
                for name, vocabulary in vocabularies.items()
            },
            "overlap": overlap(texts, {name: part.counts for name, part in measured.items()}),
            "words": differences(vocabularies, words),
        }
        if skipped:
            found["skipped"] = skipped.report()
        write_json(folder / "report.json", found)
        if config.plot:
            report.draw(folder / "report.png", vocabularies, measured)
        index = {
            "stage": "compare",
            "corpus": corpus.fingerprint(),
            "vocabularies": {name: identity for name, (_, identity) in known.items()},
            "recorded": {"corpus": config.corpus, "vocabularies": config.vocabularies, "shares": shares.counts},
        }
        write_index(folder, index, recorded=("report.png",) if config.plot else ())
    show(found)
    shares.show(corpus.meant)
    if skipped:
        print(skipped.line())
    print(f"written to {config.out}")
    return found


def vocabulary_at(place: str) -> tuple[Vocabulary, str | dict]:
    """The vocabulary at a place, and its identity: our fingerprint, or the SHA-256 of the files that were read."""
    if is_ours(Path(place)):
        tokenizer = open_tokenizer(place)
        return tokenizer.vocabulary, tokenizer.fingerprint
    foreign = opened(place)
    engine = foreign.engine
    engine.encode_special_tokens = True
    vocabulary = vocabulary_of(engine, (token for text, token in engine.get_vocab().items() if is_reserved(text)))
    return vocabulary, {name: digest(path)["sha256"] for name, path in sorted(foreign.files.items())}


# Entries


def overlap(texts: dict[str, dict[int, str | None]], counts: dict[str, np.ndarray]) -> list[dict]:
    """For every two vocabularies: how many entries have the same text, whether at the beginning of a word or inside.

    The examples are the entries missing in the other vocabulary that the held-out text uses most often.
    """
    held = {name: _by_text(part, counts[name]) for name, part in texts.items()}
    found = []
    for a, b in itertools.combinations(held, 2):
        shared = len(held[a].keys() & held[b].keys())
        lacking = {a: _only(held[a], held[b]), b: _only(held[b], held[a])}
        found.append(
            {
                "between": [a, b],
                "shared": shared,
                "jaccard": shared / max(1, len(held[a].keys() | held[b].keys())),
                "only": {name: len(left) for name, left in lacking.items()},
                "examples": {name: left[:EXAMPLES] for name, left in lacking.items()},
            }
        )
    return found


def _only(one: Counter[str], other: Counter[str]) -> list[str]:
    """The texts that only `one` has, the most frequent first."""
    return sorted(one.keys() - other.keys(), key=lambda text: (-one[text], text))


def _by_text(texts: dict[int, str | None], counts: np.ndarray) -> Counter[str]:
    """How often each text was produced, summed over all entries that are equal apart from spaces around them."""
    found: Counter[str] = Counter()
    for token, text in texts.items():
        if text and text.strip():
            found[text.strip()] += int(counts[token])
    return found


# Words


def counted(documents: Iterable[Document], words: Counter[str]) -> Iterator[Document]:
    """Pass on the documents, and count their words and short runs of Han in `words`."""
    for document in documents:
        words.update(report.words_in(document.text, LONGEST_HAN))
        yield document


def differences(vocabularies: dict[str, Vocabulary], words: Counter[str]) -> dict:
    """The share of running words that all vocabularies split alike, and the words that cost the most extra tokens.

    The most frequent words are split, each with a space before it, as in most text.
    """
    often = sorted(words.items(), key=lambda item: (-item[1], item[0]))[:DISTINCT_WORDS]
    cuts = {name: _cuts(vocabulary, [word for word, _ in often]) for name, vocabulary in vocabularies.items()}
    alike, differing = 0, []
    for number, (word, count) in enumerate(often):
        each = {name: cut[number] for name, cut in cuts.items()}
        sizes = [len(cut) for cut in each.values()]
        if len({tuple(cut) for cut in each.values()}) == 1:
            alike += count
        else:
            differing.append(((min(sizes) - max(sizes)) * count, word, count, each))
    total = sum(count for _, count in often)
    differing.sort(key=lambda item: item[:2])
    letters = [item for item in differing if not report.han_in(item[1])][:EXAMPLES]
    han = [item for item in differing if report.han_in(item[1])][:EXAMPLES]
    return {
        "looked_at": total,
        "cut_alike": alike / total if total else None,
        "examples": [
            {"word": word, "count": count, "cuts": {name: "·".join(cut) for name, cut in each.items()}}
            for _, word, count, each in letters + han
        ],
    }


def _cuts(vocabulary: Vocabulary, words: list[str]) -> list[list[str]]:
    """The pieces of each word, as parts of the word; `?` is the unknown token, `é×2` a character of two tokens."""
    found: list[list[str]] = []
    texts = [f" {word}" for word in words]
    encodings = vocabulary.engine.encode_batch(texts, add_special_tokens=False)
    for text, encoding in zip(texts, encodings, strict=True):
        spans = [
            (span, token == vocabulary.unknown) for token, span in zip(encoding.ids, encoding.offsets, strict=True)
        ]
        pieces = []
        for (span, unknown), group in itertools.groupby(spans):
            piece, times = text[slice(*span)].strip(), len(list(group))
            if piece:
                pieces.append(("?" if unknown else piece) + (f"×{times}" if times > 1 else ""))
        found.append(pieces)
    return found


# On the terminal


def show(found: dict) -> None:
    """Print the reports of all vocabularies, the entries that two share, and words that they cut differently."""
    names = list(found["vocabularies"])
    report.show(found["vocabularies"])
    for pair in found["overlap"]:
        a, b = pair["between"]
        print(f"{a} and {b} share {pair['shared']:,} texts, {pair['jaccard']:.0%} of the texts in either")
        for name in (a, b):
            some = "  ".join(pair["examples"][name][: report.SHOWN])
            print(f"  only {name}: {pair['only'][name]:,}" + (f", such as  {some}" if some else ""))
    words = found["words"]
    if words["cut_alike"] is not None:
        print(f"cut alike by all: {words['cut_alike']:.1%} of running words; the others cost most in:")
        rows = [
            (f"{example['word']} {example['count']:,}", *(example["cuts"][name] for name in names))
            for example in words["examples"]
        ]
        tables.show(("word", *names), rows, left=range(len(names) + 1))


def _check_heldout(name: str, measured: report.Measured) -> None:
    if not measured.tallies:
        remedy = "add documents, or set heldout_fraction in a recipe.yaml"
        raise CorpusError("vocabularies are compared on held-out documents", f"{name} has none", remedy)
