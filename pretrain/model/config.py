"""The shape of a model: the section `model` of a run's configuration. It imports no torch."""

from typing import Literal

from pydantic import Field, model_validator

from pretrain.config import Config


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
