"""Several corpora in one run: configuration, errors, reports, scores, and changes on resuming."""

import itertools
import json
import shutil

import numpy as np
import pytest
import yaml

from pretrain import config, shards
from pretrain.errors import ConfigError, ResumeError, ShardError
from pretrain.order import branch
from pretrain.order.config import DataConfig, mixed
from pretrain.order.phases import Phase
from pretrain.order.run_data import RunData, open_run_data
from pretrain.shards import segment
from pretrain.tokenizer import open_tokenizer
from pretrain.training import checkpoint
from pretrain.training.config import RunConfig
from pretrain.training.heldout import VALUES, Scores, together
from pretrain.training.history import text_read
from tests.conftest import run_values
from tests.helpers import cases
from tests.helpers.ranks import on_ranks


@pytest.fixture(scope="module")
def two(prepared, tmp_path_factory) -> dict[str, str]:
    """A shard set for each language of the sample, with each kind of tokenizer."""
    root, found = tmp_path_factory.mktemp("two"), {}
    for language in ("en", "zh"):
        recipe = root / f"{language}.yaml"
        files = [str(prepared.corpus.parent / f"{language}.txt")]
        source = {"name": language, "language": language, "files": files}
        recipe.write_text(yaml.safe_dump({"name": language, "heldout_fraction": 0.1, "sources": [source]}))
        for kind, tokenizer in prepared.tokenizer.items():
            found[f"{language}-{kind}"] = str(root / f"{language}-{kind}")
            wanted = shards.ShardsConfig(corpus=str(recipe), tokenizer=str(tokenizer), out=found[f"{language}-{kind}"])
            shards.run(wanted)
    return found


def corpora(two, kind="bert", **changes) -> list[dict]:
    listed = [
        {"name": "en", "shards": two[f"en-{kind}"], "weight": 7},
        {"name": "zh", "shards": two[f"zh-{kind}"], "weight": 3},
    ]
    return [{**entry, **changes.get(entry["name"], {})} for entry in listed]


def values(prepared, two, out, objective="masked_lm", listed=None, **sections) -> dict:
    kind = "bert" if objective == "masked_lm" else "byte"
    made = run_values(prepared, out, objective, **sections)
    made["data"] = {"corpora": listed or corpora(two, kind), "tokenizer": str(prepared.tokenizer[kind])}
    return made


def phase(steps=10, seq_len=32, tokens=256, **mixture: int) -> Phase:
    return Phase(steps=steps, seq_len=seq_len, batch_tokens=tokens, mixture=mixture or None)


def section(*entries: dict) -> DataConfig:
    return DataConfig(corpora=[{"shards": entry["name"], **entry} for entry in entries], tokenizer="t")


# Configuration


def test_weights_become_the_mixture_of_every_phase_that_names_none_in_lowest_terms():
    found = mixed([phase(), phase(zh=20, en=30)], section({"name": "en", "weight": 70}, {"name": "zh", "weight": 30}))
    assert [p.mixture for p in found] == [{"en": 7, "zh": 3}, {"en": 3, "zh": 2}]
    plain = [phase()]
    assert mixed(plain, DataConfig(shards="s", tokenizer="t")) == plain


@pytest.mark.parametrize(
    ("phases", "entries", "message"),
    [
        ([phase(en=1)], [], "data.shards has no name: use data.corpora"),
        ([phase()], [{"name": "en"}], "phases.0 has no mixture, and no corpus of data.corpora has a weight"),
        ([phase(em=1)], [{"name": "en", "weight": 1}], "mixture has 'em', which is no name .* did you mean en?"),
        ([phase(x=1)], [{"name": "en"}, {"name": "zh"}], "mixture has 'x', .*known: en, zh"),
        ([phase(en=1)], [{"name": "en"}, {"name": "zh"}], "nothing draws from 'zh': give it a weight, or name it"),
        ([phase()], [{"name": "en", "weight": 4096}, {"name": "zh", "weight": 1}],
         "weight = {en: 4096, zh: 1} adds up to 4097 in lowest terms, the most is 4096: for example {en: 4095, zh: 1}"),
    ],
)  # fmt: skip
def test_mixtures_that_do_not_fit_the_corpora_are_refused(phases, entries, message):
    given = section(*entries) if entries else DataConfig(shards="s", tokenizer="t")
    with pytest.raises(ValueError) as error:
        mixed(phases, given)
    for part in message.split(".*"):
        assert part in str(error.value)


