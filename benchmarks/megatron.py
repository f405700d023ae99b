"""Check that Megatron-LM's reader and tools work with our files, and our reader with theirs. Run with:

    python benchmarks/megatron.py CHECKOUT --commit COMMIT --python PYTHON --out benchmarks/results/megatron.json

CHECKOUT is a checkout of Megatron-LM, PYTHON an interpreter that can import it (torch, transformers, triton). The
corpus is the sample. The checks take some minutes, because each Megatron process needs 15 s to start. They count
documents and tokens and compare hashes of all ids, document by document:

    read      their IndexedDataset opens each pair of our shards and reads the ids that our tokenizer gives
    write     their IndexedDatasetBuilder writes the same bytes when it is given the same documents
    import    our import of the files that their preprocess_data.py makes of the text has the documents of our build
"""

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

COMMAND = "python benchmarks/megatron.py CHECKOUT --commit COMMIT --python PYTHON --out OUT"
QUIET = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
# The checkout imports typing.override, which came with Python 3.12.
SHIM = "import typing, typing_extensions; typing.override = typing_extensions.override\n"
RUN = SHIM + "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
THEIRS = (
    SHIM
    + """
import hashlib, json, sys
from pathlib import Path
import numpy, torch, transformers
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
found = {"versions": {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": numpy.__version__,
                      "transformers": transformers.__version__}}
for prefix in sys.argv[2:]:
    for mapped in (True, False):
        data = IndexedDataset(prefix, mmap=mapped)
        ids, lengths = hashlib.sha256(), []
        for number in range(len(data)):
            ids.update(data[number].astype("<i4").tobytes())
            lengths.append(len(data[number]))
        entry = {"documents": len(data.document_indices) - 1, "tokens": sum(lengths),
                 "dtype": data.index.dtype.__name__, "ids": ids.hexdigest(),
                 "lengths": hashlib.sha256(numpy.array(lengths, "<i4").tobytes()).hexdigest()}
        assert found.setdefault(prefix, entry) == entry
    copy = Path(sys.argv[1]) / "copy"
    builder = IndexedDatasetBuilder(f"{copy}.bin", dtype=data.index.dtype)
    for number in range(len(data)):
        builder.add_document(torch.from_numpy(data[number].astype("int64")), [len(data[number])])
    builder.finalize(f"{copy}.idx")
    entry["builder writes the same bytes"] = all(
        Path(f"{copy}.{end}").read_bytes() == Path(f"{prefix}.{end}").read_bytes() for end in ("bin", "idx"))
    found[prefix] = entry
print(json.dumps(found))
"""
)
TOOL = {
    "byte": {
        "as it comes": [],
        "without special tokens": ["--tokenizer-hf-no-include-special-tokens"],
        "--append-eod": ["--tokenizer-hf-no-include-special-tokens", "--append-eod"],
    },
    "bert": {"as it comes": [], "without special tokens": ["--tokenizer-hf-no-include-special-tokens"]},
}


def entry(documents: list) -> dict:
    """The same figures that THEIRS prints of a pair, here of documents given as ids."""
    import numpy as np

    lengths = np.array([len(ids) for ids in documents], "<i4")
    ids = b"".join(np.asarray(document, "<i4").tobytes() for document in documents)
    hashes = {"ids": hashlib.sha256(ids).hexdigest(), "lengths": hashlib.sha256(lengths.tobytes()).hexdigest()}
    return {"documents": len(documents), "tokens": int(lengths.sum()), **hashes}


def prepare(scratch: Path) -> None:
    """Make the sample's vocabularies, its shards in pieces of 100,000 tokens, and its text as JSON lines."""
    from pretrain import shards, tokenizer
    from pretrain.config import load
    from pretrain.corpus import open_corpus

    for kind in TOOL:
        made = [f"out={scratch}/tokenizer-{kind}", "plot=false"]
        tokenizer.run(load(tokenizer.TokenizerConfig, f"configs/sample/tokenizer-{kind}.yaml", made))
        made = [f"out={scratch}/shards-{kind}", f"tokenizer={scratch}/tokenizer-{kind}", "piece_tokens=100000"]
        shards.run(load(shards.ShardsConfig, f"configs/sample/shards-{kind}.yaml", made))
    with open(scratch / "text.jsonl", "w", encoding="utf-8") as file:
        for document in open_corpus("data/sample").documents():
            file.write(json.dumps({"text": document.text}, ensure_ascii=False) + "\n")


