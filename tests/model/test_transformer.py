"""The model: causal attention, the head on K rows, the count of FLOPs. Leaks between documents: test_leaks.py."""

import numpy as np
import pytest
import torch

from pretrain import config
from pretrain.errors import ConfigError
from pretrain.model import attention
from pretrain.model.attention import Layout
from pretrain.model.config import ModelConfig, Rope
from pretrain.model.init import initialise
from pretrain.model.transformer import RMSNorm, Transformer
from pretrain.objectives.batch import Batch
from pretrain.objectives.learner import Learner
from pretrain.objectives.masked_lm import MaskedLM, MaskedLMConfig
from pretrain.order.rows import of_stream
from tests.conftest import DECODER, ENCODER

BERT = {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
V, T = 100, 48
VARIANTS = {
    "encoder": ENCODER,
    "encoder-pre-rope": {**ENCODER, "norm_position": "pre", "positions": "rope", "mlp": "geglu"},
    "decoder": DECODER,
    "encoder-local": {
        **{**ENCODER, "norm_position": "pre", "positions": "rope", "layers": 3, "embed_norm": True},
        **{"first_norm": False, "window": 5, "global_every": 2, "local_rope_theta": 500.0},
    },
    "decoder-without-norm-weights": {
        **{**DECODER, "norm_weights": False, "mlp": "relu2", "qk_norm_after_rope": True},
        **{"embed_norm": True, "logit_cap": 3.0},
    },
    "decoder-post-learned": {**DECODER, "norm_position": "post", "positions": "learned", "qk_norm": False},
}


def build(name: str, **changes) -> Transformer:
    built = Transformer(ModelConfig(**{**VARIANTS[name], **changes}), V)
    initialise(built, 3)
    return built.eval()


def packed() -> tuple[MaskedLM, Batch]:
    """A masked window of three documents, and its objective."""
    text = np.random.default_rng(0).integers(5, V, (1, T)).astype(np.int32)
    text[0, [16, 30]], text[0, [0, 17, 31]] = BERT["sep"], BERT["cls"]
    objective = MaskedLM(MaskedLMConfig(kind="masked_lm", mask_ratio=0.3), BERT, V, T, 0)
    return objective, objective.batch(of_stream(np.concatenate([text[:, 1:2], text], 1), BERT["sep"]), np.zeros(1))


@pytest.mark.parametrize("flat", [None, torch.zeros(1, T, dtype=torch.long)], ids=["one document", "mask"])
def test_changing_token_t_leaves_earlier_outputs_of_a_decoder_alone(flat):
    net = build("decoder")
    ids, positions = torch.randint(5, V, (1, T)), torch.arange(T)[None]
    before = net(ids, Layout(flat, positions, True))
    ids[0, 20] = 5 + (ids[0, 20] + 1) % (V - 5)
    after = net(ids, Layout(flat, positions, True))
    assert torch.equal(before[0, :20], after[0, :20]) and not torch.equal(before[0, 20:], after[0, 20:])


def test_the_loss_on_k_rows_is_the_loss_picked_from_all_rows():
    net = build("encoder")
    objective, batch = packed()
    batch = batch.to(torch.device("cpu"))
    loss = Learner(net)(objective, batch)["loss"]
    logits = net.logits(net(batch.inputs, Layout(batch.segments, batch.position_ids, False)))
    marked = torch.full((1, T), -100)
    marked.scatter_(1, batch.target_index.long(), batch.targets.long())
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), marked, ignore_index=-100, reduction="sum")
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_window_of_one_document_gives_the_same_with_a_mask_and_without(name):
    net = build(name)
    ids, positions = torch.randint(5, V, (3, T)), torch.arange(T).expand(3, -1)
    gradients = []
    for segments in (None, torch.zeros(3, T, dtype=torch.int32)):
        net.zero_grad()
        net.logits(net(ids, Layout(segments, positions, net.config.causal))).square().sum().backward()
        gradients.append([p.grad.clone() for p in net.parameters()])
    for without, with_mask in zip(*gradients, strict=True):
        torch.testing.assert_close(without, with_mask, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "autocast"])
def test_one_mask_is_made_a_forward_in_the_dtype_of_queries_and_keys(dtype, monkeypatch):
    """A mask of another dtype would be converted by every layer, and each copy kept for the backward pass."""
    seen, attend = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        attention.F,
        "scaled_dot_product_attention",
        lambda *args, **kwargs: seen.append(kwargs["attn_mask"]) or attend(*args, **kwargs),
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        layout = Layout(torch.tensor([[0] * 9 + [1] * (T - 9)] * 2), torch.arange(T)[None], False)
        build("encoder")(torch.randint(5, V, (2, T)), layout)
    assert len(seen) == 2 and all(mask is seen[0] and mask.dtype == dtype for mask in seen)


def test_norm_and_rotation_equal_the_formulas_of_torch():
    """Compare outputs and gradients of the functions that have their own backward pass."""
    torch.manual_seed(0)
    x, weight, turned = (torch.randn(shape, requires_grad=True) for shape in ((3, 5, 16), (16,), (2, 3, 5, 16)))
    norm, bare = RMSNorm(16, eps=1e-6), RMSNorm(16, eps=1e-6, elementwise_affine=False)
    norm.weight.data = weight.detach()
    cos, sin = attention.rope(torch.arange(5).expand(2, -1), 16, Rope(10_000.0), torch.float32)
    left, right = turned.chunk(2, dim=-1)
    pairs = [
        (norm(x), torch.nn.functional.rms_norm(x, (16,), weight, 1e-6), [x, norm.weight], [x, weight]),
        (bare(x), torch.nn.functional.rms_norm(x, (16,), None, 1e-6), [x], [x]),
        (attention.rotate(turned, cos, sin), turned * cos + torch.cat((-right, left), -1) * sin, [turned], [turned]),
    ]
    for ours, theirs, by, by_theirs in pairs:
        torch.testing.assert_close(ours, theirs)
        gradient = torch.randn_like(ours)
        found = torch.autograd.grad(ours, by, gradient)
        for one, other in zip(found, torch.autograd.grad(theirs, by_theirs, gradient), strict=True):
            torch.testing.assert_close(one, other)


def test_rotation_depends_on_distance_only():
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def score(a: int, b: int) -> float:
        turn = [attention.rope(torch.tensor([[at]]), 16, Rope(10_000.0), torch.float32) for at in (a, b)]
        return float((attention.rotate(q, *turn[0]) * attention.rotate(k, *turn[1])).sum())

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
    assert net.head.decoder.bias[2].item() == pytest.approx(np.log(96 / (100 + V)), rel=1e-6)


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
        ({"norm_weights": "false"}, "model.norm_weights = false needs model.norm = rmsnorm, found layernorm"),
        ({"first_norm": "false"}, "model.first_norm = false needs model.norm_position = pre, found post"),
        ({"width_base": "16", "transform_head": "false"}, "width_base with model.tie_embeddings = true needs a norm"),
        ({"qk_norm_after_rope": "true"}, "needs model.qk_norm = true and model.positions = rope"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        config.build(ModelConfig, {**{k: str(v) for k, v in ENCODER.items()}, **changes}, "x.yaml")
