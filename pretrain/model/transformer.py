"""One Transformer for encoders and decoders, shaped by `ModelConfig` and laid out as in Hugging Face.

Shapes: B batch, T tokens, D width, H heads, E head width, F feed-forward width, K targets, V vocabulary. Embeddings may
have a width of their own.

Documents packed into one window never see each other: `Layout.segments` (B, T) numbers the documents of a window, and a
token attends to its own document only. If every window holds one document there are no segments, and attention takes
its fastest kernel, which needs no mask. The vocabulary projection runs on the K predicted rows of a window, not on all
T. The dialects in `pretrain/dialects` only rename these weights, so RoPE and projections must follow Hugging Face.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pretrain.model.attention import Layout, attend, attend_with, compute_dtype, make_mask, rope, rotate
from pretrain.model.config import ModelConfig, Rope
from pretrain.model.projection import Projection
from pretrain.model.weights import Weight, before_projection, embedding, last_bias, matrix, projection, token_bias


class Transformer(nn.Module):
    """`forward` returns hidden states (B, T, D); `logits` projects chosen rows onto the vocabulary."""

    def __init__(self, config: ModelConfig, vocab_size: int):
        super().__init__()
        self.config, self.vocab_size = config, vocab_size
        self.embed = nn.Embedding(config.rows_of(vocab_size), config.D)
        if config.positions == "learned":
            self.embed_position = nn.Embedding(config.max_positions, config.D)
        if config.positions == "relative":
            self.position_bias = RelativeBias(config)
        if config.normalizes_embeddings:
            self.embed_norm = norm(config, config.D)
        if config.width != config.D:
            self.embed_project = nn.Linear(config.D, config.width, config.bias)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        if config.norm_position == "pre":
            self.final_norm = norm(config, config.width)
        self.head: Any = self._head()
        self.dropout = nn.Dropout(config.dropout)

    def weights(self) -> dict[str, Weight]:
        said = {"embed.weight": embedding(self.config, self.vocab_size)}
        said |= {"embed_position.weight": embedding(self.config), "embed_project.weight": matrix(self.config)}
        if not self.config.transform_head:  # else the norm before the projection is the head's
            said |= {f"final_norm.{name}": role for name, role in before_projection(self.config).items()}
        return said

    def _head(self) -> nn.Module:
        head = Head(self.config, self.vocab_size)
        if self.config.tie_embeddings:
            head.decoder.weight = self.embed.weight
        return head

    def forward(self, inputs: Tensor, layout: Layout) -> Tensor:
        """(B, T) ids → hidden states (B, T, D)."""
        config, x = self.config, self.embedded(inputs, layout)
        added = self.position_bias(layout, compute_dtype(x)) if config.positions == "relative" else None
        if added is None:
            make_masks(config, layout, x, self.training)
        for block, rotation in zip(self.blocks, rotations(config, layout, x.dtype), strict=True):
            x = block(x, layout, rotation, added)
        return self.final_norm(x) if config.norm_position == "pre" else x

    def embedded(self, inputs: Tensor, layout: Layout) -> Tensor:
        """(B, T) ids → the input of the first block, (B, T, D)."""
        config, x = self.config, self.embed(inputs)
        if config.positions == "learned":
            x = x + self.embed_position(layout.position_ids)
        if config.normalizes_embeddings:
            x = self.embed_norm(x)
        x = self.dropout(x)
        return x if config.width == config.D else self.embed_project(x)

    def logits(self, rows: Tensor) -> Tensor:
        """Hidden rows (…, D) → logits (…, V)."""
        return self.head(rows)

    def loss(self, rows: Tensor, targets: Tensor, weights: Tensor | None, z_loss: float = 0.0) -> Tensor:
        """Σ weight · loss of the `targets` (…,) of hidden rows (…, D), in nats, fp32. The logits never exist at once.

        The loss is the nll plus `z_loss` · (log Z)² (Chowdhery et al. 2022, arXiv:2204.02311, section 5).
        """
        return self.head(rows, targets, weights, z_loss=z_loss)

    def drawn(
        self, rows: Tensor, targets: Tensor, weights: Tensor | None, draws: Tensor, z_loss: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """As `loss`, and for each row an id that is drawn from its distribution with `draws` (…,), even in [0, 1)."""
        return self.head(rows, targets, weights, draws=draws, z_loss=z_loss)

    def score(self, rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The nll (nats, fp32) and the likeliest id of every row, both in the shape of `targets`."""
        return self.head(rows, targets, each=True)

    def flops_per_token(self, seq_len: int, targets: int) -> float:
        """Training FLOPs per input token: 6 per weight used in a product, and in each layer 12·H·E·n for attention
        scores and values, where a token sees n tokens: `seq_len`, or in a local layer the tokens in its window.

        The head is counted for `targets` of every `seq_len` tokens. Attention is counted in full, causal or not, as in
        PaLM (arXiv:2204.02311, appendix B). Source: Kaplan et al. 2020, arXiv:2001.08361, section 2.1.
        """
        config = self.config
        matrices = sum(p.numel() for block in self.blocks for p in block.parameters() if p.ndim == 2)
        head = config.D * config.rows_of(self.vocab_size) + (config.width * config.D if config.transform_head else 0)
        windows = [config.window_of(layer) for layer in range(config.layers)]
        seen = sum(seq_len if window is None else min(seq_len, 2 * window + 1) for window in windows)
        attention = 12 * config.heads * config.E * seen
        return 6 * (matrices + head * targets / seq_len) + attention


