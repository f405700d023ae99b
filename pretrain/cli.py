"""The command line of every stage: `pretrain STAGE CONFIG.yaml [key=value ...]`, or `python launch/STAGE.py …`.

Exit 0: done. Exit 2: a mistake of the user, with a short message and no traceback. Exit 1: a failure that is not the
user's, with a short message (a worker process died) or with a traceback (a fault of this program). Exit 75: a signal
stopped a training before its end, and it has saved. Exit 130: Ctrl-C anywhere else.
"""

import argparse
import difflib
import importlib
import io
import os
import shutil
import signal
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from pretrain import __version__, config
from pretrain.config_reference import keys
from pretrain.errors import PretrainError, Stopped, SystemRefusal, UserError, refusal
from pretrain.processes.bus_error import explain_bus_errors
from pretrain.processes.signals import launcher


class Stage(NamedTuple):
    """A stage. Its modules are imported only when it runs, so no stage waits for the imports of another."""

    module: str  # the module with `run(config)`
    config: str  # the module and the name of its configuration class
    about: str  # its description in the list of commands


class Tool(NamedTuple):
    """A command with arguments of its own."""

    module: str  # the module with `main(argv, prog)`
    about: str


STAGES = {
    "clean": Stage("pretrain.cleaning", "pretrain.cleaning.stage.CleanConfig", "clean a corpus"),
    "tokenizer": Stage("pretrain.tokenizer", "pretrain.tokenizer.config.TokenizerConfig", "make a vocabulary"),
    "compare_tokenizers": Stage(
        "pretrain.tokenizer.compare", "pretrain.tokenizer.compare.CompareConfig", "put vocabularies side by side"
    ),
    "shards": Stage("pretrain.shards", "pretrain.shards.stage.ShardsConfig", "tokenise a corpus into shards"),
    "words": Stage(
        "pretrain.shards.segment", "pretrain.shards.segment.WordsConfig", "find where words begin in shards"
    ),
    "import_megatron": Stage(
        "pretrain.shards.import_megatron",
        "pretrain.shards.import_megatron.ImportConfig",
        "make shards from Megatron's token files",
    ),
    "import_uer": Stage(
        "pretrain.training.import_uer",
        "pretrain.training.import_uer.ImportConfig",
        "make a Hugging Face folder of a BERT of UER-py or TencentPretrain",
    ),
    "reshard": Stage("pretrain.shards.reshard", "pretrain.shards.reshard.ReshardConfig", "put sets of shards together"),
    "pretrain": Stage(
        "pretrain.training.run", "pretrain.training.config.RunConfig", "train a model, or continue a run"
    ),
    "evaluate": Stage("pretrain.evaluation.stage", "pretrain.evaluation.stage.ScoringConfig", "score a run again"),
    "export": Stage("pretrain.export", "pretrain.export.stage.ExportConfig", "write a checkpoint for transformers"),
    "finetune": Stage("pretrain.finetune", "pretrain.finetune.stage.FinetuneConfig", "fine-tune on a labelled task"),
    "generate": Stage(
        "pretrain.prompting.generate", "pretrain.prompting.generate.GenerateConfig", "continue prompts with a decoder"
    ),
    "demo": Stage("pretrain.tools.demo", "pretrain.tools.demo.DemoConfig", "walk the whole road on a CPU"),
}
TOOLS = {
    "explain": Tool("pretrain.tools.explain", "say what a run reads, and when"),
    "check_files": Tool("pretrain.tools.check_files", "check every byte of published folders"),
}
RANK0_HEAD_START_S = 30.0  # on busy cores the launcher needed more than 3 s to end the other ranks


def command(argv: list[str] | None = None) -> int:
    """The command `pretrain NAME …` for any stage or tool. Returns the exit status."""
    make_printing_safe()
    argv = sys.argv[1:] if argv is None else argv
    known = {name: entry.about for name, entry in (STAGES | TOOLS).items()}
    name = argv[0] if argv else "--help"
    if name == "--version":
        print(__version__)
        return 0
    if name in ("-h", "--help"):
        print("usage: pretrain COMMAND …\n\nFrom raw text to a pre-trained Transformer.")
        print("`pretrain COMMAND --help` shows what a command takes, with every key of its configuration.\n")
        for known_name, about in known.items():
            print(f"  {known_name.ljust(max(map(len, known)))}  {about}")
        return 0 if argv else 2
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        remedy = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
        return guarded(lambda: _raise(UserError(f"there is no command {name!r}", remedy)))
    if name in TOOLS:
        return importlib.import_module(TOOLS[name].module).main(argv[1:], prog=f"pretrain {name}")
    return main(name, argv[1:], prog=f"pretrain {name}")


