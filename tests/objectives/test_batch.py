"""Batches, counted: the positions of targets, the tokens shown there, and the begins of documents."""

import numpy as np
import pytest
import torch

from pretrain.errors import ConfigError
from pretrain.model.attention import Layout
from pretrain.objectives.batch import documents
from pretrain.objectives.causal_lm import CausalLM, CausalLMConfig
from pretrain.objectives.masked_lm import MaskedLM, MaskedLMConfig
from pretrain.order.rows import Rows, of_stream

SPECIALS = {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
V = 1000


def masked(T=64, seed=1, **kwargs) -> MaskedLM:
    return MaskedLM(MaskedLMConfig(kind="masked_lm", **kwargs), SPECIALS, V, T, seed)


def rows(B: int, T: int) -> np.ndarray:
    """Ids that tell their place: row b, position t holds 5 + (b + 7t) mod 900. A document ends every 20 tokens."""
    b, t = np.arange(B)[:, None], np.arange(T)[None]
    ids = (5 + (b + 7 * t) % 900).astype(np.int32)
    ids[:, 19::20], ids[:, 20::20] = SPECIALS["sep"], SPECIALS["cls"]
    return ids


def shown(objective: MaskedLM, ids: np.ndarray, keys: np.ndarray, words: np.ndarray | None = None):
    """The batch of windows that hold `ids` (B, T). The token before each window is any token of text."""
    return objective.batch(of_stream(np.concatenate([ids[:, 1:2], ids], axis=1), SPECIALS["sep"], words), keys)


def test_every_row_has_exactly_k_targets_and_they_are_what_stood_there():
    ids = rows(200, 64)
    batch = shown(masked(mask_ratio=0.3), ids, np.arange(200))
    assert batch.targets.shape == (200, 19) and bool((batch.weights == 1).all())
    assert np.array_equal(np.take_along_axis(ids, batch.target_index, 1), batch.targets)
    assert all(len(set(row)) == 19 for row in batch.target_index.tolist())
    assert not np.isin(batch.targets, list(SPECIALS.values())).any()


def test_what_is_not_a_target_is_shown_as_it_is_between_the_marks():
    ids = rows(50, 64)
    batch = shown(masked(), ids, np.arange(50))
    restored = batch.inputs.copy()
    np.put_along_axis(restored, batch.target_index, batch.targets, 1)
    assert np.array_equal(restored[:, 1:-1], ids[:, 1:-1])
    assert (restored[:, 0] == SPECIALS["cls"]).all() and (restored[:, -1] == SPECIALS["sep"]).all()


def test_targets_are_shown_as_mask_random_and_unchanged_in_80_10_10():
    ids = rows(4000, 64)
    batch = shown(masked(mask_ratio=0.3), ids, np.arange(4000))
    given = np.take_along_axis(batch.inputs, batch.target_index, 1)
    n = given.size
    sigma = (0.1 * 0.9 / n) ** 0.5
    assert abs(np.mean(given == SPECIALS["mask"]) - 0.8) < 5 * sigma * 4 / 3
    assert abs(np.mean(given == batch.targets) - (0.1 + 0.1 / (V - 5))) < 5 * sigma
    other = given[(given != SPECIALS["mask"]) & (given != batch.targets)]
    assert not np.isin(other, list(SPECIALS.values())).any()
    assert np.bincount(other, minlength=V)[5:].min() > 0  # every ordinary token is drawn


def test_every_position_that_holds_text_is_drawn_alike():
    batch = shown(masked(mask_ratio=0.3), rows(8000, 64), np.arange(8000))
    counts = np.bincount(batch.target_index.ravel(), minlength=64)
    text = np.ones(64, bool)
    text[[0, 63, 19, 20, 39, 40, 59, 60]] = False
    assert (counts[~text] == 0).all()
    expected = 8000 * 19 / text.sum()
    chi2 = float(((counts[text] - expected) ** 2 / expected).sum())
    assert chi2 < text.sum() - 1 + 5 * (2 * (text.sum() - 1)) ** 0.5


def test_masks_of_another_epoch_another_seed_and_another_sample_are_independent():
    ids = np.tile(rows(1, 64), (2000, 1))
    chosen = shown(masked(mask_ratio=0.3), ids, np.arange(2000)).target_index
    other = shown(masked(mask_ratio=0.3, seed=2), ids, np.arange(2000)).target_index
    text = 56
    for a, b in ((chosen[:-1], chosen[1:]), (chosen, other)):
        shared = np.mean([len(set(x) & set(y)) for x, y in zip(a.tolist(), b.tolist(), strict=True)])
        assert abs(shared - 19 * 19 / text) < 0.3  # hypergeometric mean 6.45; σ of this average is 0.04
    again = shown(masked(mask_ratio=0.3), ids[5:7], np.arange(5, 7)).target_index
    assert np.array_equal(again, chosen[5:7])


def test_a_window_of_almost_only_marks_leaves_slots_empty():
    ids = np.full((1, 64), SPECIALS["unk"], np.int32)
    ids[0, 10:14] = [50, 51, 52, 53]
    batch = shown(masked(mask_ratio=0.3), ids, np.zeros(1, np.int64))
    assert batch.filled() == 4 and sorted(batch.targets[batch.weights > 0].tolist()) == [50, 51, 52, 53]


def test_masked_lm_needs_a_mask_token():
    with pytest.raises(ConfigError, match="needs a vocabulary with a mask token"):
        MaskedLM(MaskedLMConfig(kind="masked_lm"), {"pad": 0, "eod": 2}, V, 64, 0)


def test_causal_targets_are_the_next_tokens_and_documents_begin_at_their_end_mark():
    objective = CausalLM(CausalLMConfig(kind="causal_lm"), {"pad": 0, "unk": 1, "eod": 2}, V, 8, 0)
    batch = objective.batch(
        of_stream(np.array([[9, 10, 11, 2, 20, 21, 2, 30, 31]], np.int32), 2), np.zeros(1, np.int64)
    )
    assert batch.inputs.tolist() == [[9, 10, 11, 2, 20, 21, 2, 30]]
    assert batch.targets.tolist() == [[10, 11, 2, 20, 21, 2, 30, 31]]
    assert batch.segments.tolist() == [[0, 0, 0, 1, 1, 1, 2, 2]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 0, 1]]
    assert batch.weights is None and batch.filled() == 8


