"""The inputs of a pre-training run, opened and checked before anything is allocated."""

import os
from dataclasses import dataclass
from pathlib import Path

from pretrain.dialects import check_expressible
from pretrain.errors import ConfigError
from pretrain.objectives import Objective
from pretrain.order.run_data import RunData, open_run_data
from pretrain.storage.files import is_used
from pretrain.storage.publish import check_output
from pretrain.tokenizer import Tokenizer, open_tokenizer
from pretrain.training.checkpoint import CONFIG
from pretrain.training.config import RunConfig
from pretrain.training.engine.ranks import World, find_world
from pretrain.training.optim import OPTIMIZERS, Optimizer


@dataclass(frozen=True)
class Inputs:
    """Everything that a run is given."""

    cfg: RunConfig  # resolved
    world: World
    folder: Path  # of the run
    tokenizer: Tokenizer
    objectives: list[Objective]  # of each phase
    data: RunData
    vocab_size: int  # of the shards
    optimizer: Optimizer


def open_inputs(cfg: RunConfig) -> Inputs:
    """Open everything that the run reads. Raises ConfigError, ShardError, TokenizerError or ExportError."""
    world, cfg = find_world(), cfg.resolved()
    folder = Path(cfg.out)
    _check_output(folder)
    tokenizer = open_tokenizer(cfg.data.tokenizer)
    if cfg.export:
        check_expressible(cfg.model, cfg.export.dialect, tokenizer.specials)
    data = open_run_data(cfg.data, cfg.phases, cfg.seed, tokenizer, cfg.skips, cfg.words)
    _check_pair_marks(cfg, data)
    objectives, vocab_size = cfg.objectives(tokenizer), data.corpora[0].train.vocab_size
    optimizer = OPTIMIZERS[cfg.optim.kind](cfg.optim)
    return Inputs(cfg, world, folder, tokenizer, objectives, data, vocab_size, optimizer)


def _check_pair_marks(cfg: RunConfig, data: RunData) -> None:
    """Raise ConfigError if an objective would take the labelled pairs of a set of shards for text."""
    for asked in (getattr(cfg.objective_of(number), "pair_mark", None) for number in range(len(cfg.phases))):
        for corpus in data.corpora:
            mark = corpus.train.index.get("pair_mark", asked)
            if asked is not None and mark != asked:
                raise ConfigError(
                    "these shards have labelled pairs with another mark",
                    f"{corpus.folder} was built with pair_mark = {mark}, and objective.pair_mark = {asked}",
                    f"set objective.pair_mark to {mark}",
                )


def _check_output(folder: Path) -> None:
    """Raise ConfigError unless `folder` is new, empty or the folder of a run."""
    check_output(folder, ConfigError)
    if folder.is_symlink() and not folder.exists():
        found = f"{folder} is a link to {os.readlink(folder)}, which is not there"
        raise ConfigError("the output folder cannot be made", found, "make that folder, or choose another out=")
    if folder.exists() and is_used(folder) and not (folder / CONFIG).is_file():
        raise ConfigError(
            "the output folder holds something else", f"{folder} has files but no config.yaml", "choose another out="
        )
