"""Attention: which tokens see each other, the one place that chooses a backend, and rotary positions."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Which tokens of a batch of windows see each other. It is made once a forward pass and shared by all layers."""

    segments: Tensor | None  # (B, T): the number of each token's document; None: each window holds one document
    position_ids: Tensor  # (B, T): the position of each token in its document
    causal: bool  # whether a token sees only itself and the tokens before it

    def mask(self, x: Tensor) -> Tensor | None:
        """The attention mask for queries and keys computed from `x`; None: each window holds one document."""
        return None if self.segments is None else attention_mask(self.segments, self.causal, _compute_dtype(x))


def attention_mask(segments: Tensor, causal: bool, dtype: torch.dtype) -> Tensor:
    """(B, T) document numbers → (B, 1, T, T): 0 where a query (row) may see a key (column), else -inf.

    The mask is added to the scores. `dtype` should be that of the queries and keys: otherwise every layer converts the
    mask, and keeps its copy until the backward pass.
    """
    allowed = segments[:, :, None] == segments[:, None, :]
    allowed = (allowed.tril() if causal else allowed)[:, None]
    return torch.zeros(allowed.shape, dtype=dtype, device=segments.device).masked_fill_(~allowed, float("-inf"))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, dropout: float) -> Tensor:
    """Attention over (B, H, T, E) heads: the one place that chooses a backend.

    `mask` comes from `attention_mask`, which has applied `causal` already. None: each window holds one document.
    """
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal and mask is None)


def _compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of queries and keys that are computed from `x`: autocast may change it."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def rope(position_ids: Tensor, E: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(B, T) positions → cosine and sine, each (B, 1, T, E), with the halves repeated as in Hugging Face.

    The angles are computed in fp32 in every precision. Source: Su et al. 2021, arXiv:2104.09864.
    """
    # 1 / θ^x and θ^-x differ by one rounding. The difference grows with the position: 1.5e-4 in logits at 2,048 tokens.
    frequency = 1.0 / theta ** (torch.arange(0, E, 2, device=position_ids.device, dtype=torch.float32) / E)
    angle = position_ids[:, None, :, None].float() * frequency
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


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