def test_layout_numbers_documents_and_restarts_positions():
    starts = np.array([[1, 0, 0, 1, 0], [0, 0, 1, 1, 0]], bool)
    segments, positions = documents(starts)
    assert segments.tolist() == [[0, 0, 0, 1, 1], [0, 0, 1, 2, 2]]
    assert positions.tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 0, 1]]


@pytest.mark.parametrize("kind", ["masked", "causal"])
def test_a_batch_says_on_the_host_that_each_of_its_windows_holds_one_document(kind):
    """Segments are None only then: one more document in a window, or one place of padding, brings them back."""
    causal = CausalLM(CausalLMConfig(kind="causal_lm"), {"pad": 0, "unk": 1, "eod": 2}, V, 8, 0)
    objective = causal if kind == "causal" else masked(T=8)
    end = 2 if kind == "causal" else SPECIALS["sep"]
    tokens = np.arange(10, 10 + 2 * 9, dtype=np.int32).reshape(2, -1)

    def segments(rows: Rows) -> np.ndarray | None:
        return objective.batch(rows, np.arange(2)).segments

    assert segments(of_stream(tokens, end)) is None
    tokens[0, 0] = end  # a document that begins at the begin of a window is still alone in it
    whole = objective.batch(of_stream(tokens, end), np.arange(2))
    assert whole.segments is None and whole.position_ids.tolist() == [list(range(8))] * 2
    tokens[1, 4] = end
    assert [len(set(row)) for row in segments(of_stream(tokens, end)).tolist()] == [1, 2]

    begins, text = np.zeros((2, 8), bool), np.ones((2, 8), bool)
    begins[:, 0] = True
    tokens[1, 4] = 99
    assert segments(Rows(tokens[:, 1:], tokens[:, :-1], begins, text)) is None
    text[1, 7] = False
    assert [len(set(row)) for row in segments(Rows(tokens[:, 1:], tokens[:, :-1], begins, text)).tolist()] == [1, 2]


def test_batches_move_between_devices_whole():
    batch = shown(masked(), rows(2, 64), np.arange(2))
    moved = batch.to(torch.device("cpu"))
    for name, array in vars(batch).items():
        assert array is None or torch.equal(torch.from_numpy(array), getattr(moved, name)), name


def test_a_batch_that_is_moved_knows_where_its_documents_begin():
    """On the host, where the device need not be asked. Chosen windows of it forget that."""
    batch = shown(masked(), rows(4, 64), np.arange(4))
    moved = batch.to(torch.device("cpu"))
    counted = Layout(moved.segments, moved.position_ids, causal=False).offsets()
    assert len(counted) > 5 and moved.offsets.dtype == counted.dtype and torch.equal(moved.offsets, counted)
    assert moved.to(torch.device("cpu")).offsets is moved.offsets
    assert masked().layout(moved).offsets() is moved.offsets
    assert moved.rows(slice(1, 2)).offsets is None


# Words and spans


def worded(B: int, T: int) -> tuple[np.ndarray, np.ndarray]:
    """`rows` with words of 1, 2, 3, 4, 1, 2 … tokens: (ids, the begins of words)."""
    starts = np.cumsum([0] + [1 + n % 4 for n in range(T)])
    begins = np.zeros(T, bool)
    begins[starts[starts < T]] = True
    return rows(B, T), np.tile(begins, (B, 1))


