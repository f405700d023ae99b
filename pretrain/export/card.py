"""The model card: the model, its scores, its training text, how to open it, and how it was checked.

It says in words what facts.py collects for model_card.json. Neither file is part of the folder's fingerprint, because
the facts about the text and the scores depend on whether the shards and the run still exist, and others on the machine.
"""

import re

from pretrain.config import write_values
from pretrain.dialects import DIALECTS
from pretrain.export.facts import Facts
from pretrain.export.provenance import CorpusText, sources
from pretrain.export.reference import FUZZED
from pretrain.model.config import ModelConfig
from pretrain.objectives import OBJECTIVES, Objective
from pretrain.tokenizer import Tokenizer
from pretrain.training.watch.log import duration

TRAINING = ("seed", "objective", "phases", "optim", "model")  # sections of the run's configuration that are shown

HUB_LICENCES = {  # licences of text as the hub spells them; any other licence becomes `other` with a name
    "afl-3.0", "agpl-3.0", "apache-2.0", "bsd-2-clause", "bsd-3-clause", "cc", "cc0-1.0", "cc-by-2.0", "cc-by-2.5",
    "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0",
    "cc-by-nd-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0",
    "cdla-permissive-1.0", "cdla-permissive-2.0", "cdla-sharing-1.0", "etalab-2.0", "gfdl", "gpl-2.0", "gpl-3.0",
    "lgpl-3.0", "mit", "mpl-2.0", "odbl", "odc-by", "pddl", "unlicense",
}  # fmt: skip

LOSSLESS = "- **No text is changed or unknown**: decoding the ids of a text gives the text back.\n"

REST = """
## How good it is

{quality}
## The text

{data}
{folding}

## How it was made

{made}
| made from  | fingerprint |
| ---------- | ----------- |
| checkpoint | `{checkpoint}` |
| shards     | `{shards}` |
| tokenizer  | `{tokenizer}` |
{parent}
```yaml
{training}```

## How it was checked

Before this folder got its name, a process without the code that trained the model opened it with the `Auto*` classes of
transformers, on a CPU in fp32. {rounding}Every weight in the files had its place, and none was missing. On random ids
of several lengths, padded and not, no logit differed from the training code's by more than {tolerance:.2g}.{rounds}
{texts} made-up texts in many scripts had the same ids and decoded to the same text; those that contain a mark were
encoded with `split_special_tokens=True` only. Texts of several lengths, padded by the tokenizer to one batch, had the
logits that each has alone{written}. Saved and opened once more, weights and ids were the same again, to the last bit,
and the logits again equal within the tolerance. The largest differences of logits and of each layer's hidden states,
and the versions they were measured with, are in `index.json` under `recorded`.
"""

ROUNDED = """\
The weights are written in bfloat16: training kept fp32, and the export rounded them. Both sides of the comparison had
the rounded weights and computed in fp32, as `from_pretrained(folder, dtype="float32")` does.
"""

ROUNDS = (
    "Rounding to fp32 alone changes our logits by up to {ours:.1e} and those of transformers by up to {theirs:.1e}, so "
    "the tolerance is {tolerance:.1e}."
)

UNSCORED = "Not known: held-out text was scored with the weights of single steps, not with their mean.\n"

# Facts that may be unknown, in words. Facts that are known together have the same words.
UNKNOWN = {
    "step_seconds": "the time that the steps took",
    "resumes": "how often the run was continued",
    "text_tokens": "how much of the windows was padding, and how much text was read more than once",
    "attempts": "the hardware and the commands",
}


