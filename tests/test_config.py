"""Configuration: errors and their texts, overrides, and the keys that may change when a run resumes."""

import copy
import functools
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain import tokenizer as tokenizer_stage
from pretrain.config import NULL, Config, build, dump, load, parse, resume_conflicts
from pretrain.corpus.recipe import Recipe
from pretrain.errors import ConfigError, UserError
from pretrain.finetune import FinetuneConfig
from pretrain.model.models import parameters_of
from pretrain.order import branch
from pretrain.tokenizer import TokenizerConfig, open_tokenizer
from pretrain.training.config import RunConfig
from pretrain.training.engine.config import deepspeed_config
from pretrain.training.optim.schedule import lr_at, schedule_notes
from pretrain.training.resume import past_conflicts
from tests.conftest import ROOT, Prepared, run_values

NOWHERE = Prepared(  # reading a configuration opens no files
    Path("recipe.yaml"),
    {"bert": Path("tokenizer-bert"), "byte": Path("tokenizer-byte")},
    {"bert": Path("shards-bert"), "byte": Path("shards-byte")},
)


class Inner(Config):
    ratio: float = 0.5
    count: int = 1
    on: bool = True
    word: str = "word"
    maybe: str | None = "something"
    level: Literal[0, 1, 2] = 0
    numbers: list[float] = [1.0]
    passed: dict[str, Any] = {}


class Outer(Config):
    inner: Inner = Inner()
    entries: list[Inner] = [Inner(), Inner()]
    maybe: Inner | None = None


@pytest.fixture
def path(tmp_path) -> Path:
    """A whole run configuration as a file."""
    return written(tmp_path / "run.yaml", run_values(NOWHERE, Path("runs/x")))


