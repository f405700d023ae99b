"""How a stage is started: `python launch/STAGE.py CONFIG.yaml [key=value ...]`.

Exit 0: done. Exit 2: the user's mistake, said in a few lines without a traceback. Exit 1: ours, with the traceback.
Exit 75: a training was stopped by a signal before its end, and has saved. Exit 130: Ctrl-C anywhere else.
"""

import argparse
import importlib
import os
import signal
import sys
import time
from pathlib import Path

from pretrain import config
from pretrain.errors import PretrainError, Stopped, SystemRefusal, UserError, refusal
from pretrain.processes.bus_error import explain_bus_errors
from pretrain.processes.signals import launcher

# stage → module with `run(config)`, and the class of its configuration. Imported when asked for: the data stages
# start in a fraction of a second because nothing makes them import torch.
STAGES = {
    "clean": ("pretrain.cleaning", "CleanConfig"),
    "tokenizer": ("pretrain.tokenizer", "TokenizerConfig"),
    "compare_tokenizers": ("pretrain.tokenizer.compare", "CompareConfig"),
    "shards": ("pretrain.shards", "ShardsConfig"),
    "words": ("pretrain.shards.segment", "WordsConfig"),
    "import_megatron": ("pretrain.shards.import_megatron", "ImportConfig"),
    "reshard": ("pretrain.shards.reshard", "ReshardConfig"),
    "pretrain": ("pretrain.training.run", "RunConfig"),
    "evaluate": ("pretrain.evaluation.stage", "ScoringConfig"),
    "export": ("pretrain.export", "ExportConfig"),
    "finetune": ("pretrain.finetune", "FinetuneConfig"),
    "generate": ("pretrain.prompting.generate", "GenerateConfig"),
    "demo": ("pretrain.tools.demo", "DemoConfig"),
}
RANK0_HEAD_START_S = 30.0  # on busy cores the launcher needed more than 3 to end the others


def main(stage: str, argv: list[str] | None = None) -> int:
    """Run one stage on the command line's configuration; the exit status. A rank of several exits here."""
    print_what_can_be_printed()
    parser = argparse.ArgumentParser(
        prog=f"launch/{stage}.py",
        description=f"Run the stage {stage!r}.",
        epilog="Keys: the Config class in the stage's module; configs/sample has an example of each.",
    )
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted keys laid over the file")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher inserts it
    if stage == "shards":
        parser.add_argument("--scheduler", metavar="tcp://…", help="of a Dask cluster that does the work: scheduler=…")
    arguments = parser.parse_intermixed_args(argv)
    if scheduler := getattr(arguments, "scheduler", None):
        arguments.overrides.append(f"scheduler={scheduler}")
    status = guarded(lambda: _run(stage, arguments.config, arguments.overrides))
    if _is_connected_rank():
        # Gloo's threads hold the tensors of a collective a moment longer than its caller. One that is caught by the
        # interpreter's end aborts the process (PyTorch pull request 179291), and disconnecting does not help while
        # anything still refers to a process group. All is written by now: the rank ends here.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def guarded(work) -> int:
    """Call `work()`; a PretrainError, or what the system refuses, becomes a message and its exit status.

    Under a launcher rank 0 speaks once.
    """
    explain_bus_errors()
    try:
        try:
            work()
        except BrokenPipeError:
            raise
        except Exception as error:
            if isinstance(error, PretrainError) or (refused := refusal(error)) is None:
                raise
            raise SystemRefusal(*refused) from None
    except Stopped as stopped:
        return stopped.exit_code
    except PretrainError as error:
        if launcher() and os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) != "0":
            time.sleep(RANK0_HEAD_START_S)  # if rank 0 met the same, the launcher has ended this one by now
        prefix = "error" if isinstance(error, UserError) else "failed"
        print(f"{prefix}: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except BrokenPipeError:
        return 1
    except KeyboardInterrupt:
        print("interrupted; no half-made folder has its name", file=sys.stderr, flush=True)
        return 128 + signal.SIGINT
    return 0


def print_what_can_be_printed() -> None:
    """Have characters that the terminal or the log cannot show printed as `?`: no work is lost for one.

    Nor for a stream that is closed (`>&-`), where Python has None: what is printed then goes nowhere.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", None) in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")


def _is_connected_rank() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_initialized()


def _run(stage: str, path: str, overrides: list[str]) -> None:
    module_name, config_name = STAGES[stage]
    module = importlib.import_module(module_name)

    module.run(config.load(getattr(module, config_name), Path(path), overrides))
