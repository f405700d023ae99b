"""Show what a run reads and when: the documents of any step, and the steps of any document.

    $ python launch/explain.py runs/wiki --step 41207                     which documents, of which corpora
    $ python launch/explain.py runs/wiki --step 41207 --sample 3          one window: text, masks, segments
    $ python launch/explain.py runs/wiki --document "en.jsonl, line 12"   in which steps it is seen
    $ python launch/explain.py runs/wiki --lengths                        how long documents are

The order of a run is computed and nothing is replayed, so step 10⁹ costs no more than step 0. A run that has not begun
can be asked too, by its configuration, with overrides as for launch/pretrain.py. Steps are numbered as in
metrics.jsonl, TensorBoard and checkpoints: step 1 is the first.
"""

import argparse
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from pretrain import cli, config
from pretrain.errors import ConfigError, ShardError
from pretrain.objectives.objective import Objective
from pretrain.order import branch
from pretrain.order.order import Order, Reading
from pretrain.order.packed import BLOCK_WINDOWS, PackedWindows
from pretrain.order.phases import locate
from pretrain.order.run_data import RunCorpus, RunData, open_run_data
from pretrain.shards import Shards
from pretrain.shards.reader import sidecars
from pretrain.tokenizer import Tokenizer, open_tokenizer
from pretrain.training.config import RunConfig
from pretrain.training.watch.metrics import last_step

CONFIG = "config.yaml"  # in a run's folder and in its checkpoints
SHOWN = 60  # characters of each document in a list
MOST_DIGITS = 18  # of the number of a line or row; no file has so many
BAR = 40  # characters of the longest bar of a histogram
QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)


def main(argv: list[str] | None = None, prog: str = "launch/explain.py") -> int:
    """Answer the question on the command line, and return the exit status."""
    cli.make_printing_safe()
    parser = argparse.ArgumentParser(prog=prog, description="Show what a run reads and when.")
    parser.add_argument("run", help="a run's folder, one of its checkpoints, or a YAML file of launch/pretrain.py")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="dotted keys laid over the file")
    question = parser.add_mutually_exclusive_group(required=True)
    question.add_argument("--step", type=int, help="show the documents that this step reads")
    question.add_argument(
        "--document",
        metavar="WHERE",
        help="the steps that read this document, written as by --step: 'en.jsonl, line 12'",
    )
    question.add_argument("--lengths", action="store_true", help="a histogram of the documents' lengths in tokens")
    parser.add_argument("--sample", type=int, metavar="N", help="with --step: only its window N, as the model sees it")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.sample is not None and arguments.step is None:
        parser.error("--sample is for one window of --step")
    return cli.guarded(lambda: _answer(arguments))


def _answer(arguments: argparse.Namespace) -> None:
    folder = Path(arguments.run)
    path = folder / CONFIG if folder.is_dir() else folder
    run = config.load(RunConfig, path, arguments.overrides).resolved()
    tokenizer = open_tokenizer(run.data.tokenizer)
    words = run.words and arguments.sample is not None  # only a sample needs the places where words begin
    data = open_run_data(run.data, run.phases, run.seed, tokenizer, run.skips, words)
    if arguments.lengths:
        return show_lengths(data.corpora, max(phase.seq_len for phase in run.phases), run.seed)
    if arguments.document is not None:
        return show_readings(data, arguments.document, last_step(folder))
    if not 1 <= arguments.step <= run.steps:
        raise ConfigError("there is no such step", f"--step {arguments.step}; {path} has steps 1 to {run.steps:,}")
    if arguments.sample is None:
        if run.branch_from and arguments.step <= run.begun:
            print(f"note: this run branched off after step {run.begun:,}; {run.branch_from.run} did this one")
        name = f"step {arguments.step:,} of {run.steps:,}"
        return show_step(data.order, tokenizer, name, branch.reads(arguments.step - 1, run.phases, run.skips))
    batch = locate(arguments.step - 1, run.phases).phase.batch
    if not 0 <= arguments.sample < batch:
        raise ConfigError("there is no such sample", f"--sample {arguments.sample}; a step has 0 to {batch - 1:,}")
    show_sample(data, run.objectives(tokenizer), tokenizer, arguments.step, arguments.sample)


# Documents of a step


@dataclass(frozen=True)
class DocumentStretch:
    """A part of one document inside a window."""

    first: int  # its first position in the window, and the position after its last one
    last: int
    document: int
    offset: int  # of its first token within the document
    length: int  # of the whole document, in tokens


def stretches(shards: Shards, start: int, tokens: int) -> Iterator[DocumentStretch]:
    """The documents of the `tokens` stream positions from `start` on, in order."""
    document, _ = shards.document_at(start)
    at = start
    while at < start + tokens:
        begin, end = shards.span(document)
        last = min(end, start + tokens)
        yield DocumentStretch(at - start, last - start, document, at - begin, end - begin)
        at, document = last, document + 1


