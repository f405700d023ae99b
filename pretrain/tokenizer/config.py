"""The configuration of the stage `tokenizer`."""

from dataclasses import fields
from typing import Literal

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

    corpus: str  # recipe.yaml, a folder that holds one, or a text file
    out: str
    kind: Literal["bert", "byte"] | None = None  # an adopted vocabulary's kind follows from its special tokens
    vocab_size: int | None = Field(None, gt=0)  # at most; merging stops earlier on a small corpus
    multiple_of: int = Field(1, gt=0, le=1 << 16)  # vocab_size is rounded up to a multiple of this

    lowercase: bool | None = None  # bert only, default true
    strip_accents: bool | None = None  # bert only: é becomes e; by default the same as lowercase, as in BERT
    digits: Literal["whole", "single"] = "whole"  # single: every digit is a word, 2024 is four words
    width: Literal["keep", "fold"] = "keep"  # bert only; fold: Unicode NFKC first, so ＡＢＣ，１２ becomes ABC,12
    alphabet_min_count: int = Field(1, gt=0)  # bert only: characters seen less often in train text become [UNK]

    special_tokens: list[str] = []  # added to our own; in a corpus their strings are ordinary text
    reserved: int = Field(0, ge=0, le=1 << 20)  # slots [unused0] … (byte: <unused0> …) for the tokens of later users

    criterion: Literal["bpe", "wordpiece"] = "bpe"  # which pair is merged first; bpe gives more characters per token
    # Distinct words held in memory; a word counts once for every 8 bytes. The default takes up to 3.5 GB. If the text
    # has more, only half of the documents are counted, or a quarter …, chosen by a hash; the report says how many.
    max_distinct: int = Field(MAX_DISTINCT, gt=0)
    sample_seed: int = Field(0, ge=0, lt=2**64)
    workers: int = free(1, ge=1)  # processes that count words; the vocabulary does not depend on it

    adopt: str | None = None  # a vocab.txt, a tokenizer.json or a folder with one; its tokens and ids are kept
    roles: dict[str, str] = {}  # role → special token of an adopted vocabulary whose files do not say it: {eod: </s>}
    extend: str | None = None  # a folder of this stage: its tokens keep their ids, and new tokens follow them

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
        """The options that determine the result, except the rules."""
        return {key: getattr(self, key) for key, ways in KEYS.items() if self.way in ways and key not in RULES}

    @property
    def rules(self) -> Rules:
        """How the vocabulary to be trained splits text into words."""
        lowercase = self.kind == "bert" and self.lowercase is not False
        strip_accents = lowercase if self.strip_accents is None else self.strip_accents
        return Rules(self.kind, lowercase, strip_accents, self.digits, self.width)


def _said(value: object) -> str:
    """`value` as YAML writes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)
