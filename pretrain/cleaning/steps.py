"""The steps that clean one document, in their order (being written)."""

from pretrain.cleaning.outcome import Outcome, Section, Step
from pretrain.config import Config

UNITS: dict[str, str] = {}  # step → what its `changes` counts


class StepsConfig(Config):
    pass


def steps(config: StepsConfig, language: str) -> list[Step]:
    """The steps that are on for `language` (BCP 47), in their fixed order."""
    return []


__all__ = ["UNITS", "Outcome", "Section", "Step", "StepsConfig", "steps"]
