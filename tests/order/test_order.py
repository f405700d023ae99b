"""The order of a run: step → text and text → steps, over epochs, phases and corpora."""

import itertools

import numpy as np
import pytest

from pretrain.order.order import CHUNK, Order, Reading
from pretrain.order.packed import PackedWindows
from pretrain.order.phases import Phase, locate, tokens_after
from pretrain.order.stream import Windows
from pretrain.shards import Shards
from tests.order.test_packed import Documents
from tests.order.test_packed import lengths as lengths_of


class Text:
    """A stream of `tokens` tokens, each equal to its position."""

    specials = {"eod": 0}

    def __init__(self, tokens: int):
        self.tokens = tokens

    def gather(self, starts, length):
        return (starts[:, None] + np.arange(length)).astype(np.int32)


BLOCK = 64
SIZES = {"en": 40 * BLOCK + 17, "zh": 23 * BLOCK + 3, "code": 9 * BLOCK}
PHASES = [
    Phase(steps=30, seq_len=16, batch_tokens=80, mixture={"en": 5, "zh": 3}),  # 37.5 blocks
    Phase(steps=20, seq_len=32, batch_tokens=256, mixture={"en": 1, "zh": 2, "code": 4}),
    Phase(steps=7, seq_len=64, batch_tokens=192, mixture={"code": 1}),
    Phase(steps=25, seq_len=16, batch_tokens=160, mixture={"zh": 2, "en": 7}),
]


def order(phases=PHASES, sizes=SIZES, seed=5) -> Order:
    corpora = {name: Windows(Text(size), BLOCK, seed, corpus=n) for n, (name, size) in enumerate(sizes.items())}
    return Order(corpora, phases)


def everything(of: Order) -> list[Reading]:
    return [reading for step in range(sum(phase.steps for phase in of.phases)) for reading in of.step(step)]


def test_no_corpus_repeats_anything_within_an_epoch_whatever_the_phases_do():
    found = everything(order())
    for name, size in SIZES.items():
        seen = np.zeros((20, size), int)
        for reading in found:
            if reading.corpus == name:
                seen[reading.epoch, reading.start : reading.start + reading.tokens] += 1
        assert seen.max() == 1 and seen.sum() == sum(r.tokens for r in found if r.corpus == name)
        epochs = [r.epoch for r in found if r.corpus == name]
        assert epochs == sorted(epochs), "an epoch begins when the one before it is over"


def test_the_epochs_of_a_corpus_leave_out_only_what_its_phases_left_unfinished():
    """All epochs of `code` except the last are complete: 9 blocks of 9."""
    found = [r for r in everything(order()) if r.corpus == "code"]
    assert max(r.epoch for r in found) >= 5
    for epoch in range(max(r.epoch for r in found)):
        covered = sum(r.tokens for r in found if r.epoch == epoch)
        assert covered in (9 * BLOCK, 9 * BLOCK - 48, 9 * BLOCK - 32), (epoch, covered)


def test_every_prefix_of_a_phase_has_its_mixture_within_a_window():
    of = order()
    for number, phase in enumerate(PHASES):
        samples = of.samples(number, 0, phase.samples)
        for name, weight in phase.mixture.items():
            drawn = np.cumsum(samples.corpora == of.names.index(name)) * phase.seq_len
            part = np.arange(1, phase.samples + 1) * phase.seq_len * weight / sum(phase.mixture.values())
            assert np.abs(drawn - part).max() < phase.seq_len
        assert set(samples.corpora) == {of.names.index(name) for name in phase.mixture}


def test_the_steps_that_read_a_stretch_are_those_that_list_it():
    """The inverse agrees with a search through every step."""
    of, random = order(), np.random.default_rng(0)
    found = everything(of)
    stretches = [(name, 0, size) for name, size in SIZES.items()]
    for name, size in SIZES.items():
        for _ in range(40):
            first = int(random.integers(0, size))
            stretches.append((name, first, min(size, first + int(random.choice([1, 5, 90])))))
    for name, first, last in stretches:
        expected = [r for r in found if r.corpus == name and r.start < last and r.start + r.tokens > first]
        assert of.readings(name, first, last) == sorted(expected), (name, first, last)
    assert of.readings("en", 5, 5) == []


def test_a_later_phase_changes_nothing_before_it():
    for begun in range(1, len(PHASES)):
        other = [Phase(steps=9, seq_len=64, batch_tokens=64, mixture={"zh": 1})]
        now, then = order(PHASES[:begun] + other), order()
        for step in range(sum(phase.steps for phase in PHASES[:begun])):
            assert now.step(step) == then.step(step)


def test_a_corpus_added_behind_the_others_changes_no_phase_that_leaves_it_out():
    two = order(PHASES[:1] + PHASES[3:], {name: SIZES[name] for name in ("en", "zh")})
    three = order(PHASES[:1] + PHASES[3:])
    assert everything(two) == everything(three)


