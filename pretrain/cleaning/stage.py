"""The stage `clean`: its configuration, its three passes, and the index that it publishes."""

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
from typing import Any

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
from pretrain.corpus import (
    CHUNK_BYTES,
    SIDES,
    CleanedCorpus,
    Corpus,
    Shares,
    Skipped,
    check_apart,
    listing,
    open_corpus,
)
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
# The steps that change the n-grams of a text; an evaluation item is also looked for as these steps leave it. The other
# steps drop documents or whole lines: after them an item might be a single line, found in any document with that line.
REWORDING = ("html", "mojibake", "unicode", "control", "script", "pii", "stopwords")
REPORT, PLOT, LIMITS = "report.json", "funnel.png", "limits.png"


class CleanConfig(StageConfig):
    """The configuration of the stage `clean`."""

    corpus: str
    """The corpus to clean: a `recipe.yaml`, a folder that holds one, a folder of this stage, or one text file."""
    out: str
    """The folder to write the cleaned corpus to."""
    steps: StepsConfig = StepsConfig()
    """The steps that clean one document, in the order in which they run."""
    decontaminate: Decontaminate = Decontaminate()
    """The evaluation texts to keep out of the corpus, and how they are found."""
    duplicates: Duplicates = Duplicates()
    """Which copies are removed: documents, near-duplicates, paragraphs."""
    samples: int = Field(5, ge=0, le=100)
    """The report shows up to this many dropped and this many changed documents for each step and source."""
    part_bytes: int = Field(128 << 20, gt=0, lt=1 << 63)
    """Bytes of text in one file of the output. A document is never divided, so a file may be larger."""
    chunk_bytes: int = free(CHUNK_BYTES, ge=1 << 10, le=1 << 30)
    """Bytes of text that a process takes at a time. Less needs less memory."""
    workers: int = free(1, ge=1)
    """Processes that work at the same time. With 1, the main process does the work."""
    plot: bool = free(True)
    """Whether to draw funnel.png and limits.png; needs matplotlib."""


def run(config: CleanConfig) -> dict:
    """Clean a corpus into `config.out` and return the index. Raises CorpusError."""
    began = time.monotonic()
    out, corpus = Path(config.out), open_corpus(config.corpus)
    if out.resolve() == Path(config.corpus).resolve():
        raise CorpusError("the output folder is the corpus itself", config.out, "choose another out=")
    check_apart(corpus, out)
    if corpus.recipe.paired:
        found = f"{config.corpus}: source {corpus.recipe.paired[0]!r} has output_field:"
        remedy = "leave this source out of the recipe that is cleaned, and give it a recipe and shards of its own"
        raise CorpusError("labelled pairs cannot be cleaned", found, remedy)
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
        report: dict[str, Any] = {
            "sources": [_source(source, funnel, cleaned.skipped, written) for source in corpus.recipe.sources],
            "all": {"steps": _listed(funnel.total()), "written": _sides(written.sides.values())},
            "decontamination": evaluated and evaluated.report(cleaned.found, config.decontaminate.share),
            "near_duplicates": _near(config.duplicates.near, verdict, picked, written.excerpts),
        }
        _check(report["all"]["steps"], config)
        write_json(folder / REPORT, report)
        if config.plot:
            plot.draw(report, folder / PLOT)
            plot.draw_limits(report, folder / LIMITS)
        unhashed = tuple(name for name in (REPORT, PLOT, LIMITS) if (folder / name).exists())
        shares = Shares({source["name"]: source["written"] for source in report["sources"]})
        index = write_index(folder, _index(config, corpus, evaluated, report["all"], shares), recorded=unhashed)
    table(report)
    shares.show(corpus.meant)
    closing_line("clean", began)
    return index


def _job(config: CleanConfig, corpus: Corpus | CleanedCorpus, work: Path) -> tuple[CleanJob, Evaluated | None]:
    """Return the settings for the processes, and the evaluation texts if there are any.

    Pieces that were made with other settings are deleted.
    """
    sources, near = corpus.recipe.sources, config.duplicates.near
    # Other processes use these packages, some of them hours later. A missing one ends the run here, at its beginning.
    for name in ("zstandard", *(["matplotlib"] if config.plot else []), *(["datasketch"] if near.use else [])):
        library(name)
    chains = {source.language: steps(config.steps, source.language) for source in sources}
    evaluated: Evaluated | None = None
    evaluation: Path | None = None
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
        "near": [near.use, near.permutations, near.units, bands_of(near)],  # the second pass alone reads the threshold
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
    """Make every piece. Return the pieces in order, and the sum of their reports."""
    pieces = []
    total = CleanedChunk(CleanPiece("", 0, 0), job.funnel(), Skipped(), FoundTexts())
    stored: deque[int] = deque()  # the stored bytes of the chunks that are being worked on
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
    """The files of the output. `left` (rows,): the bytes of text of each document that stays, 0 for the others.

    Where a file ends depends on the documents alone, so the output is the same for any `chunk_bytes`.
    """
    numbers = (np.cumsum(left, dtype=np.int64) - left) // part_bytes  # the place of its first byte decides
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
    """Write every part and return the sum of their reports."""
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
    """Raise CorpusError if a side of the cleaned corpus is empty. The error names the step that removed most of its
    documents."""
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


def _index(
    config: CleanConfig,
    corpus: Corpus | CleanedCorpus,
    evaluated: Evaluated | None,
    total: dict[str, Any],
    shares: Shares,
) -> dict:
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
    """Apply only the steps of a chain that are in REWORDING, and return the text."""
    for step in chain:
        text = step.apply(text).text if step.name in REWORDING else text
    return text


def _versions() -> dict[str, str]:
    """The versions of Unicode and of the libraries that decide the result, by name."""
    found = {"unicode": unicodedata.unidata_version}
    for name in LIBRARIES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
