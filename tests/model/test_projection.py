"""The loss of a projection: equal to torch's cross-entropy of whole logits, which it never makes."""

import pytest
import torch
import torch.nn.functional as F

from pretrain.model import projection
from pretrain.model.projection import Projection
from tests.model.test_attention import Largest


@pytest.mark.parametrize("chunk", [1, 40, 1 << 20], ids=["a row", "three rows", "all rows"])
@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_loss_gradients_and_scores_are_those_of_torch(chunk, cap, bias, weighted, monkeypatch):
    monkeypatch.setattr(projection, "CHUNK", chunk)
    torch.manual_seed(0)
    module = Projection(8, 13, bias, cap)
    rows, targets = torch.randn(2, 7, 8, requires_grad=True), torch.randint(13, (2, 7))
    weights = torch.rand(2, 7) * (torch.rand(2, 7) < 0.7) if weighted else None
    found = module(rows, targets, weights)
    logits = F.linear(rows, module.weight, module.bias)
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    torch.testing.assert_close(module(rows), logits)
    nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(2, 7)
    expected = (nll * (1 if weights is None else weights)).sum()
    torch.testing.assert_close(found, expected)
    by = [rows, *module.parameters()]
    for ours, theirs in zip(torch.autograd.grad(3 * found, by), torch.autograd.grad(3 * expected, by), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    losses, likeliest = module(rows, targets, each=True)
    torch.testing.assert_close(losses, nll)
    assert torch.equal(likeliest, logits.argmax(-1)) and not losses.requires_grad


@pytest.mark.parametrize("cap", [None, 2.0])
def test_the_square_of_log_z_is_added_with_its_weight(cap, monkeypatch):
    monkeypatch.setattr(projection, "CHUNK", 40)
    torch.manual_seed(0)
    module, weights = Projection(8, 13, True, cap), torch.rand(2, 7)
    rows, targets = torch.randn(2, 7, 8, requires_grad=True), torch.randint(13, (2, 7))
    found = module(rows, targets, weights, z_loss=0.3)
    logits = module(rows)
    nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(2, 7)
    expected = ((nll + 0.3 * logits.logsumexp(-1).square()) * weights).sum()
    torch.testing.assert_close(found, expected)
    by = [rows, *module.parameters()]
    for ours, theirs in zip(torch.autograd.grad(found, by), torch.autograd.grad(expected, by), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("low", ["autocast", "bf16"])
def test_sixteen_bits_give_the_loss_and_gradients_of_torch_in_sixteen_bits(low):
    torch.manual_seed(0)
    module = Projection(16, 50, True, None)
    rows, targets = torch.randn(30, 16, requires_grad=True), torch.randint(50, (30,))
    if low == "bf16":
        module, rows = module.bfloat16(), rows.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=low == "autocast"):
        found = module(rows, targets)
        expected = F.cross_entropy(F.linear(rows, module.weight, module.bias).float(), targets, reduction="sum")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    by = [rows, *module.parameters()]
    for ours, theirs in zip(torch.autograd.grad(found, by), torch.autograd.grad(expected, by), strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


def test_the_logits_of_fifty_thousand_ids_never_exist_at_once():
    module, rows = Projection(8, 50_000, False, None), torch.randn(4, 1024, 8, requires_grad=True)
    targets = torch.randint(50_000, (4, 1024))
    with Largest() as largest:
        module(rows, targets).backward()
    assert largest.numbers <= projection.CHUNK < rows[..., 0].numel() * 50_000 / 10
