"""The work of one process: clean a chunk of the corpus into a piece, and later write a part of the output.

Each chunk becomes one piece: three files in the work folder. KEY is a hash of the chunk's content:

    KEY.jsonl.zst   the cleaned documents, one a line, in the format of the output
    KEY.npz         hashes and signatures of the documents; the second pass compares them over the whole corpus
    KEY.done        counts, samples, and the hashes of the other two files; written last. A piece that has this file
                    is not made again, unless one of the other files is damaged

Memory: one chunk, its documents as text, and 600 bytes a document.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from hashlib import sha256
from io import BytesIO
from pathlib import Path

import numpy as np

from pretrain.cleaning.corpus_wide.contamination import Evaluation, FoundTexts
from pretrain.cleaning.corpus_wide.duplicates import Duplicates, band_keys, document_hash, long_paragraphs, signature
from pretrain.cleaning.limits import Distribution, Rule
from pretrain.cleaning.pipeline import StepsConfig, steps
from pretrain.cleaning.report.funnel import READ, Flow, Funnel, excerpt
from pretrain.cleaning.step import Step, library
from pretrain.corpus import Chunk, CleanedCorpus, Corpus, Document, Skipped
from pretrain.corpus.compressed import open_file
from pretrain.storage.files import finished
from pretrain.storage.work import record, recorded

CONTAMINATION, EXACT, NEAR, PARAGRAPHS = (
    "decontamination",
    "duplicate documents",
    "near-duplicates",
    "duplicate paragraphs",
)
SHARED = "it has n-grams of an evaluation item"
# The files with the decisions of the second pass: bool arrays of shape (rows,), (paragraphs,), (rows,).
VERDICT = ("stays", "repeated", "shown")
PIECE_LEVEL, PART_LEVEL = 1, 3  # compression levels of zstd


@dataclass(frozen=True)
class CleanJob:
    """The settings that a process needs. All of them decide what a piece holds."""

    corpus: Corpus | CleanedCorpus
    steps: StepsConfig
    duplicates: Duplicates
    evaluation: Path | None  # the folder of the evaluation texts
    share: float  # a document with this share of an evaluation item's n-grams is dropped
    samples: int
    folder: Path  # of the pieces

    def funnel(self) -> Funnel:
        """An empty funnel with the steps of every source."""
        duplicates = self.duplicates
        last = {
            CONTAMINATION: self.evaluation is not None,
            EXACT: duplicates.documents,
            NEAR: duplicates.near.use,
            PARAGRAPHS: duplicates.paragraphs.use,
        }
        names = [name for name, wanted in last.items() if wanted]
        sources = self.corpus.recipe.sources
        return Funnel(
            {s.name: [READ, *(step.name for step in _steps(self.steps, s.language)), *names] for s in sources},
            self.samples,
        )


@dataclass(frozen=True)
class CleanPiece:
    key: str
    rows: int  # documents
    paragraphs: int  # those that are long enough to be compared


@dataclass(frozen=True)
class CleanedChunk:
    """A piece and its part of the report."""

    piece: CleanPiece
    funnel: Funnel
    skipped: Skipped
    found: FoundTexts  # the evaluation texts that its documents share n-grams with


def clean_chunk(job: CleanJob, chunk: Chunk) -> CleanedChunk:
    """Make the piece of a chunk. If it was finished before, read its record instead."""
    key = chunk.key
    done = job.folder / f"{key}.done"
    if (kept := recorded(done)) is not None:
        return _of_json(job, kept)
    funnel, skipped, found = job.funnel(), Skipped(), FoundTexts()
    numbers = _Numbers(job)
    chains = {source.language: _steps(job.steps, source.language) for source in job.corpus.recipe.sources}
    zstandard = library("zstandard")
    text = BytesIO()
    with zstandard.ZstdCompressor(PIECE_LEVEL).stream_writer(text, closefd=False) as writer:
        for document in job.corpus.read(chunk, skipped):
            cleaned_text = _clean(job, chains[document.language], document, funnel, found)
            if cleaned_text is not None:
                numbers.add(document, cleaned_text)
                written = {**asdict(document), "text": cleaned_text}
                del written["input_characters"]  # the stage takes no pairs
                writer.write(_line(written))
    arrays = BytesIO()
    np.savez(arrays, **numbers.arrays())  # type: ignore[arg-type]  # mypy takes one of the arrays for allow_pickle
    cleaned = CleanedChunk(
        CleanPiece(key, len(numbers.hashes), len(numbers.paragraphs)), funnel.trimmed(), skipped, found
    )
    files = {}
    for name, data in ((f"{key}.jsonl.zst", text.getbuffer()), (f"{key}.npz", arrays.getbuffer())):
        with finished(job.folder / name) as file:
            file.write(data)
        files[name] = {"bytes": len(data), "sha256": sha256(data).hexdigest()}
    record(done, files, _as_json(cleaned))
    return cleaned


def _as_json(cleaned: CleanedChunk) -> dict:
    flows = {
        source: {
            step: {
                "counts": flow.counts,
                "reasons": flow.reasons,
                "dropped": flow.dropped,
                "changed": flow.changed,
                "rules": [
                    [asdict(rule), list(found.values.items()), found.dropped] for rule, found in flow.rules.items()
                ],
            }
            for step, flow in flows.items()
        }
        for source, flows in cleaned.funnel.flows.items()
    }
    found = {name: list(getattr(cleaned.found, name).items()) for name in ("items", "shares", "examples")}
    return {"piece": asdict(cleaned.piece), "flows": flows, "skipped": asdict(cleaned.skipped), "found": found}


def _of_json(job: CleanJob, values: dict) -> CleanedChunk:
    funnel = Funnel({}, job.samples)
    for source, flows in values["flows"].items():
        funnel.flows[source] = {
            step: Flow(
                Counter(flow["counts"]),
                Counter(flow["reasons"]),
                [tuple(sample) for sample in flow["dropped"]],
                [tuple(sample) for sample in flow["changed"]],
                {Rule(**rule): Distribution(Counter(dict(found)), dropped) for rule, found, dropped in flow["rules"]},
            )
            for step, flow in flows.items()
        }
    stored = values["found"]
    shares = Counter({tuple(key): documents for key, documents in stored["shares"]})
    examples = {number: tuple(example) for number, example in stored["examples"]}
    found = FoundTexts(Counter(dict(stored["items"])), shares, examples)
    return CleanedChunk(CleanPiece(**values["piece"]), funnel, Skipped.of(values["skipped"]), found)


def _clean(job: CleanJob, chain: list[Step], document: Document, funnel: Funnel, found: FoundTexts) -> str | None:
    """Return the cleaned text of a document, or None if it is dropped. `funnel` and `found` count it."""
    text, size, heldout = document.text, len(document.text.encode()), document.side == "heldout"
    flows = funnel.flows[document.source]
    flows[READ].count(heldout, size, size)
    mask = partial(_masked, chain)  # samples of every step are masked, also of the steps before `pii`
    for step in chain:
        outcome = step.apply(text)
        if not heldout:  # the report helps to choose thresholds, and held-out text must not influence the choice
            flows[step.name].measure(outcome.measured)
        if outcome.dropped:
            flows[step.name].count(heldout, size, None)
            funnel.dropped(document.source, step.name, document.where, outcome.dropped, text, mask=mask)
            return None
        left = size
        if outcome.text != text:
            left = len(outcome.text.encode())
            funnel.changed(document.source, step.name, document.where, text, outcome.text, mask)
        flows[step.name].count(heldout, size, left, outcome.changes)
        text, size = outcome.text, left
    if job.evaluation is not None:
        match = _evaluation(job.evaluation).find(text)
        dropped = match is not None and match.share >= job.share
        flows[CONTAMINATION].count(heldout, size, None if dropped else size)
        if match is not None:
            found.add(match, dropped, document.where, text)
        if match is not None and dropped:
            funnel.dropped(document.source, CONTAMINATION, document.where, SHARED, text, **asdict(match))
            return None
    return text


class _Numbers:
    """The arrays of a piece: one row a document. The paragraphs of all documents share one array."""

    def __init__(self, job: CleanJob):
        self._duplicates = job.duplicates
        self._sources = {source.name: number for number, source in enumerate(job.corpus.recipe.sources)}
        self.sources: list[int] = []
        self.heldout: list[bool] = []
        self.bytes: list[int] = []
        self.hashes: list[int] = []
        self.paragraphs: list[int] = []
        self.paragraph_counts: list[int] = []
        self.signatures: list[np.ndarray] = []

    def add(self, document: Document, text: str) -> None:
        self.sources.append(self._sources[document.source])
        self.heldout.append(document.side == "heldout")
        self.bytes.append(len(text.encode()))
        self.hashes.append(document_hash(text))
        if self._duplicates.near.use:
            self.signatures.append(signature(text, self._duplicates.near))
        wanted = self._duplicates.paragraphs
        found = long_paragraphs(text, wanted.min_bytes) if wanted.use else []
        self.paragraphs.extend(value for _, value in found)
        self.paragraph_counts.append(len(found))

    def arrays(self) -> dict[str, np.ndarray]:
        near = self._duplicates.near
        signatures = np.array(self.signatures, np.uint32).reshape(-1, near.permutations)
        return {
            "sources": np.array(self.sources, np.uint16),
            "heldout": np.array(self.heldout, bool),
            "bytes": np.array(self.bytes, np.uint32),
            "hashes": np.array(self.hashes, np.uint64),
            "paragraphs": np.array(self.paragraphs, np.uint64),
            "paragraph_counts": np.array(self.paragraph_counts, np.uint32),
            "signatures": signatures,
            "keys": band_keys(signatures, near),
        }


# The third pass: writing


@dataclass(frozen=True)
class OutputPart:
    """One file of the output: the rows from `first` up to, but not including, `last`."""

    number: int
    first: int
    last: int
    pieces: tuple[CleanPiece, ...]  # the pieces that hold these rows
    first_row: int  # number of the first row of the first piece
    first_paragraph: int  # number of its first paragraph


@dataclass(frozen=True)
class Written:
    """A part's share of the report."""

    funnel: Funnel
    sides: dict[str, dict[str, Counter[str]]]  # source → side → documents, bytes
    excerpts: dict[int, dict[str, str]]  # row → its place and the beginning of its text, for the rows to be shown


