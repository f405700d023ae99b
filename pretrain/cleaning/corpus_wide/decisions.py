"""The second pass: compare the whole corpus, and decide which documents and paragraphs stay.

Memory: see duplicates.py. Signatures and band keys stay on disk.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.cleaning.chunk import EXACT, NEAR, CleanPiece, load
from pretrain.cleaning.corpus_wide.duplicates import NONE, Duplicates, Twins, bands_of, exact_twins, near_twins
from pretrain.cleaning.corpus_wide.ngrams import combined
from pretrain.cleaning.report.funnel import WHAT, Funnel

SMALL: dict[str, type] = {  # the arrays that are kept in memory
    "sources": np.uint16,
    "heldout": bool,
    "bytes": np.uint32,
    "hashes": np.uint64,
    "paragraphs": np.uint64,
    "paragraph_counts": np.uint32,
}
BINS = 20  # bins of the histogram of similarities, from 0 to 1
REASONS = {  # (is the document held out, is the earlier one held out) → why it is dropped
    (False, False): "it repeats an earlier document",
    (False, True): "it repeats a held-out document",
    (True, True): "held out, it repeats an earlier held-out document",
}


@dataclass(frozen=True)
class DocumentRows:
    """The arrays of all documents, in the corpus's order, and of all their long paragraphs."""

    sources: np.ndarray  # (rows,) uint16, the number of the source in the recipe
    heldout: np.ndarray  # (rows,) bool
    bytes: np.ndarray  # (rows,) uint32, of the cleaned text
    hashes: np.ndarray  # (rows,) uint64, of the documents
    paragraphs: np.ndarray  # (paragraphs,) uint64, hashes of the long paragraphs
    paragraph_counts: np.ndarray  # (rows,) uint32, long paragraphs of each document
    signatures: np.ndarray  # (rows, permutations) uint32, a mapped file
    keys: np.ndarray  # (bands, rows) uint64, a mapped file


@dataclass(frozen=True)
class Verdict:
    """The decisions of the second pass."""

    exact: np.ndarray  # (rows,) int64: the row of the earlier document that this one copies, or NONE
    near: Twins
    stays: np.ndarray  # (rows,) bool
    repeated: np.ndarray  # (paragraphs,) bool: the paragraph repeats an earlier one


def gather(folder: Path, pieces: list[CleanPiece], duplicates: Duplicates) -> DocumentRows:
    """Join the arrays of all pieces."""
    rows, near = sum(piece.rows for piece in pieces), duplicates.near
    small = {
        name: np.concatenate([np.empty(0, dtype), *(load(folder, piece, name) for piece in pieces)])
        for name, dtype in SMALL.items()
    }
    if not near.use or not rows:
        return DocumentRows(**small, signatures=np.empty((0, 0), np.uint32), keys=np.empty((0, 0), np.uint64))
    shape = (rows, near.permutations)
    signatures = _mapped(folder / "signatures.npy", np.uint32, shape)
    keys = _mapped(folder / "keys.npy", np.uint64, (bands_of(near)[0], rows))
    row = 0
    for piece in pieces:
        signatures[row : row + piece.rows] = load(folder, piece, "signatures")
        keys[:, row : row + piece.rows] = load(folder, piece, "keys")
        row += piece.rows
    return DocumentRows(**small, signatures=signatures, keys=keys)


def _mapped(path: Path, dtype: type, shape: tuple[int, int]) -> np.ndarray:
    """A new array in a mapped file.

    The space on disk is reserved here: a full disk then raises an OSError now rather than a bus error later.
    """
    found = np.lib.format.open_memmap(path, "w+", dtype, shape)
    if hasattr(os, "posix_fallocate"):  # not on macOS
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return found


def judge(rows: DocumentRows, duplicates: Duplicates) -> Verdict:
    """Find exact copies, then near-duplicates in the rest, then repeated paragraphs in the rest of that."""
    count = len(rows.hashes)
    exact = np.full(count, NONE)
    if duplicates.documents:
        exact = exact_twins(rows.hashes, _priority(rows.heldout, np.ones(count, bool)))
    stays = exact == NONE
    near = Twins.none(count)
    if duplicates.near.use and count:
        near = near_twins(rows.signatures, rows.keys, _priority(rows.heldout, stays), duplicates.near)
        stays &= near.first == NONE
    owners = np.repeat(np.arange(count), rows.paragraph_counts)
    priority = _priority(rows.heldout[owners], stays[owners])
    repeated = exact_twins(rows.paragraphs, priority) != NONE
    return Verdict(exact, near, stays, repeated)


@dataclass(frozen=True)
class Picked:
    """The rows to show in the report: some copies for each step and source, and a pair for each bin of similarity."""

    copies: dict[str, dict[int, list[int]]]  # step → source → rows
    pairs: dict[int, int]  # bin → a row; it is shown with its nearest document


