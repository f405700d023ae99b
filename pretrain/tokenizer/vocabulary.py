"""What the ids of a tokenizer stand for, whoever made it: ours, or any `tokenizer.json`."""

import json
import re
from collections.abc import Iterable

import numpy as np
import tokenizers

from pretrain.tokenizer.kinds import byte_of_symbol

METASPACE = "▁"  # U+2581: how SentencePiece writes a space
BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # how SentencePiece writes a byte of a character it does not have


class Vocabulary:
    """A `tokenizers` object whose tokens can be looked at. `marks` are ids that stand for no text: specials, reserved.

    Ids run from 0 to `size` - 1; one that no token has (some published vocabularies have holes) is a mark.
    """

    def __init__(self, engine: tokenizers.Tokenizer, size: int, marks: Iterable[int] = ()):
        self.engine, self.size, self.marks = engine, size, frozenset(marks)
        model = engine.model
        self.prefix: str = getattr(model, "continuing_subword_prefix", None) or ""  # `##` of WordPiece
        self.suffix: str = getattr(model, "end_of_word_suffix", None) or ""
        self.unknown: int | None = _unknown(engine)
        parts = (engine.normalizer, engine.pre_tokenizer, engine.decoder)
        said = b"".join(part.__getstate__() for part in parts if part is not None)
        self.in_bytes: bool = b'"ByteLevel"' in said  # each byte of UTF-8 written as one printable character
        self._metaspace = METASPACE.encode("utf-8") in said or b'"Metaspace"' in said
        self._added = engine.get_added_tokens_decoder()  # these are text as it stands
        self._bytes = byte_of_symbol()

    def raw(self, token: int) -> bytes:
        """The UTF-8 that a token stands for, without the sign that it continues a word; empty for marks."""
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
        """A token to be looked at: `##ing`, or its text (`‿ing`) if it is spelled in bytes, `\\xe6` for half of one."""
        text = self.engine.id_to_token(token)
        if text is None:
            return f"<no token {token}>"
        if token in self.marks or token in self._added or not self.in_bytes:
            return text
        prefix = self.prefix if text.startswith(self.prefix) else ""
        return prefix + self.raw(token).decode("utf-8", errors="backslashreplace")

    def sizes(self) -> np.ndarray:
        """Bytes of UTF-8 that each token stands for: (V,) int64, 0 for marks."""
        return np.array([len(self.raw(token)) for token in range(self.size)], dtype=np.int64)


def vocabulary_of(engine: tokenizers.Tokenizer, reserved: Iterable[int] = ()) -> Vocabulary:
    """With everything that `engine` itself calls special as marks, and `reserved` too."""
    size = max(engine.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    special = {token for token, added in engine.get_added_tokens_decoder().items() if added.special}
    return Vocabulary(engine, size, special | set(reserved))


def _unknown(engine: tokenizers.Tokenizer) -> int | None:
    """The id that stands for what has no other; None where nothing does."""
    model = engine.model
    if isinstance(model, tokenizers.models.Unigram):  # does not say it but in its file
        return json.loads(engine.to_str())["model"]["unk_id"]
    return engine.token_to_id(model.unk_token) if model.unk_token is not None else None
