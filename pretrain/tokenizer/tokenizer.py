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
    """An opened vocabulary: text to ids and back.

    `specials` maps roles to ids: pad unk cls sep mask (bert), pad unk eod (byte). An adopted vocabulary may lack unk.
    `lossless`: decoding gives back exactly the encoded text. `counts_bytes`: `token_bytes` works.
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

    @property
    def end(self) -> int:
        """The id of the mark that ends a document."""
        return self.specials["eod" if "eod" in self.specials else "sep"]

    def encode_batch(self, texts: list[str], special_tokens: bool = False) -> list[np.ndarray]:
        """The ids (int32) of each text in its template: `[CLS] … [SEP]` or `… <eod>`.

        The string of a special token is encoded as ordinary text, unless `special_tokens` is True.
        Raises TokenizerError for a lone surrogate, which has no UTF-8.
        """
        ids, lengths = self.encode_flat(texts, special_tokens)
        return split(ids, lengths)

    def encode_flat(self, texts: list[str], special_tokens: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all texts, concatenated, (tokens,) int32; and the number of ids of each text, (texts,) int64."""
        self._engine.encode_special_tokens = not special_tokens
        try:
            return self._encoder.encode_flat(texts)
        except (TypeError, UnicodeEncodeError):  # the error of the encoder does not name the text
            for number, text in enumerate(texts):
                _check_scalar_values(text, number)
            raise
        finally:
            self._engine.encode_special_tokens = True

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids` without special tokens: exactly the encoded text if `lossless` and the ids are complete."""
        return self._engine.decode([int(i) for i in ids], skip_special_tokens=True)

    def token_text(self, token: int) -> str:
        """A token for display: `##ing`, or for `byte` its text (`‿ing`); bytes that are no text appear as \\xe6."""
        if not 0 <= token < self.vocab_size:
            raise TokenizerError(f"no token has the id {token}", f"{self.folder} has ids 0 to {self.vocab_size - 1}")
        return self.vocabulary.text(int(token))

    def token_bytes(self) -> np.ndarray:
        """The number of UTF-8 bytes of each token: (V,) int64, 0 for specials.

        Their sum over the tokens of a text is the size of the text, as normalised. Raises TokenizerError for a
        vocabulary whose tokens have no fixed number of bytes, such as `bert`.
        """
        if not self.counts_bytes:
            raise TokenizerError(
                f"the tokens of this {self.kind} vocabulary have no fixed number of bytes",
                f"{self.folder} normalises text before it splits it, or does not spell it in bytes",
                "take the bytes of each document from the shards",
            )
        return self.vocabulary.sizes()


def open_tokenizer(folder: Path | str) -> Tokenizer:
    """Open the tokenizer in `folder` after checking every file against the index. Raises TokenizerError."""
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
