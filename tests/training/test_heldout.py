"""Held-out scores, compared with slow, independent sums."""

import itertools
import math

import numpy as np
import pytest
import torch

from pretrain.errors import ConfigError
from pretrain.model.attention import Layout
from pretrain.model.config import ModelConfig
from pretrain.model.init import initialise
from pretrain.model.transformer import Transformer
from pretrain.objectives.causal_lm import CONTINUED_TOKENS, CausalLMConfig
from pretrain.objectives.learner import Learner
from pretrain.objectives.masked_lm import MaskedLMConfig
from pretrain.shards import Shards
from pretrain.tokenizer import open_tokenizer
from pretrain.training.engine.config import EngineConfig
from pretrain.training.engine.local import LocalEngine
from pretrain.training.engine.ranks import World
from pretrain.training.heldout import HeldOut, counted, entropy
from pretrain.training.optim.adamw import AdamW, AdamWConfig
from pretrain.training.previews import preview_texts
from tests.conftest import DECODER, ENCODER, run_values
from tests.helpers import cases
from tests.helpers.ranks import on_ranks

T = 32


def engine_of(values: dict, vocab_size: int) -> LocalEngine:
    model = Transformer(ModelConfig(**values), vocab_size)
    initialise(model, 5)
    return LocalEngine(Learner(model), AdamW(AdamWConfig(lr=1.0)), EngineConfig(micro_batch=1), 1.0, World())


CAUSAL, MASKED = CausalLMConfig(kind="causal_lm"), MaskedLMConfig(kind="masked_lm")


def contexts(heldout: HeldOut, packed: bool) -> list[list[tuple[int, int, int]]]:
    """For each window its documents in the stream, (first, last), and the position from which on they count."""
    shards, found = heldout.windows.shards, []
    if packed:
        windows = heldout.windows
        places = np.arange(windows.blocks)[:, None] * windows.block_tokens + np.arange(windows.per_block(T))
        for start in windows.starts(places.ravel()).tolist():
            parts = windows.parts(start, T)
            found.append([(part.start, part.start + part.tokens, part.start) for part in parts])
        return found
    ends = {0, *(shards.span(n)[1] for n in range(shards.documents))}
    scored = 0
    # The last window is moved back to be whole; its tokens are scored with the context that gives them.
    for start in [*range(0, shards.tokens - T, T), shards.tokens - T]:
        cuts = [at for at in range(start, start + T) if at == start or at in ends] + [start + T]
        found.append([(a, b, max(a, scored)) for a, b in itertools.pairwise(cuts) if b > scored])
        scored = start + T
    return found


@pytest.mark.parametrize(("micro_batch", "packed"), [(3, False), (64, False), (3, True)])
def test_causal_scores_are_those_of_every_token_of_the_stream_once(micro_batch, packed, prepared):
    """A loop over documents: each is alone after an end mark, and cut where the windows cut it."""
    shards, tokenizer = Shards(prepared.shards["byte"], "heldout"), open_tokenizer(prepared.tokenizer["byte"])
    assert shards.tokens % T, "the last window must be short, or this shows less"
    engine = engine_of(DECODER, shards.vocab_size)
    heldout = HeldOut(shards, CAUSAL, T, 1 << 20, tokenizer.token_bytes(), packed)
    scores = heldout.score(engine, World(), micro_batch)

    stream = shards.gather(np.array([0]), shards.tokens)[0].astype(np.int64)
    before = np.concatenate([[shards.specials["eod"]], stream[:-1]])
    model, right, sums, asked = engine.module.model.eval(), 0, [], []
    with torch.no_grad():
        for window in contexts(heldout, packed):
            sums.append(0.0)
            asked.append([])
            for first, last, counted in window:
                ids = torch.from_numpy(before[first:last])[None]
                hidden = model(ids, Layout(None, torch.arange(last - first)[None], True))
                logits = model.logits(hidden)[0].double().log_softmax(-1)
                for at in range(counted, last):
                    sums[-1] -= float(logits[at - first, stream[at]])
                    right += int(logits[at - first].argmax()) == stream[at]
                asked[-1] += range(counted, last)
    every, sizes = np.concatenate(asked).astype(np.int64), np.array([len(window) for window in asked])
    whole = len(every)
    assert len(np.unique(every)) == whole == scores.targets
    assert whole > 0.9 * shards.tokens if packed else whole == shards.tokens
    assert scores.loss == pytest.approx(sum(sums) / whole, rel=1e-5)
    assert scores.accuracy == pytest.approx(right / whole, abs=1e-9)
    raw = shards.raw_bytes if not packed else int(tokenizer.token_bytes()[stream[every]].sum())
    assert scores.bits_per_byte == pytest.approx(sum(sums) / math.log(2) / raw, rel=1e-5)
    # The error of a ratio of two sums over windows, from the linearised residuals of its definition.
    residuals = np.array(sums) - scores.loss * sizes
    error = math.sqrt((residuals**2).sum() * len(sizes) / (len(sizes) - 1)) / whole
    assert scores.standard_error == pytest.approx(error, rel=1e-2)  # the losses differ by a thousandth
    shares = np.unique(stream[every], return_counts=True)[1] / whole
    assert scores.no_context_loss == pytest.approx(-(shares * np.log(shares)).sum(), rel=1e-9)


