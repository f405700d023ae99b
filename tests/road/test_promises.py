"""Values that no machine may change: the bytes of the files made of the sample, and the contents of batches.

The values stand in promises.json. They were written before the code was divided into rooms, and every move kept them.
"""

import hashlib
import json
from pathlib import Path

import pytest

from pretrain import config, shards, tokenizer
from pretrain.order.run_data import open_run_data
from pretrain.shards import segment
from pretrain.tokenizer import open_tokenizer
from pretrain.training.config import RunConfig
from pretrain.training.loader import Batches
from tests.conftest import ROOT

PROMISED = json.loads(Path(__file__).with_name("promises.json").read_text(encoding="utf-8"))
PACKED = ["data.windows=documents", "data.block_tokens=4096"]
RUNS = {  # name → sample configuration, overrides, the steps that are compared
    "encoder": ("encoder", [], (0, 1, 15, 16, 27)),
    "encoder, packed": ("encoder", PACKED, (0, 1, 15, 16, 27)),
    "encoder, words": ("encoder", ["objective.unit=word"], (0, 1, 16)),
    "encoder, spans of words, packed": (
        "encoder",
        [*PACKED, "objective.unit=word", "objective.span.p=0.2"],
        (0, 1, 16),
    ),
    "decoder": ("decoder", [], (0, 1, 15)),
    "decoder, packed": ("decoder", PACKED, (0, 1, 15)),
}
SHORT = {
    "encoder": ["phases.0.steps=16", "phases.1.steps=12", "phases.1.decay_steps=6"],
    "decoder": ["phases.0.steps=16", "phases.0.decay_steps=6", "phases.0.batch_tokens=2048"],  # as they were promised
}


def hashes(folder: Path, names: tuple[str, ...]) -> dict[str, str]:
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> Path:
    """Both vocabularies of configs/sample and their shards, and where words begin."""
    root = tmp_path_factory.mktemp("sample")
    for kind in ("bert", "byte"):
        for stage in (tokenizer, shards):
            name = stage.__name__.rpartition(".")[2]
            path = ROOT / f"configs/sample/{name}-{kind}.yaml"
            overrides = [f"corpus={ROOT}/data/sample/recipe.yaml", f"out={root}/{name}-{kind}"]
            if stage is shards:
                overrides.append(f"tokenizer={root}/tokenizer-{kind}")
            else:
                overrides.append("plot=false")
            stage.run(config.load(stage.ShardsConfig if stage is shards else stage.TokenizerConfig, path, overrides))
    words = segment.WordsConfig(shards=f"{root}/shards-bert", tokenizer=f"{root}/tokenizer-bert")
    segment.run(words)
    return root


@pytest.mark.parametrize("kind", ["bert", "byte"])
def test_the_vocabularies_of_the_sample_are_those_that_were_promised(kind, sample):
    promised = PROMISED["vocabularies"][kind]
    assert hashes(sample / f"tokenizer-{kind}", tuple(promised)) == promised


@pytest.mark.parametrize("kind", ["bert", "byte"])
def test_the_shards_of_the_sample_are_those_that_were_promised(kind, sample):
    promised = PROMISED["shards"][kind]
    assert hashes(sample / f"shards-{kind}", tuple(promised)) == promised


@pytest.mark.parametrize("name", RUNS)
def test_the_batches_of_the_sample_runs_are_those_that_were_promised(name, sample):
    which, overrides, compared = RUNS[name]
    kind = "bert" if which == "encoder" else "byte"
    places = [f"data.shards={sample}/shards-{kind}", f"data.tokenizer={sample}/tokenizer-{kind}"]
    path = ROOT / f"configs/sample/{which}.yaml"
    run = config.load(RunConfig, path, [*places, *SHORT[which], *overrides]).resolved()
    vocabulary = open_tokenizer(run.data.tokenizer)
    data = open_run_data(run.data, run.phases, run.seed, vocabulary, words=run.words)
    batches = Batches(data, run.objectives(vocabulary), run.engine.micro_batch)
    found = {}
    for step in compared:
        items = range(batches.first_item(step), batches.first_item(step + 1))
        found[str(step + 1)] = f"{sum(batches[item].digest for item in items) % 2**62:016x}"
    assert found == PROMISED["batches"][name]