def card(
    facts: Facts,
    model: ModelConfig,
    tokenizer: Tokenizer,
    settings: dict,
    texts: list[CorpusText],
    scores: list[dict],
    certificate: dict,
) -> str:
    """README.md for a model whose run had `settings` (config.yaml as values), compared as `certificate` says."""
    written = f" of an encoder and {model.decoder_layers} of a decoder, each" if model.decoder_layers else ""
    kv = "" if model.heads == model.KV else f" ({model.KV} for keys and values)"
    size = f"{facts.parameters:,} weights: {model.layers} layers{written} of width {model.width}, "
    size += f"{model.heads} heads{kv}, a vocabulary of {facts.vocab_size:,}. "
    size += f"Pre-trained from {f'the weights of {facts.began_from}' if facts.began_from else 'scratch'}."
    longest = trained_length(settings)
    specials = {role: tokenizer.token_text(token) for role, token in tokenizer.specials.items()}
    written_as = DIALECTS[facts.dialect]
    objective = OBJECTIVES[last_objective(settings)]
    return (written_as.card + REST).format(
        front=front_matter(written_as.pipeline, texts),
        size=size,
        length=f"Training windows were at most {longest:,} tokens; the tokenizer truncates to that when asked to.",
        longest=longest,
        positions=model.max_positions,
        dropout=model.dropout,
        end=tokenizer.token_text(tokenizer.end),
        mask=specials.get("mask"),
        sentinel=_first_sentinel(settings),
        local=_local(model),
        lossless=LOSSLESS if tokenizer.lossless else "",
        quality=UNSCORED if facts.averaged else quality(scores, facts.step, objective.asked, objective.without_context),
        data=data(texts),
        folding=folding(tokenizer),
        made=made(facts),
        checkpoint=facts.checkpoint,
        shards="`, `".join(f"{text.name} {text.fingerprint}".strip() for text in texts),
        tokenizer=facts.tokenizer,
        parent=f"| parent     | `{facts.parent}` |\n" if facts.parent else "",
        training=write_values(facts.training),
        tolerance=certificate["tolerance"],
        rounding=ROUNDED if facts.dtype == "bfloat16" else "",
        rounds=f" {ours}" if (ours := rounds(certificate)) else "",
        texts=FUZZED,
        written=", and `generate` added to each the tokens that are the likeliest after it alone"
        if model.causal or model.decoder_layers
        else "",
    )


def rounds(certificate: dict) -> str:
    """A sentence about a tolerance that is larger than usual, or nothing."""
    measured = certificate.get("rounding")
    return ROUNDS.format(**measured, tolerance=certificate["tolerance"]) if measured else ""


def _first_sentinel(settings: dict) -> str:
    """The text of the first sentinel of a run with span corruption."""
    section = settings["phases"][-1].get("objective") or settings["objective"]
    return section.get("sentinel_mark", "").replace("{}", "0")


def _local(model: ModelConfig) -> str:
    """A sentence about the local layers of the model."""
    if model.window is None:
        return "There are none: in every layer a token sees its whole text."
    seen = f"a token sees only the {model.window} tokens before it"
    seen += "" if model.causal else " and after it"
    return f"Of every {model.global_every} layers the first is global; in the others {seen}."


def training(settings: dict) -> dict:
    """The settings of a run that change what the model learns, without keys that are null."""
    return {key: _given(settings[key]) for key in TRAINING if settings.get(key) is not None}


def made(facts: Facts) -> str:
    """The steps, the tokens, the hardware and the commands; and the facts about them that are not known."""
    lines = [f"Step {facts.step:,} of {facts.planned_steps:,}, {facts.input_tokens:,} tokens"]
    if facts.text_tokens is not None:
        beyond = f"{facts.repeated_tokens:,} of them beyond one pass over their corpus"
        lines[0] += f": {facts.text_tokens:,} of text, {beyond}, and {facts.padding:,} of padding"
    lines[0] += "."
    if facts.averaged:
        lines.append(f"The weights are the mean of those after steps {', '.join(f'{n:,}' for n in facts.averaged)}.")
    if facts.resumes is not None:
        times = "in one go" if not facts.resumes else f"with {facts.resumes:,} restart{'s'[: facts.resumes != 1]}"
        lines.append(f"The model was trained {times}.")
    if facts.step_seconds is not None:
        lines.append(f"The steps took {duration(facts.step_seconds)}, without evaluations and saves.")
    machines = {
        (f"{one.ranks} x {one.device}", f"{one.nodes}", one.precision, f"{one.engine}, torch {one.torch}"): None
        for one in facts.attempts
    }
    if machines:
        lines += ["", "| ranks and device | machines | precision | engine |", "|---|---|---|---|"]
        lines += [f"| {' | '.join(map(_cell, machine))} |" for machine in machines]
    if commands := dict.fromkeys(one.command for one in facts.attempts if one.command):
        lines += ["", "```sh", *commands, "```"]
    if unknown := [words for name, words in UNKNOWN.items() if name in facts.unknown]:
        lines += ["", f"Not known: {'; '.join(unknown)}."]
    return "\n".join(lines) + "\n"


def _given(value: object) -> object:
    """A value of a configuration without the keys that are null."""
    if isinstance(value, dict):
        return {key: _given(inner) for key, inner in value.items() if inner is not None}
    return [_given(inner) for inner in value] if isinstance(value, list) else value


