"""Span corruption: an encoder reads text in which spans are missing, and a decoder writes the spans."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from pydantic import Field

from pretrain.errors import ConfigError
from pretrain.hashing import FIRST, REPLACE, SPAN
from pretrain.objectives import masking
from pretrain.objectives.batch import Batch, joined
from pretrain.objectives.masked_lm import special_ids
from pretrain.objectives.objective import Ask, Objective, ObjectiveConfig
from pretrain.order.rows import Rows
from pretrain.tokenizer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

NOBODY = -1  # the number of the document of places without text
NO_TOKEN = -1  # the id of a mark that the vocabulary does not have


class SpanCorruptionConfig(ObjectiveConfig):
    """Span corruption, the objective of T5."""

    kind: Literal["span_corruption"]
    """The name of the objective."""
    noise_ratio: float = Field(0.15, gt=0, lt=1)
    """The share of a window's tokens that are in missing spans."""
    mean_span: float = Field(3.0, ge=1)
    """The mean number of tokens of a missing span."""
    targets: Literal["all", "text"] = "all"
    """all: the decoder learns to write the sentinels and the end mark, too; text: only the tokens of the spans."""
    sentinel_mark: str = "<extra_id_{}>"
    """The special tokens that stand for missing spans, with a number from 0 on in place of the braces."""
    pair_mark: str = "<output>"
    """The special token between the input and the output of a labelled pair: `pair_mark` of the shards. A tokenizer
    without the default has no pairs."""
    target_tokens: int | None = Field(None, gt=0)
    """The most tokens that the decoder writes of a window; null: N + 2S + 2 for N missing tokens in S spans, or as many
    as a window has if the tokenizer has `pair_mark`. Tokens that do not fit are left out: the ends of long outputs, and
    the last documents of a window."""


@dataclass(frozen=True)
class SpanBatch(Batch):
    """A batch for an encoder, which reads `inputs` (B, S), and a decoder, which writes `targets` (B, K).

    `segments` and `position_ids` are those of the encoder.
    """

    places: Any  # (B, S): the place in the window of each token that the encoder reads; T: there is none
    written: Any  # (B, K): the tokens that the decoder is given: the target before each
    written_segments: Any  # (B, K): the number of each token's document
    written_positions: Any  # (B, K): the position of each token in what is written of its document


class PairPlaces(NamedTuple):
    """The places of labelled pairs in windows, each (B, T) bool."""

    inside: np.ndarray  # all of them
    marks: np.ndarray  # the mark of each pair
    unread: np.ndarray  # those that the encoder does not read
    outputs: np.ndarray  # those that the decoder writes


