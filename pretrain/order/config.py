"""The section `data` of a run's configuration, and how it fits the phases."""

import difflib
import math
from collections.abc import Sequence
from typing import Literal, TypeVar

from pydantic import Field, model_validator

from pretrain.config import Config, free
from pretrain.order.order import CORPUS_BIT
from pretrain.order.packed import BLOCK_WINDOWS, LEAST_WINDOWS, MOST_WINDOWS
from pretrain.order.phases import MOST_STEPS, Phase, Weight, check_weights

P = TypeVar("P", bound=Phase)


class CorpusConfig(Config):
    name: str = Field(pattern=r"^\w[\w.-]*$")  # in phases: mixture, in reports and in TensorBoard
    shards: str  # a folder of the shards stage
    # Its part of the tokens where a phase names no mixture, as a whole number beside those of the others: 7 and 3.
    # None: only phases that name it draw from it.
    weight: Weight | None = None
    max_epochs: float | None = Field(None, gt=0)  # a run that would see it more often does not start


class DataConfig(Config):
    shards: str | None = free(None)  # a folder of the shards stage; another place is fine, other contents are not
    # Several sets instead, made with one tokenizer. A run may go on with more of them, behind these, for later phases.
    corpora: list[CorpusConfig] = free([])
    tokenizer: str = free()  # the folder they were built with
    # What a window is: a stretch of the stream of documents, cut wherever it ends; or whole documents, packed by best
    # fit, and only those cut that are longer than a window.
    windows: Literal["stream", "documents"] = "stream"
    # An epoch reads every block of so many tokens once, and windows are cut out of it or packed from it: a multiple
    # of every seq_len, of phases appended later too, since it is fixed when a run begins. None: the first phase's
    # seq_len, or with windows of documents 64 of it. These need 16 of the longest seq_len or more; with less than 64,
    # documents that would fit are cut where a block ends.
    block_tokens: int | None = Field(None, gt=0, le=2**40)
    workers: int = free(0, ge=0)  # processes that compute batches ahead
    prefetch: int = free(4, gt=0)  # micro-batches each of them computes ahead
    # While a micro-batch is made, have the system read the next: on a slow disk or a network's, for 1 to 2 µs a window.
    read_ahead: bool = free(False)
    checksums: bool = free(False)  # hash every byte of the shards before the first step, however many they are

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
    """The phases with their mixtures written out in lowest terms; None stays where there is one unnamed corpus.

    Raises ValueError naming both settings when the mixtures and the corpora do not fit.
    """
    if not data.corpora:
        if any(phase.mixture for phase in phases):
            raise ValueError("phases: mixture names corpora, but data.shards is one without a name: use data.corpora")
        return phases
    names = [corpus.name for corpus in data.corpora]
    common = {corpus.name: corpus.weight for corpus in data.corpora if corpus.weight}
    found: list[P] = []
    for number, phase in enumerate(phases):
        mixture = phase.mixture or common
        if not mixture:
            raise ValueError(f"phases.{number} has no mixture, and no corpus of data.corpora has a weight")
        check_weights("data.corpora: weight", mixture)
        for name in set(mixture) - set(names):
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
            remedy = f"did you mean {near[0]}?" if near else f"known: {', '.join(names)}"
            raise ValueError(f"phases: mixture has {name!r}, which is no name in data.corpora: {remedy}")
        divisor = math.gcd(*mixture.values())
        lowest = {name: mixture[name] // divisor for name in names if name in mixture}
        found.append(phase.model_copy(update={"mixture": lowest}))
    unused = set(names).difference(*(phase.mixture for phase in found))
    if unused:
        name = next(name for name in names if name in unused)
        raise ValueError(f"data.corpora: nothing draws from {name!r}: give it a weight, or name it in phases: mixture")
    return found


def check_phases(phases: Sequence[Phase], data: DataConfig) -> None:
    """Raise ValueError naming both settings unless mixtures and windows of the phases fit what is read."""
    mixed(phases, data)
    total = sum(phase.steps * phase.batch_tokens for phase in phases)
    steps = sum(phase.steps for phase in phases)
    if steps >= MOST_STEPS:
        raise ValueError(f"phases: {steps:,} steps in all, and a run has less than {MOST_STEPS:,}")
    if total >= 1 << CORPUS_BIT:
        raise ValueError(f"phases: {total:,} tokens in all, the most is {1 << CORPUS_BIT:,}")
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
    """`data.block_tokens`, or what stands for it where it is not given."""
    return data.block_tokens or phases[0].seq_len * (1 if data.windows == "stream" else BLOCK_WINDOWS)