def test_a_weight_too_fine_is_told_one_that_fits():
    for weights in ({"a": 5000, "b": 3}, {"a": 1, "b": 10**9}, {"a": 4999, "b": 5000, "c": 1}):
        with pytest.raises(ValueError) as error:
            phase(**weights)
        offered = yaml.safe_load(str(error.value).split("for example ")[1].split("\n")[0].split(" [")[0])
        assert phase(**offered).mixture == offered


# Opening


def opened_with(wanted: DataConfig, prepared, phases=None) -> RunData:
    phases = phases or [Phase(steps=4, seq_len=16, batch_tokens=64)]
    written = mixed(phases, wanted) if all(corpus.weight for corpus in wanted.corpora) else phases
    return open_run_data(wanted, written, 7, open_tokenizer(prepared.tokenizer["bert"]))


def test_corpora_of_different_tokenizers_are_refused_naming_both(prepared, two):
    wanted = section({"name": "en", "shards": two["en-bert"]}, {"name": "zh", "shards": two["zh-byte"]})
    with pytest.raises(ShardError, match="the corpora en and zh were built with different tokenizers") as error:
        opened_with(wanted, prepared)
    assert two["en-bert"] in str(error.value) and two["zh-byte"] in str(error.value)


def test_a_flipped_bit_in_a_large_set_is_found_where_checksums_are_asked_for(prepared, tmp_path, monkeypatch):
    folder, tokenizer = tmp_path / "shards", open_tokenizer(prepared.tokenizer["bert"])
    shutil.copytree(prepared.shards["bert"], folder)
    ids = folder / "train-00000.bin"
    ids.write_bytes(bytes([ids.read_bytes()[0] ^ 1]) + ids.read_bytes()[1:])
    monkeypatch.setattr("pretrain.storage.index.SMALL", 0)  # like a set that is too large for hashing at every start
    wanted = {"shards": str(folder), "tokenizer": str(tokenizer.folder)}
    opened_with(DataConfig(**wanted), prepared)
    with pytest.raises(ShardError) as error:
        opened_with(DataConfig(**wanted, checksums=True), prepared)
    assert "train-00000.bin: altered" in str(error.value)


def test_the_same_shards_under_two_names_are_refused(prepared, two, tmp_path):
    shutil.copytree(two["en-bert"], tmp_path / "copy")
    wanted = section({"name": "en", "shards": two["en-bert"]}, {"name": "old", "shards": str(tmp_path / "copy")})
    with pytest.raises(ShardError, match="the corpora en and old are the same shards"):
        opened_with(wanted, prepared)


# Plans


def planned(prepared, two, phases, **changes):
    wanted = DataConfig(corpora=corpora(two, **changes), tokenizer=str(prepared.tokenizer["bert"]), block_tokens=64)
    return opened_with(wanted, prepared, phases)


def test_the_plan_says_what_every_phase_draws_of_every_corpus(prepared, two):
    data = planned(prepared, two, [phase(steps=100, tokens=640), phase(steps=50, tokens=640, zh=1)])
    opened, lines = data.corpora, [line.split() for line in data.table()]
    assert lines[0] == ["corpus", "tokens", "phase", "part", "drawn", "epochs", "windows/step", "places/step"]
    en, zh = (f"{corpus.train.tokens:,}" for corpus in opened)
    assert [line[:5] for line in lines[1:]] == [
        ["en", en, "0", "70.0%", "44,800"],
        ["en", en, "all", "46.7%", "44,800"],
        ["zh", zh, "0", "30.0%", "19,200"],
        ["zh", zh, "1", "100.0%", "32,000"],
        ["zh", zh, "all", "53.3%", "51,200"],
    ]
    assert float(lines[-1][5]) == pytest.approx(51_200 / opened[1].train.tokens, abs=0.02)
    assert [line[6:] for line in lines[1:]] == [["14", "14"], [], ["6", "6"], ["20", "20"], []]
    ends = {
        line.index(cell) + len(cell)
        for line, cell in zip(data.table(), ("epochs", *(x[5] for x in lines[1:])), strict=True)
    }
    assert len(ends) == 1, "aligned"


