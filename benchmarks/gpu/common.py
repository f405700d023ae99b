"""Shared by the GPU benchmarks: facts of the machine, made-up data, predictions, and results written part by part.

`python benchmarks/gpu/common.py [--toy]` prints the two floors of the machine as JSON.
"""

import json
import os
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)  # so that no file of this folder shadows a library

import numpy as np  # noqa: E402

from benchmarks.measuring import machine, versions  # noqa: E402

# Rates that an H200 reached: FLOP/s of a large bf16 matrix product, and bytes a second that a copy reads and writes.
FLOPS, BYTES = 790e12, 4.3e12
# FLOP/s of FlashAttention-2: 35 % of the peak of an H100, which is an H200's (Shah et al. 2024, arXiv:2407.08608,
# abstract).
ATTENTION = 0.35 * 989e12
TOY = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
PACKAGES = ("torch", "deepspeed", "transformers", "accelerate", "triton", "numpy")
COUNTERS = "name,driver_version,clocks.sm,clocks.mem,power.draw,temperature.gpu"


def environment(toy: bool, **more: str) -> dict[str, str]:
    """The variables of a process that this benchmark starts."""
    found = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    found |= {"TORCHINDUCTOR_COMPILE_THREADS": "4"}  # in every process: a dozen of them share 16 cores
    found |= {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    found["PATH"] = f"{Path(sys.executable).parent}:{found['PATH']}"  # the launcher of DeepSpeed starts `python`
    return found | (TOY if toy else {}) | more


def smi() -> dict[str, str]:
    """Name, driver, clocks, power and temperature of the first GPU now, from nvidia-smi; nothing without it."""
    try:
        command = ["nvidia-smi", f"--query-gpu={COUNTERS}", "--format=csv,noheader"]
        line = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return {}
    return dict(zip(COUNTERS.split(","), (value.strip() for value in line.split(",")), strict=True))


def facts(script: str, toy: bool) -> dict[str, Any]:
    """The entries about the machine and the call that every result begins with."""
    import torch

    found: dict[str, Any] = {"command": " ".join([f"python benchmarks/gpu/{script}", *sys.argv[1:]])}
    found |= {"date": str(date.today()), "toy": toy, "machine": machine(), "versions": versions(*PACKAGES)}
    found |= {"cuda": torch.version.cuda, "gpu": smi()}
    if torch.cuda.is_available() and not toy:
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        found |= {"device": torch.cuda.get_device_name(), "nccl": nccl, "cudnn": torch.backends.cudnn.version()}
    else:
        found["device"] = "cpu"
    return found


class Result:
    """A file of results. It is written anew with every entry, so a script that is killed leaves what it has."""

    def __init__(self, path: Path):
        self.path, self.found = path, json.loads(path.read_text()) if path.exists() else {}
        path.parent.mkdir(parents=True, exist_ok=True)

    def put(self, value: Any, *keys: str) -> None:
        """Set the entry at `keys`, print it on one line, and write the file."""
        section = self.found
        for key in keys[:-1]:
            section = section.setdefault(key, {})
        section[keys[-1]] = value
        aside = self.path.with_suffix(".tmp")
        aside.write_text(json.dumps(self.found, indent=1) + "\n")
        aside.replace(self.path)
        print(json.dumps({" / ".join(keys): value}), flush=True)


# Predictions


def floors(toy: bool) -> dict[str, dict[str, float]]:
    """The rate of a large bf16 product and of a copy on this machine, beside those that the predictions assume."""
    import torch

    device = torch.device("cpu" if toy else "cuda")
    size, numbers = (256, 1 << 20) if toy else (8192, 1 << 31)
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    source = torch.zeros(numbers, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    product = 2 * size**3 / _seconds(lambda: a @ b, device)
    moved = 4 * numbers / _seconds(lambda: target.copy_(source), device)
    return {
        "bf16_product_tflops": {"predicted": FLOPS / 1e12, "measured": round(product / 1e12, 3)},
        "copy_tb_per_s": {"predicted": BYTES / 1e12, "measured": round(moved / 1e12, 4)},
    }


def _seconds(work: Any, device: Any, warm: int = 3, times: int = 10) -> float:
    for _ in range(warm):
        work()
    settle(device)
    began = time.perf_counter()
    for _ in range(times):
        work()
    settle(device)
    return (time.perf_counter() - began) / times


def settle(device: Any) -> None:
    """Wait until a GPU has done everything that it was given."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measured_floors(toy: bool) -> dict:
    """`floors` in a process of its own, which frees the GPU."""
    command = [sys.executable, str(Path(__file__)), *(["--toy"] if toy else [])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(toy), timeout=120)
    return json.loads(done.stdout) if done.returncode == 0 else {"failed": done.stderr[-1000:]}


def predicted(
    shape: dict,
    vocab_size: int,
    T: int,
    targets: int,
    tokens: tuple[int, int],
    passes: int,
    logit_bytes: int,
    seen: float | None = None,
) -> dict[str, Any]:
    """The time of a token in µs by class of kernel (contest.py), counted from FLOPs and bytes, and the rates that
    follow. No launch costs anything.

    `tokens`: of a step and of a micro-batch. `passes`: how often the kernels of a block that are no matrix product read
    or write a number for each of its D channels (bf16), forward and backward. `logit_bytes`: bytes that are read and
    written for each logit of a target. A step reads and writes 30 bytes for a weight (fp32 master, two moments,
    gradient and bf16 copy), and a micro-batch 10 (its bf16 gradient is added to an fp32 sum). `seen`: the tokens that a
    token sees, summed over layers, which take the rate of FlashAttention-2; None: attention is counted in full, at the
    rate of products. A causal window takes about as long either way.
    """
    import torch

    from pretrain.model.config import ModelConfig
    from pretrain.model.models import model_of

    config = ModelConfig(**shape)
    with torch.device("meta"):
        model = model_of(config, vocab_size)
    flops, weights = model.flops_per_token(T, targets), sum(p.numel() for p in model.parameters())
    windows = [config.window_of(layer) for layer in range(config.layers)]
    counted = sum(T if window is None else min(T, 2 * window + 1) for window in windows)  # as flops_per_token does
    one = 12 * config.heads * config.E  # FLOPs for each token that is seen
    entries = config.rows_of(vocab_size) * targets / T  # logits for a token
    head = 6 * config.D * entries
    micros = {
        "matrix products": (flops - one * counted - head) / FLOPS,
        "attention": one * (counted / FLOPS if seen is None else seen / ATTENTION),
        "norms and element-wise": config.layers * config.width * passes * 2 / BYTES,
        "head and loss": head / FLOPS + entries * logit_bytes / BYTES,
        "optimizer": weights * (30 / tokens[0] + 10 / tokens[1]) / BYTES,
    }
    rate = 1 / sum(micros.values())
    return {
        "us_a_token": {name: round(1e6 * value, 3) for name, value in micros.items()},
        "tokens_per_s": round(rate),
        "step_ms": round(1e3 * tokens[0] / rate, 2),
        "flops_a_token": flops,
        "seen_flops_a_token": flops if seen is None else flops - one * (counted - seen),
        "weights": weights,
    }


# Made-up data


def make_tokenizer(folder: Path, kind: str, vocab_size: int) -> str:
    """Publish a vocabulary of any size, through the stage `tokenizer`: tokens that mean nothing, for made-up ids.

    A third of the tokens of kind `bert` continue words.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from pretrain import tokenizer

    source, out = folder / f"source-{kind}", folder / f"tokenizer-{kind}"
    source.mkdir()
    if kind == "bert":
        tokens = [
            "[PAD]",
            "[UNK]",
            "[CLS]",
            "[SEP]",
            "[MASK]",
            *("##" * (n % 3 == 2) + f"t{n}" for n in range(vocab_size)),
        ]
        (source / "vocab.txt").write_text("\n".join(tokens[:vocab_size]) + "\n")
    else:
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        pairs = [(a, b) for a in letters for b in letters][: vocab_size - len(letters) - 1]
        tokens = ["<eod>", *letters, *(a + b for a, b in pairs)]
        made = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, pairs))
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        made.save(str(source / "tokenizer.json"))
    roles = {} if kind == "bert" else {"eod": "<eod>"}
    settings = {"corpus": str(ROOT / "data/sample"), "adopt": str(source), "roles": roles, "plot": False}
    tokenizer.run(tokenizer.TokenizerConfig(out=str(out), kind=kind, **settings))
    return str(out)


