"""The ranks of a run: how a process learns its rank, connects to the others, and reports their failures.

A launcher (deepspeed, torchrun, srun) starts the ranks and gives each its number in environment variables. A process
without these variables is alone.
"""

import os
import re
import socket
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch

from pretrain.errors import ConfigError, PretrainError, ResumeError
from pretrain.processes.signals import launcher

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
WAIT_SAID_S = 5.0  # seconds before a wait is reported: one launcher starts all ranks within two seconds


@dataclass(frozen=True)
class World:
    """The place of this process among the ranks."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    launched: bool = False  # whether deepspeed, torchrun or srun started it; else it is a single plain process

    @property
    def speaks(self) -> bool:
        return self.rank == 0


def find_world() -> World:
    """The rank of this process, from the environment variables of deepspeed, torchrun or SLURM.

    Sets RANK, WORLD_SIZE and LOCAL_RANK from SLURM's variables, for libraries that read only these. Raises ConfigError,
    naming the variable, when one is missing or has no valid value.
    """
    env = os.environ
    if "RANK" not in env and "SLURM_PROCID" in env and _whole("SLURM_NTASKS", least=1, default=1) > 1:
        of_slurm = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}
        env.update({name: str(_whole(other)) for name, other in of_slurm.items()})
        if "MASTER_ADDR" not in env:
            raise ConfigError(
                "srun started these ranks without MASTER_ADDR",
                "export MASTER_ADDR=$(scontrol show hostnames $SLURM_JOB_NODELIST | head -n 1) MASTER_PORT=29500",
            )
        env.setdefault("MASTER_PORT", "29500")
    if "RANK" not in env:
        return World()
    rank, size = _whole("RANK"), _whole("WORLD_SIZE", least=1, default=1)
    if rank >= size:
        said = f"WORLD_SIZE is {size}" if "WORLD_SIZE" in env else "WORLD_SIZE is not set, which means one rank"
        raise ConfigError(f"RANK = {rank} is not below WORLD_SIZE", said, _remedy())
    local_rank = _whole("LOCAL_RANK", default=0 if size == 1 else None)
    if size > 1:
        _whole("MASTER_PORT", least=1, most=65535)
        if not env.get("MASTER_ADDR"):
            raise ConfigError(f"MASTER_ADDR is not set, where {size} ranks are to meet", _remedy())
    if on_cuda():  # with srun --gpus-per-task=1 every rank sees one device only
        local_rank %= torch.cuda.device_count()
        env["LOCAL_RANK"] = str(local_rank)
    return World(rank, size, local_rank, launched=True)


def _whole(name: str, least: int = 0, most: int = 2**31 - 1, default: int | None = None) -> int:
    """The value of the environment variable `name`, which must be a whole number. Raises ConfigError."""
    value = os.environ.get(name)
    if value is None and default is not None:
        return default
    if value is None:
        raise ConfigError(f"the environment variable {name} is not set, where RANK or SLURM_PROCID is", _remedy())
    if not (value.isascii() and value.isdigit() and least <= int(value[:20]) <= most):
        wanted = f"a whole number from {least}" + (f" to {most}" if most < 2**31 - 1 else "")
        raise ConfigError(f"the environment variable {name} = {value!r} is not {wanted}", _remedy())
    return int(value)


def _remedy() -> str:
    """The advice for environment variables that describe ranks that do not exist."""
    if launcher() == "srun":
        return "start every rank with srun, or one process alone with: env -u SLURM_PROCID python …"
    names = " ".join(f"-u {name}" for name in RANK_VARIABLES if name in os.environ)
    return f"a launcher (deepspeed, torchrun, srun) sets these; for one plain process: env {names} python …"


def join(world: World, timeout_s: int) -> None:
    """Connect the ranks: NCCL on CUDA, gloo on CPU. Every later wait for another rank ends after `timeout_s`.

    Raises ConfigError when the port is taken, or when a rank is missing after `timeout_s`.
    """
    warnings.filterwarnings("ignore", message=".*(all_gather_into_tensor|reduce_scatter_tensor).*")
    import deepspeed
    import deepspeed.ops
    from torch.distributed import distributed_c10d

    # With this kernel each rank on a CPU would leave 69 MB in /dev/shm. The collectives of training use gloo anyway.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(_free_port()))
    for name, value in (("RANK", world.rank), ("WORLD_SIZE", world.size), ("LOCAL_RANK", world.local_rank)):
        os.environ.setdefault(name, str(value))
    os.environ.setdefault("LOCAL_SIZE", str(world.size))
    if on_cuda():
        torch.cuda.set_device(world.local_rank)
    # DeepSpeed makes groups of its own, some of them late, without a time limit. They would have torch's default, which
    # is 30 minutes for gloo, whatever limit init_distributed is given.
    limit = timedelta(seconds=timeout_s)
    distributed_c10d.default_pg_timeout = limit
    distributed_c10d.default_pg_nccl_timeout = limit  # type: ignore[attr-defined]  # torch imports it, without export
    waiting = threading.Timer(WAIT_SAID_S, _say_waiting, [world, timeout_s])
    waiting.daemon = True
    if world.size > 1:
        waiting.start()
    try:
        deepspeed.init_distributed(timeout=limit, verbose=False)
    except (RuntimeError, ValueError) as error:
        raise _not_joined(world, timeout_s, str(error)) from None
    finally:
        waiting.cancel()


def new_group(timeout_s: float) -> "torch.distributed.ProcessGroup | None":
    """A gloo group of all ranks for CPU tensors, whose waits end after `timeout_s`; a collective.

    None in a plain process.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    return torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))


