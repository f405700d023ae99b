"""The stage `shards`: its configuration, the processes that build a set, and the index that is published with it."""

import importlib.metadata
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial, reduce
from itertools import chain
from operator import add, attrgetter
from pathlib import Path

import numpy as np
from pydantic import Field

from pretrain.config import StageConfig, free
from pretrain.corpus import (
    CHUNK_BYTES,
    SIDES,
    CleanedCorpus,
    Corpus,
    Shares,
    Skipped,
    check_apart,
    listing,
    open_corpus,
)
from pretrain.display.progress import closing_line, progress
from pretrain.errors import CorpusError, ShardError, TokenizerError
from pretrain.processes.pool import cluster, noted, ordered, processes
from pretrain.shards.build.blocks import (
    BuildJob,
    ShardBlock,
    ShardPiece,
    Written,
    counted,
    items_of,
    opened,
    pieces_of,
    tokenise,
    write_piece,
)
from pretrain.shards.build.shuffle import make_run, runs_of, shuffled_pieces
from pretrain.shards.megatron import dtype_of
from pretrain.shards.writer import FORMAT, SIDECARS, tokenized, write_shards_index
from pretrain.storage.index import read_index
from pretrain.storage.publish import publish
from pretrain.storage.work import code, kept, settled
from pretrain.tokenizer import Tokenizer
from pretrain.tokenizer.tokenizer import MADE_BY as TOKENIZER_MADE_BY

COUNTED = 64  # chunks whose counts are added up together
Each = Callable[[Callable, Iterable], Iterator]  # like `map`: the results of a function of each item, in order


class ShardsConfig(StageConfig):
    """The configuration of the stage `shards`."""

    corpus: str
    """The corpus: a `recipe.yaml`, a folder that holds one, a folder of the stage `clean`, or one text file."""
    tokenizer: str
    """The folder of the tokenizer."""
    out: str
    """The folder for the shards."""
    piece_tokens: int = Field(1 << 30, gt=0)
    """The tokens of a piece (one `.bin` file). The document that reaches this number is the last of its piece."""
    pair_mark: str = "<output>"
    """The special token between the input and the output of a labelled pair. Used for sources with `output_field`."""
    shuffle_seed: int | None = Field(None, ge=0, lt=2**63)
    """The seed of a random order of the documents. By default documents keep the recipe's order."""
    chunk_bytes: int = free(CHUNK_BYTES, ge=1 << 10, le=1 << 30)
    """The bytes of text that a process tokenises at a time. From 1 TB of text on, 64 MB is better."""
    workers: int = free(1, ge=1)
    """The processes of this machine that build."""
    scheduler: str | None = free(None)
    """The address (`tcp://…`) of a Dask scheduler. The workers of its cluster then build instead of `workers`."""


def run(config: ShardsConfig) -> dict:
    """Tokenise a corpus into `config.out`. Returns the index. Raises CorpusError, TokenizerError or ShardError."""
    began = time.monotonic()
    # Workers elsewhere are in another folder than this process.
    placed = (lambda path: Path(path).absolute()) if config.scheduler else Path
    out, corpus = Path(config.out), open_corpus(placed(config.corpus))
    check_apart(corpus, out)
    tokenizer = _tokenizer(placed(config.tokenizer))
    mark = _pair_mark(config, corpus, tokenizer)
    with (
        publish(out, "shards", ShardError, config) as folder,
        kept(out, "chunks", "chunks-*/[!.]*", ShardError) as work,
        _processes(config) as (each, workers),
    ):
        corpus.bounds(each)
        job = _job(config, corpus, tokenizer, mark, work)
        with listing(corpus, each):
            blocks, shares = _tokenise(job, each, workers)
        _check(blocks, config, corpus)
        places = list(dict.fromkeys(place for block in blocks for place in block.places))
        aside, pieces = _plan(job, blocks, places, config, each)
        written = each(partial(write_piece, aside, job.dtype), pieces)  # begins now; meanwhile the corpus is hashed
        identity = corpus.fingerprint(each)
        unigrams = sum(each(partial(counted, job.dtype, tokenizer.vocab_size), _groups(blocks)))
        sides, files = _written(written, blocks)
        for name in files:
            (aside / name).rename(folder / name)
        for side, unigram in zip(SIDES, unigrams, strict=True):
            np.save(folder / f"{side}.unigram.npy", unigram)
        index = write_shards_index(
            folder,
            tokenized(tokenizer),
            list(SIDECARS),
            sides,
            places,
            files,
            recorded={"corpus": config.corpus, "tokenizer": config.tokenizer, **_described(corpus, shares)},
            shuffle_seed=config.shuffle_seed,
            corpus=identity,
            split=corpus.split,
            **({"pair_mark": config.pair_mark} if mark is not None else {}),
        )
    for side, found in sides.items():
        print(f"{side}: {found['documents']:,} documents, {found['tokens']:,} tokens, {found['raw_bytes']:,} bytes")
    shares.show(corpus.meant)
    closing_line("shards", began)
    return index


