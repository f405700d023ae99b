"""The configuration of the stage `tokenizer`."""

from dataclasses import fields
from typing import Literal

from pydantic import Field, model_validator

from pretrain.config import StageConfig, free
from pretrain.tokenizer.kinds import RESERVED, ROLES, SPECIALS, Rules
from pretrain.tokenizer.training.count import MAX_DISTINCT

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

    criterion: Literal["bpe", "wordpiece"] = "bpe"  # what is merged first: see merge.py, with what was measured
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


def _said(value: object) -> str:
    """As YAML has it."""
    return str(value).lower() if isinstance(value, bool) else str(value)