def written(path: Path, values: dict) -> Path:
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def refused(kind: type[Config], path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        load(kind, path, list(overrides))
    return str(error.value)


# Unknown keys


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("optim.warmup_step", "did you mean optim.warmup_steps?"),
        ("log_evry", "did you mean log_every?"),
        ("lr", "did you mean optim.lr?"),
        ("model.lr", "did you mean optim.lr?"),
        ("optim.steps", "did you mean phases.0.steps?"),
        ("optim.seed", "did you mean seed, outside of optim?"),
        ("phases.0.seq_length", "did you mean phases.0.seq_len?"),
        ("phases.0.micro_batch", "did you mean engine.micro_batch?"),
        ("objective.mask_ration", "did you mean objective.mask_ratio?"),
        ("objective.span.longst", "did you mean objective.span.longest?"),
        (
            "data.zzz",
            "(known here: shards, corpora, tokenizer, windows, block_tokens, workers, prefetch, read_ahead, checksums)",
        ),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(path, key, suggestion):
    assert refused(RunConfig, path, f"{key}=1") == f"override '{key}=1': unknown key {key}: {suggestion}".replace(
        ": (known", " (known"
    )


def test_a_key_of_another_member_of_a_union_is_told_where_it_belongs(tmp_path):
    values = run_values(NOWHERE, Path("runs/x"), "causal_lm")
    path = written(tmp_path / "run.yaml", values | {"objective": {"kind": "causal_lm", "mask_ratio": 0.3}})
    assert refused(RunConfig, path) == (f"{path}: unknown key objective.mask_ratio: objective.kind = masked_lm has it")


def test_a_key_inside_a_list_is_named_with_its_place(tmp_path):
    sources = [{"name": "a", "files": ["a.txt"]}, {"name": "b", "files": ["b.txt"], "langage": "zh"}]
    path = written(tmp_path / "recipe.yaml", {"name": "two", "sources": sources})
    assert refused(Recipe, path) == f"{path}: unknown key sources.1.langage: did you mean sources.1.language?"


def test_every_problem_is_reported_at_once_each_with_the_place_it_was_written(path):
    message = refused(RunConfig, path, "optim.lr=fast", "phases.0.steps=0", "modle.width=3", "data.workers=")
    lines = message.split("\n  ")
    assert lines[0] == "this configuration cannot be used" and len(lines) == 5
    assert "override 'optim.lr=fast': optim.lr = 'fast': input should be a valid number" in message
    assert "override 'phases.0.steps=0': phases.0.steps = '0': input should be greater than 0" in message
    assert f"{path} and override 'modle.width=3': unknown key modle: did you mean model?" in message
    assert "override 'data.workers=': data.workers = None: input should be a valid integer" in message


@pytest.mark.parametrize("corpora", ["", "[{name: en, shards: a, weight: 1}]"])
def test_a_run_reads_either_one_corpus_or_named_ones(path, corpora):
    shards = "null" if not corpora else "b"
    message = refused(RunConfig, path, f"data.corpora={corpora or '[]'}", f"data.shards={shards}")
    found = "both are given" if corpora else "neither is given"
    assert message.endswith(f"data.shards (one corpus) or data.corpora (several) says what to read: {found}")


def test_a_mixture_names_corpora_in_whole_numbers(path):
    corpora = "data.corpora=[{name: en, shards: a, weight: 7}, {name: zh, shards: b}]"
    message = refused(RunConfig, path, "data.shards=null", corpora, "phases.0.mixture={en: 1, zn: 2}")
    assert "phases: mixture has 'zn', which is no name in data.corpora: did you mean zh?" in message
    misspelt = refused(RunConfig, path, "data.shards=null", "data.corpora=[{name: en, shards: a, weigth: 7}]")
    assert "unknown key data.corpora.0.weigth: did you mean data.corpora.0.weight?" in misspelt
    assert "phases.0.mixture.en = '0.5': input should be a valid integer" in refused(
        RunConfig, path, "data.shards=null", corpora, "phases.0.mixture={en: 0.5, zh: 2}"
    )
    found = load(RunConfig, path, ["data.shards=null", corpora, "phases.0.mixture={en: 2, zh: 4}"])
    assert found.resolved().phases[0].mixture == {"en": 1, "zh": 2}


def test_a_contradiction_inside_a_section_names_the_file_and_the_overrides(path):
    message = refused(RunConfig, path, "engine.zero_stage=0", "engine.precision=bf16", "seed=1")
    where = f"{path} and override 'engine.zero_stage=0' and override 'engine.precision=bf16'"
    assert message == f"{where}: engine.precision = bf16 needs engine.zero_stage = 1, 2 or 3, found 0"


def test_a_missing_key_is_named(tmp_path):
    values = run_values(NOWHERE, Path("runs/x"))
    del values["seed"], values["optim"]["lr"], values["objective"]["kind"]
    message = refused(RunConfig, written(tmp_path / "run.yaml", values))
    assert "seed is missing" in message and "optim.lr is missing" in message
    assert "objective = {}" in message and "'kind'" in message


def test_an_unknown_member_of_a_union_is_refused_with_the_known_ones(path):
    message = refused(RunConfig, path, "objective.kind=masked")
    assert "'masked'" in message and "'masked_lm', 'causal_lm'" in message


# Files


@pytest.mark.parametrize(
    ("content", "fragments"),
    [
        (b"seed: 1\nout: a\nseed: 2\n", ("line 3", "the key 'seed' is given twice")),
        (b"out: a\ndata: {shards: a, shards: b}\n", ("line 2", "the key 'shards' is given twice")),
        (b"- seed\n", ("a mapping of keys to values", "['seed']")),
        (b"seed\n", ("a mapping of keys to values", "'seed'")),
        (b"", ("a mapping of keys to values", "None")),
        (b"? [1, 2]\n: 3\n", ("line 1", "['1', '2'] cannot be a key")),
        (b"data: [1\n", ("not valid YAML", "line 2", "expected ',' or ']'")),
        (b"seed: 1\n---\nseed: 2\n", ("not valid YAML", "line 2")),
        (b"seed: &a [*a]\n", ("not valid YAML", "recursive")),
        (b"out: \x00\n", ("not valid YAML", "#x0000")),
        (b"out: r\xe9sum\xe9\n", ("must be UTF-8", "byte 7", "0xe9", "iconv")),
    ],
)
def test_a_file_that_is_no_configuration_is_refused_with_the_place(tmp_path, content, fragments):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    message = refused(RunConfig, path)
    for fragment in (str(path), *fragments):
        assert fragment in message


def test_a_missing_file_is_named(tmp_path):
    for path in (tmp_path / "nosuch.yaml", tmp_path, written(tmp_path / "a.yaml", {}) / "b.yaml"):
        assert refused(RunConfig, path).startswith(f"no such configuration file\n  looked for: {path}")


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path):
    path = tmp_path / "outer.yaml"
    path.write_bytes("\ufeffinner: {word: 词}\n".encode())
    assert load(Outer, path).inner.word == "词"


