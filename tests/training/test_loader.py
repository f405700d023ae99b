"""The content of a step depends on the shards, the seed and the step alone."""

import itertools
import multiprocessing
import os
import resource
import signal
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from pretrain.errors import ConfigError, PretrainError
from pretrain.objectives.causal_lm import CausalLMConfig
from pretrain.objectives.masked_lm import MaskedLMConfig
from pretrain.order.packed import PackedWindows
from pretrain.order.phases import Phase
from pretrain.order.stream import Windows
from pretrain.shards import Shards
from pretrain.training import loader
from tests.helpers.batches import batches as batches_of
from tests.helpers.batches import steps_of
from tests.helpers.simulated import simulate
from tests.processes.test_prefetch import children

PHASES = [Phase(steps=5, seq_len=32, batch_tokens=256), Phase(steps=3, seq_len=64, batch_tokens=1024)]


def batches(
    prepared, objective, micro_batch=2, rank=0, world=1, seed=3, mixed=False, windows=Windows
) -> loader.Batches:
    """Batches of one corpus; or `mixed` from the two sides of the same shards, with other weights in each phase."""
    block_tokens = 64 if windows is Windows else 1024
    folder = prepared.shards["bert" if objective.kind == "masked_lm" else "byte"]
    if not mixed:
        return batches_of({"": Windows(Shards(folder), 64, seed)}, objective, PHASES, seed, micro_batch, rank, world)
    corpora = {
        name: windows(Shards(folder, side), block_tokens, seed, corpus=number)
        for number, (name, side) in enumerate((("a", "train"), ("b", "heldout")))
    }
    mixtures = [{"a": 5, "b": 3}, {"a": 1, "b": 2}]
    phases = [phase.model_copy(update={"mixture": m}) for phase, m in zip(PHASES, mixtures, strict=True)]
    return batches_of(corpora, objective, phases, seed, micro_batch, rank, world)


OBJECTIVES = [MaskedLMConfig(kind="masked_lm", mask_ratio=0.3), CausalLMConfig(kind="causal_lm")]


def global_batch(prepared, objective, step, micro_batch, world, workers=0, **changes) -> dict[str, np.ndarray]:
    """All arrays of step `step`, put together from its ranks and micro-batches. Documents are numbered from the first
    of each window on: where a micro-batch holds one document a window, it has no numbers, and others begin elsewhere.
    """
    parts = []
    for rank in range(world):
        steps = steps_of(batches(prepared, objective, micro_batch, rank, world, **changes), step, workers)
        for batch in (micro.batch for micro in next(steps)):
            numbers = np.zeros_like(batch.inputs) if batch.segments is None else batch.segments
            parts.append({**vars(batch), "segments": numbers - numbers[:, :1]})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0] if parts[0][name] is not None}


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o.kind)
@pytest.mark.parametrize("windows", [Windows, PackedWindows])
@pytest.mark.parametrize("step", [0, 4, 5, 7])
def test_ranks_and_micro_batches_cut_the_same_batch(objective, windows, step, prepared):
    whole = global_batch(prepared, objective, step, micro_batch=4, world=1, windows=windows)
    for micro_batch, world in ((1, 1), (2, 1), (1, 2), (2, 2), (1, 4)):
        other = global_batch(prepared, objective, step, micro_batch, world, windows=windows)
        assert whole.keys() == other.keys()
        for name, tensor in whole.items():
            assert np.array_equal(tensor, other[name]), (name, micro_batch, world)


GRID = list(itertools.product((Windows, PackedWindows), (1, 2), (1, 2), ((0, 1), (1, 1), (1, 5), (3, 1), (3, 5))))


@pytest.mark.parametrize(("windows", "world", "micro_batch", "ahead"), GRID)
def test_no_cut_and_no_read_ahead_changes_a_batch(windows, world, micro_batch, ahead, prepared):
    """Ranks x micro-batches x (workers, prefetch depth), with two corpora and a change of phase."""
    found = []
    for rank in range(world):
        items = batches(prepared, OBJECTIVES[0], micro_batch, rank, world, mixed=True, windows=windows)
        found.append([sum(micro.digest for micro in step) for step in steps_of(items, 3, *ahead)])
    together = [sum(ranks) % 2**63 for ranks in zip(*found, strict=True)]
    one = batches(prepared, OBJECTIVES[0], 4, mixed=True, windows=windows)
    assert together == [sum(micro.digest for micro in step) % 2**63 for step in steps_of(one, 3, 0)]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o.kind)
def test_workers_change_nothing(objective, prepared):
    plain = list(steps_of(batches(prepared, objective), 2, workers=0))
    ahead = list(steps_of(batches(prepared, objective), 2, workers=2))
    assert len(plain) == len(ahead) == 6
    for step, other in zip(plain, ahead, strict=True):
        for micro, same in zip(step, other, strict=True):
            assert micro.digest == same.digest
            for name, tensor in vars(micro.batch).items():
                assert tensor is None or np.array_equal(tensor, getattr(same.batch, name)), name


@pytest.mark.parametrize("windows", [Windows, PackedWindows])
@pytest.mark.parametrize("workers", [0, 2])
def test_reading_ahead_changes_nothing(windows, workers, prepared):
    plain = steps_of(batches(prepared, OBJECTIVES[0], mixed=True, windows=windows), 1, 0)
    ahead = steps_of(batches(prepared, OBJECTIVES[0], mixed=True, windows=windows), 1, workers, read_ahead=True)
    found = [[[micro.digest for micro in step] for step in steps] for steps in (plain, ahead)]
    assert found[0] == found[1] and len(found[0]) == 7


