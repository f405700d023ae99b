"""Train recipes on one GPU, from the same text with the same tokens, and write what they learn as JSON.

    python benchmarks/gpu/learning.py prepare --data .learning --text CORPORA --tasks TASKS      # where the text is
    python benchmarks/gpu/learning.py decoder --data .learning --out benchmarks/results/gpu-learning.json

Parts. Each is planned for less than ten minutes of one H200:

    decoder       the best recipe of benchmarks/converge.py, NorMuon with Qwen3's shape, beside nanoGPT's: English, two
                  sizes, windows of 1,024 tokens; bits per byte
    encoder       the best recipe there, NorMuon with ModernBERT's shape, causal first, beside run_mlm's: English, two
                  sizes, windows of 128 tokens; the loss of masked tokens. Both small ones are then fine-tuned
    reference-en  the best English encoder of 10 to 30 M weights that the time allows, and a decoder: fine-tuned, and
    reference-zh  asked minimal pairs. The same for Chinese. The encoder's export, in bf16, is copied beside the result

`prepare` copies text and tasks, and makes vocabularies. Shards of the English text are larger than what a GPU machine
may be sent, so they are made there; all runs of a part read the same ones.

A run is `python launch/pretrain.py` in bf16 with compiled blocks. All runs of a size take the same tokens: as many as
the slower one is planned to read in SECONDS (pretrain/training/plan.py), times `--faster`. Shapes and schedules are
those of converge.py. `width_base` and `depth_base` carry the rates of configs/two-cores to our recipes; nanoGPT and
run_mlm have the rates that are usual at their width (RATES). Ours have 3 to 7 % more weights.

    predicted  tokens_per_s from the assumed share of the peak, and from FLOPs and bytes (common.py); seconds of the
               command; the last held-out loss, a power of the FLOPs of training through runs on two CPU cores
               (`expected`); scores of tasks as those runs have them, or guessed (GUESSED)
    measured   the same, and the curve of held-out losses: tokens, seconds, loss. Seconds are those of steps; one that
               takes more than COMPILING times the median compiles, and counts as the median. While our encoder reads
               causally, its points are losses of the token before each [MASK], which predicts it
    reached    the first point of our curve that is as low as the last one of nanoGPT or run_mlm, as shares of their
               tokens and seconds. It is in the middle of a schedule, so a run that ends there needs fewer

Labelled examples and rates are those of benchmarks/budgets.py. The file is written after every run and every
task, what fails is in `failed`, and its curves are drawn beside it.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)  # so that no file of this folder shadows a library

from benchmarks import budgets, converge  # noqa: E402
from benchmarks.gpu import common, speed  # noqa: E402

TEXT = {
    "en": ("en_wiki.train.jsonl.zst", "en_books.train.jsonl.zst"),
    "zh": ("zh_wiki.train.jsonl.zst", "zh_law.train.jsonl.zst"),
}
ENTRIES = {"byte": 32_768, "bert": 16_384}  # a tensor of an export is in one file: bert's has 13 MB at width 384
SIZES = {"small": {"layers": 10, "width": 384}, "base": {"layers": 12, "width": 768}}
BEST = {"decoder": "qwen3, NorMuon", "encoder": "modernbert, NorMuon, causal first"}
KNOWN = {"decoder": "nanoGPT", "encoder": "run_mlm"}
OURS = {  # as in configs/two-cores
    "model": {"width_base": 128, "depth_base": 4},
    "decoder": {"adam_lr": 0.016},
    "encoder": {"adam_lr": 6e-3},
}
# nanoGPT: config/train_shakespeare_char.py and train.py, for these widths. run_mlm: ELECTRA's (Clark et al. 2020,
# arXiv:2003.10555, appendix A) for its small and its base model, which trained BERT beside them.
RATES = {"nanoGPT": {384: 1e-3, 768: 6e-4}, "run_mlm": {384: 5e-4, 768: 2e-4}}
SECONDS = {  # planned, of a run
    "decoder": {"small": 50, "base": 100},
    "encoder": {"small": 45, "base": 75},
    "reference": {"encoder": 220, "decoder": 80},
}
START_S = 40  # guessed: a run's start, compiling, scoring and saving
GPU = "H200"
POINTS = 12  # of a curve
COMPILING = 5
EPOCHS = 6  # of every task: the 20 of classifiers in budgets.py take too long here
FINE_TUNED = ("en_banking77", "en_mr", "en_ewt_pos", "en_snips_slots")
# BLiMP: between 62.9 (configs/two-cores/decoder-10min.yaml) and an LSTM's 73.4 (Warstadt et al. 2020); SLING: below the
# mean of 18 models, 69.7 (Song et al. 2022).
GUESSED = {"en_blimp": 0.70, "zh_sling": 0.65}
AT_ONCE = 8  # tasks
FILE_GB, FILES = 0.0165, 4  # of the export that comes back: files below 16 MiB, at most so many with weights


class Run(NamedTuple):
    language: str
    kind: str  # decoder or encoder
    size: str
    recipe: str
    T: int
    batch_tokens: int
    seconds: float

    @property
    def name(self) -> str:
        return f"{self.kind}, {self.size}, {self.recipe}"

    @property
    def form(self) -> str:
        return budgets.FORMS[self.kind]


def runs_of(part: str, toy: bool) -> list[Run]:
    """The runs of a part: the best recipe first, in case there is no time for all."""
    if part.startswith("reference"):
        sizes = [("encoder", 256, 65_536), ("decoder", 512, 65_536)]
        seconds = SECONDS["reference"]
        found = [Run(part[-2:], kind, "small", BEST[kind], T, batch, seconds[kind]) for kind, T, batch in sizes]
    else:
        T, recipes = {"decoder": 1024, "encoder": 128}[part], (BEST[part], KNOWN[part])
        found = [Run("en", part, size, one, T, 32_768, SECONDS[part][size]) for size in SIZES for one in recipes]
    if toy:
        found = [one._replace(T=128, batch_tokens=512) for one in found if one.size == "small"]
    return found


def sections(one: Run, tokens: int, toy: bool) -> dict[str, Any]:
    """The configuration of a run of so many tokens, but for its data."""
    recipe, size = converge.RECIPES[one.kind][one.recipe], {"layers": 2, "width": 64} if toy else SIZES[one.size]
    best = one.recipe == BEST[one.kind]
    optim = OURS[one.kind] if best else {} if toy else {"lr": RATES[one.recipe][size["width"]]}
    recipe = replace(
        recipe,
        model=recipe.model | (OURS["model"] if best else {}),
        optim=recipe.optim | optim,
        phases=tuple(replace(phase, seq_len=one.T) for phase in recipe.phases),
        batch_tokens=one.batch_tokens,
    )
    values = recipe.configuration(**size, tokens=tokens)
    values["model"] |= {"max_positions": max(one.T, 128), "vocab_multiple": 64}
    steps = sum(phase["steps"] for phase in values["phases"])
    engine = {"precision": "bf16", "micro_batch": one.batch_tokens // one.T}
    return values | {
        "engine": engine | {"compile": "aot_eager" if toy else "inductor"},
        "evaluate": {"every_steps": max(1, steps // POINTS), "max_tokens": 4096 if toy else 1 << 18},
        "log_every": 50,
    }


# Predictions


def speeds(one: Run, toy: bool) -> dict[str, Any]:
    """The planned tokens a second, and the FLOPs of a token."""
    from pretrain.model.config import ModelConfig
    from pretrain.training.plan import tokens_per_s

    values = sections(one, 100 * one.batch_tokens, toy)
    steps = sum(phase["steps"] for phase in values["phases"])
    ratio = values["objective"].get("mask_ratio", 0.15) if one.kind == "encoder" else 1.0
    shares = [1.0 if "objective" in phase else ratio for phase in values["phases"]]  # of tokens that meet the head
    targets = round(one.T * sum(s * p["steps"] for s, p in zip(shares, values["phases"], strict=True)) / steps)
    tokens, entries = (one.batch_tokens, one.batch_tokens), ENTRIES[one.form]
    counted = common.predicted(values["model"], entries, one.T, targets, tokens, speed.COMPILED, speed.OUR_LOGIT)
    assumed = tokens_per_s(GPU, counted["flops_a_token"], ModelConfig(**values["model"]))
    rates = {"assumed share of the peak": round(assumed), "counted": counted["tokens_per_s"]}
    return {"tokens_per_s": rates, "flops_a_token": counted["flops_a_token"], "weights": counted["weights"]}


def tokens_of(one: Run, runs: list[Run], args: argparse.Namespace) -> int:
    """The tokens of all runs of a size: those that the slowest of them is planned to read in its seconds."""
    if args.toy:
        return 24 * one.batch_tokens
    same = [other for other in runs if (other.kind, other.size) == (one.kind, one.size)]
    rate = min(speeds(other, False)["tokens_per_s"]["assumed share of the peak"] for other in same)
    return round(args.faster * rate * one.seconds / one.batch_tokens) * one.batch_tokens


def expected(one: Run, tokens: int, weights: int) -> dict[str, Any]:
    """The last held-out loss if it goes on as a power of 6 x weights x tokens, from a race of converge.py through the
    run of ten minutes in budgets.json (both of English), from that run in the language on.

    A well-known recipe is where the best one is with the share of tokens with which it won the race. The CPU runs have
    8,192 entries, so masked losses are not quite comparable.
    """
    results = ROOT / "benchmarks/results"
    race = json.loads((results / "converge.json").read_text())["races"][f"{one.kind}-2x128"]
    cpu = json.loads((results / "budgets.json").read_text())["runs"]
    base, english = cpu.get(one.language, {}).get(f"{one.kind}-10min"), cpu["en"][f"{one.kind}-10min"]
    if base is None:
        return {"loss": None, "source": "no CPU run of this kind in this language"}
    won = {float(share): entry for share, entry in race["compared"][BEST[one.kind]].items() if entry["z"] > 1.64}
    first = race["runs"][BEST[one.kind]][f"{max(won):g}"][0]
    work = english["parameters"] * english["tokens"] / (first["parameters"] * first["tokens"])
    power = math.log(won[max(won)]["loss"] / english["heldout_loss"]) / math.log(work)
    share = 1.0 if one.recipe == BEST[one.kind] else min(won)
    ratio = (share * weights * tokens / (base["parameters"] * base["tokens"])) ** -power
    key = "heldout_bits_per_byte" if one.kind == "decoder" else "heldout_loss"
    source = f"{base[key]:.3f} in budgets.json x ({share:g} of the FLOPs / its FLOPs) ^ -{power:.3f}"
    return {"loss": round(ratio * base[key], 3), "source": source}


# Preparing


def prepare(data: Path, language: str, text: list[Path], tasks: list[Path], heldout: float = 0.01) -> None:
    """Make the folder of a language: the text, its recipe, both vocabularies, and the tasks as one packed file."""
    folder = data / language
    folder.mkdir(parents=True, exist_ok=True)
    for file in text:
        shutil.copyfile(file, folder / file.name)
    sources = [{"name": file.name.split(".")[0], "language": language, "files": [file.name]} for file in text]
    recipe = folder / "recipe.yaml"
    recipe.write_text(json.dumps({"name": language, "heldout_fraction": heldout, "sources": sources}))
    for form, size in ENTRIES.items():
        keys = {"corpus": str(recipe), "vocab_size": size, "plot": False}
        budgets.stage(
            "tokenizer", f"configs/small/tokenizer-{form}.yaml", out=str(folder / f"tokenizer-{form}"), **keys
        )
    with tarfile.open(folder / "tasks.tar.xz", "w:xz") as packed:
        for task in tasks:
            packed.add(task, task.name)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{folder}: {size / 1e6:.1f} MB", flush=True)


def tasks_of(language: str) -> tuple[str, ...]:
    return (*budgets.CLASSIFIED[language], *budgets.TAGGED[language], budgets.PAIRS[language])


def toy_data(data: Path) -> None:
    """Text, vocabularies and tiny tasks from data/sample, with the names of the real ones."""
    sample = ROOT / "data/sample"
    for language in TEXT:
        source = {side: (sample / f"tasks/{language}_order/{side}.jsonl") for side in ("train", "dev", "test")}
        for name in tasks_of(language):
            (data / "tasks" / name).mkdir(parents=True)
            for side, path in source.items():
                rows = [json.loads(line) for line in path.read_text().splitlines()[:60]]
                if name in budgets.TAGGED[language]:
                    words = [row["text"].split() or ["."] for row in rows]
                    rows = [{"tokens": some, "tags": [f"{len(word) % 2}" for word in some]} for some in words]
                elif name == budgets.PAIRS[language]:
                    rows = [{"good": row["text"], "bad": row["text"][::-1], "paradigm": "order"} for row in rows]
                lines = "".join(json.dumps(row) + "\n" for row in rows)
                (data / "tasks" / name / f"{side}.jsonl").write_text(lines)
        tasks = [data / "tasks" / name for name in tasks_of(language)]
        prepare(data, language, [sample / f"{language}.txt"], tasks, heldout=0.05)


# Training


def trained(one: Run, tokens: int, data: Path, folder: Path, toy: bool) -> dict[str, Any]:
    """Train as a user does; what was measured, and the curve."""
    out = folder / one.kind if one.recipe == BEST[one.kind] else folder / one.recipe
    out = out.with_name(f"{out.name}-{one.size}")
    place = {
        "shards": str(folder / f"shards-{one.form}"),
        "tokenizer": str(data / one.language / f"tokenizer-{one.form}"),
    }
    windows = "documents" if one.kind == "encoder" else "stream"
    values = {"out": str(out), "seed": 1, "data": place | {"windows": windows, "workers": 2}}
    path = out.with_suffix(".yaml")
    path.write_text(json.dumps(values | sections(one, tokens, toy)))
    began = time.perf_counter()
    with open(out.with_suffix(".log"), "w") as log:
        command = [sys.executable, str(ROOT / "launch/pretrain.py"), str(path)]
        status = subprocess.run(command, env=common.environment(toy), stdout=log, stderr=log, cwd=ROOT).returncode
    wall = time.perf_counter() - began
    if status:
        raise RuntimeError(common.tail(out.with_suffix(".log")))
    summary, steps = json.loads((out / "summary.json").read_text()), common.lines_of(out / "metrics.jsonl")
    unit = "bits_per_byte" if one.kind == "decoder" else "loss"
    middle = sorted(step["step_s"] for step in steps)[len(steps) // 2]
    slow = [step["step_s"] for step in steps if step["step_s"] > COMPILING * middle]
    seconds, passed = {}, 0.0
    for step in steps:
        passed += step["step_s"] if step["step_s"] <= COMPILING * middle else middle
        seconds[step["step"]] = passed
    curve = [
        [step["tokens"], round(seconds[step["step"]], 2), round(line[unit], 4)]
        for line in common.lines_of(out / "evaluations.jsonl")
        if line["corpus"] == "" and line[unit] is not None
        for step in [steps[line["step"] - 1]]
    ]
    return {
        **{key: summary[key] for key in ("parameters", "tokens", "steps", "steps_skipped", "heldout_loss")},
        "no_context_loss": summary["no_context_loss"],
        "loss": curve[-1][2],
        "tokens_per_s": round(one.batch_tokens / middle),
        "seconds": round(wall, 1),
        "compiling_s": round(sum(slow), 1),
        "compiling_steps": len(slow),
        "waited_share": round(sum(step["data_wait_s"] for step in steps) / sum(step["step_s"] for step in steps), 4),
        "curve": curve,
    }


def reached(best: list, known: list) -> dict[str, float] | None:
    """Shares of the tokens and the seconds of the well-known recipe after which the best one has its last loss."""
    last = known[-1]
    found = next((point for point in best if point[2] <= last[2]), None)
    return found and {"tokens": round(found[0] / last[0], 3), "seconds": round(found[1] / last[1], 3)}


# Tasks


def exported(one: Run, data: Path, folder: Path, name: str) -> None:
    """Export a run to the folder NAME-hf, in bf16 and in small files."""
    dialect = converge.RECIPES[one.kind][one.recipe].dialect
    run = name if name == KNOWN[one.kind] else one.kind
    settings = {"checkpoint": str(folder / f"{run}-{one.size}"), "out": str(folder / f"{name}-hf"), "dialect": dialect}
    budgets.stage("export", f"configs/small/export-{one.kind}.yaml", dtype="bfloat16", max_shard_gb=FILE_GB, **settings)


def asked(name: str, task: str, tasks: Path, folder: Path) -> dict[str, Any]:
    """The scores of the export NAME-hf on a task."""
    language = task[:2]
    if task in budgets.CLASSIFIED[language]:
        return budgets.classified(folder, name, tasks / task)
    if task in budgets.TAGGED[language]:
        return budgets.tagged(folder, name, tasks / task)
    return budgets.paired(folder, name, tasks / task)


def on_cpu(task: str) -> dict[str, Any]:
    """The score of the encoder that two CPU cores trained longest. A GPU's should be above it."""
    runs = json.loads((ROOT / "benchmarks/results/budgets.json").read_text())["runs"].get(task[:2], {})
    for name in ("encoder-8h", "encoder-1h", "encoder-10min"):
        if task in runs.get(name, {}).get("tasks", {}):
            return {"above": runs[name]["tasks"][task]["full"]["mean"], "source": f"{name} in budgets.json"}
    return {"above": None, "source": "no CPU run"}


