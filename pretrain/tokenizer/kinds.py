"""The two kinds of vocabulary: special tokens, how text is split into words, and the `tokenizers` object."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

SPECIALS = {
    "bert": {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"},
    "byte": {"pad": "<pad>", "unk": "<unk>", "eod": "<eod>"},
}
RESERVED = {"bert": "[unused{}]", "byte": "<unused{}>"}  # slots for the tokens of later users
PREFIX = {"bert": "##", "byte": "‿"}  # U+203F is outside the byte-level alphabet

# WordPiece replaces a longer word by the unknown token. A larger limit makes encoding quadratic.
WORD_CHARACTERS = 100

# The pattern of GPT-2 with every repetition limited to 24 code points. A word with its leading space has at most 97
# bytes, below WORD_CHARACTERS, so nothing is ever unknown. Single digits take no leading space: `1` is always a token.
BYTE_WORDS = {
    digits: (
        r"'s|'t|'re|'ve|'m|'ll|'d"
        r"| ?\p{L}{1,24}|" + numerals + r"| ?[^\s\p{L}\p{N}]{1,24}"
        r"|\s{1,24}(?!\S)|\s{1,24}"
    )
    for digits, numerals in (("whole", r" ?\p{N}{1,24}"), ("single", r"\p{N}"))
}


@dataclass(frozen=True)
class Rules:
    """How text is normalised and split into words."""

    kind: str
    lowercase: bool = False  # bert only, like strip_accents
    strip_accents: bool = False
    digits: str = "whole"  # or "single": every digit is a word of its own
    width: str = "keep"  # or "fold", bert only: Unicode NFKC first, which makes full-width characters half-width


def build(tokens: list[str], rules: Rules, special_tokens: Sequence[str] = ()) -> tokenizers.Tokenizer:
    """The tokenizer with exactly these tokens, ids in their order. `special_tokens` are added to our own."""
    vocab = {token: number for number, token in enumerate(tokens)}
    assert len(vocab) == len(tokens), f"{len(tokens)} tokens, {len(vocab)} of them distinct"
    specials, prefix = SPECIALS[rules.kind], PREFIX[rules.kind]
    model = models.WordPiece(
        vocab,
        unk_token=specials["unk"],
        continuing_subword_prefix=prefix,
        max_input_chars_per_word=WORD_CHARACTERS,
    )
    engine = tokenizers.Tokenizer(model)
    marks = [*specials.values(), *special_tokens]
    engine.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in marks])
    engine.encode_special_tokens = True
    if rules.kind == "bert":
        engine.normalizer = _normalizer(rules)
        engine.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        if rules.digits == "single":
            digits = pre_tokenizers.Digits(individual_digits=True)
            engine.pre_tokenizer = pre_tokenizers.Sequence([engine.pre_tokenizer, digits])
        engine.decoder = decoders.WordPiece(prefix=prefix)
    else:
        words = pre_tokenizers.Split(Regex(BYTE_WORDS[rules.digits]), behavior="isolated")
        symbols = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # BYTE_WORDS has split it
        engine.pre_tokenizer = pre_tokenizers.Sequence([words, symbols])
        engine.decoder = decoders.Sequence([decoders.Replace(prefix, ""), decoders.ByteLevel()])
    engine.post_processor = template(rules.kind, {role: (token, vocab[token]) for role, token in specials.items()})
    return engine


def template(kind: str, specials: dict[str, tuple[str, int]]) -> processors.TemplateProcessing:
    """The template of a document: `[CLS] … [SEP]` or `… <eod>`. `specials` has the token and the id of each role."""
    if kind == "bert":
        single, pair = "cls:0 $A:0 sep:0", "cls:0 $A:0 sep:0 $B:1 sep:1"
    else:
        single, pair = "$A eod", "$A eod $B eod"
    # Tokens are named by role, because the template syntax cannot express a token with a colon or a space.
    named = [
        {"id": role, "ids": [number], "tokens": [token]} for role, (token, number) in specials.items() if role in pair
    ]
    return processors.TemplateProcessing(single=single, pair=pair, special_tokens=named)


def _normalizer(rules: Rules) -> normalizers.Normalizer:
    bert = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=True, strip_accents=rules.strip_accents, lowercase=rules.lowercase
    )
    return bert if rules.width == "keep" else normalizers.Sequence([normalizers.NFKC(), bert])


def is_reserved(token: str) -> bool:
    return re.fullmatch(r"\[unused\d+\]|<unused\d+>", token) is not None


def words_of(text: str, engine: tokenizers.Tokenizer) -> list[str]:
    """`text`, normalised and split into words."""
    if engine.normalizer is not None:
        text = engine.normalizer.normalize_str(text)
    return [word for word, _ in engine.pre_tokenizer.pre_tokenize_str(text)]


def byte_of_symbol() -> dict[str, int]:
    """The byte-level alphabet of GPT-2: printable Latin-1 bytes are themselves, the other 68 are U+0100 and above."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


# The roles of special tokens. The usual names of their tokens are tried if no file names the token.
ROLES = {
    "pad": ("[PAD]", "<pad>", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>"),
    "unk": ("[UNK]", "<unk>"),
    "cls": ("[CLS]",),
    "sep": ("[SEP]",),
    "mask": ("[MASK]",),
    "eod": ("<eod>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "</s>", "<｜end▁of▁sentence｜>"),
}
