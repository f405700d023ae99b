"""Models of other projects that benchmarks train beside ours, in any size, without dropout."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Model = tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]  # a model, and its mean loss of (inputs, labels)


class Sizes(NamedTuple):
    layers: int
    width: int
    heads: int
    T: int  # the longest window
    vocabulary: int


def nanogpt(sizes: Sizes) -> Model:
    """GPT-2 as in karpathy/nanoGPT with its defaults, except for the sizes: biases, one matrix product for queries,
    keys and values, attention by torch, a tied head.
    """
    layers, width, heads, longest, vocabulary = sizes

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
            self.queries_keys_values, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, x):
            B, T, _ = x.shape
            parts = self.queries_keys_values(self.before_attention(x)).split(width, dim=2)
            q, k, v = (part.view(B, T, heads, width // heads).transpose(1, 2) for part in parts)
            seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(seen.transpose(1, 2).contiguous().view(B, T, width))
            return x + self.down(F.gelu(self.up(self.before_mlp(x))))

    class GPT(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(longest, width)
            self.blocks, self.norm = nn.Sequential(*(Block() for _ in range(layers))), nn.LayerNorm(width)
            self.head = nn.Linear(width, vocabulary, bias=False)
            self.head.weight = self.tokens.weight

        def forward(self, ids):
            places = torch.arange(ids.shape[1], device=ids.device)
            return self.head(self.norm(self.blocks(self.tokens(ids) + self.positions(places))))

    model = GPT()
    for weight in model.parameters():
        if weight.ndim == 2:
            nn.init.normal_(weight, std=0.02)

    def loss(inputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(inputs).view(-1, vocabulary), labels.view(-1), ignore_index=-1)

    return model, loss


def gpt2(sizes: Sizes) -> Model:
    """GPT-2 of Hugging Face. It shifts its labels itself: it gets the inputs as labels, one target less per window."""
    from transformers import GPT2Config, GPT2LMHeadModel

    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    shape: dict[str, Any] = {"n_positions": sizes.T, "n_embd": sizes.width, "n_layer": sizes.layers}
    shape |= {"vocab_size": sizes.vocabulary, "n_head": sizes.heads}
    model = GPT2LMHeadModel(GPT2Config(**shape, **none, use_cache=False))
    return model, lambda inputs, labels: model(input_ids=inputs, labels=inputs).loss


def bert(sizes: Sizes) -> Model:
    """BERT of Hugging Face."""
    from transformers import BertConfig, BertForMaskedLM

    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    shape: dict[str, Any] = {
        "hidden_size": sizes.width,
        "num_hidden_layers": sizes.layers,
        "vocab_size": sizes.vocabulary,
    }
    shape |= {"num_attention_heads": sizes.heads, "intermediate_size": 4 * sizes.width}
    model = BertForMaskedLM(BertConfig(**shape, **none, max_position_embeddings=sizes.T))
    return model, lambda inputs, labels: model(input_ids=inputs, labels=labels).loss
