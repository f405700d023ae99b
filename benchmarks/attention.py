"""Measure the ways of `attend` on a CPU: the dense mask, one document after another, and blocks of a window. Run with:

    python benchmarks/attention.py --out benchmarks/results/attention-cpu.json

Each way computes forward and backward, on one core, for windows of T tokens that hold documents of about `document`
tokens, 8 heads of 32 numbers, 4,096 tokens a batch. The ways take turns, round after round. `seconds` are medians;
`nested` is torch's nested tensors. `dense / way` above 1 says that the way is quicker than the dense mask. The prefix
is the first half of each document (`prefix`), or all of every second window (`hybrid`). Where `document` is T, a window
holds one document.
"""

import argparse
import json
import logging
import statistics
import sys
import time
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from benchmarks.measuring import machine, versions  # noqa: E402
from pretrain.model.attention import Layout, by_block, by_document  # noqa: E402

HEADS, WIDTH, TOKENS = 8, 32, 4096
PACKED = [(T, document) for T in (64, 128, 256, 512, 1024, 2048) for document in (32, 128, 512) if document < T]
PREFIX = [(T, document) for T in (128, 256, 512, 1024, 2048) for document in sorted({128, 512, T}) if document <= T]
LOCAL = [(T, window) for T in (256, 512, 1024, 2048) for window in (16, 64) if 4 * window <= T]


def dense(q, k, v, layout: Layout, window: int | None, causal: bool):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=layout.mask(window, q.dtype))


def nested(q, k, v, layout: Layout, window: None, causal: bool):
    lengths = torch.tensor([length for row in layout.lengths() for length, _ in row])
    offsets = torch.cat((torch.zeros(1, dtype=torch.long), lengths.cumsum(0)))
    heads = (
        torch.nested.nested_tensor_from_jagged(x.transpose(1, 2).flatten(0, 1), offsets).transpose(1, 2)
        for x in (q, k, v)
    )
    return F.scaled_dot_product_attention(*heads, is_causal=causal).transpose(1, 2).values()


def one_by_one(q, k, v, layout: Layout, window: None, causal: bool):
    return by_document(q, k, v, layout, 0.0)


def blocks(q, k, v, layout: Layout, window: int, causal: bool):
    return by_block(q, k, v, layout, window, 0.0)


WAYS = {
    "packed": {"dense": dense, "by document": one_by_one, "nested": nested},
    "prefix": {"dense": dense, "by document": one_by_one},
    "hybrid": {"dense": dense, "by document": one_by_one},
    "local": {"dense": dense, "by block": blocks},
}


def measure(kind: str, T: int, size: int, causal: bool, rounds: int) -> dict:
    B, generator = TOKENS // T, torch.Generator().manual_seed(0)
    heads = [torch.randn(B, HEADS, T, WIDTH, generator=generator, requires_grad=True) for _ in range(3)]
    segments, prefix, window, positions = None, None, None, torch.arange(T).expand(B, -1)
    if kind == "local":
        window = size
    elif size < T:
        begins = torch.rand(B, T, generator=generator) < 1 / size
        segments = begins.cumsum(1)
        positions = positions - torch.where(begins, positions, 0).cummax(1).values
    if kind == "prefix":
        numbers = torch.zeros(B, T) if segments is None else segments
        prefix = 2 * positions < (numbers[:, None] == numbers[:, :, None]).sum(2)
    elif kind == "hybrid":
        prefix = (torch.arange(B) % 2 == 0)[:, None].expand(B, T)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS[kind]}
    failed = {}
    for _ in range(rounds):
        for way, run in WAYS[kind].items():
            layout = Layout(segments, positions, causal, prefix)
            begin = time.perf_counter()
            try:
                run(*heads, layout, window, causal).sum().backward()
            except RuntimeError as error:  # nested tensors have no causal kernel on a CPU: the result says so
                assert way == "nested", error
                failed[way] = str(error).splitlines()[0][:100]
                continue
            seconds[way].append(time.perf_counter() - begin)
    medians = {way: statistics.median(found) for way, found in seconds.items() if found}
    row = {"kind": kind, "T": T, "window" if kind == "local" else "document": size, "causal": causal}
    row["seconds"] = {way: round(found, 5) for way, found in medians.items()}
    row["dense / way"] = {way: round(medians["dense"] / found, 2) for way, found in medians.items() if way != "dense"}
    return row | ({"failed": failed} if failed else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable()  # nested tensors explain at length that they have no kernel
    results = []
    for kind, shapes in (("packed", PACKED), ("prefix", PREFIX), ("hybrid", PREFIX), ("local", LOCAL)):
        for T, size in shapes:
            for causal in (True, False) if kind in ("packed", "local") else (True,):
                results.append(measure(kind, T, size, causal, args.rounds))
                print(json.dumps(results[-1]), flush=True)
    written = {
        "command": f"python benchmarks/attention.py --rounds {args.rounds} --out {args.out}",
        "date": date.today().isoformat(),
        "machine": machine(),
        "versions": versions("torch"),
        "attention": results,
    }
    args.out.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
