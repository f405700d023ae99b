"""Replaced-token detection: its batch, the tokens that are drawn, its loss, and no leak through the generator."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pretrain.errors import ConfigError
from pretrain.model.config import ModelConfig
from pretrain.model.electra import Electra
from pretrain.model.init import initialise
from pretrain.model.weights import weights_of
from pretrain.objectives.masked_lm import MaskedLM, MaskedLMConfig
from pretrain.objectives.replaced_token_detection import (
    ReplacedBatch,
    ReplacedTokenDetection,
    ReplacedTokenDetectionConfig,
)
from pretrain.order.rows import Rows, of_stream
from tests.conftest import ENCODER

PAD, CLS, SEP, MASK = 0, 2, 3, 4
SPECIALS = {"pad": PAD, "unk": 1, "cls": CLS, "sep": SEP, "mask": MASK}
V, T = 60, 48
MODEL = {**ENCODER, "transform_head": False, "embed_width": 12}
MODEL |= {"generator": {"layers": 1, "width": 8, "heads": 2, "mlp_width": 16}}


def objective(seed: int = 1, **keys) -> ReplacedTokenDetection:
    config = ReplacedTokenDetectionConfig(kind="replaced_token_detection", **keys)
    return ReplacedTokenDetection(config, SPECIALS, V, T, seed)


def rows(count: int, packed: bool = False, words: bool = False) -> Rows:
    """Windows of a stream of documents of 0 to 20 tokens; `packed`: with a free end of 0 to 11 places."""
    rng, ids = np.random.default_rng(0), []
    while len(ids) < count * T + 1:
        ids += [CLS, *rng.integers(5, V, int(rng.integers(0, 20))).tolist(), SEP]
    ids = np.array(ids[: count * T + 1], np.int32)
    heads = np.random.default_rng(1).random((count, T)) < 0.7 if words else None
    found = of_stream(np.stack([ids[b * T : (b + 1) * T + 1] for b in range(count)]), SEP, heads)
    if not packed:
        return found
    free = np.arange(T) >= T - np.arange(count)[:, None] % 12
    return dataclasses.replace(
        found, ids=np.where(free, PAD, found.ids), before=np.where(free, PAD, found.before), text=~free
    )


def model(std: float = 0.5) -> Electra:
    built = Electra(ModelConfig(**MODEL, init_std=std), V)
    initialise(built, 3)
    return built


def tensors(batch: ReplacedBatch) -> ReplacedBatch:
    return batch.to(torch.device("cpu"))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("unit", ["token", "word"])
def test_the_generator_has_the_batch_of_masked_language_modelling(unit, packed):
    found, keys = rows(40, packed, unit == "word"), np.arange(100, 140)
    batch = objective(mask_ratio=0.3, unit=unit).batch(found, keys)
    config = MaskedLMConfig(kind="masked_lm", mask_ratio=0.3, unit=unit, mask_share=1, random_share=0)
    masked = MaskedLM(config, SPECIALS, V, T, 1).batch(found, keys)
    for b in range(40):
        true = masked.inputs[b].copy()
        for at, token, weight in zip(masked.target_index[b], masked.targets[b], masked.weights[b], strict=True):
            assert (true[at] == MASK) == (weight > 0)
            true[at] = token
        assert np.array_equal(batch.targets[b], true)
        assert batch.weights[b].sum() == (T if found.text is None else found.text[b].sum())
    for ours, theirs in (("inputs", "inputs"), ("chosen", "target_index"), ("masked", "weights")):
        assert np.array_equal(getattr(batch, ours), getattr(masked, theirs))
    assert objective(mask_ratio=0.3, unit=unit).counts(batch) == {
        "generator": masked.filled(),
        "detection": int(batch.weights.sum()),
    }
    assert batch.draws.min() >= 0 and batch.draws.max() <= 1 and abs(batch.draws.mean() - 0.5) < 0.05


def test_tokens_are_drawn_from_the_distribution_of_the_generator():
    """The same window with 4,000 keys: the drawn tokens have the frequencies that the generator predicts."""
    made, built = objective(), model()
    one = made.batch(rows(1), np.arange(1))
    count = 4000
    many = ReplacedBatch(**{k: None if v is None else np.repeat(v, count, 0) for k, v in vars(one).items()})
    draws = np.random.default_rng(5).random(many.draws.shape).astype(np.float32)
    many = tensors(dataclasses.replace(many, draws=draws))
    with torch.no_grad():
        _, shown = made._filled_in(built, many)
        one = tensors(one)
        predicted = built.generator.logits(built.generator(one.inputs, made.layout(one)))[0].softmax(-1)
    for slot, at in enumerate(one.chosen[0].tolist()):
        frequencies = shown[:, at].bincount(minlength=V) / count
        if one.masked[0, slot]:
            assert (frequencies - predicted[at]).abs().max() < 0.04
    kept = torch.ones(T, dtype=torch.bool)
    kept[one.chosen[0].long()] = False
    assert torch.equal(shown[:, kept], many.targets[:, kept].long())


def test_the_smallest_and_the_largest_draw_give_a_token():
    made, built = objective(), model()
    batch = made.batch(rows(2), np.arange(2))
    for draw in (0.0, 1.0):
        _, shown = made._filled_in(built, tensors(dataclasses.replace(batch, draws=np.full_like(batch.draws, draw))))
        assert shown.min() >= 0 and shown.max() < V


@pytest.mark.parametrize("packed", [False, True])
def test_the_two_parts_are_the_losses_of_the_paper(packed):
    made, built = objective(mask_ratio=0.3), model()
    batch = tensors(made.batch(rows(3, packed), np.arange(3)))
    losses, layout = made.loss(built, batch), made.layout(batch)
    logits = built.generator.logits(built.generator(batch.inputs, layout))
    generated = detected = 0.0
    _, shown = made._filled_in(built, batch)
    found = built.logits(built(shown, layout))
    for b in range(3):
        for at, weight in zip(batch.chosen[b].tolist(), batch.masked[b].tolist(), strict=True):
            generated += weight * F.cross_entropy(logits[b, at], batch.targets[b, at].long())
        for t in range(T):
            label = float(shown[b, t] != batch.targets[b, t])
            detected -= batch.weights[b, t] * F.logsigmoid(found[b, t] * (2 * label - 1))
    torch.testing.assert_close(losses["generator"], generated, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(losses["detection"], detected, rtol=1e-4, atol=1e-3)
    scored = made.score(built, batch)
    torch.testing.assert_close((scored["nll"] * batch.weights).sum(), losses["detection"])
    assert torch.equal(scored["targets"], (shown != batch.targets).long()) and torch.equal(scored["seen"], shown)


def test_a_window_is_filled_in_alike_alone_and_among_others():
    made, built = objective(), model()
    keys = np.arange(7, 13)
    together = tensors(made.batch(rows(6), keys))
    _, shown = made._filled_in(built, together)
    for b in range(6):
        _, alone = made._filled_in(built, together.rows(slice(b, b + 1)))
        assert torch.equal(alone[0], shown[b])
    _, other = made._filled_in(built, tensors(objective(seed=2).batch(rows(6), keys)))
    assert not torch.equal(other, shown)


@pytest.mark.parametrize("packed", [False, True])
def test_no_document_reaches_another_through_the_generator(packed):
    """All tokens of one document change. The draws and the answers in the others stay, to the last bit."""
    made, built = objective(mask_ratio=0.3), model().eval()
    batch = tensors(made.batch(rows(2, packed), np.arange(2)))

    def answers(changed: ReplacedBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        scored = made.score(built, changed)
        return scored["seen"], scored["nll"], built.generator(changed.inputs, made.layout(changed))

    before, reached = answers(batch), 0
    for row in range(2):
        for number in batch.segments[row].unique().tolist():
            inside = torch.zeros(2, T, dtype=torch.bool)
            inside[row] = batch.segments[row] == number
            moved = {
                key: torch.where(inside, (getattr(batch, key) + 23) % V, getattr(batch, key))
                for key in ("inputs", "targets")
            }
            after = answers(dataclasses.replace(batch, **moved))
            for old, new in zip(before, after, strict=True):
                assert torch.equal(old[~inside], new[~inside])
                reached += not torch.equal(old[inside], new[inside])
    assert reached > 10, "a document reaches itself"

    leaking = dataclasses.replace(batch, segments=torch.zeros_like(batch.segments))
    assert not torch.equal(answers(leaking)[1], before[1]), "the comparison would find a leak"


def test_the_generator_shares_the_embeddings_and_the_detector_trains_them_too():
    built = model()
    names = [name for name, _ in built.named_parameters()]
    assert names == list(weights_of(built)) and not any("generator.embed." in name for name in names)
    assert built.generator.head.decoder.weight is built.generator.embed.weight is built.embed.weight
    assert {"generator.embed_project.weight", "embed_project.weight"} <= set(names)
    made = objective()
    losses = made.loss(built, tensors(made.batch(rows(2), np.arange(2))))
    for part in ("generator", "detection"):
        built.zero_grad()
        losses[part].backward(retain_graph=True)
        assert built.embed.weight.grad.abs().sum() > 0
        alone = [p.grad for name, p in built.named_parameters() if name.startswith("generator.")]
        assert all(grad is None or not grad.any() for grad in alone) == (part == "detection")


def test_a_vocabulary_without_a_mask_is_refused():
    config = ReplacedTokenDetectionConfig(kind="replaced_token_detection")
    with pytest.raises(ConfigError, match="mask token"):
        ReplacedTokenDetection(config, {"pad": 0, "eod": 2}, V, T, 1)
