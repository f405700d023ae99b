"""The projection onto the vocabulary, and the cross-entropy of its logits, which never exist all at once.

N rows of width D have N · V logits: at 32 windows of 512 tokens and 50,000 ids they take 3.3 GB in fp32, and as much
again for their gradient. Here they are made a chunk at a time. The gradient of a chunk is made beside its loss, so no
logit is kept or made twice.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

CHUNK = 1 << 24  # logits that exist at once: 64 MB in fp32


class Projection(nn.Linear):
    """Rows (…, D) → logits (…, V), bounded by `cap` if there is one: x becomes cap · tanh(x / cap).

    The weight may have more rows than there are ids. Their logits are -∞: they take no probability from the others, as
    they would if they were learnt, so nothing changes when they are left out.

    The three methods of a caller go through `forward`, because ZeRO 3 gathers the weight for that call.
    """

    def __init__(self, width: int, vocab_size: int, bias: bool, cap: float | None, rows: int | None = None):
        """`rows` of the weight; None: as many as ids."""
        super().__init__(width, rows or vocab_size, bias)
        self.vocab_size, self.cap = vocab_size, cap

    def forward(  # type: ignore[override]  # a caller passes what it asks for
        self,
        rows: Tensor,
        targets: Tensor | None = None,
        weights: Tensor | None = None,
        each: bool = False,
        draws: Tensor | None = None,
        z_loss: float = 0.0,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Without `targets` (…,) the logits. With them the summed loss in nats, fp32, each row times its weight.

        The loss of a row is its nll plus `z_loss` · (log Z)², where Z is the sum of the exponentials of its logits.
        With `each` the nll and the likeliest id of every row, both in the shape of `targets`, without a gradient. With
        `draws` (…,) in [0, 1) the summed loss, and an id for every row, drawn from the distribution that it predicts.
        """
        if targets is None:
            return _capped(super().forward(rows), self.cap)[..., : self.vocab_size]
        flat, wanted = rows.reshape(-1, rows.shape[-1]), targets.reshape(-1).long()
        if each:
            nll, likeliest = _scores(flat, self.weight, self.bias, self.cap, self.vocab_size, wanted)
            return nll.view(targets.shape), likeliest.view(targets.shape)
        share = torch.ones_like(wanted, dtype=torch.float32) if weights is None else weights.reshape(-1).float()
        evenly = None if draws is None else draws.reshape(-1)
        shape = flat, self.weight, self.bias, self.cap, self.vocab_size
        total, drawn = _SummedLoss.apply(*shape, wanted, share, evenly, z_loss)
        return total if draws is None else (total, drawn.view(targets.shape))


class _SummedLoss(torch.autograd.Function):
    """Σ weight · loss over rows (N, D), in fp32. The logits are made in the dtype that autocast asks for.

    The second result is the id that each row draws, if there are `draws` (N,).
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        matrix: Tensor,
        bias: Tensor | None,
        cap: float | None,
        vocab_size: int,
        targets: Tensor,
        share: Tensor,
        draws: Tensor | None,
        z_loss: float,
    ) -> tuple[Tensor, Tensor | None]:
        wanted = any(ctx.needs_input_grad)
        total = torch.zeros((), dtype=torch.float32, device=rows.device)
        by_rows = torch.empty_like(rows) if wanted else None
        by_matrix: Tensor | None = None
        by_bias = torch.zeros_like(bias, dtype=torch.float32) if wanted and bias is not None else None
        drawn = None if draws is None else torch.empty_like(targets)
        dtype = _dtype(rows)
        with torch.autocast(rows.device.type, enabled=False):
            cast = matrix.to(dtype)
            for part in _chunks(rows, len(matrix)):
                some = rows[part].to(dtype)
                logits = _logits(some, cast, bias, cap, vocab_size)
                score = logits.gather(1, targets[part, None])
                slope = 1 - (logits / cap).square().clamp_(max=1) if wanted and cap is not None else None  # 0 at -∞
                logs = logits.log_softmax(-1)
                del logits
                losses = -logs.gather(1, targets[part, None])
                log_z = losses + score  # (N, 1)
                total += (losses + z_loss * log_z.square() if z_loss else losses)[:, 0] @ share[part]
                gradient = logs.exp_()  # the probabilities
                if drawn is not None and draws is not None:
                    reached = gradient.cumsum(-1)
                    below = (reached <= draws[part, None] * reached[:, -1:]).sum(-1)
                    drawn[part] = below.clamp_(max=vocab_size - 1)
                if by_rows is None:
                    continue
                if z_loss:
                    gradient *= 1 + 2 * z_loss * log_z
                gradient[torch.arange(len(some), device=rows.device), targets[part]] -= 1
                gradient = gradient if slope is None else gradient.mul_(slope)
                # A weight multiplies a row of width D, which is shorter than a row of logits.
                low, weighted = gradient.to(dtype), (some * share[part, None]).to(dtype)
                by_rows[part] = (low @ cast).mul_(share[part, None])
                if by_matrix is None:
                    by_matrix = (low.t() @ weighted).float()
                elif dtype == torch.float32:
                    by_matrix.addmm_(low.t(), weighted)
                else:
                    by_matrix += low.t() @ weighted
                if by_bias is not None:
                    by_bias += share[part] @ gradient
        ctx.slopes = by_rows, by_matrix, by_bias
        ctx.dtypes = matrix.dtype, None if bias is None else bias.dtype
        if drawn is not None:
            ctx.mark_non_differentiable(drawn)
        return total, drawn

    @staticmethod
    def backward(ctx: Any, scale: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        by_rows, by_matrix, by_bias = ctx.slopes
        of_matrix, of_bias = ctx.dtypes
        del ctx.slopes  # they are multiplied in place, once
        by_bias = None if by_bias is None else by_bias.mul_(scale).to(of_bias)
        return by_rows.mul_(scale), by_matrix.mul_(scale).to(of_matrix), by_bias, *[None] * 6


@torch.no_grad()
def _scores(
    rows: Tensor, matrix: Tensor, bias: Tensor | None, cap: float | None, vocab_size: int, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """The nll (nats, fp32) and the likeliest id of every row, both (N,)."""
    nll, likeliest = torch.empty(len(rows), device=rows.device), torch.empty_like(targets)
    dtype = _dtype(rows)
    with torch.autocast(rows.device.type, enabled=False):
        cast = matrix.to(dtype)
        for part in _chunks(rows, len(matrix)):
            logits = _logits(rows[part].to(dtype), cast, bias, cap, vocab_size)
            nll[part] = logits.logsumexp(-1) - logits.gather(1, targets[part, None])[:, 0]
            likeliest[part] = logits.argmax(-1)
    return nll, likeliest


def _logits(rows: Tensor, matrix: Tensor, bias: Tensor | None, cap: float | None, vocab_size: int) -> Tensor:
    """The logits of each row of the matrix in fp32; -∞ for those after `vocab_size`."""
    logits = nn.functional.linear(rows, matrix, None if bias is None else bias.to(rows.dtype)).float()
    logits = _capped(logits, cap)
    logits[:, vocab_size:] = -torch.inf
    return logits


def _capped(logits: Tensor, cap: float | None) -> Tensor:
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _chunks(rows: Tensor, vocab_size: int) -> Iterator[slice]:
    size = max(1, CHUNK // vocab_size)
    return (slice(begin, begin + size) for begin in range(0, len(rows) or 1, size))


def _dtype(rows: Tensor) -> torch.dtype:
    """The dtype of the product: autocast may change it."""
    kind = rows.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else rows.dtype