def evaluate(pairs: list[tuple[str, str]], data: Path, folder: Path, put: Callable[..., None]) -> None:
    """Ask exports tasks, (export, task) several at once: small models leave a GPU idle."""
    tasks = folder / "tasks"
    with tarfile.open(data / pairs[0][1][:2] / "tasks.tar.xz") as packed:
        packed.extractall(tasks, filter="data")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        futures = {pool.submit(asked, *pair, tasks, folder): pair for pair in pairs}
        for future in as_completed(futures):
            name, task = futures[future]
            guess = {"guessed": GUESSED[task]} if task in GUESSED else on_cpu(task)
            guess = {"below": "the score of `encoder`"} if name in KNOWN.values() else guess
            try:
                put({"predicted": guess, "measured": future.result()}, "tasks", name, task)
            except (Exception, SystemExit) as error:  # the others go on
                put(f"{error!r}"[-1500:], "failed", f"{name}, {task}")


def handed_off(folder: Path, part: str, beside: Path) -> dict[str, int]:
    """Copy the encoder's export: its weights as they are, and all other files packed into one. Their sizes."""
    weights = sorted(folder.glob("*.safetensors"))
    assert len(weights) <= FILES, f"{len(weights)} files with weights, of at most {FILES}"
    made = [Path(shutil.copyfile(file, beside / f"{part}-{file.name}")) for file in weights]
    made.append(beside / f"{part}-rest.tar.xz")
    with tarfile.open(made[-1], "w:xz") as packed:
        for file in sorted(folder.iterdir()):
            if file not in weights:
                packed.add(file, file.name)
    return {file.name: file.stat().st_size for file in made}


