"""The model card: what the folder is, how to open it, what was not trained, how it was checked.

It holds nothing that differs between two exports of one checkpoint (paths, versions, measurements): what was measured
stands in index.json.
"""

import yaml

from pretrain.export.reference import FUZZED, TOLERANCE
from pretrain.model import ModelConfig
from pretrain.tokenizer import Tokenizer

TRAINING = ("seed", "objective", "phases", "optim", "model")  # sections of the run's configuration that are shown

ENCODER = """\
---
library_name: transformers
pipeline_tag: fill-mask
---

# A BERT encoder

{size}

```python
from transformers import AutoModelForMaskedLM, AutoTokenizer

folder = "path/to/this/folder"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForMaskedLM.from_pretrained(folder)
```

## What to know

- **The pooler was not trained** and is not in the file. Classes that use it, such as `BertForSequenceClassification`,
  start it at random and say so; fine-tuning trains it.
- **Segment types were not trained.** Both rows are zero: a second text (`token_type_ids` 1) is told from the first only
  once fine-tuning has moved them.
- **Length.** {length}
  The positions beyond were never trained.
- **Dropout** is as in pre-training, {dropout:g}. Fine-tuning on little data may want more:
  `from_pretrained(folder, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)`.
- **Marks inside text.** In the corpus the characters `{end}` were text. transformers reads them as the mark unless told
  otherwise: `tokenizer(text, split_special_tokens=True)`. `{mask}` needs the default.
"""

DECODER = """\
---
library_name: transformers
pipeline_tag: text-generation
---

# A Qwen3 decoder

{size}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "path/to/this/folder"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
prompt = tokenizer("In the beginning", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=40)[0], skip_special_tokens=True))
```

## What to know

- **`{end}` begins and ends a document.** The tokenizer writes it in front of a text and nothing behind, so that a
  prompt is what training saw at the start of a document; `generate` stops at the next one. To train on whole documents,
  append `tokenizer.eos_token_id` yourself.
- **Padding is on the left**, as `generate` needs it for prompts of several lengths.
{lossless}- **Length.** {length}
  Longer inputs are extrapolation.
- **Marks inside text.** In the corpus the characters `{end}` were text. transformers reads them as the mark unless told
  otherwise: `tokenizer(text, split_special_tokens=True)`.
- It continues text; it was not taught to follow instructions, and has no chat template.
"""

LOSSLESS = "- **No text is changed or unknown**: decoding the ids of a text gives the text back.\n"

REST = """
## How it was made

{steps}

| made from  | fingerprint |
| ---------- | ----------- |
| checkpoint | `{checkpoint}` |
| shards     | `{shards}` |
| tokenizer  | `{tokenizer}` |

```yaml
{training}```

The licence of the text it learned from applies; the recipe of the corpus names it.

## How it was checked

Before this folder got its name, a process without the code that trained the model opened it with the `Auto*` classes of
transformers, on a CPU in fp32. Every weight in the files had its place, and none was missing. On random ids of several
lengths, padded and not, no logit differed from the training code's by more than {tolerance:g}. {texts} made-up texts in
many scripts had the same ids and decoded to the same text; those that contain a mark were encoded with
`split_special_tokens=True` only. Saved and opened once more, logits and ids were the same again. The largest difference
measured and the versions it was measured with are in `index.json` under `recorded`.
"""


def card(
    dialect: str,
    model: ModelConfig,
    vocab_size: int,
    parameters: int,
    tokenizer: Tokenizer,
    settings: dict,
    index: dict,
) -> str:
    """README.md for a model whose run had `settings` (config.yaml as values) and whose checkpoint has `index`."""
    kv = "" if model.heads == model.KV else f" ({model.KV} for keys and values)"
    size = f"{parameters:,} weights: {model.layers} layers of width {model.width}, {model.heads} heads{kv}, "
    size += f"a vocabulary of {vocab_size:,}. Pre-trained from scratch."
    longest = trained_length(settings)
    steps = f"Step {index['step']:,} of {sum(phase['steps'] for phase in settings['phases']):,}, "
    steps += f"{_tokens(index['step'], settings['phases']):,} tokens"
    steps += f", {settings['engine']['precision']}." if "engine" in settings else "."
    specials = {role: tokenizer.token_text(token) for role, token in tokenizer.specials.items()}
    return ({"bert": ENCODER, "qwen3": DECODER}[dialect] + REST).format(
        size=size,
        length=f"Training windows were at most {longest:,} tokens; the tokenizer truncates to that when asked to.",
        dropout=model.dropout,
        end=specials["eod"] if "eod" in specials else specials["sep"],
        mask=specials.get("mask"),
        lossless=LOSSLESS if tokenizer.lossless else "",
        steps=steps,
        checkpoint=index["fingerprint"],
        shards=index.get("shards") or "`, `".join(f"{name} {shards}" for name, shards in index["corpora"]),
        tokenizer=index["tokenizer"],
        training=yaml.safe_dump({key: settings[key] for key in TRAINING if key in settings}, sort_keys=False),
        tolerance=TOLERANCE,
        texts=FUZZED,
    )


def trained_length(settings: dict) -> int:
    """Tokens of the longest window the model was trained on."""
    return max(phase["seq_len"] for phase in settings["phases"])


def _tokens(step: int, phases: list[dict]) -> int:
    """Input tokens behind optimizer step `step`."""
    tokens = 0
    for phase in phases:
        tokens += min(step, phase["steps"]) * phase["batch_tokens"]
        step = max(0, step - phase["steps"])
    return tokens
