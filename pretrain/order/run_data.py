"""What a run reads: one corpus or several, opened and checked, and how much of each the run will use."""

import difflib
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from pretrain.config import Config, free
from pretrain.errors import ConfigError, ShardError
from pretrain.order.order import CORPUS_BIT, VERSION, Order
from pretrain.order.packed import BLOCK_WINDOWS, LEAST_WINDOWS, MOST_WINDOWS, PackedWindows
from pretrain.order.phases import MOST_STEPS, Phase, Weight, check_weights
from pretrain.order.stream import Windows
from pretrain.shards import Shards, check_tokenizer
from pretrain.tokenizer import Tokenizer


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


def mixed(phases: list[Phase], data: DataConfig) -> list[Phase]:
    """The phases with their mixtures written out in lowest terms; None stays where there is one unnamed corpus.

    Raises ValueError naming both settings when the mixtures and the corpora do not fit.
    """
    if not data.corpora:
        if any(phase.mixture for phase in phases):
            raise ValueError("phases: mixture names corpora, but data.shards is one without a name: use data.corpora")
        return phases
    names = [corpus.name for corpus in data.corpora]
    common = {corpus.name: corpus.weight for corpus in data.corpora if corpus.weight}
    found = []
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


def check_phases(phases: list[Phase], data: DataConfig) -> None:
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


def block_tokens_of(data: DataConfig, phases: list[Phase]) -> int:
    """`data.block_tokens`, or what stands for it where it is not given."""
    return data.block_tokens or phases[0].seq_len * (1 if data.windows == "stream" else BLOCK_WINDOWS)


@dataclass(frozen=True)
class Corpus:
    """One opened set. The name is empty where there is one corpus without a name."""

    name: str
    folder: str
    max_epochs: float | None
    tokenizer: Tokenizer  # they were made with
    train: Shards
    heldout: Shards


def open_corpora(data: DataConfig, tokenizer: Tokenizer) -> list[Corpus]:
    """Every corpus of a run. Raises ShardError unless all are intact, different, and made with `tokenizer`."""
    configured = data.corpora or [CorpusConfig.model_construct(name="", shards=data.shards, max_epochs=None)]
    found: list[Corpus] = []
    for corpus in configured:
        train, heldout = Shards(corpus.shards, "train", data.checksums), Shards(corpus.shards, "heldout")
        for other in found:
            if train.index["tokenizer"] != other.train.index["tokenizer"]:
                raise ShardError(
                    f"the corpora {other.name} and {corpus.name} were built with different tokenizers",
                    *(
                        f"{it.folder} says {it.index['tokenizer'][:12]}…, {tokenizer.folder} is "
                        f"{tokenizer.fingerprint[:12]}…"
                        for it in (other.train, train)
                    ),
                    "rebuild one of them with the tokenizer of the other",
                )
            if train.fingerprint == other.train.fingerprint:
                raise ShardError(
                    f"the corpora {other.name} and {corpus.name} are the same shards",
                    f"{other.folder} and {corpus.shards} are both {train.fingerprint[:12]}…",
                    "name it once, with the weight of both",
                )
        found.append(Corpus(corpus.name, corpus.shards, corpus.max_epochs, tokenizer, train, heldout))
    for corpus in found:
        check_tokenizer(corpus.train.index, corpus.folder, tokenizer)
    return found


def identity(corpora: list[Corpus], plan: Order) -> dict:
    """The part of a checkpoint's index about the data of its run: `shards`, or `corpora` where these have names; the
    version of the `order`; and `words`, by name, where the objective masks whole ones."""
    words = {name: windows.word_starts.fingerprint for name, windows in plan.corpora.items() if windows.word_starts}
    named = {"corpora": [[corpus.name, corpus.train.fingerprint] for corpus in corpora]}
    found = named if corpora[0].name else {"shards": corpora[0].train.fingerprint}
    return found | {"order": VERSION} | ({"words": words} if words else {})


def conflicts(index: dict, begun: list[Phase], corpora: list[Corpus], plan: Order) -> list[str]:
    """Lines `what: old, new` for each corpus that the phases `begun` of a checkpoint with this `index` have drawn from
    and that is not what and where it was. Others may come, go and change behind them."""
    old = index.get("corpora") or [["", index["shards"]]]
    drawn = [name for phase in begun for name in phase.mixture or {"": 1}]
    lines = []
    shorter = [phase.seq_len for phase in begun if phase.seq_len < plan.block_tokens]
    if shorter and index.get("order", 1) != VERSION:
        lines.append(
            f"order: this run began with version {index.get('order', 1)} of the order of windows, this program has "
            f"version {VERSION}, which reads windows of {shorter[0]} out of blocks of {plan.block_tokens} otherwise: "
            "finish the run with the program that began it, or begin a new one from its checkpoint with branch_from"
        )
    for number, (name, shards) in enumerate(old):
        if name and name not in drawn:
            continue
        new = corpora[number] if number < len(corpora) else None
        if new is None or name not in ("", new.name):
            what = (
                f"data.corpora.{number}: this run has drawn from {name}, found {new.name if new else 'nothing'} there"
            )
            lines.append(f"{what}; a corpus keeps its place in the list")
            continue
        words = plan.corpora[new.name].word_starts
        for what, was, now in (
            ("shards", shards, new.train.fingerprint),
            ("words", index.get("words", {}).get(name), words and words.fingerprint),
        ):
            if was and now and was != now:
                of = f"data.corpora.{number}, {name}, {what}" if name else what
                lines.append(f"{of}: this run began with {was[:12]}…, {new.folder} is {now[:12]}…")
    return lines


