"""Which side of the corpus a document is on: the one that is trained on, or the one that is held out."""

import hashlib
import unicodedata

import numpy as np

NARROW_SPACES = bytes(ord(" ") if chr(c).isspace() and c < 128 else c for c in range(256))  # for bytes.translate
WIDE_SPACES = [chr(c) for c in range(128, 0x3001) if chr(c).isspace()]


def side_of(text: str, heldout_fraction: float) -> str:
    """ "train" or "heldout", by the document's own hash: adding, renaming or reordering files moves nobody.

    The hash is of the text as read (NFC, white space folded), not of its position and not of cleaned text: or last
    month's scores would stop meaning anything. Equal documents always fall on the same side.
    """
    return "heldout" if draw_of(text) < int(heldout_fraction * 2**64) else "train"


def draw_of(text: str) -> int:
    """The hash of a text that decides its side, as a number of 64 bits."""
    data = folded(unicodedata.normalize("NFC", text))
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def folded(text: str) -> bytes:
    """`" ".join(text.split())` as UTF-8. Memory: of English 4 times the text; a string of every word takes 13 times."""
    head = text[:100]
    if len(head.encode("utf-8")) < 2 * len(head) and not any(space in text for space in WIDE_SPACES):
        # As in English: half the time of making a string of every word. Chinese has few words to make.
        data = text.encode("utf-8").translate(NARROW_SPACES)
        codes = np.frombuffer(data, np.uint8)
        # Two spaces, or something as rare; `b"  " in data` takes three times as long.
        if (codes[1:] | codes[:-1]).min(initial=255) <= ord(" "):
            while b"  " in data:
                data = data.replace(b"  ", b" ")
        return data.strip(b" ")
    return " ".join(text.split()).encode("utf-8")
