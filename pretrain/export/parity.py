"""Check an exported folder with stock transformers, in a fresh process that imports nothing of ours.

    python -P parity.py FOLDER REFERENCE RESULT

REFERENCE holds the answers of our model and tokenizer (reference.py). RESULT (JSON) gets the measurements and `faults`,
one line for each difference: the list is empty if the folder gives the same answers. `-P` keeps the modules beside this
file off sys.path.
"""

import hashlib
import json
import math
import shutil
import sys
from pathlib import Path

import tokenizers
import torch
import transformers
from safetensors.torch import load_file
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

# A difference above the tolerance is rounding if it is at most so many times as large as what rounding to fp32 changes,
# and so small a share of the logits' standard deviation. Only sharp attention and large numbers get there.
ROUNDINGS, LARGEST_SHARE = 4, 0.01


def main(folder: Path, reference: Path, result: Path) -> None:
    """Compare the model and the tokenizer of `folder` with the reference, then once more after `save_pretrained`."""
    torch.set_grad_enabled(False)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    said = json.loads((reference / "texts.json").read_text(encoding="utf-8"))
    tensors = load_file(reference / "tensors.safetensors")

    model, tokenizer, faults = opened(folder, said)
    faults += differing_texts(tokenizer, said) + differing_marks(model, tokenizer, said)
    logits = logits_of(model, tensors)
    measured, where = compare(logits, tensors)
    measured["hidden_diffs"] = hidden_diffs(model, tensors)
    if (reference / "exact.safetensors").exists():
        measured["rounding"] = rounding(model, logits, tensors, load_file(reference / "exact.safetensors"))
        allowed = min(ROUNDINGS * sum(measured["rounding"].values()), LARGEST_SHARE * measured["logit_std"])
        if math.isfinite(allowed):
            said["tolerance"] = max(said["tolerance"], allowed)
    numbers = []
    if not measured["max_logit_diff"] <= said["tolerance"]:
        numbers = [where, first_parting(measured["hidden_diffs"], said["tolerance"])]
        if "rounding" in measured:
            both = "rounding to fp32 changes our logits by up to {ours:.1e}, and theirs by up to {theirs:.1e}"
            numbers.append(both.format(**measured["rounding"]))
    numbers += differing_padded(model, tokenizer, said, tensors)
    faults += numbers

    again = reference / "again"
    if not faults:
        before = digests(model)
        model.save_pretrained(again)
        tokenizer.save_pretrained(again)
        del model
        model, tokenizer, faults = opened(again, said)
        faults += differing_texts(tokenizer, said) + differing_marks(model, tokenizer, said)
        changed = [name for name, digest in digests(model).items() if before.get(name) != digest]
        if changed:
            faults.append(f"{len(changed)} weights changed, such as {changed[0]}")
        # Equal weights need not give equal bits: some processors round by where a tensor lies in memory.
        pairs = zip(logits, logits_of(model, tensors), strict=True)
        if not max(float((a - b).abs().max()) for a, b in pairs) <= said["tolerance"]:
            faults.append("logits changed")
        faults = [f"after save_pretrained: {fault}" for fault in faults]
        shutil.rmtree(again)

    measured |= {"tolerance": said["tolerance"], "dtype": said["dtype"], "computed_in": "float32"}
    measured |= {name: len(said[name]) for name in ("texts", "pairs", "padded")}
    measured["padding_side"] = "left" if said["causal"] else "right"
    measured |= {library.__name__: library.__version__ for library in (transformers, tokenizers, torch)}
    small = measured["max_logit_diff"] <= LARGEST_SHARE * measured["logit_std"]  # false if one of them is not finite
    found = {"faults": faults, "may_be_rounding": bool(numbers) and small, **measured}
    result.write_text(json.dumps(found), encoding="utf-8")


def rounding(model: PreTrainedModel, logits: list, tensors: dict, exact: dict) -> dict[str, float]:
    """How much the compared logits of either side differ between fp32 and fp64, at most.

    `logits` are theirs in fp32. Both sides keep some operations in fp32, so two exact models may differ as much.
    """
    kept = [tensors[f"{n}.kept"] for n in range(len(logits))]
    ours = [(tensors[f"{n}.logits"], exact[f"{n}.logits"]) for n in range(len(logits))]
    theirs = zip(logits, logits_of(model.double(), tensors), strict=True)
    model.float()  # every number is again as it was
    return {
        side: max(float((a - b)[seen].abs().max()) for (a, b), seen in zip(pairs, kept, strict=True))
        for side, pairs in (("ours", ours), ("theirs", theirs))
    }


def digests(model: PreTrainedModel) -> dict[str, str]:
    """A hash of each weight."""
    return {
        name: hashlib.sha256(weight.contiguous().numpy().data).hexdigest()
        for name, weight in model.state_dict().items()
    }


