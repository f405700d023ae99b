"""Every dialect at random small shapes: our logits and gradients equal those of stock transformers."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from pretrain.dialects import DIALECTS, Dialect, check_expressible
from pretrain.errors import ExportError
from pretrain.model.attention import Crossing, Layout
from pretrain.model.config import ModelConfig, RopeScaling
from pretrain.model.models import model_of
from pretrain.model.transformer import Transformer

transformers = pytest.importorskip("transformers", reason="needs pip install '.[export]'")

V = 40
SPECIALS = {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4, "eod": 2}
GENERATOR = {"layers": 1, "width": 4, "heads": 1, "mlp_width": 4}
ALONE = [name for name in DIALECTS if name != "t5"]  # dialects of one Transformer
# Random shapes that fail are not made smaller: with models that takes minutes.
PHASES = [phase for phase in Phase if phase not in (Phase.shrink, Phase.explain)]
SHAPES = 200  # random shapes of each dialect
SETTINGS = {"max_examples": SHAPES, "deadline": None, "derandomize": True, "phases": PHASES}
SETTINGS["suppress_health_check"] = list(HealthCheck)
BOOLS = st.booleans()
FREE = {  # values of the keys that a dialect may leave free; sizes are drawn for all
    "bias": BOOLS,
    "tie_embeddings": BOOLS,
    "window": st.none() | st.integers(1, 9),
    "logit_cap": st.none() | st.floats(0.5, 30),
    "mlp": st.sampled_from(["gelu", "gelu_tanh"]),
}


@st.composite
def shapes(draw, dialect: Dialect) -> ModelConfig:
    """A small model that the dialect can express."""
    heads = draw(st.integers(1, 4))
    even = draw(st.integers(2, 4)) * 2  # the width of a head, which rope needs even
    values = dict(dialect.wanted)
    values |= {key: draw(FREE[key]) for key in sorted(dialect.free & FREE.keys())}
    values |= {
        "layers": draw(st.integers(1, 3)),
        "width": heads * even,
        "heads": heads,
        "mlp_width": draw(st.integers(1, 20)),
        "max_positions": 32,
        "norm_eps": dialect.wanted.get("norm_eps", draw(st.sampled_from([1e-6, 1e-5, 0.1]))),
        "rope_theta": draw(st.floats(10, 1e6)),
        "bias": values.get("bias", True),
    }
    if "rope_scaling" in dialect.free and (original := draw(st.none() | st.integers(1, 32))):
        values["rope_scaling"] = {"kind": "yarn", "original_positions": original}
    if values.get("window"):
        values["global_every"] = draw(st.integers(1, 3))
        values["local_rope_theta"] = draw(st.none() | st.floats(10, 1e6))
    if "kv_heads" in dialect.free:
        values["kv_heads"] = draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0]))
    if "embed_width" in dialect.free:
        values["embed_width"] = draw(st.sampled_from([None, 6]))
    if "generator" in dialect.free:
        values["generator"] = GENERATOR
    if "decoder_layers" in dialect.free:
        values["decoder_layers"] = draw(st.integers(1, values["layers"]))
    if "head_width" in dialect.free:
        values["head_width"] = draw(st.sampled_from([None, 4, 6]))
    model = ModelConfig(**values)
    for key in ("kv_heads", "head_width"):  # a dialect may leave a key free and then allow one value
        if dialect.objections(model):
            model = ModelConfig(**{**values, key: None})
            values = model.model_dump()
    assert dialect.objections(model) == []
    return model


def ours_and_theirs(dialect: Dialect, model: ModelConfig, seed: int) -> tuple[Transformer, torch.nn.Module]:
    """Our model with random weights, all of them different from zero, and the model of transformers that has them."""
    ours, generator = model_of(model, V), torch.Generator().manual_seed(seed)
    if model.generator:
        ours.generator = None  # no dialect has the generator of a discriminator
    with torch.no_grad():
        for name, weight in ours.named_parameters():
            weight.copy_(torch.normal(float(weight.ndim == 1), 0.4, weight.shape, generator=generator))
            if model.positions == "relative" and ".q." in name:  # its scores are not divided by this
                weight /= model.E**0.5
    values = dialect.config(model, V, SPECIALS)
    config = transformers.AutoConfig.for_model(**values)
    theirs = getattr(transformers, values["architectures"][0])(config)
    if dialect.name == "t5":  # transformers 5 ties a new model, and opens a file with two tensors as one that is not
        theirs.lm_head.weight = torch.nn.Parameter(theirs.lm_head.weight.detach().clone())
    weights = {name: weight.detach() for name, weight in ours.named_parameters()}
    written = dialect.weights(model, weights)
    missing, unexpected = theirs.load_state_dict(written, strict=False)
    tied = set(theirs._tied_weights_keys or ()) if values["tie_word_embeddings"] else set()
    tied |= {"cls.predictions.decoder.bias", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
    assert not unexpected and set(missing) <= tied, (missing, unexpected)
    if dialect.name != "t5":
        theirs.tie_weights()
    told = {"bias": False, "generator": model.generator}
    read = ModelConfig(**{**told, **dialect.wanted, **dialect.shape(config.to_dict())})
    if model.window is None or any(map(model.window_of, range(model.layers))):
        every = {"global_attn_every_n_layers": None}  # several numbers say the same of few layers; layer_types says it
        assert dialect.config(read, V, SPECIALS) | every == values | every
    rows = {name: len(weight) for name, weight in weights.items()}
    back = dialect.from_weights(model, written, rows)
    assert back.keys() == weights.keys() and all(torch.equal(back[name], weights[name]) for name in weights)
    return ours.eval(), theirs.eval()


OTHER = {  # a value of a key that most dialects do not have
    "norm": ("layernorm", "rmsnorm"),
    "norm_position": ("pre", "post"),
    "positions": ("learned", "rope"),
    "mlp": ("gelu", "swiglu", "relu2"),
    "norm_eps": (1e-12, 1e-3),
    "window": (None, 8),
    "logit_cap": (None, 5.0),
    "rope_scaling": (None, RopeScaling(kind="yarn", original_positions=4)),
    "kv_heads": (None, 2),
    "head_width": (None, 16),
    **dict.fromkeys(
        ["causal", "norm_weights", "embed_norm", "first_norm", "bias", "qk_norm", "qk_norm_after_rope"], (True, False)
    ),
    **dict.fromkeys(["tie_embeddings", "transform_head"], (True, False)),
}
# Keys of which a dialect allows some values, or every value.
ALLOWED = {"norm_eps", "bias", "window", "logit_cap", "rope_scaling", "kv_heads", "head_width", "tie_embeddings", "mlp"}


@pytest.mark.parametrize("name", DIALECTS)
def test_a_model_that_a_dialect_cannot_express_is_refused_with_the_key(name):
    dialect = DIALECTS[name]
    values = {
        "layers": 2,
        "width": 32,
        "heads": 4,
        "mlp_width": 8,
        "max_positions": 16,
        "norm_eps": 1e-6,
        "bias": False,
    }
    composed = {"generator": GENERATOR, "decoder_layers": 2}
    values |= {"mlp": "gelu"} | dialect.wanted | {key: composed[key] for key in composed if key in dialect.free}
    fitting = ModelConfig(**values)
    check_expressible(fitting, name, SPECIALS)
    refused = set()
    for key, choices in OTHER.items():
        for value in choices:
            try:
                model = ModelConfig(**{**values, key: value})
            except ValueError:  # no model has this beside the other keys
                refused.add(key)
                continue
            if value == getattr(fitting, key) or (key == "embed_norm" and value == fitting.normalizes_embeddings):
                continue
            try:
                check_expressible(model, name, SPECIALS)
            except ExportError as error:
                assert any(line.startswith(f"model.{key} = {as_yaml(value)}: {name} has ") for line in error.details)
                refused.add(key)
            else:
                assert key in ALLOWED and key in {*dialect.free, "norm_eps"}, key
    assert refused >= {"causal", "norm", "norm_position", "positions", "transform_head"}


def as_yaml(value: object) -> str:
    if isinstance(value, RopeScaling):
        return str(value.model_dump())
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


@pytest.mark.parametrize("name", ALONE)
def test_logits_and_gradients_at_random_shapes_are_those_of_transformers(name):
    """Two documents in one window of ours are two rows of theirs."""
    dialect = DIALECTS[name]

    @settings(**SETTINGS)
    @given(shapes(dialect), st.integers(0, 2**31), st.integers(1, 12), st.integers(1, 12))
    def compare(model: ModelConfig, seed: int, first: int, second: int) -> None:
        ours, theirs = ours_and_theirs(dialect, model, seed)
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(5, V, (1, first + second), generator=generator)
        segments = torch.tensor([[0] * first + [1] * second])
        positions = torch.cat((torch.arange(first), torch.arange(second)))[None]
        packed = ours.logits(ours(ids, Layout(segments, positions, model.causal)))
        alone = torch.cat([theirs(part).logits for part in ids.split([first, second], dim=1)], 1)
        scale = max(1.0, float(alone.detach().abs().max()))
        torch.testing.assert_close(packed, alone, rtol=0, atol=1e-5 * scale)

        gradient = torch.randn(packed.shape, generator=generator)
        packed.backward(gradient)
        alone.backward(gradient)
        by_theirs = {
            key: p.grad for key, p in theirs.named_parameters() if p.grad is not None and "token_type" not in key
        }
        rows = {key: len(p) for key, p in ours.named_parameters()}
        by_theirs = dialect.from_weights(model, by_theirs, rows)
        by_ours = {key: p.grad for key, p in ours.named_parameters()}
        assert by_theirs.keys() == by_ours.keys()
        largest = max(float(found.abs().max()) for found in by_ours.values())
        for key, found in by_ours.items():
            torch.testing.assert_close(found, by_theirs[key], rtol=1e-3, atol=2e-5 * max(1.0, largest), msg=key)

    compare()


def test_an_encoder_and_decoder_at_random_shapes_are_those_of_transformers():
    """Two documents in one window of ours are two rows of theirs.

    Their norm is in fp32 at any precision, so even in fp64 up to 160 tokens differ by 6e-6 of the largest logit.
    """
    dialect = DIALECTS["t5"]

    @settings(**SETTINGS)
    @given(
        shapes(dialect), st.integers(0, 2**31), st.tuples(*[st.integers(1, 12)] * 4), st.sampled_from([0, 0, 0, 150])
    )
    def compare(model: ModelConfig, seed: int, sizes: tuple[int, ...], more: int) -> None:
        ours, theirs = ours_and_theirs(dialect, model, seed)
        generator = torch.Generator().manual_seed(seed)
        read, written = (
            [sizes[0] + more, sizes[1]],
            [sizes[2], sizes[3] + more],
        )  # farther than distances are told apart
        ids = torch.randint(5, V, (1, sum(read)), generator=generator)
        to_write = torch.randint(5, V, (1, sum(written)), generator=generator)
        layouts = []
        for lengths, causal in ((read, False), (written, True)):
            segments = torch.tensor([[0] * lengths[0] + [1] * lengths[1]])
            positions = torch.cat([torch.arange(length) for length in lengths])[None]
            layouts.append(Layout(segments, positions, causal))
        crossing = Crossing(layouts[1].segments, layouts[0].segments)
        packed = ours.logits(ours.decode(to_write, layouts[1], ours(ids, layouts[0]), crossing))
        pairs = zip(ids.split(read, dim=1), to_write.split(written, dim=1), strict=True)
        alone = torch.cat([theirs(input_ids=a, decoder_input_ids=b).logits for a, b in pairs], 1)
        scale = max(1.0, float(alone.detach().abs().max()))
        torch.testing.assert_close(packed, alone, rtol=0, atol=3e-5 * scale)

        gradient = torch.randn(packed.shape, generator=generator)
        packed.backward(gradient)
        alone.backward(gradient)
        found = {key: p.grad for key, p in theirs.named_parameters()}
        if model.tie_embeddings:
            found["shared.weight"] += found["lm_head.weight"]
        by_ours = {key: p.grad for key, p in ours.named_parameters()}
        found = dialect.from_weights(model, found, {key: len(p) for key, p in by_ours.items()})
        assert found.keys() == by_ours.keys()
        largest = max(float(gradient.abs().max()) for gradient in by_ours.values())
        for key, gradient in by_ours.items():
            torch.testing.assert_close(gradient, found[key], rtol=1e-3, atol=5e-5 * max(1.0, largest), msg=key)

    compare()