def show_step(order: Order, tokenizer: Tokenizer, name: str, step: int) -> None:
    """Print the corpora, documents and first words of every window of step `step` of the order (the first is 0).

    `name` is the step of the run that reads it.
    """
    position = locate(step, order.phases)
    phase, readings = position.phase, order.step(step)
    where = f", phase {position.number}" if len(order.phases) > 1 else ""
    print(f"{name}{where}: {phase.batch:,} windows of {phase.seq_len:,} tokens")
    if len(order.corpora) > 1:
        _show_shares(order, position.number, readings)
    windows: list[list[Reading]] = [[] for _ in range(phase.batch)]  # a packed window may be empty
    for reading in readings:
        windows[reading.sample - position.first_sample].append(reading)
    for sample, window in enumerate(windows):
        print(f"\nsample {sample}: {_place(window)}")
        for reading, part in _held(order, window):
            shards = order.corpora[reading.corpus].shards
            row = shards.gather(np.array([reading.start + part.first - reading.at]), part.last - part.first)[0]
            print(f"  {_stretch(shards, part)}  {_one_line(tokenizer.decode(row[:SHOWN].tolist()))}")


def _held(order: Order, window: list[Reading]) -> Iterator[tuple[Reading, DocumentStretch]]:
    """Each document in a window, from left to right, with the reading that it belongs to."""
    for reading in window:
        for part in stretches(order.corpora[reading.corpus].shards, reading.start, reading.tokens):
            yield reading, replace(part, first=part.first + reading.at, last=part.last + reading.at)


def _show_shares(order: Order, phase: int, readings: list[Reading]) -> None:
    """Print the number of tokens from each corpus, beside its share of the mixture."""
    drawn: Counter[str] = Counter()
    for reading in readings:
        drawn[reading.corpus] += reading.tokens
    weights = order.mixtures[phase].weights
    for name, weight in zip(order.corpora, weights, strict=True):
        share, asked = drawn[name] / drawn.total(), weight / sum(weights)
        print(f"  {name}: {drawn[name]:,} tokens, {share:.1%} (of the mixture: {asked:.1%})")


def _place(window: list[Reading]) -> str:
    """The place of a window's text in the stream, and for a packed window the number of its tokens."""
    if not window:
        return "empty"
    reading = window[0]
    corpus = f"{reading.corpus}, " if reading.corpus else ""
    first, last = min(r.start for r in window), max(r.start + r.tokens for r in window) - 1
    tokens = sum(r.tokens for r in window)
    packed = f"{tokens:,} of " if tokens <= last - first else ""
    return f"{corpus}epoch {reading.epoch}, {packed}tokens {first:,} to {last:,} of the stream"


def _stretch(shards: Shards, part: DocumentStretch) -> str:
    tokens = f"{part.first:5} to {part.last - 1:<5}"
    inside = "whole" if part.last - part.first == part.length else f"from {part.offset:,} of {part.length:,}"
    return f"{tokens} document {part.document:,} ({inside})  {_origin(shards, part.document)}"


def _origin(shards: Shards, document: int) -> str:
    return shards.origin(document) if "origin" in sidecars(shards.index) else "its origin is not on record"


def _one_line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"


# One window, as the model sees it


def show_sample(data: RunData, objectives: list[Objective], tokenizer: Tokenizer, step: int, sample: int) -> None:
    """Print a window's segments with their documents, its text with marked targets, and the number of targets.

    Steps count from 1, the windows of a step from 0.
    """
    order, reads = data.order, branch.reads(step - 1, data.phases, data.skips)
    position = locate(reads, order.phases)
    number = position.first_sample + sample
    window = [reading for reading in order.step(reads) if reading.sample == number]
    objective = objectives[position.number]
    samples = order.samples(position.number, number, 1)
    batch = objective.batch(order.rows(samples, position.phase.seq_len, objective.wants_words), samples.keys)
    print(f"sample {sample} of step {step:,}: {_place(window)}")
    shown, counts = objective.marked(batch, tokenizer)
    segments = np.zeros(batch.inputs.shape[1], int) if batch.segments is None else batch.segments[0]
    edges = [0, *(np.flatnonzero(np.diff(segments)) + 1).tolist(), len(segments)]
    places = objective.places(batch)[0]
    for segment, (begun, ended) in enumerate(pairwise(edges)):
        first, last = int(places[begun]), int(places[ended - 1]) + 1
        inside = [reading for reading in window if reading.at <= first < reading.at + reading.tokens]
        if not inside:
            print(f"\nsegment {segment}: {first:5} to {last - 1:<5} padding")
            continue
        shards, start = order.corpora[inside[0].corpus].shards, inside[0].start + first - inside[0].at
        document, offset = shards.document_at(start)
        begin, end = shards.span(document)
        part = DocumentStretch(first, last, document, offset, end - begin)
        print(f"\nsegment {segment}: {_stretch(shards, part)}\n{' '.join(shown[begun:ended])}")
    print(f"\n{counts}")


# Steps of a document


