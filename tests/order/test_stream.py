"""Windows of one set: every block once an epoch; place → stream position → ids, and back."""

import numpy as np
import pytest

from pretrain.order.stream import Windows
from pretrain.shards import Shards


def places(windows: Windows, samples: np.ndarray, seq_len: int, first_block: int = 0) -> np.ndarray:
    """The places of samples in the order of a single corpus, for a phase that begins at block `first_block`."""
    blocks, parts = np.divmod(samples, windows.block_tokens // seq_len)
    return (first_block + blocks) * windows.block_tokens + parts * seq_len


def test_each_epoch_reads_every_block_once_and_in_another_order(prepared):
    shards = Shards(prepared.shards["bert"])
    windows = Windows(shards, block_tokens=64, seed=5)
    orders = []
    for epoch in range(2):
        samples = np.arange(windows.blocks * 2) + epoch * windows.blocks * 2
        starts = windows.starts(places(windows, samples, 32))
        assert np.array_equal(np.diff(np.sort(starts)), np.full(len(starts) - 1, 32))
        orders.append(starts)
    assert not np.array_equal(orders[0], orders[1])


def test_phases_of_other_lengths_repeat_nothing_within_an_epoch(prepared):
    shards = Shards(prepared.shards["bert"])
    windows = Windows(shards, block_tokens=64, seed=5)
    half = windows.blocks // 2
    short = windows.starts(places(windows, np.arange(half * 4), 16))
    long = windows.starts(places(windows, np.arange(windows.blocks - half), 64, first_block=half))
    covered = np.concatenate([(short[:, None] + np.arange(16)).ravel(), (long[:, None] + np.arange(64)).ravel()])
    assert len(np.unique(covered)) == len(covered) == windows.blocks * 64


def test_the_stream_is_preceded_by_an_end_mark(prepared):
    shards = Shards(prepared.shards["byte"])
    windows = Windows(shards, 32, 0)
    rows = windows.tokens(np.array([0, 1, 32]), 32)
    stream = shards.gather(np.array([0]), 64)[0]
    assert rows[0, 0] == shards.specials["eod"] and np.array_equal(rows[0, 1:], stream[:32])
    assert np.array_equal(rows[1], stream[:33]) and np.array_equal(rows[2], stream[31:64])


@pytest.mark.parametrize("block_tokens", [8, 64])  # a set of more and of fewer than 4096 blocks
@pytest.mark.parametrize("corpus", [0, 3])
def test_every_token_leads_back_to_its_place(block_tokens, corpus, prepared):
    windows = Windows(Shards(prepared.shards["bert"]), block_tokens, seed=5, corpus=corpus)
    stream = np.arange(windows.shards.tokens)
    for epoch in (0, 3):
        found = windows.places_of(stream, epoch)
        first = epoch * windows.blocks * block_tokens
        read = found >= 0
        assert np.array_equal(np.sort(found[read]), np.arange(first, first + windows.blocks * block_tokens))
        assert np.array_equal(windows.starts(found[read]), stream[read])
        assert (~read).sum() == windows.shards.tokens % block_tokens


def test_two_sets_of_a_run_have_orders_of_their_own(prepared):
    shards = Shards(prepared.shards["bert"])
    blocks = np.arange(0, 64 * 64, 64)
    starts = [Windows(shards, 64, 5, corpus=corpus).starts(blocks) for corpus in range(3)]
    assert not any(np.array_equal(a, b) for a in starts for b in starts if a is not b)


def test_the_left_out_tokens_are_not_always_the_same(prepared):
    windows = Windows(Shards(prepared.shards["bert"]), 4096, seed=5)
    assert windows.shards.tokens % 4096
    seen = np.zeros(windows.shards.tokens, bool)
    for epoch in range(40):
        seen |= windows.places_of(np.arange(windows.shards.tokens), epoch) >= 0
    assert seen.mean() > 0.99


def test_words_come_from_what_the_set_was_opened_with(prepared):
    class EverySecond:
        def gather(self, starts, length):
            return (starts[:, None] + np.arange(length)) % 2 == 0

    shards = Shards(prepared.shards["bert"])
    words = Windows(shards, 64, 5, EverySecond()).rows(np.array([3, 4]), 4, words=True).words
    assert words.tolist() == [[False, True, False, True], [True, False, True, False]]
    with pytest.raises(AssertionError, match="without its words"):
        Windows(shards, 64, 5).rows(np.array([0]), 4, words=True)