def part_of(part: str, data: Path, folder: Path, result: common.Result, args: argparse.Namespace) -> None:
    def put(value: Any, *keys: str) -> None:
        result.put(value, part, *keys)

    result.found.pop(part, None)
    put(common.facts("learning.py", args.toy), "run")
    runs = runs_of(part, args.toy)
    language = runs[0].language
    for form in dict.fromkeys(one.form for one in runs):
        keys = {"corpus": str(data / language / "recipe.yaml"), "workers": os.cpu_count()}
        keys |= {"tokenizer": str(data / language / f"tokenizer-{form}"), "out": str(folder / f"shards-{form}")}
        budgets.stage("shards", f"configs/small/shards-{form}.yaml", **keys)
    curves: dict[str, list] = {}
    for one in runs:
        tokens, plan = tokens_of(one, runs, args), speeds(one, args.toy)
        took = tokens / plan["tokens_per_s"]["assumed share of the peak"] + START_S
        plan |= {"tokens": tokens, "seconds": round(took), **expected(one, tokens, plan["weights"])}
        put({"predicted": plan}, "runs", one.name)
        try:
            measured = trained(one, tokens, data, folder, args.toy)
        except Exception:  # the others go on
            put(traceback.format_exc()[-2000:], "failed", one.name)
            continue
        put({"predicted": plan, "measured": measured}, "runs", one.name)
        curves[one.name] = measured["curve"]
    for one in runs:
        pair = [curves.get(one._replace(recipe=recipe[one.kind]).name) for recipe in (BEST, KNOWN)]
        if one.recipe == KNOWN[one.kind] and all(pair):
            put(reached(*pair), "reached", one.size)
    pairs = []
    for one in runs:
        if one.size != "small" or one.name not in curves or part == "decoder":
            continue
        name = one.kind if one.recipe == BEST[one.kind] else one.recipe
        try:
            exported(one, data, folder, name)
        except (Exception, SystemExit) as error:
            put(f"{error!r}"[-1500:], "failed", f"export of {one.name}")
            continue
        if part.startswith("reference") and one.kind == "encoder":
            try:
                put(handed_off(folder / f"{name}-hf", part, args.out.parent), "handed_off")
            except (Exception, SystemExit) as error:
                put(f"{error!r}"[-1500:], "failed", "handed_off")
        wanted = FINE_TUNED if part == "encoder" else budgets.CLASSIFIED[language] + budgets.TAGGED[language]
        if one.kind == "decoder":
            wanted = (budgets.PAIRS[language],)
        pairs += [(name, task) for task in ({wanted[0], wanted[-1]} if args.toy else wanted)]
    if pairs:
        evaluate(pairs, data, folder, put)
    put(common.smi(), "gpu_after")