def show_readings(data: RunData, where: str, done: int | None) -> None:
    """Print every step that reads a document; `done` is the last step of the run. Raises ShardError if none does."""
    order, corpora = data.order, data.corpora
    found = [(corpus.name, number) for corpus in corpora for number in _documents(corpus.train, where)]
    if not found:
        for corpus in corpora:
            if any(True for _ in _documents(corpus.heldout, where)):
                raise ShardError(f"{where} is held out: no step trains on it", f"{corpus.folder}, the held-out side")
        raise ShardError(
            "no document comes from there",
            f"looked for {where!r} in {', '.join(corpus.folder for corpus in corpora)}",
            "write it as --step does; a document that cleaning dropped is in no shard",
        )
    for name, number in found:
        shards = order.corpora[name].shards
        begin, end = shards.span(number)
        within = f"{name}, " if name else ""
        print(f"{where}: {within}document {number:,}, {end - begin:,} tokens, from {begin:,} of the stream")
        readings = order.readings(name, begin, end)
        steps = [branch.read_by(reading.step, data.phases, data.skips) for reading in readings]
        for step, reading in zip(steps, readings, strict=True):
            first, last = max(begin, reading.start), min(end, reading.start + reading.tokens)
            sample = reading.sample % locate(reading.step, order.phases).phase.batch
            shown = "none" if step is None else f"{step + 1:,}"  # none: branch_from.skip_steps leaves it out
            state = "" if done is None else "  skipped" if step is None else "  done" if step < done else "  to come"
            print(
                f"  step {shown:>9}  sample {sample:>5,}  epoch {reading.epoch}  "
                f"its tokens {first - begin:,} to {last - 1 - begin:,}{state}"
            )
        read = [(step, reading.sample) for step, reading in zip(steps, readings, strict=True) if step is not None]
        windows, distinct = len(set(read)), len({step for step, _ in read})
        print(f"  {windows:,} window{'s'[: windows != 1]} in {distinct:,} step{'s'[: distinct != 1]}")


def _documents(shards: Shards, where: str) -> Iterator[int]:
    """The numbers of the documents that come from `where`. A set put together of several may hold copies of one."""
    place, _, number = where.rpartition(" ")
    files = [index for index, name in enumerate(shards.places) if name == place]
    if not files or not number.isdecimal() or len(number) > MOST_DIGITS:
        return
    for piece in range(len(shards.pieces)):
        rows = shards.sidecar(piece, "origin")
        mine = np.flatnonzero(np.isin(rows["file"], files) & (rows["number"] == int(number)))
        yield from shards.numbers(piece)[mine].tolist()


# Lengths


def show_lengths(corpora: list[RunCorpus], longest: int, seed: int) -> None:
    """Print, for each corpus and side, a histogram of document lengths, and the share of documents that windows cut.

    `longest` is the number of tokens in the run's longest window. Takes 4 bytes of memory per document.
    """
    for corpus in corpora:
        for shards in (corpus.train, corpus.heldout):
            lengths = np.concatenate([shards.piece_index(piece)[0] for piece in range(len(shards.pieces))])
            tokens = int(lengths.sum(dtype=np.int64))
            title = ", ".join(part for part in (corpus.name, shards.side) if part)
            print(f"{title}: {len(lengths):,} documents, {tokens:,} tokens")
            _show_histogram(lengths)
            quantiles = np.quantile(lengths, QUANTILES).round().astype(int).tolist()
            said = ", ".join(f"{share:.0%} {value:,}" for share, value in zip(QUANTILES, quantiles, strict=True))
            long = lengths > longest
            share = lengths[long].sum(dtype=np.int64) / tokens
            print(f"  shares of documents with at most … tokens: {said}; mean {tokens / len(lengths):,.0f}")
            print(f"  longer than a window of {longest:,}: {long.mean():.1%} of documents, {share:.1%} of tokens")
            if not long.all():
                cut = ((lengths[~long] - 1) / longest).mean()
                print(f"  of the other documents, windows of the stream cut {cut:.1%}{_packed(shards, longest, seed)}")
            print()


def _packed(shards: Shards, seq_len: int, seed: int) -> str:
    """The share of documents that packed windows cut, and their padding; "" if the side is too short to pack."""
    if shards.tokens < BLOCK_WINDOWS * seq_len:
        return ""
    padding, cut = PackedWindows(shards, BLOCK_WINDOWS * seq_len, seed).waste(seq_len)
    return f", windows of documents {cut:.1%} (with {padding:.1%} of padding)"


def _show_histogram(lengths: np.ndarray) -> None:
    """Print the number of documents and the share of tokens for each power of two of the length."""
    bins = np.maximum(np.ceil(np.log2(np.maximum(lengths, 1))), 0).astype(np.int64)  # length in (2^(b-1), 2^b]
    counts = np.bincount(bins)
    tokens = np.bincount(bins, weights=lengths)
    print(f"  {'tokens':>17} {'documents':>12}  {'of tokens':>9}")
    for power in range(int(bins.min()), len(counts)):
        low, high = (1 << power >> 1) + 1, 1 << power
        bar = "█" * round(BAR * counts[power] / counts.max())
        share = tokens[power] / max(1, tokens.sum())
        print(f"  {low:>8,}-{high:<8,} {counts[power]:>12,}  {share:>9.1%}  {bar}")
