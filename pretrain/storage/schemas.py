"""The keys and types of the index of each stage.

An index with a right fingerprint can still be unreadable for this version, because a newer or older release or a tool
wrote it. `faults` compares it with these descriptions before anything else reads it. Other keys are allowed, because
nothing reads them.
"""

from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

FORMATS = {"shards": (1, 2), "tokenizer": (2,)}  # the formats that this version reads; for other stages only 1
MOST = 3  # the most faults that an error lists


def _inside(name: str) -> str:
    """Check that `name` names a file inside the folder."""
    path = PurePosixPath(name)
    if not name or "\0" in name or path.is_absolute() or ".." in path.parts:
        raise ValueError("not the name of a file inside the folder")
    return name


Count = Annotated[int, Field(ge=0, lt=2**63)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, AfterValidator(_inside)]


class IndexSection(BaseModel):
    """Base of every section of an index: exact types, and any further keys."""

    model_config = ConfigDict(strict=True, extra="allow")


class File(IndexSection):
    """The digest of a file."""

    bytes: Count
    sha256: Digest


class SourceEntry(IndexSection):
    """A source of the text, for a model card."""

    name: str
    language: str
    licence: str


class Recorded(IndexSection):
    """Places and descriptions: `check_files` looks for the folder's sources at the places, a model card names them."""

    files: dict[Name, File] = {}
    settings: dict[str, Any] = {}
    tokenizer: str | None = None
    parent: str | None = None
    shards: str | None = None
    checkpoint: str | None = None
    model: str | None = None
    name: str = ""
    sources: list[SourceEntry] = []


class Index(IndexSection):
    """The keys of any stage."""

    stage: str
    fingerprint: Digest
    files: dict[Name, File]
    recorded: Recorded = Recorded()
    tokenizer: Digest | None = None
    parent: Digest | None = None
    shards: Digest | None = None
    checkpoint: Digest | None = None
    base: str | None = None


class Side(IndexSection):
    """The counts of one side of a shard set."""

    pieces: list[Name]
    documents: Count
    tokens: Count
    raw_bytes: Count | None


class Lineage(IndexSection):
    """A set that another set was made from, as `reshard` records it."""

    shards: Digest
    documents: Annotated[list[Count], Field(min_length=2, max_length=2)] | None = None
    fraction: float | Annotated[list[float], Field(min_length=2, max_length=2)] | None = None
    seed: int | None = None
    parts: list["Lineage"] = []


class Places(Recorded):
    """The places of the sets that a set was made from."""

    parts: list[str] = []


