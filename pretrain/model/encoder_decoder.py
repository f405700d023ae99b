"""An encoder and a decoder that reads it, the T5 family (Raffel et al. 2019, arXiv:1910.10683)."""

from torch import Tensor, nn

from pretrain.model.attention import Crossing, Layout, compute_dtype
from pretrain.model.config import ModelConfig
from pretrain.model.transformer import Attention, Block, RelativeBias, Transformer, make_masks, norm, rotations


class EncoderDecoder(Transformer):
    """The encoder is a Transformer. `decoder` has blocks of its own, and the embeddings and the head of the encoder."""

    def __init__(self, config: ModelConfig, vocab_size: int):
        super().__init__(config, vocab_size)
        self.decoder = Decoder(decoder_config(config))

    def decode(self, inputs: Tensor, layout: Layout, states: Tensor, crossing: Crossing) -> Tensor:
        """(B, T) ids → hidden states (B, T, D) of the decoder, which sees the encoder's `states` (B, S, D)."""
        return self.decoder(self.embedded(inputs, layout), layout, states, crossing)

    def flops_per_token(self, seq_len: int, targets: int) -> float:
        """As in `Transformer`, where the encoder sees `seq_len` tokens and the decoder `targets`."""
        config, blocks = self.decoder.config, self.decoder.blocks
        crossed = 2 * config.layers * config.width * config.KV * config.E  # keys and values of the encoder's tokens
        own = sum(p.numel() for p in blocks.parameters() if p.ndim == 2) - crossed
        attention = 12 * config.heads * config.E * config.layers * (targets + seq_len)
        return super().flops_per_token(seq_len, targets) + 6 * crossed + (6 * own + attention) * targets / seq_len


def decoder_config(config: ModelConfig) -> ModelConfig:
    """The shape of the decoder of an encoder with shape `config`."""
    assert config.decoder_layers is not None
    return config.model_copy(update={"layers": config.decoder_layers, "decoder_layers": None, "causal": True})


class Decoder(nn.Module):
    """Causal blocks, each of which also attends to the states of an encoder."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        if config.positions == "relative":
            self.position_bias = RelativeBias(config)
        self.blocks = nn.ModuleList(CrossBlock(config, layer) for layer in range(config.layers))
        self.final_norm = norm(config, config.width)

    def forward(self, x: Tensor, layout: Layout, states: Tensor, crossing: Crossing) -> Tensor:
        dtype = compute_dtype(x)
        added = self.position_bias(layout, dtype) if self.config.positions == "relative" else None
        if added is None:
            make_masks(self.config, layout, x, self.training)
        for block, rotation in zip(self.blocks, rotations(self.config, layout, x.dtype), strict=True):
            x = block(x, layout, rotation, added, states, crossing.mask(dtype))
        return self.final_norm(x)


class CrossBlock(Block):
    """A block with a second attention, to an encoder. Its norms come first."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config, layer)
        self.cross = Attention(config, None)
        self.cross_norm = norm(config, config.width)

    def forward(  # type: ignore[override]  # it sees an encoder, too
        self,
        x: Tensor,
        layout: Layout,
        rotation: tuple[Tensor, Tensor] | None,
        added: Tensor | None,
        states: Tensor,
        crossed: Tensor,
    ) -> Tensor:
        """`crossed` (B, 1, T, S): the mask of the encoder's tokens."""
        x = x + self.dropout(self.attention(self.attention_norm(x), layout, rotation, added))
        x = x + self.dropout(self.cross(self.cross_norm(x), layout, None, crossed, states))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))
