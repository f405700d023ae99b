"""The two kinds of vocabulary: their marks, how they cut text into words, and the `tokenizers` object of each."""

import re

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

SPECIALS = {
    "bert": {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"},
    "byte": {"pad": "<pad>", "unk": "<unk>", "eod": "<eod>"},
}
PREFIX = {"bert": "##", "byte": "‿"}  # U+203F is outside the byte-level alphabet

# WordPiece turns a word of more characters into the unknown token; raising this makes encoding quadratic.
WORD_CHARACTERS = 100

# The pattern of GPT-2, every repetition cut to 24 code points: with the leading space at most 97 bytes, so that no word
# reaches WORD_CHARACTERS and nothing is ever unknown.
BYTE_WORDS = (
    r"'s|'t|'re|'ve|'m|'ll|'d"
    r"| ?\p{L}{1,24}| ?\p{N}{1,24}| ?[^\s\p{L}\p{N}]{1,24}"
    r"|\s{1,24}(?!\S)|\s{1,24}"
)

# Chunks repeat, so words are cut out of each distinct chunk once. A chunk must end where a word surely ends. Python's
# own idea of white space will not do: BERT deletes \x0b, \x0c, \x1c-\x1f and \x85 ("a\x0bb" is one word), and to the
# pattern above \x1c-\x1f are not white space. Chinese characters are chunks of their own because BERT isolates them.
_SPACE = " \t\n\r\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_HAN = "\u3400-\u4dbf\u4e00-\u9fff"
CHUNK = {
    "bert": re.compile(f"[{_HAN}]|[^{_SPACE}{_HAN}]+"),
    "byte": re.compile(f"[{_SPACE}\x0b\x0c\x85]*[^{_SPACE}\x0b\x0c\x85]+|[{_SPACE}\x0b\x0c\x85]+"),
}


def build(tokens: list[str], kind: str, lowercase: bool) -> tokenizers.Tokenizer:
    """The tokenizer with exactly these tokens, ids in their order."""
    vocab = {token: number for number, token in enumerate(tokens)}
    assert len(vocab) == len(tokens), f"{len(tokens)} tokens, {len(vocab)} of them distinct"
    specials, prefix = SPECIALS[kind], PREFIX[kind]
    model = models.WordPiece(
        vocab,
        unk_token=specials["unk"],
        continuing_subword_prefix=prefix,
        max_input_chars_per_word=WORD_CHARACTERS,
    )
    engine = tokenizers.Tokenizer(model)
    engine.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials.values()])
    engine.encode_special_tokens = True
    if kind == "bert":
        engine.normalizer = normalizers.BertNormalizer(
            clean_text=True, handle_chinese_chars=True, strip_accents=lowercase, lowercase=lowercase
        )
        engine.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        engine.decoder = decoders.WordPiece(prefix=prefix)
        single, pair = "[CLS]:0 $A:0 [SEP]:0", "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1"
        template = ["cls", "sep"]
    else:
        words = pre_tokenizers.Split(Regex(BYTE_WORDS), behavior="isolated")
        symbols = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # BYTE_WORDS has cut already
        engine.pre_tokenizer = pre_tokenizers.Sequence([words, symbols])
        engine.decoder = decoders.Sequence([decoders.Replace(prefix, ""), decoders.ByteLevel()])
        single, pair = "$A <eod>", "$A <eod> $B <eod>"
        template = ["eod"]
    special_tokens = [(specials[role], vocab[specials[role]]) for role in template]
    engine.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=special_tokens)
    return engine


def words_of(text: str, engine: tokenizers.Tokenizer) -> list[str]:
    """`text` normalised and cut into words."""
    if engine.normalizer is not None:
        text = engine.normalizer.normalize_str(text)
    return [word for word, _ in engine.pre_tokenizer.pre_tokenize_str(text)]


def byte_of_symbol() -> dict[str, int]:
    """The byte-level alphabet: printable Latin-1 stands for itself, the other 68 bytes for U+0100 and on (GPT-2)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}
