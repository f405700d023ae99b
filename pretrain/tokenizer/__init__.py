"""WordPiece vocabularies: trained here by deterministic code, opened here by every later stage.

There are two kinds. `bert` is for encoders and is stock BERT: it normalises text and isolates Chinese characters.

    Héllo 漢字 playing   →  [CLS] hello 漢 字 play ##ing [SEP]

`byte` is for decoders and is lossless: WordPiece over the bytes of UTF-8, each written as one printable character. Its
continuation prefix is outside those 256 characters (`##` would not do, because `#` is one of them).

    low 漢 lowest        →  low Ġ ‿æ ‿¼ ‿¢ Ġlow ‿est <eod>

Training counts words, then repeatedly merges the best pair of symbols (the most frequent pair, as byte-pair encoding
does, or the pair that adds most likelihood, as WordPiece was published), and writes the symbols as WordPieces. We do
not use the trainer of `tokenizers`, because it gives a different vocabulary in every run (upstream issue 1794). Here
the same text and settings give the same tokenizer.json, byte for byte, for any order of the documents, number of
workers, thread count and hash seed: counts do not depend on order, and the strings of the tokens break ties.

A vocabulary made elsewhere can be adopted, whatever its model is. It gets the template of `bert` or of `byte`, and that
is its kind. A vocabulary made here can be extended.
"""

from pretrain.tokenizer.config import TokenizerConfig
from pretrain.tokenizer.kinds import Rules
from pretrain.tokenizer.stage import run
from pretrain.tokenizer.tokenizer import Tokenizer, open_tokenizer

__all__ = ["Rules", "Tokenizer", "TokenizerConfig", "open_tokenizer", "run"]