def test_bits_per_byte_divide_by_the_bytes_of_the_tokens_scored(prepared):
    shards, tokenizer = Shards(prepared.shards["byte"], "heldout"), open_tokenizer(prepared.tokenizer["byte"])
    heldout = HeldOut(shards, CAUSAL, T, 3 * T + 5, tokenizer.token_bytes(), packed=False)
    scores = heldout.score(engine_of(DECODER, shards.vocab_size), World(), 2)
    rows = shards.gather(heldout.numbers * T, T)
    text = "".join(tokenizer.decode(row.tolist()) for row in rows)
    assert scores.targets == 3 * T and "\N{REPLACEMENT CHARACTER}" not in text
    assert scores.bits_per_byte == pytest.approx(scores.loss * 3 * T / math.log(2) / len(text.encode()), rel=1e-6)


@pytest.mark.parametrize("packed", [False, True])
def test_scored_windows_are_spread_over_the_whole_side_and_fewer_are_among_more(packed, prepared):
    """The shards hold one source after another, so a prefix would hold only the first source."""
    shards = Shards(prepared.shards["bert"], "heldout")
    every = HeldOut(shards, MASKED, T, 1 << 30, None, packed).numbers
    assert np.array_equal(every, np.arange(len(every)))
    chosen = [set(HeldOut(shards, MASKED, T, share * len(every) * T // 4, None, packed).numbers) for share in (1, 2, 3)]
    assert chosen[0] < chosen[1] < chosen[2]
    quarters = np.histogram(sorted(chosen[1]), bins=4, range=(0, len(every)))[0] / len(every)
    assert quarters.sum() == pytest.approx(0.5, abs=0.01) and quarters.min() > 0.06


@pytest.mark.parametrize("packed", [False, True])
def test_every_masked_target_is_shown_as_a_mask_so_that_no_predictor_without_context_beats_the_entropy(
    packed, prepared
):
    shards = Shards(prepared.shards["bert"], "heldout")
    heldout = HeldOut(shards, MASKED, T, 1 << 20, None, packed)
    batch = heldout.batch(heldout.numbers)
    shown = np.take_along_axis(batch.inputs, batch.target_index, 1)
    assert (shown[batch.weights > 0] == shards.specials["mask"]).all()
    targets = batch.targets[batch.weights > 0]
    shares = np.unique(targets, return_counts=True)[1] / len(targets)
    scores = heldout.score(engine_of(ENCODER, shards.vocab_size), World(), 4)
    assert scores.targets == len(targets)
    assert scores.no_context_loss == pytest.approx(-(shares * np.log(shares)).sum())
    assert scores.gain == scores.no_context_loss - scores.loss < 0 and not scores.learnt


def test_masked_scores_are_at_15_percent_whatever_the_run_trains_with(prepared):
    shards = Shards(prepared.shards["bert"], "heldout")
    engine = engine_of(ENCODER, shards.vocab_size)
    found = [
        HeldOut(shards, MaskedLMConfig(kind="masked_lm", mask_ratio=ratio), T, 640, None, False).score(
            engine, World(), 4
        )
        for ratio in (0.15, 0.4)
    ]
    assert found[0] == found[1] and found[0].targets == 20 * 5  # round(0.15 · 32) targets in each of 20 windows
    assert found[0].bits_per_byte is None


def test_samples_cost_a_few_short_forwards_and_are_greedy(prepared):
    shards, tokenizer = Shards(prepared.shards["byte"], "heldout"), open_tokenizer(prepared.tokenizer["byte"])
    engine = engine_of(DECODER, shards.vocab_size)
    heldout = HeldOut(shards, CAUSAL, 256, 1 << 20, None, packed=False)
    model, forwarded = engine.module.model, []
    handle = model.register_forward_hook(lambda module, given, found: forwarded.append(given[0].numel()))
    (text, again) = preview_texts([heldout, heldout], engine, World(), tokenizer)
    handle.remove()
    assert text == again and len(forwarded) == CONTINUED_TOKENS == 16 and sum(forwarded) == 2 * 16 * 64
    row = torch.from_numpy(heldout.batch(heldout.spread[:1]).inputs[0, :49]).long()
    for _ in range(16):
        begins = int((row == shards.specials["eod"]).nonzero().max()) if (row == shards.specials["eod"]).any() else 0
        ids = row[None, begins:]
        hidden = model(ids, Layout(None, torch.arange(ids.shape[1])[None], True))
        row = torch.cat([row, model.logits(hidden)[0, -1].argmax()[None]])
    given, continued = (tokenizer.decode(part.tolist()) for part in (row[1:49], row[49:]))
    assert text == f"{given} **▸** {continued}"


@pytest.mark.parametrize("objective", ["masked_lm", "causal_lm"])
def test_two_ranks_of_either_kind_of_stage_score_what_one_scores(objective, prepared, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    one = run_values(prepared, tmp_path / "one", objective)
    engines = {f"two-{stage}": {"zero_stage": stage, "micro_batch": 1} for stage in (1, 3)}
    two = [run_values(prepared, tmp_path / name, objective, engine=engine) for name, engine in engines.items()]
    (alone,) = on_ranks(1, cases.train, one, log=tmp_path / "one.log", launched=False)
    together, _ = on_ranks(2, cases.train_each, two, log=tmp_path / "two.log")
    for summary in together:
        assert alone["heldout_targets"] == summary["heldout_targets"]
        for name in ("heldout_loss", "heldout_accuracy", "no_context_loss", "heldout_standard_error"):
            assert alone[name] == pytest.approx(summary[name], rel=1e-3)
    texts = [EventAccumulator(str(tmp_path / run / "tensorboard")).Reload() for run in ("one", *engines)]
    assert len({str([event.tensor_proto for event in found.Tensors("sample/text_summary")]) for found in texts}) == 1


def test_a_length_curriculum_is_scored_at_the_length_it_has_reached(prepared, tmp_path):
    phases = [{"steps": 4, "seq_len": 16, "batch_tokens": 256}, {"steps": 4, "seq_len": 64, "batch_tokens": 256}]
    values = run_values(prepared, tmp_path / "run", phases=phases, evaluate={"every_steps": 4, "max_tokens": 640})
    values["data"]["block_tokens"] = 64
    on_ranks(1, cases.train, values, log=tmp_path / "run.log", launched=False)
    lines = [line for line in (tmp_path / "run.0.log").read_text().splitlines() if line.startswith("held-out")]
    assert "(80 targets" in lines[0]  # 40 windows of 16: round(0.15 · 16) = 2 each
    assert "(100 targets" in lines[1]  # 10 windows of 64: 10 each


def test_entropy_is_that_of_the_frequencies():
    assert entropy(np.array([1, 1, 2, 0]) / 4) == pytest.approx(1.5 * math.log(2))


def test_windows_without_a_target_are_refused(prepared, monkeypatch):
    """The loss of such windows would be a mean over no targets."""
    shards = Shards(prepared.shards["bert"], "heldout")
    with pytest.raises(ConfigError, match="seq_len = 2 leaves nothing to mask"):
        HeldOut(shards, MASKED, 2, 1 << 20, None, packed=False)
    heldout = HeldOut(shards, MASKED, 3, 3, None, packed=False)
    marks = np.full((1, 4), shards.specials["sep"], np.int32)
    monkeypatch.setattr(heldout.windows, "tokens", lambda starts, *_: marks.repeat(len(starts), axis=0))
    with pytest.raises(ConfigError, match=r"no token to score(?s:.*)1 windows of 3 tokens"):
        heldout.score(engine_of(ENCODER, shards.vocab_size), World(), 4)


def test_no_more_windows_are_forwarded_at_once_than_there_are(prepared):
    heldout = HeldOut(Shards(prepared.shards["byte"], "heldout"), CAUSAL, T, 10 * T, None, packed=False)
    for size in (1, 4):
        found = [list(heldout._of_rank(World(rank, size), 10**6)) for rank in range(size)]
        assert [len(batches) for batches in found] == [1] * size
        assert [len(batches[0].targets) for batches in found] == [-(-10 // size)] * size
        assert sum(int(batches[0].weights.sum()) for batches in found) == 10 * T


@pytest.mark.parametrize(("entries", "number"), [(6144, 20_000), (30_522, 200_000)])
def test_a_constant_answer_gains_nothing_where_tokens_say_nothing(entries, number):
    """Tokens are replaced at a rate that does not depend on the token, whose frequencies are those of Zipf."""
    rng = np.random.default_rng(0)
    weights = 1 / np.arange(1, entries + 1)
    told = rng.choice(entries, number, p=weights / weights.sum())
    replaced = rng.random(number) < 0.1
    counts = np.zeros((entries, 2))
    np.add.at(counts, (told, replaced.astype(int)), 1)
    rate = replaced.mean()
    constant = -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
    assert counted(counts) <= constant + 1e-12
    assert counted(counts) == pytest.approx(constant, rel=0.01)


def test_a_token_that_says_everything_costs_nothing():
    counts = np.zeros((50, 2))
    counts[:25, 0] = counts[25:, 1] = 400
    assert counted(counts) < 0.01
