"""The facts of a model card, as model_card.json holds them. README.md says the same in words.

A fact that is not known is left out, and `unknown` names it: text whose shards are gone, scores of a step that was not
evaluated, the attempts of a checkpoint that an older version saved. The file depends on what is still there and on the
machine that trained, so it is not part of the folder's fingerprint.
"""

from pathlib import Path
from typing import Any, Literal

from pretrain.config import Config
from pretrain.export import provenance
from pretrain.export.provenance import CorpusText
from pretrain.order.phases import Phase, tokens_after
from pretrain.storage.index import RECORDED

FACTS = "model_card.json"


class CorpusFacts(Config):
    """A corpus, and the share of it that was read."""

    name: str
    """The name of the corpus, or of its recipe; empty if it has none."""
    fingerprint: str
    """The fingerprint of its shards."""
    train_tokens: int | None = None
    """The tokens of the training side."""
    train_bytes: int | None = None
    """The bytes of the text of the training side."""
    heldout_tokens: int | None = None
    """The tokens of the held-out side."""
    heldout_bytes: int | None = None
    """The bytes of the text of the held-out side."""
    read_tokens: int | None = None
    """The tokens of its text that the steps so far have read."""
    padding: int | None = None
    """The places of its windows that held no text."""
    passes: float | None = None
    """The read tokens as a number of passes over the training side (epochs)."""
    repeated_tokens: int | None = None
    """The read tokens beyond one pass."""


class SourceFacts(Config):
    """A source of text."""

    name: str
    """Its name in the recipe."""
    language: str
    """Its language; `und`: not stated."""
    licence: str
    """Its licence; `unstated`: not stated."""


class ScoreFacts(Config):
    """The held-out scores of a corpus."""

    corpus: str
    """The name of the corpus; empty for all of them by the weights of the mixture, or for the only one."""
    loss: float
    """The mean loss in nats a target."""
    standard_error: float | None = None
    """The standard error of the loss."""
    no_context_loss: float | None = None
    """The entropy of the targets, which a predictor that ignores the context cannot beat. Of replaced-token detection:
    the loss of a predictor that is told each token and has counted the others."""
    gain: float | None = None
    """How far the loss is below that."""
    accuracy: float | None = None
    """The share of targets that the likeliest token hits."""
    bits_per_byte: float | None = None
    """The loss as bits a byte of text, if the vocabulary counts bytes."""
    targets: int | None = None
    """The number of scored targets."""
    learnt: bool | None = None
    """Whether the model predicts the text better than token frequencies do."""


class AttemptFacts(Config):
    """A start of the run, and the machine that it ran on."""

    from_step: int
    """The step that it went on from."""
    branched: bool = False
    """Whether it began a branch of another run."""
    command: str | None = None
    """The command, without a launcher."""
    launcher: str | None = None
    """The launcher that started the ranks."""
    ranks: int
    """The number of ranks."""
    nodes: int
    """The number of machines."""
    device: str
    """The name of the GPU, or of the processor, of the first rank."""
    engine: str
    """The engine that executed the steps."""
    precision: str
    """The precision of the forward and backward passes."""
    torch: str
    """The version of PyTorch."""
    pretrain: str
    """The version of this program."""


class Facts(Config):
    """Everything that is known about an exported model."""

    format: Literal[1] = 1
    """The version of this form."""
    dialect: str
    """The dialect that the model is written as."""
    dtype: str
    """The type of the written weights."""
    parameters: int
    """The number of weights."""
    vocab_size: int
    """The number of embeddings."""
    objectives: list[str]
    """The objectives that it was trained with, in their order."""
    began_from: str | None = None
    """The name of the folder whose weights the run began from; absent: it began from fresh weights."""
    step: int
    """The number of optimizer steps."""
    averaged: list[int] | None = None
    """The steps of the checkpoints whose weights were averaged; absent: the weights are those of one step."""
    planned_steps: int
    """The number of steps that the run was to do."""
    step_seconds: float | None = None
    """The seconds of all these steps, without evaluations and saves."""
    resumes: int | None = None
    """How often the run was continued from a checkpoint. An attempt that saved nothing is not counted."""
    input_tokens: int
    """The places in the windows of all steps, text and padding."""
    text_tokens: int | None = None
    """The tokens of text among them."""
    padding: int | None = None
    """The free places among them."""
    repeated_tokens: int | None = None
    """The tokens of text that lie beyond one pass over their corpus."""
    corpora: list[CorpusFacts]
    """The corpora."""
    sources: list[SourceFacts] = []
    """The sources of the corpora."""
    held_out: list[ScoreFacts] = []
    """The held-out scores at this step."""
    attempts: list[AttemptFacts] = []
    """The starts of the run that led to this step."""
    checkpoint: str
    """The fingerprint of the checkpoint."""
    tokenizer: str
    """The fingerprint of the tokenizer."""
    parent: str | None = None
    """The fingerprint of the checkpoint that the run branched off; absent: it is no branch."""
    training: dict[str, Any]
    """The settings of the run that change what the model learns."""
    unknown: list[str] = []
    """The facts that are not known."""

    def written(self) -> dict:
        """The facts as JSON writes them, without those that are not known or do not apply."""
        return self.model_dump(mode="json", exclude_none=True, exclude=set(self.unknown))