def opened(folder: Path, said: dict) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[str]]:
    """Model and tokenizer, and the faults on loading: weights that are missing, unexpected or not opened in fp32.

    A folder in bfloat16 is opened in fp32, which holds each of its weights exactly. A folder in fp32 is opened without
    options, as its users open it.
    """
    options = {} if said["dtype"] == "float32" else {"dtype": torch.float32}
    auto = getattr(transformers, said["auto_class"])
    model, report = auto.from_pretrained(folder, output_loading_info=True, **options)
    faults = [f"{kind}: {', '.join(map(str, sorted(names)))}" for kind, names in report.items() if names]
    if model.dtype != torch.float32:
        faults.append(f"the weights were opened as {model.dtype}")
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder), faults


def differing_texts(tokenizer: PreTrainedTokenizerBase, said: dict) -> list[str]:
    """A line about tokens with other ids than ours, and one about the first text of each kind that differs."""
    vocab, entries = tokenizer.get_vocab(), said["texts"]
    other = [token for token in said["vocab"].keys() | vocab.keys() if said["vocab"].get(token) != vocab.get(token)]
    faults = [f"{len(other)} tokens have another id or none, such as {min(other)!a}"] if other else []
    as_text = tokenizer([entry["text"] for entry in entries], split_special_tokens=True)["input_ids"]
    for entry, ids in zip(entries, as_text, strict=True):
        if ids != entry["ids"]:
            faults.append(_differing_ids("as text", entry["text"], ids, entry["ids"]))
            break
    plain = [entry for entry in entries if entry["plain"]]
    default = tokenizer([entry["text"] for entry in plain], split_special_tokens=False)["input_ids"]
    for entry, ids in zip(plain, default, strict=True):
        if ids != entry["ids"]:
            faults.append(_differing_ids("by default", entry["text"], ids, entry["ids"]))
            break
    for entry in entries:
        decoded, ours = tokenizer.decode(entry["ids"], skip_special_tokens=True), entry["decoded"]
        if decoded != ours:
            at = _first_difference(decoded, ours)
            found = f"{decoded[at : at + 40]!a} from character {at} on, ours gives {ours[at : at + 40]!a}"
            faults.append(f"decoding the ids of {entry['text'][:80]!a} gives {found}")
            break
    for first, second, wanted in said["pairs"]:
        ids = tokenizer(first, second)["input_ids"]
        if ids != wanted:
            faults.append(_differing_ids("as a pair", f"{first} + {second}", ids, wanted))
            break
    return faults


def differing_marks(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, said: dict) -> list[str]:
    """Special tokens that differ from ours, in the tokenizer or in the settings that `generate` reads."""
    faults = []
    for role, ours in said["specials"].items():
        found = getattr(tokenizer, "eos_token" if role == "eod" else f"{role}_token")
        if found != ours:
            faults.append(f"tokenizer: {role}_token is {found}, should be {ours}")
    wanted = {"pad_token_id": tokenizer.convert_tokens_to_ids(said["specials"]["pad"])}
    places = {"config.json": model.config}
    if said["causal"] or said["decodes"]:
        end = tokenizer.convert_tokens_to_ids(said["end"])
        wanted |= {"eos_token_id": end} | ({"bos_token_id": end} if said["causal"] else {})
        places |= {"tokenizer": tokenizer, "generation_config.json": model.generation_config}
    for place, holder in places.items():
        for key, value in wanted.items():
            if getattr(holder, key) != value:
                faults.append(f"{place}: {key} is {getattr(holder, key)}, should be {value}")
    return faults


def logits_of(model: PreTrainedModel, tensors: dict) -> list[torch.Tensor]:
    """Logits (B, R, V) at the compared positions of each batch."""
    logits: list[torch.Tensor] = []
    while f"{(n := len(logits))}.ids" in tensors:
        out = model(**asked(tensors, n)).logits
        logits.append(out[:, tensors[f"{n}.rows"]].clone())
    return logits


def asked(tensors: dict, n: int) -> dict:
    """The arguments of the model for batch `n`."""
    found = {"input_ids": tensors[f"{n}.ids"], "attention_mask": tensors[f"{n}.mask"]}
    return found | ({"decoder_input_ids": tensors[f"{n}.written"]} if f"{n}.written" in tensors else {})


