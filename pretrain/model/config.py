"""The shape of a model: the section `model` of a run's configuration. It imports no torch."""

from typing import Literal

from pydantic import Field, model_validator

from pretrain.config import Config


class ModelConfig(Config):
    """The shape of the model. The size of the vocabulary is not typed: it follows from the tokenizer."""

    causal: bool
    """Whether a token sees only itself and the tokens before it: true for a decoder, false for an encoder."""
    layers: int = Field(gt=0)
    """The number of Transformer blocks."""
    width: int = Field(gt=0)
    """The size of a hidden state."""
    heads: int = Field(gt=0)
    """The number of attention heads in a block."""
    kv_heads: int | None = Field(None, gt=0)
    """The number of heads of keys and values, for grouped-query attention; null: as many as `heads`."""
    head_width: int | None = Field(None, gt=0)
    """The size of a head; null: `width` / `heads`."""
    mlp_width: int = Field(gt=0)
    """The size of the hidden layer of the feed-forward network."""
    max_positions: int = Field(gt=0)
    """The most tokens of a window. With learned positions it is the number of their embeddings."""
    norm: Literal["layernorm", "rmsnorm"]
    """The kind of normalization."""
    norm_position: Literal["pre", "post"]
    """pre: normalize the input of attention and feed-forward network; post: normalize after each residual sum."""
    norm_eps: float = Field(gt=0)
    """The number that is added to the variance in a norm, so that nothing is divided by zero."""
    positions: Literal["learned", "rope"]
    """learned: an embedding for each position; rope: rotary embeddings of queries and keys."""
    rope_theta: float = Field(10_000.0, gt=0)
    """The base of the rotation frequencies of rope. Raise it for long windows."""
    mlp: Literal["gelu", "swiglu", "geglu"]
    """The activation of the feed-forward network; swiglu and geglu have a gate, a third matrix."""
    bias: bool
    """Whether the projections of the blocks and the layernorms have biases."""
    qk_norm: bool = False
    """Whether queries and keys are normalized, head by head."""
    tie_embeddings: bool = True
    """Whether the projection onto the vocabulary uses the weights of the token embedding."""
    transform_head: bool = False
    """Whether the head is BERT's: dense layer, GELU and norm before the projection, and a bias after it."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """The share of activations that training sets to zero, after the embeddings, in attention and after each branch."""
    init_std: float = Field(0.02, gt=0)
    """The standard deviation of the first weights."""

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
