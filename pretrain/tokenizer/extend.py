"""Add the tokens of a new domain to a vocabulary: every old id keeps its token.

Words are first split into the pieces of the old vocabulary. The tokens merged from those pieces are appended in order
of creation. Reserved slots also keep their ids: they belong to the user who reserved them.
"""

from itertools import islice

from pretrain.corpus import CleanedCorpus, Corpus
from pretrain.errors import TokenizerError
from pretrain.tokenizer.config import TokenizerConfig
from pretrain.tokenizer.kinds import PREFIX, WORD_CHARACTERS, Rules, build
from pretrain.tokenizer.tokenizer import Tokenizer, open_tokenizer
from pretrain.tokenizer.training.count import alphabet
from pretrain.tokenizer.training.learn import (
    MadeVocabulary,
    characters_of,
    check_special_tokens,
    filled,
    free_slots,
    made,
    read,
)
from pretrain.tokenizer.training.merge import merge


def extend(config: TokenizerConfig, corpus: Corpus | CleanedCorpus) -> MadeVocabulary:
    """The vocabulary in `config.extend` with the tokens that the train side of `corpus` adds to it.

    Raises TokenizerError when it cannot be extended or leaves no room, CorpusError when a side is empty.
    """
    assert config.extend is not None, "the stage calls this only if `extend` is set"
    parent = open_tokenizer(config.extend)
    rules, tokens = _check(config, parent)
    prefix = PREFIX[parent.kind]
    check_special_tokens(config.special_tokens, rules)
    counted, heldout = read(config, corpus, rules)
    words = counted.words
    tokens += config.special_tokens
    tokens += islice(free_slots(tokens, rules.kind), config.reserved)
    characters = characters_of(words, rules.kind)
    starts, continuations = alphabet(words, rules.kind, config.alphabet_min_count)
    known = set(tokens)
    symbols = [symbol for symbol in starts + continuations if symbol not in known]
    tokens += symbols
    known.update(symbols)
    _check_room(config, parent.vocab_size, len(tokens))
    for word in [word for word in words if not _spelled(word, known, prefix)]:
        del words[word]
    model = build(tokens, rules).model
    seeds = len(tokens)

    def pieces(word: str) -> list[int]:
        return [piece.id for piece in model.tokenize(word)]

    tokens = merge(words, tokens, config.size, prefix, criterion=config.criterion, pieces=pieces)
    report = {
        "alphabet_size": len(symbols),
        "merges": len(tokens) - seeds,
        **counted.report(),
    }
    return made(
        filled(tokens, config.multiple_of, rules.kind),
        rules,
        [*parent.special_tokens, *config.special_tokens],
        words=words,
        characters=characters,
        heldout=heldout,
        skipped=counted.skipped,
        shares=counted.shares,
        report=report,
        identity={"parent": parent.fingerprint},
        recorded={"parent": config.extend},
        parents=(parent.vocabulary,),
    )


def _spelled(word: str, known: set[str], prefix: str) -> bool:
    """Whether the word can be written without the unknown token, at worst character by character."""
    return len(word) <= WORD_CHARACTERS and word[0] in known and all(prefix + c in known for c in word[1:])


def _check(config: TokenizerConfig, parent: Tokenizer) -> tuple[Rules, list[str]]:
    """The rules and the tokens of the parent. Raises TokenizerError if it cannot be extended as asked."""
    if parent.rules is None:
        raise TokenizerError(
            "this vocabulary cannot be extended",
            f"{config.extend} was adopted, and is no WordPiece vocabulary that splits words as BERT does",
            "extend a vocabulary that was trained here, or adopt one that is already extended",
        )
    if config.size <= parent.vocab_size:
        raise TokenizerError(
            f"vocab_size = {config.vocab_size} leaves no room for new tokens",
            f"{config.extend} already has {parent.vocab_size:,} tokens, which vocab_size includes",
            f"set vocab_size above {parent.vocab_size}",
        )
    if parent.kind == "byte" and config.alphabet_min_count > 1:
        said = f"alphabet_min_count = {config.alphabet_min_count} contradicts a parent of kind byte"
        raise TokenizerError(said, f"{config.extend} already has all 256 bytes", "remove alphabet_min_count")
    for token in config.special_tokens:
        number = parent.vocabulary.engine.token_to_id(token)
        if number is not None:
            raise TokenizerError(f"special_tokens: {token!r} is already a token", f"id {number} of {config.extend}")
    tokens = []
    for number in range(parent.vocab_size):
        text = parent.vocabulary.engine.id_to_token(number)
        if text is None:
            raise TokenizerError(
                "this vocabulary cannot be extended, because it has an id without a token",
                f"{config.extend} was adopted, and has no token with the id {number:,}",
                "extend a vocabulary whose ids have no gaps",
            )
        tokens.append(text)
    return parent.rules, tokens


def _check_room(config: TokenizerConfig, old: int, needed: int) -> None:
    if config.size < needed:
        raise TokenizerError(
            f"vocab_size = {config.vocab_size} is too small for the alphabet",
            f"{old} old tokens and {needed - old} new special tokens, reserved slots and characters need {needed}",
            f"set vocab_size to {needed} or more, or alphabet_min_count above {config.alphabet_min_count}",
        )