def differing_padded(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, said: dict, tensors: dict
) -> list[str]:
    """The differences that appear if the tokenizer pads texts of several lengths to one batch.

    A decoder must be padded on the left, because `generate` continues at the right end. An encoder must be padded on
    the right, so that positions begin with the text. Padding must change no logit of a text and no generated token.
    """
    batch = tokenizer(said["padded"], padding=True, split_special_tokens=True, return_tensors="pt")
    mask = batch["attention_mask"].bool()  # (B, T)
    side = "left" if said["causal"] else "right"
    if not mask[:, -1 if said["causal"] else 0].all():
        return [f"the tokenizer does not pad on the {side}"]
    positions = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if said["causal"] else {}  # as `generate` does
    if said["decodes"]:
        positions = {"decoder_input_ids": tensors["written"].expand(len(mask), -1)}
    faults, logits = [], model(**batch, **positions).logits
    kept = torch.ones(logits.shape[:2], dtype=torch.bool) if said["decodes"] else mask
    for n, text in enumerate(said["padded"]):
        if int(kept[n].sum()) != len(tensors[f"padded.{n}"]):
            faults.append(f"padded on the {side}, {text[:80]!a} has another number of tokens")
            continue
        difference = float((logits[n][kept[n]] - tensors[f"padded.{n}"]).abs().max())
        if not difference <= said["tolerance"]:
            faults.append(f"padded on the {side}, the logits of {text[:80]!a} differ by up to {difference:.3g}")
    return faults or (differing_written(model, batch, said) if said["causal"] or said["decodes"] else [])


def differing_written(model: PreTrainedModel, batch: BatchEncoding, said: dict) -> list[str]:
    """The first token that greedy `generate` adds to a padded text but that is not the likeliest after it alone."""
    written = model.generate(**batch, max_new_tokens=said["written"], do_sample=False)
    for ids, mask, row in zip(batch["input_ids"], batch["attention_mask"].bool(), written, strict=True):
        if said["decodes"]:
            new, logits = row[1:], model(ids[mask][None], decoder_input_ids=row[None]).logits[0]
        else:
            new = row[len(ids) :]
            logits = model(torch.cat((ids[mask], new))[None]).logits[0, int(mask.sum()) - 1 :]
        for token, after in zip(new.tolist(), logits, strict=False):
            # Not `token == argmax`: either of two equally likely tokens is right.
            if not float(after.max() - after[token]) <= said["tolerance"]:
                return [f"padded, generate writes token {token}; alone {int(after.argmax())} is the likeliest"]
            if token == model.generation_config.eos_token_id:
                break
    return []


def compare(logits: list[torch.Tensor], tensors: dict) -> tuple[dict, str]:
    """The measurements, and a line about the logit with the largest difference."""
    worst, place, count, ours = 0.0, "", 0, []
    for n, theirs in enumerate(logits):
        reference, rows = tensors[f"{n}.logits"], tensors[f"{n}.rows"]
        if reference.ndim == 2:  # a discriminator has one logit for each token
            theirs, reference = theirs[..., None], reference[..., None]
        kept = tensors[f"{n}.kept"]  # (B, R)
        ours.append(reference[kept].flatten())
        count += ours[-1].numel()
        difference = (theirs - reference).abs().masked_fill(~kept[..., None], 0)
        difference = torch.where(difference.isfinite(), difference, torch.inf)  # (B, R, V)
        if difference.max() > worst:
            worst = float(difference.max())
            b, r, v = (int(i) for i in torch.unravel_index(difference.argmax(), difference.shape))
            sizes = " x ".join(map(str, tensors[f"{n}.ids"].shape))
            place = f"batch {n} ({sizes} tokens), sequence {b}, position {int(rows[r])}, token {v}: "
            place += f"{float(theirs[b, r, v]):.6g}, ours {float(reference[b, r, v]):.6g}"
    measured = {"max_logit_diff": worst, "logits": count, "logit_std": float(torch.cat(ours).std())}
    return measured, f"logits differ by up to {worst:.3g}, in {place}"


def hidden_diffs(model: PreTrainedModel, tensors: dict) -> dict[str, float]:
    """The largest difference of the hidden states of batch 0 after the embeddings and after each layer, in order."""
    theirs = model(**asked(tensors, 0), output_hidden_states=True)
    parts = {"": ("hidden_states", "hidden")}
    if "0.written" in tensors:
        parts = {
            "encoder ": ("encoder_hidden_states", "hidden"),
            "decoder ": ("decoder_hidden_states", "hidden.decoder"),
        }
    found: dict[str, float] = {}
    for part, (states, ours) in parts.items():
        states = theirs[states]
        names = [f"the {part}embeddings", *(f"{part}layer {i}" for i in range(len(states) - 1))]
        pairs = zip(names, states, tensors[ours], strict=True)
        found |= {name: float((a - b).abs().max()) for name, a, b in pairs}
    return {name: difference if math.isfinite(difference) else math.inf for name, difference in found.items()}


def first_parting(differences: dict[str, float], tolerance: float) -> str:
    """A line about the first layer whose hidden states differ."""
    for name, difference in differences.items():
        if not difference <= tolerance:
            return f"the first difference is in {name}: hidden states differ by up to {difference:.3g}"
    return "hidden states agree in every layer: the difference is in the head"


def _differing_ids(how: str, text: str, ids: list[int], ours: list[int]) -> str:
    at = _first_difference(ids, ours)
    return f"encoding {text[:80]!a} {how} gives {ids[at : at + 8]} from token {at} on, ours gives {ours[at : at + 8]}"


def _first_difference(a: list | str, b: list | str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
