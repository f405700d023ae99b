"""The stage `clean`: its configuration, its three passes, and the index of what it publishes."""

import importlib.metadata
import shutil
import sys
import time
import unicodedata
from collections import Counter, deque
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from itertools import pairwise
from operator import attrgetter
from pathlib import Path

import numpy as np
from pydantic import Field

from pretrain.cleaning.chunk import (
    CONTAMINATION,
    PARAGRAPHS,
    VERDICT,
    CleanedChunk,
    CleanJob,
    CleanPiece,
    OutputPart,
    Written,
    clean_chunk,
    write_part,
)
from pretrain.cleaning.corpus_wide import contamination
from pretrain.cleaning.corpus_wide.contamination import Decontaminate, Evaluated, FoundTexts
from pretrain.cleaning.corpus_wide.decisions import Picked, Verdict, count, gather, histogram, judge, pick, shown
from pretrain.cleaning.corpus_wide.duplicates import Duplicates, Near, bands_of
from pretrain.cleaning.pipeline import STEPS, StepsConfig, steps
from pretrain.cleaning.report import plot
from pretrain.cleaning.report.funnel import READ, Flow, Funnel, table
from pretrain.cleaning.step import Step, library
from pretrain.config import StageConfig, free, frozen
from pretrain.corpus import CHUNK_BYTES, SIDES, Corpus, Shares, Skipped, check_apart, listing, open_corpus
from pretrain.corpus.recipe import Source
from pretrain.display.progress import closing_line, progress
from pretrain.errors import CorpusError
from pretrain.processes.pool import noted, ordered
from pretrain.storage.files import write_json
from pretrain.storage.index import write_index
from pretrain.storage.publish import publish
from pretrain.storage.work import code, kept, settled

FORMAT = 1
LIBRARIES = ("ftfy", "py3langid", "opencc", "jieba", "stopwordsiso", "datasketch", "xxhash", "numpy")
# The others drop documents, or take lines out and leave the n-grams within the rest: an evaluation item of which such a
# step left one line would be found in any document with that line.
REWORDING = ("html", "mojibake", "unicode", "control", "script", "pii", "stopwords")
REPORT, PLOT, LIMITS = "report.json", "funnel.png", "limits.png"


class CleanConfig(StageConfig):
    """What `launch/clean.py` reads."""

    corpus: str  # recipe.yaml, a folder that holds one, or one text file
    out: str
    steps: StepsConfig = StepsConfig()
    decontaminate: Decontaminate = Decontaminate()
    duplicates: Duplicates = Duplicates()
    samples: int = Field(5, ge=0, le=100)  # shown of what each step dropped and changed, per source
    part_bytes: int = Field(
        128 << 20, gt=0
    )  # of text: a file of the output is closed by the document that reaches this
    chunk_bytes: int = free(CHUNK_BYTES, ge=1 << 10, le=1 << 30)  # of text that a process takes at a time
    workers: int = free(1, ge=1)


def run(config: CleanConfig) -> dict:
    """Clean a corpus into `config.out`. Returns the index. Raises CorpusError."""
    began = time.monotonic()
    out, corpus = Path(config.out), open_corpus(config.corpus)
    if out.resolve() == Path(config.corpus).resolve():
        raise CorpusError("the output folder is the corpus itself", config.out, "choose another out=")
    check_apart(corpus, out)
    names = [source.name for source in corpus.recipe.sources]
    with publish(out, "clean", CorpusError, config) as folder:
        with kept(out, "pieces", "pieces-*/*.done", CorpusError) as work:
            each = partial(ordered, workers=config.workers)
            corpus.bounds(each)
            job, evaluated = _job(config, corpus, work)
            with listing(corpus, each):
                pieces, cleaned = _first_pass(job, config.chunk_bytes, config.workers)
            rows = gather(job.folder, pieces, config.duplicates)
            verdict = judge(rows, config.duplicates)
            picked = pick(rows, verdict, config.samples)
            parts = _parts(pieces, rows.bytes * verdict.stays, config.part_bytes)
            for name, array in zip(VERDICT, (verdict.stays, verdict.repeated, shown(picked, verdict)), strict=True):
                np.save(job.folder / f"{name}.npy", array)
            written = _third_pass(job, folder, parts, config.workers)
        shutil.rmtree(work)  # any error from here on is caused by the finished pieces: redoing them would not help
        funnel = cleaned.funnel
        if evaluated:
            for flow in (flows[CONTAMINATION] for flows in funnel.flows.values()):
                flow.dropped = [(place, evaluated.named(sample)) for place, sample in flow.dropped]
        count(funnel, rows, verdict, picked, written.excerpts, names)
        funnel.merge(written.funnel)
        report = {
            "sources": [_source(source, funnel, cleaned.skipped, written) for source in corpus.recipe.sources],
            "all": {"steps": _listed(funnel.total()), "written": _sides(written.sides.values())},
            "decontamination": evaluated and evaluated.report(cleaned.found, config.decontaminate.share),
            "near_duplicates": _near(config.duplicates.near, verdict, picked, written.excerpts),
        }
        _check(report["all"]["steps"], config)
        write_json(folder / REPORT, report)
        plot.draw(report, folder / PLOT)
        plot.draw_limits(report, folder / LIMITS)
        unhashed = tuple(name for name in (REPORT, PLOT, LIMITS) if (folder / name).exists())
        shares = Shares({source["name"]: source["written"] for source in report["sources"]})
        index = write_index(folder, _index(config, corpus, evaluated, report["all"], shares), recorded=unhashed)
    table(report)
    shares.show(corpus.meant)
    closing_line("clean", began)
    return index