def test_a_micro_batch_that_was_read_ahead_is_not_asked_for_page_by_page(tmp_path, monkeypatch):
    """Counts the pages that are read from disk. On a file system in memory there are none in any case."""
    monkeypatch.setattr("pretrain.storage.index.SMALL", 0)  # hashing would read all files into memory
    folder = simulate(tmp_path / "shards", 1, 8 << 20)
    with open(folder / "train-00000.bin", "r+b") as file:
        file.write(np.random.default_rng(0).integers(5, 30_000, 8 << 20, np.uint16))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    phase = Phase(steps=10, seq_len=64, batch_tokens=64 * 64)
    items = batches_of({"": Windows(Shards(folder), 64, 3)}, OBJECTIVES[0], [phase], 3, 64, 0, 1)
    waits = [resource.getrusage(resource.RUSAGE_SELF).ru_majflt]
    for item in (2, 5):
        if item == 5:
            items.ahead(5)  # a read that is under way is not asked for again
        assert items[item].counts["loss"]
        waits.append(resource.getrusage(resource.RUSAGE_SELF).ru_majflt)
    without, with_it = np.diff(waits)
    assert with_it <= without / 4


@pytest.mark.parametrize("kill", range(8))
def test_a_killed_worker_is_an_error_not_a_hang(kill, prepared):
    """kill -9 after 0, 2, 4 … steps, of either worker, while the rank waits for it or is busy with something else."""
    before = set(children())
    steps = steps_of(long_run(prepared), 0, workers=2)
    next(steps)
    workers = sorted(set(children()) - before)
    assert len(workers) == 2
    started = time.monotonic()
    for _ in range(kill // 2):
        next(steps)
    os.kill(workers[kill % 2], signal.SIGKILL)
    time.sleep(0.2 * (kill // 4))
    with pytest.raises(PretrainError, match=r"a process of data\.workers died: process \d+ by SIGKILL; was it out of"):
        list(steps)
    assert time.monotonic() - started < 5
    assert set(children()) <= before, "a worker was left behind"


def long_run(prepared) -> loader.Batches:
    """More items than the processes compute while a test does something else."""
    windows, phase = Windows(Shards(prepared.shards["bert"]), 64, 3), Phase(steps=10**6, seq_len=64, batch_tokens=256)
    return batches_of({"": windows}, OBJECTIVES[0], [phase], 3, micro_batch=1, rank=0, world=1)


def test_workers_end_with_the_rank(prepared, tmp_path):
    """After kill -9 of the rank its workers notice and end."""
    pipe, theirs = multiprocessing.get_context("fork").Pipe()
    rank = multiprocessing.get_context("fork").Process(target=_rank, args=(prepared, theirs))
    rank.start()
    workers = pipe.recv()
    assert len(workers) == 3
    rank.kill()
    rank.join()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() and "Z" not in state(pid) for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _rank(prepared, pipe) -> None:
    steps = steps_of(long_run(prepared), 0, workers=3)
    next(steps)
    pipe.send(children())
    time.sleep(60)


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def test_any_step_is_reached_at_once(prepared):
    """Step 10⁹ of a run of 10¹² tokens costs what step 0 costs: the same calls, and no memory for what lies between."""
    shards = Shards(prepared.shards["bert"])
    phases = [Phase(steps=10**9, seq_len=32, batch_tokens=1024), Phase(steps=10**9, seq_len=64, batch_tokens=1024)]
    for step in (0, 999_999_999, 10**9, 2 * 10**9 - 1):
        items = batches_of({"": Windows(shards, 64, 3)}, OBJECTIVES[0], phases, 3, 2, 0, 1)
        tracemalloc.start()
        counted = sum(1 for _ in _calls(lambda at=step, items=items: items[items.first_item(at)]))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 16 << 20 and counted < 20_000, (step, peak, counted)


def _calls(work) -> list[str]:
    """Every Python call that `work` makes."""
    made = []
    sys.setprofile(lambda frame, event, _: made.append(event) if event == "call" else None)
    try:
        work()
    finally:
        sys.setprofile(None)
    return made


def test_seeking_to_a_step_gives_what_running_there_gives(prepared):
    running = list(steps_of(batches(prepared, OBJECTIVES[0]), 0, workers=0))
    for step in range(8):
        sought = next(steps_of(batches(prepared, OBJECTIVES[0]), step, workers=0))
        assert [micro.digest for micro in sought] == [micro.digest for micro in running[step]]


def test_seeds_steps_and_epochs_differ(prepared):
    digests = [
        tuple(micro.digest for micro in step)
        for seed in (3, 4)
        for step in steps_of(batches(prepared, OBJECTIVES[0], seed=seed), 0, workers=0)
    ]
    assert len(set(digests)) == len(digests) == 16


def test_a_batch_that_does_not_divide_names_the_nearest_that_do(prepared):
    with pytest.raises(ConfigError, match="set batch_tokens to 192 or 384"):
        batches(prepared, OBJECTIVES[0], micro_batch=3)


def test_phases_of_shorter_windows_take_as_many_more_at_once(prepared):
    steps = steps_of(batches(prepared, OBJECTIVES[0], micro_batch=2), 0, workers=0)
    shapes = [tuple(micro.batch.inputs.shape) for step in steps for micro in step]
    assert shapes == [(4, 32)] * 10 + [(2, 64)] * 24


def test_the_digest_adds_up_over_any_cut(prepared):
    items = batches(prepared, OBJECTIVES[0])
    whole = items.take(0, 0, 8).digest
    parts = [items.take(0, first, 2).digest for first in range(0, 8, 2)]
    assert whole == sum(parts) % 2**63