# Values


@pytest.mark.parametrize(
    ("written", "key", "value"),
    [
        ("3e-4", "ratio", 3e-4),
        ("1", "ratio", 1.0),
        ("1_000", "count", 1000),
        ("no", "word", "no"),
        ("null", "word", "null"),
        ("0755", "word", "0755"),
        ("2024-01-01", "word", "2024-01-01"),
        ("'~'", "word", "~"),
        ("no", "on", False),
        ("true", "on", True),
        ("null", "maybe", None),
        ("~", "maybe", None),
        ("", "maybe", None),
        ("no", "maybe", "no"),
        ("2", "level", 2),
        ("[3e-4, 1]", "numbers", [3e-4, 1.0]),
        ("{a: 3e-4, b: no, c: true, d: [1, null]}", "passed", {"a": 3e-4, "b": "no", "c": True, "d": [1, None]}),
        ("{a: inf, b: .nan}", "passed", {"a": "inf", "b": ".nan"}),
        ("", "passed", {}),
    ],
)
def test_a_value_is_decoded_by_its_declared_type(tmp_path, written, key, value):
    path = tmp_path / "outer.yaml"
    path.write_text(f"inner: {{{key}: {written}}}\n", encoding="utf-8")
    from_file = getattr(load(Outer, path).inner, key)
    path.write_text("{}", encoding="utf-8")
    from_override = getattr(load(Outer, path, [f"inner.{key}={written}"]).inner, key)
    assert from_file == from_override == value and type(from_file) is type(from_override) is type(value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("count", "1e3"), ("count", "1.5"), ("count", ""), ("on", "maybe"), ("level", "3"), ("ratio", "nan")],
        *[("ratio", "inf"), ("numbers", "3"), ("numbers", "[1, inf]"), ("word", "[a]"), ("passed", "3")],
    ],
)
def test_a_value_of_another_type_is_refused(tmp_path, key, value):
    path = written(tmp_path / "outer.yaml", {})
    assert f"override 'inner.{key}={value}': inner.{key}" in refused(Outer, path, f"inner.{key}={value}")


@pytest.mark.parametrize(
    ("override", "key"),
    [('out="a\\0b"', "out"), ('data.shards="\\ud800"', "data"), ('objective={kind: "masked_lm\\udfff"}', "objective")],
)
def test_text_that_no_file_can_hold_is_refused_wherever_it_is(path, override, key):
    with pytest.raises(ConfigError, match=rf"{key}: '.*' has a NUL or half of a surrogate pair"):
        load(RunConfig, path, [override])


def test_overrides_address_sections_and_list_entries_and_the_last_one_wins(tmp_path):
    values = {"entries": [{"count": 1}, {"count": 2}], "inner": {"count": 3, "word": "w"}}
    path = written(tmp_path / "outer.yaml", values)
    found = load(Outer, path, ["entries.1.count=5", "inner.count=6", "inner.count=7", "maybe.word=a=b"])
    assert [entry.count for entry in found.entries] == [1, 5]
    assert (found.inner.count, found.inner.word, found.maybe.word) == (7, "w", "a=b")


def test_an_override_makes_a_section_that_was_null(tmp_path):
    path = tmp_path / "outer.yaml"
    path.write_text("maybe: null\n", encoding="utf-8")
    assert load(Outer, path).maybe is None
    assert load(Outer, path, ["maybe.count=4"]).maybe == Inner(count=4)


def test_an_override_changes_one_of_two_places_that_share_an_alias(tmp_path):
    path = tmp_path / "outer.yaml"
    path.write_text("entries: [&one {count: 1}, *one]\ninner: *one\n", encoding="utf-8")
    found = load(Outer, path, ["entries.1.count=2"])
    assert [entry.count for entry in (*found.entries, found.inner)] == [1, 2, 1]


