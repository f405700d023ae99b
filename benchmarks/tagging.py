"""Fine-tune exported encoders to tag words, each beside its random twin, and score them.

    python benchmarks/tagging.py TASK FOLDER... [--labels 1000] [--rates 5e-4 1e-3 2e-3] [--epochs 10] [--seeds 3]

TASK is a folder with train.jsonl, dev.jsonl and test.jsonl, whose lines are {"tokens": [...], "tags": [...]}. Each
FOLDER is opened by stock transformers as a token classifier, and trained in three ways: every weight, LoRA's adapters
on every linear layer with the head, and every weight of its random twin, which has the same config.json and fresh
weights. The learning rate is the best on dev with one seed, where there are several; LoRA takes LORA_RATE times each.
The score is of test, the mean over the seeds. It is the F1 of entities where tags are BIO (an entity counts if its type
and both ends are right; Tjong Kim Sang & De Meulder 2003), else the share of right tags. The first piece of a word
carries its tag. A word behind the last trained position has the tag O, or the first tag.

One line of JSON a folder: `full`, `lora` and `random`, each with rate, scores, mean and the 95 % interval: the error of
the seeds (Student's t) and that of the test sentences (bootstrap) in quadrature.
"""

import argparse
import json
import math
import random
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # so that no file of this folder shadows a library

import numpy as np  # noqa: E402
import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from pretrain.finetune.scores import Z975, t975  # noqa: E402

BATCH, WARMUP, DECAY = 16, 0.1, 0.01
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
METHODS = ("full", "lora", "random")
LORA_RANK, LORA_RATE = 8, 3
IGNORED = -100  # the label of pieces that carry no tag


class Task:
    """Sentences of words with their tags, as numbers of the tokenizer of one folder."""

    def __init__(self, folder: Path, tokenizer: Any, positions: int, labels: int | None):
        lines = {side: (folder / f"{side}.jsonl").read_text().splitlines() for side in ("train", "dev", "test")}
        self.sides = {side: [json.loads(line) for line in found] for side, found in lines.items()}
        random.Random(0).shuffle(self.sides["train"])
        self.sides["train"] = self.sides["train"][:labels]
        self.tags = sorted({tag for one in self.sides["train"] for tag in one["tags"]})
        self.spans = any(tag.startswith("B-") for tag in self.tags)
        self.rows = {side: [self.row(one, tokenizer, positions) for one in found] for side, found in self.sides.items()}

    def row(self, one: dict[str, list[str]], tokenizer: Any, positions: int) -> tuple[list[int], list[int], list[int]]:
        """Token ids, labels, and the place of the first piece of each word that fits."""
        found = tokenizer(one["tokens"], is_split_into_words=True, truncation=True, max_length=positions)
        words = found.word_ids()
        first = [place for place, word in enumerate(words) if word is not None and word != words[place - 1]]
        labels = [IGNORED] * len(words)
        for place in first:
            tag = one["tags"][words[place]]
            labels[place] = self.tags.index(tag) if tag in self.tags else IGNORED
        return found["input_ids"], labels, first

    def counts(self, side: str, answers: list[list[str]]) -> np.ndarray:
        """For each sentence: (right, found, true) entities, or tags."""
        rows = []
        for one, answer in zip(self.sides[side], answers, strict=True):
            if self.spans:
                found, true = entities(answer), entities(one["tags"])
                rows.append((len(found & true), len(found), len(true)))
            else:
                right = sum(a == b for a, b in zip(answer, one["tags"], strict=True))
                rows.append((right, len(answer), len(answer)))
        return np.array(rows)


def entities(tags: list[str]) -> set[tuple[str, int, int]]:
    """(type, first word, word after the last) of each entity; an I- without its B- begins one, as conlleval has it."""
    found, kind, begin = set(), None, 0
    for place, tag in enumerate([*tags, "O"]):
        mark, _, name = tag.partition("-")
        if kind is not None and (mark != "I" or name != kind):
            found.add((kind, begin, place))
            kind = None
        if mark in ("B", "I") and kind is None:
            kind, begin = name, place
    return found


def f1(counts: np.ndarray) -> float:
    right, found, true = counts.sum(axis=0)
    return float(2 * right / max(1, found + true))


def batch(rows: list[tuple], padding: int) -> dict[str, torch.Tensor]:
    longest = max(len(ids) for ids, *_ in rows)
    ids = [[*ids, *[padding] * (longest - len(ids))] for ids, *_ in rows]
    mask = [[1] * len(ids) + [0] * (longest - len(ids)) for ids, *_ in rows]
    labels = [[*labels, *[IGNORED] * (longest - len(labels))] for _, labels, _ in rows]
    return {
        k: torch.tensor(v, device=DEVICE)
        for k, v in {"input_ids": ids, "attention_mask": mask, "labels": labels}.items()
    }