def _described(corpus: Corpus | CleanedCorpus, shares: Shares) -> dict:
    """A description of the text, for a model card. It is not part of the set's identity: language and licence change
    no token."""
    sources = [source.model_dump(include={"name", "language", "licence"}) for source in corpus.recipe.sources]
    return {"name": corpus.recipe.name, "sources": sources, "shares": shares.counts}


def _tokenizer(folder: Path) -> Tokenizer:
    """The checked tokenizer. It stays open for the work that is done in this process."""
    opened.cache_clear()
    index = read_index(folder, TokenizerError, TOKENIZER_MADE_BY, stage="tokenizer")
    return opened(folder, index["fingerprint"])


@contextmanager
def _processes(config: ShardsConfig) -> Iterator[tuple[Each, int]]:
    """A function `each(work, items)` that yields the results in order, and the number of processes behind it."""
    if config.scheduler:
        with cluster(config.scheduler) as (executor, workers):
            yield partial(ordered, workers=workers, executor=executor), workers
    elif config.workers == 1:
        yield partial(ordered, workers=1), 1
    else:
        with processes(config.workers) as executor:
            yield partial(ordered, workers=config.workers, executor=executor), config.workers


def _pair_mark(config: ShardsConfig, corpus: Corpus | CleanedCorpus, tokenizer: Tokenizer) -> int | None:
    """The id of the mark of labelled pairs; None for a corpus without pairs."""
    if not corpus.recipe.paired:
        return None
    mark, source = config.pair_mark, corpus.recipe.paired[0]
    if mark not in tokenizer.special_tokens:
        raise TokenizerError(
            "labelled pairs need a mark in the vocabulary",
            f"source {source!r} has output_field:, and {tokenizer.folder} has no special token {mark}",
            f"make the tokenizer with special_tokens: [{mark}], or set pair_mark to one that it has",
        )
    return tokenizer.special_tokens[mark]


def _job(
    config: ShardsConfig, corpus: Corpus | CleanedCorpus, tokenizer: Tokenizer, mark: int | None, work: Path
) -> BuildJob:
    """The job that is sent to the processes. Finished chunks of other settings are deleted."""
    settings = {
        "format": FORMAT,
        "tokenizer": tokenizer.fingerprint,
        "heldout": corpus.bounds(),
        "pair_mark": mark,
        "sources": [source.model_dump(mode="json", exclude={"files"}) for source in corpus.recipe.sources],
        "numpy": np.__version__,
        "tokenizers": importlib.metadata.version("tokenizers"),
        "code": code("corpus", "tokenizer", "shards"),
    }
    folder = settled(work, "chunks", settings)
    dtype = dtype_of(tokenizer.vocab_size)
    return BuildJob(corpus, tokenizer.folder, tokenizer.fingerprint, dtype, folder, config.chunk_bytes, mark)


