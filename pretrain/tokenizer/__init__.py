"""WordPiece vocabularies: trained here by deterministic code, opened here by every later stage.

Two kinds. `bert` is stock BERT, text normalised and Chinese characters isolated, for encoders:

    Héllo 漢字 playing   →  [CLS] hello 漢 字 play ##ing [SEP]

`byte` loses nothing, for decoders: WordPiece over the bytes of UTF-8, each shown as one printable character, with a
continuation prefix from outside those 256 (`#` is one of them, hence not `##`):

    low 漢 lowest        →  low Ġ ‿æ ‿¼ ‿¢ Ġlow ‿est <eod>

Training counts words, then merges the most frequent pair of symbols again and again (byte-pair encoding), and writes
the symbols down as WordPieces. The trainer of `tokenizers` is not used: it gives another vocabulary in every run
(upstream issue 1794). The same text and settings give the same tokenizer.json here, byte for byte, whatever the
order of the documents, the thread count or the hash seed: counts do not depend on order, and ties are broken by the
strings.
"""

import platform
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import tokenizers
from pydantic import Field, model_validator

from pretrain.config import Config
from pretrain.corpus import SIDES, Corpus, open_corpus
from pretrain.errors import CorpusError, TokenizerError
from pretrain.folders import faults, publish, read_index, write_index, write_json
from pretrain.tokenizer.counting import alphabet, count_words, spellable
from pretrain.tokenizer.kinds import PREFIX, SPECIALS, Rules, build, byte_of_symbol
from pretrain.tokenizer.merging import merge
from pretrain.tokenizer.report import measure

MADE_BY = "python launch/tokenizer.py CONFIG.yaml"


class TokenizerConfig(Config):
    corpus: str  # recipe.yaml, a folder that holds one, or a text file
    out: str
    kind: Literal["bert", "byte"]
    vocab_size: int = Field(gt=0)  # at most; a small corpus has fewer merges to offer
    lowercase: bool | None = None  # bert only, default true: lower case without accents, as BERT uncased
    alphabet_min_count: int = Field(1, gt=0)  # bert only: characters seen less often in train text become [UNK]

    @model_validator(mode="after")
    def _byte_is_lossless(self) -> "TokenizerConfig":
        if self.kind == "byte" and self.lowercase:
            raise ValueError("lowercase = true contradicts kind = byte, which keeps every character: remove lowercase")
        if self.kind == "byte" and self.alphabet_min_count > 1:
            raise ValueError(
                f"alphabet_min_count = {self.alphabet_min_count} contradicts kind = byte, whose alphabet is always "
                "all 256 bytes: remove alphabet_min_count"
            )
        return self

    @property
    def rules(self) -> Rules:
        lowercase = self.kind == "bert" and self.lowercase is not False
        return Rules(self.kind, lowercase, lowercase)


def run(config: TokenizerConfig) -> dict:
    """Train on the train side of the corpus, publish `config.out`, return the report (also there as report.json).

    Raises CorpusError when a side is empty, TokenizerError when the vocabulary cannot hold the alphabet.
    """
    rules = config.rules
    kind = rules.kind
    corpus = open_corpus(config.corpus)
    with publish(Path(config.out), "tokenizer", TokenizerError) as folder:
        seen = {side: Counter() for side in SIDES}
        words = count_words(_tallied(corpus, seen), rules)
        _check_sides(config.corpus, seen)
        specials = list(SPECIALS[kind].values())
        starts, continuations = alphabet(words, kind, config.alphabet_min_count)
        tokens = specials + starts + continuations
        _check_room(config, len(specials), len(tokens))
        words = spellable(words, set(starts))
        tokens = merge(words, tokens, config.vocab_size, PREFIX[kind])
        engine = build(tokens, rules)
        report = {
            "kind": kind,
            "vocab_size": len(tokens),
            "vocab_size_asked": config.vocab_size,
            "alphabet_size": len(starts),
            "merges": len(tokens) - len(specials) - len(starts) - len(continuations),
            "train": {**seen["train"], "distinct_words": len(words)},
            "heldout": measure(engine, kind, corpus.documents(("heldout",))),
        }
        _write(folder, engine, tokens, kind, rules.lowercase)
        write_json(folder / "report.json", report)
        options = {"vocab_size": config.vocab_size}
        if kind == "bert":
            options |= {"lowercase": rules.lowercase, "alphabet_min_count": config.alphabet_min_count}
        index = {
            "stage": "tokenizer",
            "kind": kind,
            "vocab_size": len(tokens),
            "options": options,
            "specials": {role: engine.token_to_id(token) for role, token in SPECIALS[kind].items()},
            "corpus": corpus.fingerprint(),
            "recorded": {
                "corpus": config.corpus,
                "tokenizers": tokenizers.__version__,
                "numpy": np.__version__,
                "python": platform.python_version(),
            },
        }
        write_index(folder, index)
    overall = report["heldout"]["overall"]
    rates = f"{overall['characters_per_token']:.2f} characters a token, {overall['unknown_rate']:.2%} unknown"
    print(f"{config.out}: {report['vocab_size']:,} entries; on held-out text {rates}")
    return report


