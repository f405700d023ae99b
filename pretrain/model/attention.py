"""Attention: what a token may look at, the one place where a back end is chosen, and rotary positions."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Who may look at whom in a batch of windows. Made once a forward, and the same for every layer."""

    segments: Tensor | None  # (B, T): number of the document in the window; None: each window holds one document
    position_ids: Tensor  # (B, T): the position inside the document
    causal: bool  # whether a token sees only itself and the tokens before it

    def mask(self, x: Tensor) -> Tensor | None:
        """The mask that queries and keys made of `x` need; None where a kernel for whole windows needs none."""
        return None if self.segments is None else attention_mask(self.segments, self.causal, _compute_dtype(x))


def attention_mask(segments: Tensor, causal: bool, dtype: torch.dtype) -> Tensor:
    """(B, T) document numbers → (B, 1, T, T): 0 where a query (row) may look at a key (column), else -inf.

    It is added to the scores. Given the dtype of queries and keys, no layer has to convert it: every layer would keep
    a converted copy of its own until the backward pass.
    """
    allowed = segments[:, :, None] == segments[:, None, :]
    allowed = (allowed.tril() if causal else allowed)[:, None]
    return torch.zeros(allowed.shape, dtype=dtype, device=segments.device).masked_fill_(~allowed, float("-inf"))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, dropout: float) -> Tensor:
    """Attention of (B, H, T, E) heads: the one place where a backend is chosen.

    `mask` is of `attention_mask`, which knows about `causal` already. None: each window holds one document.
    """
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal and mask is None)


def _compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the queries and keys that are made of `x`."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def rope(position_ids: Tensor, E: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(B, T) positions → cosine and sine (B, 1, T, E), halves repeated as Hugging Face does.

    Source: Su et al. 2021, arXiv:2104.09864. Angles in fp32 whatever the model's precision.
    """
    # 1 / θ^x and θ^-x differ by one rounding, which grows with the position: 1.5e-4 in logits at 2,048 tokens.
    frequency = 1.0 / theta ** (torch.arange(0, E, 2, device=position_ids.device, dtype=torch.float32) / E)
    angle = position_ids[:, None, :, None].float() * frequency
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + E/2) of (B, H, T, E)."""
    return _Rotation.apply(x, cos, sin)


class _Rotation(torch.autograd.Function):
    """The gradient of a rotation is the rotation back: nothing of `x` is kept, and either way takes three kernels."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _Rotation.turned(x, cos, sin, 1)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _Rotation.turned(gradient, *ctx.saved_tensors, -1), None, None

    @staticmethod
    def turned(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
        left, right = x.chunk(2, dim=-1)
        turned = x * cos
        first, second = turned.chunk(2, dim=-1)  # views
        sin_first, sin_second = sin.chunk(2, dim=-1)
        first.addcmul_(right, sin_first, value=-sign)
        second.addcmul_(left, sin_second, value=sign)
        return turned