@pytest.mark.parametrize(
    ("override", "fragments"),
    [
        ("inner.count", ("written key=value", "'inner.count'")),
        ("=3", ("written key=value",)),
        ("entries.2.count=3", ("entries has no entry '2'", "entries.0 to entries.1", "'entries.2.count=3'")),
        ("entries.one.count=3", ("entries has no entry 'one'",)),
        ("entries.-1.count=3", ("entries has no entry '-1'",)),
        ("entries.².count=3", ("entries has no entry '²'",)),
        (f"entries.{'9' * 5000}.count=3", ("entries has no entry '999", "entries.0 to entries.1")),
        ("inner.numbers.0=3", ("inner.numbers has no entry '0'", "it is empty")),
        ("inner.count.deep=3", ("inner.count is a single value, '1'", "'inner.count.deep=3'")),
        ("inner.word=[a", ("not valid YAML", "override 'inner.word=[a'")),
        ("inner.passed={a: 1, a: 2}", ("the key 'a' is given twice", "override 'inner.passed={a: 1, a: 2}'")),
    ],
)
def test_an_override_that_fits_nowhere_is_refused(tmp_path, override, fragments):
    values = {"entries": [{"count": 1}, {"count": 2}], "inner": {"count": 1, "numbers": []}}
    message = refused(Outer, written(tmp_path / "outer.yaml", values), override)
    for fragment in fragments:
        assert fragment in message


@pytest.mark.parametrize(
    ("sample", "overrides", "said"),
    [
        ("t5", ["objective={kind: masked_lm}"], "needs one Transformer (no model.generator, no model.decoder_layers)"),
        ("encoder", ["objective={kind: span_corruption}"], "needs an encoder with a decoder (model.decoder_layers)"),
        ("electra", ["phases.0.objective={kind: masked_lm}"], "phases.0.objective.kind = masked_lm needs one"),
        ("electra", ["model.generator=null"], "needs a discriminator with a model.generator"),
        ("electra", ["model.generator.heads=3"], "model.generator: its width must divide by its heads"),
        ("electra", ["model.transform_head=true"], "model.transform_head = false"),
        ("electra", ["model.tie_embeddings=false"], "model.tie_embeddings = true"),
        ("electra", ["model.width_base=64"], "remove model.generator or model.decoder_layers"),
        ("decoder", ["model.width_base=64", "optim={kind: lamb, lr: 1e-3}"], "with optim.kind = lamb leave it out"),
        ("decoder", ["model.depth_base=1", "optim={kind: lamb, lr: 1e-3}"], "model.depth_base is for adamw and muon"),
        ("electra", ["model.depth_base=1"], "model.depth_base is for one Transformer with model.norm_position = pre"),
        ("bert", ["model.depth_base=1"], "model.depth_base is for one Transformer with model.norm_position = pre"),
        ("decoder", ["optim={kind: muon, lr: 0.02, momentum: 0.5}"], "momentum_floor = 0.85 is above optim.momentum"),
        ("t5", ["model.causal=true"], "model.decoder_layers needs model.causal = false"),
        ("t5", ["model.window=8"], "needs model.decoder_layers, and no model.window"),
        ("t5", ["model.embed_width=64"], "model.embed_width = 64 differs from model.width"),
        ("t5", ["model.rope_scaling={kind: yarn, original_positions: 64}"], "found relative"),
        ("decoder", ["model.positions=relative"], "model.positions = relative needs model.decoder_layers"),
        (
            "decoder",
            ["model.rope_theta=1", "model.rope_scaling={kind: yarn, original_positions: 64}"],
            "above 1, found 1",
        ),
    ],
)
def test_a_model_and_an_objective_that_do_not_go_together_are_refused_with_the_keys(sample, overrides, said):
    with pytest.raises(ConfigError) as error:
        load(RunConfig, ROOT / f"configs/sample/{sample}.yaml", overrides)
    assert said in str(error.value)


