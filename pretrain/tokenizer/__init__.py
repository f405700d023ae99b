"""WordPiece vocabularies: trained here by deterministic code, opened here by every later stage.

Two kinds. `bert` is stock BERT, text normalised and Chinese characters isolated, for encoders:

    Héllo 漢字 playing   →  [CLS] hello 漢 字 play ##ing [SEP]

`byte` loses nothing, for decoders: WordPiece over the bytes of UTF-8, each shown as one printable character, with a
continuation prefix from outside those 256 (`#` is one of them, hence not `##`):

    low 漢 lowest        →  low Ġ ‿æ ‿¼ ‿¢ Ġlow ‿est <eod>

Training counts words, then merges the best pair of symbols again and again (the most frequent one, as byte-pair
encoding does, or the likeliest, as WordPiece was published), and writes the symbols down as WordPieces. The trainer of
`tokenizers` is not used: it gives another vocabulary in every run (upstream issue 1794). The same text and settings
give the same tokenizer.json here, byte for byte, whatever the order of the documents, the number of workers, the thread
count or the hash seed: counts do not depend on order, and ties are broken by the strings.

A vocabulary made elsewhere can be adopted, whatever its model (adopting.py): it gets one of the two templates and is
then `bert` or `byte` by it. One of ours can be extended (extending.py).
"""

import platform
import time
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Literal

import numpy as np
import tokenizers
from pydantic import Field, model_validator

from pretrain.config import StageConfig, free
from pretrain.corpus import open_corpus
from pretrain.errors import TokenizerError
from pretrain.folders import faults, publish, read_index, write_index, write_json
from pretrain.progress import closing_line
from pretrain.tokenizer import files, plot, report
from pretrain.tokenizer.adopting import ROLES, adopt
from pretrain.tokenizer.counting import MAX_DISTINCT
from pretrain.tokenizer.encoding import Encoder, split
from pretrain.tokenizer.extending import extend
from pretrain.tokenizer.kinds import RESERVED, SPECIALS, Rules
from pretrain.tokenizer.training import train
from pretrain.tokenizer.vocabulary import Vocabulary

FORMAT = 2  # 1 had no rules
MADE_BY = "python launch/tokenizer.py CONFIG.yaml"

# The keys that make the result, and the ways to a vocabulary that take them.
KEYS = {
    "kind": ("train", "adopt"),
    "vocab_size": ("train", "extend"),
    "multiple_of": ("train", "adopt", "extend"),
    "lowercase": ("train", "adopt"),
    "strip_accents": ("train", "adopt"),
    "digits": ("train",),
    "width": ("train",),
    "alphabet_min_count": ("train", "extend"),
    "special_tokens": ("train", "adopt", "extend"),
    "reserved": ("train", "adopt", "extend"),
    "criterion": ("train", "extend"),
    "max_distinct": ("train", "extend"),
    "sample_seed": ("train", "extend"),
    "roles": ("adopt",),
}
RULES = tuple(field.name for field in fields(Rules))