def make_shards(folder: Path, place: str, lengths: np.ndarray, seed: int = 0) -> str:
    """Write shards of documents with `lengths` tokens, through the writers of the stage `shards`; return the folder.

    Small ids are more frequent, as words are (Zipf), and every second id is one more than the id before it, so that a
    model has something to learn.
    """
    from pretrain.shards.writer import SideWriter, tokenized, write_shards_index
    from pretrain.tokenizer import open_tokenizer

    made, draw = open_tokenizer(place), np.random.default_rng(seed)
    first = max(made.specials.values()) + 1
    size = made.vocab_size
    ids = (first + ((size - first) ** draw.random(int(lengths.sum()))).astype(np.int64) - 1).astype(np.int32)
    ids[1::2] = np.minimum(ids[: len(ids) // 2 * 2 : 2] + 1, size - 1)
    ends = np.cumsum(lengths)
    ids[ends - 1] = made.end
    if "cls" in made.specials:
        ids[ends - lengths] = made.specials["cls"]
    folder.mkdir()
    held = max(1, len(lengths) // 100)
    sides: dict[str, dict] = {}
    digests: dict[str, dict] = {}
    for side, part in (("train", slice(held, None)), ("heldout", slice(held))):
        some = lengths[part]
        writer = SideWriter(folder, side, np.dtype(np.uint16), size, 1 << 30, [])
        begin = int(ends[part.start - 1]) if part.start else 0
        writer.add(ids[begin : begin + int(some.sum())], some.astype(np.int32), {})
        sides[side] = writer.close()
        digests |= writer.digests
    write_shards_index(folder, tokenized(made), [], sides, [], digests, {}, corpus="made up", seed=seed)
    return str(folder)


def drawn_lengths(tokens: int, median: float, seed: int = 0) -> np.ndarray:
    """Lengths of documents as in web text: log-normal with σ = 1, at least 4 tokens, `tokens` in all or a bit less."""
    draw = np.random.default_rng(seed).lognormal(np.log(median), 1.0, int(2 * tokens / median) + 10)
    lengths = np.maximum(draw.astype(np.int64), 4)
    return lengths[: int(np.searchsorted(np.cumsum(lengths), tokens))]


def lines_of(path: Path) -> list[dict]:
    """The complete lines of a file of metrics."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def tail(path: Path, characters: int = 1500) -> str:
    return path.read_text(errors="replace")[-characters:] if path.exists() else ""


if __name__ == "__main__":
    print(json.dumps(floors("--toy" in sys.argv)))
