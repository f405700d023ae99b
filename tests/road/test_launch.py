"""Start runs with the real launchers, as a user does."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT, run_values
from tests.helpers import cases
from tests.helpers.processes import started
from tests.helpers.ranks import Ranks, free_port

BIN = Path(sys.executable).parent
DEEPSPEED = [str(BIN / "deepspeed"), "--num_accelerators", "2"]
TIMEOUT_S = 180


def start(command: list[str], cwd: Path) -> AbstractContextManager[subprocess.Popen]:
    env = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        env.pop(name, None)
    return started(command, cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def other_port() -> list[str]:
    """Choose a free port. The default port of `deepspeed` is fixed, and two test files run at the same time."""
    return ["--master_port", str(free_port())]


def finish(process: subprocess.Popen) -> tuple[int, str]:
    output, _ = process.communicate(timeout=TIMEOUT_S)
    return process.returncode, output


def ended(command: list[str], cwd: Path) -> tuple[int, str]:
    with start(command, cwd) as process:
        return finish(process)


def written(values: dict, path: Path) -> Path:
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def test_deepspeed_and_torchrun_train_the_same_run(prepared, tmp_path):
    """Both launchers start two ranks from another folder, and the runs are equal to the last bit."""
    launchers = {
        "deepspeed": [*DEEPSPEED, *other_port(), str(ROOT / "launch/pretrain.py")],
        "torchrun": [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            str(ROOT / "launch/pretrain.py"),
        ],
    }
    for name, command in launchers.items():
        config = written(run_values(prepared, tmp_path / name), tmp_path / f"{name}.yaml")
        code, output = ended([*command, str(config), "log_every=6"], cwd=tmp_path)
        assert code == 0, output
        assert output.count("step  6/12") == 1, "rank 0 alone talks\n" + output
        assert "DeepSpeed ZeRO 1, 2 x cpu" in output
    assert cases.history(tmp_path / "deepspeed") == cases.history(tmp_path / "torchrun")
    assert json.loads((tmp_path / "deepspeed/summary.json").read_text())["steps"] == 12


def test_a_rank_does_not_live_to_see_the_interpreters_end(prepared, tmp_path):
    """A thread of gloo that still holds a tensor may abort there: one run in twenty on busy cores (measured)."""
    values = run_values(prepared, tmp_path / "run", engine={"zero_stage": 2})  # DeepSpeed even on one rank
    config = written(values, tmp_path / "run.yaml")
    code = "import atexit, sys; from pretrain import cli; atexit.register(print, 'THE END'); cli.main(sys.argv.pop(1))"
    rank, endings = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, []
    shown = ["pretrain", str(config), "--print-config"]  # of a process that connects to no other
    for words, said in ((shown, "zero_stage: 2"), (["pretrain", str(config)], "held-out at step 12")):
        command = [sys.executable, "-c", code, *words]
        result = subprocess.run(command, cwd=ROOT, env={**os.environ, **rank}, text=True, capture_output=True)
        assert result.returncode == 0 and said in result.stdout, result
        endings.append("THE END" in result.stdout)
    assert endings == [True, False], "a process that is not connected to others ends as usual"


def test_a_users_mistake_under_the_launcher_is_said_once_and_exits_2(prepared, tmp_path):
    values = run_values(prepared, tmp_path / "run", optim={"warmup_step": 3})
    config = written(values, tmp_path / "run.yaml")
    launcher = [*DEEPSPEED, *other_port(), str(ROOT / "launch/pretrain.py"), str(config)]
    code, output = ended(launcher, cwd=tmp_path)
    assert code == 2, output
    assert output.count("did you mean optim.warmup_steps?") == 1 and "Traceback" not in output, output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("reaches", ["launcher", "process group", "one rank"])
def test_ranks_whose_launcher_is_terminated_save_and_end(reaches, prepared, tmp_path):
    """SIGTERM to `deepspeed` kills only the launcher; its ranks must not train on as orphans. SIGTERM to the process
    group, as Slurm sends it, reaches the ranks twice; the second signal must not cut the saving short."""
    steps = [{"steps": 100_000, "seq_len": 32, "batch_tokens": 256}]
    values = run_values(prepared, tmp_path / "run", phases=steps)
    values["data"]["workers"] = 2 if reaches == "process group" else 0
    config = written(values, tmp_path / "run.yaml")
    launcher = [*DEEPSPEED, *other_port(), str(ROOT / "launch/pretrain.py"), str(config)]
    with open(tmp_path / "log", "w") as log, started(launcher, cwd=tmp_path, stdout=log, stderr=log) as process:
        wait_for(lambda: len(cases.history(tmp_path / "run")) > 3, tmp_path / "log")
        if reaches == "one rank":
            os.kill(next(pid for pid in alive(str(config)) if "RANK" in variables(pid)), signal.SIGTERM)
            assert process.wait(TIMEOUT_S) == 75, "the launcher returns the exit status of a rank"
        else:
            (os.killpg if reaches == "process group" else os.kill)(process.pid, signal.SIGTERM)
            process.wait(TIMEOUT_S)
        wait_for(lambda: "stopped at step" in (tmp_path / "log").read_text(), tmp_path / "log")
        saved = cases.state(tmp_path / "run")
        wait_for(lambda: not alive(str(config)), tmp_path / "log")
    assert saved and len(list((tmp_path / "run/checkpoints").glob("step_*"))) == 1


def test_sigterm_to_a_plain_process_saves_ends_cleanly_and_the_run_goes_on(prepared, tmp_path):
    steps = [{"steps": 100_000, "seq_len": 32, "batch_tokens": 256}]
    values = run_values(prepared, tmp_path / "run", phases=steps)
    config = written(values, tmp_path / "run.yaml")
    with start([sys.executable, str(ROOT / "launch/pretrain.py"), str(config)], cwd=tmp_path) as process:
        wait_for(lambda: len(cases.history(tmp_path / "run")) > 3)
        process.send_signal(signal.SIGTERM)
        code, output = finish(process)
    assert code == 75 and "(SIGTERM): saved" in output and "failed" not in output, output
    assert "continuing after step" not in output
    done = len(cases.history(tmp_path / "run"))
    with Ranks(1, cases.train, values, log=tmp_path / "again.log", launched=False) as again:
        wait_for(lambda: len(cases.history(tmp_path / "run")) > done + 3)
        os.kill(again.processes[0].pid, signal.SIGTERM)
        assert "Stopped" in again.result(0, within=60)[1]
    assert f"continuing after step {done}" in again.logs() and "(SIGTERM): saved" in again.logs()
    steps_recorded = [step for step, *_ in cases.history(tmp_path / "run")]
    assert steps_recorded == list(range(1, len(steps_recorded) + 1))


def test_only_the_deepspeed_launcher_is_watched_beyond_the_parent():
    """Under torchrun the grandparent is the user's shell, and a run must survive a log-out."""
    code = "from pretrain.processes.signals import _lineage; print(*_lineage())"
    shell = ["sh", "-c", f'"{sys.executable}" -c "{code}"; true']
    parent, above = subprocess.check_output(shell, cwd=ROOT, text=True).split()
    assert int(parent) > 1 and above == "0"
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}]) # deepspeed.launcher.launch"
    _, above = subprocess.check_output([sys.executable, "-c", launcher], cwd=ROOT, text=True).split()
    assert int(above) == os.getpid()


