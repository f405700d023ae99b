"""What only the whole corpus can tell: which documents and paragraphs are copies of others.

Memory: as duplicates.py says. Signatures and band keys stay on disk.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pretrain.cleaning.chunk import EXACT, NEAR, CleanPiece, load
from pretrain.cleaning.corpus_wide.duplicates import NONE, Duplicates, Twins, bands_of, exact_twins, near_twins
from pretrain.cleaning.corpus_wide.ngrams import combined
from pretrain.cleaning.report.funnel import WHAT, Funnel

SMALL = {  # the arrays that are kept in memory
    "sources": np.uint16,
    "heldout": bool,
    "bytes": np.uint32,
    "hashes": np.uint64,
    "paragraphs": np.uint64,
    "paragraph_counts": np.uint32,
}
BINS = 20  # of similarity, from 0 to 1
REASONS = {  # is it held out, is the one it repeats
    (False, False): "it repeats an earlier document",
    (False, True): "it repeats a held-out document",
    (True, True): "held out, it repeats an earlier held-out document",
}


@dataclass(frozen=True)
class DocumentRows:
    """Numbers of all documents, in the corpus's order, and of all their long paragraphs."""

    sources: np.ndarray  # (rows,) uint16, numbers of the recipe's sources
    heldout: np.ndarray  # (rows,) bool
    bytes: np.ndarray  # (rows,) uint32, of cleaned text
    hashes: np.ndarray  # (rows,) uint64
    paragraphs: np.ndarray  # (paragraphs,) uint64
    paragraph_counts: np.ndarray  # (rows,) uint32
    signatures: np.ndarray  # (rows, permutations) uint32, mapped
    keys: np.ndarray  # (bands, rows) uint64, mapped


@dataclass(frozen=True)
class Verdict:
    exact: np.ndarray  # (rows,) int64: the row that a document is a copy of, or NONE
    near: Twins
    stays: np.ndarray  # (rows,) bool
    repeated: np.ndarray  # (paragraphs,) bool: a copy of an earlier one


def gather(folder: Path, pieces: list[CleanPiece], duplicates: Duplicates) -> DocumentRows:
    """The arrays of all pieces, each as one."""
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
    """A new array in a file. Its room is taken at once: on a full disk an OSError here, a bus error when written to."""
    found = np.lib.format.open_memmap(path, "w+", dtype, shape)
    if hasattr(os, "posix_fallocate"):  # not on macOS
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return found


def judge(rows: DocumentRows, duplicates: Duplicates) -> Verdict:
    """Exact copies first, then near ones of what is left, then paragraphs of what is left then."""
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
    """Rows whose text the report shows: copies by step and source, and a pair for each bin of similarity."""

    copies: dict[str, dict[int, list[int]]]
    pairs: dict[int, int]  # bin → row; the other one is its nearest


def pick(rows: DocumentRows, verdict: Verdict, samples: int) -> Picked:
    copies = {}
    for step, first in ((EXACT, verdict.exact), (NEAR, verdict.near.first)):
        gone = np.flatnonzero(first != NONE)
        sources = rows.sources[gone]
        copies[step] = {int(source): _drawn(gone[sources == source], samples) for source in np.unique(sources)}
    bins = bins_of(verdict.near.similarity)
    pairs = {number: _drawn(np.flatnonzero(bins == number), 1) for number in range(BINS)} if samples else {}
    return Picked(copies, {number: drawn[0] for number, drawn in pairs.items() if drawn})


def shown(picked: Picked, verdict: Verdict) -> np.ndarray:
    """(rows,) bool: what `picked` needs the text of."""
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
    """Enter exact and near copies into `funnel`; `names` are the sources', `excerpts` the texts of what was picked."""
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
                of = int(((rows.heldout[gone] == own) & (rows.heldout[first[gone]] == others)).sum())
                flow.reasons.update({reason: of} if of else {})
            for place, row in enumerate(picked.copies[step].get(number, [])):
                why = REASONS[bool(rows.heldout[row]), bool(rows.heldout[first[row]])]
                similar = {"similarity": _similarity(verdict, row)} if step == NEAR else {}
                sample = {"where": excerpts[row]["where"], "why": why, **similar, "text": excerpts[row]["text"]}
                flow.dropped.append((f"{place:09d}", {**sample, "like": excerpts[int(first[row])]}))
        before = after


def histogram(verdict: Verdict, picked: Picked, excerpts: dict) -> list[dict]:
    """Documents by their similarity to the nearest of those they were compared with, and a pair to look at for each."""
    bins, dropped = bins_of(verdict.near.similarity), verdict.near.first != NONE
    found = []
    for number in range(BINS):
        mine = bins == number
        entry = {"from": number / BINS, "to": (number + 1) / BINS}
        entry |= {"documents": int(mine.sum()), "dropped": int((mine & dropped).sum())}
        if number in picked.pairs:
            row = picked.pairs[number]
            pair = [excerpts[row], excerpts[int(verdict.near.nearest[row])]]
            entry |= {"similarity": _similarity(verdict, row), "pair": pair}
        found.append(entry)
    return found


def bins_of(similarity: np.ndarray) -> np.ndarray:
    """(rows,) int: the bin of each; -1 where nothing was compared."""
    return np.where(np.isnan(similarity), -1, np.minimum(np.nan_to_num(similarity) * BINS, BINS - 1)).astype(np.int64)


def _similarity(verdict: Verdict, row: int) -> float:
    return round(float(verdict.near.similarity[row]), 3)


def _drawn(rows: np.ndarray, samples: int) -> list[int]:
    """The rows of the smallest hashes: the same choice whatever process asks."""
    return rows[np.argsort(combined([rows.astype(np.uint64)]), kind="stable")[:samples]].tolist()


def _priority(heldout: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The rows that count, those held out first."""
    return np.concatenate([np.flatnonzero(counts & heldout), np.flatnonzero(counts & ~heldout)])
