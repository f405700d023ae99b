"""The configuration of the stage `tokenizer`."""

from dataclasses import fields
from typing import Any, Literal

from pydantic import Field, model_validator

from pretrain.config import StageConfig, free
from pretrain.tokenizer.kinds import RESERVED, ROLES, SPECIALS, Rules
from pretrain.tokenizer.training.count import MAX_DISTINCT

# The keys that determine the result, and for each the ways of making a vocabulary that accept it.
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
    """The configuration of the tokenizer stage. It trains a vocabulary unless `adopt` or `extend` is set."""

    corpus: str
    """A recipe.yaml, a folder that holds one, a folder of the stage `clean`, or a text file."""
    out: str
    """The folder that the tokenizer is published in."""
    kind: Literal["bert", "byte"] | None = None
    """`bert` is a WordPiece vocabulary, `byte` a byte-level one that keeps every character. The kind of an
    adopted vocabulary follows from its special tokens.
    """
    vocab_size: int | None = Field(None, gt=0)
    """The largest number of tokens. On a small corpus, merging stops earlier."""
    multiple_of: int = Field(1, gt=0, le=1 << 16)
    """`vocab_size` is rounded up to a multiple of this."""

    lowercase: bool | None = None
    """Whether text is lower-cased; null: yes. Only for `kind: bert`."""
    strip_accents: bool | None = None
    """Whether é becomes e; null: the same as `lowercase`, as in BERT. Only for `kind: bert`."""
    digits: Literal["whole", "single"] = "whole"
    """`single` makes every digit a word of its own, so 2024 is four words."""
    width: Literal["keep", "fold"] = "keep"
    """`fold` applies Unicode NFKC first, so ＡＢＣ，１２ becomes ABC,12. Only for `kind: bert`."""
    alphabet_min_count: int = Field(1, gt=0)
    """Characters that train text has less often than this become [UNK]. Only for `kind: bert`."""

    special_tokens: list[str] = []
    """Further special tokens beside our own. In a corpus, their strings are ordinary text."""
    sentinels: int = Field(0, ge=0, le=10_000)
    """The number of special tokens `<extra_id_0>` … that are added to `special_tokens`. They stand for missing spans in
    the objective span_corruption, and 100 are usual."""
    reserved: int = Field(0, ge=0, le=1 << 20)
    """The number of slots `[unused0]` … (byte: `<unused0>` …) that are kept free for tokens of later users."""

    criterion: Literal["bpe", "wordpiece"] = "bpe"
    """Which pair is merged next: for `bpe` the most frequent one, for `wordpiece` the one that raises the likelihood
    of the training text most. `bpe` gives more characters per token.
    """
    max_distinct: int = Field(MAX_DISTINCT, gt=0)
    """The largest number of distinct words in memory; a word counts once for every 8 bytes. The default takes up
    to 3.5 GB. If the text has more, only half of the documents are counted, or a quarter, and so on: a hash
    chooses them, and the report says how many there were.
    """
    sample_seed: int = Field(0, ge=0, lt=2**64)
    """The seed of the hash that chooses documents where `max_distinct` is exceeded."""
    workers: int = free(1, ge=1)
    """The number of processes that count words. The vocabulary does not depend on it."""

    adopt: str | None = None
    """A vocab.txt, a tokenizer.json, or a folder with one of them; its tokens keep their ids."""
    roles: dict[str, str] = {}
    """The special token of a role, such as `{eod: </s>}`, if the files of an adopted vocabulary do not name it."""
    extend: str | None = None
    """A folder of this stage. Its tokens keep their ids, and new tokens follow them."""

    plot: bool = True
    """Whether to draw report.png; needs matplotlib."""

    @model_validator(mode="before")
    @classmethod
    def _with_sentinels(cls, values: Any) -> Any:
        """Write the sentinels out as special tokens."""
        said = str(values.get("sentinels")) if isinstance(values, dict) else ""
        count = int(said) if said.isdecimal() else 0  # values of a file or the command line are still text
        given = values.get("special_tokens", []) if count else None
        if not isinstance(given, list) or not 0 < count <= 10_000:
            return values
        return {**values, "sentinels": 0, "special_tokens": [*given, *(f"<extra_id_{n}>" for n in range(count))]}

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
                owner = "one of ours" if token in known else "a reserved slot" if token in slots else "in the list"
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
        assert self.vocab_size is not None, "an adopted vocabulary has its own size"
        return -(-self.vocab_size // self.multiple_of) * self.multiple_of

    @property
    def options(self) -> dict:
        """The options that determine the result, except the rules."""
        return {key: getattr(self, key) for key, ways in KEYS.items() if self.way in ways and key not in RULES}

    @property
    def rules(self) -> Rules:
        """How the vocabulary to be trained splits text into words."""
        assert self.kind is not None, "only a vocabulary to be trained has rules of the configuration"
        lowercase = self.kind == "bert" and self.lowercase is not False
        strip_accents = lowercase if self.strip_accents is None else self.strip_accents
        return Rules(self.kind, lowercase, strip_accents, self.digits, self.width)


def _said(value: object) -> str:
    """`value` as YAML writes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)
