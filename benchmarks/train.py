"""Measure the training steps of several trainers in turn, step by step, and write the figures as JSON.

    python benchmarks/train.py corpora/en.jsonl.zst --groups decoder encoder zero --out benchmarks/results/train.json

Vocabularies of 8,064 entries are trained on the first `--megabytes` of the text, and shards are built. Every contestant
trains 6 layers of width 384 with 6 heads on the same 4 windows of 256 tokens a step: fp32, AdamW (learning rate 1e-4,
betas 0.9 and 0.95, weight decay 0.1), gradients clipped at 1, one thread a process. `ours` are the commands that a user
types: launch/pretrain.py in a plain process, also with `engine.compile=inductor`, and under `deepspeed`. A step is
everything from one batch to the next, including making the batch, its digest and the metrics. Only ours keeps documents
apart, which is more work.

All contestants of a group are started. Then they take one step each in turn, round after round, while the others wait.
A ratio compares two steps of the same round; figures are the median and the quartiles over rounds. CPU seconds count
the whole process, averaged over ranks. Wall seconds are those of the slowest rank and mean little on a busy machine.
Groups:

    decoder  all contestants: nanoGPT's shape (pre-norm, LayerNorm, GELU, learned positions, biases, tied head); ours
             also in the shape of the dialect qwen3 (RMSNorm, SwiGLU, RoPE, normed queries and keys, as many weights)
    encoder  BERT's shape, 15 % masked. Ours projects only the masked positions to the vocabulary, the others all
    zero     our decoder with ZeRO 0 to 3 of DeepSpeed, on one rank, and on two with half of the windows each
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # so that no file of this folder shadows a library

import numpy as np  # noqa: E402

from benchmarks.measuring import ONE_THREAD, documents, machine, versions, write_recipe  # noqa: E402

LAYERS, WIDTH, HEADS, T, B, VOCABULARY = 6, 384, 6, 256, 4, 8064
STEPS = 10**5  # of a run of ours; the measurement ends it long before
WINDOWS = 64  # steps; the others repeat the batches of the first WINDOWS steps
WARM = 2  # rounds that do not count
RATE, BETAS, DECAY, CLIP = 1e-4, (0.9, 0.95), 0.1, 1.0
SHAPE = {"layers": LAYERS, "width": WIDTH, "heads": HEADS, "max_positions": T}
GPT = SHAPE | {"causal": True, "mlp_width": 4 * WIDTH, "norm": "layernorm", "norm_position": "pre", "norm_eps": 1e-5}
GPT |= {"positions": "learned", "mlp": "gelu", "bias": True}
QWEN = SHAPE | {"causal": True, "mlp_width": 1024, "norm": "rmsnorm", "norm_position": "pre", "norm_eps": 1e-6}
QWEN |= {"positions": "rope", "mlp": "swiglu", "bias": False, "qk_norm": True}
BERT = SHAPE | {"causal": False, "mlp_width": 4 * WIDTH, "norm": "layernorm", "norm_position": "post"}
BERT |= {"norm_eps": 1e-12, "positions": "learned", "mlp": "gelu", "bias": True, "transform_head": True}
FORCED = {"wall_clock_breakdown": False}  # any key of DeepSpeed makes it run a single rank too

# By name: the number of ranks that `deepspeed` starts (0: a plain process), the model, and keys of the section `engine`
OURS = {
    "decoder": {
        "ours, plain": (0, GPT, {}),
        "ours, compiled": (0, GPT, {"compile": "inductor"}),
        "ours, one rank": (1, GPT, {}),
        "ours, qwen3's shape, one rank": (1, QWEN, {}),
    },
    "encoder": {
        "ours, plain": (0, BERT, {}),
        "ours, compiled": (0, BERT, {"compile": "inductor"}),
        "ours, one rank": (1, BERT, {}),
    },
    "zero": {
        **{f"ours, one rank, ZeRO {n}": (1, GPT, {"zero_stage": n, "deepspeed": FORCED}) for n in range(4)},
        **{f"ours, two ranks, ZeRO {n}": (2, GPT, {"zero_stage": n}) for n in range(4)},
    },
}
OTHERS = {
    "decoder": ["nanoGPT", "nanoGPT, fused AdamW", "HF GPT2", "HF GPT2, fused AdamW", "HF Trainer, GPT2"],
    "encoder": ["HF BERT", "HF BERT, fused AdamW", "HF Trainer, BERT"],
    "zero": [],
}
COMPILED = ("ours, compiled", "ours, plain")
RATIOS = {
    "decoder": [COMPILED, *((mine, other) for mine in OURS["decoder"] for other in OTHERS["decoder"])],
    "encoder": [COMPILED, *((mine, other) for mine in OURS["encoder"] for other in OTHERS["encoder"])],
    "zero": [
        (f"ours, {ranks}, ZeRO {n}", f"ours, {ranks}, ZeRO 0") for ranks in ("one rank", "two ranks") for n in (1, 2, 3)
    ],
}


# Preparing


def prepare(text: Path, folder: Path, megabytes: float) -> None:
    """Make vocabularies and shards of both kinds, and the batches of the first WINDOWS steps for the others."""
    from pretrain import shards, tokenizer
    from pretrain.objectives.causal_lm import CausalLMConfig
    from pretrain.objectives.masked_lm import MaskedLMConfig
    from pretrain.order.phases import Phase
    from pretrain.order.stream import Windows
    from tests.helpers.batches import batches as batches_of

    with open(folder / "text.txt", "w", encoding="utf-8") as file:
        for document in documents(text, megabytes):
            file.write("\n".join(line for line in document.split("\n") if line.strip()) + "\n\n")
    corpus = str(write_recipe(folder, "text.txt"))
    for kind, config in {"byte": CausalLMConfig(kind="causal_lm"), "bert": MaskedLMConfig(kind="masked_lm")}.items():
        made, out = str(folder / f"tokenizer-{kind}"), folder / f"shards-{kind}"
        tokenizer.run(tokenizer.TokenizerConfig(corpus=corpus, out=made, kind=kind, vocab_size=VOCABULARY, plot=False))
        shards.run(shards.ShardsConfig(corpus=corpus, tokenizer=made, out=str(out)))
        phase = Phase(steps=STEPS, seq_len=T, batch_tokens=B * T)
        batches = batches_of({"": Windows(shards.Shards(out), T, 1)}, config, [phase], 1, B)
        inputs, labels = [], []
        for batch in (batches[step].batch for step in range(WINDOWS)):
            inputs.append(batch.inputs.astype(np.int64))
            labels.append(batch.targets.astype(np.int64))
            if batch.target_index is not None:
                at, labels[-1] = batch.target_index, np.full((B, T), -100)
                np.put_along_axis(labels[-1], at, np.where(batch.weights > 0, batch.targets, -100), 1)
        np.savez(folder / f"{kind}.npz", inputs=np.stack(inputs), labels=np.stack(labels))


def configuration(folder: Path, name: str, model: dict, engine: dict, ranks: int) -> Path:
    kind = "byte" if model["causal"] else "bert"
    values = {
        "out": str(folder / "runs" / name.replace(", ", "-").replace(" ", "_")),
        "seed": 1,
        "data": {"shards": str(folder / f"shards-{kind}"), "tokenizer": str(folder / f"tokenizer-{kind}")},
        "model": model,
        "objective": {"kind": "causal_lm" if model["causal"] else "masked_lm"},
        "optim": {"lr": RATE, "betas": list(BETAS), "weight_decay": DECAY, "clip": CLIP},
        "phases": [{"steps": STEPS, "seq_len": T, "batch_tokens": B * T}],
        "engine": {"micro_batch": B // max(1, ranks), **engine},
        "checkpoint": {"every_s": 0, "every_steps": STEPS},
    }
    path = Path(f"{values['out']}.yaml")
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(values))
    return path


# Contestants: processes that take one step each time they are told to


class Turns:
    """The contestant's side of the connection to this program."""

    def __init__(self, address: str, name: str):
        self.connection = Client(address)
        self.connection.send(name)
        self.began = None

    def over(self) -> None:
        """Report the time of the step that has just ended, if there was one, and wait for the next turn."""
        if self.began is not None:
            self.connection.send((time.process_time() - self.began[0], time.perf_counter() - self.began[1]))
        try:
            self.connection.recv()
        except EOFError:  # the measurement is over
            os._exit(0)
        self.began = time.process_time(), time.perf_counter()


