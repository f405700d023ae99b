import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import yaml
from matplotlib.image import imread

from pretrain import cli, shards, tokenizer
from pretrain.cleaning import CleanConfig, run, stage
from pretrain.cleaning.pipeline import StepsConfig
from pretrain.cleaning.step import Outcome
from pretrain.cleaning.steps.privacy import Pii
from pretrain.config import build
from pretrain.corpus import open_corpus
from pretrain.corpus.sides import side_of
from pretrain.errors import CorpusError
from pretrain.tokenizer import compare
from tests.conftest import ROOT, SAMPLE
from tests.helpers.cleaning import step as step_alone
from tests.helpers.corpora import file, recipe
from tests.helpers.entries import entries
from tests.helpers.processes import started

OFF = dict.fromkeys(StepsConfig.model_fields, "false")
FRACTION = 0.2  # held out
ENGLISH = [
    a + b + c for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "ai") for c in ("", "n", "s", "rd", "m")
]
CHINESE = [chr(code) for code in range(0x4E00, 0x5E00)]


def english(seed: int | str, words: int = 60) -> str:
    """A text that shares no n-gram of 5 words with one of another seed."""
    return " ".join(random.Random(f"en{seed}").choices(ENGLISH, k=words)) + "."


def chinese(seed: int | str, characters: int = 60) -> str:
    return "".join(random.Random(f"zh{seed}").choices(CHINESE, k=characters)) + "。"


def on(side: str, make=english, begin: int = 0) -> str:
    """The first text from seed `begin` on that falls on `side`."""
    return next(text for n in range(begin, 10**6) if side_of(text := make(n), FRACTION) == side)


def near(text: str, side: str) -> str:
    """`text` with its last word replaced, on `side`."""
    copies = (f"{text.rsplit(' ', 1)[0]} other{n}." for n in range(1000))
    return next(copy for copy in copies if side_of(copy, FRACTION) == side)


