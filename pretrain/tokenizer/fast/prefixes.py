"""Find the longest token at the beginning of a text, for many texts at once.

A hash table contains prefixes of the tokens, and a binary search over lengths finds the longest one in the table
(Waldvogel et al. 1997, "Scalable High Speed IP Routing Lookups", SIGCOMM, where the tokens are network prefixes). Texts
are read in blocks of 7 bytes, so that a block and its length fit into one 64-bit key, which is compared exactly. Most
words are tokens of one block, which the first lookup finds.
"""

import numpy as np

from pretrain.hashing import GOLDEN

BLOCK = 7
STEPS = (4, 2, 1)  # the search adds each to the length if the longer prefix is in the table
MASK = np.array([(1 << 8 * size) - 1 for size in range(BLOCK + 1)], np.uint64)
SIZE = np.array([size << 8 * BLOCK for size in range(BLOCK + 1)], np.uint64)
PADDING = 8  # bytes that a buffer needs after its last word, because 8 bytes are read at a time

# An entry of the table is one int64: state | next state + 1 | longest token that is a prefix of it + 1.
STATE_BITS = 20
STATE = (1 << STATE_BITS) - 1
NONE = -1


def _stations(size: int) -> list[int]:
    """The lengths that the search tries on its way to a prefix of `size` bytes. A full block is tried first."""
    found, stations = 0, []
    for step in STEPS if size < BLOCK else ():
        if found + step <= size:
            found += step
            stations.append(found)
    return stations or [size]


# PASSES[n]: the sizes whose search tries the length n on its way.
PASSES = [[size for size in range(1, BLOCK + 1) if n in _stations(size)] for n in range(BLOCK + 1)]


