"""Attention: which tokens see each other, the one place that chooses a backend, and rotary positions."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.model.config import Rope

# Windows from which one document after another is quicker than a dense mask on a CPU. Documents with prefixes, and
# blocks of a local layer, are from twice as many tokens on (benchmarks/results/attention-cpu.json).
DENSE = 256


@dataclass(frozen=True)
class Layout:
    """Which tokens of a batch of windows see each other. It is made once a forward pass and shared by all layers.

    A token sees tokens of its own document: all of them, or, if `causal`, itself, the tokens before it, and the
    prefix. In a local layer it sees only those that are at most `window` positions away.
    """

    segments: Tensor | None  # (B, T): the number of each token's document; None: each window holds one document
    position_ids: Tensor  # (B, T): the position of each token in its document
    causal: bool
    # (B, T) bool: the first tokens of a document that all its tokens see; None: there are none. Then `causal` is true.
    prefix: Tensor | None = None
    # The result of `offsets`, if it is known; None: the host waits until the device has counted the documents.
    begins: Tensor | None = None
    _made: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """(B or 1, 1, T, T): 0 where a query (row) may see a key (column), else -inf.

        It is added to the scores. `dtype` is that of the queries and keys: otherwise every layer would convert the
        mask, and keep its copy until the backward pass.
        """
        if (window, dtype) not in self._made:
            place = torch.arange(self.position_ids.shape[1], device=self.position_ids.device)
            self._made[window, dtype] = self._added(place[:, None], place, window, dtype)
        return self._made[window, dtype]

    def band(self, window: int, dtype: torch.dtype) -> Tensor:
        """(B or 1, 1, n, W, 2W or 3W): the same as `mask` for n blocks of W = `window` queries.

        The keys of a block are those of the block before it, of itself and, unless attention is causal, of the next.
        """
        if ("band", window, dtype) not in self._made:
            T, device = self.position_ids.shape[1], self.position_ids.device
            first = torch.arange(0, T, window, device=device)[:, None, None]  # (n, 1, 1)
            queries = first + torch.arange(window, device=device)[:, None]  # (n, W, 1)
            last = window if self.causal else 2 * window
            keys = first + torch.arange(-window, last, device=device)  # (n, 1, 2W or 3W)
            self._made["band", window, dtype] = self._added(queries, keys, window, dtype)
        return self._made["band", window, dtype]

    def lengths(self) -> list[list[tuple[int, int]]]:
        """The number of tokens of each document in each window, and of its prefix, from left to right."""
        if "lengths" not in self._made:
            B, T = self.position_ids.shape
            numbers = [torch.zeros(T)] * B if self.segments is None else self.segments
            documents = [row.unique_consecutive(return_counts=True)[1].tolist() for row in numbers]
            if self.prefix is None:
                prefixes = [[0] * len(row) for row in documents]
            else:
                parts = zip(self.prefix, documents, strict=True)
                prefixes = [[int(part.sum()) for part in row.split(lengths)] for row, lengths in parts]
            self._made["lengths"] = [list(zip(*both, strict=True)) for both in zip(documents, prefixes, strict=True)]
        return self._made["lengths"]

    def offsets(self) -> Tensor:
        """(n + 1,) int32: where each of the n documents begins in the tokens of all windows laid end to end."""
        if self.begins is not None:
            return self.begins
        if "offsets" not in self._made:
            assert self.segments is not None
            begins = torch.ones_like(self.segments, dtype=torch.bool)
            begins[:, 1:] = self.segments[:, 1:] != self.segments[:, :-1]
            end = torch.tensor([begins.numel()], device=begins.device)
            self._made["offsets"] = torch.cat((begins.flatten().nonzero()[:, 0], end)).int()
        return self._made["offsets"]

    def split(self) -> "tuple[Layout, Layout]":
        """How the tokens of prefixes see each other, and how the tokens after them see, each without a prefix.

        A prefix is a document of its own whose tokens see each other on both sides. A token after it sees all tokens
        before it, as in causal attention.
        """
        if "split" not in self._made:
            assert self.prefix is not None and self.causal
            numbers = torch.zeros_like(self.position_ids) if self.segments is None else self.segments
            inside = Layout(2 * numbers + ~self.prefix, self.position_ids, causal=False)
            after = Layout(self.segments, self.position_ids, causal=True, begins=self.begins)
            self._made["split"] = inside, after
        return self._made["split"]

    def _added(self, queries: Tensor, keys: Tensor, window: int | None, dtype: torch.dtype) -> Tensor:
        """(B or 1, 1, …): 0 where a query may see a key, else -inf, for places that broadcast to (…).

        Places outside of the window are seen by nobody. Queries there see everything, so that nothing is NaN.
        """
        T = self.position_ids.shape[1]
        ahead = keys - queries  # how far the key is ahead of the query
        keys, queries = keys.expand_as(ahead), queries.expand_as(ahead)
        at_key, at_query = keys.clamp(0, T - 1), queries.clamp(max=T - 1)
        seen = (ahead <= 0 if self.causal else torch.ones_like(ahead, dtype=torch.bool))[None]
        if self.prefix is not None:
            seen = seen | self.prefix[:, at_key]
        if window is not None:
            seen = seen & (ahead.abs() <= window)
        if self.segments is not None:
            seen = seen & (self.segments[:, at_key] == self.segments[:, at_query])
        seen = (seen & (keys >= 0) & (keys < T)) | (queries >= T)
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))[:, None]


@dataclass(frozen=True)
class Crossing:
    """Which tokens of an encoder the tokens of a decoder see: those of their own document."""

    queries: Tensor  # (B, T): the number of the document of each token of the decoder
    keys: Tensor  # (B, S): the same of the encoder
    _made: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def mask(self, dtype: torch.dtype) -> Tensor:
        """(B, 1, T, S): 0 where a query may see a key, else -inf. A query without a document sees everything."""
        if dtype not in self._made:
            seen = self.queries[:, :, None] == self.keys[:, None]
            seen |= ~seen.any(-1, keepdim=True)
            self._made[dtype] = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(
                ~seen, float("-inf")
            )[:, None]
        return self._made[dtype]


def attend(q: Tensor, k: Tensor, v: Tensor, layout: Layout, window: int | None, dropout: float) -> Tensor:
    """Attention over (B, H, T, E) heads: the one place that chooses a backend. `window` None: the layer is global.

    Windows that hold one document take the fused kernel without a mask. On CUDA, packed windows and local layers in 16
    bits take the kernel for documents of several lengths. Otherwise a local layer looks at blocks of its window, and a
    long packed window at one document after another, so no mask grows with T². All that remains has a dense mask.
    A layout with prefixes is computed twice there, for the tokens of prefixes and for the tokens after them.
    """
    T, dtype = q.shape[2], compute_dtype(q)
    window = _shorter(window, T)
    if layout.prefix is None and layout.segments is None and window is None:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=layout.causal)
    by_kernel = _by_kernel(q.is_cuda, dtype, dropout)
    if by_kernel or _in_parts(layout, window, T, q.is_cuda):
        return in_parts(q, k, v, layout, window, dropout, by_kernel)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=layout.mask(window, dtype), dropout_p=dropout)


def make_mask(layout: Layout, window: int | None, x: Tensor, dropout: float) -> None:
    """Make the dense mask that `attend` would make in a layer with hidden states `x` (B, T, D), if it needs one.

    A compiled block then only reads it. If the first block made it, that block would be compiled on its own.
    """
    T, dtype = x.shape[1], compute_dtype(x)
    window = _shorter(window, T)
    if layout.prefix is None and layout.segments is None and window is None:
        return
    if not _by_kernel(x.is_cuda, dtype, dropout) and not _in_parts(layout, window, T, x.is_cuda):
        layout.mask(window, dtype)


def _shorter(window: int | None, T: int) -> int | None:
    """The window of a local layer; None if it leaves nothing out of T tokens."""
    return None if window is None or window >= T - 1 else window


def _by_kernel(cuda: bool, dtype: torch.dtype, dropout: float) -> bool:
    """Whether torch's kernel for documents of several lengths can be taken."""
    return cuda and dtype in (torch.bfloat16, torch.float16) and not dropout


