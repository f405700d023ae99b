"""The shape of a model: the section `model` of a run's configuration. It imports no torch."""

from dataclasses import dataclass
from typing import Literal

from pydantic import Field, model_validator

from pretrain.config import Config, free

# The Transformers that a model is composed of: one, a discriminator and its generator, or an encoder and a decoder.
Composition = Literal["one", "generator", "encoder_decoder"]


class GeneratorConfig(Config):
    """The generator of replaced-token detection. It has the embeddings of the model and BERT's masked-LM head, and as
    many heads of keys and values as of queries. All other keys are those of the model."""

    layers: int = Field(gt=0)
    """The number of its Transformer blocks."""
    width: int = Field(gt=0)
    """The size of its hidden states: a quarter to a half of the model's."""
    heads: int = Field(gt=0)
    """The number of its attention heads in a block."""
    mlp_width: int = Field(gt=0)
    """The size of the hidden layer of its feed-forward network."""


class RopeScaling(Config):
    """Longer windows than a model was trained with (YaRN, Peng et al. 2023, arXiv:2309.00071).

    Slow rotations become slower by the factor `max_positions` / `original_positions`, and fast ones stay.
    """

    kind: Literal["yarn"]
    """The name of the method."""
    original_positions: int = Field(gt=0)
    """The `max_positions` of the model before its windows became longer."""


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
    embed_width: int | None = Field(None, gt=0)
    """The size of the embeddings, if it differs from `width`: a projection to `width` follows them; null: `width`."""
    max_positions: int = Field(gt=0)
    """The most tokens of a window. With learned positions it is the number of their embeddings."""
    norm: Literal["layernorm", "rmsnorm"]
    """The kind of normalization."""
    norm_weights: bool = True
    """Whether norms scale each feature by a weight. Only rmsnorm can do without."""
    norm_position: Literal["pre", "post"]
    """pre: normalize the input of attention and feed-forward network; post: normalize after each residual sum."""
    embed_norm: bool | None = None
    """Whether the embeddings are normalized before the first block; null: only if `norm_position` is post."""
    first_norm: bool = True
    """Whether the first block normalizes the input of its attention. After `embed_norm` it need not."""
    norm_eps: float = Field(gt=0)
    """The number that is added to the variance in a norm, so that nothing is divided by zero."""
    positions: Literal["learned", "rope", "relative"]
    """learned: an embedding for each position; rope: rotary embeddings of queries and keys; relative: T5's bias of
    attention for each head and distance, with scores that are not divided by the root of the head width."""
    rope_theta: float = Field(10_000.0, gt=0)
    """The base of the rotation frequencies of rope. Raise it for long windows."""
    rope_scaling: RopeScaling | None = None
    """How rope goes to windows that are longer than those of an earlier training, in global layers; null: as before."""
    window: int | None = Field(None, gt=0)
    """In a local layer a token sees only tokens that are at most this many positions away; null: no layer is local."""
    global_every: int = Field(3, gt=0)
    """With `window`, the first layer and every n-th after it are global: a token sees its whole document."""
    local_rope_theta: float | None = Field(None, gt=0)
    """The `rope_theta` of local layers; null: the same."""
    mlp: Literal["gelu", "gelu_tanh", "relu2", "swiglu", "geglu", "geglu_tanh"]
    """The activation of the feed-forward network: GELU, its approximation with tanh, or the square of ReLU; swiglu,
    geglu and geglu_tanh have a gate, a third matrix."""
    bias: bool
    """Whether the projections of the blocks and the layernorms have biases."""
    qk_norm: bool = False
    """Whether queries and keys are normalized, head by head."""
    qk_norm_after_rope: bool = False
    """Whether `qk_norm` follows the rotation of rope; false: it comes before."""
    tie_embeddings: bool = True
    """Whether the projection onto the vocabulary uses the weights of the token embedding."""
    vocab_multiple: int = Field(1, gt=0)
    """The rows of the token embedding and of the head are rounded up to a multiple of this number; GPUs are faster with
    64 or 128. Rows without a token take no probability and are left out at export."""
    transform_head: bool = False
    """Whether the head is BERT's: dense layer, GELU and norm before the projection, and a bias after it."""
    logit_cap: float | None = Field(None, gt=0)
    """The bound c of the logits: x becomes c · tanh(x / c); null: logits have no bound."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """The share of activations that training sets to zero, after the embeddings, in attention and after each branch."""
    init_std: float = Field(0.02, gt=0)
    """The standard deviation of the first weights."""
    width_base: int | None = Field(None, gt=0)
    """The width of a smaller model of the same shape, whose `init_std` and learning rate this model takes over (muP);
    null: they are this model's own. Both should have heads of one width."""
    depth_base: int | None = Field(None, gt=0)
    """The layers of a shallower model of the same shape, whose `init_std` and learning rate this model takes over
    (CompleteP); null: they are this model's own."""
    decoder_layers: int | None = Field(None, gt=0)
    """The blocks of a decoder that reads what the model, its encoder, has made of another text; null: there is none."""
    generator: GeneratorConfig | None = None
    """The generator that replaces tokens. With it the model is a discriminator, which detects them and has no head onto
    the vocabulary; null: there is none."""
    init_from: str | None = free(None)
    """A Hugging Face folder whose weights the run begins from. Keys of `model` that are left out are the folder's."""

    @model_validator(mode="after")
    def _divides(self) -> "ModelConfig":
        if self.head_width is None and self.width % self.heads:
            raise ValueError(f"model.width = {self.width} does not divide by model.heads = {self.heads}")
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"model.heads = {self.heads} does not divide by model.kv_heads = {self.kv_heads}")
        if self.positions == "rope" and self.E % 2:
            raise ValueError(f"model.positions = rope needs an even head width, found {self.E}")
        if self.rope_scaling and self.positions != "rope":
            raise ValueError(f"model.rope_scaling needs model.positions = rope, found {self.positions}")
        if self.rope_scaling and self.rope_theta <= 1:
            raise ValueError(f"model.rope_scaling needs model.rope_theta above 1, found {self.rope_theta:g}")
        if self.rope_scaling and self.rope_scaling.original_positions > self.max_positions:
            raise ValueError(
                f"model.rope_scaling.original_positions = {self.rope_scaling.original_positions} is more than "
                f"model.max_positions = {self.max_positions}: yarn makes windows longer"
            )
        if self.norm == "layernorm" and not self.norm_weights:
            raise ValueError("model.norm_weights = false needs model.norm = rmsnorm, found layernorm")
        if not self.first_norm and self.norm_position == "post":
            raise ValueError("model.first_norm = false needs model.norm_position = pre, found post")
        if self.qk_norm_after_rope and not (self.qk_norm and self.positions == "rope"):
            raise ValueError("model.qk_norm_after_rope = true needs model.qk_norm = true and model.positions = rope")
        if self.width_base and self.composition != "one":
            raise ValueError("model.width_base is for one Transformer: remove model.generator or model.decoder_layers")
        if self.depth_base and (self.composition != "one" or self.norm_position == "post"):
            raise ValueError(
                "model.depth_base is for one Transformer with model.norm_position = pre: remove model.generator or "
                "model.decoder_layers, or leave it out"
            )
        if self.width_base and self.tie_embeddings and not self.scales_projection:
            raise ValueError(
                "model.width_base with model.tie_embeddings = true needs a norm with weights before the projection: "
                "model.norm_weights = true, and model.norm_position = pre or model.transform_head = true"
            )
        if self.width != self.D and not (self.generator or (self.transform_head and self.tie_embeddings)):
            raise ValueError(
                f"model.embed_width = {self.embed_width} differs from model.width: it needs model.generator, or "
                "model.transform_head = true and model.tie_embeddings = true"
            )
        if self.generator and (self.causal or self.transform_head or not self.tie_embeddings):
            raise ValueError(
                "model.generator needs model.causal = false, model.transform_head = false and model.tie_embeddings = "
                "true: the model has a head for replaced tokens, and the generator one that is tied"
            )
        if self.generator and self.generator.width % (self.generator.heads * (2 if self.positions == "rope" else 1)):
            even = ", and with model.positions = rope by twice as many" if self.positions == "rope" else ""
            raise ValueError(f"model.generator: its width must divide by its heads{even}")
        if self.decoder_layers and (self.causal or self.generator or self.norm_position == "post"):
            raise ValueError(
                "model.decoder_layers needs model.causal = false, for the encoder, model.norm_position = pre, and no "
                "model.generator"
            )
        if self.positions == "relative" and (self.window or not self.decoder_layers):
            raise ValueError("model.positions = relative needs model.decoder_layers, and no model.window")
        return self

    @property
    def composition(self) -> Composition:
        return "generator" if self.generator else "encoder_decoder" if self.decoder_layers else "one"

    @property
    def D(self) -> int:
        return self.embed_width or self.width

    @property
    def E(self) -> int:
        return self.head_width or self.width // self.heads

    @property
    def KV(self) -> int:
        return self.kv_heads or self.heads

    @property
    def normalizes_embeddings(self) -> bool:
        return self.norm_position == "post" if self.embed_norm is None else self.embed_norm

    def rows_of(self, vocab_size: int) -> int:
        """The rows of the token embedding and of the head."""
        return -(-vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def width_ratio(self) -> float:
        """How many times as wide as its base the model is."""
        return self.width / self.width_base if self.width_base else 1.0

    @property
    def depth_ratio(self) -> float:
        """How many times as many layers as its base the model has."""
        return self.layers / self.depth_base if self.depth_base else 1.0

    @property
    def scales_projection(self) -> bool:
        """Whether the norm before the projection onto the vocabulary has weights and serves it alone."""
        return self.norm_weights and (self.transform_head or self.norm_position == "pre")

    def window_of(self, layer: int) -> int | None:
        """The window of a layer (0-based); None: the layer is global."""
        return self.window if layer % self.global_every else None

    def rope_of(self, layer: int) -> "Rope | None":
        """The rotations of a layer (0-based); None: it has none."""
        if self.positions != "rope":
            return None
        if self.window_of(layer) is not None:
            return Rope(self.local_rope_theta or self.rope_theta)
        if self.rope_scaling is None:
            return Rope(self.rope_theta)
        original = self.rope_scaling.original_positions
        return Rope(self.rope_theta, self.max_positions / original, original)


@dataclass(frozen=True)
class Rope:
    """The rotations of a layer. YaRN stretches those of windows of `original_positions`, if given, by `factor`."""

    theta: float
    factor: float = 1.0
    original_positions: int = 0
