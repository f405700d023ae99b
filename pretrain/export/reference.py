"""The answers of our model and our tokenizer, written to files for a process that has neither (parity.py).

    tensors.safetensors   per batch n: n.ids and n.mask (B, T), n.rows (R,), n.kept (B, R), n.logits (B, R, V)
                          of batch 0 also hidden (layers + 1, B, T, D)
                          per text n of `padded`: padded.n (T, V), the logits of that text alone
                          of an encoder with a decoder also n.written and written (B, W), what the decoder is given,
                          and hidden.decoder (layers + 1, B, W, D); its rows and logits are those of the decoder
    exact.safetensors     n.logits, computed in fp64; only written if the logits differ
    texts.json            texts [{text, ids, decoded, plain}], pairs [[first, second, ids]], vocab {token: id},
                          specials {role: token}, end, padded [text], written, auto_class, dtype, causal, decodes,
                          tolerance

A text is `plain` if it contains no string of a special token: stock transformers reads such a string as the token, our
corpora as text.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pretrain.model.attention import Crossing, Layout
from pretrain.model.config import ModelConfig
from pretrain.model.encoder_decoder import EncoderDecoder
from pretrain.model.transformer import Transformer
from pretrain.tokenizer import Tokenizer

TENSORS, EXACT, TEXTS = "tensors.safetensors", "exact.safetensors", "texts.json"

TOLERANCE = 1e-4  # largest difference of two logits, in fp32 on a CPU
LONGEST = 2048  # tokens; a model for longer windows is compared up to this length
ROWS = 32  # positions per batch whose logits are compared; V logits at all 2,048 positions would be gigabytes
GIVEN = 20  # tokens that the decoder of an encoder is given
FUZZED = 400  # made-up texts
PADDED = 4  # texts of different lengths that are padded to one batch
WRITTEN = 4  # tokens that a decoder adds to each of these texts

# The pieces that made-up texts are put together from, separated by spaces.
ENGLISH = "the and The low lowest don't it's re-read Hello, world! (ok) U.S.A. e.g. 3.14 1,000 x=y+1; a_b #tag @me $5"
CHINESE = "床前明月光 ， 。 疑是地上霜 汉 漢字 中文mixed英文 「引」 《诗》 １２３ 你好！ 龘 \U00020bb7 〇"
OTHERS = "かな 한국어 ไทย हिन्दी עברית العربية Привет Ελληνικά naïve cafe\u0301 ﬁ ß İ ǅ ½ x² … “q” \u200d \ufeff \u202e"
EMOJI = "😀 👩\u200d👩\u200d👧 \U0001f1e8\U0001f1f3 👍🏽 ❤\ufe0f 1\ufe0f\u20e3"
ALMOST_MARKS = "## ##ing # ‿a Ġ Ċ [SEP [CLS]] <eod <<eod>"
SPACES = [*" \t\n\x0b\x0c\x1c\x85\x00\xa0\u2009\u2028\u3000", "  ", "\r\n", "\n\n"]
RUNS = ["a" * 150, "汉" * 60, " " * 60, "!" * 50, "9" * 40, "\n" * 30, "é" * 101]


def write(folder: Path, model: Transformer, tokenizer: Tokenizer, auto_class: str, dtype: str = "float32") -> None:
    """Ask `model` and `tokenizer` about made-up ids and texts and write the answers to `folder`.

    `auto_class` is the class of transformers that will open the exported folder, and `dtype` the type of the weights
    in it. `model` computes in fp32 and has the weights as they are written.
    """
    folder.mkdir()
    said = _spellings(model.config, tokenizer)
    several = _of_several_lengths(said["texts"], min(model.config.max_positions, LONGEST) - WRITTEN)
    said |= {"padded": [entry["text"] for entry in several], "written": WRITTEN}
    said |= {"auto_class": auto_class, "dtype": dtype}
    save_file(_answers(model) | _alone(model, [entry["ids"] for entry in several]), folder / TENSORS)
    (folder / TEXTS).write_text(json.dumps(said, ensure_ascii=False), encoding="utf-8")


def write_exact(folder: Path, model: Transformer) -> None:
    """Add the logits that `model` computes in fp64, which show how much of a difference fp32 makes by rounding."""
    answers = _answers(model.double())
    save_file({name: tensor for name, tensor in answers.items() if name.endswith(".logits")}, folder / EXACT)


def fuzzed_texts(specials: list[str], count: int, seed: int = 0) -> list[str]:
    """`count` texts in many scripts, alone and mixed, with white space, control characters and `specials`."""
    rng = random.Random(seed)
    scripts = [text.split(" ") for text in (ENGLISH, CHINESE, OTHERS, EMOJI, ALMOST_MARKS)]
    pieces = [*scripts, SPACES, RUNS, specials]
    texts = ["", *(piece for kind in pieces for piece in kind)]
    while len(texts) < count:
        kinds = rng.choices(pieces, weights=[8, 8, 3, 2, 1, 6, 1, 1], k=rng.choice([1, 2, 4]))
        words = [rng.choice(rng.choice(kinds)) for _ in range(rng.randint(1, 20))]
        words += [_any_character(rng) for _ in range(rng.randint(0, 3))]
        rng.shuffle(words)
        texts.append(rng.choice(["", " ", " ", rng.choice(SPACES)]).join(words))
    return texts[:count]


def _any_character(rng: random.Random) -> str:
    """Any code point that is not a surrogate."""
    return chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)]))


@torch.no_grad()
def _answers(model: Transformer) -> dict[str, Tensor]:
    """The logits of batches of random ids, and the hidden states of batch 0, by the names of the module docstring."""
    tensors: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    for n, lengths in enumerate(_shapes(min(model.config.max_positions, LONGEST))):
        T = max(lengths)
        ids = torch.randint(model.vocab_size, (len(lengths), T), generator=generator)
        mask = (torch.arange(T) < torch.tensor(lengths)[:, None]).long()  # (B, T), 0 is padding
        hidden, seen = model(ids, _layout(model, mask)), mask
        if isinstance(model, EncoderDecoder):
            written = torch.randint(model.vocab_size, (len(lengths), min(T, GIVEN)), generator=generator)
            tensors[f"{n}.written"] = written
            hidden, seen = _decoded(model, written, hidden, mask), torch.ones_like(written)
        rows = torch.linspace(0, seen.shape[1] - 1, min(seen.shape[1], ROWS)).long()
        logits = model.logits(hidden[:, rows])  # (B, R, V), or (B, R) if each token has one
        tensors |= {f"{n}.ids": ids, f"{n}.mask": mask, f"{n}.rows": rows, f"{n}.logits": logits}
        tensors[f"{n}.kept"] = seen[:, rows].bool()
    ids, mask = tensors["0.ids"], tensors["0.mask"]
    tensors["hidden"] = _recorded(model.blocks, lambda: model(ids, _layout(model, mask)))
    if isinstance(model, EncoderDecoder):
        states, written = model(ids, _layout(model, mask)), tensors["0.written"]
        tensors["hidden.decoder"] = _recorded(model.decoder.blocks, lambda: _decoded(model, written, states, mask))
    return tensors


def _decoded(model: EncoderDecoder, written: Tensor, states: Tensor, mask: Tensor) -> Tensor:
    """The states of the decoder, which is given the tokens `written` (B, W) and sees the texts of `mask` (B, T)."""
    every = torch.ones_like(written)
    layout = Layout(None, torch.arange(written.shape[1]).expand_as(written), True)
    return model.decode(written, layout, states, Crossing(every, mask))


def _of_several_lengths(entries: list[dict], longest: int) -> list[dict]:
    """At most PADDED plain texts of different lengths, the shortest and the longest that fit among them."""
    by_length = {len(entry["ids"]): entry for entry in entries if entry["plain"] and entry["text"]}
    lengths = sorted(length for length in by_length if length <= longest)
    places = {round(i * (len(lengths) - 1) / (PADDED - 1)) for i in range(PADDED)} if lengths else ()
    return [by_length[lengths[place]] for place in sorted(places)]


@torch.no_grad()
def _alone(model: Transformer, texts: list[list[int]]) -> dict[str, Tensor]:
    """The logits (T, V) of each text in a batch of its own, without padding."""
    found = {}
    written = torch.randint(model.vocab_size, (1, GIVEN), generator=torch.Generator().manual_seed(1))
    for n, ids in enumerate(texts):
        row = torch.tensor([ids])
        mask = torch.ones_like(row)
        hidden = model(row, _layout(model, mask))
        if isinstance(model, EncoderDecoder):
            hidden = _decoded(model, written, hidden, mask)
        found[f"padded.{n}"] = model.logits(hidden)[0]
    return found | {"written": written}


def _layout(model: Transformer, mask: Tensor) -> Layout:
    """The layout of `mask` (B, T): 1 is text, 0 padding. Padding is a document of its own: no text attends to it."""
    return Layout(mask, torch.arange(mask.shape[1]).expand_as(mask), model.config.causal)


def _shapes(longest: int) -> list[list[int]]:
    """Lengths of the sequences in each batch."""
    batches = [[24, 24], [7], [1], [40, 29, 3], [longest]]
    return [[min(length, longest) for length in lengths] for lengths in batches]


def _recorded(blocks: nn.ModuleList, run: Callable[[], Tensor]) -> Tensor:
    """The input of each block and the final output of `run`, (layers + 1, B, T, D), as transformers counts them."""
    states: list[Tensor] = []
    hooks = [block.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0])) for block in blocks]
    last = run()
    for hook in hooks:
        hook.remove()
    return torch.stack([*states, last])


def _spellings(model: ModelConfig, tokenizer: Tokenizer) -> dict:
    """Ids of texts with the template of the exported tokenizer: the vocabulary's own, or for a decoder `<eod> …`."""
    specials = [tokenizer.token_text(token) for token in tokenizer.specials.values()] + list(tokenizer.special_tokens)
    texts = fuzzed_texts(specials, FUZZED)
    encoded = [ids.tolist() for ids in tokenizer.encode_batch(texts)]
    if model.causal:  # the end mark goes in front, and there is no [CLS]
        begun = int("cls" in tokenizer.specials)
        encoded = [[tokenizer.end, *ids[begun:-1]] for ids in encoded]
    entries = [
        {
            "text": text,
            "ids": ids,
            "decoded": text if tokenizer.lossless else tokenizer.decode(ids),
            "plain": not any(special in text for special in specials),
        }
        for text, ids in zip(texts, encoded, strict=True)
    ]
    some = [entry for entry in entries if entry["plain"] and entry["text"]][:40]
    join = 1 if "cls" in tokenizer.specials and not model.causal else 0  # BERT's second text has no [CLS] of its own
    pairs = [(a["text"], b["text"], a["ids"] + b["ids"][join:]) for a, b in zip(some, reversed(some), strict=True)]
    return {
        "causal": model.causal,
        "decodes": model.composition == "encoder_decoder",
        "end": tokenizer.token_text(tokenizer.end),
        "tolerance": TOLERANCE,
        "texts": entries,
        "pairs": pairs,
        "vocab": tokenizer.vocabulary.engine.get_vocab(with_added_tokens=True),
        "specials": {role: tokenizer.token_text(token) for role, token in tokenizer.specials.items()},
    }
