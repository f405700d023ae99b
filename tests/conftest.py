"""Shared by the test files: a small corpus with vocabularies and shards, and tiny run configurations."""

import os

# Set before anything imports torch: one thread per process, no dynamo, only the CPU.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "data" / "sample"


@dataclass(frozen=True)
class Prepared:
    """A corpus file, and for each kind the folders of a tokenizer and a shard set made from it."""

    corpus: Path
    tokenizer: dict[str, Path]
    shards: dict[str, Path]


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Prepared:
    from pretrain import shards, tokenizer

    root = tmp_path_factory.mktemp("prepared")
    corpus = root / "recipe.yaml"
    for language in ("en", "zh"):
        documents = (SAMPLE / f"{language}.txt").read_text(encoding="utf-8").split("\n\n")
        (root / f"{language}.txt").write_text("\n\n".join(documents[:60]), encoding="utf-8")
    corpus.write_text(
        "name: tiny\nheldout_fraction: 0.1\nsources:\n"
        "  - {name: en, language: en, files: [en.txt]}\n  - {name: zh, language: zh, files: [zh.txt]}\n",
        encoding="utf-8",
    )
    made = Prepared(corpus, {}, {})
    for kind, size in (("bert", 2048), ("byte", 1024)):
        made.tokenizer[kind], made.shards[kind] = root / f"tokenizer-{kind}", root / f"shards-{kind}"
        tokenizer.run(
            tokenizer.TokenizerConfig(
                corpus=str(corpus), out=str(made.tokenizer[kind]), kind=kind, vocab_size=size, plot=False
            )
        )
        shards.run(
            shards.ShardsConfig(corpus=str(corpus), tokenizer=str(made.tokenizer[kind]), out=str(made.shards[kind]))
        )
    return made


@pytest.fixture(scope="session")
def encoder(tmp_path_factory) -> Path:
    """The folder of a tiny encoder that stock transformers made. Tests change copies of it."""
    from tests.helpers.folders import tiny_encoder

    return tiny_encoder(tmp_path_factory.mktemp("models") / "encoder")


@pytest.fixture(scope="session")
def decoder(tmp_path_factory) -> Path:
    """The folder of a tiny decoder that stock transformers made. Tests change copies of it."""
    from tests.helpers.folders import tiny_decoder

    return tiny_decoder(tmp_path_factory.mktemp("models") / "decoder")


@pytest.fixture(scope="session")
def task(tmp_path_factory) -> Path:
    """The folder of a fine-tuning task whose answer is one word of the text."""
    from tests.helpers.folders import sun_moon

    return sun_moon(tmp_path_factory.mktemp("tasks") / "sun_moon")


ENCODER = {
    "causal": False,
    "layers": 2,
    "width": 32,
    "heads": 2,
    "mlp_width": 64,
    "max_positions": 64,
    "norm": "layernorm",
    "norm_position": "post",
    "norm_eps": 1e-12,
    "positions": "learned",
    "mlp": "gelu",
    "bias": True,
    "transform_head": True,
}
DECODER = {
    "causal": True,
    "layers": 2,
    "width": 32,
    "heads": 4,
    "kv_heads": 2,
    "head_width": 16,
    "mlp_width": 64,
    "max_positions": 64,
    "norm": "rmsnorm",
    "norm_position": "pre",
    "norm_eps": 1e-6,
    "positions": "rope",
    "mlp": "swiglu",
    "bias": False,
    "qk_norm": True,
}


def run_values(prepared: Prepared, out: Path, objective: str = "masked_lm", **sections: dict) -> dict:
    """Return the values of a tiny RunConfig. Keys of `sections` replace those of the section with that name."""
    kind = "bert" if objective == "masked_lm" else "byte"
    values = {
        "out": str(out),
        "seed": 7,
        "data": {"shards": str(prepared.shards[kind]), "tokenizer": str(prepared.tokenizer[kind])},
        "model": dict(ENCODER if objective == "masked_lm" else DECODER),
        "objective": {"kind": objective},
        "optim": {"lr": 1e-3, "warmup_steps": 4},
        "phases": [{"steps": 12, "seq_len": 32, "batch_tokens": 256, "decay_steps": 4}],
        "engine": {"micro_batch": 2},
        "evaluate": {"max_tokens": 512},
        "log_every": 4,
    }
    for name, changes in sections.items():
        values[name] = {**values[name], **changes} if isinstance(values.get(name), dict) else changes
    return values


def pytest_sessionfinish(session, exitstatus):
    left = list(Path("/dev/shm").glob("deepspeed*"))
    if left and exitstatus == 0:
        session.exitstatus = 1
        print(f"\nDeepSpeed buffers left in shared memory: {left}")
