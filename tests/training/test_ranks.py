"""How a process finds its rank and its peers, and the errors when variables, ports, peers or memory fail."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

from pretrain.errors import ConfigError, PretrainError
from pretrain.training.engine.ranks import World, failures_said, find_world, join
from tests.conftest import ROOT, run_values
from tests.helpers import cases
from tests.helpers.ranks import Ranks

MEETING = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
RANK3 = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", **MEETING}
LAUNCHED = {
    "nothing": ({}, World()),
    "torchrun or deepspeed": (RANK3, World(3, 4, 1, launched=True)),
    "srun": (
        {"SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0", "MASTER_ADDR": "10.0.0.1"},
        World(2, 4, 0, launched=True),
    ),
    "python inside an allocation": ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0"}, World()),
}
NAMES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "SLURM_PROCID",
    "SLURM_NTASKS",
    "SLURM_LOCALID",
    "CROSS_SIZE",
    "TORCHELASTIC_RUN_ID",
)


@pytest.fixture
def started_by(monkeypatch):
    def set_environment(variables: dict[str, str]) -> None:
        for name in NAMES:  # set before it is deleted, so that additions of find_world are undone too
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_environment


@pytest.mark.parametrize("launcher", LAUNCHED)
def test_a_process_finds_its_rank_however_it_was_started(launcher, started_by):
    variables, expected = LAUNCHED[launcher]
    started_by(variables)
    assert find_world() == expected
    if expected.launched:  # for libraries that read only these
        assert os.environ["RANK"] == str(expected.rank) and os.environ["WORLD_SIZE"] == str(expected.size)


def test_srun_without_a_meeting_point_says_how_to_name_one(started_by):
    started_by({"SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"})
    with pytest.raises(ConfigError, match=r"(?s)without MASTER_ADDR.*scontrol show hostnames"):
        find_world()


SENSELESS = {  # changes to the variables of rank 3 of 4; None: not set
    "RANK": ["abc", "", "-1", "4", "1.0", "9" * 5000, "٣"],
    "WORLD_SIZE": ["two", "0", "3", None],
    "LOCAL_RANK": ["x", None],
    "MASTER_PORT": ["http", "0", "65536", None],
    "MASTER_ADDR": ["", None],
}
IN_SLURM = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0", "MASTER_ADDR": "127.0.0.1"}
SENSELESS_IN_SLURM = {"SLURM_PROCID": ["x"], "SLURM_NTASKS": ["many"], "SLURM_LOCALID": [None, "-"]}
CASES = [(RANK3, name, value) for name, values in SENSELESS.items() for value in values]
CASES += [(IN_SLURM, name, value) for name, values in SENSELESS_IN_SLURM.items() for value in values]


@pytest.mark.parametrize(("good", "name", "value"), CASES, ids=[f"{name}={str(value)[:5]}" for _, name, value in CASES])
def test_a_variable_that_makes_no_sense_is_named_with_what_to_do(good, name, value, started_by):
    started_by({other: said for other, said in {**good, name: value}.items() if said is not None})
    with pytest.raises(ConfigError) as error:
        find_world()
    assert name in error.value.what and ("env -u" in str(error.value)), str(error.value)


STALE = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1"}


@pytest.mark.parametrize("rank", [0, 1])
def test_variables_left_in_a_shell_end_the_wait_with_the_remedy(rank, started_by, monkeypatch, capfd):
    monkeypatch.setattr("pretrain.training.engine.ranks.WAIT_SAID_S", 0.2)
    started_by({**STALE, "RANK": str(rank), "MASTER_PORT": str(free_port())})
    with pytest.raises(ConfigError) as error:
        join(find_world(), 2)
    assert f"rank {rank} of 2 is waiting for the other at 127.0.0.1:" in capfd.readouterr().out
    expected = "1 of 2 ranks came within 2 s" if rank == 0 else "rank 1 of 2 did not meet the others within 2 s"
    assert error.value.what == expected and "env -u RANK -u WORLD_SIZE" in str(error.value)


def test_a_taken_port_is_named(started_by):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        started_by({**STALE, "RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": str(port)})
        with pytest.raises(ConfigError, match=rf"port {port} is taken(?s:.*)deepspeed --master_port"):
            join(find_world(), 10)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("stage", [0, 2, 3])  # stage 1 has the optimizer and the process groups of stage 2
def test_a_peer_that_hangs_ends_the_run_within_the_limit(stage, prepared, tmp_path):
    """DeepSpeed reduces over process groups of its own, which wait for 30 minutes by default."""
    engine = {"zero_stage": stage, "timeout_s": 4}
    values = run_values(prepared, tmp_path / "run", "causal_lm", engine=engine, phases=MANY_STEPS)
    with Ranks(2, train_but_stop_before_a_step, values, log=tmp_path / "log") as ranks:
        while ranks.processes[1].is_alive() and state_of(ranks.processes[1].pid) != "T":
            time.sleep(0.02)
        done, value = ranks.result(0, within=60)  # far below the 30 minutes, far above the 4 s on a busy machine
    assert not done and "rank 0 waited 4 s for another rank" in value and "PretrainError" in value, value


MANY_STEPS = [{"steps": 100_000, "seq_len": 32, "batch_tokens": 256}]


def train_but_stop_before_a_step(values: dict) -> None:
    """Train; rank 1 is stopped by SIGSTOP as it is about to make its fifth optimizer step."""
    from pretrain.training.engine.deepspeed import DeepSpeedEngine

    step, made = DeepSpeedEngine.step, []

    def stopping(self, lr: float) -> float | None:
        made.append(lr)
        if len(made) == 5 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGSTOP)
        return step(self, lr)

    DeepSpeedEngine.step = stopping
    cases.train(values)


def state_of(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


def test_a_peer_that_died_is_said_to_have_ended():
    with pytest.raises(PretrainError, match="lost the connection to another rank"), failures_said(World(0, 2)):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:40423")


def test_memory_that_runs_out_is_said_with_what_helps():
    with pytest.raises(ConfigError, match=r"memory ran out(?s:.*)engine\.micro_batch"), failures_said(World()):
        torch.empty(2**50, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="another fault"), failures_said(World()):
        raise RuntimeError("another fault")


def test_a_mistake_in_rank_variables_exits_2_at_once_without_a_traceback(prepared, tmp_path):
    """It does not wait the half minute that rank 1 of a launcher gives rank 0 to report the same error."""
    env = {**os.environ, **STALE, "RANK": "abc"}
    command = [sys.executable, str(ROOT / "launch/pretrain.py"), str(ROOT / "configs/sample/encoder.yaml")]
    done = subprocess.run(command, cwd=tmp_path, env=env, text=True, capture_output=True, timeout=25)
    assert done.returncode == 2 and "RANK = 'abc'" in done.stderr and "Traceback" not in done.stderr, done
