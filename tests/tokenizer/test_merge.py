import itertools
import random
from collections import Counter
from decimal import Decimal, localcontext

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.tokenizer.training import chains
from pretrain.tokenizer.training.merge import merge

SEEDS = ["[UNK]", "a", "b", "##a", "##b"]


def merged_by_hand(chain: list[str], pair: tuple[str, str], prefix: str) -> list[str]:
    chain, i = list(chain), 0
    while i < len(chain) - 1:
        if (chain[i], chain[i + 1]) == pair:
            chain[i : i + 2] = [pair[0] + pair[1].removeprefix(prefix)]
        i += 1
    return chain


def likelihood(chains: dict[str, list[str]], words: dict[str, int]) -> Decimal:
    """The log likelihood of the text under the unigram model of its symbols, in nats."""
    counts = Counter()
    for word, chain in chains.items():
        for symbol in chain:
            counts[symbol] += words[word]
    total = counts.total()
    return sum((count * (Decimal(count) / total).ln() for count in counts.values()), Decimal(0))


def naive_merges(words, tokens, vocab_size, prefix, criterion="bpe", pieces=None) -> list[str]:
    """The slow reference: all pairs are counted again after every merge."""
    tokens = list(tokens)
    chains = {word: [tokens[i] for i in pieces(word)] if pieces else [] for word in words}
    if not pieces:
        chains = {word: [word[0], *(prefix + c for c in word[1:])] for word in words}
    while len(tokens) < vocab_size:
        pairs = Counter()
        for word, chain in chains.items():
            for pair in itertools.pairwise(chain):
                pairs[pair] += words[word]
        if criterion == "bpe":
            scores = {pair: count for pair, count in pairs.items() if count >= 2}
        else:
            scores, before = {}, likelihood(chains, words)
            for pair in pairs:
                after = {word: merged_by_hand(chain, pair, prefix) for word, chain in chains.items()}
                often = sum(words[word] * (len(chains[word]) - len(after[word])) for word in words)
                gain = round(likelihood(after, words) - before, 30)
                if often >= 2 and gain > 0:
                    scores[pair] = gain
        if not scores:
            break
        best = min(scores, key=lambda pair: (-scores[pair], pair))
        chains = {word: merged_by_hand(chain, best, prefix) for word, chain in chains.items()}
        new = best[0] + best[1].removeprefix(prefix)
        if new not in tokens:
            tokens.append(new)
    return tokens


WORDS = st.dictionaries(st.text(alphabet="ab", min_size=1, max_size=14), st.integers(1, 5), min_size=1, max_size=8)


@settings(max_examples=300, deadline=None)
@given(words=WORDS, room=st.integers(0, 40))
def test_merging_equals_a_naive_loop_on_repetitive_words(words, room):
    expected = naive_merges(words, SEEDS, len(SEEDS) + room, "##")
    assert merge(Counter(words), SEEDS, len(SEEDS) + room, "##") == expected


@settings(max_examples=60, deadline=None)
@given(words=WORDS, room=st.integers(0, 12))
def test_the_likeliest_merges_equal_a_naive_loop_on_repetitive_words(words, room):
    with localcontext(prec=50):
        expected = naive_merges(words, SEEDS, len(SEEDS) + room, "##", "wordpiece")
    assert merge(Counter(words), SEEDS, len(SEEDS) + room, "##", criterion="wordpiece") == expected