def _in_parts(layout: Layout, window: int | None, T: int, cuda: bool) -> bool:
    """Whether `by_document` or, in a local layer, `by_block` is quicker than a dense mask."""
    if window is not None:
        shortest = max(4 * window, 2 * DENSE)
    else:
        shortest = DENSE if layout.prefix is None else 2 * DENSE
    return shortest <= T and not (cuda and window is None)


# The lengths of documents differ from batch to batch, so a compiled block calls this function as it is: otherwise it
# would be compiled again for every batch. torch.compiler.disable would import the compiler with this module, in 1 s.
@torch._disable_dynamo  # type: ignore[attr-defined]  # torch imports it, without export
def in_parts(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, window: int | None, dropout: float, by_kernel: bool
) -> Tensor:
    """Attention without a dense mask, where `attend` finds that quicker."""
    if layout.prefix is not None and (by_kernel or window is not None):
        inside, after = (attend(q, k, v, part, window, dropout) for part in layout.split())
        return torch.where(layout.prefix[:, None, :, None], inside, after)
    if by_kernel:
        return varlen(q, k, v, layout, window)
    if window is not None:
        return by_block(q, k, v, layout, window, dropout)
    return by_document(q, k, v, layout, dropout)


def attend_with(q: Tensor, k: Tensor, v: Tensor, added: Tensor, dropout: float, scale: float | None) -> Tensor:
    """Attention of (B, H, T, E) to (B, H, S, E) with numbers (…, T, S) that are `added` to the scores: a mask, a bias.

    `scale` is the factor of the scores before; None: 1 / √E.
    """
    return F.scaled_dot_product_attention(q, k, v, attn_mask=added, dropout_p=dropout, scale=scale)


