"""One Transformer for encoders and decoders, shaped by `ModelConfig` and laid out as in Hugging Face.

Shapes: B batch, T tokens, D width, H heads, E head width, F feed-forward width, K targets, V vocabulary.

Documents packed into one window never see each other: `Layout.segments` (B, T) numbers the documents of a window, and a
token attends to its own document only. If every window holds one document there are no segments, and attention takes
its fastest kernel, which needs no mask. The vocabulary projection runs on the K predicted rows of a window, not on all
T. The dialects in `pretrain/dialects` only rename these weights, so RoPE and projections must follow Hugging Face.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.errors import ConfigError
from pretrain.model.attention import Layout, attend, rope, rotate
from pretrain.model.config import ModelConfig


class Transformer(nn.Module):
    """`forward` returns hidden states (B, T, D); `logits` projects chosen rows onto the vocabulary."""

    def __init__(self, config: ModelConfig, vocab_size: int):
        super().__init__()
        self.config, self.vocab_size = config, vocab_size
        self.embed = nn.Embedding(vocab_size, config.width)
        if config.positions == "learned":
            self.embed_position = nn.Embedding(config.max_positions, config.width)
        if config.norm_position == "post":
            self.embed_norm = _norm(config, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        if config.norm_position == "pre":
            self.final_norm = _norm(config, config.width)
        self.head = Head(config, vocab_size)
        if config.tie_embeddings:
            self.head.decoder.weight = self.embed.weight
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, inputs: Tensor, layout: Layout) -> Tensor:
        """(B, T) ids → hidden states (B, T, D)."""
        config = self.config
        x = self.embed(inputs)
        if config.positions == "learned":
            x = x + self.embed_position(layout.position_ids)
            rotation = None
        else:
            rotation = rope(layout.position_ids, config.E, config.rope_theta, x.dtype)
        if config.norm_position == "post":
            x = self.embed_norm(x)
        x = self.dropout(x)
        mask = layout.mask(x)
        for block in self.blocks:
            x = block(x, rotation, mask, layout.causal)
        return self.final_norm(x) if config.norm_position == "pre" else x

    def logits(self, rows: Tensor) -> Tensor:
        """Hidden rows (…, D) → logits (…, V)."""
        return self.head(rows)

    def flops_per_token(self, seq_len: int, targets: int) -> float:
        """Training FLOPs per input token: 6 per weight used in a product, 12·L·H·E·T for attention scores and values.

        The head is counted for `targets` of every `seq_len` tokens. Attention is counted in full, causal or not, as in
        PaLM (arXiv:2204.02311, appendix B). Source: Kaplan et al. 2020, arXiv:2001.08361, section 2.1.
        """
        config = self.config
        matrices = sum(p.numel() for block in self.blocks for p in block.parameters() if p.ndim == 2)
        head = config.width * self.vocab_size + (config.width**2 if config.transform_head else 0)
        attention = 12 * config.layers * config.heads * config.E * seq_len
        return 6 * (matrices + head * targets / seq_len) + attention


def parameters_of(config: ModelConfig, vocab_size: int) -> int:
    """The number of weights of such a model, without making it. Raises ConfigError when a tensor would be too large."""

    def counted(layers: int) -> int:
        with torch.device("meta"):
            model = Transformer(config.model_copy(update={"layers": layers}), vocab_size)
        return sum(p.numel() for p in model.parameters())

    try:
        one, two = counted(1), counted(2)
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:  # on "meta" only sizes can be wrong
        sizes = ("width", "heads", "kv_heads", "head_width", "mlp_width", "max_positions")
        said = ", ".join(f"model.{name} = {getattr(config, name)}" for name in sizes if getattr(config, name))
        reason = str(error).split("\n", 1)[0][:200]
        raise ConfigError("a tensor of this model would be too large to exist", said, reason) from None
    return one + (two - one) * (config.layers - 1)


class Block(nn.Module):
    """Attention and a feed-forward network, each with a norm, dropout and a residual sum."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.pre = config.norm_position == "pre"
        self.attention = Attention(config)
        self.attention_norm = _norm(config, config.width)
        self.mlp = MLP(config)
        self.mlp_norm = _norm(config, config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None, mask: Tensor | None, causal: bool) -> Tensor:
        if self.pre:
            x = x + self.dropout(self.attention(self.attention_norm(x), rotation, mask, causal))
            return x + self.dropout(self.mlp(self.mlp_norm(x)))
        x = self.attention_norm(x + self.dropout(self.attention(x, rotation, mask, causal)))
        return self.mlp_norm(x + self.dropout(self.mlp(x)))