def test_the_plan_of_packed_windows_says_how_much_of_them_is_padding(prepared, two):
    wanted = DataConfig(
        corpora=corpora(two), tokenizer=str(prepared.tokenizer["bert"]), windows="documents", block_tokens=1024
    )
    data = opened_with(wanted, prepared, [phase(steps=100, tokens=640)])
    header, en, zh = (line.split() for line in data.table())
    order = data.order
    assert header[-1] == "padding"
    for number, line in enumerate((en, zh)):
        samples = order.samples(0, 0, order.phases[0].samples)
        free = (~order.rows(samples, order.phases[0].seq_len).text)[samples.corpora == number].mean()
        assert float(line[-1].rstrip("%")) / 100 == pytest.approx(free, abs=0.02)


@pytest.mark.parametrize("skips", [(), ((3, 5),)])
@pytest.mark.parametrize(("windows", "block"), [("stream", 32), ("documents", 1024)])
def test_the_text_that_the_first_steps_have_read_is_counted(windows, block, skips, prepared, two):
    """Counted against the readings of each step. Packed windows count with a mean, so they may be a block off."""
    wanted = DataConfig(
        corpora=corpora(two), tokenizer=str(prepared.tokenizer["bert"]), windows=windows, block_tokens=block
    )
    phases = mixed([phase(6, 16), phase(20, 32, 512, en=1, zh=2)], wanted)
    data = open_run_data(wanted, phases, 7, open_tokenizer(prepared.tokenizer["bert"]), skips)
    assert text_read(data, 0) == {}
    for done, places in ((4, 4 * 256), (26, 6 * 256 + 20 * 512)):
        found = text_read(data, done)
        read = dict.fromkeys(("en", "zh"), 0)
        for step in range(done):
            for reading in data.order.step(branch.reads(step, data.phases, data.skips)):
                read[reading.corpus] += reading.tokens
        assert [entry["name"] for entry in found.values()] == ["en", "zh"]
        slack = block if windows == "documents" or skips else 0
        for fingerprint, entry in found.items():
            assert abs(entry["tokens"] - read[entry["name"]]) <= slack
            assert entry["shards"] == fingerprint and entry["pass_tokens"] % block == 0
            assert (entry["padding"] > 0) == (windows == "documents")
        assert abs(sum(e["tokens"] + e["padding"] for e in found.values()) - places) <= len(skips)


def test_a_corpus_seen_too_often_is_refused_before_the_run(prepared, two):
    phases = [phase(steps=100, tokens=640)]
    data = planned(prepared, two, phases, zh={"max_epochs": 1.5})
    assert data.order.epochs()[1] > 1.5
    with pytest.raises(ConfigError, match="a corpus would be seen too often") as error:
        data.check_epochs()
    tokens = data.corpora[1].train.tokens
    assert f"data.corpora.1, zh: 19,200 of the run's 64,000 tokens, from {tokens:,}" in str(error.value)
    assert f"may be at most {1.5 * tokens / 64_000:.1%}, {int(1.5 * tokens):,} tokens" in str(error.value)
    most = float(data.order.epochs()[1])
    planned(prepared, two, phases, zh={"max_epochs": most}).check_epochs()
    with pytest.raises(ConfigError, match="seen too often"):
        planned(prepared, two, phases, zh={"max_epochs": most - 1e-6}).check_epochs()


# Runs