def rotations(config: ModelConfig, layout: Layout, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor] | None]:
    """The rotations of each layer; None: it has none. Local layers may have rotations of their own."""
    made: dict[Rope, tuple[Tensor, Tensor]] = {}
    for layer in range(config.layers):
        kind = config.rope_of(layer)
        if kind is not None and kind not in made:
            made[kind] = rope(layout.position_ids, config.E, kind, dtype)
        yield None if kind is None else made[kind]


def make_masks(config: ModelConfig, layout: Layout, x: Tensor, training: bool) -> None:
    """Make the dense masks that the layers need for hidden states `x` (B, T, D), before the first of them."""
    for window in {config.window_of(layer) for layer in range(config.layers)}:
        make_mask(layout, window, x, config.dropout if training else 0.0)


class Block(nn.Module):
    """Attention and a feed-forward network, each with a norm, dropout and a residual sum.

    With `recomputed` no activation of the block is kept for the backward pass, which computes them once more, with the
    same dropout (Chen et al. 2016, arXiv:1604.06174).
    """

    recomputed = False

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.pre = config.norm_position == "pre"
        self.attention = Attention(config, config.window_of(layer))
        self.attention_norm = norm(config, config.width) if layer or config.first_norm else nn.Identity()
        self.mlp = MLP(config)
        self.mlp_norm = norm(config, config.width)
        self.dropout = nn.Dropout(config.dropout)

    def __call__(self, *inputs: Any) -> Tensor:
        if self.recomputed and torch.is_grad_enabled():
            random = self.dropout.p > 0
            return checkpoint(super().__call__, *inputs, use_reentrant=False, preserve_rng_state=random)
        return super().__call__(*inputs)

    def forward(
        self, x: Tensor, layout: Layout, rotation: tuple[Tensor, Tensor] | None, added: Tensor | None = None
    ) -> Tensor:
        """`rotation`: of rope. `added` (…, T, T): the mask and the bias of relative positions."""
        if self.pre:
            x = x + self.dropout(self.attention(self.attention_norm(x), layout, rotation, added))
            return x + self.dropout(self.mlp(self.mlp_norm(x)))
        x = self.attention_norm(x + self.dropout(self.attention(x, layout, rotation, added)))
        return self.mlp_norm(x + self.dropout(self.mlp(x)))