class Attention(nn.Module):
    """Multi-head attention, grouped if there are fewer heads of keys and values than of queries."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.E, self.p_drop = config.E, config.dropout
        self.q = nn.Linear(config.width, config.heads * config.E, config.bias)
        self.k = nn.Linear(config.width, config.KV * config.E, config.bias)
        self.v = nn.Linear(config.width, config.KV * config.E, config.bias)
        self.out = nn.Linear(config.heads * config.E, config.width, config.bias)
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm, self.k_norm = _norm(config, config.E), _norm(config, config.E)
        self.grouped = config.heads != config.KV

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None, mask: Tensor | None, causal: bool) -> Tensor:
        B, T, _ = x.shape
        q, k, v = (project(x).view(B, T, -1, self.E) for project in (self.q, self.k, self.v))  # (B, T, H, E)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, E)
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        if self.grouped:  # repeated here: with enable_gqa and a mask, a fused kernel is not certain
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        x = attend(q, k, v, mask, causal, self.p_drop if self.training else 0.0)
        return self.out(x.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """The feed-forward network, with a gate for swiglu and geglu."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gated = config.mlp != "gelu"
        self.act = F.silu if config.mlp == "swiglu" else F.gelu
        self.up = nn.Linear(config.width, config.mlp_width, config.bias)
        if self.gated:
            self.gate = nn.Linear(config.width, config.mlp_width, config.bias)
        self.down = nn.Linear(config.mlp_width, config.width, config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x) if self.gated else self.act(self.up(x)))


class Head(nn.Module):
    """Hidden rows → logits. With `transform_head` it is the masked-LM head of BERT (Devlin et al. 2018)."""

    def __init__(self, config: ModelConfig, vocab_size: int):
        super().__init__()
        self.transform = config.transform_head
        if config.transform_head:
            self.dense = nn.Linear(config.width, config.width, config.bias)
            self.norm = _norm(config, config.width)
        self.decoder = nn.Linear(config.width, vocab_size, bias=config.transform_head)

    def forward(self, rows: Tensor) -> Tensor:
        if self.transform:
            rows = self.norm(F.gelu(self.dense(rows)))
        return self.decoder(rows)


class RMSNorm(nn.RMSNorm):
    """x / √(mean(x²) + eps) · weight (Zhang & Sennrich 2019, arXiv:1910.07467).

    torch has a kernel for it on accelerators. On a CPU torch makes a dozen passes over the activations, which cost
    three times as much as LayerNorm. `_RMSNorm` takes half of that time.
    """

    def forward(self, x: Tensor) -> Tensor:
        slow = x.device.type == "cpu" and x.dtype == self.weight.dtype == torch.float32
        return _RMSNorm.apply(x, self.weight, self.eps) if slow else super().forward(x)


class _RMSNorm(torch.autograd.Function):
    """RMSNorm in fp32 on a CPU, in fewer passes over the activations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = (torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1] + eps).rsqrt()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        normed = x * scale
        product = gradient * normed
        along = (product @ weight).unsqueeze(-1) / x.shape[-1]  # the gradient by `normed`: its part along `normed`
        by_x = (gradient * weight).addcmul_(normed, along, value=-1).mul_(scale)
        return by_x, product.flatten(0, -2).sum(0), None


def _norm(config: ModelConfig, width: int) -> nn.Module:
    if config.norm == "rmsnorm":
        return RMSNorm(width, eps=config.norm_eps)
    return nn.LayerNorm(width, eps=config.norm_eps, bias=config.bias)
