"""A vocabulary from text: words counted, symbols merged, marks and reserved slots set beside them."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path

import tokenizers

from pretrain.corpus import Corpus, Document, Shares, Skipped
from pretrain.corpus.spool import Aside
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
class Made:
    """A vocabulary before it is published, and what its index and its report say of where it comes from."""

    vocabulary: Vocabulary
    kind: str
    rules: Rules | None  # None: how it cuts text is not ours
    specials: dict[str, int]  # by role
    special_tokens: dict[str, int]  # the others, by text
    reserved: list[int]
    lossless: bool  # decoding gives back the text that was encoded
    counts_bytes: bool  # every token stands for a certain number of bytes
    identity: dict  # of its index
    recorded: dict
    report: dict
    heldout: Iterable[Document]  # to be measured on, read once
    skipped: Skipped  # records that gave no document: all of them when `heldout` is read
    shares: Shares  # of both sides of each source: all of them when `heldout` is read
    words: Counter[str] | None = None  # of the train text, those that were learned from
    characters: set[str] = frozenset()  # of the train text, as normalised
    parents: tuple[Vocabulary, ...] = ()  # what it extends: measured beside it


def train(config: TokenizerConfig, corpus: Corpus) -> Made:
    """The vocabulary that the train side of `corpus` gives.

    Raises CorpusError when a side is empty or has no words, TokenizerError when a special token is a word or the
    alphabet does not fit.
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
            "look at the text, or take a kind that keeps every character: byte",
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


def made(tokens: list[str], rules: Rules, special_tokens: Sequence[str], **rest) -> Made:
    """The vocabulary with these tokens, cut by our rules."""
    engine = build(tokens, rules, special_tokens)
    ids = {token: number for number, token in enumerate(tokens)}
    specials = {role: ids[token] for role, token in SPECIALS[rules.kind].items()}
    extra = {token: ids[token] for token in special_tokens}
    reserved = [n for token, n in ids.items() if is_reserved(token) and token not in extra]
    return Made(
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


def read(config: TokenizerConfig, corpus: Corpus, rules: Rules) -> tuple[Counted, Aside]:
    """The words of the train side, and the held-out documents. Raises CorpusError if a side is empty."""
    heldout = Aside(Path(config.out).parent)
    options = {"workers": config.workers, "max_distinct": config.max_distinct, "seed": config.sample_seed}
    counted = count_corpus(corpus, rules, heldout, **options)
    check_sides(config.corpus, counted.seen)
    return counted, heldout


def characters_of(words: Iterable[str], kind: str) -> set[str]:
    """The characters of words as they are counted: those of `byte` are written in its symbols."""
    text = "".join(words)
    if kind == "byte":
        text = text.translate({ord(symbol): byte for symbol, byte in byte_of_symbol().items()})
        text = text.encode("latin-1").decode("utf-8")
    return set(text)


def filled(tokens: list[str], multiple_of: int, kind: str) -> list[str]:
    """`tokens`, and as many reserved slots as a size that is a multiple needs."""
    return [*tokens, *islice(free_slots(tokens, kind), -len(tokens) % multiple_of)]


def free_slots(tokens: list[str], kind: str) -> Iterator[str]:
    """Names of reserved slots that are not among `tokens`: [unused0], [unused1] …"""
    known = set(tokens)
    return (slot for slot in map(RESERVED[kind].format, count()) if slot not in known)


def check_special_tokens(special_tokens: Sequence[str], rules: Rules) -> None:
    """Raise TokenizerError for a special token that is also a word or the beginning of one: text could spell it."""
    engine = build(list(SPECIALS[rules.kind].values()), rules)
    for token in special_tokens:
        if _spelled(token, rules.kind, engine):
            raise TokenizerError(
                f"the special token {token!r} could not be told from text",
                "it is a word, or the beginning of one, and text is never a special token",
                f"write it as no word is written, such as {'[DOC]' if rules.kind == 'bert' else '<|doc|>'}",
            )


def _spelled(token: str, kind: str, engine: tokenizers.Tokenizer) -> bool:
    """Whether merging could make the token: a prefix of a word, as the vocabulary writes it."""
    if token.startswith(PREFIX[kind]):
        return True
    if kind == "byte":
        byte = byte_of_symbol()
        if not byte.keys() >= set(token):
            return False
        try:
            token = bytes(map(byte.__getitem__, token)).decode("utf-8")
        except UnicodeDecodeError:  # a part of a character
            return True
    # `'l` is two words, but the beginning of `'ll`, which is one.
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
