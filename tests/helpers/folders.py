"""A tiny encoder and a tiny decoder of transformers, a task whose answer is one word, and ways to change a folder."""

import json
import random
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from pretrain.finetune import FinetuneConfig

FILLERS = ["the", "a", "old", "young", "river", "stone", "sings", "walks", "under", "over", "with", "and", "[SEP]"]
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
POSITIONS = 24
TINY = {"labels": 16, "epochs": 1, "learning_rates": [1e-6], "dev_seeds": [], "test_seeds": [1]}


def examples(count: int, seed: int, pairs: bool = False) -> list[dict]:
    """Texts of 2 to 30 words; `sun` or `moon` somewhere among the first ten decides the label."""
    draw = random.Random(seed)
    made = []
    for i in range(count):
        word, label = (("sun", "light"), ("moon", "dark"))[i % 2]
        words = draw.choices(FILLERS, k=draw.choice([1, 4, 9, 9, 29]))
        words.insert(draw.randrange(min(10, len(words) + 1)), word)
        made.append({"text": " ".join(words), "label": label} | ({"text_pair": "old stone"} if pairs else {}))
    return made


def write_task(folder: Path, **splits: list[dict] | str) -> Path:
    """Write a file for each split, from examples or from its text."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in splits.items():
        text = (
            lines if isinstance(lines, str) else "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        )
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder


def sun_moon(folder: Path) -> Path:
    """A task of 160 training, 40 dev and 60 test examples."""
    return write_task(folder, train=examples(160, 1), dev=examples(40, 2), test=examples(60, 3))


def tiny_encoder(folder: Path) -> Path:
    """BertForMaskedLM, 2 layers x 32, without pooler, with a WordPiece vocabulary of the words of `examples`."""
    from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast

    vocabulary = [*SPECIALS, *sorted({*FILLERS, "sun", "moon", "[", "]", "sep"} - {"[SEP]"})]
    engine = Tokenizer(models.WordPiece({token: i for i, token in enumerate(vocabulary)}, unk_token="[UNK]"))
    engine.normalizer, engine.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    engine.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(folder)
    BertTokenizerFast(tokenizer_object=engine, model_max_length=POSITIONS).save_pretrained(folder)
    return folder


def tiny_decoder(folder: Path) -> Path:
    """Qwen3ForCausalLM, 2 layers x 32, over bytes. A text begins with <eod>."""
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    engine = Tokenizer(models.BPE({token: i for i, token in enumerate(["<pad>", "<eod>", *alphabet])}, []))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    engine.post_processor = processors.TemplateProcessing(single="<eod> $A", special_tokens=[("<eod>", 1)])
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=258, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        intermediate_size=64, max_position_embeddings=64, bos_token_id=1, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=engine, bos_token="<eod>", eos_token="<eod>", pad_token="<pad>", padding_side="left"
    )
    tokenizer.save_pretrained(folder)
    return folder


def settings(encoder: Path, task: Path, out: Path, **changes) -> FinetuneConfig:
    """A configuration that compares two learning rates and trains the better one with two seeds."""
    values = {
        "model": str(encoder), "task": str(task), "out": str(out), "method": "full", "labels": 120, "epochs": 5,
        "batch": 8, "learning_rates": [1e-6, 5e-3], "dev_seeds": [0], "test_seeds": [10, 11], "max_length": POSITIONS,
    }  # fmt: skip
    return FinetuneConfig(**values | changes)


def changed(change):
    """A function (folder, to) that copies a model folder and calls `change(to)`."""

    def make(folder: Path, to: Path) -> Path:
        change(shutil.copytree(folder, to))
        return to

    return make


def edit(name: str, **values):
    """A change that sets keys of a JSON file."""

    def change(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")

    return change
