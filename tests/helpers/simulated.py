"""Make shard folders of any size that take almost no disk space, because their `.bin` files are sparse."""

from pathlib import Path

import numpy as np

from pretrain.shards.megatron import write_idx
from pretrain.storage.files import write_json
from pretrain.storage.index import INDEX, fingerprint

DOCUMENTS = 4  # per piece


def simulate(folder: Path, pieces: int, piece_tokens: int) -> Path:
    """Make shards with `pieces` pieces of `piece_tokens` zeros on the train side and one piece on the held-out side."""
    folder.mkdir(parents=True)
    names = {"train": [f"train-{n:05d}" for n in range(pieces)], "heldout": ["heldout-00000"]}
    lengths = np.full(DOCUMENTS, piece_tokens // DOCUMENTS, np.int32)
    origin = np.array([(n % 2, 10 + n) for n in range(DOCUMENTS)], [("file", "<u4"), ("number", "<u8")])
    for name in (name for side in names.values() for name in side):
        with open(folder / f"{name}.bin", "wb") as file:
            file.truncate(2 * piece_tokens)
        with open(folder / f"{name}.idx", "wb") as file:
            write_idx(file.write, DOCUMENTS, lambda: [lengths], np.dtype(np.uint16))
        np.save(folder / f"{name}.raw.npy", np.full(DOCUMENTS, 4 * lengths[0], np.uint32))
        np.save(folder / f"{name}.origin.npy", origin)
    for side in names:
        np.save(folder / f"{side}.unigram.npy", np.zeros(30_000, np.int64))
    write_json(folder / "origins.json", ["a.jsonl, line", "b.parquet, row"])
    index = {
        "stage": "shards",
        "format": 2,
        "kind": "bert",
        "dtype": "uint16",
        "vocab_size": 30_000,
        "specials": {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4},
        "tokenizer": "0" * 64,
        "corpus": "0" * 64,
        "sidecars": ["raw", "origin"],
        "sides": {
            side: {
                "pieces": found,
                "documents": DOCUMENTS * len(found),
                "tokens": piece_tokens * len(found),
                "raw_bytes": 4 * piece_tokens * len(found),
            }
            for side, found in names.items()
        },
        "files": {path.name: {"bytes": path.stat().st_size, "sha256": "0" * 64} for path in sorted(folder.iterdir())},
    }
    index["fingerprint"] = fingerprint(index)
    write_json(folder / INDEX, index)
    return folder