def front_matter(pipeline: str, texts: list[CorpusText]) -> str:
    """The fields that the hub reads: languages by their two or three letters, a licence by the hub's own names."""
    listed = [source for text in texts for source in text.sources or [{"language": "und", "licence": "unstated"}]]
    languages = sorted({re.split("[-_]", source["language"])[0].lower() for source in listed} - {"und"})
    found: dict[str, object] = {"language": languages} if languages else {}
    licences = sorted({re.sub(r"[^a-z0-9.]+", "-", source["licence"].lower()).strip("-") for source in listed})
    if len(licences) == 1 and licences[0] in HUB_LICENCES:
        found["license"] = licences[0]
    elif licences == ["unstated"]:
        found["license"] = "unknown"
    else:
        found |= {"license": "other", "license_name": licences[0] if len(licences) == 1 else "several"}
    found |= {"library_name": "transformers", "pipeline_tag": pipeline}
    return f"---\n{write_values(found)}---\n"


def quality(scores: list[dict], step: int, asked: str, without_context: str = Objective.without_context) -> str:
    """The held-out scores, beside the best loss of a predictor that ignores the context.

    `asked` names the tokens that the objective predicts.
    """
    if not scores:
        return f"Not known: the held-out text was not scored at step {step:,}, or the run was not there.\n"
    lines = [
        "| held-out text | loss, nats a target | without context | gain | accuracy | bits per byte | targets |",
        "|---|---|---|---|---|---|---|",
    ]
    for score in scores:
        name = score.get("corpus") or ("all" if len(scores) == 1 else "all, by the weights of the mixture")
        error = score.get("standard_error")
        loss = f"{score['loss']:.4f}" + ("" if error is None else f" ± {error:.4f}")
        bits = _number(score.get("bits_per_byte"), ".4f")
        numbers = [_number(score.get(key), ".4f") for key in ("no_context_loss", "gain")]
        numbers += [_number(score.get("accuracy"), ".1%"), bits, _number(score.get("targets"), ",")]
        lines.append(f"| {_cell(name)} | {loss} | {' | '.join(numbers)} |")
    lines += ["", f"Targets are {asked}; ± is one standard error. *Without context* is"]
    lines += [f"{without_context}. *Gain* is how far the model is below it."]
    if any(score.get("learnt") is False for score in scores):
        lines += ["", "**The model predicts this text no better than token frequencies do: it has learnt nothing.**"]
    return "\n".join(lines) + "\n"


def data(texts: list[CorpusText]) -> str:
    """The corpora with their sizes, and their sources with language and licence."""
    lines = ["| corpus | train tokens | bytes | held-out tokens | bytes | read tokens | passes |"]
    lines.append("|---|---|---|---|---|---|---|")
    for text in texts:
        sizes = [size for side in ("train", "heldout") for size in (text.tokens(side), text.bytes(side))]
        cells = [*(_number(size, ",") for size in (*sizes, text.read_tokens)), _number(text.passes, ".2f")]
        lines.append(f"| {_cell(text.name or 'not named')} | {' | '.join(cells)} |")
    if known := sources(texts):
        lines += ["", "| source | language | licence |", "|---|---|---|"]
        lines += [f"| {' | '.join(_cell(one[key]) for key in ('name', 'language', 'licence'))} |" for one in known]
    for text in texts:
        if text.sources is None:
            reason = "its shards were not found" if text.index is None else "its shards do not record them"
            lines += ["", f"Sources, languages and licences of {text.name or 'the text'} are not known: {reason}."]
    return "\n".join([*lines, "", "The licences of the text apply to what is made of it."])


def folding(tokenizer: Tokenizer) -> str:
    """A sentence about the changes that the tokenizer makes to text before it is cut into tokens."""
    rules = tokenizer.rules
    if tokenizer.lossless:
        return "The tokenizer changes nothing in a text: case, accents and white space are kept."
    if rules is None:
        return "The tokenizer was made elsewhere; tokenizer.json says how it changes a text."
    done = ["lower-cased" if rules.lowercase else "kept in its case"]
    done.append("stripped of accents" if rules.strip_accents else "kept with its accents")
    done += ["folded from full to half width"] if rules.width == "fold" else []
    return f"Before it is cut into tokens, a text is {', '.join(done)}."


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _cell(text: str) -> str:
    """`text` as a cell of a Markdown table."""
    return " ".join(str(text).split()).replace("|", "\\|")


def last_objective(settings: dict) -> str:
    """The kind of the objective that was trained last."""
    return (settings["phases"][-1].get("objective") or settings["objective"])["kind"]


def trained_length(settings: dict) -> int:
    """The number of tokens in the longest training window."""
    return max(phase["seq_len"] for phase in settings["phases"])