def ours(address: str, name: str, config: str) -> None:
    """Run launch/pretrain.py with a wait before every batch."""
    from pretrain.cli import main
    from pretrain.training import loader

    turns, steps = Turns(address, name), loader.steps

    def paced(*args):
        made = steps(*args)
        while True:
            turns.over()
            yield next(made)

    loader.steps = paced
    sys.argv = ["pretrain.py", config]
    sys.exit(main("pretrain"))


def theirs(address: str, name: str, folder: str) -> None:
    """Train on the batches of ours in a bare loop, or with the Trainer of Hugging Face."""
    import torch

    from benchmarks import others

    torch.set_num_threads(1)
    torch.manual_seed(0)
    kind = "bert" if "BERT" in name else "byte"
    windows = np.load(Path(folder) / f"{kind}.npz")
    inputs, labels = torch.from_numpy(windows["inputs"]), torch.from_numpy(windows["labels"])
    turns = Turns(address, name)
    made = others.nanogpt if "nanoGPT" in name else others.bert if kind == "bert" else others.gpt2
    model, forward = made(others.Sizes(LAYERS, WIDTH, HEADS, T, VOCABULARY))
    if "Trainer" in name:
        return trainer(turns, model, inputs, labels, folder)
    weights = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in weights if p.ndim >= 2], "weight_decay": DECAY},
        {"params": [p for p in weights if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=BETAS, fused="fused" in name or None)
    model.train()
    step = 0
    while True:
        turns.over()
        loss = forward(inputs[step % WINDOWS], labels[step % WINDOWS])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()  # as for logging
        step += 1


def trainer(turns: Turns, model, inputs, labels, folder: str) -> None:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class InTurn(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            turns.over()

        on_train_begin = on_step_end

    causal = model.config.model_type == "gpt2"
    asked = inputs if causal else labels
    rows = [{"input_ids": row, "labels": to} for row, to in zip(inputs.flatten(0, 1), asked.flatten(0, 1), strict=True)]
    arguments = TrainingArguments(
        output_dir=f"{folder}/runs/{model.config.model_type}-trainer",
        max_steps=STEPS,
        per_device_train_batch_size=B,
        learning_rate=RATE,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        weight_decay=DECAY,
        max_grad_norm=CLIP,
        lr_scheduler_type="constant",
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    Trainer(model, arguments, train_dataset=rows, callbacks=[InTurn()]).train()


# Taking turns


def start(group: str, folder: Path, address: str) -> tuple[dict[str, int], list[subprocess.Popen]]:
    """Start the contestants of a group; return the number of connections that each will make, and the processes."""
    commands, ranks = {}, {}
    for name, (wanted, model, engine) in OURS[group].items():
        config, me = str(configuration(folder, f"{group}, {name}", model, engine, wanted)), str(Path(__file__))
        launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", str(wanted)]
        launcher += ["--master_port", str(free_port())]
        commands[name] = [*(launcher if wanted else [sys.executable]), me, "ours", address, name, config]
        ranks[name] = max(1, wanted)
    for name in OTHERS[group]:
        commands[name], ranks[name] = [sys.executable, __file__, "theirs", address, name, str(folder)], 1
    environment = os.environ | ONE_THREAD | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"  # the launcher starts `python`
    log = open(folder / f"{group}.log", "w")
    processes = [
        subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=ROOT) for command in commands.values()
    ]
    return ranks, processes


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rounds_of(group: str, folder: Path, rounds: int) -> list[dict[str, tuple[float, float]]]:
    """The CPU and wall seconds of each contestant's step, round by round."""
    address = str(folder / f"{group}.socket")
    with Listener(address) as listener:
        ranks, processes = start(group, folder, address)
        connections: dict[str, list[Connection]] = {name: [] for name in ranks}
        listener._listener._socket.settimeout(5)
        while any(len(connections[name]) < count for name, count in ranks.items()):
            try:
                connection = listener.accept()
                connections[connection.recv()].append(connection)
            except TimeoutError:
                ended = [process.args for process in processes if process.poll() is not None]
                if ended:
                    raise SystemExit(f"ended too early: {ended}\n{(folder / f'{group}.log').read_text()}") from None
        found = []
        names = list(ranks)
        for round_ in range(WARM + rounds):
            seconds = {}
            for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
                for connection in connections[name]:
                    connection.send(None)
                cpu, wall = zip(*(connection.recv() for connection in connections[name]), strict=True)
                seconds[name] = statistics.mean(cpu), max(wall)
            found.append({name: seconds[name] for name in names})
            took = ", ".join(f"{name} {1000 * cpu:.0f}" for name, (cpu, _) in found[-1].items())
            print(f"{group}, round {round_ + 1 - WARM} of {rounds}, CPU ms: {took}", file=sys.stderr, flush=True)
        for connection in (connection for those in connections.values() for connection in those):
            connection.close()
        for process in processes:
            process.wait()
    return found[WARM:]


def spread(values: list[float]) -> list[float]:
    return [round(value, 3) for value in statistics.quantiles(values, n=4)]


def result(group: str, rounds: list[dict[str, tuple[float, float]]]) -> dict:
    shown = {"rounds": len(rounds)}
    for number, clock in enumerate(("cpu", "wall")):
        took = [{name: both[number] for name, both in round_.items()} for round_ in rounds]
        shown[f"{clock}_ms_a_step"] = {name: spread([1000 * round_[name] for round_ in took]) for name in took[0]}
        shown[f"{clock}_speed_ratios"] = {
            f"{mine} / {other}": spread([round_[other] / round_[mine] for round_ in took])
            for mine, other in RATIOS[group]
        }
    print(json.dumps({group: shown}, indent=1), flush=True)
    return shown


def main() -> None:
    if sys.argv[1:2] == ["theirs"]:
        return theirs(*sys.argv[2:])
    if "ours" in sys.argv[1:3]:  # the launcher puts --local_rank in front
        return ours(*sys.argv[sys.argv.index("ours") + 1 :])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--groups", nargs="+", choices=list(OURS), default=list(OURS))
    parser.add_argument("--megabytes", type=float, default=5)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--prepared", type=Path, help="folder for vocabularies and shards, used again if it has them")
    parser.add_argument("--out", type=Path, required=True, help="groups in this file that are not measured now stay")
    arguments = parser.parse_args()
    found = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = (arguments.prepared or Path(scratch)).resolve()
        if not (folder / "bert.npz").exists():
            folder.mkdir(exist_ok=True)
            prepare(arguments.text, folder, arguments.megabytes)
        for group in arguments.groups:
            with tempfile.TemporaryDirectory(dir=folder) as runs:
                load = [round(value, 1) for value in os.getloadavg()]
                for name in os.listdir(folder):
                    if name.startswith(("shards-", "tokenizer-")) or name.endswith(".npz"):
                        (Path(runs) / name).symlink_to(folder / name)
                head = {"command": " ".join(["python benchmarks/train.py", *sys.argv[1:]]), "date": str(date.today())}
                head |= {"machine": machine(), "versions": versions("torch", "deepspeed", "transformers")}
                head |= {"load_average_before": load, "figures": "[lower quartile, median, upper quartile] over rounds"}
                found[group] = head | result(group, rounds_of(group, Path(runs), arguments.rounds))
                arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