def check_sizes(corpora: list[Corpus], block_tokens: int, longest: int) -> None:
    """Raise ShardError unless the training side fills at least one block, and the held-out side one window."""
    for corpus in corpora:
        for side, need, what, key, remedy in (
            (corpus.train, block_tokens, "block", "data.block_tokens", "lower data.block_tokens"),
            (corpus.heldout, longest, "window", "phases: seq_len", "hold out a larger fraction"),
        ):
            if side.tokens < need:
                raise ShardError(
                    f"the {side.side} side is shorter than one {what}",
                    f"{corpus.folder} has {side.tokens:,} {side.side} tokens, {key} = {need:,}",
                    f"add text, {remedy}, or train with shorter windows",
                )


def order(data: DataConfig, corpora: list[Corpus], phases: list[Phase], seed: int, words: bool) -> Order:
    """The order of a run whose mixtures are written out. `words`: it also says where words begin."""
    kind, block_tokens = Windows if data.windows == "stream" else PackedWindows, block_tokens_of(data, phases)
    if words:
        from pretrain.shards.words import open_words
    windows = {}
    for number, corpus in enumerate(corpora):
        begins = open_words(corpus.train, corpus.tokenizer) if words else None
        windows[corpus.name] = kind(corpus.train, block_tokens, seed, begins, number)
    return Order(windows, phases)


def check_epochs(corpora: list[Corpus], plan: Order) -> None:
    """Raise ConfigError when the run would go through a corpus more often than its max_epochs."""
    drawn = np.array([plan.drawn(number) for number in range(len(plan.phases))])  # (phases, C)
    total = int(drawn.sum())
    lines = []
    for number, (corpus, epochs) in enumerate(zip(corpora, plan.epochs().tolist(), strict=True)):
        if corpus.max_epochs is not None and epochs > corpus.max_epochs:
            taken, most = int(drawn[:, number].sum()), math.floor(corpus.max_epochs * corpus.train.tokens)
            lines += [
                f"data.corpora.{number}, {corpus.name}: {taken:,} of the run's {total:,} tokens, from "
                f"{corpus.train.tokens:,}: {epochs:.3g} epochs, max_epochs = {corpus.max_epochs:g}",
                f"its part of the run is {taken / total:.1%} and may be at most {most / total:.1%}, {most:,} tokens",
            ]
    if lines:
        remedy = "lower its weight, run fewer steps, add text, or raise max_epochs"
        raise ConfigError("a corpus would be seen too often", *lines, remedy)


def plan_lines(plan: Order) -> list[str]:
    """An aligned table of the tokens that the run will draw from every corpus, in each phase and in all.

    The last columns: how many windows of a step are from the corpus, and from how many places (blocks) of it.
    """
    names = [name or "train" for name in plan.names]
    tokens = [windows.shards.tokens for windows in plan.windows]
    usable = np.array([windows.blocks * windows.block_tokens for windows in plan.windows])
    drawn = np.array([plan.drawn(number) for number in range(len(plan.phases))])  # (phases, C)
    padding = np.array([plan.padding(number) for number in range(len(plan.phases))])
    packed = ("padding",) if padding.any() else ()
    places = [plan.places(number) for number in range(len(plan.phases))]
    rows = [("corpus", "tokens", "phase", "part", "drawn", "epochs", "windows/step", "places/step", *packed)]
    for number, name in enumerate(names):
        for phase in range(len(plan.phases)):
            if drawn[phase, number]:
                part, epochs = drawn[phase, number] / drawn[phase].sum(), drawn[phase, number] / usable[number]
                what = (name, f"{tokens[number]:,}", f"{phase}", f"{part:.1%}")
                free = (f"{padding[phase, number]:.1%}",) if packed else ()
                step = (f"{found[number]:,}" for found in places[phase])
                rows.append((*what, f"{drawn[phase, number]:,}", f"{epochs:.2f}", *step, *free))
        if len(plan.phases) > 1:
            part, epochs = drawn[:, number].sum() / drawn.sum(), drawn[:, number].sum() / usable[number]
            what = (name, f"{tokens[number]:,}", "all", f"{part:.1%}")
            rows.append((*what, f"{drawn[:, number].sum():,}", f"{epochs:.2f}", "", "", *("" for _ in packed)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(w) if at == 0 else cell.rjust(w) for at, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def unigram(sides: list[Shards], weights: tuple[int, ...]) -> np.ndarray:
    """(V,) how often each id occurs in a mixture of `sides`; of one side its int64 counts, as they are."""
    if len(sides) == 1:
        return sides[0].unigram()
    scale = sum(side.tokens for side in sides) / sum(weights)
    return sum(weight * scale * (side.unigram() / side.tokens) for side, weight in zip(sides, weights, strict=True))