class ShardsIndex(Index):
    """The index of a shard set."""

    kind: str
    dtype: Literal["uint16", "int32"]
    vocab_size: Annotated[int, Field(gt=0, lt=2**31)]
    specials: dict[str, Count]
    sidecars: list[Literal["raw", "origin"]] = ["raw"]  # format 1 had only `raw`
    tokenizer: Digest
    sides: dict[Literal["train", "heldout"], Side]
    split: dict[str, Any] | None = None
    seed: int | None = None
    parts: list[Lineage] = []
    recorded: Places = Places()

    @model_validator(mode="after")
    def _agree(self) -> "ShardsIndex":
        if len(self.parts) != len(self.recorded.parts):
            places = len(self.recorded.parts)
            raise ValueError(f"parts: {len(self.parts)} parts, but recorded.parts has {places}")
        for role, number in self.specials.items():
            if number >= self.vocab_size:
                raise ValueError(f"specials.{role}: {number} is no id of {self.vocab_size}")
        for name, side in self.sides.items():
            ends = ("bin", "idx", *(f"{sidecar}.npy" for sidecar in self.sidecars))
            missing = [f"{p}.{end}" for p in side.pieces for end in ends if f"{p}.{end}" not in self.files]
            if missing or not side.pieces:
                raise ValueError(f"sides.{name}.pieces: {missing[0] if missing else 'none'} is not in files")
            size = 4 if self.dtype == "int32" else 2
            tokens = sum(self.files[f"{piece}.bin"].bytes // size for piece in side.pieces)
            if tokens != side.tokens:
                raise ValueError(f"sides.{name}.tokens: {side.tokens:,}, but its files hold {tokens:,}")
            documents = sum((self.files[f"{piece}.idx"].bytes - IDX_BYTES) // 20 for piece in side.pieces)
            if documents != side.documents:
                raise ValueError(f"sides.{name}.documents: {side.documents:,}, but its files hold {documents:,}")
            if f"{name}.unigram.npy" not in self.files:
                raise ValueError(f"files: {name}.unigram.npy is missing")
        return self


IDX_BYTES = 42  # a Megatron index has 20 bytes a document and these: the header, and the end of the last document


class Rules(BaseModel):
    """The rules by which a vocabulary normalises and divides text."""

    model_config = ConfigDict(strict=True, extra="forbid")

    kind: Literal["bert", "byte"]
    lowercase: bool = False
    strip_accents: bool = False
    digits: Literal["whole", "single"] = "whole"
    width: Literal["keep", "fold"] = "keep"


class TokenizerIndex(Index):
    """The index of a tokenizer."""

    kind: Literal["bert", "byte"]
    vocab_size: Annotated[int, Field(gt=0, lt=2**31)]
    specials: dict[str, Count]
    special_tokens: dict[str, Count]
    rules: Rules | None
    lossless: bool
    counts_bytes: bool
    reserved: list[Count]

    @model_validator(mode="after")
    def _agree(self) -> "TokenizerIndex":
        if "tokenizer.json" not in self.files:
            raise ValueError("files: tokenizer.json is missing")
        for number in (*self.specials.values(), *self.special_tokens.values(), *self.reserved):
            if number >= self.vocab_size:
                raise ValueError(f"specials, special_tokens or reserved: {number} is no id of {self.vocab_size}")
        return self


class Amount(IndexSection):
    """Counts of one side."""

    documents: Count
    bytes: Count


class Share(IndexSection):
    """The counts of a source on both sides."""

    train: Amount
    heldout: Amount


class Counted(Recorded):
    """The record of a cleaned corpus: the counts of each source."""

    shares: dict[str, Share] = {}


class Split(IndexSection):
    """A source of a cleaned corpus, with its rule for the held-out side."""

    name: str
    heldout_fraction: float | None = None
    heldout_documents: int = 0
    split_characters: int | None = None


class Origin(IndexSection):
    """The corpus that was cleaned."""

    sources: list[Split] = []


class CleanIndex(Index):
    """The index of a cleaned corpus."""

    name: str
    heldout_fraction: Annotated[float, Field(ge=0, le=1)]
    sources: Annotated[list[SourceEntry], Field(min_length=1)]
    corpus: Origin = Origin()
    recorded: Counted = Counted()


class WordsIndex(Index):
    """The index of the beginnings of words."""

    shards: Digest


class Attempt(IndexSection):
    """A start of a run that led to a checkpoint."""

    from_step: Count
    branched: bool = False
    command: str | None = None
    launcher: str | None = None
    ranks: Count
    nodes: Count
    device: str
    engine: str
    precision: str
    torch: str
    pretrain: str


class ReadText(IndexSection):
    """The text that a run has read of a corpus."""

    name: str
    shards: Digest
    tokens: Count
    padding: Count
    pass_tokens: Count


class History(Recorded):
    """The record of a checkpoint. Older versions have neither entry."""

    attempts: list[Attempt] = []
    read: list[ReadText] | None = None


class CheckpointIndex(Index):
    """The index of a checkpoint."""

    step: Annotated[int, Field(ge=0, lt=10**10)]
    steps_applied: Count
    adam_began: Count = 0
    tokenizer: Digest
    settings: dict[str, Any] = {}
    corpora: list[Annotated[list[str], Field(min_length=2, max_length=2)]] | None = None
    order: Count = 1
    words: dict[str, str] = {}
    recorded: History = History()

    @model_validator(mode="after")
    def _agree(self) -> "CheckpointIndex":
        if not self.shards and not self.corpora:
            raise ValueError("shards: neither shards nor corpora are given")
        if "config.yaml" not in self.recorded.files:
            raise ValueError("recorded.files: config.yaml is missing")
        return self


class FinetuneIndex(Index):
    """The index of a fine-tuned model."""

    task: Any = None
    options: dict[str, Any] = {}


STAGES: dict[str, type[Index]] = {
    "shards": ShardsIndex,
    "tokenizer": TokenizerIndex,
    "clean": CleanIndex,
    "words": WordsIndex,
    "checkpoint": CheckpointIndex,
    "finetune": FinetuneIndex,
}


def unknown_format(index: dict) -> str | None:
    """The error text for an index whose format this version does not read; None if it reads it."""
    stage, found = index.get("stage"), index.get("format", 1)
    known = FORMATS.get(stage, (1,)) if isinstance(stage, str) else (1,)
    if type(found) is int and found in known:
        return None
    said = f"{found!a:.40}".strip("'")
    return f"its format is {said}, this version reads {' and '.join(map(str, known))}"


def faults(index: dict) -> list[str]:
    """The faults of an index, a line each: the key, the value that was found, the type that is expected."""
    stage = index.get("stage")
    kind = STAGES.get(stage, Index) if isinstance(stage, str) else Index
    try:
        kind.model_validate(index)
    except ValidationError as error:
        found = error.errors(include_url=False)
        lines = [_line(problem) for problem in found[:MOST]]
        return [*lines, f"… {len(found) - MOST} more"] if len(found) > MOST else lines
    return []


def _line(problem: ErrorDetails) -> str:
    """A validation error of pydantic as one line."""
    where = ".".join(map(str, problem["loc"]))
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "missing":
        return f"{where} is missing"
    if problem["type"] == "value_error":
        return f"{where}: {message}" if where else message
    return f"{where} is {problem['input']!a:.60}: {message[0].lower()}{message[1:]}"