def test_a_mixed_run_scores_every_corpus_and_the_mixture(prepared, two, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    given = values(prepared, two, tmp_path / "run", "causal_lm", evaluate={"every_steps": 6, "max_tokens": 256})
    (summary,) = on_ranks(1, cases.train, given, log=tmp_path / "run.log", launched=False)
    each = summary["heldout"]
    assert set(each) == {"en", "zh"} and set(each["en"]) == set(VALUES)
    assert summary["heldout_loss"] == pytest.approx(0.7 * each["en"]["loss"] + 0.3 * each["zh"]["loss"])
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    tags = events.Tags()["scalars"]
    for name, key in itertools.product(("en/", "zh/", ""), VALUES):
        assert f"heldout/{name}{key}" in tags
    assert {"sample/en/text_summary", "sample/zh/text_summary"} <= set(events.Tags()["tensors"])
    said = (tmp_path / "run.0.log").read_text()
    assert "69.8%" in said and "30.2%" in said, "67 and 29 of 96 windows"
    index = json.loads((checkpoint.newest(tmp_path / "run") / "index.json").read_text())
    assert [name for name, _ in index["corpora"]] == ["en", "zh"] and "shards" not in index


def test_the_mixture_of_scores_is_that_of_its_text():
    """Two corpora whose tokens are mixed 3 : 1 are scored as one text: their nats and bytes add up."""
    frequencies = [np.array([[1.0, 0.0]]), np.array([[0.2, 0.8]]), np.array([[0.0, 1.0]])]
    numbers = ((2.0, 0.1, 0.5, 100, 4.0), (4.0, 0.4, 0.1, 900, 2.0), (9.0, 7.0, 0.0, 5, 1.0))
    scores = [Scores(*found, shares) for found, shares in zip(numbers, frequencies, strict=True)]
    mixed = together(scores, (3, 1, 0))
    assert mixed.standard_error == pytest.approx(np.hypot(3 * 0.1, 0.4) / 4)
    assert mixed.no_context_loss == pytest.approx(-0.8 * np.log(0.8) - 0.2 * np.log(0.2))  # 0.8 of both are token 0
    assert mixed.gain == mixed.no_context_loss - mixed.loss
    assert mixed.loss == pytest.approx((3 * 2 + 4) / 4) and mixed.accuracy == pytest.approx((3 * 0.5 + 0.1) / 4)
    assert mixed.bits_per_byte == pytest.approx((3 * 2 + 4) / np.log(2) / (3 * 4 + 2))
    assert together(scores[:1], (5,)) == scores[0] and mixed.targets == 1000


@pytest.mark.parametrize(("launched", "windows"), [(False, "stream"), (True, "stream"), (True, "documents")])
def test_a_mixed_run_stopped_and_continued_on_other_ranks_has_the_same_batches(
    launched, windows, prepared, two, tmp_path
):
    phases = [
        {"steps": 6, "seq_len": 16, "batch_tokens": 256},
        {"steps": 6, "seq_len": 32, "batch_tokens": 256, "mixture": {"zh": 2, "en": 1}},
    ]
    half = {**phases[1], "steps": 2}
    straight = values(prepared, two, tmp_path / "straight", phases=phases)
    straight["data"] |= {"windows": windows, "block_tokens": 32 if windows == "stream" else 512}
    on_ranks(1, cases.train, straight, log=tmp_path / "straight.log", launched=False)
    first = {**straight, "out": str(tmp_path / "moved"), "phases": [phases[0]]}
    on_ranks(1, cases.train, first, log=tmp_path / "first.log", launched=False)
    on_ranks(
        2 if launched else 1,
        cases.train,
        {**first, "phases": phases, "engine": {"micro_batch": 1}},
        log=tmp_path / "second.log",
        launched=launched,
    )
    batches = [[digest for *_, digest in cases.history(tmp_path / name)] for name in ("straight", "moved")]
    assert batches[0] == batches[1] and len(set(batches[0])) == 12
    refused = {**first, "phases": [{**phases[0], "mixture": {"en": 1}}, half]}
    with pytest.raises(ResumeError, match=r"phases.0.mixture: .*'zh': 3.* → .*"):
        cases.train(refused)


def test_a_run_of_one_corpus_goes_on_with_a_second_one_for_later_phases(prepared, two, tmp_path):
    one = run_values(prepared, tmp_path / "run", phases=[{"steps": 4, "seq_len": 32, "batch_tokens": 256}])
    one["data"]["shards"] = two["en-bert"]
    on_ranks(1, cases.train, one, log=tmp_path / "one.log", launched=False)
    later = {"steps": 4, "seq_len": 32, "batch_tokens": 256, "mixture": {"main": 1, "zh": 1}}
    listed = [{"name": "main", "shards": two["en-bert"], "weight": 1}, {"name": "zh", "shards": two["zh-bert"]}]
    more = values(prepared, two, tmp_path / "run", listed=listed, phases=[*one["phases"], later])
    on_ranks(1, cases.train, more, log=tmp_path / "more.log", launched=False)
    assert "continuing after step 4" in (tmp_path / "more.0.log").read_text()
    assert len(cases.history(tmp_path / "run")) == 8

    for change, message in (
        (listed[::-1], "data.corpora.0: this run has read main, found zh there"),
        ([{**listed[0], "shards": two["en-byte"]}, listed[1]], "different tokenizers"),
        (
            [{**listed[0], "shards": two["zh-bert"]}, {**listed[1], "shards": two["en-bert"]}],
            "0, main, shards: this",
        ),
        ([listed[0], {**listed[1], "weight": 3}], "phases.0.mixture: "),
    ):
        with pytest.raises((ResumeError, ShardError)) as error:
            cases.train(values(prepared, two, tmp_path / "run", listed=change, phases=[*one["phases"], later]))
        assert message in str(error.value), change


def test_whole_words_of_every_corpus_are_part_of_the_run(prepared, two, tmp_path):
    """The ids show English words; the Chinese set needs the stage `words`; other words are another run."""
    listed = corpora(two)
    listed[1]["shards"] = str(shutil.copytree(two["zh-bert"], tmp_path / "zh"))
    objective = {"kind": "masked_lm", "unit": "word"}
    given = values(prepared, two, tmp_path / "run", listed=listed, checkpoint={"every_steps": 6})
    given["objective"] = objective
    with pytest.raises(ShardError, match="Chinese words are not seen from the ids"):
        cases.train(given)
    wanted = {"shards": listed[1]["shards"], "tokenizer": str(prepared.tokenizer["bert"])}
    segment.run(segment.WordsConfig(**wanted))
    on_ranks(1, cases.train, given, log=tmp_path / "run.log", launched=False)
    index = json.loads((checkpoint.newest(tmp_path / "run") / "index.json").read_text())
    assert set(index["words"]) == {"en", "zh"}

    (tmp_path / "mine.txt").write_text("明月\n春風\n", encoding="utf-8")
    segment.run(segment.WordsConfig(**wanted, user_dictionary=str(tmp_path / "mine.txt"), replace=True))
    with pytest.raises(ResumeError, match=r"data.corpora.1, zh, words: this run began with"):
        cases.train(given)


def test_a_mixed_configuration_loads_back_equal(prepared, two, tmp_path):
    built = config.build(RunConfig, values(prepared, two, tmp_path / "run"), "test")
    for it in (built, built.resolved()):
        assert config.build(RunConfig, config.parse(config.dump(it), "dump"), "dump") == it
    assert built.resolved().resolved() == built.resolved()


@pytest.mark.parametrize(("block_tokens", "refused"), [(16, False), (64, True)])
def test_a_run_begun_with_another_order_of_windows_is_not_continued_where_it_reads_otherwise(
    block_tokens, refused, two, prepared
):
    wanted = DataConfig(shards=two["en-bert"], tokenizer=str(prepared.tokenizer["bert"]), block_tokens=block_tokens)
    phases = [Phase(steps=4, seq_len=16, batch_tokens=64)]
    data = opened_with(wanted, prepared, phases)
    index = data.identity()
    assert data.conflicts(index, phases) == []
    older = {key: value for key, value in index.items() if key != "order"}
    found = data.conflicts(older, phases)
    assert [line.split(":")[0] for line in found] == ["order"] * refused