class TokenizerConfig(StageConfig):
    """What `launch/tokenizer.py` reads: trains a vocabulary, unless it is told to adopt or to extend one."""

    corpus: str  # recipe.yaml, a folder that holds one, or a text file
    out: str
    kind: Literal["bert", "byte"] | None = None  # an adopted one's is seen from its special tokens
    vocab_size: int | None = Field(None, gt=0)  # at most; a small corpus has fewer merges to offer
    multiple_of: int = Field(1, gt=0, le=1 << 16)  # the size is one: vocab_size is rounded up, then slots are added

    lowercase: bool | None = None  # bert only, default true
    strip_accents: bool | None = None  # bert only, default as lowercase, as BERT has it: é becomes e
    digits: Literal["whole", "single"] = "whole"  # single: 2024 is four words
    width: Literal["keep", "fold"] = "keep"  # bert only; fold: Unicode NFKC first, so ＡＢＣ，１２ becomes ABC,12
    alphabet_min_count: int = Field(1, gt=0)  # bert only: characters seen less often in train text become [UNK]

    special_tokens: list[str] = []  # besides our own; text never becomes one unless `encode_batch` is asked to
    reserved: int = Field(0, ge=0, le=1 << 20)  # slots [unused0] … (byte: <unused0> …) for the tokens of later users

    criterion: Literal["bpe", "wordpiece"] = "bpe"  # what is merged first: see merging.py, with what was measured
    # Distinct words that are held, one of more than 8 bytes for every 8: the default takes up to 3.5 GB. When there are
    # more, half of the documents are counted, or a quarter …, chosen by a hash: the report says how many.
    max_distinct: int = Field(MAX_DISTINCT, gt=0)
    sample_seed: int = Field(0, ge=0, lt=2**64)
    workers: int = free(1, ge=1)  # processes that count; the vocabulary is the same

    adopt: str | None = None  # a vocab.txt, a tokenizer.json or a folder with one: taken as it is
    roles: dict[str, str] = {}  # special tokens of an adopted one by role, where its files do not say: {eod: </s>}
    extend: str | None = None  # a folder of this stage: its tokens keep their ids, new ones come behind

    plot: bool = True  # report.png; needs matplotlib

    @model_validator(mode="after")
    def _one_way(self) -> "TokenizerConfig":
        if self.adopt and self.extend:
            raise ValueError("adopt and extend are two ways to a vocabulary: remove one")
        for key, ways in KEYS.items():
            value = getattr(self, key)
            if self.way not in ways and value != type(self).model_fields[key].default:
                reason = {
                    "train": "is for adopted vocabularies: set adopt, or",
                    "adopt": f"contradicts adopt = {self.adopt}, which is taken as it is:",
                    "extend": f"contradicts extend = {self.extend}, which has its own:",
                }[self.way]
                raise ValueError(f"{key} = {_said(value)} {reason} remove {key}")
        for key in ("kind", "vocab_size"):
            if getattr(self, key) is None and self.way in KEYS[key] and self.way != "adopt":
                raise ValueError(f"{key} is missing" + (" (or adopt, or extend)" if key == "kind" else ""))
        return self

    @model_validator(mode="after")
    def _byte_is_lossless(self) -> "TokenizerConfig":
        for key, kept in (("lowercase", False), ("strip_accents", False), ("width", "keep"), ("alphabet_min_count", 1)):
            value = getattr(self, key)
            if self.kind == "byte" and value not in (kept, None):
                reason = f"contradicts kind = byte, which keeps every character: remove {key}"
                raise ValueError(f"{key} = {_said(value)} {reason}")
        return self

    @model_validator(mode="after")
    def _special_tokens(self) -> "TokenizerConfig":
        known = [token for kind, tokens in SPECIALS.items() if self.kind in (kind, None) for token in tokens.values()]
        slots = {slot.format(n) for slot in RESERVED.values() for n in range(self.reserved)}
        for number, token in enumerate(self.special_tokens):
            if not token or any(c.isspace() or not c.isprintable() for c in token):
                raise ValueError(f"special_tokens.{number} = {token!r}: white space and invisible characters are text")
            if token in known or token in slots or token in self.special_tokens[:number]:
                owner = "one of ours" if token in known else "a reserved slot" if token in slots else "there twice"
                raise ValueError(f"special_tokens.{number} = {token!r} is {owner} already: remove it")
        unknown = [role for role in self.roles if role not in ROLES]
        if unknown:
            raise ValueError(f"roles.{unknown[0]}: a special token has one of the roles {', '.join(ROLES)}")
        return self

    @property
    def way(self) -> str:
        return "adopt" if self.adopt else "extend" if self.extend else "train"

    @property
    def size(self) -> int:
        """The largest size the vocabulary may have: `vocab_size`, rounded up."""
        return -(-self.vocab_size // self.multiple_of) * self.multiple_of

    @property
    def options(self) -> dict:
        """What makes the result, besides the rules."""
        return {key: getattr(self, key) for key, ways in KEYS.items() if self.way in ways and key not in RULES}

    @property
    def rules(self) -> Rules:
        """How the vocabulary that is to be trained cuts text."""
        lowercase = self.kind == "bert" and self.lowercase is not False
        strip_accents = lowercase if self.strip_accents is None else self.strip_accents
        return Rules(self.kind, lowercase, strip_accents, self.digits, self.width)


def run(config: TokenizerConfig) -> dict:
    """Make a vocabulary and measure it on held-out text, publish `config.out`, return the report (report.json).

    Raises CorpusError when a side is empty, TokenizerError when the vocabulary cannot be made.
    """
    began = time.monotonic()
    if config.plot:
        plot.check()
    corpus = open_corpus(config.corpus)
    with publish(Path(config.out), "tokenizer", TokenizerError, config) as folder:
        made = {"train": train, "adopt": adopt, "extend": extend}[config.way](config, corpus)
        vocabulary, skipped = made.vocabulary, made.skipped
        measured, *before = report.measure([vocabulary, *made.parents], made.heldout)
        found = {"kind": made.kind, "vocab_size": vocabulary.size, "vocab_size_asked": config.vocab_size}
        found |= made.report | report.report(vocabulary, measured, made.words, made.characters)
        if before:
            found["parent"] = report.rates(before[0])
        if skipped:
            found["skipped"] = skipped.report()
        files.write(folder, made)
        write_json(folder / "report.json", found)
        if config.plot:
            report.draw(folder / "report.png", vocabulary, measured)
        index = {
            "stage": "tokenizer",
            "format": FORMAT,
            "kind": made.kind,
            "vocab_size": vocabulary.size,
            "options": config.options,
            "rules": made.rules and vars(made.rules),
            "specials": made.specials,
            "special_tokens": made.special_tokens,
            "reserved": made.reserved,
            "lossless": made.lossless,
            "counts_bytes": made.counts_bytes,
            "corpus": corpus.fingerprint(),
            **made.identity,
            "recorded": {
                "corpus": config.corpus,
                **made.recorded,
                "shares": made.shares.counts,
                "tokenizers": tokenizers.__version__,
                "numpy": np.__version__,
                "python": platform.python_version(),
            },
        }
        write_index(folder, index, recorded=("report.png",) if config.plot else ())
    report.show(config.out, found)
    made.shares.show(corpus.meant)
    if skipped:
        print(skipped.line())
    closing_line("tokenizer", began)
    return found


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


def _said(value: object) -> str:
    """As YAML has it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _check_scalar_values(text: str, number: int) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TokenizerError(
            "the text is not valid Unicode",
            f"text {number} of the batch, character {error.start + 1}: lone surrogate {text[error.start]!a}",
            "repair or remove the text",
        ) from None
