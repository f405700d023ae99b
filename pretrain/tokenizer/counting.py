"""What a vocabulary is trained on: how often each word occurs, and the symbols that words are spelled with."""

from collections import Counter
from collections.abc import Iterable

from pretrain.progress import progress
from pretrain.tokenizer.kinds import CHUNK, PREFIX, SPECIALS, WORD_CHARACTERS, Rules, build, byte_of_symbol, words_of


def count_words(texts: Iterable[str], rules: Rules) -> Counter[str]:
    """How often each word occurs: exactly the words that the finished tokenizer will hand to WordPiece."""
    chunks: Counter[str] = Counter()
    with progress("counting words", "documents") as advance:
        for text in texts:
            chunks.update(CHUNK[rules.kind].findall(text))
            advance(1)
    engine = build(list(SPECIALS[rules.kind].values()), rules)
    words: Counter[str] = Counter()
    for chunk, count in chunks.items():
        for word in words_of(chunk, engine):
            words[word] += count
    return words


def alphabet(words: Counter[str], kind: str, min_count: int) -> tuple[list[str], list[str]]:
    """Symbols that begin a word, and symbols (with prefix) that continue one, each sorted by code point.

    For `bert` only characters that occur inside words get a continuation: `##汉` could never be used. Words too long
    for WordPiece are not looked at.
    """
    if kind == "byte":
        characters = sorted(byte_of_symbol())
        return characters, [PREFIX[kind] + c for c in characters]
    counts: Counter[str] = Counter()
    inside: set[str] = set()
    for word, count in words.items():
        if len(word) <= WORD_CHARACTERS:
            inside.update(word[1:])
            for character in word:
                counts[character] += count
    starts = sorted(c for c, count in counts.items() if count >= min_count)
    return starts, [PREFIX[kind] + c for c in starts if c in inside]


def spellable(words: Counter[str], characters: set[str]) -> Counter[str]:
    """The words that do not become the unknown token whatever is merged: nothing is learned from the others."""
    return Counter({w: n for w, n in words.items() if len(w) <= WORD_CHARACTERS and characters.issuperset(w)})
