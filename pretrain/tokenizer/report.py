"""How well a vocabulary fits a text."""

from collections import Counter
from collections.abc import Iterator
from itertools import islice

import numpy as np
import tokenizers

from pretrain.corpus import Document
from pretrain.tokenizer.kinds import PREFIX, SPECIALS


def measure(engine: tokenizers.Tokenizer, kind: str, documents: Iterator[Document]) -> dict:
    """How well the vocabulary fits `documents`, `overall` and in `sources`; the template's tokens are not counted."""
    tokens = (engine.id_to_token(i) for i in range(engine.get_vocab_size()))
    continues = np.array([token.startswith(PREFIX[kind]) for token in tokens])  # (V,)
    unknown = engine.token_to_id(SPECIALS[kind]["unk"])
    tallies: dict[str, Counter] = {}
    while batch := list(islice(documents, 64)):
        encodings = engine.encode_batch_fast([document.text for document in batch], add_special_tokens=False)
        for document, encoding in zip(batch, encodings, strict=True):
            ids = np.array(encoding.ids, dtype=np.int64)
            begins = ~continues[ids]  # every word has one token that does, and [UNK] is a word
            alone = begins & np.append(begins[1:], True) & (ids != unknown)
            tally = tallies.setdefault(document.source, Counter())
            tally["documents"] += 1
            tally["characters"] += len(document.text)
            tally["bytes"] += len(document.text.encode("utf-8"))
            tally["tokens"] += len(ids)
            tally["unknown"] += int((ids == unknown).sum())
            tally["words"] += int(begins.sum())
            tally["whole_words"] += int(alone.sum())
    overall = sum(tallies.values(), Counter())
    return {"overall": _rates(overall), "sources": {name: _rates(tally) for name, tally in tallies.items()}}


def _rates(tally: Counter) -> dict:
    """Counts of a part of the text, and their ratios (None where it has no words at all, only control characters)."""

    def ratio(part: str, whole: str) -> float | None:
        return tally[part] / tally[whole] if tally[whole] else None

    return {
        **{key: tally[key] for key in ("documents", "characters", "bytes", "tokens", "words")},
        "characters_per_token": ratio("characters", "tokens"),
        "bytes_per_token": ratio("bytes", "tokens"),
        "tokens_per_word": ratio("tokens", "words"),
        "whole_word_share": ratio("whole_words", "words"),
        "unknown_rate": ratio("unknown", "tokens"),
    }
