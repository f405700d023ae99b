"""Train the configurations of configs/two-cores as a user would, and ask what each has learned.

    python benchmarks/budgets.py FOLDER LANGUAGE TASKS CONFIGURATION... --text FILE... [--out FILE.json]

FOLDER keeps the cleaned text, the vocabularies, the shards and the runs. TASKS is a folder of labelled tasks, one
folder each. CONFIGURATION is a name in configs/two-cores, such as encoder-10min. Nothing is tuned for a text, a
language or a task. `wall_s` are the seconds of the whole `deepspeed` command on two ranks, so nothing else should run
beside it; `cpu_s_of_others` shows whether something did.

An encoder is fine-tuned on LABELS examples of each task in three ways: all weights, LoRA, and all weights of a random
twin, which has the same shape and was never pre-trained. Classifiers are trained by the stage `finetune`, taggers by
tagging.py. Every way has one learning rate for all tasks and three seeds. Classifiers have 20 epochs, as Mosbach et al.
(2021, arXiv:2006.04884) advise for few examples. A decoder answers minimal pairs (minimal_pairs.py). Each score records
its epochs, and a task whose score is in the file is not run again.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # so that no file of this folder shadows a library

from benchmarks.measuring import ONE_THREAD, machine, process, versions  # noqa: E402

LABELS, RATES = 1000, {"full": 1e-3, "lora": 3e-3, "random": 1e-3}
EPOCHS = {"classifier": 20, "tagger": 6}
CLASSIFIED = {
    "en": ("en_banking77", "en_clinc150", "en_mr", "en_sick"),
    "zh": ("zh_crosswoz_domain", "zh_law_category"),
}
TAGGED = {"en": ("en_ewt_pos", "en_snips_slots", "en_wnut17_ner"), "zh": ("zh_uner_ner",)}
PAIRS, PAIRS_EACH = {"en": "en_blimp", "zh": "zh_sling"}, 200
FORMS = {"encoder": "bert", "decoder": "byte"}


def stage(name: str, configuration: str, **keys: Any) -> None:
    """Run a stage as a process of its own, unless its output is there."""
    if not Path(keys["out"]).exists():
        settings = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in keys.items()]
        process([sys.executable, str(ROOT / f"launch/{name}.py"), str(ROOT / configuration), *settings], ONE_THREAD)


def prepare(folder: Path, language: str, text: list[Path]) -> None:
    """Clean the text, and make both vocabularies and their shards."""
    recipe = folder / "recipe.yaml"
    sources = [{"name": file.name.split(".")[0], "language": language, "files": [str(file.resolve())]} for file in text]
    recipe.write_text(json.dumps({"name": language, "heldout_fraction": 0.01, "sources": sources}))
    clean = str(folder / "clean")
    stage("clean", "configs/small/clean.yaml", corpus=str(recipe), out=clean)
    for form in FORMS.values():
        vocabulary = str(folder / f"tokenizer-{form}")
        stage("tokenizer", f"configs/small/tokenizer-{form}.yaml", corpus=clean, out=vocabulary)
        shards = str(folder / f"shards-{form}")
        stage("shards", f"configs/small/shards-{form}.yaml", corpus=clean, tokenizer=vocabulary, out=shards)


def trained(folder: Path, name: str) -> dict[str, Any]:
    """Train on two ranks and export."""
    kind = name.partition("-")[0]
    run, form = folder / name, FORMS[kind]
    data = [f"data.shards={folder}/shards-{form}", f"data.tokenizer={folder}/tokenizer-{form}", f"out={run}"]
    launched = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", "2"]
    configuration = str(ROOT / f"configs/two-cores/{name}.yaml")
    cost = process([*launched, str(ROOT / "launch/pretrain.py"), configuration, *data], ONE_THREAD)
    summary = json.loads((run / "summary.json").read_text())
    exported = f"{run}-hf"
    shutil.rmtree(exported, ignore_errors=True)
    stage("export", f"configs/small/export-{kind}.yaml", checkpoint=str(run), out=exported)
    keys = ("tokens", "steps", "parameters", "heldout_loss", "heldout_standard_error", "no_context_loss")
    keys += ("heldout_accuracy", "heldout_bits_per_byte")
    found = {key: summary[key] for key in keys}
    return found | {key: round(cost[key]) for key in ("cpu_s", "wall_s", "cpu_s_of_others")}


def classified(folder: Path, name: str, task: Path) -> dict[str, Any]:
    """Fine-tune a classifier with every method; return its baselines, and accuracy and interval of each method."""
    found: dict[str, Any] = {"metric": "accuracy", "epochs": EPOCHS["classifier"]}
    for method, rate in RATES.items():
        out = folder / f"{name}-tasks" / f"{task.name}-{method}-{EPOCHS['classifier']}"
        keys = {
            "method": "lora" if method == "lora" else "full",
            "init": "random" if method == "random" else "pretrained",
        }
        keys |= {"model": f"{folder / name}-hf", "task": str(task), "out": str(out), "labels": LABELS}
        keys |= {"epochs": EPOCHS["classifier"], "learning_rates": [rate], "max_length": 96}
        stage("finetune", "configs/small/finetune.yaml", **keys)
        report = json.loads((out / "report.json").read_text())
        found |= {key: round(value, 4) for key, value in report["baselines"].items()}
        found[method] = {
            "mean": round(report["test"]["accuracy"], 4),
            "interval95": [round(end, 4) for end in report["test"]["interval95"]],
        }
    return found


def tagged(folder: Path, name: str, task: Path) -> dict[str, Any]:
    """The scores of tagging.py, as `classified` has them."""
    settings = ["--labels", str(LABELS), "--epochs", str(EPOCHS["tagger"]), "--rates", str(RATES["full"])]
    one = answer("tagging", str(task), f"{folder / name}-hf", *settings)
    found: dict[str, Any] = {"metric": one["metric"], "epochs": EPOCHS["tagger"]}
    for method in RATES:
        found[method] = {key: one[method][key] for key in ("mean", "interval95")}
    return found


def paired(folder: Path, name: str, task: Path) -> dict[str, Any]:
    """The scores of minimal_pairs.py."""
    files = map(str, sorted(task.glob("*.jsonl")))
    one = answer("minimal_pairs", f"{folder / name}-hf", *files, "--pairs", str(PAIRS_EACH))
    return {key: value for key, value in one.items() if key != "folder"}


def answer(program: str, *arguments: str) -> dict[str, Any]:
    """The line of JSON that a program of this folder prints."""
    command = [sys.executable, str(ROOT / f"benchmarks/{program}.py"), *arguments]
    done = subprocess.run(command, env=os.environ | ONE_THREAD, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("language", choices=list(PAIRS))
    parser.add_argument("tasks", type=Path)
    parser.add_argument("configurations", nargs="+")
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/budgets.json")
    arguments = parser.parse_args()
    folder, language = arguments.folder.resolve() / arguments.language, arguments.language
    folder.mkdir(parents=True, exist_ok=True)
    prepare(folder, language, arguments.text)
    result = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"runs": {}}
    result |= {"command": "python benchmarks/budgets.py FOLDER LANGUAGE TASKS CONFIGURATION... --text FILE..."}
    result |= {"date": str(date.today()), "machine": machine(), "versions": versions("torch", "deepspeed")}
    result |= {"labels": LABELS, "learning_rates": RATES}

    def write() -> None:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")

    for name in arguments.configurations:
        runs = result["runs"].setdefault(language, {})
        if name not in runs:
            runs[name] = {"text": [file.name for file in arguments.text], **trained(folder, name), "tasks": {}}
            write()
        asked = {PAIRS[language]: paired}
        if name.startswith("encoder"):
            asked = dict.fromkeys(CLASSIFIED[language], classified) | dict.fromkeys(TAGGED[language], tagged)
        for task, ask in asked.items():
            if task not in runs[name]["tasks"]:
                runs[name]["tasks"][task] = ask(folder, name, arguments.tasks / task)
                write()
                print(f"{language}, {name}, {task}: {runs[name]['tasks'][task]}", flush=True)


if __name__ == "__main__":
    main()