def made_up_words(count: int, seed: int) -> Counter[str]:
    """Words of random syllables, with counts that fall as steeply as in real text."""
    draw = random.Random(seed)
    syllables = ["ka", "to", "mi", "re", "sun", "lo", "est", "ing", "un", "aa"]
    words = ("".join(draw.choices(syllables, weights=range(10, 0, -1), k=draw.randint(1, 4))) for _ in range(count))
    return Counter({word: 1 + 3000 // (number + 1) for number, word in enumerate(words)})


def seeds_of(words: Counter[str]) -> list[str]:
    letters = sorted(set("".join(words)))
    return ["[UNK]", *letters, *("##" + c for c in letters)]


@pytest.mark.parametrize("criterion", ["bpe", "wordpiece"])
def test_merging_equals_a_naive_loop_when_counts_are_steep(criterion):
    words = made_up_words(40, seed=1)
    seeds = seeds_of(words)
    with localcontext(prec=50):
        expected = naive_merges(words, seeds, len(seeds) + 30, "##", criterion)
    assert len(expected) == len(seeds) + 30
    assert merge(words, seeds, len(seeds) + 30, "##", criterion=criterion) == expected


@pytest.mark.parametrize("seed", range(8))
def test_merging_equals_a_naive_loop_when_many_counts_are_equal(seed):
    draw = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"[: draw.choice([3, 8, 26])]
    some = ["".join(draw.choices(letters, k=draw.randint(2, 7))) for _ in range(60)]
    words = Counter({"".join(draw.choices(some, k=draw.randint(1, 2))): draw.randint(1, 9) for _ in range(150)})
    seeds = seeds_of(words)
    expected = naive_merges(words, seeds, len(seeds) + 180, "##")
    assert merge(words, seeds, len(seeds) + 180, "##") == expected


@pytest.mark.parametrize("criterion", ["bpe", "wordpiece"])
def test_the_order_of_words_and_the_stretches_they_are_sorted_in_change_nothing(criterion, monkeypatch):
    words = made_up_words(3000, seed=2)
    seeds = seeds_of(words)
    expected = merge(words, seeds, 2000, "##", criterion=criterion)
    shuffled = list(words.items())
    random.Random(3).shuffle(shuffled)
    for name, value in (("STRETCH", 1000), ("WORDS", 7)):
        monkeypatch.setattr(chains, name, value)
    assert merge(Counter(dict(shuffled)), seeds, 2000, "##", criterion=criterion) == expected


@pytest.mark.parametrize(("criterion", "first"), [("bpe", "aa"), ("wordpiece", "qu")])
def test_what_belongs_together_comes_before_what_is_frequent_if_likelihood_decides(criterion, first):
    words = Counter({"qu": 40} | {left + right: 45 for left in "abcd" for right in "abcd"})
    seeds = seeds_of(words)
    assert merge(words, seeds, len(seeds) + 1, "##", criterion=criterion) == [*seeds, first]


def test_nothing_is_merged_that_makes_the_text_less_likely():
    """Every pair of four letters is as frequent as by chance: `bpe` goes on merging, `wordpiece` does not."""
    words = Counter({left + right: 45 for left in "abcd" for right in "abcd"})
    seeds = seeds_of(words)
    assert len(merge(words, seeds, 30, "##")) == len(seeds) + 16
    assert merge(words, seeds, 30, "##", criterion="wordpiece") == seeds


def greedy(tokens: list[str]):
    """Longest match first, as WordPiece cuts a word."""
    ids = {token: number for number, token in enumerate(tokens)}

    def pieces(word: str) -> list[int]:
        found, begin = [], 0
        while begin < len(word):
            prefix = "##" if begin else ""
            end = next(end for end in range(len(word), begin, -1) if prefix + word[begin:end] in ids)
            found.append(ids[prefix + word[begin:end]])
            begin = end
        return found

    return pieces


KNOWN = st.lists(st.text("ab", min_size=2, max_size=5), max_size=6, unique=True)


@pytest.mark.parametrize("criterion", ["bpe", "wordpiece"])
@pytest.mark.parametrize("cut", [greedy, None])
@settings(max_examples=60, deadline=None)
@given(words=WORDS, room=st.integers(0, 10), known=KNOWN)
def test_merging_goes_on_from_an_existing_vocabulary(criterion, cut, words, room, known):
    """Words begin as pieces of the old vocabulary, or as characters, which first become its tokens with the old ids."""
    tokens = [*SEEDS, *known[::2], *("##" + token for token in known[1::2])]
    pieces = cut and cut(tokens)
    with localcontext(prec=50):
        expected = naive_merges(words, tokens, len(tokens) + room, "##", criterion, pieces)
    assert merge(Counter(words), tokens, len(tokens) + room, "##", criterion=criterion, pieces=pieces) == expected


@pytest.mark.parametrize("criterion", ["bpe", "wordpiece"])
def test_of_no_words_nothing_is_merged(criterion):
    assert merge(Counter(), ["a", "##a"], 9, "##", criterion=criterion) == ["a", "##a"]


def test_counts_beyond_32_bits_are_exact():
    words = Counter({"ab": 2**40, "cb": 2**40 + 1, "ad": 2**40 + 2})
    seeds = ["a", "c", "##b", "##d"]
    assert merge(words, seeds, 7, "##")[4:] == ["ad", "cb", "ab"]
