"""The stage `evaluate`: score a checkpoint again, without training.

    $ python launch/evaluate.py configs/sample/evaluate.yaml run=runs/wiki max_tokens=10000000

Settings that are not given come from the run: its tokenizer, the held-out sides and the weights of its corpora, the
length and the kind of its windows. With these settings, the scores are equal to those that the run printed at that
step. The stage works in a plain process and on any number of ranks. A rank holds the weights, but no gradients and no
optimizer state.
"""

from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from pretrain import config
from pretrain.config import StageConfig, free
from pretrain.display.tables import aligned
from pretrain.errors import ConfigError, ShardError
from pretrain.model.models import model_of
from pretrain.objectives.batch import Batch
from pretrain.objectives.learner import Learner
from pretrain.objectives.objective import Objective
from pretrain.order.phases import Phase, locate
from pretrain.shards import Shards, check_tokenizer
from pretrain.storage.files import write_json
from pretrain.storage.index import write_index
from pretrain.storage.publish import publish
from pretrain.tokenizer import Tokenizer, open_tokenizer
from pretrain.training import checkpoint
from pretrain.training.checkpoint import Checkpoint
from pretrain.training.config import RunConfig
from pretrain.training.engine.peers import Peers
from pretrain.training.engine.ranks import World, check_agreement, device_of, failures_said, find_world, join, new_group
from pretrain.training.heldout import HeldOut, Scores, together

SCORES = "scores.json"
TIMEOUT_S = 600  # the longest wait of a rank for the others


class ScoringConfig(StageConfig):
    """The configuration of `launch/evaluate.py`. A key that is null takes its value from the run."""

    run: str
    """The folder of a run, for its newest checkpoint, or the folder of one of its checkpoints."""
    out: str | None = None
    """The folder for scores.json; null: the scores are only printed."""
    shards: list[str] = []
    """Folders of the shards stage to score, each by its own held-out side; empty: the corpora of the run."""
    tokenizer: str | None = None
    """The folder of the run's tokenizer, if it has moved; null: where the run found it."""
    max_tokens: int | None = Field(None, gt=0)
    """The largest number of tokens to score of each held-out side; null: as in the run."""
    seq_len: int | None = Field(None, gt=1)
    """Tokens per window; null: as in the last step of the checkpoint."""
    windows: Literal["stream", "documents"] | None = None
    """`stream` cuts windows from the stream, `documents` packs whole documents; null: as in the run."""
    micro_batch: int | None = free(None, gt=0)
    """Windows per forward pass on each rank. Lower it if memory runs out; the scores do not depend on it."""


def run(cfg: ScoringConfig) -> dict:
    """Score a checkpoint, and return the contents of scores.json.

    Raises UserError if the run, its text or a setting does not fit.
    """
    world = find_world()
    if world.launched:
        join(world, TIMEOUT_S)
    peers = Peers(world)
    with failures_said(world), ExitStack() as result:
        folder = None
        with peers.one_fate():
            if cfg.out is not None and world.speaks:
                folder = result.enter_context(publish(Path(cfg.out), "evaluate", ConfigError, cfg))
        found = _scored(cfg, peers)
        if folder:
            write_json(folder / SCORES, found)
            write_index(folder, {"stage": "evaluate", "base": found["fingerprint"]})
    return found