def _tokenise(job: BuildJob, each: Each, workers: int) -> tuple[list[ShardBlock], Shares]:
    """The blocks of the corpus, in order, and the documents and bytes of each source on each side."""
    blocks, skipped, shares = [], Skipped(), Shares()
    names = [source.name for source in job.corpus.recipe.sources]
    items: deque[tuple[int, int]] = deque()  # (source, bytes) of the items in progress
    with progress("tokenising", "documents", reads=job.corpus.stored) as advance:
        these = noted(items_of(job.corpus, job.chunk_bytes, workers), attrgetter("source", "stored"), items)
        for made in each(partial(tokenise, job), these):
            number, stored = items.popleft()
            source = names[number]
            for block in made:
                skipped.merge(block.skipped)
                advance(sum(side.documents for side in block.sides))
                for side, found in zip(SIDES, block.sides, strict=True):
                    shares.add(source, side, found.documents, found.raw_bytes)
            blocks += made
            advance(0, read=stored)
    if skipped:
        print(skipped.line())
    # Every file of a cleaned corpus has documents of all sources, and its index has the counts of each source.
    return blocks, job.corpus.shares if isinstance(job.corpus, CleanedCorpus) else shares


def _check(blocks: list[ShardBlock], config: ShardsConfig, corpus: Corpus | CleanedCorpus) -> None:
    """Raise CorpusError if a side of the corpus is empty."""
    counts = [sum(block.sides[number].documents for block in blocks) for number in range(len(SIDES))]
    for side, count in zip(SIDES, counts, strict=True):
        if not count:
            for block in blocks:
                block.path.unlink(missing_ok=True)  # another split needs other blocks
            raise CorpusError(
                f"the {side} side of the corpus is empty",
                f"{config.corpus} has {sum(counts):,} documents, heldout_fraction {corpus.recipe.heldout_fraction}",
                "add text, or choose another heldout_fraction or heldout_documents in the recipe",
            )


def _plan(
    job: BuildJob, blocks: list[ShardBlock], places: list[str], config: ShardsConfig, each: Each
) -> tuple[Path, Iterator[ShardPiece]]:
    """The work folder for the pieces of these settings, and the pieces of the output. Shuffling first makes runs."""
    numbers = {place: number for number, place in enumerate(places)}
    files = [np.array([numbers[place] for place in block.places], np.uint32) for block in blocks]
    seed, sides = config.shuffle_seed, range(len(SIDES))
    decided = [job.folder.name, [block.path.name for block in blocks], seed]
    if seed is None:
        pieces = (pieces_of(side, blocks, files, config.piece_tokens) for side in sides)
    else:
        folder = settled(job.folder.parent, "runs", decided)
        runs: list[ShardBlock] = []
        with progress("shuffling", unit="runs") as advance:
            for run in each(partial(make_run, seed, job.dtype), runs_of(folder, blocks, files)):
                runs.append(run)
                advance(1)
        pieces = (shuffled_pieces(side, tuple(runs), config.piece_tokens) for side in sides)
    return settled(job.folder.parent, "pieces", [decided, config.piece_tokens]), chain.from_iterable(pieces)


def _groups(blocks: list[ShardBlock]) -> Iterator[list[ShardBlock]]:
    return (blocks[first : first + COUNTED] for first in range(0, len(blocks), COUNTED))


def _written(pieces: Iterator[Written], blocks: list[ShardBlock]) -> tuple[dict[str, dict], dict[str, dict]]:
    """The entry of each side in the index, and the digest of each file."""
    sides = {
        side: {"pieces": [], **vars(reduce(add, (block.sides[number] for block in blocks)))}
        for number, side in enumerate(SIDES)
    }
    files: dict[str, dict] = {}
    with progress("writing", unit="pieces") as advance:
        for written in pieces:
            sides[written.side]["pieces"].append(written.name)
            files |= written.files
            advance(1)
    return sides, files