def _say_waiting(world: World, timeout_s: int) -> None:
    if world.speaks or launcher() is None:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        others = "the other" if world.size == 2 else f"{world.size - 1} others"
        print(
            f"rank {world.rank} of {world.size} is waiting for {others} at {where}, at most {timeout_s} s"
            + ("" if launcher() else f"; RANK and WORLD_SIZE are set in this shell: {_remedy()}"),
            flush=True,
        )


def _not_joined(world: World, timeout_s: int, problem: str) -> ConfigError:
    """The error for ranks that could not be connected, from the message of torch, `problem`."""
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if "EADDRINUSE" in problem or "address already in use" in problem.lower():
        return ConfigError(
            f"port {port} is taken",
            f"rank 0 waits for the other ranks at {address}:{port}, where another program listens",
            f"choose another: deepspeed --master_port {_free_port()} …, or torchrun --master-port, or MASTER_PORT",
        )
    first = problem.strip().splitlines()[0][:300] if problem.strip() else "no reason was given"
    came = re.search(r"(\d+)/\d+ clients joined", problem)
    if came:
        what = f"{came[1]} of {world.size} ranks came within {timeout_s} s"
    elif "timed out" in problem.lower() or "timeout" in problem.lower():
        what = f"rank {world.rank} of {world.size} did not meet the others within {timeout_s} s"
    else:
        what = f"rank {world.rank} of {world.size} cannot be connected with the others"
    if launcher() is None:
        remedy = f"RANK and WORLD_SIZE are set in this shell: {_remedy()}"
    else:
        remedy = (
            "check that every rank was started, and read the output of the others; on several nodes every node must "
            f"reach {address} through the interface in GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME"
        )
    return ConfigError(what, f"at {address}:{port}: {first}", remedy)


@contextmanager
def failures_said(world: World) -> Iterator[None]:
    """Turn failures from outside into a clear error: another rank hangs or has ended, or memory ran out."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        found = _said(world, error)
        if found is None:
            raise
        raise found from None


def _said(world: World, error: Exception) -> PretrainError | None:
    """The clear error for a failure from outside; None if `error` is something else."""
    text = str(error)
    limit = re.search(r"[Tt]imed out waiting (\d+) ?ms|Timeout\(ms\)=(\d+)", text)
    if limit:
        waited = int(limit[1] or limit[2]) / 1000
        return PretrainError(
            f"rank {world.rank} waited {waited:g} s for another rank, which did not answer\n"
            "  one of the other ranks hangs or is stopped: look at its process, its GPU (nvidia-smi) and its disk\n"
            "  start the run again: it continues from its newest checkpoint; the time limits are engine.timeout_s and, "
            "in a save, checkpoint.timeout_s"
        )
    if re.search(r"[Cc]onnection (closed|reset)|[Rr]ead error .*peer|[Bb]roken pipe", text):
        return PretrainError(
            f"rank {world.rank} lost the connection to another rank, which has ended\n"
            "  its own output says why it ended, or the log of the kernel (dmesg) if it was killed\n"
            "  start the run again: it continues from its newest checkpoint"
        )
    return _out_of_memory(world, error)


def _out_of_memory(world: World, error: Exception) -> ConfigError | None:
    """The error that says how to use less memory; None if `error` is something else."""
    text = str(error)
    out_of_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    if not out_of_memory and "can't allocate memory" not in text and "Cannot allocate memory" not in text:
        return None
    wanted = text.strip().splitlines()[0][:300] if text.strip() else "an allocation was refused"
    where = f"rank {world.rank} of {world.size}, on {device_of(world)}"
    return ConfigError(
        "memory ran out",
        f"{where}: {wanted}",
        "set engine.recompute_every = 1, lower engine.micro_batch (batch_tokens stays: it is accumulated), shorten "
        "seq_len, take a smaller model, more ranks or a higher engine.zero_stage, or offload: "
        "engine.deepspeed.zero_optimization.offload_optimizer",
    )


def check_agreement(world: World, facts: dict[str, str]) -> None:
    """Raise ResumeError unless all ranks have the same `facts`; a collective, after `join`.

    Without this check, ranks that read different shards or checkpoints from their own disks would train on silently.
    """
    if world.size == 1:
        return
    said: list[dict[str, str]] = [{}] * world.size
    torch.distributed.all_gather_object(said, facts)
    for rank, other in enumerate(said):
        for name, value in said[0].items():
            if other[name] != value:
                raise ResumeError(
                    "the ranks do not see the same run",
                    f"{name}: rank 0 says {value}, rank {rank} says {other[name]}",
                    "out, data.shards and data.tokenizer must name the same files on every node",
                )


def on_cuda() -> bool:
    """Whether this process trains on a GPU. DS_ACCELERATOR=cpu forbids it, as it does for DeepSpeed."""
    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"


def device_of(world: World) -> torch.device:
    return torch.device("cuda", world.local_rank) if on_cuda() else torch.device("cpu")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