class SpanCorruption(Objective):
    """Write the spans that are missing in a text (Raffel et al. 2019, arXiv:1910.10683, section 3.1.4).

    N = round(noise_ratio · T) places of a window are cut into S = round(N / mean_span) spans, and the others into S
    stretches between them, each cut drawn evenly, as in T5. The whole pattern is then turned by a random number of
    places, so that every token is missing with the same probability. Special tokens never are, and a span that reaches
    into the next document is two spans. In the encoder's text a sentinel stands for each span; the sentinels of a
    document count from 0. The decoder writes each sentinel and its span, and the end mark after the last of a document.

    An encoder reads at most T - N + 2S tokens of a window and a decoder writes at most N + 2S + 2, so that all batches
    have one shape. More are needed only where a window holds many short documents; the rest of it is then left out.

    A document with `pair_mark` is a labelled pair, `input mark output end`. Nothing of it is missing: the encoder reads
    the input and the end mark, and the decoder writes the output and the end mark. With this mark in the vocabulary an
    encoder reads up to T tokens and a decoder writes up to T, or `target_tokens`.

    A window may cut a pair. A part that has the mark but not the beginning of the input is left out, because its output
    would be learnt from half of an input. A part without the mark cannot be told from text, and is corrupted like text.
    Windows of whole documents (`data.windows: documents`) cut few pairs that fit into a window.
    """

    Config = SpanCorruptionConfig
    composition = "encoder_decoder"
    causal = False
    asked = "the tokens of missing spans, 15 % of the text, and the outputs of labelled pairs if it has any"

    def __init__(
        self, config: SpanCorruptionConfig, specials: dict[str, int], vocab_size: int, seq_len: int, seed: int
    ):
        super().__init__(config, specials, vocab_size, seq_len, seed)
        self.seed, self.pad = seed, specials["pad"]
        self.end = specials["eod" if "eod" in specials else "sep"]
        self.noise = min(max(1, round(config.noise_ratio * seq_len)), seq_len - 1)
        self.spans = min(max(1, round(self.noise / config.mean_span)), self.noise, seq_len - self.noise)
        self.read = min(seq_len, seq_len - self.noise + 2 * self.spans)
        self.targets = self.noise + 2 * self.spans + 2
        if config.pair_mark not in specials and config.pair_mark != type(config).model_fields["pair_mark"].default:
            raise ConfigError(
                "objective span_corruption has no mark for labelled pairs",
                f"objective.pair_mark = {config.pair_mark} is no special token of this tokenizer",
                "name the pair_mark that the shards were built with, or remove the key if they have no pairs",
            )
        self.pair_mark = specials.get(config.pair_mark, NO_TOKEN)
        if self.pair_mark != NO_TOKEN:
            self.read, self.targets = seq_len, max(seq_len, self.targets)
        self.targets = config.target_tokens or self.targets
        self.special = special_ids(specials, vocab_size)
        names = [config.sentinel_mark.replace("{}", str(number)) for number in range(self.spans + 1)]
        missing = [name for name in names if name not in specials]
        if missing:
            raise ConfigError(
                "objective span_corruption needs more sentinels in the vocabulary",
                f"a window of {seq_len} tokens has up to {len(names)} missing spans; the tokenizer has no {missing[0]}",
                f"make it with sentinels={max(100, len(names))}, or name its special tokens in objective.sentinel_mark",
            )
        self.sentinels = np.array([specials[name] for name in names], np.int32)

    @classmethod
    def heldout(cls, config: SpanCorruptionConfig) -> SpanCorruptionConfig:
        """15 % of the text in spans of 3 tokens, and outputs.

        Sentinels and end marks are not scored: they do not depend on the text.
        """
        marks = {"sentinel_mark": config.sentinel_mark, "pair_mark": config.pair_mark}
        return SpanCorruptionConfig(kind=config.kind, targets="text", **marks)

    def batch(self, rows: Rows, keys: np.ndarray) -> SpanBatch:
        """K slots a window. Those after the last token that is written have weight 0."""
        ids = rows.ids.astype(np.int32)
        begins = rows.part_starts().copy()
        begins[:, 0] = True
        document = begins.cumsum(1) - 1  # (B, T): its number in the window
        text = np.ones_like(begins) if rows.text is None else rows.text
        pairs = self._pairs(ids, rows.before == self.end, begins, document, text)
        noise = self._noise(keys, ids.shape[1]) & text & ~self.special[ids] & ~pairs.inside
        starts = noise.copy()
        starts[:, 1:] &= ~noise[:, :-1] | begins[:, 1:]
        number = _so_far(starts, begins) - 1  # of each span in its document
        noise &= number <= self.spans  # a special token inside of a span makes it two: there are no more sentinels
        starts &= noise
        shown = np.where(starts, self.sentinels[number.clip(0, self.spans)], ids)
        shown[pairs.marks] = self.end
        kept = text & (~noise | starts) & ~pairs.unread
        fits = kept.cumsum(1) <= self.read  # a span whose sentinel is not read is not written
        read = self._read(shown, kept, begins, document)
        return SpanBatch(
            **read, **self._written(ids, shown, noise & fits, pairs.outputs & fits, starts & fits, document)
        )

    def _pairs(
        self, ids: np.ndarray, after_end: np.ndarray, begins: np.ndarray, document: np.ndarray, text: np.ndarray
    ) -> PairPlaces:
        """`after_end` (B, T) is True for tokens that follow an end mark in the stream."""
        marks = (ids == self.pair_mark) & text
        if not marks.any():
            return PairPlaces(marks, marks, marks, marks)
        B, T = ids.shape
        part = document + np.arange(0, B * T, T)[:, None]
        paired, whole = np.zeros(B * T, bool), np.zeros(B * T, bool)
        paired[part[marks]] = True
        whole[part[begins & after_end]] = True  # the part has the beginning of its document
        inside, seen = paired[part] & text, _so_far(marks, begins)
        marks &= seen == 1
        behind = inside & (seen > 0) & ~marks
        ends = behind & (ids == self.end)
        # The last place of a window of the stream may belong to the next document: an output is over at its end mark.
        outputs = behind & whole[part] & (_so_far(ends, begins) - ends == 0)
        return PairPlaces(inside, marks, inside & (behind | ~whole[part]), outputs)

    def _noise(self, keys: np.ndarray, T: int) -> np.ndarray:
        """(B, T) bool: N of the places of each window, in S spans."""
        draws, B = masking.Draws(self.seed, keys, T), len(keys)
        lengths = np.empty((B, 2 * self.spans), np.int64)  # a stretch of text, a span, a stretch of text, …
        lengths[:, 0::2] = _cut(draws.all(REPLACE, T - self.noise - 1), T - self.noise, self.spans)
        lengths[:, 1::2] = _cut(draws.all(SPAN, self.noise - 1), self.noise, self.spans)
        changes = np.zeros((B, T + 1), np.int64)
        np.put_along_axis(changes, lengths.cumsum(1), 1, axis=1)
        noise = changes[:, :T].cumsum(1) % 2 == 1
        turn = (draws.first(FIRST) % np.uint64(T)).astype(np.int64)[:, None]
        return np.take_along_axis(noise, (np.arange(T) + turn) % T, axis=1)

    def _read(self, shown: np.ndarray, kept: np.ndarray, begins: np.ndarray, document: np.ndarray) -> dict:
        """The fields of the encoder: the `kept` ones of the tokens `shown`, moved together."""
        B, T = shown.shape
        at = kept.cumsum(1) - 1
        position = at - np.maximum.accumulate(np.where(begins & kept, at, 0), axis=1)
        row, place = (kept & (at < self.read)).nonzero()
        at = at[row, place]
        found = {
            "inputs": np.full((B, self.read), self.pad, np.int32),
            "segments": np.full((B, self.read), NOBODY, np.int32),
            "position_ids": np.zeros((B, self.read), np.int32),
            "places": np.full((B, self.read), T, np.int32),
        }
        values = (shown[row, place], document[row, place], position[row, place], place)
        for array, value in zip(found.values(), values, strict=True):
            array[row, at] = value
        return found

    def _written(
        self,
        ids: np.ndarray,
        shown: np.ndarray,
        noise: np.ndarray,
        outputs: np.ndarray,
        starts: np.ndarray,
        document: np.ndarray,
    ) -> dict:
        """The fields of the decoder: for each span its sentinel and its tokens, and an end mark for each document.

        The outputs of pairs are written as they are, with the end marks that they have.
        """
        B, T = ids.shape
        row, place = (noise | outputs).nonzero()
        inside, first = document[row, place], starts[row, place]
        key = row * T + inside
        last = np.ones(len(row), bool)
        last[:-1] = key[1:] != key[:-1]
        last &= noise[row, place]
        # Each token of a span takes a slot, a first one also a slot for the sentinel, a last one also the end mark's.
        after = (1 + first + last).cumsum()
        before = after - (1 + first + last)
        begin = np.searchsorted(row, np.arange(B))  # the first token of each row, if it has one
        base = np.append(before, after[-1:] if len(after) else [0])[begin]
        slot = before - base[row]
        kinds: list[tuple[np.ndarray, Any, Any, float]] = [  # slots, what is written there, of which tokens, is it text
            (slot[first], shown[row, place][first], first, 0.0),
            (slot + first, ids[row, place], slice(None), 1.0),
            (slot[last] + first[last] + 1, np.int32(self.end), last, 0.0),
        ]
        targets = np.full((B, self.targets), self.pad, np.int32)
        index = np.full((B, self.targets), T - 1, np.int32)
        weights = np.zeros((B, self.targets), np.float32)
        segments = np.full((B, self.targets), NOBODY, np.int32)
        for at, tokens, which, text in kinds:
            fits = at < self.targets
            to = row[which][fits], at[fits]
            targets[to] = tokens if np.ndim(tokens) == 0 else tokens[fits]
            index[to], segments[to] = place[which][fits], inside[which][fits]
            weights[to] = 1.0 if self.config.targets == "all" else text
        if self.config.targets == "text":
            weights *= targets != self.end
        begins = np.ones_like(segments, dtype=bool)
        begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
        written = np.full_like(targets, self.pad)
        written[:, 1:] = np.where(begins[:, 1:], self.pad, targets[:, :-1])
        slots = np.arange(self.targets, dtype=np.int32)
        return {
            "targets": targets,
            "target_index": index,
            "weights": weights,
            "written": written,
            "written_segments": segments,
            "written_positions": slots - np.maximum.accumulate(np.where(begins, slots, 0), axis=1),
        }

    def loss(self, model: Any, batch: Batch) -> "dict[str, Tensor]":
        """The nll of what the decoder writes, in nats."""
        return {"loss": model.loss(self._rows(model, batch), batch.targets, batch.weights, self.config.z_loss)}

    def score(self, model: Any, batch: Batch) -> "dict[str, Tensor]":
        nll, likeliest = model.score(self._rows(model, batch), batch.targets)
        return {"nll": nll, "likeliest": likeliest}

    def _rows(self, model: Any, batch: Batch) -> "Tensor":
        """(B, K, D): the states of the decoder, which is given the true tokens before each target."""
        from pretrain.model.attention import Crossing, Layout

        assert isinstance(batch, SpanBatch) and batch.segments is not None
        states = model(batch.inputs, self.layout(batch))
        layout = Layout(batch.written_segments, batch.written_positions, True)
        return model.decode(batch.written, layout, states, Crossing(batch.written_segments, batch.segments))

    def places(self, batch: Batch) -> np.ndarray:
        assert isinstance(batch, SpanBatch)
        return batch.places

    def preview(self, windows: list[Batch], ask: Ask) -> np.ndarray:
        """The likeliest token of every slot after the true ones before it, (B, K)."""
        return ask(joined(windows))["likeliest"]

    def preview_text(self, window: Batch, predicted: np.ndarray, tokenizer: Tokenizer) -> str:
        """The text that is read, and what is written, with every token of text as [guess] or [guess ≠ truth]."""
        assert isinstance(window, SpanBatch) and window.segments is not None and window.weights is not None
        read = [tokenizer.token_text(token) for token in window.inputs[0][window.segments[0] != NOBODY].tolist()]
        written = []
        columns = (window.targets[0], window.weights[0], window.written_segments[0], predicted)
        for truth, weight, document, guess in zip(*(column.tolist() for column in columns), strict=True):
            text = tokenizer.token_text(truth)
            if weight:
                said = tokenizer.token_text(guess)
                text = f"**[{said}]**" if guess == truth else f"**[{said} ≠ {text}]**"
            if document != NOBODY:
                written.append(text)
        return f"{' '.join(read)} **▸** {' '.join(written)}"

    def marked(self, window: Batch, tokenizer: Tokenizer) -> tuple[list[str], str]:
        """The text that the encoder reads. The line has what the decoder writes."""
        assert isinstance(window, SpanBatch)
        shown = [tokenizer.token_text(token) for token in window.inputs[0].tolist()]
        used = window.written_segments[0] != NOBODY
        written = " ".join(tokenizer.token_text(token) for token in window.targets[0][used].tolist())
        return shown, f"{window.filled()} targets, which the decoder writes: {written}"


def _so_far(flags: np.ndarray, begins: np.ndarray) -> np.ndarray:
    """(B, T): how many `flags` there are from the beginning of the document up to each place."""
    count = flags.cumsum(1)
    return count - np.maximum.accumulate(np.where(begins, count - flags, 0), axis=1)


def _cut(draws: np.ndarray, length: int, parts: int) -> np.ndarray:
    """(B, parts): the lengths of the parts into which each row cuts `length`, every way with the same probability.

    `draws` (B, length - 1): a hash for each place between two neighbours. The parts - 1 smallest are cut.
    """
    cuts = np.sort(np.argsort(draws, axis=1, kind="stable")[:, : parts - 1], axis=1) + 1
    return np.diff(cuts, axis=1, prepend=0, append=length)
