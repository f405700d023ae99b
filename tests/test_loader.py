"""The content of a step depends on nothing but (shards, seed, step)."""

import itertools
import os
import signal

import numpy as np
import pytest
import torch

from pretrain import loader
from pretrain.errors import ConfigError, PretrainError
from pretrain.objectives import CausalLMConfig, MaskedLMConfig
from pretrain.optim import Phase
from pretrain.shards import Shards
from pretrain.windows import Windows

PHASES = [Phase(steps=5, seq_len=32, batch_tokens=256), Phase(steps=3, seq_len=64, batch_tokens=1024)]


def batches(prepared, objective, micro_batch=2, rank=0, world=1, seed=3) -> loader.Batches:
    shards = Shards(prepared.shards["bert" if objective.kind == "masked_lm" else "byte"])
    return loader.Batches(Windows(shards, 64, seed), objective, PHASES, seed, micro_batch, rank, world)


OBJECTIVES = [MaskedLMConfig(kind="masked_lm", mask_ratio=0.3), CausalLMConfig(kind="causal_lm")]


def global_batch(prepared, objective, step, micro_batch, world, workers=0) -> dict[str, torch.Tensor]:
    """All tensors of step `step`, put together from its ranks and micro-batches."""
    parts = []
    for rank in range(world):
        steps = loader.steps(batches(prepared, objective, micro_batch, rank, world), step, workers)
        parts += [vars(micro.batch) for micro in next(steps)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0] if parts[0][name] is not None}


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o.kind)
@pytest.mark.parametrize("step", [0, 4, 5, 7])
def test_ranks_and_micro_batches_cut_the_same_batch(objective, step, prepared):
    whole = global_batch(prepared, objective, step, micro_batch=4, world=1)
    for micro_batch, world in itertools.product((1, 2), (1, 2)):
        other = global_batch(prepared, objective, step, micro_batch, world)
        assert whole.keys() == other.keys()
        for name, tensor in whole.items():
            assert torch.equal(tensor, other[name]), (name, micro_batch, world)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o.kind)
def test_workers_change_nothing(objective, prepared):
    plain = list(loader.steps(batches(prepared, objective), 2, workers=0))
    ahead = list(loader.steps(batches(prepared, objective), 2, workers=2))
    assert len(plain) == len(ahead) == 6
    for step, other in zip(plain, ahead, strict=True):
        assert [micro.digest for micro in step] == [micro.digest for micro in other]
        assert all(torch.equal(a.batch.inputs, b.batch.inputs) for a, b in zip(step, other, strict=True))


def test_a_killed_worker_is_an_error_not_a_hang(prepared):
    import multiprocessing

    steps = loader.steps(batches(prepared, OBJECTIVES[0], micro_batch=1), 0, workers=2)
    next(steps)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    with pytest.raises(PretrainError, match=r"a process of data\.workers died"):
        list(steps)


def test_seeking_to_a_step_gives_what_running_there_gives(prepared):
    running = list(loader.steps(batches(prepared, OBJECTIVES[0]), 0, workers=0))
    for step in range(8):
        sought = next(loader.steps(batches(prepared, OBJECTIVES[0]), step, workers=0))
        assert [micro.digest for micro in sought] == [micro.digest for micro in running[step]]


def test_seeds_steps_and_epochs_differ(prepared):
    digests = [
        tuple(micro.digest for micro in step)
        for seed in (3, 4)
        for step in loader.steps(batches(prepared, OBJECTIVES[0], seed=seed), 0, workers=0)
    ]
    assert len(set(digests)) == len(digests) == 16


def test_a_batch_that_does_not_divide_names_the_nearest_that_do(prepared):
    with pytest.raises(ConfigError, match="set batch_tokens to 192 or 384"):
        batches(prepared, OBJECTIVES[0], micro_batch=3)


def test_phases_of_shorter_windows_take_as_many_more_at_once(prepared):
    steps = loader.steps(batches(prepared, OBJECTIVES[0], micro_batch=2), 0, workers=0)
    shapes = [tuple(micro.batch.inputs.shape) for step in steps for micro in step]
    assert shapes == [(4, 32)] * 10 + [(2, 64)] * 24


def test_the_digest_adds_up_over_any_cut(prepared):
    items = batches(prepared, OBJECTIVES[0])
    whole = items.take(np.arange(8), PHASES[0], 0).digest
    parts = [items.take(np.arange(first, first + 2), PHASES[0], 0).digest for first in range(0, 8, 2)]
    assert whole == sum(parts) % 2**63
