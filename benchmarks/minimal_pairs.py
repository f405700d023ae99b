"""Score decoders on minimal pairs: how often does a model find the right sentence likelier than the wrong one?

    python benchmarks/minimal_pairs.py FOLDER FILE... [--pairs 200]

FOLDER is an export, opened by stock transformers. A line of FILE is {"good": ..., "bad": ..., "paradigm": ...}, as
BLiMP (Warstadt et al. 2020) and SLING (Song et al. 2022) have them. The score of a sentence is the sum of the
log-likelihoods of its tokens behind the mark that begins a document. The result is the mean over paradigms of the
share of right pairs, with the standard error of the drawn pairs (the first --pairs of each paradigm; all by default).
"""

import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # so that no file of this folder shadows a library

import torch  # noqa: E402
import transformers  # noqa: E402

BATCH = 128
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@torch.inference_mode()
def likelihoods(model: Any, tokenizer: Any, sentences: list[str]) -> list[float]:
    """The log-likelihood of each sentence, in nats."""
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    rows = [[begin, *ids] for ids in tokenizer(sentences, add_special_tokens=False)["input_ids"]]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    found = [0.0] * len(rows)
    for first in range(0, len(order), BATCH):
        part = order[first : first + BATCH]
        longest = len(rows[part[-1]])
        ids = torch.tensor([rows[i] + [begin] * (longest - len(rows[i])) for i in part], device=DEVICE)
        real = torch.tensor([[1] * len(rows[i]) + [0] * (longest - len(rows[i])) for i in part], device=DEVICE)
        logits = model(input_ids=ids, attention_mask=real).logits[:, :-1].float()
        target = ids[:, 1:]
        each = logits.gather(-1, target[..., None])[..., 0] - logits.logsumexp(-1)
        for i, total in zip(part, (each * real[:, 1:]).sum(-1).tolist(), strict=True):
            found[i] = total
    return found


def scored(folder: str, files: list[Path], pairs: int | None) -> dict[str, Any]:
    """The accuracy of each paradigm, and their mean with its standard error."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(DEVICE).eval()
    by_paradigm: dict[str, list[dict]] = {}
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            one = json.loads(line)
            by_paradigm.setdefault(one["paradigm"], []).append(one)
    chosen = [(name, one) for name, found in by_paradigm.items() for one in found[:pairs]]
    good = likelihoods(model, tokenizer, [one["good"] for _, one in chosen])
    bad = likelihoods(model, tokenizer, [one["bad"] for _, one in chosen])
    right: dict[str, list[float]] = {name: [] for name in by_paradigm}
    for (name, _), a, b in zip(chosen, good, bad, strict=True):
        right[name].append(1.0 if a > b else 0.5 if a == b else 0.0)
    accuracy = {name: statistics.mean(found) for name, found in right.items()}
    error = math.sqrt(sum(p * (1 - p) / len(right[name]) for name, p in accuracy.items())) / len(accuracy)
    found = {"pairs": len(chosen), "paradigms": len(accuracy), "accuracy": round(statistics.mean(accuracy.values()), 4)}
    return found | {"standard_error": round(error, 4), "by_paradigm": {k: round(v, 3) for k, v in accuracy.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--pairs", type=int)
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    print(json.dumps({"folder": arguments.folder} | scored(arguments.folder, arguments.files, arguments.pairs)))


if __name__ == "__main__":
    main()