class Attention(nn.Module):
    """Multi-head attention, grouped if there are fewer heads of keys and values than of queries."""

    def __init__(self, config: ModelConfig, window: int | None):
        """`window` None: the layer is global."""
        super().__init__()
        self.config, self.E, self.window, self.p_drop = config, config.E, window, config.dropout
        self.q = nn.Linear(config.width, config.heads * config.E, config.bias)
        self.k = nn.Linear(config.width, config.KV * config.E, config.bias)
        self.v = nn.Linear(config.width, config.KV * config.E, config.bias)
        self.out = nn.Linear(config.heads * config.E, config.width, config.bias)
        self.norm_first = config.qk_norm and not config.qk_norm_after_rope
        self.norm_last = config.qk_norm and config.qk_norm_after_rope
        if config.qk_norm:
            self.q_norm, self.k_norm = norm(config, config.E), norm(config, config.E)
        self.grouped = config.heads != config.KV
        self.scale = 1.0 if config.positions == "relative" else None

    def weights(self) -> dict[str, Weight]:
        into, last = matrix(self.config), matrix(self.config, last=True)
        first = replace(into, std=into.std / self.E**0.5) if self.scale else into  # what scores are not divided by
        matrices = {"q.weight": first, "k.weight": into, "v.weight": into, "out.weight": last}
        return matrices | {"out.bias": last_bias(self.config)}

    def forward(
        self,
        x: Tensor,
        layout: Layout,
        rotation: tuple[Tensor, Tensor] | None,
        added: Tensor | None = None,
        states: Tensor | None = None,
    ) -> Tensor:
        """`added` (…, T, S) takes the place of the layout. `states` (B, S, D) are seen in place of `x` (B, T, D)."""
        B, T, _ = x.shape
        seen = x if states is None else states
        q = self.q(x).view(B, T, -1, self.E)
        k, v = (project(seen).view(B, seen.shape[1], -1, self.E) for project in (self.k, self.v))  # (B, S, H, E)
        if self.norm_first:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, E)
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        if self.norm_last:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.grouped:  # repeated here: with enable_gqa and a mask, a fused kernel is not certain
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        dropout = self.p_drop if self.training else 0.0
        if added is None:
            x = attend(q, k, v, layout, self.window, dropout)
        else:
            x = attend_with(q, k, v, added, dropout, self.scale)
        return self.out(x.transpose(1, 2).reshape(B, T, -1))


class RelativeBias(nn.Module):
    """A learned number for each head and distance, added to the scores (Raffel et al. 2019, arXiv:1910.10683, 2.1).

    Distances fall into `BUCKETS` kinds: the smaller half exactly, the larger ones by their logarithm up to `FARTHEST`.
    Without causal attention a half of them are for the tokens ahead. All layers share the table.
    """

    BUCKETS, FARTHEST = 32, 128

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.table = nn.Embedding(self.BUCKETS, config.heads)

    def weights(self) -> dict[str, Weight]:
        return {"table.weight": embedding(self.config)}

    def forward(self, layout: Layout, dtype: torch.dtype) -> Tensor:
        """(B or 1, H, T, T): the bias and the mask of `layout`."""
        place = torch.arange(layout.position_ids.shape[1], device=layout.position_ids.device)
        bias = self.table(self.kinds(place - place[:, None])).permute(2, 0, 1)  # (H, T, T)
        return (layout.mask(None, dtype) + bias).to(dtype)

    def kinds(self, ahead: Tensor) -> Tensor:
        """The kind of each distance: how far the key is ahead of the query."""
        if self.config.causal:
            half, first, distance = self.BUCKETS, torch.zeros_like(ahead), (-ahead).clamp(min=0)
        else:
            half, distance = self.BUCKETS // 2, ahead.abs()
            first = (ahead > 0).long() * half
        exact = half // 2
        # The order of these operations is that of transformers: another one rounds some distances into other kinds.
        by_log = torch.log(distance.clamp(min=1).float() / exact) / math.log(self.FARTHEST / exact) * (half - exact)
        return first + torch.where(distance < exact, distance, (exact + by_log.long()).clamp(max=half - 1))


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


