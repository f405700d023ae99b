"""Packed windows: every token once an epoch, few documents cut, and the way from step to text and back."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.objectives import OBJECTIVES
from pretrain.objectives.causal_lm import CausalLMConfig
from pretrain.objectives.masked_lm import MaskedLMConfig
from pretrain.order.order import Order, Reading
from pretrain.order.packed import PackedWindows, best_fit, pack
from pretrain.order.phases import Phase
from pretrain.shards import Shards

PAD, END = -1, -2


class Documents:
    """A stream of documents of these lengths. Each token equals its position, and an end mark precedes the stream."""

    specials = {"pad": PAD, "eod": END}

    def __init__(self, lengths):
        self.ends = np.cumsum(lengths)
        self.begins = self.ends - lengths
        self.tokens = int(self.ends[-1])

    def gather(self, starts, length):
        return (starts[:, None] + np.arange(length)).astype(np.int32)

    def spans(self, first, last):
        here = (self.ends > first) & (self.begins < last)
        return self.begins[here], self.ends[here]


def lengths(seed: int, count: int, mean: float = 3.0, least: int = 2) -> np.ndarray:
    """Lengths of documents: log-normal, like documents of the web."""
    return np.random.default_rng(seed).lognormal(mean, 1.0, count).astype(np.int64) + least


BLOCK = 16 * 32
TEXTS = {
    "en": lengths(0, 1500),
    "zh": np.random.default_rng(1).integers(17, 32, 500),  # one in each window of 32
    "code": lengths(2, 60, 4.5),
}
PHASES = [
    Phase(steps=30, seq_len=32, batch_tokens=32 * 21, mixture={"en": 5, "zh": 3}),
    Phase(steps=25, seq_len=64, batch_tokens=64 * 10, mixture={"en": 1, "zh": 2, "code": 4}),
    Phase(steps=90, seq_len=32, batch_tokens=32 * 13, mixture={"zh": 2, "code": 1}),
]


def order(phases=PHASES, seed=5) -> Order:
    corpora = {
        name: PackedWindows(Documents(found), BLOCK, seed, corpus=number)
        for number, (name, found) in enumerate(TEXTS.items())
    }
    return Order(corpora, phases)


def everything(of: Order) -> list[Reading]:
    return [reading for step in range(sum(phase.steps for phase in of.phases)) for reading in of.step(step)]


def slow_best_fit(sizes: list[int], seq_len: int) -> list[list[int]]:
    """The sizes in each window, by the loop of a textbook."""
    windows: list[list[int]] = []
    for size in sorted(sizes, reverse=True):
        holding = [window for window in windows if sum(window) + size <= seq_len]
        if holding:
            max(holding, key=sum).append(size)
        else:
            windows.append([size])
    return windows


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60))
@settings(max_examples=200, deadline=None)
def test_best_fit_is_that_of_the_textbook(sizes):
    found, expected = np.array(sizes), slow_best_fit(sizes, 40)
    window, place, used = best_fit(found, 40)
    assert used == len(expected)
    held = [sorted(found[window == number].tolist()) for number in range(used)]
    assert sorted(held) == sorted(sorted(window) for window in expected)
    for number in range(used):
        here = np.flatnonzero(window == number)
        here = here[np.argsort(place[here])]
        assert place[here].tolist() == (np.cumsum(found[here]) - found[here]).tolist(), "one behind the other"


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(0, 5))
@settings(max_examples=200, deadline=None)
def test_what_fits_nowhere_is_cut_and_nothing_else_is(sizes, more):
    sizes = np.array(sizes)
    begins = np.cumsum(sizes) - sizes
    count = -(-int(sizes.sum()) // 40) + more
    whole = sizes % 3 > 0
    window, place, begin, length = pack(begins, sizes, whole, 40, count)
    tokens = np.concatenate([np.arange(b, b + n) for b, n in zip(begins, sizes, strict=True)])
    held = set(zip(begins.tolist(), sizes.tolist(), strict=True))
    packed = np.concatenate([np.arange(b, b + n) for b, n in zip(begin, length, strict=True)])
    assert np.array_equal(np.sort(packed), tokens)
    taken = np.zeros((count, 40), int)
    for w, at, n in zip(window, place, length, strict=True):
        assert at + n <= 40
        taken[w, at : at + n] += 1
    assert taken.max() == 1
    if best_fit(sizes[whole], 40)[2] <= count:
        assert set(begins[whole].tolist()) <= {b for b, n in zip(begin, length, strict=True) if (b, n) in held}
    if best_fit(sizes, 40)[2] <= count:
        assert np.array_equal(np.sort(begin), np.sort(begins)), "all parts are whole"


@pytest.mark.parametrize("seq_len", [16, 32, 64])
def test_an_epoch_has_every_token_of_its_blocks_once(seq_len):
    text = Documents(TEXTS["en"])
    windows = PackedWindows(text, BLOCK, 5)
    per_block, seen = windows.per_block(seq_len), np.zeros(text.tokens, int)
    places = (np.arange(windows.blocks)[:, None] * BLOCK + np.arange(per_block)).ravel()
    starts = windows.starts(places)
    rows = windows.rows(starts, seq_len)
    assert np.array_equal(rows.ids == PAD, ~rows.text)
    np.add.at(seen, rows.ids[rows.text], 1)
    assert seen.max() == 1
    # Left out: tokens before the first block and behind the last, and the rest of a document that began before.
    left = np.flatnonzero(seen == 0)
    assert len(left) < BLOCK + 2 * seq_len
    assert np.array_equal(windows.places_of(starts, 0), places)
    assert 0.01 < (~rows.text).mean() < 0.25


def test_documents_that_fit_are_whole_but_for_a_few_and_longer_ones_are_cut_every_window():
    text = Documents(TEXTS["en"])
    windows = PackedWindows(text, 64 * 64, 5)
    places = (np.arange(windows.blocks)[:, None] * 64 * 64 + np.arange(windows.per_block(64))).ravel()
    parts = [part for start in windows.starts(places).tolist() for part in windows.parts(start, 64)]
    whole = {(part.start, part.tokens) for part in parts}
    documents = list(zip(text.begins.tolist(), TEXTS["en"].tolist(), strict=True))
    inside = [(begin, size) for begin, size in documents if (begin, size) in whole or size > 64]
    short = sum(size <= 64 for _, size in documents)
    assert sum(size <= 64 for _, size in inside) / short > 0.97
    stream = sum(begin // 64 != (begin + size - 1) // 64 for begin, size in documents if size <= 64)
    assert stream / short > 0.3, "as many as windows of the stream cut"
    cuts = {(begin + at, min(64, size - at)) for begin, size in documents if size > 64 for at in range(0, size, 64)}
    assert len(cuts & whole) / len(cuts) > 0.95


def test_a_step_takes_windows_of_many_blocks_in_an_order_that_does_not_know_their_lengths():
    """All parts of a long document are in one block, and packing begins with the longest parts."""
    windows = PackedWindows(Documents(lengths(3, 40_000)), 64 * 64, 5)
    of = Order({"": windows}, [Phase(steps=60, seq_len=64, batch_tokens=64 * 128)])
    samples = of.samples(0, 0, of.phases[0].samples)
    begins = samples.starts.reshape(60, 128) >> 20
    assert min(len(set(step)) for step in begins.tolist()[:56]) >= 12  # the last blocks are fewer than 16
    parts = np.array([len(windows.parts(start, 64)) for start in samples.starts.tolist()])
    number = np.arange(len(parts))
    assert parts.std() > 1 and abs(np.corrcoef(parts, number % (16 * windows.per_block(64)))[0, 1]) < 0.04


@pytest.mark.parametrize("block", [64 * 64, 16 * 64])
def test_the_waste_is_counted_as_documents_and_places_show_it(block):
    """The waste includes documents that the end of a block cuts: documents of more than 1/64 of a block's tokens."""
    windows = PackedWindows(Documents(lengths(6, 40 * block // 64)), block, 5)
    assert windows.blocks < 64, "all blocks are measured"
    places = (np.arange(windows.blocks)[:, None] * block + np.arange(windows.per_block(64))).ravel()
    whole = {part[1:] for start in windows.starts(places).tolist() for part in windows.parts(start, 64)}
    offset, text = windows._offset(0), windows.shards
    short = [
        (begin, end - begin)
        for begin, end in zip(text.begins.tolist(), text.ends.tolist(), strict=True)
        if end - begin <= 64 and offset <= begin < offset + windows.blocks * block
    ]
    padding, cut = windows.waste(64)
    assert cut == pytest.approx(sum(one not in whole for one in short) / len(short))
    assert padding == pytest.approx((~windows.rows(windows.starts(places), 64).text).mean(), abs=0.005)
    assert (cut > 0.005) == (block < 64 * 64)


def test_as_many_windows_are_taken_as_leave_1_in_200_documents_cut():
    """Documents a little longer than half a window need one window each: twice as many as the tokens would fill."""
    windows = PackedWindows(Documents(np.full(9000, 33)), 64 * 2048, 5)
    count, (padding, cut) = windows.per_block(64), windows.waste(64)
    blocks = [windows._parts_of(start, 64)[1:] for start in windows._measured_blocks()]
    documents = sum(len(parts) for parts, _ in blocks)
    assert count == pytest.approx(64 * 2048 / 33, rel=0.01)
    assert cut == pytest.approx(0.005, abs=0.0005) and padding == pytest.approx(1 - 33 / 64, abs=0.01)
    more = sum(max(0, len(parts) - (count - 1)) for parts, _ in blocks)
    assert more > 0.005 * documents, "one less would cut more"


def test_nothing_repeats_within_an_epoch_whatever_the_phases_do():
    found = everything(order())
    for name, sizes in TEXTS.items():
        seen = np.zeros((30, sizes.sum()), np.int8)
        for reading in found:
            if reading.corpus == name:
                seen[reading.epoch, reading.start : reading.start + reading.tokens] += 1
        assert seen.max() == 1
    assert max(reading.epoch for reading in found) > 1


def test_steps_lead_to_documents_and_documents_to_steps():
    of, random = order(), np.random.default_rng(0)
    found = everything(of)
    for name, sizes in TEXTS.items():
        ends = np.cumsum(sizes)
        for number in random.integers(0, len(sizes), 25).tolist():
            first, last = int(ends[number] - sizes[number]), int(ends[number])
            expected = [r for r in found if r.corpus == name and r.start < last and r.start + r.tokens > first]
            assert of.readings(name, first, last) == sorted(expected)
    assert of.readings("en", 5, 5) == []


def test_readings_are_what_the_rows_hold():
    of = order()
    for number, phase in enumerate(PHASES):
        samples = of.samples(number, 0, phase.samples)
        rows = of.rows(samples, phase.seq_len)
        expected = np.full_like(rows.ids, PAD)
        begins = np.zeros_like(rows.begins)
        first = sum(phase.steps for phase in PHASES[:number])
        for step in range(first, first + phase.steps):
            for r in of.step(step):
                expected[r.sample, r.at : r.at + r.tokens] = np.arange(r.start, r.start + r.tokens)
                begins[r.sample, r.at] = True
        assert np.array_equal(rows.ids, expected) and np.array_equal(rows.text, expected != PAD)
        assert np.array_equal(rows.begins, begins)


def test_a_phase_has_its_mixture_in_tokens_of_text():
    """The mixture deals out blocks of equal tokens, for any number of windows in a block."""
    of = order()
    assert of.per_block[0][1] > 1.2 * of.per_block[0][0]
    for number, phase in enumerate(PHASES):
        samples = of.samples(number, 0, phase.samples)
        tokens = of.rows(samples, phase.seq_len).text.sum(1)
        for name, weight in phase.mixture.items():
            mine = samples.corpora == of.names.index(name)
            assert mine.sum() * phase.seq_len * (1 - of.padding(number)[of.names.index(name)]) == pytest.approx(
                of.drawn(number)[of.names.index(name)], abs=1
            )
            share = weight / sum(phase.mixture.values())
            assert abs(tokens[mine].sum() - share * tokens.sum()) < 2 * BLOCK


def test_no_two_samples_share_a_key_and_any_cut_gives_the_same():
    of = order()
    every = [of.samples(number, 0, phase.samples) for number, phase in enumerate(PHASES)]
    keys = np.concatenate([samples.keys for samples in every])
    assert len(np.unique(keys)) == len(keys)
    part = order().samples(1, 7, 30)
    assert all(np.array_equal(a, b[7:37]) for a, b in zip(part, every[1], strict=True))
    assert np.array_equal(order().rows(part, 64).ids, of.rows(every[1], 64).ids[7:37])


def test_before_a_document_stands_the_mark_that_ends_another_and_before_a_rest_what_precedes_it():
    text = Documents(np.array([5, 40, 3, 60, 20, 31, 9, 7, 50, 31]))
    windows = PackedWindows(text, 64, 5)
    starts = windows.starts(np.arange(windows.per_block(16) * windows.blocks) % windows.per_block(16))
    rows = windows.rows(starts, 16)
    before, tokens = rows.before, rows.ids
    held = tokens != PAD
    assert np.array_equal(before[held], np.where(tokens[held] > 0, tokens[held] - 1, END))
    assert (before[~held] == PAD).all()


def test_words_of_windows_are_those_of_their_tokens():
    class EveryThird:
        fingerprint = "3"

        def gather(self, starts, length):
            return (starts[:, None] + np.arange(length)) % 3 == 0

    text = Documents(TEXTS["zh"])
    windows = PackedWindows(text, BLOCK, 5, EveryThird())
    starts = windows.starts(np.arange(windows.per_block(32)) + 3 * BLOCK)
    rows = windows.rows(starts, 32, words=True)
    assert np.array_equal(rows.words, (rows.ids == PAD) | (rows.ids % 3 == 0))
    with pytest.raises(AssertionError, match="without its words"):
        PackedWindows(text, BLOCK, 5).rows(starts, 32, words=True)


def test_a_trillion_tokens_cost_what_a_million_do():
    """Neither blocks nor documents are listed, so step 10⁸ costs as much as step 0."""

    class Endless(Documents):
        def __init__(self):
            self.tokens = 10**12

        def spans(self, first, last):
            numbers = np.arange(first // 300, -(-last // 300))
            return numbers * 300, (numbers + 1) * 300

    tracemalloc.start()
    phase = Phase(steps=10**8 - 1, seq_len=512, batch_tokens=512 * 80)
    of = Order({"": PackedWindows(Endless(), 64 * 512, 5)}, [phase])
    for step in (0, 10**8 - 2):
        rows = of.rows(of.samples(0, step * 80, 8), 512)
        assert rows.ids.shape == (8, 512) and rows.text.mean() > 0.5
        reading = of.step(step)[-1]
        assert reading in of.readings("", reading.start, reading.start + 1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10 << 20


def test_the_shards_say_where_documents_lie(prepared):
    """`Shards.spans` over several pieces agrees with the spans of each document."""
    shards = Shards(prepared.shards["bert"])
    every = np.array([shards.span(number) for number in range(shards.documents)])
    random = np.random.default_rng(0)
    for _ in range(200):
        first = int(random.integers(0, shards.tokens))
        last = min(shards.tokens, first + int(random.integers(1, 5000)))
        here = (every[:, 1] > first) & (every[:, 0] < last)
        begins, ends = shards.spans(first, last)
        assert np.array_equal(np.stack([begins, ends], axis=1), every[here])


# Batches


class Text(Documents):
    """Documents of ids: 5, 6, 7, … between a first and a last special token, or before a last one alone."""

    def __init__(self, lengths, specials: dict[str, int]):
        super().__init__(lengths)
        self.specials = specials
        self.ids = 5 + np.arange(self.tokens) % 500
        if "cls" in specials:
            self.ids[self.begins] = specials["cls"]
        self.ids[self.ends - 1] = specials["sep" if "sep" in specials else "eod"]

    def gather(self, starts, length):
        return self.ids[super().gather(starts, length)].astype(np.int32)


BERT = {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
BYTE = {"pad": 0, "unk": 1, "eod": 2}


def batch(config, samples: int = 500):
    """A batch of packed windows of 64, and their rows."""
    specials = BERT if config.kind == "masked_lm" else BYTE
    text = Text(lengths(4, 3000, 3.3), specials)
    of = Order({"": PackedWindows(text, 64 * 16, 3)}, [Phase(steps=1, seq_len=64, batch_tokens=samples * 64)])
    objective = OBJECTIVES[config.kind](config, specials, 505, 64, 3)
    found = of.samples(0, 0, samples)
    rows = of.rows(found, 64)
    return objective.batch(rows, found.keys), rows


@pytest.mark.parametrize("kind", ["masked_lm", "causal_lm"])
def test_every_part_of_a_document_is_a_segment_and_so_is_the_padding(kind):
    config = MaskedLMConfig(kind=kind) if kind == "masked_lm" else CausalLMConfig(kind=kind)
    made, rows = batch(config)
    for row, (begins, text) in enumerate(zip(rows.begins.tolist(), rows.text.tolist(), strict=True)):
        number, begin = -1, 0
        for at in range(len(text)):
            if begins[at] or (not text[at] and (at == 0 or text[at - 1])):
                number, begin = number + 1, at
            assert made.segments[row, at] - made.segments[row, 0] == number
            assert made.position_ids[row, at] == at - begin


def test_masked_parts_begin_and_end_with_their_marks_and_padding_is_never_asked_for():
    made, found = batch(MaskedLMConfig(kind="masked_lm", mask_ratio=0.3))
    rows, begins, free = found.ids, found.begins, ~found.text
    goes_on = ~begins & ~free
    cls, sep, pad = (BERT[name] for name in ("cls", "sep", "pad"))
    shown, targets = made.inputs, made.targets
    filled, at = made.weights > 0, made.target_index
    lines = np.arange(len(rows))[:, None]
    assert (shown[begins] == cls).all() and (shown[free] == pad).all()
    last = np.concatenate([~goes_on[:, 1:], np.ones((len(rows), 1), bool)], axis=1) & goes_on
    assert (shown[last] == sep).all()
    assert np.array_equal(targets[filled], rows[lines, at][filled]), "asked for is what stands in the text"
    assert not np.isin(targets[filled], [cls, sep, pad]).any() and not free[lines, at][filled].any()
    assert (np.diff(at, axis=1) > 0).all()
    # Each token is a target with the same probability, also in windows with much padding.
    text = goes_on & ~last
    text, filled = text[text.any(1)], filled[text.any(1)]  # a window may be empty
    share, asked = text.mean(1), filled.sum(1) / text.sum(1)
    empty, full = asked[share < np.quantile(share, 0.2)].mean(), asked[share >= np.quantile(share, 0.8)].mean()
    assert empty == pytest.approx(full, rel=0.1) and (share < 0.8).any()


def test_causal_parts_are_predicted_from_their_document_alone():
    made, rows = batch(CausalLMConfig(kind="causal_lm"))
    assert np.array_equal(made.weights > 0, rows.text) and made.filled() == rows.text.sum()
    inputs, targets = made.inputs, made.targets
    assert np.array_equal(inputs, rows.before) and np.array_equal(targets, rows.ids)
    goes_on = (~rows.begins & rows.text)[:, 1:]
    assert np.array_equal(inputs[:, 1:][goes_on], targets[:, :-1][goes_on])
    assert (inputs[rows.begins] == BYTE["eod"]).mean() > 0.5  # the other parts are rests of cut documents