class Prefixes:
    """The tokens of a WordPiece vocabulary, as bytes: those that begin words, and those that continue them.

    A prefix is identified by its last block (up to 7 bytes) and a state, which stands for the blocks before that one.
    State 0: none, at the beginning of a word. State 1: none, inside a word. Others: full blocks of longer tokens.
    """

    def __init__(self, starts: dict[bytes, int], continuations: dict[bytes, int]):
        first, second = sorted(starts), sorted(continuations)
        # Tokens are numbered by their place here. `##a` has two places: at the beginning of a word `##` is text.
        self._ids = np.array([*map(starts.get, first), *map(continuations.get, second), NONE], np.int32)
        self._lengths = np.array([*map(len, first), *map(len, second), 0])
        one = _table(first, 0, 0, 2)
        two = _table(second, len(first), 1, 2 + len(one[4]))
        keys, states, tokens, onward = (np.concatenate(pair) for pair in list(zip(one, two, strict=True))[:4])
        ends = np.concatenate([[NONE, NONE], one[4], two[4]])  # the longest token that ends at or before each state
        assert len(ends) <= STATE, (len(ends), STATE)
        self._ends = (ends + 1) << 2 * STATE_BITS
        self._fill(keys, states, states | (onward + 1) << STATE_BITS | (tokens + 1) << 2 * STATE_BITS)

    def match(self, buffer: np.ndarray, starts: np.ndarray, ends: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Split the words `buffer[starts:ends]` into tokens, and write the id of each to `ids` where it begins.

        `buffer` (bytes + PADDING,) uint8, `starts` and `ends` (words,) int64, `ids` (bytes + PADDING,) int32. Returns
        the places (some,) int64 where no token matches, at most one in a word. Ids written for such a word are invalid.
        """
        windows = np.ndarray(len(buffer) - PADDING + 1, "<u8", buffer, strides=(1,))
        token_at = at = starts
        end, state, stuck = ends, np.zeros(len(starts), np.int64), []
        while len(at):
            size = np.minimum(end - at, BLOCK)
            window = windows[at]
            known = self._find(window & MASK[size] | SIZE[size], state)
            missed = np.flatnonzero(known < 0)
            if len(missed):
                known[missed] = self._search(window[missed], size[missed], state[missed])
            token = (known >> 2 * STATE_BITS) - 1
            onward = (known >> STATE_BITS & STATE) - 1
            longer = (onward >= 0) & (end > at + BLOCK)  # a longer token is possible: read the next block
            lost = ~longer & (token < 0)
            ids[token_at] = self._ids[token]  # preliminary if a longer token is possible
            after = token_at + self._lengths[token]
            live = longer | (after < end)
            if lost.any():
                stuck.append(at[lost])
                live &= ~lost
            live = np.flatnonzero(live)
            longer, after, end = longer[live], after[live], end[live]
            at = np.where(longer, at[live] + BLOCK, after)
            token_at = np.where(longer, token_at[live], after)
            state = np.where(longer, onward[live], 1)
        return np.concatenate(stuck) if stuck else np.zeros(0, np.int64)

    def _search(self, window: np.ndarray, limit: np.ndarray, state: np.ndarray) -> np.ndarray:
        """The entry of the longest prefix of `window` shorter than `limit`; the entry of the state if there is none."""
        size = np.zeros(len(window), np.int64)
        best = self._ends[state]
        for step in STEPS:
            longer = size + step
            known = self._find(window & MASK[longer] | SIZE[longer], state)
            hit = np.flatnonzero((known >= 0) & (longer < limit))
            size[hit] = longer[hit]
            best[hit] = known[hit]
        return best

    def _find(self, keys: np.ndarray, states: np.ndarray) -> np.ndarray:
        """The value stored for each (key, state), or NONE: (n,) int64."""
        mixed = _mixed(keys, states)
        slots = self._first(mixed)
        there = self._keys[slots]
        result = np.full(len(keys), NONE)
        same = np.flatnonzero(there == keys)
        known = self._known[slots[same]]
        result[same] = known
        strange = same[known & STATE != states[same]]  # the same block after other blocks
        result[strange] = NONE
        rest = np.concatenate([np.flatnonzero((there != keys) & (there != 0)), strange])
        slots = self._second(mixed[rest])
        known = self._known[slots]
        hit = (self._keys[slots] == keys[rest]) & (known & STATE == states[rest])
        result[rest[hit]] = known[hit]
        return result

    def _first(self, mixed: np.ndarray) -> np.ndarray:
        return (mixed >> np.uint64(64 - self._bits)).view(np.int64)

    def _second(self, mixed: np.ndarray) -> np.ndarray:
        return (mixed >> np.uint64(64 - 2 * self._bits) & np.uint64((1 << self._bits) - 1)).view(np.int64)

    def _fill(self, keys: np.ndarray, states: np.ndarray, known: np.ndarray) -> None:
        """Cuckoo hashing (Pagh and Rodler 2004): a key is in one of two slots; if the first is empty, it is in neither.

        So a lookup takes at most two steps. Chaining would be 10 % slower on Chinese.
        """
        mixed = _mixed(keys, states)
        self._bits = max(8, (4 * len(keys)).bit_length())  # the table is an eighth to a quarter full
        while (slots := self._placed(mixed)) is None:
            self._bits += 1
        self._keys = np.zeros(1 << self._bits, np.uint64)  # 0 means empty: every key contains a length
        self._known = np.zeros(1 << self._bits, np.int64)
        self._keys[slots], self._known[slots] = keys, known

    def _placed(self, mixed: np.ndarray) -> np.ndarray | None:
        """A slot for each key; None in the rare case that no assignment was found."""
        everyone, first, second = np.arange(len(mixed)), self._first(mixed), self._second(mixed)
        owner, slots, away = np.full(1 << self._bits, NONE), first.copy(), everyone
        for _ in range(100):
            owner[slots[away]] = away  # the last key that wants a slot gets it, the others try their other slot
            away = np.flatnonzero(owner[slots] != everyone)
            if not len(away):
                return slots
            slots[away] = np.where(slots[away] == first[away], second[away], first[away])
        return None


def _mixed(keys: np.ndarray, states: np.ndarray) -> np.ndarray:
    """(n,) uint64: a hash of each (key, state), for the table only.

    `hashing.mix` would do as well, but takes more steps, and encoding would be a tenth slower. Multiplication
    carries only upwards, so the high bytes are folded down first.
    """
    mixed = (keys ^ keys >> np.uint64(29)) + states.view(np.uint64) * np.uint64(0xD6E8FEB86659FD93)
    return mixed * GOLDEN


def _table(texts: list[bytes], place: int, root: int, fresh: int) -> tuple[np.ndarray, ...]:
    """The table entries that searches need (keys, states, longest tokens, next states), and the longest token of each
    new state.

    `texts` are sorted, so texts with a common prefix are neighbours. All of them are read in parallel, byte by byte.
    Tokens are numbered from `place`, new states from `fresh`.
    """
    sizes = np.fromiter(map(len, texts), np.int64, len(texts))
    width = int(sizes.max(initial=0))
    letters = np.frombuffer(b"".join(text.ljust(width, b"\0") for text in texts), np.uint8).reshape(-1, width or 1)
    state, best = np.full(len(texts), root), np.full(len(texts), NONE)
    block = np.zeros(len(texts), np.uint64)
    parts = np.arange(len(texts)) == 0  # whether a token differs from the one before it in the bytes read so far
    rows, ends = [(np.zeros(0, np.uint64), *(np.zeros(0, np.int64),) * 3)], list[int]()
    for depth in range(width):
        inside = depth % BLOCK + 1
        letter = letters[:, depth]
        parts[1:] |= (letter[1:] != letter[:-1]) | (sizes[:-1] <= depth)
        block |= letter.astype(np.uint64) << np.uint64(8 * (inside - 1))
        live = np.flatnonzero(sizes > depth)
        heads = parts[live]
        group = np.cumsum(heads) - 1  # the number of the common prefix that each token has
        head = live[heads]
        whole = sizes[live] == depth + 1
        longest = best[head]
        longest[group[whole]] = place + live[whole]
        best[live] = longest[group]
        onward = np.full(len(head), NONE)
        key, before = block[head] | SIZE[inside], state[head]
        if inside == BLOCK:
            longer = np.unique(group[~whole])
            onward[longer] = fresh + len(ends) + np.arange(len(longer))
            ends.extend(longest[longer].tolist())
            state[live] = onward[group]
            block[:] = 0
        wanted = np.zeros(len(head), bool)
        wanted[group[np.isin(np.minimum(sizes[live] - depth + inside - 1, BLOCK), PASSES[inside])]] = True
        rows.append((key[wanted], before[wanted], longest[wanted], onward[wanted]))
    return *(np.concatenate(column) for column in zip(*rows, strict=True)), np.array(ends, np.int64)
