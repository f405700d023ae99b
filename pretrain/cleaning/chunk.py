"""A corpus in pieces: what one process cleans of it, and later writes of it.

A piece is what one chunk of the corpus gave, in three files of the work folder named after its content:

    KEY.jsonl.zst   its documents, a line each, as they are published
    KEY.npz         numbers of them: hashes and signatures, for what only the whole corpus can tell
    KEY.done        counts and samples, and the hashes of the others; written last. A piece that has it is not made
                    again, unless a file of it is damaged

Memory: a chunk, its documents as text, and 600 bytes a document.
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
from pretrain.corpus import Chunk, Corpus, Document, Skipped
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
VERDICT = ("stays", "repeated", "shown")  # (rows,), (paragraphs,), (rows,) bool: what the whole corpus decided
PIECE_LEVEL, PART_LEVEL = 1, 3  # of zstd


@dataclass(frozen=True)
class CleanJob:
    """What a process has to know of the settings; everything here decides what a piece holds."""

    corpus: Corpus
    steps: StepsConfig
    duplicates: Duplicates
    evaluation: Path | None
    share: float  # of an evaluation item that a document must have to go
    samples: int
    folder: Path

    def funnel(self) -> Funnel:
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
    paragraphs: int  # that are long enough to be compared


@dataclass(frozen=True)
class CleanedChunk:
    """What a piece adds to the report."""

    piece: CleanPiece
    funnel: Funnel
    skipped: Skipped
    found: FoundTexts  # of evaluation texts


def clean_chunk(job: CleanJob, chunk: Chunk) -> CleanedChunk:
    """Make the piece of a chunk, unless it is there."""
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
            cleaned = _clean(job, chains[document.language], document, funnel, found)
            if cleaned is not None:
                numbers.add(document, cleaned)
                writer.write(_line({**asdict(document), "text": cleaned}))
    arrays = BytesIO()
    np.savez(arrays, **numbers.arrays())
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
    found = values["found"]
    shares = Counter({tuple(key): documents for key, documents in found["shares"]})
    examples = {number: tuple(example) for number, example in found["examples"]}
    found = FoundTexts(Counter(dict(found["items"])), shares, examples)
    return CleanedChunk(CleanPiece(**values["piece"]), funnel, Skipped.of(values["skipped"]), found)


def _clean(job: CleanJob, chain: list[Step], document: Document, funnel: Funnel, found: FoundTexts) -> str | None:
    """The cleaned text of a document; None: a step dropped it. Counted in `funnel` and `found`."""
    text, size, heldout = document.text, len(document.text.encode()), document.side == "heldout"
    flows = funnel.flows[document.source]
    flows[READ].count(heldout, size, size)
    mask = partial(_masked, chain)  # a sample shows nobody's number, whichever step it is of
    for step in chain:
        outcome = step.apply(text)
        if not heldout:  # thresholds are chosen by train text alone
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
        if match:
            found.add(match, dropped, document.where, text)
        if dropped:
            funnel.dropped(document.source, CONTAMINATION, document.where, SHARED, text, **asdict(match))
            return None
    return text


class _Numbers:
    """The arrays of a piece, one row a document; paragraphs of all documents in one."""

    def __init__(self, job: CleanJob):
        self._duplicates = job.duplicates
        self._sources = {source.name: number for number, source in enumerate(job.corpus.recipe.sources)}
        self.sources, self.heldout, self.bytes, self.hashes = [], [], [], []
        self.paragraphs, self.paragraph_counts, self.signatures = [], [], []

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


# Writing what is left


@dataclass(frozen=True)
class OutputPart:
    """A file of the output: rows `first` to `last`, which lie in `pieces`, whose rows and paragraphs begin at …"""

    number: int
    first: int
    last: int
    pieces: tuple[CleanPiece, ...]
    first_row: int
    first_paragraph: int


@dataclass(frozen=True)
class Written:
    funnel: Funnel
    sides: dict[str, dict[str, Counter[str]]]  # source → side → documents, bytes
    excerpts: dict[int, dict[str, str]]  # row → its place and the beginning of its text, where it is shown


def write_part(job: CleanJob, folder: Path, part: OutputPart) -> Written:
    """Write the documents of a part that stay, in order, without the paragraphs that go."""
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
    """Take out of `document` the long paragraphs that are `copies` (paragraphs,) of earlier ones; whether it stays."""
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
    """(row, line, where its long paragraphs are among all) of every document of a part."""
    row, paragraph = part.first_row, part.first_paragraph
    for piece in part.pieces:
        counts = load(folder, piece, "paragraph_counts").tolist()
        with open_file(folder / f"{piece.key}.jsonl.zst") as lines:
            for line, count in zip(lines, counts, strict=True):
                if part.first <= row < part.last:
                    yield row, line, slice(paragraph, paragraph + count)
                row, paragraph = row + 1, paragraph + count


def load(folder: Path, piece: CleanPiece, name: str) -> np.ndarray:
    """One of the arrays of a piece."""
    with np.load(folder / f"{piece.key}.npz") as arrays:
        return arrays[name]


def _line(document: dict) -> bytes:
    return json.dumps(document, ensure_ascii=False).encode() + b"\n"


@lru_cache(maxsize=64)
def _opened(config: str, language: str) -> list[Step]:
    return steps(StepsConfig.model_validate_json(config), language)


def _steps(config: StepsConfig, language: str) -> list[Step]:
    """The steps of a language, made once a process: some of them load a model."""
    return _opened(config.model_dump_json(), language)


def _masked(chain: list[Step], text: str) -> str:
    return next((step.apply(text).text for step in chain if step.name == "pii"), text)


@lru_cache(maxsize=1)
def _evaluation(folder: Path) -> Evaluation:
    return Evaluation(folder)
