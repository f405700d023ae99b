"""The section `data` of a run's configuration, and the checks that it fits the phases."""

import difflib
import math
from collections.abc import Sequence
from typing import Literal, TypeVar

from pydantic import Field, model_validator

from pretrain.config import Config, free
from pretrain.order.order import CORPUS_BIT
from pretrain.order.packed import BLOCK_WINDOWS, LEAST_WINDOWS, MOST_WINDOWS
from pretrain.order.phases import MOST_STEPS, Phase, check_weights

P = TypeVar("P", bound=Phase)


class CorpusConfig(Config):
    """One of several corpora."""

    name: str = Field(pattern=r"^\w[\w.-]*$")
    """The name of the corpus in `phases: mixture`, in reports and in TensorBoard."""
    shards: str
    """A folder that the shards stage made."""
    weight: int | None = Field(None, ge=0)
    """The share of the corpus in every phase without a mixture, relative to the other weights: 7 and 3 give 70 % and
    30 % of the tokens. A corpus without a weight is read only in phases that name it in their mixture. With weight 0 it
    need not be read at all: its held-out text is scored."""
    max_epochs: float | None = Field(None, gt=0)
    """The most epochs of this corpus that a run may read. A run that would read more does not start."""


class DataConfig(Config):
    """The text that a run reads, and how windows are cut from it."""

    shards: str | None = free(None)
    """A folder that the shards stage made, if the run reads one corpus. A resumed run may find it in another place,
    but its contents must be the same."""
    corpora: list[CorpusConfig] = free([])
    """Several corpora instead of `shards`, all built with one tokenizer. A resumed run may append corpora for later
    phases to this list."""
    tokenizer: str = free()
    """The folder of the tokenizer that the shards were built with."""
    windows: Literal["stream", "documents"] = "stream"
    """How windows are filled: `stream` cuts the stream of documents every `seq_len` tokens; `documents` packs whole
    documents by best fit and cuts only documents that are longer than a window."""
    block_tokens: int | None = Field(None, gt=0, le=2**40)
    """The tokens of a block: an epoch reads every block once, and windows are cut out of blocks or packed from them. It
    must be a multiple of every `seq_len`, also of phases that are appended later. By default it is the first phase's
    `seq_len`, or 64 times that length with `windows: documents`. Packing needs at least 16 times the longest `seq_len`;
    with fewer than 64 times, the ends of blocks cut documents that would fit into a window."""
    workers: int = free(0, ge=0)
    """The processes that compute batches ahead; 0: the training process itself, but with a GPU at least one process."""
    prefetch: int = free(4, gt=0)
    """The micro-batches that each worker computes ahead."""
    read_ahead: bool = free(False)
    """Ask the system to read the next micro-batch from the disk while this one is made. It helps on a slow disk or a
    network disk and costs 1 to 2 µs a window."""
    checksums: bool = free(False)
    """Compare the digest of every byte of the shards with the index before the first step."""

    @model_validator(mode="after")
    def _one_way(self) -> "DataConfig":
        if (self.shards is None) == (not self.corpora):
            found = "both are given" if self.corpora else "neither is given"
            raise ValueError(f"data.shards (one corpus) or data.corpora (several) says what to read: {found}")
        names = [corpus.name for corpus in self.corpora]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"data.corpora: two corpora are named {twice[0]!r}")
        return self


def mixed(phases: Sequence[P], data: DataConfig) -> Sequence[P]:
    """The phases with their mixtures written out in lowest terms. With one unnamed corpus the mixtures stay None.

    Raises ValueError naming both settings if a mixture does not fit the corpora.
    """
    if not data.corpora:
        if any(phase.mixture for phase in phases):
            raise ValueError("phases: mixture names corpora, but data.shards has no name: use data.corpora")
        return phases
    names = [corpus.name for corpus in data.corpora]
    common = {corpus.name: corpus.weight for corpus in data.corpora if corpus.weight}
    found: list[P] = []
    for number, phase in enumerate(phases):
        mixture = phase.mixture or common
        if not mixture:
            raise ValueError(
                f"phases.{number} has no mixture, and no corpus of data.corpora has a weight: add a mixture or weights"
            )
        check_weights("data.corpora: weight", mixture)
        for name in set(mixture) - set(names):
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
            remedy = f"did you mean {near[0]}?" if near else f"known: {', '.join(names)}"
            raise ValueError(f"phases: mixture has {name!r}, which is no name in data.corpora: {remedy}")
        divisor = math.gcd(*mixture.values())
        lowest = {name: mixture[name] // divisor for name in names if name in mixture}
        found.append(phase.model_copy(update={"mixture": lowest}))
    only_scored = {corpus.name for corpus in data.corpora if corpus.weight == 0}
    unused = set(names).difference(only_scored, *(phase.mixture or {} for phase in found))
    if unused:
        name = next(name for name in names if name in unused)
        remedy = "give it a weight, or name it in phases: mixture; with weight 0 it is only scored"
        raise ValueError(f"data.corpora: nothing draws from {name!r}: {remedy}")
    return found


def check_phases(phases: Sequence[Phase], data: DataConfig) -> None:
    """Raise ValueError naming both settings unless the mixtures and windows of the phases fit the data."""
    mixed(phases, data)
    total = sum(phase.steps * phase.batch_tokens for phase in phases)
    steps = sum(phase.steps for phase in phases)
    if steps >= MOST_STEPS:
        raise ValueError(f"phases: {steps:,} steps in all, and a run must have fewer than {MOST_STEPS:,}")
    if total >= 1 << CORPUS_BIT:
        raise ValueError(f"phases: {total:,} tokens in all, and a run must have fewer than {1 << CORPUS_BIT:,}")
    block_tokens = block_tokens_of(data, phases)
    for phase in phases:
        if block_tokens % phase.seq_len:
            of = "" if data.windows == "stream" else f"{BLOCK_WINDOWS} of "
            raise ValueError(
                f"data.block_tokens = {block_tokens} is not a multiple of phases: seq_len = {phase.seq_len} "
                f"(it is fixed when a run begins; by default it is {of}the first phase's seq_len)"
            )
        windows = block_tokens // phase.seq_len
        if data.windows == "documents" and not LEAST_WINDOWS <= windows <= MOST_WINDOWS:
            lengths = [phase.seq_len for phase in phases]
            common = math.lcm(*lengths)
            good = -(-BLOCK_WINDOWS * max(lengths) // common) * common
            raise ValueError(
                f"data.block_tokens = {block_tokens} has space for {windows} windows of phases: "
                f"seq_len = {phase.seq_len}, and data.windows = documents packs {LEAST_WINDOWS} to {MOST_WINDOWS} "
                f"together: set it to {good} (it is fixed when a run begins)"
            )


def block_tokens_of(data: DataConfig, phases: Sequence[Phase]) -> int:
    """`data.block_tokens`, or its default."""
    return data.block_tokens or phases[0].seq_len * (1 if data.windows == "stream" else BLOCK_WINDOWS)