def _job(config: CleanConfig, corpus: Corpus, work: Path) -> tuple[CleanJob, Evaluated | None]:
    """What the processes have to know, and the evaluation texts. Pieces that other settings left are removed."""
    sources, near = corpus.recipe.sources, config.duplicates.near
    # All that is needed, although it is used in other processes or much later: what is missing ends the run at once.
    for name in ("zstandard", "matplotlib", *(["datasketch"] if near.use else [])):
        library(name)
    chains = {source.language: steps(config.steps, source.language) for source in sources}
    evaluated = evaluation = None
    if config.decontaminate.files:
        aside = work / "preparing"
        shutil.rmtree(aside, ignore_errors=True)
        variants = [partial(_applied, chain) for chain in chains.values()]
        evaluated = contamination.prepare(config.decontaminate, variants, aside)
        evaluation = settled(work, "evaluation", evaluated.digest)
        shutil.rmtree(evaluation)
        aside.rename(evaluation)
    settings = {
        "format": FORMAT,
        "steps": config.steps.model_dump(mode="json"),
        "decontaminate": evaluated and [evaluated.digest, config.decontaminate.share],
        "near": [near.use, near.permutations, near.units, bands_of(near)],  # the threshold is for later
        "paragraphs": config.duplicates.paragraphs.model_dump(),
        "samples": config.samples,
        "heldout": corpus.bounds(),
        "sources": [source.model_dump(mode="json", exclude={"files"}) for source in sources],
        "versions": {**_versions(), "code": code("cleaning", "corpus")},
    }
    folder = settled(work, "pieces", settings)
    share = config.decontaminate.share
    return CleanJob(corpus, config.steps, config.duplicates, evaluation, share, config.samples, folder), evaluated


def _first_pass(job: CleanJob, chunk_bytes: int, workers: int) -> tuple[list[CleanPiece], CleanedChunk]:
    """The pieces in order, and what all of them add to the report."""
    pieces = []
    total = CleanedChunk(CleanPiece("", 0, 0), job.funnel(), Skipped(), FoundTexts())
    stored: deque[int] = deque()  # bytes of the chunks on their way
    with progress("cleaning", "documents", reads=job.corpus.stored) as advance:
        chunks = noted(job.corpus.chunks(chunk_bytes), attrgetter("stored"), stored)
        for cleaned in ordered(partial(clean_chunk, job), chunks, workers):
            pieces.append(cleaned.piece)
            total.funnel.merge(cleaned.funnel)
            total.skipped.merge(cleaned.skipped)
            total.found.merge(cleaned.found)
            documents = sum(flows[READ].counts["documents_in"] for flows in cleaned.funnel.flows.values())
            advance(documents, read=stored.popleft())
    if total.skipped:
        print(total.skipped.line(), file=sys.stderr)
    return pieces, total


def _parts(pieces: list[CleanPiece], left: np.ndarray, part_bytes: int) -> list[OutputPart]:
    """The files of the output; `left` (rows,) are the bytes of text of what stays, 0 for the rest.

    They are cut by documents, not by pieces: `chunk_bytes` does not show in the output.
    """
    numbers = (np.cumsum(left, dtype=np.int64) - left) // part_bytes  # a document belongs where it begins
    edges = [*np.flatnonzero(np.r_[True, numbers[1:] != numbers[:-1]][: len(left)]).tolist(), len(left)]
    begins = np.cumsum([0, *(piece.rows for piece in pieces)])
    paragraphs = np.cumsum([0, *(piece.paragraphs for piece in pieces)])
    parts = []
    for number, (first, last) in enumerate(pairwise(edges)):
        low, high = np.searchsorted(begins, first, "right") - 1, np.searchsorted(begins, last, "left")
        held = tuple(pieces[low:high])
        parts.append(OutputPart(number, first, last, held, int(begins[low]), int(paragraphs[low])))
    return parts