def main(stage: str, argv: list[str] | None = None, prog: str | None = None) -> int:
    """Run one stage with the configuration of the command line. Returns the exit status; a distributed rank exits."""
    make_printing_safe()
    parser = argparse.ArgumentParser(prog=prog or f"launch/{stage}.py", description=STAGES[stage].about, add_help=False)
    parser.add_argument("config", help="YAML file; configs/sample has an example for each stage")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="dotted keys laid over the file")
    parser.add_argument("-h", "--help", action="store_true", help="show this help with every key, and exit")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration, and exit")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher inserts it
    if stage == "shards":
        parser.add_argument(
            "--scheduler", metavar="tcp://…", help="scheduler of a Dask cluster; short for scheduler=tcp://…"
        )
    given = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(given):
        print(f"{parser.format_help()}\n{_keys_of(stage)}")
        return 0
    arguments = parser.parse_intermixed_args(given)
    if scheduler := getattr(arguments, "scheduler", None):
        arguments.overrides.append(f"scheduler={scheduler}")
    status = guarded(lambda: _run(stage, arguments))
    if _is_connected_rank():
        # Gloo's threads hold the tensors of a collective a moment longer than its caller. If the interpreter ends in
        # that moment, the process aborts (PyTorch pull request 179291). Disconnecting does not help while anything
        # still refers to a process group. Everything is written by now, so the rank ends here.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def guarded(work: Callable[[], object]) -> int:
    """Call `work()`, and turn a PretrainError or an error of the system into a message. Returns the exit status.

    Under a launcher every rank but 0 waits before it prints the message. If rank 0 failed in the same way, the launcher
    ends the waiting ranks meanwhile, so the message is printed once.
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
            time.sleep(RANK0_HEAD_START_S)
        prefix = "error" if isinstance(error, UserError) else "failed"
        print(f"{prefix}: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except BrokenPipeError:
        return 1
    except KeyboardInterrupt:
        print("interrupted; no incomplete folder was published", file=sys.stderr, flush=True)
        return 128 + signal.SIGINT
    return 0


def make_printing_safe() -> None:
    """Prepare standard output and standard error, so that no work is lost because a text cannot be printed.

    Characters that the terminal or the log cannot show are printed as `?`. Output to a closed stream (`>&-`), for which
    Python has None, is discarded.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")


def _is_connected_rank() -> bool:
    """Whether this process is a rank in a process group of torch."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_initialized()


def _run(stage: str, arguments: argparse.Namespace) -> None:
    read = config.load(config_of(stage), Path(arguments.config), arguments.overrides)
    if arguments.print_config:
        resolved = getattr(read, "resolved", lambda: read)()
        print(config.dump(resolved), end="")
    else:
        importlib.import_module(STAGES[stage].module).run(read)


def config_of(stage: str) -> type[config.Config]:
    """The configuration class of a stage."""
    module, _, name = STAGES[stage].config.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _keys_of(stage: str) -> str:
    """Every key of a stage's configuration with its type, default and description."""
    width = max(60, shutil.get_terminal_size((120, 24)).columns - 1)
    lines = ["keys of the configuration:"]
    for key in keys(config_of(stage)):
        state = "" if key.section else f", default {key.default}" if key.default is not None else ", must be given"
        resume = {"free": "", "past": " [fixed for steps that are done]", "frozen": " [fixed]"}[key.resume]
        when = f" (with {key.when})" if key.when else ""
        lines.append(f"\n  {key.name}: {key.type}{state}{resume if stage == 'pretrain' else ''}{when}")
        lines += textwrap.wrap(key.description, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def _raise(error: UserError) -> None:
    raise error