def _scored(cfg: ScoringConfig, peers: Peers) -> dict:
    """Open the checkpoint and the text, score, and print a table. Returns the contents of scores.json."""
    world = peers.world
    with peers.one_fate():
        found = Checkpoint(checkpoint.resolve(cfg.run), world.rank, world.size)
        old = config.build(RunConfig, config.parse(found.config_text, str(found.folder)), f"{found.folder}/config.yaml")
        tokenizer = open_tokenizer(cfg.tokenizer or old.data.tokenizer)
        found.check_tokenizer(tokenizer, ConfigError)
        sides = _sides(cfg, old, found, tokenizer)
        position = locate(max(0, found.state.step - 1), old.phases)
        phase = position.phase
        seq_len = _seq_len(cfg, old, phase, sides)
    read = " ".join(side.fingerprint for side in sides.values())
    check_agreement(
        world, {"checkpoint": found.index["fingerprint"], "shards": read, "configuration": config.dump(cfg)}
    )
    windows, max_tokens = cfg.windows or old.data.windows, cfg.max_tokens or old.evaluate.max_tokens
    objective, packed = old.objective_of(position.number), windows == "documents"
    token_bytes = tokenizer.token_bytes() if tokenizer.counts_bytes else None
    settings = (seq_len, max_tokens, token_bytes, packed, tokenizer.special_tokens)
    heldout = {name: HeldOut(side, objective, *settings) for name, side in sides.items()}
    longest = max(phase.seq_len for phase in old.phases)
    at_once = cfg.micro_batch or max(1, old.engine.micro_batch * longest // seq_len)
    scores = _scores(heldout, _Scorer(old, found, world), world, at_once)
    if not cfg.shards and old.data.corpora:
        scores[""] = together(list(scores.values()), phase.weights(list(sides)))
    if world.speaks:
        print(f"{found.folder}: step {found.state.step:,}, windows of {seq_len:,} tokens ({windows})")
        print(*_table(scores), sep="\n", flush=True)
    return {
        "checkpoint": str(found.folder),
        "fingerprint": found.index["fingerprint"],
        "step": found.state.step,
        "seq_len": seq_len,
        "windows": windows,
        "max_tokens": max_tokens,
        "shards": {name: side.fingerprint for name, side in sides.items()},
        "scores": {name: score.record() for name, score in scores.items()},
    }


def _scores(heldout: dict[str, HeldOut], scorer: "_Scorer", world: World, at_once: int) -> dict[str, Scores]:
    """The scores of each held-out side, from forward passes of `at_once` windows on each rank."""
    scores = {}
    for name, side in heldout.items():
        score = side.score(scorer, world, at_once)
        assert score is not None, "only an interrupt ends a scoring early"
        scores[name] = score
    return scores


def _sides(cfg: ScoringConfig, old: RunConfig, found: Checkpoint, tokenizer: Tokenizer) -> dict[str, Shards]:
    """The held-out sides to score: by name for the run's corpora, or by folder for the key `shards`."""
    own = found.index.get("corpora") or [["", found.index["shards"]]]
    marks = {} if cfg.shards else dict(own)
    places = {corpus.name: corpus.shards for corpus in old.data.corpora}
    if old.data.shards is not None:
        places[""] = old.data.shards
    sides = {}
    for name, folder in {folder: folder for folder in cfg.shards}.items() or places.items():
        side = Shards(folder, "heldout")
        check_tokenizer(side.index, folder, tokenizer)
        if name in marks and side.fingerprint != marks[name]:
            raise ShardError(
                "these are not the shards that the run was trained on",
                f"{found.folder} says {marks[name][:12]}…, {folder} is {side.fingerprint[:12]}…",
                f"to score their held-out side anyway, set shards='[{folder}]'",
            )
        sides[name] = side
    return sides


def _seq_len(cfg: ScoringConfig, old: RunConfig, phase: Phase, sides: dict[str, Shards]) -> int:
    """The tokens of a window. Raises an error if the model or a held-out side is shorter."""
    seq_len = cfg.seq_len or phase.seq_len
    if seq_len > old.model.max_positions:
        raise ConfigError(
            f"seq_len = {seq_len} is longer than the model's windows",
            f"{cfg.run} has model.max_positions = {old.model.max_positions}",
            f"set seq_len to at most {old.model.max_positions}",
        )
    for side in sides.values():
        if side.tokens < seq_len:
            raise ShardError(
                "the held-out side is shorter than one window",
                f"{side.folder} has {side.tokens:,} held-out tokens, seq_len = {seq_len:,}",
                f"set seq_len to at most {side.tokens:,}, or name other shards",
            )
    return seq_len


class _Scorer:
    """The part of an engine that scoring needs: the weights, in the precision of the run."""

    def __init__(self, old: RunConfig, found: Checkpoint, world: World):
        load = found.tensors()
        model = model_of(old.model, len(load("weights", "embed.weight")))
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(load("weights", name))
        self.device, self._autocast = device_of(world), old.engine.precision == "autocast"
        self._module = Learner(model).to(self.device, torch.bfloat16 if old.engine.precision == "bf16" else None)
        self._group = new_group(TIMEOUT_S)

    def train(self, training: bool) -> None:
        self._module.train(training)

    def __call__(self, objective: Objective, batch: Batch, each: bool = False) -> Any:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast):
            return self._module(objective, batch.to(self.device), each)

    def total(self, values: torch.Tensor) -> torch.Tensor:
        if self._group is not None:
            torch.distributed.all_reduce(values, group=self._group)
        return values


def _table(scores: dict[str, Scores]) -> list[str]:
    """An aligned line for each corpus. The name "" stands for the mixture of all corpora, or for the only corpus."""
    rows: list[tuple[str, ...]] = [
        ("corpus", "loss", "± error", "no context", "gain", "accuracy", "bits/byte", "targets")
    ]
    for name, found in scores.items():
        values = [getattr(found, key) for key in ("loss", "standard_error", "no_context_loss", "gain")]
        numbers = ["" if value is None else f"{value:.4f}" for value in values]
        bits = "" if found.bits_per_byte is None else f"{found.bits_per_byte:.4f}"
        whole = "held-out" if len(scores) == 1 else "mixture"
        rows.append((name or whole, *numbers, f"{found.accuracy:.1%}", bits, f"{found.targets:,}"))
    return aligned(rows)