def trained(folder: str, method: str, task: Task, padding: int, rate: float, epochs: int, seed: int) -> Any:
    """A token classifier, trained with AdamW, linear warm-up and decay. Dropout is 0."""
    transformers.set_seed(seed)
    auto, config = transformers.AutoModelForTokenClassification, transformers.AutoConfig.from_pretrained(folder)
    config.num_labels = len(task.tags)
    for name in [name for name in config.to_dict() if "dropout" in name]:
        setattr(config, name, 0.0)
    options = {"config": config, "dtype": torch.float32}
    model = auto.from_config(config) if method == "random" else auto.from_pretrained(folder, **options)
    if method == "lora":
        model = with_adapters(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=DECAY)
    rows = task.rows["train"]
    steps = epochs * math.ceil(len(rows) / BATCH)
    shape = transformers.get_linear_schedule_with_warmup(optimizer, round(WARMUP * steps), steps)
    order = random.Random(seed)
    model.to(DEVICE).train()
    for _ in range(epochs):
        shuffled = order.sample(rows, len(rows))
        for first in range(0, len(rows), BATCH):
            model(**batch(shuffled[first : first + BATCH], padding)).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            shape.step()
            optimizer.zero_grad()
    return model.eval()


def with_adapters(model: Any) -> Any:
    """LoRA on every linear layer of the encoder (Hu et al. 2021, arXiv:2106.09685). The head trains in full."""
    encoder = model.base_model_prefix
    modules = model.base_model.named_modules(prefix=encoder)
    linear = [name for name, module in modules if isinstance(module, torch.nn.Linear)]
    parts = [(name, list(part.parameters())) for name, part in model.named_children()]
    after = [name for name, weights in parts if weights and name != encoder]
    settings = {"r": LORA_RANK, "lora_alpha": 2 * LORA_RANK, "target_modules": linear, "modules_to_save": after}
    return peft.get_peft_model(model, peft.LoraConfig(task_type="TOKEN_CLS", **settings))


@torch.inference_mode()
def answered(model: Any, task: Task, side: str, padding: int) -> np.ndarray:
    """The counts of each sentence of a side."""
    rows, answers = task.rows[side], []
    default = "O" if task.spans else task.tags[0]
    for first in range(0, len(rows), 128):
        part = rows[first : first + 128]
        best = model(**batch(part, padding)).logits.argmax(-1).tolist()
        for (_, _, places), numbers, one in zip(part, best, task.sides[side][first:], strict=False):
            found = [task.tags[numbers[place]] for place in places]
            answers.append(found + [default] * (len(one["tags"]) - len(found)))
    return task.counts(side, answers)


def scored(folder: str, method: str, task: Task, padding: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """The best rate on dev, and the scores on test with it."""
    rates = [LORA_RATE * rate for rate in arguments.rates] if method == "lora" else arguments.rates
    rate, epochs, on_dev = rates[0], arguments.epochs, {}
    if len(rates) > 1:
        for rate in rates:
            model = trained(folder, method, task, padding, rate, epochs, seed=0)
            on_dev[rate] = f1(answered(model, task, "dev", padding))
        rate = max(on_dev, key=lambda rate: on_dev[rate])
    counts = []
    for seed in range(10, 10 + arguments.seeds):
        model = trained(folder, method, task, padding, rate, epochs, seed)
        counts.append(answered(model, task, "test", padding))
    scores = [f1(one) for one in counts]
    draw = np.random.default_rng(0)
    sentences = len(counts[0])
    resampled = [statistics.mean(f1(one[draw.integers(0, sentences, sentences)]) for one in counts) for _ in range(500)]
    error = Z975 * statistics.stdev(resampled)
    if len(scores) > 1:
        error = math.hypot(error, t975(len(scores) - 1) * statistics.stdev(scores) / math.sqrt(len(scores)))
    mean = statistics.mean(scores)
    return {
        "rate": rate,
        "dev": {f"{rate:g}": round(value, 4) for rate, value in on_dev.items()},
        "scores": [round(score, 4) for score in scores],
        "mean": round(mean, 4),
        "interval95": [round(max(0.0, mean - error), 4), round(min(1.0, mean + error), 4)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", type=Path)
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--labels", type=int, default=1000, help="sentences of train")
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for folder in arguments.folders:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        positions = min(128, tokenizer.model_max_length)
        task = Task(arguments.task, tokenizer, positions, arguments.labels)
        found = {"task": arguments.task.name, "folder": folder, "metric": "F1" if task.spans else "accuracy"}
        found |= {"labels": len(task.rows["train"])}
        for method in METHODS:
            found[method] = scored(folder, method, task, tokenizer.pad_token_id, arguments)
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