def wait_for(condition, log: Path | None = None) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, log.read_text() if log else "waited too long"
        time.sleep(0.05)


def alive(argument: str) -> list[int]:
    """Return the processes that have `argument` on their command line, except for this test."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                if argument in (folder / "cmdline").read_bytes().decode(errors="replace").split("\0"):
                    found.append(int(folder.name))
            except OSError:
                continue
    return found


def variables(pid: int) -> set[str]:
    """Return the names of a process's environment variables."""
    return {entry.partition("=")[0] for entry in Path(f"/proc/{pid}/environ").read_text().split("\0")}


@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
def test_workers_of_every_start_method_find_the_package_not_the_script(method, tmp_path):
    """`deepspeed launch/pretrain.py` puts launch/ first on sys.path, where pretrain.py shadows the package."""
    checkout = tmp_path / "checkout"
    (checkout / "launch").mkdir(parents=True)
    (checkout / "pretrain").symlink_to(ROOT / "pretrain")
    header, marker, _ = (ROOT / "launch/pretrain.py").read_text().partition("    from pretrain.cli import main\n")
    assert marker
    body = f"""
    import multiprocessing
    with multiprocessing.get_context({method!r}).Pool(1) as pool:
        print(pool.apply(eval, ("__import__('pretrain.order.stream').__path__",)))
"""
    (checkout / "launch/pretrain.py").write_text(header + body)
    code, output = ended([sys.executable, "launch/pretrain.py"], cwd=checkout)
    assert code == 0 and "checkout/pretrain" in output, output


def test_data_stages_start_without_torch():
    code = "import sys, pretrain.shards, pretrain.tokenizer, pretrain.cli; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).strip() == "False"