class Tokenizer:
    """A vocabulary in use. `specials` gives ids by role: pad unk cls sep mask (bert), pad unk eod (byte)."""

    def __init__(self, engine: tokenizers.Tokenizer, index: dict, folder: Path):
        self.kind: str = index["kind"]
        self.vocab_size: int = index["vocab_size"]
        self.specials: dict[str, int] = index["specials"]
        self.fingerprint: str = index["fingerprint"]
        self.folder = folder
        self._engine = engine

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Ids (int32) of each text with its template: `[CLS] … [SEP]` or `… <eod>`. Special-token strings are text.

        Raises TokenizerError for a lone surrogate, the one thing in a `str` that has no UTF-8.
        """
        try:
            encodings = self._engine.encode_batch_fast(texts)
        except TypeError:  # what `tokenizers` says, without saying which text
            for number, text in enumerate(texts):
                _check_scalar_values(text, number)
            raise
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """Text without specials. For `byte` the very text that was encoded, if the ids are all of it."""
        return self._engine.decode([int(i) for i in ids], skip_special_tokens=True)

    def token_text(self, token: int) -> str:
        """A token to be looked at: `##ing`, or for `byte` its text (`‿ing`), with bytes that are no text as \\xe6."""
        text = self._engine.id_to_token(int(token))
        if text is None:
            raise TokenizerError(f"no token has the id {token}", f"{self.folder} has ids 0 to {self.vocab_size - 1}")
        if self.kind == "bert" or text in SPECIALS["byte"].values():
            return text
        prefix = PREFIX["byte"] if text.startswith(PREFIX["byte"]) else ""
        raw = bytes(map(byte_of_symbol().__getitem__, text.removeprefix(prefix)))
        return prefix + raw.decode("utf-8", errors="backslashreplace")

    def token_bytes(self) -> np.ndarray:
        """How many bytes of UTF-8 each token stands for: (V,) int64, 0 for specials. Their sum over a text is exact.

        Raises TokenizerError for `bert`, whose tokens stand for normalised text.
        """
        if self.kind == "bert":
            raise TokenizerError(
                "the tokens of a bert vocabulary stand for no certain number of bytes",
                f"{self.folder} normalises text before cutting it",
                "take the bytes of each document from the shards",
            )
        tokens = (self._engine.id_to_token(i) for i in range(self.vocab_size))
        sizes = np.array([len(token.removeprefix(PREFIX["byte"])) for token in tokens], dtype=np.int64)
        sizes[list(self.specials.values())] = 0
        return sizes


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


def _write(folder: Path, engine: tokenizers.Tokenizer, tokens: list[str], kind: str, lowercase: bool) -> None:
    """The files that `AutoTokenizer.from_pretrained(folder)` of transformers 4 and 5 opens with the same ids."""
    (folder / "tokenizer.json").write_bytes((engine.to_str(pretty=True) + "\n").encode("utf-8"))
    specials = SPECIALS[kind]
    if kind == "bert":
        (folder / "vocab.txt").write_bytes("".join(token + "\n" for token in tokens).encode("utf-8"))
        config = {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": lowercase,
            "strip_accents": lowercase,
            "tokenize_chinese_chars": True,
            **{f"{role}_token": token for role, token in specials.items()},
        }
    else:
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_input_names": ["input_ids", "attention_mask"],  # decoders refuse token_type_ids
            "pad_token": specials["pad"],
            "unk_token": specials["unk"],
            "eos_token": specials["eod"],
        }
    write_json(folder / "tokenizer_config.json", {**config, "clean_up_tokenization_spaces": False})


# What is refused


def _tallied(corpus: Corpus, seen: dict[str, Counter]) -> Iterator[str]:
    """The train texts; the documents of both sides are counted in `seen`."""
    for document in corpus.documents():
        tally = seen[document.side]
        tally["documents"] += 1
        tally["characters"] += len(document.text)
        tally["bytes"] += len(document.text.encode("utf-8"))
        if document.side == "train":
            yield document.text


def _check_sides(name: str, seen: dict[str, Counter]) -> None:
    train, heldout = seen["train"]["documents"], seen["heldout"]["documents"]
    if train == 0 or heldout == 0:
        raise CorpusError(
            "a vocabulary needs train documents to learn from and held-out ones to be measured on",
            f"{name} has {train} train and {heldout} held-out documents",
            "add documents (in .txt a blank line ends one), or set heldout_fraction in a recipe.yaml",
        )


def _check_room(config: TokenizerConfig, specials: int, needed: int) -> None:
    if config.vocab_size < needed:
        remedy = f"set vocab_size to {needed} or more"
        if config.kind == "bert":
            remedy += f", or alphabet_min_count above {config.alphabet_min_count} (rare characters become [UNK])"
        raise TokenizerError(
            f"vocab_size = {config.vocab_size} is too small for the alphabet",
            f"{specials} specials and {needed - specials} symbols of the alphabet need {needed}",
            remedy,
        )


def _check_scalar_values(text: str, number: int) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TokenizerError(
            "the text is not valid Unicode",
            f"text {number} of the batch, character {error.start + 1}: lone surrogate {text[error.start]!a}",
            "repair or remove the text",
        ) from None
