"""The first weights of a model."""

import torch
from torch import Tensor, nn

from pretrain.model.weights import weights_of


@torch.no_grad()
def initialise(model: nn.Module, seed: int, unigram: Tensor | None = None) -> None:
    """Fill every weight in place, drawn from `seed`. The counts `unigram` (V,) set the output bias, if there is one.

        weight                                   first values
        embeddings, projections, head            N(0, init_std²)
        last projection of a branch, pre-norm    N(0, (init_std / √(2·layers))²)     Radford et al. 2019, section 2.3
        queries, relative positions              their std / √(head width), which scores are not divided by
        norms                                    1, biases 0
        output bias                              log p(token), 1 added to each count
        rows that pad the vocabulary             0

    Each weight has the values that its entry of the table says (weights.py). Without the output bias the small encoder
    of configs/sample stays at the unigram loss for its whole run: it spends its steps on learning the token frequencies
    through the tied embedding.
    """
    generator = torch.Generator().manual_seed(seed)
    roles = weights_of(model)
    for name, weight in model.named_parameters():
        role = roles[name]
        used = weight[: role.tokens]
        if role.unigram and unigram is not None:
            counts = unigram.double() + 1
            used.copy_((counts / counts.sum()).log())
        elif role.std:
            used.copy_(torch.normal(0.0, role.std, used.shape, generator=generator))
        else:
            used.fill_(role.constant)
        weight[len(used) :].zero_()
