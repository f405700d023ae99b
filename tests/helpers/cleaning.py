"""For tests of the cleaning steps: a single step, and the documents of the sample."""

from collections.abc import Callable

from pretrain.cleaning.pipeline import Outcome, StepsConfig, steps
from pretrain.config import build
from tests.conftest import SAMPLE

NAMES = list(StepsConfig.model_fields)


def config(**sections) -> StepsConfig:
    return build(StepsConfig, sections, "clean.yaml")


def step(name: str, language: str = "en", **section) -> Callable[[str], Outcome]:
    """Return the function of one step with settings of its section, while all other steps are off."""
    (found,) = steps(config(**dict.fromkeys(NAMES, "false") | {name: {"use": "true"} | section}), language)
    assert found.name == name
    return found.apply


def sample(language: str) -> list[str]:
    return (SAMPLE / f"{language}.txt").read_text(encoding="utf-8").rstrip("\n").split("\n\n")
