"""What the tests of the cleaning steps share: one step switched on alone, and the sample's documents."""

from collections.abc import Callable

from pretrain.cleaning.pipeline import Outcome, StepsConfig, steps
from pretrain.config import build
from tests.conftest import SAMPLE

NAMES = list(StepsConfig.model_fields)


def config(**sections) -> StepsConfig:
    return build(StepsConfig, sections, "clean.yaml")


def step(name: str, language: str = "en", **section) -> Callable[[str], Outcome]:
    """The function of one step, the only one on, with settings of its section."""
    (found,) = steps(config(**dict.fromkeys(NAMES, "false") | {name: {"use": "true"} | section}), language)
    assert found.name == name
    return found.apply


def sample(language: str) -> list[str]:
    return (SAMPLE / f"{language}.txt").read_text(encoding="utf-8").rstrip("\n").split("\n\n")