def test_what_a_vocabulary_and_a_window_are_too_small_for_is_refused(prepared, tmp_path):
    keys = {"corpus": str(prepared.corpus), "out": str(tmp_path), "kind": "byte", "vocab_size": 560, "plot": False}
    tokenizer_stage.run(TokenizerConfig(**keys, sentinels=4))
    path, tokenizer = ROOT / "configs/sample/t5.yaml", open_tokenizer(tmp_path)
    learned = ["model.positions=learned", "model.max_positions=64", "objective.mean_span=9", "export=null"]
    run = load(RunConfig, path, [*learned, "objective.target_tokens=92"])
    with pytest.raises(ConfigError) as error:
        run.objectives(tokenizer)
    assert "it writes up to 92 tokens, and model.max_positions = 64" in str(error.value)
    run = load(RunConfig, path, ["objective.mean_span=19", "phases.0.seq_len=128"])
    with pytest.raises(ConfigError, match=r"held-out text could not be scored: .* needs more sentinels"):
        run.objectives(tokenizer)


# Round trip


@pytest.mark.parametrize("name", ["encoder", "decoder"])
def test_a_sample_run_loads_back_equal(name):
    config = load(RunConfig, ROOT / f"configs/sample/{name}.yaml")
    assert build(RunConfig, parse(dump(config), "dump"), "dump") == config


words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | words
free_form = st.dictionaries(
    words, st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(words, inner), max_leaves=5)
)
shares = st.floats(min_value=0, max_value=1, exclude_max=True)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    out=words,
    seed=st.integers(min_value=0, max_value=2**63 - 1),
    shards=words.filter(lambda word: word not in NULL),
    lr=st.floats(min_value=0, exclude_min=True, max_value=1e8),
    betas=st.tuples(shares, shares),
    deepspeed=free_form,
    block_tokens=st.none() | st.integers(1, 1000).map(lambda n: 32 * n),
    dialect=st.none() | st.sampled_from(["bert", "qwen3"]),
    objective=st.sampled_from(["masked_lm", "causal_lm"]),
    deterministic=st.booleans(),
)
def test_a_dumped_run_loads_back_equal(
    out, seed, shards, lr, betas, deepspeed, block_tokens, dialect, objective, deterministic
):
    values = run_values(
        NOWHERE,
        Path("runs/x"),
        objective,
        seed=seed,
        data={"shards": shards, "block_tokens": block_tokens},
        optim={"lr": lr, "betas": betas},
        engine={"deepspeed": {"passed": deepspeed}, "deterministic": deterministic},
        export=None if dialect is None else {"dialect": dialect},
    )
    config = build(RunConfig, {**values, "out": out}, "test")
    text = dump(config)
    assert build(RunConfig, parse(text, "dump"), "dump") == config
    assert dump(build(RunConfig, parse(text, "dump"), "dump")) == text


def test_other_stages_load_back_equal(tmp_path):
    rates = ["learning_rates=[3e-4, 1]", "dev_seeds=[0]"]
    finetune = load(FinetuneConfig, ROOT / "configs/sample/finetune-lora-zh.yaml", rates)
    recipe = Recipe(name="名", sources=[{"name": "no", "files": ["null", "1e3", "a: b"], "licence": "©"}])
    tokenizer = TokenizerConfig(corpus="~", out="", kind="bert", vocab_size=100, lowercase=None)
    odd = Inner(word="\x85 Â", maybe="\x07 词\u2028", passed={"\x85": ["\ufeff", "a\x85\n"], "k" * 200: ": #"})
    for config in (finetune, recipe, tokenizer, odd):
        (tmp_path / "dump.yaml").write_text(dump(config), encoding="utf-8")
        assert load(type(config), tmp_path / "dump.yaml") == config


# Resume

CHANGES = {  # key → another value, and whether a resumed run may have it
    "out": ("elsewhere", "free"),
    "seed": ("8", "frozen"),
    "data.shards": ("moved", "free"),
    "data.corpora": ("[{name: en, shards: moved, weight: 1}]", "free"),
    "data.tokenizer": ("moved", "free"),
    "data.windows": ("documents", "frozen"),
    "data.block_tokens": ("64", "frozen"),
    "data.workers": ("2", "free"),
    "data.prefetch": ("9", "free"),
    "data.read_ahead": ("true", "free"),
    "data.checksums": ("true", "free"),
    "model.dropout": ("0.1", "frozen"),
    "objective.mask_ratio": ("0.3", "frozen"),
    "optim.lr": ("1e-2", "past"),
    "optim.betas": ("[0.9, 0.99]", "frozen"),
    "phases": ("[{steps: 12, seq_len: 32, batch_tokens: 128, decay_steps: 4}]", "past"),
    "branch_from": ("{run: runs/x, step: 4}", "frozen"),
    "engine": ("{micro_batch: 4, zero_stage: 3, precision: bf16}", "free"),
    "evaluate.every_steps": ("3", "free"),
    "checkpoint.keep": ("9", "free"),
    "log_every": ("1", "free"),
    "export.dialect": ("bert", "free"),
}