def _third_pass(job: CleanJob, folder: Path, parts: list[OutputPart], workers: int) -> Written:
    """Write every part; what all of them add to the report."""
    total = Written(job.funnel(), {}, {})
    with progress("writing", unit="files", total=len(parts)) as advance:
        for written in ordered(partial(write_part, job, folder), parts, max(1, min(workers, len(parts)))):
            total.funnel.merge(written.funnel)
            total.excerpts.update(written.excerpts)
            for source, sides in written.sides.items():
                for side, counts in sides.items():
                    total.sides.setdefault(source, {}).setdefault(side, Counter()).update(counts)
            advance(1)
    return total


def _check(steps: list[dict], config: CleanConfig) -> None:
    """Raise CorpusError when a side of what is left is empty, naming the step that took most of it."""
    read, left = steps[0], steps[-1]
    if not read["documents_in"]:
        raise CorpusError("the corpus holds no document", config.corpus, "add text")
    for side in SIDES:
        counted = [(_side(step, side, "in"), _side(step, side, "out"), step["step"]) for step in steps]
        if counted[-1][1]:
            continue
        name = f"{side} side of the cleaned corpus" if left["documents_out"] else "cleaned corpus"
        if not counted[0][0]:
            found = f"{config.corpus} has {read['documents_in']:,} documents, none of them on this side"
            remedy = "add text, or choose another heldout_fraction or heldout_documents"
            raise CorpusError(f"the {name} is empty", found, remedy)
        most, step = max((before - after, step) for before, after, step in counted)
        found = f"of {counted[0][0]:,} documents the step {step!r} took {most:,}"
        raise CorpusError(f"the {name} is empty", found, "loosen that step, or choose another heldout_fraction")


def _side(step: dict, side: str, way: str) -> int:
    heldout = step[f"heldout_{way}"]
    return heldout if side == "heldout" else step[f"documents_{way}"] - heldout


def _source(source: Source, funnel: Funnel, skipped: Skipped, written: Written) -> dict:
    return {
        "name": source.name,
        "language": source.language,
        "bad_records": skipped.report().get(source.name, {}),
        "steps": _listed(funnel.flows[source.name]),
        "written": _sides([written.sides.get(source.name, {})]),
    }


def _listed(flows: dict[str, Flow]) -> list[dict]:
    units = {name: entry.unit for name, entry in STEPS.items()} | {PARAGRAPHS: "paragraphs"}
    return [{"step": step, "unit": units.get(step, ""), **flow.report()} for step, flow in flows.items()]


def _sides(sources: Iterable[dict[str, Counter[str]]]) -> dict[str, dict[str, int]]:
    total = {side: Counter(documents=0, bytes=0) for side in SIDES}
    for sides in sources:
        for side, counts in sides.items():
            total[side].update(counts)
    return {side: dict(counts) for side, counts in total.items()}


def _near(near: Near, verdict: Verdict, picked: Picked, excerpts: dict) -> dict | None:
    if not near.use:
        return None
    bands, rows = bands_of(near)
    settings = {"threshold": near.threshold, "permutations": near.permutations, "bands": bands, "rows": rows}
    return {**settings, "crowded": verdict.near.crowded, "histogram": histogram(verdict, picked, excerpts)}


def _index(config: CleanConfig, corpus: Corpus, evaluated: Evaluated | None, total: dict, shares: Shares) -> dict:
    options = {name: value for name, value in frozen(config).items() if name not in ("corpus", "out")}
    options["decontaminate"] = {**options["decontaminate"], "files": evaluated and evaluated.digest}
    sources = [source.model_dump(include={"name", "language", "licence"}) for source in corpus.recipe.sources]
    return {
        "stage": "clean",
        "format": FORMAT,
        "name": corpus.recipe.name,
        "heldout_fraction": corpus.recipe.heldout_fraction,
        "sources": sources,
        "sides": total["written"],
        "options": options,
        "corpus": corpus.fingerprint(),
        "recorded": {
            "corpus": config.corpus,
            "decontaminate": config.decontaminate.files,
            "versions": _versions(),
            "shares": shares.counts,
        },
    }


def _applied(chain: list[Step], text: str) -> str:
    """What the steps of a chain that may change any n-gram make of a text."""
    for step in chain:
        text = step.apply(text).text if step.name in REWORDING else text
    return text


def _versions() -> dict[str, str]:
    """Of what decides the result beside our own code."""
    found = {"unicode": unicodedata.unidata_version}
    for name in LIBRARIES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
