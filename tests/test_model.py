"""The model's promises: no look ahead, the K-row head, honest FLOPs (no leaks: test_leaks.py)."""

import numpy as np
import pytest
import torch

from pretrain import config, model
from pretrain.errors import ConfigError
from pretrain.model import ModelConfig, Transformer, initialise
from pretrain.objectives import Batch, Learner, MaskedLM, MaskedLMConfig
from tests.conftest import DECODER, ENCODER

BERT = {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
V, T = 100, 48
VARIANTS = {
    "encoder": ENCODER,
    "encoder-pre-rope": {**ENCODER, "norm_position": "pre", "positions": "rope", "mlp": "geglu"},
    "decoder": DECODER,
    "decoder-post-learned": {**DECODER, "norm_position": "post", "positions": "learned", "qk_norm": False},
}


def build(name: str, **changes) -> Transformer:
    built = Transformer(ModelConfig(**{**VARIANTS[name], **changes}), V)
    initialise(built, 3)
    return built.eval()


def packed() -> Batch:
    """One masked window of three documents."""
    text = np.random.default_rng(0).integers(5, V, (1, T)).astype(np.int32)
    text[0, [16, 30]], text[0, [0, 17, 31]] = BERT["sep"], BERT["cls"]
    objective = MaskedLM(MaskedLMConfig(kind="masked_lm", mask_ratio=0.3), BERT, V, T, 0)
    return objective.batch(text, np.zeros(1, np.int64))


def test_changing_token_t_leaves_earlier_outputs_of_a_decoder_alone():
    net = build("decoder")
    ids = torch.randint(5, V, (1, T))
    flat, positions = torch.zeros(1, T, dtype=torch.long), torch.arange(T)[None]
    before = net(ids, flat, positions)
    ids[0, 20] = 5 + (ids[0, 20] + 1) % (V - 5)
    after = net(ids, flat, positions)
    assert torch.equal(before[0, :20], after[0, :20]) and not torch.equal(before[0, 20:], after[0, 20:])


def test_the_loss_on_k_rows_is_the_loss_picked_from_all_rows():
    net = build("encoder")
    batch = packed()
    loss = Learner(net)(batch)
    logits = net.logits(net(batch.inputs, batch.segments, batch.position_ids))
    marked = torch.full((1, T), -100)
    marked.scatter_(1, batch.target_index.long(), batch.targets.long())
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), marked, ignore_index=-100, reduction="sum")
    torch.testing.assert_close(loss, expected)


def test_attention_equals_the_formula():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 6, 8) for _ in range(3))
    segments = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 0, 0, 0, 0, 0]])
    for causal in (False, True):
        mask = model.attention_mask(segments, causal)
        scores = (q @ k.transpose(-1, -2) / 8**0.5).masked_fill(~mask, float("-inf"))
        torch.testing.assert_close(model.attend(q, k, v, mask, 0.0), scores.softmax(-1) @ v)


def test_rotation_depends_on_distance_only():
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def score(a: int, b: int) -> float:
        turn = [model.rope(torch.tensor([[at]]), 16, 10_000.0, torch.float32) for at in (a, b)]
        return float((model.rotate(q, *turn[0]) * model.rotate(k, *turn[1])).sum())

    assert score(3, 7) == pytest.approx(score(103, 107), abs=1e-4)
    assert score(3, 7) != pytest.approx(score(3, 8), abs=1e-3)


def test_initial_weights_are_those_of_the_table():
    net = Transformer(ModelConfig(**{**DECODER, "width": 256, "mlp_width": 512}), 2000)
    initialise(net, 1)
    assert float(net.embed.weight.detach().std()) == pytest.approx(0.02, rel=0.02)
    assert float(net.blocks[0].mlp.down.weight.detach().std()) == pytest.approx(0.02 / 4**0.5, rel=0.02)
    assert torch.equal(net.final_norm.weight, torch.ones(256))
    counts = torch.tensor([0, 5, 95] + [0] * (V - 3))
    net = Transformer(ModelConfig(**ENCODER), V)
    initialise(net, 1, counts)
    assert float(net.head.decoder.bias[2]) == pytest.approx(np.log(96 / (100 + V)), rel=1e-6)


def test_the_same_seed_gives_the_same_weights():
    one, two = build("decoder"), build("decoder")
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_flops_of_gpt2_small_are_the_published_0_857_gflop_per_token():
    shape = {"layers": 12, "width": 768, "heads": 12, "kv_heads": 12, "head_width": 64, "mlp_width": 3072}
    net = Transformer(
        ModelConfig(**{**DECODER, **shape, "mlp": "gelu", "max_positions": 1024, "qk_norm": False}), 50_304
    )
    assert net.flops_per_token(1024, 1024) == pytest.approx(0.857e9, rel=0.01)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": "30", "heads": "4"}, "model.width = 30 does not divide by model.heads = 4"),
        ({"kv_heads": "3"}, "model.heads = 2 does not divide by model.kv_heads = 3"),
        ({"head_width": "5", "positions": "rope"}, "needs an even head width, found 5"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        config.build(ModelConfig, {**{k: str(v) for k, v in ENCODER.items()}, **changes}, "x.yaml")