def made(folder: Path, *texts: str, **sources: list[str]) -> Path:
    """Write a recipe with one source of `texts`, or with several sources by name, as .jsonl. Returns its path."""
    sources = {"s": list(texts), **sources} if texts else sources
    for name, lines in sources.items():
        file(folder, f"{name}.jsonl", "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in lines))
    listed = [{"name": n, "files": [f"{n}.jsonl"], "language": n if n in ("zh", "de") else "en"} for n in sources]
    return recipe(folder, *listed, heldout_fraction=FRACTION)


def config(corpus: Path, out: Path, **values) -> CleanConfig:
    values = {"steps": OFF, "corpus": str(corpus), "out": str(out), **values}
    return build(CleanConfig, yaml.load(yaml.safe_dump(values), yaml.BaseLoader), "test")


def cleaned(corpus: Path, **values) -> tuple[list[str], dict]:
    """Clean a corpus, without pictures, and return the remaining texts and the report."""
    out = corpus.parent / "out"
    run(config(corpus, out, **{"plot": False, **values}))
    return [d.text for d in open_corpus(out).documents()], json.loads((out / "report.json").read_text(encoding="utf-8"))


def step(report: dict, name: str) -> dict:
    return next(step for step in report["all"]["steps"] if step["step"] == name)


def lost(report: dict, name: str) -> int:
    return step(report, name)["documents_in"] - step(report, name)["documents_out"]


def published(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# The published folder


def test_without_steps_and_copies_the_output_is_the_corpus(tmp_path):
    texts = [english(n) for n in range(20)]
    corpus = made(tmp_path, a=texts[:8], zh=[chinese(n) for n in range(20)], b=texts[8:])
    left, _ = cleaned(corpus, plot=True)
    documents, before = (list(open_corpus(place).documents()) for place in (tmp_path / "out", corpus))
    assert documents == before
    assert left == [document.text for document in before]
    assert sorted(os.listdir(tmp_path / "out")) == ["funnel.png", "index.json", "part-00000.jsonl.zst", "report.json"]
    assert not (tmp_path / ".out.work").exists()


def test_without_plot_the_same_corpus_has_no_pictures(tmp_path, monkeypatch):
    corpus = made(tmp_path, *[english(n) for n in range(20)])
    pictured = run(config(corpus, tmp_path / "pictured"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # it need not be installed
    bare = run(config(corpus, tmp_path / "bare", plot=False))
    assert pictured["fingerprint"] == bare["fingerprint"]
    assert sorted(os.listdir(tmp_path / "bare")) == ["index.json", "part-00000.jsonl.zst", "report.json"]


def test_every_stage_shows_the_sides_of_each_source_and_says_which_is_never_held_out(tmp_path, capsys):
    books = [on("train", begin=1000 * n) for n in (1, 2, 3)]
    corpus, out = made(tmp_path, web=[english(n) for n in range(60)], books=books), tmp_path / "out"
    indexes = [run(config(corpus, out))]
    for number, text in enumerate((str(corpus), str(out))):
        made_here = {name: str(tmp_path / f"{name}{number}") for name in ("tokenizer", "shards", "compare")}
        values = {"corpus": text, "kind": "byte", "vocab_size": 600, "plot": False}
        tokenizer.run(tokenizer.TokenizerConfig(out=made_here["tokenizer"], **values))
        both = {"one": made_here["tokenizer"], "two": made_here["tokenizer"]}
        compare.run(compare.CompareConfig(corpus=text, out=made_here["compare"], vocabularies=both, plot=False))
        shards.run(shards.ShardsConfig(corpus=text, tokenizer=made_here["tokenizer"], out=made_here["shards"]))
        indexes += [json.loads((Path(place) / "index.json").read_text()) for place in made_here.values()]
    found = [index["recorded"]["shares"] for index in indexes]
    assert found == [found[0]] * 7 and found[0]["books"]["heldout"] == {"documents": 0, "bytes": 0}
    size = sum(len(text.encode()) for text in books)
    assert found[0]["books"]["train"] == {"documents": 3, "bytes": size}
    said = capsys.readouterr()
    assert len(re.findall(f"\nbooks +3 +{size:,} +0 +0 +0.00%\n", said.out)) == 7
    assert said.err.count("source 'books': none of its 3 documents (4.7% of all bytes) is held out\n  set held") == 7


def test_files_of_the_output_are_cut_at_documents_and_keep_the_order(tmp_path):
    texts = [english(n) for n in range(30)]
    left, _ = cleaned(made(tmp_path, *texts), part_bytes=1000)
    assert left == texts
    assert len(list((tmp_path / "out").glob("part-*"))) > 5


def test_a_cleaned_corpus_can_be_cleaned_again(tmp_path):
    corpus = made(tmp_path, *[english(n) for n in range(20)], english(3))
    first, _ = cleaned(corpus)
    run(config(tmp_path / "out", tmp_path / "again"))
    again = list(open_corpus(tmp_path / "again").documents())
    assert [document.text for document in again] == first
    assert again == list(open_corpus(tmp_path / "out").documents())  # sides and places, too


def test_the_sample_is_cleaned_by_its_configuration(tmp_path, monkeypatch, capsys):
    out = tmp_path / "clean"
    monkeypatch.chdir(ROOT)
    assert cli.main("clean", ["configs/sample/clean.yaml", f"out={out}"]) == 0
    said = capsys.readouterr()
    assert "poems" in said.out
    assert "cleaning: 1,097 documents" in said.err
    assert len(list(open_corpus(out).documents())) == len(list(open_corpus(SAMPLE).documents()))
    for picture in ("funnel.png", "limits.png"):
        pixels = imread(out / picture)
        edges = [pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]
        assert min(edge.min() for edge in edges) == 1, f"something in {picture} is cut off"


def test_the_report_says_what_other_limits_would_drop(tmp_path):
    texts = [on("train", lambda m, n=n: " ".join([f"w{n}x{m}"] + ["word"] * n)) for n in range(1, 101)]
    heldout = [on("heldout", lambda m: f"{m} held out"), on("heldout", lambda m: f"{m} held out, " + "longer " * 30)]
    texts += heldout  # held-out documents are not counted; the first is below every limit
    settings = {
        "steps": {**OFF, "length": {"use": "true", "min_characters": "null", "min_words": 5}},
        "duplicates": {"near": {"use": False}},
    }
    corpus = made(tmp_path, *texts)
    _, report = cleaned(corpus, **settings)
    (found,) = step(report, "length")["rules"]
    assert (found["rule"], found["sign"], found["limit"]) == ("words", "<", 5)
    assert (found["documents"], found["dropped"]) == (100, 3)
    assert lost(report, "length") == 4
    assert (found["limits"]["0.1"], found["limits"]["0.5"]) == (12, 52)  # 2 to 101 words: ten below 12
    settings["steps"]["length"]["min_words"] = 12
    shutil.rmtree(tmp_path / "out")
    left, _ = cleaned(corpus, **settings)
    assert len(left) == 90 + 1


# Copies


def test_the_first_of_several_copies_stays(tmp_path):
    texts = [english(n) for n in range(12)]
    spaced = texts[4].replace(" ", "\n", 3)
    left, report = cleaned(made(tmp_path, *texts, texts[2], spaced, texts[2]), duplicates={"near": {"use": False}})
    assert left == texts
    assert lost(report, "duplicate documents") == 3


def test_exact_and_near_copies_can_be_kept(tmp_path):
    texts = [english(n) for n in range(12)]
    texts += [texts[2], near(texts[3], side_of(texts[3], FRACTION))]
    left, report = cleaned(made(tmp_path, *texts), duplicates={"near": {"use": False}, "documents": False})
    assert left == texts
    assert [step["step"] for step in report["all"]["steps"]] == ["read"]


@pytest.mark.parametrize("make", [english, chinese])
def test_near_copies_go_and_the_report_shows_what_they_are_like(tmp_path, make):
    texts = [make(n, 200) for n in range(12)]
    copy = on("train", make=lambda n: texts[5][:-30] + make(f"x{n}", 10))
    left, report = cleaned(made(tmp_path, *texts, copy))
    assert left == texts
    sample = report["sources"][0]["steps"][-1]["dropped_samples"][0]
    assert sample["where"] == "s.jsonl, line 13"
    assert sample["like"]["where"] == "s.jsonl, line 6"
    assert sample["like"]["text"][:30] == texts[5][:30]
    assert 0.8 <= sample["similarity"] <= 1
    bins = [bin for bin in report["near_duplicates"]["histogram"] if bin["documents"]]
    assert len(bins) == 1
    assert bins[0]["dropped"] == 1
    assert bins[0]["from"] <= sample["similarity"] <= bins[0]["to"]
    assert [place["where"] for place in bins[0]["pair"]] == ["s.jsonl, line 13", "s.jsonl, line 6"]


def test_a_train_document_that_nearly_repeats_a_heldout_one_goes_wherever_it_stands(tmp_path):
    heldout = on("heldout")
    copies = [near(heldout, "train"), "Once " + near(heldout, "train")]
    assert side_of(copies[1], FRACTION) == "train"
    others = [english(n) for n in range(1000, 1010)]
    left, report = cleaned(made(tmp_path, *copies, *others, heldout))
    assert left == [*others, heldout]
    assert step(report, "near-duplicates")["reasons"] == {"it repeats a held-out document": 2}


def test_a_heldout_document_stays_whatever_is_in_train(tmp_path):
    train = on("train")
    heldout = near(train, "heldout")
    left, _ = cleaned(made(tmp_path, train, heldout, *(english(n) for n in range(1000, 1010))))
    assert heldout in left
    assert train not in left


def test_what_a_step_makes_equal_to_a_heldout_document_goes(tmp_path):
    """The text as read decides the side: here by an invisible character that cleaning removes."""
    texts = (english(n) for n in range(10**6))
    heldout, train = next(
        (text, "\u200b" + text)
        for text in texts
        if side_of(text, FRACTION) == "heldout" and side_of("\u200b" + text, FRACTION) == "train"
    )
    others = [english(n) for n in range(5000, 5010)]
    left, report = cleaned(made(tmp_path, train, *others, heldout), steps={**OFF, "control": "true"})
    assert left == [*others, heldout]
    assert step(report, "duplicate documents")["reasons"] == {"it repeats a held-out document": 1}


def test_later_copies_of_a_paragraph_go_and_short_ones_stay(tmp_path):
    paragraphs = [english(f"p{n}", 40) for n in range(20)]
    notice = english("notice", 40)
    texts = [f"Title\n{paragraph}\n{notice}" for paragraph in paragraphs]
    texts.append(f"Title\n{notice}\nThe end")
    near_off, wanted = {"use": False}, {"use": True, "min_bytes": 80}
    left, report = cleaned(made(tmp_path, *texts), duplicates={"near": near_off, "paragraphs": wanted})
    first = next(n for n in range(20) if side_of(texts[n], FRACTION) == "heldout")  # held-out documents come first
    expected = [f"Title\n{p}" + (f"\n{notice}" if n == first else "") for n, p in enumerate(paragraphs)]
    assert left == expected
    taken = step(report, "duplicate paragraphs")
    assert (taken["changes"], taken["changed"]) == (19, 19)
    assert taken["reasons"] == {"every paragraph of that length is a copy": 1}
    assert taken["bytes_out"] == sum(len(text.encode()) for text in left)


GERMAN = (
    "Der Fischer ging am frühen Morgen hinaus an den See, um nach seinen Netzen zu sehen, und fand sie leer.",
    "Wer nicht hören will, der muss fühlen, sagte die Großmutter und stellte den Topf wieder auf den Herd.",
    "Im Winter liegt auf den Dächern der kleinen Stadt so viel Schnee, dass niemand mehr die Ziegel sieht.",
)


def test_everything_planted_in_printed_text_is_found_and_nothing_else_is_touched(tmp_path):
    """The default steps on the sample. Planted text is either new to the corpus or a copy of a document in it."""
    prose, poems = ((SAMPLE / f"{name}.txt").read_text(encoding="utf-8").strip().split("\n\n") for name in ("en", "zh"))
    item, poems = poems[0], poems[1:]
    spare, innocent = prose[:80], prose[80:]
    broken = [f"{text} — «déjà vu»" for text in spare[:20]]
    tagged, addressed, quoting = spare[20:40], spare[40:60], [f"{text}\n{item}" for text in spare[60:]]
    planted = [
        *(text.encode().decode("cp1252") for text in broken),
        *(f"<div>{text}</div><!-- end -->" for text in tagged),
        *(f"{text}\nWrite to user{n}@mail.example.org." for n, text in enumerate(addressed)),
        *quoting,
        *(f"{GERMAN[n % 3]} Das war am {n}. Mai. {GERMAN[(n + 1) % 3]}" for n in range(20)),
        *(text.replace(" ", "  ") for text in innocent[:20]),
        *(f"{text} And it was so, {n} times." for n, text in enumerate(innocent[20:40])),
    ]
    evaluation = file(tmp_path, "evaluation.txt", item)
    corpus = made(tmp_path / "corpus", en=innocent + planted, zh=poems)
    left, report = cleaned(corpus, steps={}, decontaminate={"files": [str(evaluation)]})
    assert (
        step(report, "mojibake")["changed"] == step(report, "html")["changed"] == step(report, "pii")["changed"] == 20
    )
    assert lost(report, "decontamination") == lost(report, "language") == lost(report, "duplicate documents") == 20
    assert lost(report, "near-duplicates") == 20
    assert {*broken, *tagged, *poems, *innocent[:20], *innocent[40:]} <= set(left)
    assert len(left) == len(innocent) + len(poems) + 60
    assert not any("example.org" in text for text in left)


# Every step at once, on a corpus of which every answer is known

PLANTED = 10  # documents for each step, in each language
INNOCENT = 100
HAS = {"en": (".", 60), "zh": ("。", 9)}  # the end of the chosen printed lines, and their least characters
LINES = 8  # of a document
CAFE = {
    "en": ("They met in the cafe\u0301 at {}.", "They met in the café at {}."),
    "zh": ("大获全胜\uf9dd{}。", "大获全胜利{}。"),
}
QUOTED = {"en": "She said «déjà vu» and went home at {}.", "zh": "他说“你好”，然后走了{}。"}
AGAIN = {"en": " And it was so {} times.", "zh": "如是者{}次。"}
MAIL = {"en": "Write to {} before the end of May.", "zh": "来信请寄{}，谢谢您的关心。"}
OTHER = {"en": " another word or two ", "zh": "又何"}
PAGE = {"en": "Please enable javascript to read this page.", "zh": "请启用javascript来阅读本页内容。"}
SCRIPTS = ("漢語學習者應當閱讀歷史書籍。", "汉语学习者应当阅读历史书籍。")
CORPUS_STEPS = ("decontamination", "duplicate documents", "near-duplicates", "duplicate paragraphs")
EVERY = (*StepsConfig.model_fields, *CORPUS_STEPS)  # each must have a recall of 1 and change nothing else
# Text planted to stay, since by design no step finds it (recall 0 of 10): an address that is spelled out, for which
# there is no pattern; 12 words or 19 characters of an evaluation item, where n-grams of 13 and 20 are looked for; and
# copies at a similarity of about 0.5. Near 0.8 the estimate decides (its deviation is 0.035): test_duplicates.py.
MISSED = {
    "en": ["Write to user at northwind dot pl before the end of May.", "{quoted}."],
    "zh": ["来信请寄user于northwind点pl，谢谢您的关心。", "{quoted}。"],
}


def planted(language: str) -> tuple[list[tuple[str, str, str | None]], str]:
    """(step that must act on a document, the document, the remaining text or None) for each, and an evaluation item.

    The documents consist of printed lines. No line is in two documents, except where a step needs copies.
    """
    end, least = HAS[language]
    printed = (SAMPLE / f"{language}.txt").read_text(encoding="utf-8").split("\n")
    # Without the lines that the step `script` would change: poems have old characters.
    same = step_alone("script", language) if language == "zh" else Outcome
    lines = sorted({x for x in printed if x.endswith(end) and least <= len(x) < 300 and same(x).text == x})
    random.Random(0).shuffle(lines)
    unused = iter(lines)

    def fresh(count: int = LINES) -> str:
        return "\n".join(islice(unused, count))

    def train(more: str = "") -> str:
        return next(text for text in iter(fresh, "") if side_of(text + more, FRACTION) == "train") + more

    found = [("", text, text) for text in (train() for _ in range(INNOCENT))]
    item, notice = "".join(islice(unused, 3)), "".join(islice(unused, 6))[:-1] + end
    units = item.split() if language == "en" else [c for c in item if c.isalnum()]
    few = (" " if language == "en" else "").join(units[: 12 if language == "en" else 19]).rstrip(".")
    innocent = [text for _, text, _ in found]
    for n in range(PLANTED):
        wild, tame = (text.format(n) for text in CAFE[language])
        line, mail = QUOTED[language].format(n), MAIL[language]
        text = fresh()
        found.append(("html", f"<b>{text}</b><!-- end -->", text))
        text = fresh()
        encoded = line.encode().decode("cp1252" if language == "en" else "latin-1")
        found.append(("mojibake", f"{text}\n{encoded}", f"{text}\n{line}"))
        text = fresh()
        found.append(("unicode", f"{text}\n{wild}", f"{text}\n{tame}"))
        text = fresh()
        found.append(("control", text[:9] + "\u200b" + text[9:], text))
        text = fresh()
        found.append(("pii", f"{text}\n{mail.format(f'user{n}@northwind.pl')}", f"{text}\n{mail.format(Pii().email)}"))
        found.append(("language", f"{GERMAN[n % 3]} Das war am {n}. Mai. {GERMAN[(n + 1) % 3]}", None))
        text = fresh()
        found.append(("gopher_repetition", f"{text}\n{text}", None))
        found.append(("gopher_quality", "\n".join(f"• {line}" for line in fresh().split("\n")), None))
        found.append(("fineweb", "\n".join(line[:-1] for line in fresh().split("\n")), None))
        text = fresh()
        found.append(("c4", f"{text}\n{PAGE[language]}", text) if n % 2 else ("c4", f"{text} {{x}}", None))
        found.append(("length", "\n".join(random.Random(n).sample(lines, 300)), None))
        found.append(("decontamination", f"{fresh()}\n{item}", None))
        found.append(("duplicate documents", innocent[n], None))
        copies = (innocent[-1 - n] + AGAIN[language].format(k) for k in range(1000))
        found.append(("near-duplicates", next(c for c in copies if side_of(c, FRACTION) == "train"), None))
        text = train(f"\n{notice}")
        # No other line of the Chinese verse has the 100 bytes of a paragraph, so the document is dropped.
        kept = None if language == "zh" else text.removesuffix(f"\n{notice}")
        found.append(("duplicate paragraphs", text, kept) if n else ("", text, text))
        for missed in MISSED[language]:
            text = f"{fresh()}\n{missed.format(quoted=few)}"
            found.append(("", text, text))
        halves = ((line[: len(line) // 2], line[len(line) // 2 :]) for line in innocent[20 + n].split("\n"))
        text = "\n".join(OTHER[language].join(both) for both in halves)
        found.append(("", text, text))
    if language == "zh":
        texts = [fresh() for _ in range(PLANTED)]
        found += [("script", f"{text}\n{SCRIPTS[0]}", f"{text}\n{SCRIPTS[1]}") for text in texts]
    assert next(unused, "")  # enough were printed
    return found, item


def test_every_step_finds_all_that_is_planted_for_it_and_touches_nothing_else(tmp_path):
    """All steps run on both languages. Stop words, which are in every text, are removed from a third language alone."""
    documents, items = {}, []
    for language in HAS:
        documents[language], item = planted(language)
        items.append(item)
    content = [word for word in ENGLISH if word.endswith("rd")]
    with_stop_words = [" und ".join(random.Random(n).sample(content, 20)) + " nicht." for n in range(PLANTED + 10)]
    documents["de"] = [("stopwords", text, text.replace("und ", "").replace("nicht", "")) for text in with_stop_words]
    folder = tmp_path / "corpus"
    texts = {language: [text for _, text, _ in found] for language, found in documents.items()}
    corpus = made(folder, **texts)
    evaluation = file(tmp_path, "evaluation.jsonl", "".join(json.dumps({"text": item}) + "\n" for item in items))
    both = ["en", "zh"]
    chosen = dict.fromkeys(("language", "gopher_repetition", "gopher_quality", "fineweb", "c4"), both)
    chosen |= {"script": "true", "stopwords": ["de"], "length": {"max_characters": 2500}}
    out = tmp_path / "out"
    duplicates = {"paragraphs": {"use": True}}
    values = {"steps": chosen, "decontaminate": {"files": [str(evaluation)]}, "duplicates": duplicates}
    run(config(corpus, out, **values, plot=False))
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    left = {document.where: document.text for document in open_corpus(out).documents()}
    recall: dict[str, list[bool]] = {}
    for language, found in documents.items():
        for number, (name, _, wanted) in enumerate(found, 1):
            right = left.get(f"{language}.jsonl, line {number}") == wanted
            recall.setdefault(name, []).append(right)
    assert {name: sum(right) / len(right) for name, right in recall.items()} == dict.fromkeys(["", *EVERY], 1.0)
    # Each step acted on the documents planted for it, and on no other document.
    for source in report["sources"]:
        for one in source["steps"][1:]:
            mine = [kept for name, _, kept in documents[source["name"]] if name == one["step"]]
            acted = one["documents_in"] - one["documents_out"], one["changed"]
            assert acted == (mine.count(None), len(mine) - mine.count(None)), (source["name"], one["step"])


# The split


def test_adding_renaming_and_reordering_files_moves_no_document(tmp_path):
    lines = {name: [english(f"{name}{n}") for n in range(40)] for name in "abc"}
    sides = []
    for number, names in enumerate((["a", "b"], ["b", "a"], ["c", "a", "b"])):
        folder = tmp_path / str(number)
        folder.mkdir()
        cleaned(made(folder, **{f"{name}{number}": lines[name] for name in names}))
        sides.append({d.text: d.side for d in open_corpus(folder / "out").documents()})
    assert set(sides[0].values()) == {"train", "heldout"}
    for others in sides[1:]:
        assert sides[0].items() <= others.items()


def test_the_side_does_not_depend_on_the_steps(tmp_path):
    texts = [english(n) + "\u200b&amp;" for n in range(60)]
    for name, steps in (("off", OFF), ("on", {"language": "false"})):
        folder = tmp_path / name
        folder.mkdir()
        cleaned(made(folder, *texts), steps=steps)
    off, on = (list(open_corpus(tmp_path / name / "out").documents()) for name in ("off", "on"))
    assert [d.side for d in off] == [d.side for d in on]
    assert all(a.text != b.text for a, b in zip(off, on, strict=True))


# Evaluation texts


def evaluated(tmp_path: Path, items: list[str], texts: list[str], **values) -> tuple[list[str], dict]:
    evaluation = file(tmp_path, "evaluation.jsonl", "".join(json.dumps({"text": item}) + "\n" for item in items))
    corpus = made(tmp_path / "corpus", *[english(f"o{n}") for n in range(20)], *texts)
    wanted = {"files": [str(evaluation)], **values.pop("decontaminate", {})}
    left, report = cleaned(corpus, decontaminate=wanted, **values)
    return left[20:], report


@pytest.mark.parametrize("make, length", [(english, 13), (chinese, 20)])
def test_a_document_with_an_ngram_of_an_evaluation_item_goes(tmp_path, make, length):
    item = make("item", 40)
    units = item[:-1].split() if make is english else list(item[:-1])
    gap = " " if make is english else ""
    shared, short = (gap.join(units[10 : 10 + size]) for size in (length, length - 1))
    planted = f"{make('before')} {shared.upper().replace(' ', ', ')} {make('after')}"
    innocent = f"{make('one')} {short} {make('two')}"
    left, report = evaluated(tmp_path, [make("other", 40), item], [planted, innocent])
    assert left == [innocent]
    sample = report["sources"][0]["steps"][1]["dropped_samples"][0]
    assert sample["ngram"] == shared
    assert sample["item"] == {"file": str(tmp_path / "evaluation.jsonl"), "where": "evaluation.jsonl, line 2"}
    counts = report["decontamination"]["files"][str(tmp_path / "evaluation.jsonl")]
    assert counts["items by n-gram"] == 2
    assert (counts["items found"], counts["documents dropped"]) == (1, 1)


def test_short_items_are_looked_for_whole_and_very_short_ones_not_at_all(tmp_path):
    words = english("item", 12)[:-1].split()
    whole, part, tiny = " ".join(words[:9]), " ".join(words[:8]), " ".join(words[9:12])
    texts = [
        f"{english(1)} {whole} {english(2)}",
        f"{english(3)} {part} {english(4)}",
        f"{english(5)} {tiny} {english(6)}",
    ]
    left, report = evaluated(tmp_path, [whole, tiny, "十二个字不是二十个字"], texts)
    assert left == texts[1:]
    counts = report["decontamination"]["files"][str(tmp_path / "evaluation.jsonl")]
    assert (counts["items whole"], counts["items too short"], counts["items found"]) == (1, 2, 1)


@pytest.mark.parametrize("share, left", [(0, []), (0.2, [0]), (0.5, [0, 1]), (1, [0, 1])])
def test_the_share_says_how_much_of_an_item_a_document_must_have(tmp_path, share, left):
    """The item has 100 words and so 88 n-grams. The documents have 10 %, 40 % and all of them."""
    words = english("item", 100)[:-1].split()
    texts = [f"{english(n)} {' '.join(words[:size])} {english(-n)}" for n, size in ((1, 21), (2, 47), (3, 100))]
    found, report = evaluated(tmp_path, [english("other", 100), " ".join(words)], texts, decontaminate={"share": share})
    assert found == [texts[n] for n in left]
    bins = report["decontamination"]["histogram"]
    assert [round(bin["from"] * 20) for bin in bins if bin["documents"]] == [2, 7, 19]
    assert sum(bin["dropped"] for bin in bins) == 3 - len(left)
    assert [bin["example"]["where"] for bin in bins if bin["documents"]] == [f"s.jsonl, line {n}" for n in (21, 22, 23)]
    samples = report["sources"][0]["steps"][1]["dropped_samples"]
    assert {round(sample["share"], 3) for sample in samples} == {round(n / 88, 3) for n in (9, 35, 88)[len(left) :]}


def test_an_item_that_shares_its_ngrams_with_others_is_counted_for_itself(tmp_path):
    words = english("item", 60)[:-1].split()
    items = [" ".join(words[:40]), " ".join(words), " ".join(words[20:])]
    _, report = evaluated(tmp_path, items, [" ".join(words[18:])])
    sample = report["sources"][0]["steps"][1]["dropped_samples"][0]
    assert sample["item"]["where"] == "evaluation.jsonl, line 3"
    assert sample["share"] == 1
    assert sample["ngram"] == " ".join(words[20:33])


def test_evaluation_items_are_found_in_documents_that_a_step_changed(tmp_path):
    item = "漢語學習者應當閱讀歷史書籍並且練習書寫國語會話與對聯"
    evaluation = file(tmp_path, "evaluation.txt", item)
    texts = [chinese(n) for n in range(20)]
    corpus = made(tmp_path / "corpus", zh=[*texts, f"{chinese(1)}{item}{chinese(2)}"])
    simplified = {**OFF, "script": {"use": "true", "to": "simplified"}}
    left, report = cleaned(corpus, steps=simplified, decontaminate={"files": [str(evaluation)]})
    assert len(left) == 20
    assert lost(report, "decontamination") == 1
    assert step(report, "script")["changed"] > 0


def test_evaluation_items_with_personal_data_are_found_although_documents_have_it_masked(tmp_path):
    item = "Whoever saw the grey cat in the yard writes to anna@northwind.pl before the ninth of March, please."
    evaluation = file(tmp_path, "evaluation.jsonl", json.dumps({"text": item}) + "\n")
    texts = [english(n) for n in range(20)]
    corpus = made(tmp_path / "corpus", *texts, f"{english(21)} {item} {english(22)}")
    masked = {**OFF, "pii": {"use": "true"}}
    left, report = cleaned(corpus, steps=masked, decontaminate={"files": [str(evaluation)]})
    assert left == texts
    assert step(report, "pii")["changed"] == lost(report, "decontamination") == 1


def test_a_step_that_takes_lines_out_makes_no_item_shorter(tmp_path):
    """C4's rules for Chinese would leave one line of the item, a fifteenth of its n-grams. Two documents quote it."""
    formula = chinese("formula", 40)
    item = "\n".join([*(english(n, 40)[:-1] for n in range(9)), formula])
    evaluation = file(tmp_path, "evaluation.jsonl", json.dumps({"text": item}) + "\n")
    quoting = [f"{chinese(n)}{formula}{chinese(-n)}" for n in range(1, 3)]
    corpus = made(tmp_path / "corpus", en=[english(f"o{n}") for n in range(20)] + quoting, zh=[chinese(3) * 9])
    steps = {**OFF, "c4": {"use": ["zh"]}}
    _, report = cleaned(corpus, steps=steps, decontaminate={"files": [str(evaluation)], "share": 0.5})
    assert lost(report, "decontamination") == 0
    assert report["decontamination"]["histogram"][1]["documents"] == 2


def test_an_evaluation_recipe_says_where_its_items_are(tmp_path):
    item = english("item", 40)
    file(tmp_path, "q.jsonl", json.dumps({"question": {"stem": item}}) + "\n")
    path = recipe(tmp_path, {"name": "exam", "files": ["q.jsonl"], "field": "question.stem"})
    corpus = made(tmp_path / "corpus", *[english(n) for n in range(20)], item)
    left, _ = cleaned(corpus, decontaminate={"files": [str(path)]})
    assert len(left) == 20


# The funnel


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict:
    """The report on two sources whose documents are changed or removed by many of the steps."""
    folder = tmp_path_factory.mktemp("funnel")
    texts = [english(n) for n in range(30)]
    dirty = ["x", "<p>y</p>", *[f"<b>{text}</b> user{n}@mail.example.org" for n, text in enumerate(texts[:9])]]
    corpus = made(folder, en=[*texts, *dirty, texts[3], near(texts[4], "train")], zh=[chinese(n) for n in range(30)])
    file(folder, "en.jsonl", (folder / "en.jsonl").read_text() + '{"text": ""}\n' * 7)
    return cleaned(corpus, steps={"language": "false"}, samples=3)[1]


def test_what_leaves_a_step_enters_the_next(report):
    for source in [*report["sources"], report["all"]]:
        for before, after in zip(source["steps"], source["steps"][1:], strict=False):
            for what in ("documents", "bytes", "heldout"):
                assert before[f"{what}_out"] == after[f"{what}_in"], (before["step"], after["step"], what)
        last, written = source["steps"][-1], source["written"]
        assert last["documents_out"] == written["train"]["documents"] + written["heldout"]["documents"]
        assert last["heldout_out"] == written["heldout"]["documents"]
        assert last["bytes_out"] == written["train"]["bytes"] + written["heldout"]["bytes"]


def test_reasons_and_samples_account_for_what_was_dropped(report):
    for source in report["sources"]:
        for step in source["steps"]:
            dropped = step["documents_in"] - step["documents_out"]
            assert sum(step["reasons"].values()) == dropped
            assert len(step["dropped_samples"]) == min(3, dropped)
            assert len(step["changed_samples"]) <= 3


def test_all_sources_together_are_their_sum(report):
    for place, step in enumerate(report["all"]["steps"]):
        for what in ("documents_in", "documents_out", "bytes_in", "bytes_out", "changed", "changes"):
            assert step[what] == sum(source["steps"][place][what] for source in report["sources"])


def test_bad_records_are_counted_with_places(report):
    bad = report["sources"][0]["bad_records"]["empty"]
    assert bad["records"] == 7
    assert bad["samples"][0]["where"] == "en.jsonl, line 44"
    assert report["sources"][1]["bad_records"] == {}


def test_no_sample_shows_what_the_report_says_was_masked(report):
    assert step(report, "pii")["changes"] == 9
    assert "mail.example.org" not in json.dumps(report)


def test_a_step_that_a_source_does_not_have_passes_it_by(tmp_path):
    corpus = made(
        tmp_path, en=[f"<b>{english(n)}</b>" for n in range(20)], zh=[f"<b>{chinese(n)}</b>" for n in range(20)]
    )
    _, report = cleaned(corpus, steps={**OFF, "html": ["en"]})
    names = [[step["step"] for step in source["steps"]] for source in [*report["sources"], report["all"]]]
    assert names[0] == names[2] == ["read", "html", *names[1][1:]]
    html = step(report, "html")
    assert html["documents_out"] == 40
    assert html["changed"] == 20
    assert html["bytes_in"] - html["bytes_out"] == 20 * len("<b></b>")


def test_a_source_with_a_chinese_name_is_drawn(tmp_path, recwarn):
    _, report = cleaned(made(tmp_path, 文言=[chinese(n) for n in range(20)], en=[english(n) for n in range(20)]))
    assert [source["name"] for source in report["sources"]] == ["文言", "en"]
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


# Processes


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Documents of two sources in many chunks of 4 KB, with copies across them."""
    texts = [english(n) for n in range(400)]
    copies = [near(text, "train") for text in texts[::20]]
    evaluation = file(tmp_path_factory.mktemp("evaluation"), "items.txt", english(7)[:200])
    folder = tmp_path_factory.mktemp("corpus")
    shutil.copy(evaluation, folder / "items.txt")
    return made(folder, en=[*texts, *copies, *texts[::30]], zh=[chinese(n) for n in range(300)])


def settings(corpus: Path) -> dict:
    return {
        "steps": {"language": "false"},
        "plot": False,
        "chunk_bytes": 4096,
        "part_bytes": 50_000,
        "decontaminate": {"files": [str(corpus.parent / "items.txt")]},
        "duplicates": {"paragraphs": {"use": True}},
    }


@pytest.fixture(scope="module")
def reference(corpus, tmp_path_factory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("reference") / "out"
    run(config(corpus, out, **settings(corpus)))
    return published(out)


@pytest.mark.parametrize("workers, chunk_bytes", [(3, 4096), (1, 1 << 20)])
def test_the_output_is_the_same_for_any_number_of_workers_and_size_of_chunks(
    corpus, reference, tmp_path, workers, chunk_bytes
):
    values = {**settings(corpus), "workers": workers, "chunk_bytes": chunk_bytes}
    run(config(corpus, tmp_path / "out", **values))
    assert published(tmp_path / "out") == reference


def test_a_killed_run_goes_on_where_it_was_and_gives_the_same_bytes(corpus, reference, tmp_path):
    out, work = tmp_path / "out", tmp_path / ".out.work"
    path = file(tmp_path, "clean.yaml", yaml.safe_dump({"corpus": str(corpus), "out": str(out), **settings(corpus)}))
    command = [sys.executable, str(ROOT / "launch/clean.py"), str(path), "workers=2"]
    states = []
    for _ in range(2):
        enough = len(done(work)) + 4
        with started(command, stderr=subprocess.DEVNULL) as process:
            wait_for(partial(has_pieces, work, enough), process)
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        assert not out.exists()
        states.append(done(work))
    assert states[0].items() <= states[1].items()  # not made again: their times are the same
    run(config(corpus, out, **settings(corpus)))  # one process continues the work of two
    assert published(out) == reference
    assert entries(tmp_path) == ["clean.yaml", "out"]


def done(work: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in work.glob("pieces-*/*.done")}


def has_pieces(work: Path, count: int) -> bool:
    return len(done(work)) >= count


def wait_for(state: Callable[[], bool], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while not state():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_pieces_of_other_settings_are_not_taken(corpus, reference, tmp_path, monkeypatch):
    out, work = tmp_path / "out", tmp_path / ".out.work"
    values = settings(corpus)
    interrupted(monkeypatch, config(corpus, out, **{**values, "steps": OFF}))
    first = done(work)
    assert first
    interrupted(monkeypatch, config(corpus, out, **values))
    assert len(list(work.glob("pieces-*/*.done"))) == len(first)  # the pieces of the other settings are gone
    run(config(corpus, out, **values))
    assert published(out) == reference


def test_a_run_that_is_interrupted_while_it_writes_goes_on(corpus, reference, tmp_path, monkeypatch):
    out, work = tmp_path / "out", tmp_path / ".out.work"
    interrupted(monkeypatch, config(corpus, out, **settings(corpus)), after=2, function="write_part")
    assert not out.exists()
    assert len(done(work)) > 20
    run(config(corpus, out, **settings(corpus)))
    assert published(out) == reference


def test_a_file_that_is_added_leaves_the_finished_pieces_alone(corpus, tmp_path, monkeypatch):
    folder = tmp_path / "corpus"
    shutil.copytree(corpus.parent, folder)
    out, work = tmp_path / "out", tmp_path / ".out.work"
    interrupted(monkeypatch, config(folder / "recipe.yaml", out, **settings(corpus)), after=20)
    first = done(work)
    values = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    shutil.copy(folder / "zh.jsonl", folder / "more.jsonl")
    values["sources"][1]["files"].append("more.jsonl")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    interrupted(monkeypatch, config(folder / "recipe.yaml", out, **settings(corpus)), after=40)
    assert first.items() <= done(work).items()


@pytest.mark.parametrize("kept", ["*.done", "*.npz", "*.jsonl.zst"])
def test_a_piece_of_a_killed_run_is_made_again_if_it_was_damaged_since(corpus, reference, tmp_path, monkeypatch, kept):
    values = config(corpus, tmp_path / "out", **settings(corpus))
    interrupted(monkeypatch, values)
    path = sorted((tmp_path / ".out.work").glob(f"pieces-*/{kept}"))[0]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    run(values)
    assert published(tmp_path / "out") == reference


def interrupted(monkeypatch, values: CleanConfig, after: int = 5, function: str = "clean_chunk") -> None:
    """Ctrl-C after some pieces, or parts."""
    results = []

    def work(*arguments):
        if len(results) == after:
            raise KeyboardInterrupt
        results.append(real(*arguments))
        return results[-1]

    real = getattr(stage, function)
    with monkeypatch.context() as patch:
        patch.setattr(stage, function, work)
        with pytest.raises(KeyboardInterrupt):
            run(values)


# Mistakes of a user


@pytest.mark.parametrize("size", ["300k", "1300k"])  # the pieces do not fit; the signatures of all do not
def test_a_full_disk_is_said_to_be_full_and_what_is_finished_is_kept(corpus, tmp_path, size):
    disk = tmp_path / "disk"
    disk.mkdir()
    values = {"corpus": str(corpus), "out": str(disk / "out"), **settings(corpus)}
    path = file(tmp_path, "clean.yaml", yaml.safe_dump(values))
    mount, stage = f"mount -t tmpfs -o size={size} none {disk}", f"{sys.executable} {ROOT}/launch/clean.py {path}"
    line = f"{mount} && {stage}; status=$?; ls -A -I .out.lock {disk}; exit $status"
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    done = subprocess.run(["unshare", "-rm", "sh", "-c", line], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "the disk is full" in done.stderr
    assert "finished pieces are kept in" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.split() == [".out.work"]


BAD = {
    "no such recipe": ({"corpus": "nowhere.yaml"}, "no such"),
    "an unknown key": ({"duplicates": {"fuzzy": True}}, "unknown key duplicates.fuzzy"),
    "a threshold above 1": ({"duplicates": {"near": {"threshold": 1.5}}}, "duplicates.near.threshold"),
    "a list of languages": ({"duplicates": {"near": {"use": ["en"]}}}, "duplicates.near.use"),
    "no workers": ({"workers": 0}, "workers"),
    "the corpus as the output": ({"out": "corpus"}, "the output folder is the corpus itself"),
    "no such evaluation file": ({"decontaminate": {"files": ["gone.txt"]}}, "gone.txt"),
    "an empty evaluation file": ({"decontaminate": {"files": ["empty.txt"]}}, "an evaluation file holds no item"),
    "everything dropped": ({"steps": {**OFF, "length": {"min_characters": 10**6}}}, "'length' took"),
    "a corpus in the output": ({"corpus": "corpus", "out": "."}, "the output folder holds a file of the corpus"),
    "a file in the way": ({"out": "corpus/s.jsonl/out"}, "the output folder cannot be made"),
    "short n-grams": ({"decontaminate": {"words": 2}}, "decontaminate.words"),
    "endless n-grams": ({"decontaminate": {"files": ["corpus"], "words": 10**30}}, "decontaminate.words"),
    "endless files": ({"part_bytes": 10**30}, "part_bytes"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings_are_refused_and_leave_nothing(tmp_path, refused, name):
    changes, message = BAD[name]
    (tmp_path / "corpus").mkdir()
    made(tmp_path / "corpus", *[english(n) for n in range(20)])
    file(tmp_path, "empty.txt", "\n \n")
    path = file(tmp_path, "clean.yaml", yaml.safe_dump({"corpus": "corpus", "out": "out", "steps": OFF, **changes}))
    before = tree(tmp_path)
    said = refused(path)
    assert message in said, said
    assert tree(tmp_path) == before


CORPORA = {
    "broken JSON": ('{"text": "one"}\n{"text": \n', "s.jsonl, line 2"),
    "not UTF-8": (b'{"text": "\xff"}\n', "not valid UTF-8"),
    "no field": ('{"body": "one"}\n', "no text under 'text'"),
    "no document": ("\n", "the corpus holds no document"),
    "an empty file": ("", "the corpus holds no document"),
    "nothing held out": (json.dumps({"text": on("train")}) + "\n", "the heldout side"),
    "nothing to train on": (json.dumps({"text": on("heldout")}) + "\n", "the train side"),
}


@pytest.mark.parametrize("name", CORPORA)
def test_bad_corpora_are_refused_and_leave_nothing(tmp_path, refused, name):
    content, message = CORPORA[name]
    (tmp_path / "corpus").mkdir()
    corpus = made(tmp_path / "corpus", "x")
    file(tmp_path / "corpus", "s.jsonl", content)
    path = file(tmp_path, "clean.yaml", yaml.safe_dump({"corpus": str(corpus), "out": "out", "steps": OFF}))
    before = tree(tmp_path)
    said = refused(path)
    assert message in said, said
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["zstandard", "datasketch", "matplotlib"])
def test_a_missing_library_is_named_before_there_is_work(tmp_path, refused, monkeypatch, name):
    (tmp_path / "corpus").mkdir()
    made(tmp_path / "corpus", *[english(n) for n in range(20)])
    path = file(tmp_path, "clean.yaml", yaml.safe_dump({"corpus": "corpus", "out": "out", "steps": OFF}))
    before = tree(tmp_path)
    monkeypatch.setitem(sys.modules, name, None)
    said = refused(path)
    assert f"needs the package {name}" in said
    assert "pip install '.[data]'" in said
    assert "cleaning:" not in said
    assert tree(tmp_path) == before


def test_an_empty_heldout_side_names_the_step_that_emptied_it(tmp_path):
    heldout = on("heldout", make=lambda n: english(n, 30))
    train = [on("train", begin=n) for n in (0, 1000, 2000)]
    with pytest.raises(CorpusError, match="heldout side of the cleaned corpus is empty") as error:
        cleaned(made(tmp_path, heldout, *train), steps={**OFF, "length": {"min_characters": 140}})
    assert "of 1 documents the step 'length' took 1" in str(error.value)


def test_an_earlier_result_is_replaced_only_when_the_new_one_is_whole(tmp_path):
    corpus = made(tmp_path, *[english(n) for n in range(20)])
    cleaned(corpus)
    before = published(tmp_path / "out")
    with pytest.raises(CorpusError):
        cleaned(corpus, steps={**OFF, "length": {"min_characters": 10**6}})
    assert published(tmp_path / "out") == before
    left, _ = cleaned(made(tmp_path, *[english(n) for n in range(30)]))
    assert len(left) == 30


def test_the_output_may_be_a_link_to_a_folder(tmp_path):
    corpus = made(tmp_path, *[english(n) for n in range(20)])
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    for _ in range(2):
        assert len(cleaned(corpus)[0]) == 20
    assert (tmp_path / "out").is_symlink() and (tmp_path / "disk/index.json").is_file()
    assert entries(tmp_path) == ["disk", "out", "recipe.yaml", "s.jsonl"]


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys) -> Callable[[Path], str]:
    """Return a function that runs a configuration, which must exit with 2, and gives the error message."""

    def said(path: Path) -> str:
        monkeypatch.chdir(tmp_path)
        assert cli.main("clean", [str(path)]) == 2
        return capsys.readouterr().err

    return said


def tree(folder: Path) -> Counter[str]:
    return Counter(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix != ".lock")