def write_part(job: CleanJob, folder: Path, part: OutputPart) -> Written:
    """Write the documents of a part that stay, in order, without their repeated paragraphs."""
    stays, repeated, shown = (np.load(job.folder / f"{name}.npy", mmap_mode="r") for name in VERDICT)
    written = Written(job.funnel(), {}, {})
    path = folder / f"part-{part.number:05d}.jsonl.zst"
    with open(path, "wb") as file, library("zstandard").ZstdCompressor(PART_LEVEL).stream_writer(file) as writer:
        for row, line, paragraphs in _documents(job.folder, part):
            if not (stays[row] or shown[row]):
                continue
            document, copies = json.loads(line), repeated[paragraphs]
            if shown[row]:
                written.excerpts[row] = {"where": document["where"], "text": excerpt(document["text"])}
            if stays[row] and _without(document, copies, job, written.funnel):
                sides = written.sides.setdefault(document["source"], {})
                size = len(document["text"].encode())
                sides.setdefault(document["side"], Counter()).update(documents=1, bytes=size)
                writer.write(_line(document) if copies.any() else line)
    if not written.sides:
        path.unlink()
    written.funnel.trimmed()
    return written


def _without(document: dict, copies: np.ndarray, job: CleanJob, funnel: Funnel) -> bool:
    """Remove from `document` its long paragraphs that repeat earlier ones; return whether the document stays.

    `copies` (paragraphs,) bool: which of its long paragraphs repeat an earlier one.
    """
    if not job.duplicates.paragraphs.use:
        return True
    text, source, where = document["text"], document["source"], document["where"]
    flow, size, heldout = funnel.flows[source][PARAGRAPHS], len(text.encode()), document["side"] == "heldout"
    if len(copies) and copies.all():
        flow.count(heldout, size, None)
        funnel.dropped(source, PARAGRAPHS, where, "every paragraph of that length is a copy", text)
        return False
    if copies.any():
        found = long_paragraphs(text, job.duplicates.paragraphs.min_bytes)
        gone = {line for (line, _), copy in zip(found, copies, strict=True) if copy}
        document["text"] = "\n".join(line for number, line in enumerate(text.split("\n")) if number not in gone)
        funnel.changed(source, PARAGRAPHS, where, text, document["text"])
    flow.count(heldout, size, len(document["text"].encode()), int(copies.sum()))
    return True


