"""Span corruption: batches compared with slow loops over documents, no leaks, and what a decoder sees."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pretrain.errors import ConfigError
from pretrain.model.config import ModelConfig
from pretrain.model.encoder_decoder import EncoderDecoder
from pretrain.model.init import initialise
from pretrain.objectives.span_corruption import NOBODY, SpanCorruption, SpanCorruptionConfig
from pretrain.order.rows import Rows, of_stream

PAD, END, MARK = 0, 2, 3
SENTINELS = {f"<extra_id_{n}>": 100 - n for n in range(20)}
SPECIALS = {"pad": PAD, "unk": 1, "eod": END, **SENTINELS}
PAIRS = {**SPECIALS, "<output>": MARK}
V, T = 101, 64
TEXT = range(5, 80)
MODEL = {
    "causal": False,
    "layers": 2,
    "decoder_layers": 2,
    "width": 16,
    "heads": 2,
    "mlp_width": 24,
    "max_positions": T,
    "norm": "rmsnorm",
    "norm_position": "pre",
    "norm_eps": 1e-6,
    "positions": "relative",
    "mlp": "geglu_tanh",
    "bias": False,
    "tie_embeddings": False,
    "init_std": 0.5,
}


def objective(seed: int = 1, specials: dict[str, int] = SPECIALS, **keys) -> SpanCorruption:
    config = SpanCorruptionConfig(kind="span_corruption", **keys)
    return SpanCorruption(config, specials, V, T, seed)


def rows(count: int, packed: bool = False, longest: int = 40, pairs: float = 0) -> Rows:
    """Windows of a stream of documents, the share `pairs` of which are pairs; `packed`: with 0 to 19 free places."""
    rng, ids = np.random.default_rng(0), []
    while len(ids) < count * T + 1:
        ids += rng.integers(TEXT.start, TEXT.stop, int(rng.integers(0, longest))).tolist()
        if pairs and rng.random() < pairs:
            ids += [MARK, *rng.integers(TEXT.start, TEXT.stop, int(rng.integers(1, longest))).tolist()]
        ids.append(END)
    ids = np.array(ids[: count * T + 1], np.int32)
    found = of_stream(np.stack([ids[b * T : (b + 1) * T + 1] for b in range(count)]), END)
    if not packed:
        return found
    free = np.arange(T) >= T - np.arange(count)[:, None] % 20
    ids, before = np.where(free, PAD, found.ids), np.where(free, PAD, found.before)
    return Rows(ids, before, found.begins & ~free, ~free)


def parts_of(found: Rows, row: int) -> list[list[int]]:
    """The tokens of each document of a window, or of its part in it."""
    text = np.ones(T, bool) if found.text is None else found.text[row]
    parts: list[list[int]] = []
    for t in range(T):
        if text[t] and (found.begins[row, t] or not parts):
            parts.append([])
        if text[t]:
            parts[-1].append(int(found.ids[row, t]))
    return parts


def documents(numbers: np.ndarray) -> dict[int, np.ndarray]:
    return {int(n): numbers == n for n in np.unique(numbers) if n != NOBODY}


@pytest.mark.parametrize("packed", [False, True])
def test_sentinels_and_spans_put_together_are_the_document(packed):
    found = rows(300, packed)
    batch = objective().batch(found, np.arange(300))
    order = {token: n for n, token in enumerate(SENTINELS.values())}
    share = []
    for row in range(300):
        if (batch.segments[row] != NOBODY).all():
            continue  # the encoder may have no room for all of it: see below
        parts, read = parts_of(found, row), documents(batch.segments[row])
        written = documents(batch.written_segments[row])
        assert len(read) == len(parts) and set(written) <= set(read)
        missing = 0
        for n, part in enumerate(parts):
            ids = batch.inputs[row, read[n]].tolist()
            said = batch.targets[row, written[n]].tolist() if n in written else []
            assert (batch.position_ids[row, read[n]] == np.arange(len(ids))).all()
            if not said:
                assert ids == part
                continue
            assert said[-1] == END and batch.weights[row, written[n]].all()
            given = batch.written[row, written[n]].tolist()
            assert given == [PAD, *said[:-1]]
            assert (batch.written_positions[row, written[n]] == np.arange(len(said))).all()
            spans: list[list[int]] = []
            for token in said[:-1]:
                if token in order:
                    assert order[token] == len(spans)
                    spans.append([])
                else:
                    spans[-1].append(token)
            assert all(spans) and all(END not in span for span in spans)
            missing += sum(map(len, spans))
            whole = []
            for token in ids:
                whole += spans[order[token]] if token in order else [token]
            assert whole == part
        share.append(missing / T)
        places = batch.places[row][batch.segments[row] != NOBODY]
        kept = ~np.isin(batch.inputs[row][: len(places)], list(order))
        assert (found.ids[row, places][kept] == batch.inputs[row][: len(places)][kept]).all()
    assert len(share) > 280
    if not packed:
        ends = (found.ids == END).mean()
        assert abs(np.mean(share) - 10 / T * (1 - ends)) < 0.005


def test_every_place_is_missing_with_the_same_probability_and_spans_have_their_mean():
    ids = np.full((4000, T + 1), 7, np.int32)
    made = objective()
    batch = made.batch(of_stream(ids, END), np.arange(4000))
    missing = np.ones((4000, T), bool)
    for row in range(4000):
        missing[row, batch.places[row][batch.segments[row] != NOBODY]] = False
    sentinel = np.isin(batch.inputs, list(SENTINELS.values()))
    rows_, at = sentinel.nonzero()
    missing[rows_, batch.places[rows_, at]] = True
    assert (missing.sum(1) == made.noise).all()
    assert missing.mean(0).min() > 0.12 and missing.mean(0).max() < 0.19
    spans = sentinel.sum(1)
    assert set(spans.tolist()) <= {made.spans, made.spans + 1}, "one more where the pattern is turned inside of a span"


def test_windows_of_many_short_documents_are_cut_and_keep_their_shape():
    found = rows(200, longest=4)
    made = objective(noise_ratio=0.5, mean_span=2)
    batch = made.batch(found, np.arange(200))
    assert batch.inputs.shape == (200, made.read) and batch.targets.shape == (200, made.targets)
    cut = 0
    for row in range(200):
        parts, read = parts_of(found, row), documents(batch.segments[row])
        cut += len(read) < len(parts)
        for n, at in documents(batch.written_segments[row]).items():
            said = batch.targets[row, at].tolist()
            assert set(said) - {END} - set(SENTINELS.values()) <= set(parts[n])
    assert batch.weights.sum(1).max() <= made.targets


def test_a_window_is_corrupted_alike_alone_and_among_others_and_otherwise_with_another_seed():
    found, keys = rows(20), np.arange(50, 70)
    whole = objective().batch(found, keys)
    for b in (0, 11):
        parts = {name: None if x is None else x[b : b + 1] for name, x in vars(found).items()}
        alone = objective().batch(Rows(**parts), keys[b : b + 1])
        for name, array in vars(whole).items():
            assert array is None or np.array_equal(array[b], getattr(alone, name)[0]), name
    for other in (objective(seed=2).batch(found, keys), objective().batch(found, keys + 100)):
        assert not np.array_equal(other.inputs, whole.inputs)


def test_held_out_text_is_scored_on_the_tokens_of_spans_alone():
    config = SpanCorruption.heldout(SpanCorruptionConfig(kind="span_corruption", noise_ratio=0.5))
    made = SpanCorruption(config, SPECIALS, V, T, 1)
    batch = made.batch(rows(50), np.arange(50))
    assert made.noise == 10 and np.isin(batch.targets[batch.weights > 0], list(TEXT)).all()
    assert (batch.weights.sum(1) <= 10).all() and batch.weights.sum() > 400


def test_the_end_mark_of_a_document_is_its_last_target_and_marks_of_text_are_not_missing():
    found = rows(100)
    batch = objective().batch(found, np.arange(100))
    for row in range(100):
        assert (batch.inputs[row] == END).sum() == (found.ids[row] == END).sum()


def test_a_vocabulary_without_enough_sentinels_is_refused_with_the_number():
    few = {name: token for name, token in SPECIALS.items() if name != "<extra_id_3>"}
    with pytest.raises(ConfigError, match="sentinels") as error:
        SpanCorruption(SpanCorruptionConfig(kind="span_corruption"), few, V, T, 1)
    assert "has up to 4 missing spans; the tokenizer has no <extra_id_3>" in str(error.value)


@pytest.mark.parametrize("packed", [False, True])
def test_pairs_are_read_and_written_as_they_are_beside_text(packed):
    """A slow loop over the parts of windows. A part with the mark is left out if its input has lost its beginning."""
    found = rows(300, packed, 25, pairs=0.5)
    batch = objective(specials=PAIRS).batch(found, np.arange(300))
    assert batch.inputs.shape == batch.targets.shape == (300, T)
    seen = dict.fromkeys(("pair", "left out", "cut output", "text", "corrupted"), 0)
    for row in range(300):
        read, written = documents(batch.segments[row]), documents(batch.written_segments[row])
        for n, part in enumerate(parts_of(found, row)):
            ids = batch.inputs[row, read[n]].tolist() if n in read else []
            said = batch.targets[row, written[n]].tolist() if n in written else []
            if said:
                assert batch.written[row, written[n]].tolist() == [PAD, *said[:-1]]
                assert (batch.written_positions[row, written[n]] == np.arange(len(said))).all()
                assert batch.weights[row, written[n]].all()
            if MARK not in part:
                seen["text"] += 1
                seen["corrupted"] += bool(said)
                assert not said or not set(said) - {END} - set(SENTINELS.values()) - set(part)
                assert len(ids) <= len(part) and not {MARK, *said} <= {END}
            elif n == 0 and found.before[row, 0] != END:
                seen["left out"] += 1
                assert not ids and not said
            else:
                at = part.index(MARK)
                output = part[at + 1 :]
                output = output[: output.index(END) + 1] if END in output else output
                assert ids == [*part[:at], END] and said == output
                assert (batch.position_ids[row, read[n]] == np.arange(at + 1)).all()
                seen["pair"] += 1
                seen["cut output"] += END not in output
        assert batch.weights[row].sum() == sum(at.sum() for at in written.values())
    assert min(seen.values()) > 50, seen


def test_text_beside_pairs_is_corrupted_as_it_is_without_them():
    found = rows(200)
    with_mark, without = (objective(specials=s).batch(found, np.arange(200)) for s in (PAIRS, SPECIALS))
    written = without.weights.shape[1]
    same = (without.weights[:, -1] == 0) & (without.segments[:, -1] == NOBODY)  # there was room for all
    assert same.sum() > 150 and np.array_equal(with_mark.targets[same, :written], without.targets[same])
    assert np.array_equal(with_mark.inputs[:, : without.inputs.shape[1]], without.inputs)


def test_longer_outputs_than_the_decoder_has_room_for_are_cut_at_their_end():
    found = rows(50, pairs=0.9)
    whole, cut = (objective(specials=PAIRS, **keys).batch(found, np.arange(50)) for keys in ({}, {"target_tokens": 8}))
    for name in ("targets", "weights", "written", "written_segments", "target_index"):
        assert np.array_equal(getattr(cut, name), getattr(whole, name)[:, :8]), name
    assert np.array_equal(cut.inputs, whole.inputs) and (whole.weights[:, 8:] > 0).any()


def test_what_the_encoder_has_no_room_for_is_not_written():
    """Documents of at most 3 tokens: with as many sentinels as that, some text is left out."""
    batch = objective(noise_ratio=0.3, mean_span=1.5).batch(rows(300, longest=4), np.arange(300))
    assert (batch.segments[:, -1] != NOBODY).sum() > 10
    for row in range(300):
        read, written = (set(numbers[row].tolist()) - {NOBODY} for numbers in (batch.segments, batch.written_segments))
        assert written <= read


def test_no_sentinel_stands_for_two_spans_where_special_tokens_cut_them():
    ids = np.full((200, T + 1), 7, np.int32)
    ids[:, ::2] = SPECIALS["unk"]
    batch = objective(noise_ratio=0.5, mean_span=8).batch(of_stream(ids, END), np.arange(200))
    sentinels = np.isin(batch.inputs, list(SENTINELS.values()))
    for row in range(200):
        found = batch.inputs[row][sentinels[row]].tolist()
        assert len(set(found)) == len(found) > 0


def test_held_out_pairs_are_scored_on_the_tokens_of_their_outputs():
    config = SpanCorruption.heldout(SpanCorruptionConfig(kind="span_corruption", target_tokens=3))
    made = SpanCorruption(config, PAIRS, V, T, 1)
    batch = made.batch(rows(50, pairs=1.0), np.arange(50))
    scored = batch.targets[batch.weights > 0]
    assert made.targets == T and np.isin(scored, list(TEXT)).all()
    assert scored.size > (np.isin(batch.inputs, list(TEXT)) & (batch.segments != NOBODY)).sum() / 2


def test_a_pair_mark_that_is_no_special_token_is_refused_unless_it_is_the_default():
    with pytest.raises(ConfigError, match=r"objective\.pair_mark = <answer> is no special token"):
        objective(specials=PAIRS, pair_mark="<answer>")
    assert objective(pair_mark="<output>").targets < T == objective(specials=PAIRS).targets


def model() -> EncoderDecoder:
    built = EncoderDecoder(ModelConfig(**MODEL), V)
    initialise(built, 3)
    return built.eval()


@pytest.mark.parametrize(("packed", "pairs"), [(False, 0), (True, 0), (True, 0.5)])
def test_no_document_reaches_another(packed, pairs):
    """All that is read and written of one document changes. The answers for the others stay, to the last bit."""
    made, built = objective(specials=PAIRS), model()
    batch = made.batch(rows(2, packed, 20, pairs), np.arange(2)).to(torch.device("cpu"))
    before, reached = made._rows(built, batch), 0
    for row in range(2):
        for number in batch.segments[row].unique().tolist():
            moved = {}
            for name, documents_ in (("inputs", "segments"), ("written", "written_segments")):
                inside = torch.zeros_like(getattr(batch, name), dtype=torch.bool)
                inside[row] = getattr(batch, documents_)[row] == number
                moved[name] = torch.where(inside, (getattr(batch, name) + 23) % V, getattr(batch, name))
            after = made._rows(built, dataclasses.replace(batch, **moved))
            assert torch.equal(before[~inside], after[~inside])
            reached += inside.any() and not torch.equal(before[inside], after[inside])
    assert reached > 4
    leaking = {name: torch.zeros_like(getattr(batch, name)) for name in ("segments", "written_segments")}
    assert not torch.equal(made._rows(built, dataclasses.replace(batch, **leaking)), before), "it would find a leak"


def test_a_target_sees_what_was_written_before_it_and_all_that_is_read_of_its_document():
    made, built = objective(), model()
    batch = made.batch(rows(1, longest=40), np.arange(1)).to(torch.device("cpu"))
    before = made._rows(built, batch)[0]
    for slot in range(0, made.targets, 3):
        written = batch.written.clone()
        written[0, slot] = (written[0, slot] + 23) % V
        moved = (made._rows(built, dataclasses.replace(batch, written=written))[0] != before).any(-1)
        same = batch.written_segments[0] == batch.written_segments[0, slot]
        assert torch.equal(moved, same & (torch.arange(made.targets) >= slot))
    for at in range(0, made.read, 7):
        inputs = batch.inputs.clone()
        inputs[0, at] = (inputs[0, at] + 23) % V
        moved = (made._rows(built, dataclasses.replace(batch, inputs=inputs))[0] != before).any(-1)
        if batch.segments[0, at] != NOBODY:
            assert torch.equal(moved, batch.written_segments[0] == batch.segments[0, at])


def test_the_loss_is_the_cross_entropy_of_what_is_written():
    made, built = objective(), model()
    batch = made.batch(rows(3, True), np.arange(3)).to(torch.device("cpu"))
    logits = built.logits(made._rows(built, batch))
    nll = F.cross_entropy(logits.transpose(1, 2), batch.targets.long(), reduction="none")
    torch.testing.assert_close(made.loss(built, batch)["loss"], (nll * batch.weights).sum())
    assert torch.isfinite(logits).all()
    torch.testing.assert_close(made.score(built, batch)["nll"], nll)