def pick(rows: DocumentRows, verdict: Verdict, samples: int) -> Picked:
    """Choose at most `samples` dropped copies for each step and source, and one pair for each bin."""
    copies = {}
    for step, first in ((EXACT, verdict.exact), (NEAR, verdict.near.first)):
        gone = np.flatnonzero(first != NONE)
        sources = rows.sources[gone]
        copies[step] = {int(source): _drawn(gone[sources == source], samples) for source in np.unique(sources)}
    bins = bins_of(verdict.near.similarity)
    pairs = {number: _drawn(np.flatnonzero(bins == number), 1) for number in range(BINS)} if samples else {}
    return Picked(copies, {number: drawn[0] for number, drawn in pairs.items() if drawn})


def shown(picked: Picked, verdict: Verdict) -> np.ndarray:
    """(rows,) bool: the documents that the report shows, and the documents that they repeat."""
    found = np.zeros(len(verdict.stays), bool)
    for step, first in ((EXACT, verdict.exact), (NEAR, verdict.near.first)):
        for chosen in picked.copies[step].values():
            found[chosen] = found[first[chosen]] = True
    chosen = list(picked.pairs.values())
    found[chosen] = found[verdict.near.nearest[chosen]] = True
    return found


def count(
    funnel: Funnel, rows: DocumentRows, verdict: Verdict, picked: Picked, excerpts: dict, names: list[str]
) -> None:
    """Enter exact copies and near-duplicates into `funnel`.

    `names` are the names of the sources, `excerpts` the texts of the picked rows.
    """
    before = np.ones(len(verdict.exact), bool)
    for step, first in ((EXACT, verdict.exact), (NEAR, verdict.near.first)):
        after = before & (first == NONE)
        for number, name in enumerate(names):
            if step not in funnel.flows[name]:
                continue
            flow, mine = funnel.flows[name][step], rows.sources == number
            for way, those in (("in", before & mine), ("out", after & mine)):
                sizes = (those.sum(), rows.bytes[those].sum(dtype=np.int64), rows.heldout[those].sum())
                flow.counts.update({f"{what}_{way}": int(n) for what, n in zip(WHAT, sizes, strict=True)})
            gone = np.flatnonzero(before & mine & ~after)
            for (own, others), reason in REASONS.items():
                documents = int(((rows.heldout[gone] == own) & (rows.heldout[first[gone]] == others)).sum())
                flow.reasons.update({reason: documents} if documents else {})
            for place, row in enumerate(picked.copies[step].get(number, [])):
                why = REASONS[bool(rows.heldout[row]), bool(rows.heldout[first[row]])]
                similar = {"similarity": _similarity(verdict, row)} if step == NEAR else {}
                sample = {"where": excerpts[row]["where"], "why": why, **similar, "text": excerpts[row]["text"]}
                flow.dropped.append((f"{place:09d}", {**sample, "like": excerpts[int(first[row])]}))
        before = after


def histogram(verdict: Verdict, picked: Picked, excerpts: dict) -> list[dict]:
    """Count documents by their similarity to the nearest document they were compared with; show a pair of each bin."""
    bins, dropped = bins_of(verdict.near.similarity), verdict.near.first != NONE
    found = []
    for number in range(BINS):
        mine = bins == number
        entry: dict[str, Any] = {"from": number / BINS, "to": (number + 1) / BINS}
        entry |= {"documents": int(mine.sum()), "dropped": int((mine & dropped).sum())}
        if number in picked.pairs:
            row = picked.pairs[number]
            pair = [excerpts[row], excerpts[int(verdict.near.nearest[row])]]
            entry |= {"similarity": _similarity(verdict, row), "pair": pair}
        found.append(entry)
    return found


def bins_of(similarity: np.ndarray) -> np.ndarray:
    """(rows,) int64: the bin of each similarity; -1 for NaN, when nothing was compared."""
    return np.where(np.isnan(similarity), -1, np.minimum(np.nan_to_num(similarity) * BINS, BINS - 1)).astype(np.int64)


def _similarity(verdict: Verdict, row: int) -> float:
    return round(float(verdict.near.similarity[row]), 3)


def _drawn(rows: np.ndarray, samples: int) -> list[int]:
    """The `samples` rows with the smallest hashes: a fixed choice that looks random."""
    return rows[np.argsort(combined([rows.astype(np.uint64)]), kind="stable")[:samples]].tolist()


def _priority(heldout: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The numbers of the rows where `counts` is True, held-out rows first."""
    return np.concatenate([np.flatnonzero(counts & heldout), np.flatnonzero(counts & ~heldout)])
