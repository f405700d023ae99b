"""One Transformer for encoders and decoders; a closed set of knobs, names and layouts as in Hugging Face.

Shapes: B batch, T tokens, D width, H heads, E head width, F feed-forward width, K targets, V vocabulary.

Documents packed into one window never see each other: `segments` (B, T) says which document a token is of, and
attention is allowed inside a segment only. Without `segments` every window holds one document, and attention takes its
fastest kernel, which needs no mask. The vocabulary projection runs on the K predicted rows of a window, not
on all T. Dialects under `pretrain/dialects` rename these weights, so RoPE and projections follow Hugging Face.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from pretrain.config import Config
from pretrain.errors import ConfigError


class ModelConfig(Config):
    """Shape of the model. The vocabulary's size comes with the tokenizer and is never typed."""

    causal: bool
    layers: int = Field(gt=0)
    width: int = Field(gt=0)
    heads: int = Field(gt=0)
    kv_heads: int | None = Field(None, gt=0)  # default: heads (no grouping)
    head_width: int | None = Field(None, gt=0)  # default: width / heads
    mlp_width: int = Field(gt=0)
    max_positions: int = Field(gt=0)
    norm: Literal["layernorm", "rmsnorm"]
    norm_position: Literal["pre", "post"]
    norm_eps: float = Field(gt=0)
    positions: Literal["learned", "rope"]
    rope_theta: float = Field(10_000.0, gt=0)
    mlp: Literal["gelu", "swiglu", "geglu"]
    bias: bool
    qk_norm: bool = False
    tie_embeddings: bool = True
    transform_head: bool = False  # BERT's dense + GELU + norm before the vocabulary, and a bias after it
    dropout: float = Field(0.0, ge=0, lt=1)
    init_std: float = Field(0.02, gt=0)

    @model_validator(mode="after")
    def _divides(self) -> "ModelConfig":
        if self.head_width is None and self.width % self.heads:
            raise ValueError(f"model.width = {self.width} does not divide by model.heads = {self.heads}")
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"model.heads = {self.heads} does not divide by model.kv_heads = {self.kv_heads}")
        if self.positions == "rope" and self.E % 2:
            raise ValueError(f"model.positions = rope needs an even head width, found {self.E}")
        return self

    @property
    def E(self) -> int:
        return self.head_width or self.width // self.heads

    @property
    def KV(self) -> int:
        return self.kv_heads or self.heads


class Transformer(nn.Module):
    """`forward` gives hidden states (B, T, D); `logits` maps chosen rows to the vocabulary."""

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

    def forward(self, inputs: Tensor, segments: Tensor | None, position_ids: Tensor) -> Tensor:
        """(B, T) ids, document numbers and positions inside the document → hidden states (B, T, D).

        `segments` is None where each window holds one document.
        """
        config = self.config
        x = self.embed(inputs)
        if config.positions == "learned":
            x = x + self.embed_position(position_ids)
            rotation = None
        else:
            rotation = rope(position_ids, config.E, config.rope_theta, x.dtype)
        if config.norm_position == "post":
            x = self.embed_norm(x)
        x = self.dropout(x)
        mask = None if segments is None else attention_mask(segments, config.causal, _compute_dtype(x))
        for block in self.blocks:
            x = block(x, rotation, mask)
        return self.final_norm(x) if config.norm_position == "pre" else x

    def logits(self, rows: Tensor) -> Tensor:
        """Hidden rows (…, D) → logits (…, V)."""
        return self.head(rows)

    def flops_per_token(self, seq_len: int, targets: int) -> float:
        """Training FLOPs per input token: 6 per weight used in a product, 12·L·H·E·T for attention scores and values.

        The head counts for `targets` of `seq_len` tokens. Source: Kaplan et al. 2020, arXiv:2001.08361, section 2.1;
        attention counted in full, causal or not, as PaLM (arXiv:2204.02311, appendix B) does.
        """
        config = self.config
        matrices = sum(p.numel() for block in self.blocks for p in block.parameters() if p.ndim == 2)
        head = config.width * self.vocab_size + (config.width**2 if config.transform_head else 0)
        attention = 12 * config.layers * config.heads * config.E * seq_len
        return 6 * (matrices + head * targets / seq_len) + attention


