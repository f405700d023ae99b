"""A published vocabulary in use: text to ids and back."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import tokenizers

from pretrain.errors import TokenizerError
from pretrain.storage.index import faults, read_index
from pretrain.tokenizer.fast.encode import Encoder, split
from pretrain.tokenizer.kinds import Rules
from pretrain.tokenizer.vocabulary import Vocabulary

MADE_BY = "python launch/tokenizer.py CONFIG.yaml"


class Tokenizer:
    """A vocabulary in use.

    `specials` gives ids by role: pad unk cls sep mask (bert), pad unk eod (byte); an adopted one may lack unk.
    `lossless`: decoding gives back the very text. `counts_bytes`: `token_bytes` can be asked for.
    """

    def __init__(self, engine: tokenizers.Tokenizer, index: dict, folder: Path):
        self.kind: str = index["kind"]
        self.vocab_size: int = index["vocab_size"]
        self.specials: dict[str, int] = index["specials"]
        self.special_tokens: dict[str, int] = index["special_tokens"]
        self.rules = Rules(**index["rules"]) if index["rules"] else None
        self.lossless: bool = index["lossless"]
        self.counts_bytes: bool = index["counts_bytes"]
        self.fingerprint: str = index["fingerprint"]
        self.folder = folder
        marks = [*self.specials.values(), *self.special_tokens.values(), *index["reserved"]]
        self.vocabulary = Vocabulary(engine, self.vocab_size, marks)
        self._engine = engine
        self._encoder = Encoder(engine)

    def encode_batch(self, texts: list[str], special_tokens: bool = False) -> list[np.ndarray]:
        """Ids (int32) of each text with its template: `[CLS] … [SEP]` or `… <eod>`.

        The string of a special token is text, unless `special_tokens` asks for the token.
        Raises TokenizerError for a lone surrogate, the one thing in a `str` that has no UTF-8.
        """
        ids, lengths = self.encode_flat(texts, special_tokens)
        return split(ids, lengths)

    def encode_flat(self, texts: list[str], special_tokens: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """The same ids one after another, (tokens,) int32, and how many each text has, (texts,) int64."""
        self._engine.encode_special_tokens = not special_tokens
        try:
            return self._encoder.encode_flat(texts)
        except (TypeError, UnicodeEncodeError):  # what is said without saying which text
            for number, text in enumerate(texts):
                _check_scalar_values(text, number)
            raise
        finally:
            self._engine.encode_special_tokens = True

    @property
    def path(self) -> str:
        """What encodes large batches, "fast" or "library"; the ids are the same."""
        return self._encoder.path

    def decode(self, ids: Iterable[int]) -> str:
        """Text without specials. If `lossless` the very text that was encoded, if the ids are all of it."""
        return self._engine.decode([int(i) for i in ids], skip_special_tokens=True)

    def token_text(self, token: int) -> str:
        """A token to be looked at: `##ing`, or for `byte` its text (`‿ing`), with bytes that are no text as \\xe6."""
        if not 0 <= token < self.vocab_size:
            raise TokenizerError(f"no token has the id {token}", f"{self.folder} has ids 0 to {self.vocab_size - 1}")
        return self.vocabulary.text(int(token))

    def token_bytes(self) -> np.ndarray:
        """How many bytes of UTF-8 each token stands for: (V,) int64, 0 for specials. Their sum over a text is exact
        (if the vocabulary normalises text without loss of meaning, NFC say: of the normalised text).

        Raises TokenizerError where tokens stand for no certain number of bytes, as those of `bert` do.
        """
        if not self.counts_bytes:
            raise TokenizerError(
                f"the tokens of this {self.kind} vocabulary stand for no certain number of bytes",
                f"{self.folder} normalises text before cutting it, or does not spell it in bytes",
                "take the bytes of each document from the shards",
            )
        return self.vocabulary.sizes()


def open_tokenizer(folder: Path | str) -> Tokenizer:
    """The tokenizer published in `folder`, every file checked against the index. Raises TokenizerError."""
    folder = Path(folder)
    index = read_index(folder, TokenizerError, MADE_BY, stage="tokenizer")
    found = faults(folder, index)
    if found:
        remedy = f"copy it again from where it was made, or make it again with: {MADE_BY}"
        raise TokenizerError(f"{folder} is not the tokenizer that was published", *found, remedy)
    engine = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    engine.encode_special_tokens = True  # not stored in tokenizer.json: "[SEP]" in a corpus is five characters
    return Tokenizer(engine, index, folder)


def _check_scalar_values(text: str, number: int) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TokenizerError(
            "the text is not valid Unicode",
            f"text {number} of the batch, character {error.start + 1}: lone surrogate {text[error.start]!a}",
            "repair or remove the text",
        ) from None