def test_windows_as_long_as_blocks_are_read_in_the_order_of_blocks():
    """Pools do not matter here: the samples, keys and text equal the windows of the corpus alone."""
    phases = [
        Phase(steps=50, seq_len=BLOCK, batch_tokens=BLOCK * 9),
        Phase(steps=30, seq_len=BLOCK, batch_tokens=BLOCK),
    ]
    windows = Windows(Text(SIZES["en"]), BLOCK, 5)
    plain, first = Order({"": windows}, phases), 0
    for number, phase in enumerate(phases):
        samples = plain.samples(number, 0, phase.samples)
        found = (first + np.arange(phase.samples)) * BLOCK
        assert np.array_equal(samples.keys, found) and np.array_equal(samples.starts, windows.starts(found))
        assert np.array_equal(plain.rows(samples, BLOCK).ids, windows.rows(samples.starts, BLOCK).ids)
        first += phase.samples
    named = Order({"en": windows}, [phase.model_copy(update={"mixture": {"en": 3}}) for phase in phases])
    assert [(r.step, r.start) for r in everything(named)] == [(r.step, r.start) for r in everything(plain)]


def slow_pools(blocks: int, begun: int, batch: int) -> list[list[int]]:
    """The blocks of all pools of an epoch after its first `begun` blocks, by a loop."""
    left, pools = list(range(begun, blocks)), []
    size = max(batch, min(4096, blocks // 8))
    while len(left) >= 2 * size:
        pools.append(left[:size])
        left = left[size:]
    return [*pools, left]


def test_the_windows_of_a_pool_are_taken_in_turns():
    """The order agrees with a loop: one window of every block, then another one of every block, and so on."""
    phases = [Phase(steps=3, seq_len=32, batch_tokens=64), Phase(steps=42, seq_len=16, batch_tokens=112)]
    windows = Windows(Text(SIZES["en"]), BLOCK, 5)
    of = Order({"": windows}, phases)
    begun = int(of.first_blocks[1, 0])
    assert begun == 5  # the first pool, of which 6 of 10 windows are read
    places = of.samples(1, 0, phases[1].samples).keys
    blocks, parts = (places // BLOCK).tolist(), (places % BLOCK // 16).tolist()
    at = 0
    for epoch, pools in enumerate((slow_pools(40, begun, 7), slow_pools(40, 0, 7))):
        for pool in pools:
            numbers = [40 * epoch + block for block in pool]
            for turn in range(4):
                assert blocks[at : at + len(pool)] == numbers[: len(blocks) - at], (epoch, pool, turn)
                at += len(pool)
            taken = parts[at - 4 * len(pool) : at]
            if at <= len(parts):
                assert all(sorted(taken[n :: len(pool)]) == [0, 1, 2, 3] for n in range(len(pool)))
    assert at > len(places) > 35 * 4


@pytest.mark.parametrize("block_tokens", [32, 1024, 8192])
@pytest.mark.parametrize("batch", [64, 300])
def test_a_step_reads_from_as_many_places_as_it_has_windows(block_tokens, batch):
    """This holds if the corpus has enough blocks. In a smaller corpus a step reads from every block.

    Successive windows of a block are almost never in one step.
    """
    sizes = {"en": 700 * block_tokens + 5, "zh": 40 * block_tokens}
    phase = Phase(steps=120, seq_len=32, batch_tokens=32 * batch, mixture={"en": 3, "zh": 1})
    windows = {name: Windows(Text(size), block_tokens, 5, corpus=n) for n, (name, size) in enumerate(sizes.items())}
    of = Order(windows, [phase])
    counts, found = of.places(0)
    assert counts.tolist() == [batch * 3 // 4, batch // 4] and found.tolist() == [batch * 3 // 4, min(40, batch // 4)]
    neighbours = 0
    for step in range(phase.steps):
        readings = [r for r in of.step(step) if r.corpus == "en"]
        begins = [r.start - windows["en"]._offset(r.epoch) for r in readings]
        blocks = {(r.epoch, begin // block_tokens) for r, begin in zip(readings, begins, strict=True)}
        assert len(blocks) == len(readings) == batch * 3 // 4
        neighbours += (np.diff(np.sort(begins)) == 32).sum()
    assert block_tokens == 32 or neighbours < phase.samples * 3 / 4 * 0.02


def samples_of(of: Order, count: int) -> list:
    return [column.tolist() for column in of.samples(0, 0, count)]


@pytest.mark.parametrize("mixture", [None, {"en": 5, "zh": 3}])
@pytest.mark.parametrize("kind", [Windows, PackedWindows])
def test_a_phase_that_is_lengthened_keeps_all_it_has_read(kind, mixture):
    lengths = {"en": lengths_of(0, 3000), "zh": lengths_of(1, 1500)}
    corpora = {name: kind(Documents(lengths[name]), 1024, 5, corpus=n) for n, name in enumerate(mixture or ["en"])}
    shortest = Phase(steps=40, seq_len=32, batch_tokens=8 * 32, mixture=mixture)
    expected = samples_of(Order(corpora, [shortest]), 320)
    for steps in (41, 60, 5000):
        longer = Order(corpora, [shortest.model_copy(update={"steps": steps}), shortest])
        assert samples_of(longer, 320) == expected, steps


def test_a_phase_leaves_at_most_a_pool_of_its_epoch_unread():
    """This holds in a small corpus too: a run of many short phases reads at least 70 % of every epoch."""
    phases = [Phase(steps=13, seq_len=seq_len, batch_tokens=256) for seq_len in (16, 32, 64) * 12]
    of = Order({"": Windows(Text(64 * 100 + 9), 64, 5)}, phases)
    read = np.zeros(40)
    for reading in everything(of):
        read[reading.epoch] += reading.tokens / 6400
    last = int(of.epochs()[0])
    assert last > 15 and read[:last].min() > 0.7 and read[:last].mean() > 0.85, read


def test_no_two_samples_of_a_run_share_a_key():
    of = order()
    keys = np.concatenate([of.samples(n, 0, phase.samples).keys for n, phase in enumerate(PHASES)])
    assert len(np.unique(keys)) == len(keys) == sum(phase.samples for phase in PHASES)


def test_samples_are_the_same_in_any_cut():
    phases = [Phase(steps=400, seq_len=16, batch_tokens=16 * 50, mixture={"en": 5, "zh": 3})]
    of = order(phases)
    whole = of.samples(0, 0, phases[0].samples)
    assert phases[0].samples > 2 * CHUNK
    for first, count in ((0, 1), (CHUNK - 3, 7), (5, 2 * CHUNK), (phases[0].samples - 1, 1)):
        part = order(phases).samples(0, first, count)
        for a, b in zip(part, whole, strict=True):
            assert np.array_equal(a, b[first : first + count])


def test_rows_of_several_corpora_stand_where_their_samples_do():
    of = order()
    samples = of.samples(1, 3, 40)
    assert len(set(samples.corpora)) == 3
    assert np.array_equal(of.rows(samples, 32).ids, samples.starts[:, None] + np.arange(32))


def test_what_a_phase_draws_is_counted_to_the_token():
    of = order()
    for number, phase in enumerate(PHASES):
        listed = of.samples(number, 0, phase.samples).corpora
        assert of.drawn(number).tolist() == (np.bincount(listed, minlength=3) * phase.seq_len).tolist()
    epochs = [max(r.epoch for r in everything(of) if r.corpus == name) for name in SIZES]
    assert np.floor(of.epochs()).astype(int).tolist() == epochs


def test_a_trillion_tokens_of_three_corpora_are_reached_at_once():
    sizes = {"en": 10**12 + 7, "zh": 3 * 10**11 + 11, "code": 5 * 10**6}
    phases = [
        Phase(steps=10**6, seq_len=32, batch_tokens=10**6 * 32 // 32, mixture={"en": 7, "zh": 2, "code": 1}),
        Phase(steps=10**6, seq_len=64, batch_tokens=64 * 1000, mixture={"en": 3, "zh": 1}),
    ]
    of = order(phases, sizes)
    for step in (0, 10**6 - 1, 10**6, 2 * 10**6 - 1):
        readings = of.step(step)[:50]
        for reading in readings:
            assert 0 <= reading.start <= sizes[reading.corpus] - reading.tokens
    one = next(r for r in of.step(2 * 10**6 - 1) if r.corpus == "zh")
    assert one in of.readings("zh", one.start + 10, one.start + 11)


def test_the_shards_of_a_run_lead_from_a_document_to_its_steps_and_back(prepared):
    windows = Windows(Shards(prepared.shards["bert"]), 64, 1)
    of = Order({"": windows}, [Phase(steps=2000, seq_len=32, batch_tokens=256)])
    assert of.epochs()[0] > 3
    found = of.readings("", 1000, 1300)
    assert {r.epoch for r in found} >= {0, 1, 2} and all(r in of.step(r.step) for r in found)


def test_steps_stand_in_their_phases():
    ends = list(itertools.accumulate(phase.steps for phase in PHASES))
    assert [locate(step, PHASES).number for step in (0, 29, 30, 49, 50, ends[-1] - 1)] == [0, 0, 1, 1, 2, 3]
    assert locate(31, PHASES).first_sample == PHASES[1].batch
    assert tokens_after(31, PHASES) == 30 * 80 + 256
    with pytest.raises(AssertionError, match="past the last phase"):
        locate(ends[-1], PHASES)