def parameters_of(config: ModelConfig, vocab_size: int) -> int:
    """How many weights such a model has, without making it. Raises ConfigError when they cannot be counted."""

    def counted(layers: int) -> int:
        with torch.device("meta"):
            model = Transformer(config.model_copy(update={"layers": layers}), vocab_size)
        return sum(p.numel() for p in model.parameters())

    try:
        one, two = counted(1), counted(2)
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:  # on this device only sizes can go wrong
        sizes = ("width", "heads", "kv_heads", "head_width", "mlp_width", "max_positions")
        said = ", ".join(f"model.{name} = {getattr(config, name)}" for name in sizes if getattr(config, name))
        reason = str(error).split("\n", 1)[0][:200]
        raise ConfigError("a tensor of this model would be too large to exist", said, reason) from None
    return one + (two - one) * (config.layers - 1)


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.pre = config.norm_position == "pre"
        self.attention = Attention(config)
        self.attention_norm = _norm(config, config.width)
        self.mlp = MLP(config)
        self.mlp_norm = _norm(config, config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None, mask: Tensor | None) -> Tensor:
        if self.pre:
            x = x + self.dropout(self.attention(self.attention_norm(x), rotation, mask))
            return x + self.dropout(self.mlp(self.mlp_norm(x)))
        x = self.attention_norm(x + self.dropout(self.attention(x, rotation, mask)))
        return self.mlp_norm(x + self.dropout(self.mlp(x)))


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.E, self.p_drop, self.causal = config.E, config.dropout, config.causal
        self.q = nn.Linear(config.width, config.heads * config.E, config.bias)
        self.k = nn.Linear(config.width, config.KV * config.E, config.bias)
        self.v = nn.Linear(config.width, config.KV * config.E, config.bias)
        self.out = nn.Linear(config.heads * config.E, config.width, config.bias)
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm, self.k_norm = _norm(config, config.E), _norm(config, config.E)
        self.grouped = config.heads != config.KV

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None, mask: Tensor | None) -> Tensor:
        B, T, _ = x.shape
        q, k, v = (project(x).view(B, T, -1, self.E) for project in (self.q, self.k, self.v))  # (B, T, H, E)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, E)
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        if self.grouped:  # written out: with enable_gqa and a mask no fused kernel is certain to be taken
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        x = attend(q, k, v, mask, self.causal, self.p_drop if self.training else 0.0)
        return self.out(x.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
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
    """Hidden rows → logits; with `transform_head` as in BERT (Devlin et al. 2018, the masked-LM head)."""

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


@torch.no_grad()
def initialise(model: Transformer, seed: int, unigram: Tensor | None = None) -> None:
    """Fill every weight from `seed`, in place; `unigram` (V,) counts set the output bias where there is one.

        weight                                   drawn from
        embeddings, projections, head            N(0, init_std²)
        last projection of a branch, pre-norm    N(0, (init_std / √(2·layers))²)     Radford et al. 2019, section 2.3
        norms                                    1, biases 0
        output bias                              log p(token), 1 added to each count

    Without the last row the small encoder of configs/sample stays at the unigram loss for its whole run: it spends
    its steps learning token frequencies through the tied embedding.
    """
    config = model.config
    generator = torch.Generator().manual_seed(seed)
    branch_std = config.init_std / (2 * config.layers) ** 0.5 if config.norm_position == "pre" else config.init_std
    for name, weight in model.named_parameters():
        if name.endswith(".bias"):
            weight.zero_()
        elif weight.ndim == 1:
            weight.fill_(1.0)
        else:
            std = branch_std if name.endswith((".out.weight", ".down.weight")) else config.init_std
            weight.copy_(torch.normal(0.0, std, weight.shape, generator=generator))
    if unigram is not None and config.transform_head:
        counts = unigram.double() + 1
        model.head.decoder.bias.copy_((counts / counts.sum()).log())


class RMSNorm(nn.RMSNorm):
    """x / √(mean(x²) + eps) · weight (Zhang & Sennrich 2019, arXiv:1910.07467).

    torch has a kernel for it on accelerators. On a CPU torch composes it of a dozen passes over the activations, three
    times the cost of LayerNorm; `_RMSNorm` takes half of that.
    """

    def forward(self, x: Tensor) -> Tensor:
        slow = x.device.type == "cpu" and x.dtype == self.weight.dtype == torch.float32
        return _RMSNorm.apply(x, self.weight, self.eps) if slow else super().forward(x)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = (torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1] + eps).rsqrt()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        normed = x * scale
        product = gradient * normed
        along = (product @ weight).unsqueeze(-1) / x.shape[-1]  # of the gradient by `normed`, along `normed` itself
        by_x = (gradient * weight).addcmul_(normed, along, value=-1).mul_(scale)
        return by_x, product.flatten(0, -2).sum(0), None


def _norm(config: ModelConfig, width: int) -> nn.Module:
    if config.norm == "rmsnorm":
        return RMSNorm(width, eps=config.norm_eps)
    return nn.LayerNorm(width, eps=config.norm_eps, bias=config.bias)