def _documents(folder: Path, part: OutputPart) -> Iterator[tuple[int, bytes, slice]]:
    """Yield (row, line, slice of its long paragraphs among all paragraphs) for every document of a part."""
    row, paragraph = part.first_row, part.first_paragraph
    for piece in part.pieces:
        counts = load(folder, piece, "paragraph_counts").tolist()
        with open_file(folder / f"{piece.key}.jsonl.zst") as lines:
            for line, count in zip(lines, counts, strict=True):
                if part.first <= row < part.last:
                    yield row, line, slice(paragraph, paragraph + count)
                row, paragraph = row + 1, paragraph + count


def load(folder: Path, piece: CleanPiece, name: str) -> np.ndarray:
    """Load the array `name` of a piece."""
    with np.load(folder / f"{piece.key}.npz") as arrays:
        return arrays[name]


def _line(document: dict) -> bytes:
    return json.dumps(document, ensure_ascii=False).encode() + b"\n"


@lru_cache(maxsize=64)
def _opened(config: str, language: str) -> list[Step]:
    return steps(StepsConfig.model_validate_json(config), language)


def _steps(config: StepsConfig, language: str) -> list[Step]:
    """The steps of a language. They are built once a process, because some of them load a model."""
    return _opened(config.model_dump_json(), language)


def _masked(chain: list[Step], text: str) -> str:
    return next((step.apply(text).text for step in chain if step.name == "pii"), text)


@lru_cache(maxsize=1)
def _evaluation(folder: Path) -> Evaluation:
    return Evaluation(folder)