def draw(found: dict[str, Any], path: Path) -> None:
    """The curves of both races, over tokens and over seconds."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    races = [part for part in ("decoder", "encoder") if part in found]
    if not races:
        return
    figure, grid = plt.subplots(len(races), 2, figsize=(10, 4 * len(races)), squeeze=False, layout="constrained")
    for row, part in zip(grid, races, strict=True):
        for name, run in found[part].get("runs", {}).items():
            for axes, column in zip(row, (0, 1), strict=True):
                points = run.get("measured", {}).get("curve", [])
                style = "-" if BEST[part] in name else "--"
                axes.plot([p[column] for p in points], [p[2] for p in points], style, marker=".", label=name)
        for axes, label in zip(row, ("tokens", "seconds of steps"), strict=True):
            axes.set_xlabel(label)
            axes.grid(alpha=0.3)
        row[0].set_ylabel("bits per byte" if part == "decoder" else "loss of masked tokens, nats")
        row[1].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=["prepare", "decoder", "encoder", "reference-en", "reference-zh"])
    parser.add_argument("--data", type=Path, help="the folder that `prepare` makes; not with --toy")
    parser.add_argument("--text", type=Path, help="for `prepare`: the folder with the files in TEXT")
    parser.add_argument("--tasks", type=Path, help="for `prepare`: the folder with a folder for each task")
    parser.add_argument("--faster", type=float, default=1.0, help="multiplies all tokens, once speeds are measured")
    parser.add_argument(
        "--toy", action="store_true", help="tiny models and data/sample on the CPU, to try this program"
    )
    parser.add_argument("--out", type=Path, help="parts in this file that are not measured now stay")
    args = parser.parse_args()
    if args.parts == ["prepare"]:
        if not (args.data and args.text and args.tasks):
            parser.error("prepare needs --data, --text and --tasks")
        for language, files in TEXT.items():
            tasks = [args.tasks / name for name in tasks_of(language)]
            prepare(args.data.resolve(), language, [args.text / file for file in files], tasks)
        return
    if "prepare" in args.parts or not args.out or not (args.toy or args.data):
        parser.error("prepare stands alone; the other parts need --out, and --data or --toy")
    result = common.Result(args.out)
    budgets.EPOCHS = dict.fromkeys(budgets.EPOCHS, EPOCHS)
    if args.toy:
        ENTRIES.update(byte=1024, bert=2048)
        budgets.LABELS, budgets.EPOCHS = 40, dict.fromkeys(budgets.EPOCHS, 1)
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "data" if args.toy else args.data.resolve()
        if args.toy:
            toy_data(data)
        for part in args.parts:
            folder = Path(scratch) / part
            folder.mkdir()
            part_of(part, data, folder, result, args)
    draw(result.found, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
