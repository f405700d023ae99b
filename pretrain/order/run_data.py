"""The data of a run: its corpora, opened and checked, and the order in which its steps read them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pretrain.display.tables import aligned
from pretrain.errors import ConfigError, ShardError
from pretrain.order import branch
from pretrain.order.branch import Skips
from pretrain.order.config import CorpusConfig, DataConfig, block_tokens_of
from pretrain.order.order import VERSION, Order
from pretrain.order.packed import PackedWindows
from pretrain.order.phases import Phase, Position, locate
from pretrain.order.stream import Windows
from pretrain.shards import Shards, check_tokenizer
from pretrain.tokenizer import Tokenizer


@dataclass(frozen=True)
class RunCorpus:
    """One opened set of shards. The name is empty if the run has one unnamed corpus."""

    name: str
    folder: str
    max_epochs: float | None
    train: Shards
    heldout: Shards


@dataclass(frozen=True)
class RunData:
    """The corpora of a run, and the order in which its steps read them."""

    corpora: list[RunCorpus]
    order: Order  # its phases are longer than the run's by the number of skipped steps
    phases: Sequence[Phase]  # the run's phases, with every mixture written out
    skips: Skips = ()

    def position(self, step: int) -> Position:
        """The position in the order of the data that `step` (0-based) of the run reads."""
        return locate(branch.reads(step, self.phases, self.skips), self.order.phases)

    def check_unchanged(self) -> None:
        """Raise ShardError, naming the file, if a corpus has changed since it was opened."""
        for windows in self.order.windows:
            windows.check_unchanged()

    def identity(self) -> dict:
        """The entries about data in the index of a checkpoint.

        They are `shards`, or `corpora` if the corpora have names; the version of the `order`; and, if the objective
        masks whole words, the fingerprints of `words` by the name of the corpus.
        """
        starts = {name: windows.word_starts for name, windows in self.order.corpora.items()}
        words = {name: found.fingerprint for name, found in starts.items() if found}
        named = {"corpora": [[corpus.name, corpus.train.fingerprint] for corpus in self.corpora]}
        found = named if self.corpora[0].name else {"shards": self.corpora[0].train.fingerprint}
        return found | {"order": VERSION} | ({"words": words} if words else {})

    def conflicts(self, index: dict, begun: Sequence[Phase]) -> list[str]:
        """Lines that say how the corpora differ from the corpora of a checkpoint with this `index`.

        Only corpora that its phases `begun` have read are compared. Other corpora may come, go and change.
        """
        old = index.get("corpora") or [["", index["shards"]]]
        drawn = [name for phase in begun for name in phase.mixture or {"": 1}]
        lines = []
        shorter = [phase.seq_len for phase in begun if phase.seq_len < self.order.block_tokens]
        if shorter and index.get("order", 1) != VERSION:
            lines.append(
                f"order: this run began with version {index.get('order', 1)} of the order of windows, and this program "
                f"has version {VERSION}, which reads windows of {shorter[0]} tokens from blocks of "
                f"{self.order.block_tokens} in another order: finish the run with the program that began it, or begin "
                "a new run from its checkpoint with branch_from"
            )
        for number, (name, shards) in enumerate(old):
            if name and name not in drawn:
                continue
            new = self.corpora[number] if number < len(self.corpora) else None
            if new is None or name not in ("", new.name):
                there = f"found {new.name if new else 'nothing'} there"
                what = f"data.corpora.{number}: this run has read {name}, {there}"
                lines.append(f"{what}; put each corpus back at its place in the list")
                continue
            words = self.order.corpora[new.name].word_starts
            for what, was, now in (
                ("shards", shards, new.train.fingerprint),
                ("words", index.get("words", {}).get(name), words and words.fingerprint),
            ):
                if was and now and was != now:
                    of = f"data.corpora.{number}, {name}, {what}" if name else what
                    lines.append(f"{of}: this run began with {was[:12]}…, {new.folder} has {now[:12]}…")
        return lines

    def check_epochs(self) -> None:
        """Raise ConfigError if the run would read a corpus more often than its max_epochs."""
        drawn = np.array([self.order.drawn(number) for number in range(len(self.order.phases))])  # (phases, C)
        total = int(drawn.sum())
        lines = []
        for number, (corpus, epochs) in enumerate(zip(self.corpora, self.order.epochs().tolist(), strict=True)):
            if corpus.max_epochs is not None and epochs > corpus.max_epochs:
                taken, most = int(drawn[:, number].sum()), math.floor(corpus.max_epochs * corpus.train.tokens)
                part, limit = f"its share of the run is {taken / total:.1%}", f"{most / total:.1%}, {most:,} tokens"
                lines += [
                    f"data.corpora.{number}, {corpus.name}: {taken:,} of the run's {total:,} tokens, from "
                    f"{corpus.train.tokens:,}: {epochs:.3g} epochs, max_epochs = {corpus.max_epochs:g}",
                    f"{part} and may be at most {limit}",
                ]
        if lines:
            remedy = "lower its weight, run fewer steps, add text, or raise max_epochs"
            raise ConfigError("a corpus would be seen too often", *lines, remedy)

    def table(self) -> list[str]:
        """An aligned table of the tokens that the run will draw from every corpus, in each phase and in total.

        The column `windows/step` has the number of a step's windows that come from the corpus. The column `places/step`
        has the number of places (blocks) of the corpus that these windows come from.
        """
        order, phases = self.order, range(len(self.order.phases))
        names = [name or "train" for name in order.names]
        tokens = [windows.shards.tokens for windows in order.windows]
        usable = np.array([windows.blocks * windows.block_tokens for windows in order.windows])
        drawn = np.array([order.drawn(phase) for phase in phases])  # (phases, C)
        padding = np.array([order.padding(phase) for phase in phases])
        packed = ("padding",) if padding.any() else ()
        places = [order.places(phase) for phase in phases]
        rows = [("corpus", "tokens", "phase", "part", "drawn", "epochs", "windows/step", "places/step", *packed)]
        for number, name in enumerate(names):
            for phase in phases:
                if drawn[phase, number]:
                    part, epochs = drawn[phase, number] / drawn[phase].sum(), drawn[phase, number] / usable[number]
                    head = (name, f"{tokens[number]:,}", f"{phase}", f"{part:.1%}")
                    free = (f"{padding[phase, number]:.1%}",) if packed else ()
                    step = (f"{found[number]:,}" for found in places[phase])
                    rows.append((*head, f"{drawn[phase, number]:,}", f"{epochs:.2f}", *step, *free))
            if len(phases) > 1:
                part, epochs = drawn[:, number].sum() / drawn.sum(), drawn[:, number].sum() / usable[number]
                head = (name, f"{tokens[number]:,}", "all", f"{part:.1%}")
                rows.append((*head, f"{drawn[:, number].sum():,}", f"{epochs:.2f}", "", "", *("" for _ in packed)))
        return aligned(rows)

    def unigram(self) -> np.ndarray:
        """(V,) the counts of each id in the mixture of the first phase: int64 for one corpus, else float64."""
        sides = [corpus.train for corpus in self.corpora]
        weights = self.phases[0].weights([corpus.name for corpus in self.corpora])
        if len(sides) == 1:
            return sides[0].unigram()
        scale = sum(side.tokens for side in sides) / sum(weights)
        parts = [weight * scale * (side.unigram() / side.tokens) for side, weight in zip(sides, weights, strict=True)]
        return sum(parts[1:], parts[0])


def open_run_data(
    data: DataConfig, phases: Sequence[Phase], seed: int, tokenizer: Tokenizer, skips: Skips = (), words: bool = False
) -> RunData:
    """Open the corpora of a run, with `words` also the files that say where words begin.

    The mixtures of `phases` must be written out. Raises ShardError unless all corpora are intact, different, built
    with `tokenizer`, and long enough.
    """
    corpora = _open_corpora(data, tokenizer)
    block_tokens = block_tokens_of(data, phases)
    _check_sizes(corpora, block_tokens, max(phase.seq_len for phase in phases))
    if words:
        from pretrain.shards.word_starts import open_words
    kind, windows = Windows if data.windows == "stream" else PackedWindows, {}
    for number, corpus in enumerate(corpora):
        begins = open_words(corpus.train, tokenizer) if words else None
        windows[corpus.name] = kind(corpus.train, block_tokens, seed, begins, number)
    return RunData(corpora, Order(windows, branch.reading(phases, skips)), phases, skips)


def _open_corpora(data: DataConfig, tokenizer: Tokenizer) -> list[RunCorpus]:
    """Open every corpus. Raises ShardError unless all are intact, different, and built with `tokenizer`."""
    configured = data.corpora
    if data.shards is not None:
        configured = [CorpusConfig.model_construct(name="", shards=data.shards, max_epochs=None)]
    found: list[RunCorpus] = []
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
                    "list it once, with the sum of both weights",
                )
        found.append(RunCorpus(corpus.name, corpus.shards, corpus.max_epochs, train, heldout))
    for opened in found:
        check_tokenizer(opened.train.index, opened.folder, tokenizer)
    return found


def _check_sizes(corpora: list[RunCorpus], block_tokens: int, longest: int) -> None:
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