def test_the_table_of_changes_has_every_key_of_a_run():
    assert {key.split(".")[0] for key in CHANGES} == set(RunConfig.model_fields)
    data = RunConfig.model_fields["data"].annotation
    assert {key for key in CHANGES if key.startswith("data.")} == {f"data.{key}" for key in data.model_fields}


@pytest.mark.parametrize("key", CHANGES)
def test_a_run_continues_with_free_changes_alone(path, key):
    value, rule = CHANGES[key]
    instead = ["data.shards=null"] if key == "data.corpora" else []
    old, new = load(RunConfig, path), load(RunConfig, path, [f"{key}={value}", *instead])
    assert old != new
    frozen = [line.split(":")[0] for line in resume_conflicts(old, new)]
    changes_the_past = past_conflicts((old.optim, old.phases), (new.optim, new.phases), step=12)
    assert frozen == ([key] if rule == "frozen" else [])
    assert bool(changes_the_past) == (rule == "past")
    assert not past_conflicts((old.optim, old.phases), (new.optim, new.phases), step=0)


def test_a_conflict_shows_both_values(path):
    old, new = load(RunConfig, path), load(RunConfig, path, ["seed=8", "model.dropout=0.1", "optim.eps=2e-3"])
    assert resume_conflicts(old, new) == ["seed: 7 → 8", "model.dropout: 0.0 → 0.1", "optim.eps: 1e-08 → 0.002"]
    assert resume_conflicts(new, new) == []


def test_another_objective_is_one_conflict(tmp_path):
    masked = build(RunConfig, run_values(NOWHERE, Path("x")), "test")
    causal = build(RunConfig, run_values(NOWHERE, Path("x"), "causal_lm"), "test")
    for old, new in ((masked, causal), (causal, masked)):
        lines = [line for line in resume_conflicts(old, new) if line.startswith("objective")]
        assert len(lines) == 1 and "masked_lm" in lines[0] and "causal_lm" in lines[0]


EXTREMES = ["0", "-1", "1", "1e308", "1e-320", str(2**31), str(2**63), "9" * 4400, "nan", "", "x" * 3000, [], ["0"], {}]
EXTREMES += ["null", "true", "\0", [["1"]], {"a": "1"}, "0.5"]


def keys_of(values: dict | list, above: tuple = ()) -> list[tuple]:
    found = []
    for key, value in values.items() if isinstance(values, dict) else enumerate(values):
        found.append((*above, key))
        found += keys_of(value, (*above, key)) if isinstance(value, dict | list) else []
    return found


def test_extreme_values_of_every_key_are_refused_in_short_or_can_be_planned_with():
    """No number gives a traceback: a valid configuration always has a schedule and a size."""
    begin = {"run": "r", "step": 3, "skip_steps": [5, 6]}
    values = run_values(NOWHERE, Path("x"), branch_from=begin, export={"dialect": "bert"})
    whole = parse(dump(build(RunConfig, values, "test")), "dump")
    planned = 0
    for *above, key in keys_of(whole):
        for extreme in EXTREMES:
            changed = copy.deepcopy(whole)
            section = functools.reduce(lambda inside, name: inside[name], above, changed)
            section[key] = extreme
            try:
                run = build(RunConfig, changed, "test").resolved()
                assert [lr_at(step, run.optim, run.phases) >= 0 for step in (0, run.steps - 1)] == [True, True]
                schedule_notes(run.optim, run.phases)
                assert branch.reads(run.steps - 1, run.phases, run.skips) >= run.steps - 1
                deepspeed_config(run.engine, run.optim.clip or 1e9)
                if "model" in above:
                    parameters_of(run.model, 100)
                planned += 1
            except UserError as error:
                assert len(str(error)) < 5000, (above, key)
    assert planned > 100
