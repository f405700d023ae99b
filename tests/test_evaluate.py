"""Held-out numbers against slow, independent sums."""

import itertools
import math

import numpy as np
import pytest
import torch

from pretrain.engine import EngineConfig, LocalEngine
from pretrain.evaluate import HeldOut, unigram_entropy
from pretrain.model import ModelConfig, Transformer, initialise
from pretrain.objectives import CausalLMConfig, Learner, MaskedLMConfig
from pretrain.optim import OptimConfig, adamw
from pretrain.ranks import World
from pretrain.shards import Shards
from pretrain.tokenizer import open_tokenizer
from tests import cases
from tests.conftest import DECODER, ENCODER, run_values
from tests.ranks import on_ranks

T = 32


def engine_of(values: dict, vocab_size: int) -> LocalEngine:
    model = Transformer(ModelConfig(**values), vocab_size)
    initialise(model, 5)
    optimizer = OptimConfig(lr=1.0)
    return LocalEngine(Learner(model), lambda m: adamw(m, optimizer, False), EngineConfig(micro_batch=1), 1.0, World())


@pytest.mark.parametrize("micro_batch", [1, 3, 64])
def test_causal_scores_are_those_of_every_token_of_the_stream_once(micro_batch, prepared):
    """A loop over documents: each alone behind an end mark, cut where the windows cut."""
    shards, tokenizer = Shards(prepared.shards["byte"], "heldout"), open_tokenizer(prepared.tokenizer["byte"])
    assert shards.tokens % T, "the last window must be short, or this shows less"
    engine = engine_of(DECODER, shards.vocab_size)
    heldout = HeldOut(shards, CausalLMConfig(kind="causal_lm"), T, 1 << 20, tokenizer.token_bytes())
    scores = heldout.score(engine, World(), micro_batch)

    stream = shards.gather(np.array([0]), shards.tokens)[0].astype(np.int64)
    end = shards.specials["eod"]
    before = np.concatenate([[end], stream[:-1]])
    nll = right = 0.0
    model = engine.module.model.eval()
    # The last window is moved back to be whole; its tokens are scored with the context that gives them.
    starts = [*range(0, len(stream) - T, T), len(stream) - T]
    scored = 0
    with torch.no_grad():
        for start in starts:
            inputs, targets = before[start : start + T], stream[start : start + T]
            cuts = [at for at in range(T) if at == 0 or inputs[at] == end] + [T]
            for a, b in itertools.pairwise(cuts):
                ids = torch.from_numpy(inputs[a:b])[None]
                hidden = model(ids, torch.zeros_like(ids), torch.arange(b - a)[None])
                logits = model.logits(hidden)[0].double().log_softmax(-1)
                for at in range(a, b):
                    if start + at >= scored:
                        nll -= float(logits[at - a, targets[at]])
                        right += int(logits[at - a].argmax()) == targets[at]
            scored = start + T
    assert scores.targets == len(stream) == shards.tokens
    assert scores.loss == pytest.approx(nll / len(stream), rel=1e-5)
    assert scores.accuracy == pytest.approx(right / len(stream), abs=1e-9)
    assert scores.bits_per_byte == pytest.approx(nll / math.log(2) / shards.raw_bytes, rel=1e-5)


def test_bits_per_byte_divide_by_the_bytes_of_the_tokens_scored(prepared):
    shards, tokenizer = Shards(prepared.shards["byte"], "heldout"), open_tokenizer(prepared.tokenizer["byte"])
    heldout = HeldOut(shards, CausalLMConfig(kind="causal_lm"), T, 50, tokenizer.token_bytes())  # inside window 2
    scores = heldout.score(engine_of(DECODER, shards.vocab_size), World(), 2)
    text = tokenizer.decode(shards.gather(np.array([0]), 50)[0].tolist())
    assert scores.targets == 50
    assert scores.bits_per_byte == pytest.approx(scores.loss * 50 / math.log(2) / len(text.encode()), rel=1e-6)


def test_masked_scores_are_at_15_percent_whatever_the_run_trains_with(prepared):
    shards = Shards(prepared.shards["bert"], "heldout")
    engine = engine_of(ENCODER, shards.vocab_size)
    found = [
        HeldOut(shards, MaskedLMConfig(kind="masked_lm", mask_ratio=ratio), T, 640, None).score(engine, World(), 4)
        for ratio in (0.15, 0.4)
    ]
    assert found[0] == found[1] and found[0].targets == 20 * 5  # round(0.15 · 32) targets in each of 20 windows
    assert found[0].bits_per_byte is None


@pytest.mark.parametrize("objective", ["masked_lm", "causal_lm"])
@pytest.mark.parametrize("stage", [1, 3])
def test_two_ranks_score_what_one_scores(objective, stage, prepared, tmp_path):
    one = run_values(prepared, tmp_path / "one", objective)
    two = run_values(prepared, tmp_path / "two", objective, engine={"zero_stage": stage, "micro_batch": 1})
    (alone,) = on_ranks(1, cases.train, one, log=tmp_path / "one.log", launched=False)
    together, _ = on_ranks(2, cases.train, two, log=tmp_path / "two.log")
    assert alone["heldout_targets"] == together["heldout_targets"]
    for name in ("heldout_loss", "heldout_accuracy", "unigram_entropy"):
        assert alone[name] == pytest.approx(together[name], rel=1e-4)


def test_a_length_curriculum_is_scored_at_the_length_it_has_reached(prepared, tmp_path):
    phases = [{"steps": 4, "seq_len": 16, "batch_tokens": 256}, {"steps": 4, "seq_len": 64, "batch_tokens": 256}]
    values = run_values(prepared, tmp_path / "run", phases=phases, evaluate={"every_steps": 4, "max_tokens": 640})
    values["data"]["block_tokens"] = 64
    on_ranks(1, cases.train, values, log=tmp_path / "run.log", launched=False)
    lines = [line for line in (tmp_path / "run.0.log").read_text().splitlines() if line.startswith("held-out")]
    assert "(80 targets" in lines[0]  # 40 windows of 16: round(0.15 · 16) = 2 each
    assert "(100 targets" in lines[1]  # 10 windows of 64: 10 each


def test_unigram_entropy_is_that_of_the_counts():
    assert unigram_entropy(np.array([1, 1, 2, 0])) == pytest.approx(1.5 * math.log(2))
    assert unigram_entropy(np.array([7, 1, 1, 2, 0]), leave_out=[0]) == pytest.approx(1.5 * math.log(2))
