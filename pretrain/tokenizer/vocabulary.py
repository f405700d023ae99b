"""The text and the bytes that each id stands for, in our vocabularies and in any `tokenizer.json`."""

import json
import re
from collections.abc import Iterable

import numpy as np
import tokenizers

from pretrain.tokenizer.kinds import byte_of_symbol

METASPACE = "▁"  # U+2581: how SentencePiece writes a space
BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # how SentencePiece writes a byte of a character it does not have


class Vocabulary:
    """A `tokenizers` object with the text of each token. `marks` are ids without text: special and reserved tokens.

    Ids run from 0 to `size` - 1. Some published vocabularies have ids without a token; these have no text either.
    """

    def __init__(self, engine: tokenizers.Tokenizer, size: int, marks: Iterable[int] = ()):
        self.engine, self.size, self.marks = engine, size, frozenset(marks)
        model = engine.model
        self.prefix: str = getattr(model, "continuing_subword_prefix", None) or ""  # `##` of WordPiece
        self.suffix: str = getattr(model, "end_of_word_suffix", None) or ""
        self.unknown: int | None = _unknown(engine)
        parts = (engine.normalizer, engine.pre_tokenizer, engine.decoder)
        said = b"".join(part.__getstate__() for part in parts if part is not None)
        self.in_bytes: bool = b'"ByteLevel"' in said  # each byte of UTF-8 is written as one printable character
        self._metaspace = METASPACE.encode("utf-8") in said or b'"Metaspace"' in said
        self._added = engine.get_added_tokens_decoder()  # their strings are plain text
        self._bytes = byte_of_symbol()

    def raw(self, token: int) -> bytes:
        """The UTF-8 bytes of a token, without the prefix that says that it continues a word; empty for marks."""
        text = self.engine.id_to_token(token)
        if token in self.marks or text is None:
            return b""
        if token in self._added:
            return text.encode("utf-8")
        text = text.removeprefix(self.prefix).removesuffix(self.suffix)
        if self.in_bytes:
            return bytes(map(self._bytes.__getitem__, text))
        byte = BYTE.fullmatch(text)
        if byte and getattr(self.engine.model, "byte_fallback", False):
            return bytes.fromhex(byte[1])
        return (text.replace(METASPACE, " ") if self._metaspace else text).encode("utf-8")

    def text(self, token: int) -> str:
        """A token for display: `##ing`, or its text (`‿ing`) if spelled in bytes; `\\xe6` is part of a character."""
        text = self.engine.id_to_token(token)
        if text is None:
            return f"<no token {token}>"
        if token in self.marks or token in self._added or not self.in_bytes:
            return text
        prefix = self.prefix if text.startswith(self.prefix) else ""
        return prefix + self.raw(token).decode("utf-8", errors="backslashreplace")

    def sizes(self) -> np.ndarray:
        """The number of UTF-8 bytes of each token: (V,) int64, 0 for marks."""
        return np.array([len(self.raw(token)) for token in range(self.size)], dtype=np.int64)


def vocabulary_of(engine: tokenizers.Tokenizer, reserved: Iterable[int] = ()) -> Vocabulary:
    """The vocabulary of `engine`; its marks are the tokens that `engine` calls special, and `reserved`."""
    size = max(engine.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    special = {token for token, added in engine.get_added_tokens_decoder().items() if added.special}
    return Vocabulary(engine, size, special | set(reserved))


def _unknown(engine: tokenizers.Tokenizer) -> int | None:
    """The id of the unknown token, or None."""
    model = engine.model
    if isinstance(model, tokenizers.models.Unigram):  # only its JSON contains the id
        return json.loads(engine.to_str())["model"]["unk_id"]
    return engine.token_to_id(model.unk_token) if model.unk_token is not None else None
