"""WordPiece vocabularies: trained here by deterministic code, opened here by every later stage.

Two kinds. `bert` is stock BERT, text normalised and Chinese characters isolated, for encoders:

    Héllo 漢字 playing   →  [CLS] hello 漢 字 play ##ing [SEP]

`byte` loses nothing, for decoders: WordPiece over the bytes of UTF-8, each shown as one printable character, with a
continuation prefix from outside those 256 (`#` is one of them, hence not `##`):

    low 漢 lowest        →  low Ġ ‿æ ‿¼ ‿¢ Ġlow ‿est <eod>

Training counts words, then merges the best pair of symbols again and again (the most frequent one, as byte-pair
encoding does, or the likeliest, as WordPiece was published), and writes the symbols down as WordPieces. The trainer of
`tokenizers` is not used: it gives another vocabulary in every run (upstream issue 1794). The same text and settings
give the same tokenizer.json here, byte for byte, whatever the order of the documents, the number of workers, the thread
count or the hash seed: counts do not depend on order, and ties are broken by the strings.

A vocabulary made elsewhere can be adopted, whatever its model (adopt.py): it gets one of the two templates and is
then `bert` or `byte` by it. One of ours can be extended (extend.py).
"""

from pretrain.tokenizer.config import TokenizerConfig
from pretrain.tokenizer.kinds import Rules
from pretrain.tokenizer.stage import run
from pretrain.tokenizer.tokenizer import Tokenizer, open_tokenizer

__all__ = ["Rules", "Tokenizer", "TokenizerConfig", "open_tokenizer", "run"]
