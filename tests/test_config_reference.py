"""The reference of a configuration agrees with the classes: names, defaults, choices, and keys that may change."""

import re
from typing import Annotated, Literal

import pytest
import yaml
from pydantic import Field

from pretrain.cli import config_of
from pretrain.config import Config, StageConfig, free, load, past
from pretrain.config_reference import Key, keys
from tests.conftest import ROOT

EXAMPLES = [
    *(("tokenizer", f"tokenizer-{name}") for name in ("bert", "byte", "adopt", "extend")),
    *(("shards", f"shards-{name}") for name in ("bert", "byte")),
    *(("pretrain", name) for name in ("encoder", "decoder")),
    *(("finetune", f"finetune-{name}") for name in ("full-en", "lora-zh", "random-en")),
    *((name, name) for name in ("clean", "evaluate", "generate", "words", "demo")),
    *(("export", "export-encoder"), ("reshard", "reshard-zh")),
]


class Circle(Config):
    kind: Literal["circle"]
    radius: float = Field(1.0, gt=0, description="Distance of the edge from the centre.")


class Square(Config):
    """Four equal sides.

    And four equal angles.
    """

    kind: Literal["square"]
    side: Annotated[int, Field(ge=1)] | None = None


class Frame(Config):
    """A line around a drawing."""

    width: int = Field(2, ge=0, lt=2**20)


class Drawing(StageConfig):
    title: str
    shape: Circle | Square = Field(discriminator="kind")
    frame: Frame = free(Frame(width=5))
    inner: Frame | None = None
    layers: list[Frame] = past(min_length=1)
    names: dict[str, list[int]] = {}
    mark: Literal["none", "|dotted|"] = "|dotted|"


def key_of(name: str) -> Key:
    return next(key for key in keys(Drawing) if key.name == name)


def test_the_keys_stand_in_the_order_of_the_class_and_what_each_stage_has_comes_last():
    assert [key.name for key in keys(Drawing)] == [
        *("title", "shape", "shape.kind", "shape.radius", "shape.side", "frame", "frame.width"),
        *("inner", "inner.width", "layers", "layers.N.width", "names", "mark", "replace"),
    ]


def test_the_name_of_a_kind_comes_before_what_it_inherits():
    class Round(Frame):
        kind: Literal["round"] = "round"

    assert [key.name for key in keys(Round)] == ["kind", "width"]


def test_types_are_named_as_a_reader_of_yaml_knows_them():
    assert key_of("title").type == "text"
    assert key_of("shape.kind").type == "circle | square"
    assert key_of("shape.radius").type == "number > 0"
    assert key_of("shape.side").type == "integer ≥ 1 | null"
    assert key_of("frame.width").type == "integer ≥ 0, < 2^20"
    assert key_of("layers").type == "list of sections, not empty"
    assert key_of("names").type == "mapping of text to list of integer"


def test_a_section_brings_its_own_defaults():
    assert key_of("title").default is None
    assert key_of("frame.width").default == "5"  # the default in Drawing, not in Frame
    assert key_of("inner.width").default == "2"
    assert key_of("inner").default == "null"
    assert key_of("mark").default == '"|dotted|"'


def test_what_may_change_on_a_resume_holds_for_all_of_a_section():
    assert [key_of(name).resume for name in ("frame", "frame.width", "replace")] == ["free"] * 3
    assert [key_of(name).resume for name in ("layers", "layers.N.width")] == ["past"] * 2
    assert [key_of(name).resume for name in ("title", "inner.width")] == ["frozen"] * 2


def test_a_key_of_one_choice_says_which():
    assert key_of("shape.radius").when == "shape.kind = circle"
    assert key_of("shape.side").when == "shape.kind = square"
    assert key_of("shape.kind").when == ""


def test_a_choice_may_have_a_default():
    class Dot(Config):
        kind: Literal["dot"] = "dot"

    class Sketch(Config):
        shape: Dot | Circle = Field(discriminator="kind")

    kind = next(key for key in keys(Sketch) if key.name == "shape.kind")
    assert (kind.type, kind.default) == ("dot | circle", "dot")
    assert key_of("shape.kind").default is None


def test_a_meaning_is_the_description_of_the_field_or_of_its_section():
    assert key_of("shape.radius").description == "Distance of the edge from the centre."
    assert key_of("frame").description == "A line around a drawing."
    assert key_of("shape.side").description == ""


@pytest.mark.parametrize(("stage", "name"), EXAMPLES)
def test_every_key_of_an_example_is_in_the_reference_with_its_default(stage, name):
    kind, path = config_of(stage), ROOT / f"configs/sample/{name}.yaml"
    reference = {key.name: key for key in keys(kind)}
    resolved = load(kind, path)
    for place in _places(resolved.model_dump(mode="json")):
        assert any(place == key or place.startswith(f"{key}.") for key in reference), place
    given = _places(yaml.safe_load(path.read_text(encoding="utf-8")))
    absent = [key for key in reference.values() if not key.section and key.name not in given]
    written = [f"{key.name}={key.default}" for key in absent if _applies(key, resolved)]
    assert load(kind, path, written) == resolved
    assert len(written) == 0 if stage == "demo" else len(written) > 0  # each key of the demo must be given


def _applies(key: Key, resolved: Config) -> bool:
    """Whether the configuration has the section of this key and, for a union, the kind with this key."""
    value = resolved
    for name in key.name.split(".")[:-1]:
        value = None if name == "N" else getattr(value, name, None)
        if value is None:
            return False
    return key.name.split(".")[-1] in type(value).model_fields


def _places(values, prefix="") -> list[str]:
    """The dotted names of all values, a list's entries as N."""
    if isinstance(values, dict):
        return [place for key, inner in values.items() for place in _places(inner, f"{prefix}.{key}")]
    if isinstance(values, list) and values and isinstance(values[0], dict):
        return [place for inner in values for place in _places(inner, f"{prefix}.N")]
    return [re.sub(r"^\.", "", prefix)]
