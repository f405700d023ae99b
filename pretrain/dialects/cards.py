"""The text of a model card that encoders share, and the one that decoders share. export/card.py fills in the braces.

`{title}` and `{notes}` are the dialect's own.
"""

OPENING = """\
{front}
# {title}

{size}

```python
from transformers import {auto_class}, AutoTokenizer

folder = "path/to/this/folder"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = {auto_class}.from_pretrained(folder)
"""

ENCODER = """\
```

## Good to know

{notes}
- **Length.** {length}
  Later positions were never trained.
- **Marks inside text.** In the corpus the characters `{end}` were text. transformers reads them as the mark, unless you
  call `tokenizer(text, split_special_tokens=True)`. `{mask}` needs the default.
"""

DETECTOR = """\
inputs = tokenizer("The quick brown fox jumps over the lazy dog.", return_tensors="pt")
print(model(**inputs).logits.sigmoid())  # for each token, how likely it is that it was replaced
```

## Good to know

{notes}
- **Fine-tune it as any encoder**: `AutoModelForSequenceClassification` and its relatives leave out the head that
  detects replaced tokens. It has no head that fills in masks, and it has never seen `{mask}`.
- **Length.** {length}
  Later positions were never trained.
- **Marks inside text.** In the corpus the characters `{end}` were text. transformers reads them as the mark, unless you
  call `tokenizer(text, split_special_tokens=True)`.
"""

TEXT_TO_TEXT = """\
prompt = tokenizer("In the beginning {sentinel} the heaven and the earth.", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=20)[0]))
```

## Good to know

- **It fills in spans.** `{sentinel}` and its successors stand for missing spans. The model writes each sentinel and its
  span, and at the end `{end}`. Other tasks need fine-tuning.{notes}
{lossless}- **Length.** {length}
- **Marks inside text.** In the corpus the characters `{end}` were text. transformers reads them as the mark, unless you
  call `tokenizer(text, split_special_tokens=True)`. Sentinels in a text need the default.
"""

DECODER = """\
prompt = tokenizer("In the beginning", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=40)[0], skip_special_tokens=True))
```

## Good to know

- **`{end}` begins and ends a document.** The tokenizer writes it before a text and nothing after the text, so a prompt
  looks like the start of a document in training. `generate` stops at the next `{end}`. To train on whole documents,
  append `tokenizer.eos_token_id` yourself.
- **Padding is on the left**, because `generate` needs it there for prompts of several lengths.{notes}
{lossless}- **Length.** {length}
  Longer inputs are extrapolation. config.json allows {positions:,} positions, so a program that reads it, such as
  lm-eval, must be told `max_length={longest}`.
- **Scoring text with lm-eval.** lm-eval puts a begin mark before a text that the tokenizer has begun with `{end}`
  already, and it scores the second mark too. For whole texts (`loglikelihood_rolling`: perplexity, bits per byte) pass
  `--model_args pretrained=FOLDER,dtype=float32,add_bos_token=False,max_length={longest}`. Multiple choice, where a
  context is given, is right without `add_bos_token=False`.
- **Marks inside text.** In the corpus the characters `{end}` were text. transformers reads them as the mark, unless you
  call `tokenizer(text, split_special_tokens=True)`.
- The model continues text. It was not trained to follow instructions and has no chat template.
"""


def encoder(title: str, *notes: str) -> str:
    """The card of an encoder. Each note is a paragraph in Markdown; a dialect's braces in it are kept for export."""
    return _opened(title, "AutoModelForMaskedLM") + ENCODER.replace("{notes}", _listed(notes))


def detector(title: str, *notes: str) -> str:
    """The card of an encoder that says which tokens were replaced, in the same way."""
    return _opened(title, "AutoModelForPreTraining") + DETECTOR.replace("{notes}", _listed(notes))


def text_to_text(title: str, *notes: str) -> str:
    """The card of an encoder and a decoder, in the same way."""
    listed = "".join(f"\n{_listed([note])}" for note in notes)
    return _opened(title, "AutoModelForSeq2SeqLM") + TEXT_TO_TEXT.replace("{notes}", listed)


def decoder(title: str, *notes: str) -> str:
    """The card of a decoder, in the same way."""
    listed = "".join(f"\n{_listed([note])}" for note in notes)
    return _opened(title, "AutoModelForCausalLM") + DECODER.replace("{notes}", listed)


def _opened(title: str, auto_class: str) -> str:
    return OPENING.replace("{title}", title).replace("{auto_class}", auto_class)


def _listed(notes: "tuple[str, ...] | list[str]") -> str:
    return "\n".join("- " + note.strip().replace("\n", "\n  ") for note in notes)
