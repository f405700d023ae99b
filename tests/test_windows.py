"""Order and windows: every sample once an epoch, computed per index, the same on every machine."""

import numpy as np
import pytest

from pretrain.shards import Shards
from pretrain.windows import Windows, hash64, mix, permute


def test_every_index_appears_once():
    for n in [*range(1, 130), 1000, 4095, 4096, 4097, 5000, 10_007, 65_537]:
        assert np.array_equal(np.sort(permute(np.arange(n), n, 3, 0)), np.arange(n)), n


def test_a_trillion_items_permute_without_a_table():
    n = 10**12
    index = np.arange(0, n, n // 10_000)
    out = permute(index, n, 3, 0)
    assert len(np.unique(out)) == len(index) and out.min() >= 0 and out.max() < n
    assert np.histogram(out, bins=10, range=(0, n))[0].min() > 850  # 1000 a tenth expected, σ = 30


@pytest.mark.parametrize("n", [3, 7, 64, 5000])
def test_positions_are_uniform_over_keys(n):
    """χ² of where index 0 and the last index land over 200·min(n, 64) keys, on at most 64 bins."""
    bins = min(n, 64)
    keys = 200 * bins
    for index in (0, n - 1):
        landed = np.array([int(permute(np.array([index]), n, key, 1)[0]) for key in range(keys)])
        counts = np.bincount(landed * bins // n, minlength=bins)
        expected = np.bincount(np.arange(n) * bins // n, minlength=bins) * keys / n
        chi2 = float(((counts - expected) ** 2 / expected).sum())
        assert chi2 < bins - 1 + 5 * (2 * (bins - 1)) ** 0.5, (n, index, chi2)


def test_neighbours_do_not_stay_neighbours():
    out = permute(np.arange(20_000), 20_000, 1, 0)
    assert np.mean(np.abs(np.diff(out)) == 1) < 0.001


def test_the_hash_is_the_written_out_one():
    assert int(mix(np.uint64(0x9E3779B97F4A7C15))) == 0xE220A8397B1DCDAF  # first output of SplitMix64 seeded with 0
    assert len({int(hash64(*parts)) for parts in [(1, 2), (2, 1), (1, 2, 0), (12,), (1,), (0, 1, 2)]}) == 6


def test_each_epoch_reads_every_block_once_and_in_another_order(prepared):
    shards = Shards(prepared.shards["bert"])
    windows = Windows(shards, block_tokens=64, seed=5)
    orders = []
    for epoch in range(2):
        samples = np.arange(windows.blocks * 2) + epoch * windows.blocks * 2
        starts = windows.starts(windows.places(samples, 32))
        assert np.array_equal(np.diff(np.sort(starts)), np.full(len(starts) - 1, 32))
        orders.append(starts)
    assert not np.array_equal(orders[0], orders[1])


def test_phases_of_other_lengths_repeat_nothing_within_an_epoch(prepared):
    shards = Shards(prepared.shards["bert"])
    windows = Windows(shards, block_tokens=64, seed=5)
    half = windows.blocks // 2
    short = windows.starts(windows.places(np.arange(half * 4), 16))
    long = windows.starts(windows.places(np.arange(windows.blocks - half), 64, first_block=half))
    covered = np.concatenate([(short[:, None] + np.arange(16)).ravel(), (long[:, None] + np.arange(64)).ravel()])
    assert len(np.unique(covered)) == len(covered) == windows.blocks * 64


def test_the_stream_is_preceded_by_an_end_mark(prepared):
    shards = Shards(prepared.shards["byte"])
    windows = Windows(shards, 32, 0)
    rows = windows.rows(np.array([0, 1, 32]), 32, lead=1)
    stream = shards.gather(np.array([0]), 64)[0]
    assert rows[0, 0] == shards.specials["eod"] and np.array_equal(rows[0, 1:], stream[:32])
    assert np.array_equal(rows[1], stream[:33]) and np.array_equal(rows[2], stream[31:64])