MLPS: dict[str, tuple[bool, Callable[[Tensor], Tensor]]] = {  # whether there is a gate, and the activation
    "gelu": (False, F.gelu),
    "gelu_tanh": (False, _gelu_tanh),
    "relu2": (False, _relu2),  # So et al. 2021, "Primer", arXiv:2109.08668
    "swiglu": (True, F.silu),  # Shazeer 2020, arXiv:2002.05202
    "geglu": (True, F.gelu),
    "geglu_tanh": (True, _gelu_tanh),
}


class MLP(nn.Module):
    """The feed-forward network, with a gate for swiglu and geglu."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.gated, self.act = MLPS[config.mlp]
        self.up = nn.Linear(config.width, config.mlp_width, config.bias)
        if self.gated:
            self.gate = nn.Linear(config.width, config.mlp_width, config.bias)
        self.down = nn.Linear(config.mlp_width, config.width, config.bias)

    def weights(self) -> dict[str, Weight]:
        into, last = matrix(self.config), matrix(self.config, last=True)
        return {"up.weight": into, "gate.weight": into, "down.weight": last, "down.bias": last_bias(self.config)}

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x) if self.gated else self.act(self.up(x)))


class Head(nn.Module):
    """Hidden rows → logits. With `transform_head` it is the masked-LM head of BERT (Devlin et al. 2018)."""

    def __init__(self, config: ModelConfig, vocab_size: int):
        super().__init__()
        self.config, self.vocab_size, self.transform = config, vocab_size, config.transform_head
        if config.transform_head:
            self.dense = nn.Linear(config.width, config.D, config.bias)
            self.norm = norm(config, config.D)
        rows = config.rows_of(vocab_size)
        self.decoder = Projection(config.D, vocab_size, config.transform_head, config.logit_cap, rows)

    def weights(self) -> dict[str, Weight]:
        norm = {f"norm.{name}": role for name, role in before_projection(self.config).items()}
        table = {"dense.weight": matrix(self.config), "decoder.weight": projection(self.config, self.vocab_size)}
        return norm | table | {"decoder.bias": token_bias(self.vocab_size)}

    def forward(self, rows: Tensor, *targets: Tensor | None, **asked: Any) -> Any:
        """The result of the projection, which the arguments choose: logits, a summed loss, or scores."""
        if self.transform:
            rows = self.norm(F.gelu(self.dense(rows)))
        return self.decoder(rows, *targets, **asked)


class RMSNorm(nn.RMSNorm):
    """x / √(mean(x²) + eps) · weight (Zhang & Sennrich 2019, arXiv:1910.07467).

    torch has a kernel for it on accelerators. On a CPU torch makes a dozen passes over the activations, which cost
    three times as much as LayerNorm. `_RMSNorm` takes half of that time.
    """

    def forward(self, x: Tensor) -> Tensor:
        one_dtype = self.weight is None or self.weight.dtype == torch.float32
        slow = x.device.type == "cpu" and x.dtype == torch.float32 and one_dtype
        return _RMSNorm.apply(x, self.weight, self.eps) if slow else super().forward(x)


class _RMSNorm(torch.autograd.Function):
    """RMSNorm in fp32 on a CPU, in fewer passes over the activations. `weight` None: every weight is 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        scale = (torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1] + eps).rsqrt()
        ctx.save_for_backward(x, weight, scale)
        normed = x * scale
        return normed if weight is None else normed.mul_(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        normed = x * scale
        product = gradient * normed
        along = (product.sum(-1) if weight is None else product @ weight).unsqueeze(-1) / x.shape[-1]
        weighted = gradient.clone() if weight is None else gradient * weight
        by_x = weighted.addcmul_(normed, along, value=-1).mul_(scale)  # without its part along `normed`
        return by_x, None if weight is None else product.flatten(0, -2).sum(0), None


def norm(config: ModelConfig, width: int) -> nn.Module:
    if config.norm == "rmsnorm":
        return RMSNorm(width, eps=config.norm_eps, elementwise_affine=config.norm_weights)
    return nn.LayerNorm(width, eps=config.norm_eps, bias=config.bias)