def by_document(q: Tensor, k: Tensor, v: Tensor, layout: Layout, dropout: float) -> Tensor:
    """Global attention in packed windows, one document after another, each in the fused kernel.

    In a document with a prefix, tokens after the prefix see what they see in causal attention. The prefix is computed
    once more, alone.
    """
    rows = []
    for lengths, *heads in zip(layout.lengths(), q, k, v, strict=True):
        documents = zip(*(x[None].split([length for length, _ in lengths], dim=2) for x in heads), strict=True)
        row = []
        for (length, first), (one, other, value) in zip(lengths, documents, strict=True):
            causal = layout.causal and first < length
            seen = F.scaled_dot_product_attention(one, other, value, dropout_p=dropout, is_causal=causal)
            if 0 < first < length:
                one, other, value = (x[:, :, :first] for x in (one, other, value))
                row.append(F.scaled_dot_product_attention(one, other, value, dropout_p=dropout))
                seen = seen[:, :, first:]
            row.append(seen)
        rows.append(torch.cat(row, dim=2))
    return torch.cat(rows)


def by_block(q: Tensor, k: Tensor, v: Tensor, layout: Layout, window: int, dropout: float) -> Tensor:
    """Local attention in blocks of `window` queries, which see the keys of their own block and of its neighbours."""
    B, H, T, E = q.shape
    count = -(-T // window)
    q, k, v = (F.pad(x, (0, 0, 0, count * window - T)).view(B, H, count, window, E) for x in (q, k, v))
    sides = (1, 0) if layout.causal else (1, 1)
    k, v = (F.pad(x, (0, 0, 0, 0, *sides)) for x in (k, v))
    k, v = (torch.cat([x[:, :, i : i + count] for i in range(1 + sum(sides))], dim=3) for x in (k, v))
    mask = layout.band(window, compute_dtype(q))
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    return x.reshape(B, H, count * window, E)[:, :, :T]


def varlen(q: Tensor, k: Tensor, v: Tensor, layout: Layout, window: int | None) -> Tensor:
    """Attention in packed windows and local layers with torch's kernel for documents of several lengths (CUDA)."""
    from torch.nn.attention.varlen import varlen_attn

    B, H, T, E = q.shape
    if layout.segments is None:
        offsets = torch.arange(0, (B + 1) * T, T, dtype=torch.int32, device=q.device)
    else:
        offsets = layout.offsets()
    before = -1 if window is None else window
    q, k, v = (x.transpose(1, 2).reshape(B * T, H, E).to(compute_dtype(q)) for x in (q, k, v))
    x = varlen_attn(q, k, v, offsets, offsets, T, T, window_size=(before, 0 if layout.causal else before))
    assert isinstance(x, Tensor), "it returns more only if it is asked to"
    return x.view(B, T, H, E).transpose(1, 2)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which attention computes with `x`: autocast may change it."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def rope(position_ids: Tensor, E: int, rotations: Rope, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(B, T) positions → cosine and sine, each (B, 1, T, E), with the halves repeated as in Hugging Face.

    The angles are computed in fp32 in every precision. Source: Su et al. 2021, arXiv:2104.09864. With YaRN both are
    √(1/t) times as large, so that scores are 1/t times as large: Peng et al. 2023, arXiv:2309.00071, section 3.4.
    """
    # 1 / θ^x and θ^-x differ by one rounding. The difference grows with the position: 1.5e-4 in logits at 2,048 tokens.
    powers = rotations.theta ** (torch.arange(0, E, 2, device=position_ids.device, dtype=torch.float32) / E)
    frequency, size = 1.0 / powers, 1.0
    if rotations.original_positions:
        kept = 1 - _slowed(E, rotations).to(powers.device)
        frequency = 1.0 / (rotations.factor * powers) * (1 - kept) + frequency * kept
        size = 0.1 * math.log(rotations.factor) + 1
    angle = position_ids[:, None, :, None].float() * frequency
    angle = torch.cat((angle, angle), dim=-1)
    return (angle.cos() * size).to(dtype), (angle.sin() * size).to(dtype)


def _slowed(E: int, rotations: Rope) -> Tensor:
    """(E/2,): the share of each frequency that YaRN makes slower by its factor.

    It is 0 for a frequency that turns more than 32 times in an original window, 1 if it turns less than once, and rises
    between them along a line whose ends are whole places.
    """

    def turning(times: int) -> float:  # the place of the frequency that turns so often in an original window
        return E * math.log(rotations.original_positions / (times * 2 * math.pi)) / (2 * math.log(rotations.theta))

    first, last = max(math.floor(turning(32)), 0), min(math.ceil(turning(1)), E - 1)
    return ((torch.arange(E // 2, dtype=torch.float32) - first) / ((last - first) or 0.001)).clamp(0, 1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + E/2) of (B, H, T, E)."""
    return _Rotation.apply(x, cos, sin)


class _Rotation(torch.autograd.Function):
    """The gradient of a rotation is the inverse rotation, so nothing of `x` is kept. Each takes three kernels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(gradient, cos, sin, -1), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """`x` rotated by the angles of `cos` and `sin` if `sign` is 1, and rotated back if it is -1."""
    left, right = x.chunk(2, dim=-1)
    rotated = x * cos
    first, second = rotated.chunk(2, dim=-1)  # views
    sin_first, sin_second = sin.chunk(2, dim=-1)
    first.addcmul_(right, sin_first, value=-sign)
    second.addcmul_(left, sin_second, value=sign)
    return rotated
