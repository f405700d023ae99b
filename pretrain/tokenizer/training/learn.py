"""Learn a vocabulary from text: count words, merge symbols, and add special tokens and reserved slots."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import tokenizers

from pretrain.corpus import CleanedCorpus, Corpus, Document, Shares, Skipped
from pretrain.corpus.spool import Spool
from pretrain.errors import CorpusError, TokenizerError
from pretrain.tokenizer.config import TokenizerConfig
from pretrain.tokenizer.kinds import (
    PREFIX,
    RESERVED,
    SPECIALS,
    WORD_CHARACTERS,
    Rules,
    build,
    byte_of_symbol,
    is_reserved,
    words_of,
)
from pretrain.tokenizer.training.count import Counted, alphabet, count_corpus, drop_unspellable
from pretrain.tokenizer.training.merge import merge
from pretrain.tokenizer.vocabulary import Vocabulary


@dataclass(frozen=True)
class MadeVocabulary:
    """A vocabulary before it is published, with the entries for its index and its report."""

    vocabulary: Vocabulary
    kind: str
    rules: Rules | None  # None: it does not split text by rules of ours
    specials: dict[str, int]  # by role
    special_tokens: dict[str, int]  # the other special tokens, by text
    reserved: list[int]
    lossless: bool  # decoding gives back exactly the encoded text
    counts_bytes: bool  # every token has a fixed number of bytes
    identity: dict  # for the index, part of the fingerprint
    recorded: dict  # for the index, not part of the fingerprint
    report: dict
    heldout: Iterable[Document]  # to measure the vocabulary on; can be read once
    skipped: Skipped  # records that gave no document; complete when `heldout` has been read
    shares: Shares  # of both sides of each source; complete when `heldout` has been read
    words: Counter[str] | None = None  # the words of the train text that were learned from
    characters: Set[str] = frozenset()  # of the train text, as normalised
    parents: tuple[Vocabulary, ...] = ()  # the vocabulary that it extends, measured for comparison


def train(config: TokenizerConfig, corpus: Corpus | CleanedCorpus) -> MadeVocabulary:
    """The vocabulary learned from the train side of `corpus`.

    Raises CorpusError if a side is empty or has no words, TokenizerError if a special token could be a word or the
    alphabet does not fit into the vocabulary.
    """
    rules = config.rules
    check_special_tokens(config.special_tokens, rules)
    counted, heldout = read(config, corpus, rules)
    words = counted.words
    marks = [*SPECIALS[rules.kind].values(), *config.special_tokens]
    marks += islice(free_slots(marks, rules.kind), config.reserved)
    starts, continuations = alphabet(words, rules.kind, config.alphabet_min_count)
    seeds = marks + starts + continuations
    _check_room(config, len(marks), len(seeds))
    characters = characters_of(words, rules.kind)
    drop_unspellable(words, set(starts))
    if not words:
        raise CorpusError(
            "the train text has no word to learn from",
            f"{config.corpus}: all of it is control characters, words of more than {WORD_CHARACTERS} characters"
            f" or characters seen less than {config.alphabet_min_count} times",
            "check the text, or use kind = byte, which keeps every character",
        )
    tokens = merge(words, seeds, config.size, PREFIX[rules.kind], criterion=config.criterion)
    merges = len(tokens) - len(seeds)
    tokens = filled(tokens, config.multiple_of, rules.kind)
    report = {
        "alphabet_size": len(starts),
        "merges": merges,
        **counted.report(),
    }
    return made(
        tokens,
        rules,
        config.special_tokens,
        words=words,
        characters=characters,
        heldout=heldout,
        skipped=counted.skipped,
        shares=counted.shares,
        report=report,
        identity={},
        recorded={},
    )


def made(tokens: list[str], rules: Rules, special_tokens: Sequence[str], **rest: Any) -> MadeVocabulary:
    """The vocabulary that has these tokens and splits text by `rules`."""
    engine = build(tokens, rules, special_tokens)
    ids = {token: number for number, token in enumerate(tokens)}
    specials = {role: ids[token] for role, token in SPECIALS[rules.kind].items()}
    extra = {token: ids[token] for token in special_tokens}
    reserved = [n for token, n in ids.items() if is_reserved(token) and token not in extra]
    return MadeVocabulary(
        vocabulary=Vocabulary(engine, len(tokens), [*specials.values(), *extra.values(), *reserved]),
        kind=rules.kind,
        rules=rules,
        specials=specials,
        special_tokens=extra,
        reserved=reserved,
        lossless=rules.kind == "byte",
        counts_bytes=rules.kind == "byte",
        **rest,
    )


def read(config: TokenizerConfig, corpus: Corpus | CleanedCorpus, rules: Rules) -> tuple[Counted, Spool]:
    """The words of the train side, and the held-out documents. Raises CorpusError if a side is empty."""
    heldout = Spool(Path(config.out).parent)
    options = {"workers": config.workers, "max_distinct": config.max_distinct, "seed": config.sample_seed}
    counted = count_corpus(corpus, rules, heldout, **options)
    check_sides(config.corpus, counted.seen)
    return counted, heldout


def characters_of(words: Iterable[str], kind: str) -> set[str]:
    """The characters of counted words. The words of `byte` are written in the symbols of its alphabet."""
    text = "".join(words)
    if kind == "byte":
        text = text.translate({ord(symbol): byte for symbol, byte in byte_of_symbol().items()})
        text = text.encode("latin-1").decode("utf-8")
    return set(text)


def filled(tokens: list[str], multiple_of: int, kind: str) -> list[str]:
    """`tokens`, with reserved slots appended until the size is a multiple of `multiple_of`."""
    return [*tokens, *islice(free_slots(tokens, kind), -len(tokens) % multiple_of)]


def free_slots(tokens: list[str], kind: str) -> Iterator[str]:
    """The names of reserved slots that are not in `tokens`: [unused0], [unused1] …"""
    known = set(tokens)
    return (slot for slot in map(RESERVED[kind].format, count()) if slot not in known)


def check_special_tokens(special_tokens: Sequence[str], rules: Rules) -> None:
    """Raise TokenizerError for a special token that is a word or the beginning of one, since text could spell it."""
    engine = build(list(SPECIALS[rules.kind].values()), rules)
    for token in special_tokens:
        if _spelled(token, rules.kind, engine):
            raise TokenizerError(
                f"the special token {token!r} could not be told from text",
                "it is a word, or the beginning of one",
                f"choose a string that no word begins with, such as {'[DOC]' if rules.kind == 'bert' else '<|doc|>'}",
            )


def _spelled(token: str, kind: str, engine: tokenizers.Tokenizer) -> bool:
    """Whether merging could create the token: whether it is a prefix of a word as the vocabulary writes words."""
    if token.startswith(PREFIX[kind]):
        return True
    if kind == "byte":
        byte = byte_of_symbol()
        if not byte.keys() >= set(token):
            return False
        try:
            token = bytes(map(byte.__getitem__, token)).decode("utf-8")
        except UnicodeDecodeError:  # it is part of a character
            return True
    # `'l` is two words, but `'ll`, which begins with it, is one.
    return any(len(words_of(token + rest, engine)) <= 1 for rest in ("", "l", "e"))


def check_sides(name: str, seen: dict[str, Counter]) -> None:
    """Raise CorpusError unless both sides have documents."""
    train, heldout = seen["train"]["documents"], seen["heldout"]["documents"]
    if train == 0 or heldout == 0:
        raise CorpusError(
            "a vocabulary needs train documents to learn from and held-out ones to be measured on",
            f"{name} has {train} train and {heldout} held-out documents",
            "add documents (in .txt a blank line ends one), or set heldout_fraction or heldout_documents in a recipe",
        )


def _check_room(config: TokenizerConfig, marks: int, needed: int) -> None:
    if config.size < needed:
        remedy = f"set vocab_size to {needed} or more"
        if config.kind == "bert":
            remedy += f", or alphabet_min_count above {config.alphabet_min_count} (rare characters become [UNK])"
        slots = f" ({config.reserved} of them reserved slots)" if config.reserved else ""
        raise TokenizerError(
            f"vocab_size = {config.vocab_size} is too small for the alphabet",
            f"{marks} specials{slots} and {needed - marks} symbols of the alphabet need {needed}",
            remedy,
        )
