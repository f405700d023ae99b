"""Prefix LM, fill in the middle and hybrid: batches compared with slow loops over documents."""

from itertools import pairwise

import numpy as np
import pytest

from pretrain.errors import ConfigError
from pretrain.objectives import OBJECTIVES
from pretrain.objectives.causal_lm import CausalLM, CausalLMConfig
from pretrain.objectives.fill_in_middle import FillInMiddle, FillInMiddleConfig
from pretrain.objectives.hybrid import Hybrid, HybridConfig
from pretrain.objectives.prefix_lm import PrefixLM, PrefixLMConfig
from pretrain.order.rows import Rows, of_stream

END, MASK, PRE, SUF, MID = 2, 4, 5, 6, 7
SPECIALS = {"pad": 0, "unk": 1, "eod": END, "mask": MASK, "<fim_prefix>": PRE, "<fim_suffix>": SUF, "<fim_middle>": MID}
V, T = 1000, 64


def made(kind: str, seed: int = 1, **keys):
    config = OBJECTIVES[kind].Config(kind=kind, **keys)
    return OBJECTIVES[kind](config, SPECIALS, V, T, seed)


def stream_rows(count: int, seed: int = 0) -> Rows:
    """Windows of a stream whose documents have 0 to 39 tokens."""
    rng, ids = np.random.default_rng(seed), []
    while len(ids) < count * T + 1:
        ids += [*rng.integers(10, V, int(rng.integers(0, 40))).tolist(), END]
    ids = np.array(ids[: count * T + 1], np.int32)
    return of_stream(np.stack([ids[b * T : (b + 1) * T + 1] for b in range(count)]), END)


def packed_rows(count: int) -> Rows:
    """The same with a free end of 0 to 19 places in each window, as packed windows have."""
    rows = stream_rows(count)
    free = np.arange(T) >= T - np.arange(count)[:, None] % 20
    ids, before = np.where(free, 0, rows.ids), np.where(free, 0, rows.before)
    return Rows(ids, before, rows.begins & ~free, ~free)


ROWS = {"stream": stream_rows, "packed": packed_rows}


def documents(batch, row: int) -> list[slice]:
    """The places of each document of a window."""
    starts = [*np.flatnonzero(batch.position_ids[row] == 0).tolist(), T]
    return [slice(a, b) for a, b in pairwise(starts)]


@pytest.mark.parametrize("kind", ["prefix_lm", "fill_in_middle", "hybrid"])
@pytest.mark.parametrize("windows", ROWS)
def test_a_batch_is_a_function_of_rows_keys_and_seed(kind, windows):
    """Each window gets the same alone as among others, and another key or seed gives other draws."""
    rows, keys = ROWS[windows](40), np.arange(100, 140)
    whole = made(kind).batch(rows, keys)
    for b in (0, 7, 39):
        parts = {name: None if x is None else x[b : b + 1] for name, x in vars(rows).items()}
        alone = made(kind).batch(Rows(**parts), keys[b : b + 1])
        for name, array in vars(whole).items():
            one = getattr(alone, name)
            if name == "segments" and one is None:
                assert (array[b] == 0).all()
            else:
                assert (array is None) == (one is None) and (array is None or np.array_equal(array[b], one[0])), name
    for other in (made(kind).batch(rows, keys + 1000), made(kind, seed=2).batch(rows, keys)):
        assert not np.array_equal(other.weights, whole.weights) or not np.array_equal(other.inputs, whole.inputs)


@pytest.mark.parametrize("windows", ROWS)
def test_prefixes_have_the_share_that_was_drawn_and_targets_follow_them(windows):
    rows, keys = ROWS[windows](400), np.arange(400)
    batch = made("prefix_lm", shortest=0.2, longest=0.6).batch(rows, keys)
    causal = CausalLM(CausalLMConfig(kind="causal_lm"), SPECIALS, V, T, 1).batch(rows, keys)
    shares = []
    for row in range(400):
        for document in documents(batch, row):
            seen = batch.prefix[row, document]
            size = int(seen.sum())
            assert seen[:size].all(), "a prefix is a beginning"
            if len(seen) >= 20:
                shares.append(size / len(seen))
            text = 1 if causal.weights is None else causal.weights[row, document]
            expected = (np.arange(len(seen)) >= size - 1) * np.ones(len(seen)) * text
            assert np.array_equal(batch.weights[row, document], expected)
    assert min(shares) >= 0.2 - 1 / 20 and max(shares) <= 0.6
    assert abs(np.mean(shares) - 0.4) < 0.04 and np.std(shares) > 0.08
    for name in ("inputs", "targets", "segments", "position_ids"):
        assert np.array_equal(getattr(batch, name), getattr(causal, name))


