"""Attention: every backend equals a slow loop, and none makes T² numbers where its kernel does not need them."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.model import attention
from pretrain.model.attention import Layout, attend, by_block, by_document

B, H, T, E = 2, 3, 23, 8
SEVERAL = torch.tensor([[0] * 7 + [1] * 11 + [2] * 5, [0] * 1 + [1] * 2 + [2] * 20])
DTYPES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def slow(q, k, v, layout: Layout, window: int | None) -> torch.Tensor:
    """Attention by a loop over the queries that picks the keys of each."""
    rows = []
    for b in range(B):
        for h in range(H):
            for t in range(T):
                keys = [s for s in range(T) if sees(layout, b, t, s, window)]
                shares = (k[b, h, keys] @ q[b, h, t] / E**0.5).softmax(0)
                rows.append(shares @ v[b, h, keys])
    return torch.stack(rows).view(B, H, T, E)


def sees(layout: Layout, b: int, query: int, key: int, window: int | None) -> bool:
    if layout.segments is not None and layout.segments[b, query] != layout.segments[b, key]:
        return False
    if window is not None and abs(query - key) > window:
        return False
    in_prefix = layout.prefix is not None and bool(layout.prefix[b, key])
    return key <= query or not layout.causal or in_prefix


def layout_of(segments: torch.Tensor | None, causal: bool, prefix: bool = False) -> Layout:
    """With `prefix`, the first three tokens of every document are its prefix."""
    number = torch.zeros(B, T, dtype=torch.long) if segments is None else segments
    begins = torch.ones(B, T, dtype=torch.bool)
    begins[:, 1:] = number[:, 1:] != number[:, :-1]
    first = torch.where(begins, torch.arange(T), 0).cummax(1).values
    positions = torch.arange(T) - first
    return Layout(segments, positions, causal, positions < 3 if prefix else None)


def check(backend, layout: Layout, window: int | None, dtype: torch.dtype) -> None:
    """Compare outputs and gradients of a backend with those of the loop in fp64."""
    torch.manual_seed(0)
    heads = [torch.randn(B, H, T, E, dtype=dtype, requires_grad=True) for _ in range(3)]
    exact = [x.detach().double().requires_grad_() for x in heads]
    found, expected = backend(*heads, layout), slow(*exact, layout, window)
    tolerance = {"rtol": DTYPES[dtype], "atol": DTYPES[dtype]}
    torch.testing.assert_close(found.double(), expected, **tolerance)
    gradient = torch.randn_like(expected)
    gradients = torch.autograd.grad(found, heads, gradient.to(dtype))
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, exact, gradient), strict=True):
        torch.testing.assert_close(ours.double(), theirs, **tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("window", [None, 1, 4, 22, 100])
@pytest.mark.parametrize("kind", ["full", "causal", "prefix"])
@pytest.mark.parametrize("segments", [SEVERAL, None], ids=["several documents", "one document a window"])
@pytest.mark.parametrize("dense", [0, 1000], ids=["by parts", "dense"])
def test_every_backend_equals_a_slow_loop(dense, segments, kind, window, dtype, monkeypatch):
    monkeypatch.setattr(attention, "DENSE", dense)
    layout = layout_of(segments, kind != "full", kind == "prefix")
    check(lambda q, k, v, layout: attend(q, k, v, layout, window, 0.0), layout, window, dtype)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_long_windows_go_by_document_and_local_layers_by_block(causal, monkeypatch):
    monkeypatch.setattr(attention, "DENSE", 0)
    taken = []
    for name in ("by_document", "by_block"):
        made = getattr(attention, name)
        monkeypatch.setattr(attention, name, lambda *args, made=made: taken.append(made) or made(*args))
    heads = [torch.randn(B, H, T, E) for _ in range(3)]
    for segments, window in ((SEVERAL, None), (SEVERAL, 3), (None, 3), (None, None)):
        attend(*heads, layout_of(segments, causal), window, 0.0)
    assert taken == [by_document, by_block, by_block]
    taken.clear()
    for segments, window in ((SEVERAL, None), (None, None), (SEVERAL, 3)):
        attend(*heads, layout_of(segments, True, prefix=True), window, 0.0)
    assert taken == [by_document, by_document, by_block, by_block]  # prefixes, then the tokens after them


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("segments", [SEVERAL, None], ids=["several documents", "one document a window"])
def test_the_kernel_for_several_lengths_is_asked_for_what_the_layout_says(segments, causal, window, monkeypatch):
    """It needs a GPU, so here a loop stands in for torch's function, and understands its arguments as torch says."""

    def loop(q, k, v, begins_q, begins_k, longest_q, longest_k, *, window_size):
        assert torch.equal(begins_q, begins_k) and begins_q.dtype == torch.int32
        lengths = begins_q.diff()
        assert longest_q == longest_k >= lengths.max() and begins_q[-1] == len(q)
        before, after = (len(q) if size < 0 else size for size in window_size)
        number = torch.arange(len(lengths)).repeat_interleave(lengths)
        ahead = torch.arange(len(q)) - torch.arange(len(q))[:, None]
        seen = (number == number[:, None]) & (ahead >= -before) & (ahead <= after)
        heads = (x.transpose(0, 1) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=seen).transpose(0, 1)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", loop)
    layout = layout_of(segments, causal)
    check(lambda q, k, v, layout: attention.varlen(q, k, v, layout, window), layout, window, torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("kind", ["full", "causal", "prefix"])
@pytest.mark.parametrize("segments", [SEVERAL, None], ids=["several documents", "one document a window"])
def test_the_kernel_for_several_lengths_equals_the_dense_mask(segments, kind, window):
    layout = layout_of(segments, kind != "full", kind == "prefix")
    parts = (None if x is None else x.cuda() for x in (layout.segments, layout.position_ids, layout.prefix))
    segments, positions, prefix = parts
    layout = Layout(segments, positions, kind != "full", prefix)
    heads = [torch.randn(B, H, T, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    mask = layout.mask(window, torch.bfloat16)
    dense = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask)
    found = attend(*heads, layout, window, 0.0)
    torch.testing.assert_close(found, dense, rtol=2e-2, atol=2e-2)
    gradient = torch.randn_like(dense)
    for ours, theirs in zip(*(torch.autograd.grad(x, heads, gradient) for x in (found, dense)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=3e-2, atol=3e-2)


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation returns."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return found


@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize("kind", ["full", "causal", "prefix"])
@pytest.mark.parametrize("lengths", [[8192], [5000, 3000, 192]], ids=["one document", "several documents"])
def test_no_tensor_grows_with_the_square_of_a_long_window(lengths, kind, window):
    """Forward and backward at T = 8,192: the square is 67 million numbers."""
    long = sum(lengths)
    numbers = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    prefix = positions < 2000 if kind == "prefix" else None
    layout = Layout(numbers if len(lengths) > 1 else None, positions, kind != "full", prefix)
    heads = [torch.randn(1, 1, long, 8, requires_grad=True) for _ in range(3)]
    with Largest() as largest:
        attend(*heads, layout, window, 0.0).sum().backward()
    assert largest.numbers <= long * 3 * 64
