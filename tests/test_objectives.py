"""What is asked of the model, counted: which positions, what they show, where documents begin."""

import numpy as np
import pytest
import torch

from pretrain.errors import ConfigError
from pretrain.objectives import CausalLM, CausalLMConfig, MaskedLM, MaskedLMConfig, layout

SPECIALS = {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
V = 1000


def masked(T=64, seed=1, **kwargs) -> MaskedLM:
    return MaskedLM(MaskedLMConfig(kind="masked_lm", **kwargs), SPECIALS, V, T, seed)


def rows(B: int, T: int) -> np.ndarray:
    """Ids that name their place: row b, position t holds 5 + (b + 7t) mod 900, a document every 20 tokens."""
    b, t = np.arange(B)[:, None], np.arange(T)[None]
    ids = (5 + (b + 7 * t) % 900).astype(np.int32)
    ids[:, 19::20], ids[:, 20::20] = SPECIALS["sep"], SPECIALS["cls"]
    return ids


def test_every_row_has_exactly_k_targets_and_they_are_what_stood_there():
    ids = rows(200, 64)
    batch = masked(mask_ratio=0.3).batch(ids, np.arange(200))
    assert batch.targets.shape == (200, 19) and bool((batch.weights == 1).all())
    assert np.array_equal(np.take_along_axis(ids, batch.target_index.numpy(), 1), batch.targets.numpy())
    assert all(len(set(row)) == 19 for row in batch.target_index.tolist())
    assert not np.isin(batch.targets.numpy(), list(SPECIALS.values())).any()


def test_what_is_not_a_target_is_shown_as_it_is_between_the_marks():
    ids = rows(50, 64)
    batch = masked().batch(ids, np.arange(50))
    shown = batch.inputs.numpy().copy()
    np.put_along_axis(shown, batch.target_index.numpy(), batch.targets.numpy(), 1)
    assert np.array_equal(shown[:, 1:-1], ids[:, 1:-1])
    assert (shown[:, 0] == SPECIALS["cls"]).all() and (shown[:, -1] == SPECIALS["sep"]).all()


def test_targets_are_shown_as_mask_random_and_unchanged_in_80_10_10():
    ids = rows(4000, 64)
    batch = masked(mask_ratio=0.3).batch(ids, np.arange(4000))
    shown = np.take_along_axis(batch.inputs.numpy(), batch.target_index.numpy(), 1)
    n = shown.size
    sigma = (0.1 * 0.9 / n) ** 0.5
    assert abs(np.mean(shown == SPECIALS["mask"]) - 0.8) < 5 * sigma * 4 / 3
    assert abs(np.mean(shown == batch.targets.numpy()) - (0.1 + 0.1 / (V - 5))) < 5 * sigma
    other = shown[(shown != SPECIALS["mask"]) & (shown != batch.targets.numpy())]
    assert not np.isin(other, list(SPECIALS.values())).any()
    assert np.bincount(other, minlength=V)[5:].min() > 0  # every ordinary token is drawn


def test_every_position_that_holds_text_is_drawn_alike():
    batch = masked(mask_ratio=0.3).batch(rows(8000, 64), np.arange(8000))
    counts = np.bincount(batch.target_index.numpy().ravel(), minlength=64)
    text = np.ones(64, bool)
    text[[0, 63, 19, 20, 39, 40, 59, 60]] = False
    assert (counts[~text] == 0).all()
    expected = 8000 * 19 / text.sum()
    chi2 = float(((counts[text] - expected) ** 2 / expected).sum())
    assert chi2 < text.sum() - 1 + 5 * (2 * (text.sum() - 1)) ** 0.5


def test_masks_of_another_epoch_another_seed_and_another_sample_are_independent():
    ids = np.tile(rows(1, 64), (2000, 1))
    chosen = masked(mask_ratio=0.3).batch(ids, np.arange(2000)).target_index.numpy()
    other = masked(mask_ratio=0.3, seed=2).batch(ids, np.arange(2000)).target_index.numpy()
    text = 56
    for a, b in ((chosen[:-1], chosen[1:]), (chosen, other)):
        shared = np.mean([len(set(x) & set(y)) for x, y in zip(a.tolist(), b.tolist(), strict=True)])
        assert abs(shared - 19 * 19 / text) < 0.3  # hypergeometric mean 6.45; σ of this average is 0.04
    again = masked(mask_ratio=0.3).batch(ids[5:7], np.arange(5, 7)).target_index.numpy()
    assert np.array_equal(again, chosen[5:7])


def test_a_window_of_almost_only_marks_leaves_slots_empty():
    ids = np.full((1, 64), SPECIALS["sep"], np.int32)
    ids[0, 10:14] = [50, 51, 52, 53]
    batch = masked(mask_ratio=0.3).batch(ids, np.zeros(1, np.int64))
    assert batch.filled() == 4 and sorted(batch.targets[batch.weights > 0].tolist()) == [50, 51, 52, 53]


def test_masked_lm_needs_a_mask_token():
    with pytest.raises(ConfigError, match="needs a vocabulary with a mask token"):
        MaskedLM(MaskedLMConfig(kind="masked_lm"), {"pad": 0, "eod": 2}, V, 64, 0)


def test_causal_targets_are_the_next_tokens_and_documents_begin_at_their_end_mark():
    objective = CausalLM(CausalLMConfig(kind="causal_lm"), {"pad": 0, "unk": 1, "eod": 2}, V, 8, 0)
    batch = objective.batch(np.array([[9, 10, 11, 2, 20, 21, 2, 30, 31]], np.int32), np.zeros(1, np.int64))
    assert batch.inputs.tolist() == [[9, 10, 11, 2, 20, 21, 2, 30]]
    assert batch.targets.tolist() == [[10, 11, 2, 20, 21, 2, 30, 31]]
    assert batch.segments.tolist() == [[0, 0, 0, 1, 1, 1, 2, 2]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 0, 1]]
    assert batch.weights is None and batch.filled() == 8


def test_layout_numbers_documents_and_restarts_positions():
    starts = np.array([[1, 0, 0, 1, 0], [0, 0, 1, 1, 0]], bool)
    segments, positions = layout(starts)
    assert segments.tolist() == [[1, 1, 1, 2, 2], [0, 0, 1, 2, 2]]
    assert positions.tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 0, 1]]


def test_batches_move_between_devices_whole():
    batch = masked().batch(rows(2, 64), np.arange(2))
    moved = batch.to(torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(vars(batch).values(), vars(moved).values(), strict=True))