@pytest.mark.parametrize("targets", ["all", "middle"])
@pytest.mark.parametrize("spm", [False, True], ids=["PSM", "SPM"])
@pytest.mark.parametrize("windows", ROWS)
def test_documents_are_rearranged_around_cuts_that_are_drawn_evenly(windows, spm, targets):
    """The cuts are read from the marks, and the rearrangement by lists at these cuts is what stands there."""
    rows, keys = ROWS[windows](600), np.arange(600)
    batch = made("fill_in_middle", rate=0.7, spm_rate=float(spm), targets=targets).batch(rows, keys)
    plain = CausalLM(CausalLMConfig(kind="causal_lm"), SPECIALS, V, T, 1).batch(rows, keys)
    moved, long, firsts, seconds = 0, 0, [], []
    for row in range(600):
        for document in documents(plain, row):
            before, after = plain.targets[row, document].tolist(), batch.targets[row, document].tolist()
            assert batch.inputs[row, document].tolist() == [plain.inputs[row, document][0], *after[:-1]]
            text = plain.weights is None or plain.weights[row, document][0] > 0
            ended = [END] if before[-1] == END else []
            kept = before[: len(before) - len(ended) - 3]
            asked = [float(text)] * len(after)
            long += bool(text and len(kept) >= 3)
            if after != before:
                assert text and len(kept) >= 3
                suffix, middle = after.index(SUF), after.index(MID)
                b = len(kept) - (middle - suffix - 1)
                weights = batch.weights[row, document] if targets == "middle" else None
                if not spm:
                    a = suffix - 1
                    assert after == [PRE, *kept[:a], SUF, *kept[b:], MID, *kept[a:b], *ended]
                else:
                    a = 0 if weights is None else b - int(weights.sum())
                    assert after == [PRE, SUF, *kept[b:], MID, *kept[:a], *kept[a:b], *ended]
                if targets == "middle":
                    asked = [0.0] * (3 + len(kept) - (b - a)) + [1.0] * (b - a) + [0.0] * len(ended)
                moved += 1
                firsts.append(a / len(kept))
                seconds.append(b / len(kept))
            weights = [1.0] * len(after) if batch.weights is None else batch.weights[row, document].tolist()
            assert weights == asked
    assert abs(moved / long - 0.7) < 0.04
    assert abs(np.mean(seconds) - 2 / 3) < 0.03
    if not spm or targets == "middle":
        assert abs(np.mean(firsts) - 1 / 3) < 0.03, "the two cuts are the smaller and the larger of two even draws"


def test_the_share_that_begins_with_its_suffix_is_the_one_asked_for():
    batch = made("fill_in_middle", rate=1.0, spm_rate=0.4).batch(stream_rows(600), np.arange(600))
    first = batch.targets[:, :-1] == PRE
    with_suffix = (batch.targets[:, 1:][first] == SUF).mean()
    assert 0.4 < with_suffix < 0.52, "and PSM with an empty prefix"


def test_held_out_documents_are_scored_on_their_middles():
    config = FillInMiddle.heldout(FillInMiddleConfig(kind="fill_in_middle"))
    batch = FillInMiddle(config, SPECIALS, V, T, 1).batch(stream_rows(50), np.arange(50))
    assert 0 < batch.weights.mean() < 0.5
    after_middle = (np.cumsum(batch.targets == MID, axis=1) > 0)[batch.weights > 0]
    assert after_middle.all()


def test_marks_that_the_tokenizer_lacks_are_named():
    with pytest.raises(ConfigError, match=r"objective.suffix_mark = <s>\n.*special_tokens: \[<fim_prefix>, <s>"):
        made("fill_in_middle", suffix_mark="<s>")


@pytest.mark.parametrize("windows", ROWS)
def test_hybrid_windows_are_masked_or_causal(windows):
    rows, keys = ROWS[windows](2000), np.arange(2000)
    batch = made("hybrid", masked_share=0.25, mask_ratio=0.2).batch(rows, keys)
    causal = CausalLM(CausalLMConfig(kind="causal_lm"), SPECIALS, V, T, 1).batch(rows, keys)
    both = batch.prefix.all(1)
    assert np.array_equal(both, batch.prefix.any(1)) and abs(both.mean() - 0.25) < 0.05
    text = np.ones(causal.targets.shape) if causal.weights is None else causal.weights
    assert np.array_equal(batch.weights[~both], text[~both])
    assert np.array_equal(batch.inputs[~both], causal.inputs[~both])
    assert np.array_equal(batch.targets, causal.targets)

    chosen = batch.weights[both] > 0
    assert (chosen.sum(1) <= round(0.2 * T)).all() and chosen.sum(1).mean() > 0.17 * T * text.mean()
    assert not chosen[:, -1].any()
    shown, true = batch.inputs[both][:, 1:], causal.inputs[both][:, 1:]
    assert np.array_equal(shown[~chosen[:, :-1]], true[~chosen[:, :-1]]), "only targets are replaced"
    assert np.array_equal(true[chosen[:, :-1]], batch.targets[both][chosen]), "the target is the next input"
    assert (causal.position_ids[both][:, 1:][chosen[:, :-1]] > 0).all(), "of the same document"
    given, truth = shown[chosen[:, :-1]], batch.targets[both][chosen]
    assert abs((given == MASK).mean() - 0.8) < 0.03 and abs((given == truth).mean() - 0.1) < 0.02


def test_held_out_hybrid_windows_show_every_target_as_the_mask():
    hybrid = Hybrid(Hybrid.heldout(HybridConfig(kind="hybrid")), SPECIALS, V, T, 1)
    batch = hybrid.batch(stream_rows(50), np.arange(50))
    assert batch.prefix.all() and (batch.inputs[:, 1:][batch.weights[:, :-1] > 0] == MASK).all()


def test_an_impossible_prefix_is_refused():
    with pytest.raises(ValueError, match=r"objective\.shortest = 0\.9 is more than objective\.longest = 0\.1"):
        PrefixLM.Config(kind="prefix_lm", shortest=0.9, longest=0.1)
    assert PrefixLM.heldout(PrefixLMConfig(kind="prefix_lm")).shortest == 0.5