# Facts that an export may lack. `sources` and the sizes of corpora are there if the shards are.
MAY_LACK = ("step_seconds", "resumes", "text_tokens", "padding", "repeated_tokens", "sources", "held_out", "attempts")


def facts_of(
    source: Path, index: dict, settings: dict, texts: list[CorpusText], scores: list[dict], **made: Any
) -> Facts:
    """The facts of a model that was `made` (dialect, dtype, parameters, vocab_size, training) from a checkpoint.

    The checkpoint is the folder `source` with `index`, and `settings` are those of its run.
    """
    phases, step = [Phase(**_of_phase(phase)) for phase in settings["phases"]], index["step"]
    kinds = [(phase.get("objective") or settings["objective"])["kind"] for phase in settings["phases"]]
    corpora = [_corpus(text) for text in texts]
    attempts = index.get(RECORDED, {}).get("attempts", [])
    whole = bool(attempts) and attempts[0]["from_step"] == 0  # else an older version saved the first ones
    found: dict[str, Any] = {
        "objectives": list(dict.fromkeys(kinds)),
        "began_from": Path(begun).name if (begun := settings["model"].get("init_from")) else None,
        "step": step,
        "planned_steps": sum(phase.steps for phase in phases),
        "step_seconds": provenance.step_seconds(source, step),
        "resumes": sum(not attempt.get("branched") for attempt in attempts[1:]) if whole else None,
        "input_tokens": tokens_after(step, phases),
        "text_tokens": _total(corpora, "read_tokens"),
        "padding": _total(corpora, "padding"),
        "repeated_tokens": _total(corpora, "repeated_tokens"),
        "corpora": corpora,
        "sources": [{key: source[key] for key in SourceFacts.model_fields} for source in provenance.sources(texts)],
        "held_out": [{key: score[key] for key in ScoreFacts.model_fields if key in score} for score in scores],
        "attempts": [{key: one[key] for key in AttemptFacts.model_fields if key in one} for one in attempts],
        "checkpoint": index["fingerprint"],
        "tokenizer": index["tokenizer"],
        "parent": index.get("parent"),
    }
    unknown = [name for name in MAY_LACK if found[name] is None or found[name] == []]
    return Facts(**found, **made, unknown=unknown)


def _of_phase(phase: dict) -> dict:
    return {key: phase[key] for key in Phase.model_fields if key in phase}


def _corpus(text: CorpusText) -> CorpusFacts:
    """The facts of a corpus."""
    counts = {
        f"{side}_{unit}": getattr(text, unit)(side) for side in ("train", "heldout") for unit in ("tokens", "bytes")
    }
    read: dict[str, Any] = {}
    if text.read:
        repeated = max(0, text.read["tokens"] - text.read["pass_tokens"])
        read = {"padding": text.read["padding"], "repeated_tokens": repeated}
        read |= {"read_tokens": text.read_tokens, "passes": text.passes}
    return CorpusFacts(name=text.name, fingerprint=text.fingerprint, **counts, **read)


def _total(corpora: list[CorpusFacts], key: str) -> int | None:
    """The sum over all corpora; None if it is not known of one that may have been read."""
    counts = [getattr(corpus, key) for corpus in corpora]
    return sum(counts) if counts and None not in counts else None