def read_and_write(scratch: Path, theirs) -> dict:
    from pretrain.corpus import open_corpus
    from pretrain.shards import Shards
    from pretrain.tokenizer import open_tokenizer

    found = {}
    for kind in TOOL:
        tokenizer, texts = open_tokenizer(scratch / f"tokenizer-{kind}"), list(open_corpus("data/sample").documents())
        for side in ("train", "heldout"):
            ids = tokenizer.encode_batch([document.text for document in texts if document.side == side])
            shards = Shards(scratch / f"shards-{kind}", side)
            for piece, documents in zip(shards.pieces, shards.piece_documents.tolist(), strict=True):
                here, ids = ids[:documents], ids[documents:]
                said = theirs(f"{shards.folder}/{piece}")
                equal = {**said, **entry(here)} == said
                found[f"{kind}, {piece}"] = {"equal to our tokenizer": equal, **said}
            assert not ids
    return found


def import_pairs(scratch: Path, tool, theirs) -> dict:
    from pretrain.shards import Shards
    from pretrain.shards.import_megatron import ImportConfig, run

    found = {}
    for kind, forms in TOOL.items():
        vocabulary = scratch / f"tokenizer-{kind}"
        for number, (form, flags) in enumerate(forms.items()):
            prefix = scratch / f"{kind}{number}"
            tool(prefix, vocabulary, flags)
            pair = f"{prefix}_text_document"
            out = scratch / f"imported-{kind}{number}"
            run(ImportConfig(pairs=[pair], tokenizer=str(vocabulary), out=str(out), heldout_fraction=0.05))
            made, ours = (
                {side: Shards(f, side) for side in ("train", "heldout")} for f in (out, scratch / f"shards-{kind}")
            )
            documents = [
                sorted(s.document(n).tolist() for s in x.values() for n in range(s.documents)) for x in (made, ours)
            ]
            split = [[[s.document(n).tolist() for n in range(s.documents)] for s in x.values()] for x in (made, ours)]
            found[f"{kind}, {form}"] = {
                "flags": flags,
                "their pair": theirs(pair),
                "imported": {side: {"documents": s.documents, "tokens": s.tokens} for side, s in made.items()},
                "every document equal to our build": documents[0] == documents[1],
                "sides and order too": split[0] == split[1],
                "bytes of text": {side: [made[side].raw_bytes, ours[side].raw_bytes] for side in made},
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--commit", required=True, help="the commit of the checkout, for the report")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    os.chdir(ROOT)
    checkout = arguments.checkout.resolve()
    environment = os.environ | QUIET | {"PYTHONPATH": str(checkout)}

    def call(code: str, *values: object) -> str:
        command = [arguments.python, "-W", "ignore", "-c", code, *map(str, values)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        return done.stdout

    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        versions = {}

        def theirs(prefix: str) -> dict:
            said = json.loads(call(THEIRS, scratch, prefix).splitlines()[-1])
            versions.update(said["versions"])
            return said[prefix]

        def tool(prefix: Path, vocabulary: Path, flags: list[str]) -> None:
            options = ["--input", scratch / "text.jsonl", "--output-prefix", prefix, "--workers", 1, *flags]
            kind = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", vocabulary]
            call(RUN, checkout / "tools/preprocess_data.py", *options, *kind)

        prepare(scratch)
        results = {"read, write": read_and_write(scratch, theirs), "import": import_pairs(scratch, tool, theirs)}
        text = json.dumps(results, indent=1).replace(str(scratch), "SCRATCH")
    head = {
        "command": COMMAND,
        "date": str(date.today()),
        "Megatron-LM": arguments.commit,
        "versions": versions | {"our python": platform.python_version()},
        "results": json.loads(text),
    }
    arguments.out.write_text(json.dumps(head, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