WHOLE = {"word": {"unit": "word"}, "span": {"span": {}}, "word span": {"unit": "word", "span": {}}}


@pytest.mark.parametrize("kind", WHOLE)
def test_a_word_or_span_is_shown_in_one_way_and_80_10_10_of_them_are(kind):
    n, T = 4000, 64
    ids, begins = worded(n, T)
    objective = masked(T=T, mask_ratio=0.3, mask_share=0.7, random_share=0.2, **WHOLE[kind])
    words = begins if objective.wants_words else None
    batch = shown(objective, ids, np.arange(n), words)
    assert batch.targets.shape == (n, 19) and bool((batch.weights == 1).all())
    at = batch.target_index
    assert np.array_equal(np.take_along_axis(ids, at, 1), batch.targets)
    given = np.take_along_axis(batch.inputs, at, 1)
    # 0: [MASK], 1: another token, 2: itself (or, one time in 995, a random token that is the same)
    how = np.where(given == SPECIALS["mask"], 0, np.where(given != batch.targets, 1, 2))
    share = np.bincount(how.ravel(), minlength=3) / how.size
    assert np.abs(share - [0.7, 0.2, 0.1]).max() < 0.02  # units of up to 40 tokens: σ below 0.004
    neighbours = np.diff(at, axis=1) == 1
    if kind == "word":
        number = np.take_along_axis(np.cumsum(begins, axis=1), at, 1)
        together = neighbours & (np.diff(number, axis=1) == 0)
    else:
        together = neighbours
    differ = (np.diff(how, axis=1) != 0) & together
    # If each token were drawn alone, 1 - 0.49 - 0.04 - 0.01 = 46 % would differ. Tokens of two touching spans may.
    limit = {"word": 0.001, "span": 0.12, "word span": 0.12}[kind]
    assert together.sum() > 10_000 and differ.sum() / together.sum() < limit


@pytest.mark.parametrize("kind", WHOLE)
def test_words_and_spans_of_the_next_epoch_are_others(kind):
    """The same 2,000 windows at other places of the run share as many targets as chance gives."""
    n, T = 2000, 64
    ids, begins = worded(1, T)
    ids, begins = np.tile(ids, (n, 1)), np.tile(begins, (n, 1))
    objective = masked(T=T, mask_ratio=0.3, **WHOLE[kind])
    words = begins if objective.wants_words else None
    now = shown(objective, ids, np.arange(n), words).target_index
    later = shown(objective, ids, np.arange(n) + 10**9, words).target_index
    tables = np.zeros((2, n, T), bool)
    for table, at in zip(tables, (now, later), strict=True):
        np.put_along_axis(table, at, True, axis=1)
    shared = (tables[0] & tables[1]).sum(axis=1).mean()
    assert abs(shared - 19 * 19 / 56) < 0.5, shared  # σ of this mean: 0.1 for spans
    assert np.array_equal(
        shown(objective, ids[:9], np.arange(9), None if words is None else words[:9]).inputs,
        shown(objective, ids, np.arange(n), words).inputs[:9],
    )


def test_all_targets_can_be_masks():
    ids = rows(300, 64)
    batch = shown(masked(mask_ratio=0.3, mask_share=1, random_share=0), ids, np.arange(300))
    assert (np.take_along_axis(batch.inputs, batch.target_index, 1) == SPECIALS["mask"]).all()
    assert (batch.inputs == SPECIALS["mask"]).sum() == 300 * 19


def test_lengths_and_layout_are_those_of_plain_masks():
    ids, begins = worded(20, 64)
    plain = shown(masked(mask_ratio=0.3), ids, np.arange(20))
    for settings in WHOLE.values():
        objective = masked(mask_ratio=0.3, **settings)
        batch = shown(objective, ids, np.arange(20), begins if objective.wants_words else None)
        for name in ("inputs", "targets", "target_index", "weights", "segments", "position_ids"):
            assert getattr(batch, name).shape == getattr(plain, name).shape
            assert getattr(batch, name).dtype == getattr(plain, name).dtype
        assert np.array_equal(batch.segments, plain.segments)
        assert np.array_equal(batch.position_ids, plain.position_ids)


def test_the_masks_of_earlier_versions_are_drawn_again():
    """The positions and tokens of window 7 with seed 1 are a promise: they are as before words and spans existed."""
    batch = shown(masked(T=16, mask_ratio=0.4), rows(8, 16), np.arange(8))
    assert batch.target_index[7].tolist() == [1, 2, 5, 9, 11, 14]
    assert batch.inputs[7].tolist() == [2, 4, 4, 33, 40, 47, 54, 61, 68, 4, 82, 4, 96, 103, 4, 3]
