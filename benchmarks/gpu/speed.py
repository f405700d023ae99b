"""Measure training steps of ours and of others in turn on one GPU, and write the figures as JSON.

    python benchmarks/gpu/speed.py decoder encoder --out benchmarks/results/gpu-speed.json

Groups:

    decoder  GPT-2 with 124 M weights, windows of 1,024 tokens; ours, nanoGPT (compiled) and the Trainer of Hugging Face
    encoder  BERT-base, windows of 512 tokens, 15 % and 30 % masked; ours and BERT of Hugging Face (compiled)
    feeding  both, with 1, 2 and 4 processes that make batches, masking tokens and whole words

A step is 65,536 tokens with AdamW (learning rate 1e-4, clipped at 1), micro-batches of 16,384 tokens, in bf16; without
dropout. The data are made up: documents of log-normal lengths, packed into windows. Only ours keeps them apart.
`ours` is launch/pretrain.py in a plain process, with compiled blocks, a vocabulary padded to a multiple of 64 and two
processes that make batches; the other lines of ours change one thing. (GPT-2's 50,257 entries padded to a multiple of
64 are also a multiple of 128; BERT's are not. With dropout attention takes a dense mask.)

All contestants of a group are started, and warm up a few at a time. Then each takes a turn of `--steps` steps, round
after round, while the others wait and hold only their weights and optimizer on the GPU. Figures are [median, least,
most] over rounds. A profile follows, of two steps of each: milliseconds by class of kernel. In compiled models of
others the head's products count as matrix products. `predicted` is counted from FLOPs and bytes (common.py).
`mfu` is the share of the peak in the vendor's data sheet, with our FLOPs of a token, in which only the masked tokens of
an encoder meet the head. The file is written after every turn.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)  # so that no file of this folder shadows a library

import numpy as np  # noqa: E402
import yaml  # noqa: E402

from benchmarks.gpu import common, contest  # noqa: E402

RATE, BETAS, DECAY, CLIP = 1e-4, (0.9, 0.95), 0.1, 1.0
STEPS = 10**5  # of a run of ours; the measurement ends it long before
WINDOWS = 16  # steps whose batches the others repeat
# Numbers that the kernels of a block beside its matrix products and its attention read or write for each channel, both
# passes, if norms, residual sums and the activation have a kernel each, and if norms and residual sums share one.
EAGER, COMPILED = 60, 52
# Bytes read and written for a logit: ours in chunks (bf16 product, fp32 softmax, bf16 gradient, two products); whole
# logits, one kernel for each operation; whole logits, compiled.
OUR_LOGIT, EAGER_LOGIT, COMPILED_LOGIT = 34, 38, 14
# By reading other people's measurements, before anything was run: see `expected` in the result.
EXPECTED = {
    "decoder": {"goal_tokens_per_s": 600_000, "eager, dense mask, whole logits: tokens_per_s": 255_000},
    "encoder": {"goal_tokens_per_s": 750_000},
    "feeding": {"wait_share": 0.0},
}


class Setting(NamedTuple):
    """The settings that all contestants of a family have in common."""

    shape: dict[str, Any]  # the section `model`
    kind: str  # of the vocabulary
    vocab_size: int
    T: int
    batch: int  # windows of a step
    micro: int  # windows of a micro-batch
    document: float  # the median length of documents


def setting(family: str, toy: bool) -> Setting:
    preset = {"decoder": "gpt2-124m", "encoder": "bert-base"}[family]
    shape = yaml.safe_load((ROOT / f"configs/presets/{preset}.yaml").read_text())["model"]
    shape |= {"dropout": 0.0, "vocab_multiple": 64}
    if toy:
        shape |= {"layers": 2, "width": 64, "heads": 2, "mlp_width": 128, "max_positions": 64}
        return Setting(shape, "byte" if family == "decoder" else "bert", 1100, 64, 4, 2, 12)
    if family == "decoder":
        return Setting(shape, "byte", 50_257, 1024, 64, 16, 250)
    return Setting(shape, "bert", 30_522, 512, 128, 32, 125)


class Ours(NamedTuple):
    """The settings of one of our contestants beside those of its family. `micro` multiplies the micro-batch."""

    model: dict[str, Any] = {}
    engine: dict[str, Any] = {}
    objective: dict[str, Any] = {}
    optim: dict[str, Any] = {}
    micro: float = 1.0
    shards: str = "packed"
    workers: int = 2


OURS: dict[str, dict[str, Ours]] = {
    "decoder": {
        "ours": Ours(),
        "ours, not compiled": Ours(engine={"compile": None}),
        "ours, vocab_multiple 1": Ours(model={"vocab_multiple": 1}),
        "ours, one document a window": Ours(shards="whole"),
        "ours, half the micro-batch": Ours(micro=0.5),
        "ours, twice the micro-batch": Ours(micro=2),
        "ours, four times the micro-batch": Ours(micro=4),
        "ours, Muon": Ours(optim={"kind": "muon", "lr": 0.02}),
        "ours, deterministic": Ours(engine={"deterministic": True}),
    },
    "encoder": {
        "ours, 15 %": Ours(),
        "ours, 30 %": Ours(objective={"mask_ratio": 0.3}),
        "ours, 15 %, not compiled": Ours(engine={"compile": None}),
        "ours, 15 %, vocab_multiple 128": Ours(model={"vocab_multiple": 128}),
        "ours, 15 %, one document a window": Ours(shards="whole"),
        "ours, 15 %, four times the micro-batch": Ours(micro=4),
        "ours, 15 %, dropout 0.1": Ours(model={"dropout": 0.1}),
    },
    "feeding": {
        f"{family}{', whole words' if unit else ''}, {workers} workers": Ours(
            objective={"unit": unit} if unit else {}, workers=workers
        )
        for family, unit in (("decoder", ""), ("encoder", ""), ("encoder", "word"))
        for workers in (1, 2, 4)
    },
}
OTHERS = {
    "decoder": ["nanoGPT, compiled", "HF Trainer, GPT2"],
    "encoder": ["HF BERT, compiled, 15 %", "HF BERT, compiled, 30 %"],
    "feeding": [],
}


# Preparing


def prepare(folder: Path, family: str, toy: bool) -> None:
    """Make a vocabulary, shards of packed and of whole windows, and the batches of the others."""
    from pretrain.objectives import OBJECTIVES
    from pretrain.order.phases import Phase
    from pretrain.order.stream import Windows
    from pretrain.shards import Shards
    from tests.helpers.batches import batches

    made = setting(family, toy)
    place, tokens = common.make_tokenizer(folder, made.kind, made.vocab_size), 100 * made.batch * made.T
    common.make_shards(folder / f"{family}-packed", place, common.drawn_lengths(tokens, made.document))
    common.make_shards(folder / f"{family}-whole", place, np.full(tokens // made.T, made.T))
    for share in (0.15, 0.3) if family == "encoder" else (0.0,):
        kind, keys = ("masked_lm", {"mask_ratio": share}) if share else ("causal_lm", {})
        config = OBJECTIVES[kind].Config(kind=kind, **keys)
        phase = Phase(steps=WINDOWS, seq_len=made.T, batch_tokens=made.batch * made.T)
        found = batches({"": Windows(Shards(folder / f"{family}-packed"), made.T, 1)}, config, [phase], 1, made.batch)
        inputs, labels = [], []
        for batch in (found[step].batch for step in range(WINDOWS)):
            inputs.append(batch.inputs.astype(np.int64))
            labels.append(batch.targets.astype(np.int64))
            if batch.target_index is not None:
                labels[-1] = np.full_like(inputs[-1], -100)
                np.put_along_axis(labels[-1], batch.target_index, np.where(batch.weights > 0, batch.targets, -100), 1)
        np.savez(folder / f"{family}-{100 * share:.0f}.npz", inputs=np.stack(inputs), labels=np.stack(labels))


def configuration(folder: Path, group: str, name: str, asked: Ours, toy: bool) -> tuple[Path, dict[str, Any]]:
    """The file of a run of ours, and its prediction."""
    from pretrain.training.engine.config import EngineConfig
    from pretrain.training.engine.footprint import state_bytes
    from pretrain.training.engine.ranks import World
    from pretrain.training.optim import OPTIMIZERS

    family = family_of(group, name)
    made = setting(family, toy)
    micro = max(1, int(made.micro * asked.micro))
    objective = {"kind": "causal_lm" if family == "decoder" else "masked_lm"} | asked.objective
    engine = {"precision": "bf16", "micro_batch": micro, "compile": "aot_eager" if toy else "inductor"} | asked.engine
    data = {"shards": str(folder / f"{family}-{asked.shards}"), "tokenizer": str(folder / f"tokenizer-{made.kind}")}
    out = folder / "runs" / name.replace(", ", "-").replace(" ", "_").replace("%", "")
    values: dict[str, Any] = {
        "out": str(out),
        "seed": 1,
        "data": data | {"windows": "documents", "workers": asked.workers},
        "model": made.shape | asked.model,
        "objective": objective,
        "optim": {"kind": "adamw", "lr": RATE, "betas": list(BETAS), "weight_decay": DECAY, "clip": CLIP} | asked.optim,
        "phases": [{"steps": STEPS, "seq_len": made.T, "batch_tokens": made.batch * made.T}],
        "engine": engine,
        "checkpoint": {"every_s": 0},
    }
    out.parent.mkdir(exist_ok=True)
    path = out.with_suffix(".yaml")
    path.write_text(json.dumps(values))
    share = objective.get("mask_ratio", 0.15) if family == "encoder" else 1
    passes = COMPILED if engine["compile"] else EAGER
    forecast = prediction(made, values["model"], share, micro, passes, OUR_LOGIT)
    optimizer = OPTIMIZERS[values["optim"]["kind"]]
    least = state_bytes(forecast["weights"], len(optimizer.states), EngineConfig(**engine), World(), True).device
    return path, forecast | {"gib_without_activations": round(least / 2**30, 2)}


def prediction(made: Setting, shape: dict, share: float, micro: int, passes: int, logit_bytes: int) -> dict[str, Any]:
    """`share`: of tokens that meet the head."""
    tokens = made.batch * made.T, micro * made.T
    return common.predicted(shape, made.vocab_size, made.T, round(share * made.T), tokens, passes, logit_bytes)


def of_other(name: str, toy: bool) -> dict[str, Any]:
    """The prediction of a contestant that is not ours. It computes all logits; FLOPs of a token are those of ours."""
    family = "encoder" if "BERT" in name else "decoder"
    made = setting(family, toy)
    compiled = "compiled" in name
    passes, logit = (COMPILED, COMPILED_LOGIT) if compiled else (EAGER, EAGER_LOGIT)
    found = prediction(made, made.shape, 1, made.micro, passes, logit)
    useful = {"15": 0.15, "30": 0.3}.get(name.split()[-2], 1) if family == "encoder" else 1
    asked = prediction(made, made.shape, useful, made.micro, passes, logit)
    return found | {"flops_a_token": asked["flops_a_token"]}


# Contestants that are not ours


def theirs(address: str, name: str, folder: str, toy: str) -> None:
    import torch

    from benchmarks import others

    family = "encoder" if "BERT" in name else "decoder"
    made = setting(family, toy == "toy")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    share = name.split()[-2] if family == "encoder" else "0"
    batches = np.load(Path(folder) / f"{family}-{share}.npz")
    inputs, labels = torch.from_numpy(batches["inputs"]), torch.from_numpy(batches["labels"])
    turns = contest.Turns(address, name)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")  # as nanoGPT does
    maker = others.nanogpt if "nanoGPT" in name else others.bert if family == "encoder" else others.gpt2
    rows = -(-made.vocab_size // 64) * 64
    sizes = others.Sizes(made.shape["layers"], made.shape["width"], made.shape["heads"], made.T, rows)
    model, loss_of = maker(sizes)
    if "Trainer" in name:
        return trainer(turns, model, inputs, folder, made, device)
    model.to(device).train()
    model.compile(backend="aot_eager" if toy == "toy" else "inductor")
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": DECAY},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=BETAS, fused=True)
    if device.type == "cuda":
        inputs, labels = inputs.pin_memory(), labels.pin_memory()
    parts = made.batch // made.micro
    step = 0
    while True:
        turns.over(device)
        batch = (x[step % WINDOWS].chunk(parts) for x in (inputs, labels))
        for some in zip(*batch, strict=True):
            with torch.autocast(device.type, torch.bfloat16):
                loss = loss_of(*(x.to(device, non_blocking=True) for x in some)) / parts
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()  # as for logging
        step += 1


def trainer(turns: contest.Turns, model: Any, inputs: Any, folder: str, made: Setting, device: Any) -> None:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class InTurn(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            turns.over(device)

        on_train_begin = on_step_end

    arguments = TrainingArguments(
        output_dir=f"{folder}/runs/trainer",
        max_steps=STEPS,
        per_device_train_batch_size=made.micro,
        gradient_accumulation_steps=made.batch // made.micro,
        bf16=True,
        optim="adamw_torch_fused",
        learning_rate=RATE,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        weight_decay=DECAY,
        max_grad_norm=CLIP,
        lr_scheduler_type="constant",
        dataloader_num_workers=2,
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        use_cpu=device.type == "cpu",
        disable_tqdm=True,
    )
    rows = [{"input_ids": row, "labels": row} for row in inputs.flatten(0, 1)]
    Trainer(model, arguments, train_dataset=rows, callbacks=[InTurn()]).train()


# Measuring


def measure(group: str, folder: Path, result: common.Result, args: argparse.Namespace) -> None:
    from pretrain.training.watch.log import PEAK_FLOPS

    def put(value: Any, *keys: str) -> None:
        result.put(value, group, *keys)

    put(common.facts("speed.py", args.toy) | {"floors": common.measured_floors(args.toy)}, "run")
    put(EXPECTED[group], "expected")
    device, toy = result.found[group]["run"]["device"], "toy" if args.toy else "full"
    peak = next((peak for known, peak in PEAK_FLOPS.items() if known in device), None)
    commands, forecasts, me = {}, {}, str(Path(__file__))
    for name, asked in OURS[group].items():
        path, forecasts[name] = configuration(folder, group, name, asked, args.toy)
        commands[name] = [sys.executable, me, "ours", "socket", name, str(path)]
    for name in OTHERS[group]:
        forecasts[name] = of_other(name, args.toy)
        commands[name] = [sys.executable, me, "theirs", "socket", name, str(folder), toy]
    commands = {name: command for name, command in commands.items() if not args.only or name in args.only}
    logs = folder / f"logs-{group}"
    logs.mkdir()
    for command in commands.values():
        command[3] = str(logs / "socket")
    running = contest.Contest(commands, common.environment(args.toy), logs)
    running.warm(args.warm)
    seen: dict[str, dict[str, list[float]]] = {}
    for round_ in range(args.rounds):
        for name, report in running.turn("measure", args.steps, round_):
            made = setting(family_of(group, name), args.toy)
            report["tokens_per_s"] = 1e3 * made.batch * made.T / report["step_ms"]
            if peak:
                report["mfu"] = report["tokens_per_s"] * forecasts[name]["flops_a_token"] / peak
            for figure, value in report.items():
                seen.setdefault(name, {}).setdefault(figure, []).append(value)
            shown = {figure: spread(values) for figure, values in seen[name].items()}
            put({"predicted": forecasts[name], "measured": shown}, "contestants", name)
    put(common.smi(), "gpu_after")
    for name, report in running.turn("profile", 2):
        put({kind: round(ms, 3) for kind, ms in report["ms_a_step"].items()}, "contestants", name, "profile_ms_a_step")
    running.end()
    put(running.failed, "failed")


def family_of(group: str, name: str) -> str:
    """`decoder` or `encoder`."""
    return name.split(",")[0].split()[0] if group == "feeding" else group


def spread(values: list[float]) -> list[float]:
    return [float(f"{f(values):.4g}") for f in (statistics.median, min, max)]


def main() -> None:
    if sys.argv[1:2] == ["ours"]:
        return contest.ours(*sys.argv[2:])
    if sys.argv[1:2] == ["theirs"]:
        return theirs(*sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="+", choices=list(OURS))
    parser.add_argument("--only", nargs="+", help="measure only these contestants")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10, help="of a turn")
    parser.add_argument("--warm", type=int, default=3)
    parser.add_argument("--toy", action="store_true", help="tiny models on the CPU, to try this program")
    parser.add_argument("--out", type=Path, required=True, help="groups in this file that are not measured now stay")
    args = parser.parse_args()
    result = common.Result(args.out)
    with tempfile.TemporaryDirectory() as scratch:
        wanted = {
            family for group in args.groups for family in (["decoder", "encoder"] if group == "feeding" else [group])
        }
        for family in sorted(wanted):
            prepare(Path(scratch), family, args.toy)
        for group in args.groups:
            result.found.pop(group, None)
            measure(group, Path(scratch), result, args)


if __name__ == "__main__":
    main()
