"""The first weights of a model."""

import torch
from torch import Tensor

from pretrain.model.transformer import Transformer


@torch.no_grad()
def initialise(model: Transformer, seed: int, unigram: Tensor | None = None) -> None:
    """Fill every weight in place, drawn from `seed`. The counts `unigram` (V,) set the output bias, if there is one.

        weight                                   drawn from
        embeddings, projections, head            N(0, init_std²)
        last projection of a branch, pre-norm    N(0, (init_std / √(2·layers))²)     Radford et al. 2019, section 2.3
        norms                                    1, biases 0
        output bias                              log p(token), 1 added to each count

    Without the last row the small encoder of configs/sample stays at the unigram loss for its whole run: it spends
    its steps on learning the token frequencies through the tied embedding.
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
