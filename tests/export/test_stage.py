"""Every folder here is a real export: a checkpoint written by an engine, opened by transformers in a fresh process."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from pretrain import config, export, huggingface
from pretrain import tokenizer as tokenizer_stage
from pretrain.dialects import DIALECTS, Dialect, check_expressible
from pretrain.errors import ConfigError, ExportError, ResumeError
from pretrain.export import ExportConfig, card, provenance, reference
from pretrain.export.facts import Facts
from pretrain.export.stage import verify
from pretrain.model.attention import Layout
from pretrain.model.config import ModelConfig
from pretrain.model.models import model_of
from pretrain.model.transformer import Transformer
from pretrain.objectives import OBJECTIVES
from pretrain.objectives.learner import Learner
from pretrain.order.rows import of_stream
from pretrain.prompting import generate
from pretrain.shards import Shards
from pretrain.storage.index import listed
from pretrain.tokenizer import TokenizerConfig, open_tokenizer
from pretrain.training import checkpoint
from pretrain.training.checkpoint import Checkpoint, TrainState
from pretrain.training.engine.config import EngineConfig
from pretrain.training.engine.local import LocalEngine
from pretrain.training.engine.peers import Peers
from pretrain.training.engine.ranks import World
from pretrain.training.optim.adamw import AdamW, AdamWConfig
from pretrain.training.published import fill, shape_of
from pretrain.training.saving import Writer
from tests.conftest import DECODER, ENCODER
from tests.helpers.entries import entries

transformers = pytest.importorskip("transformers", reason="needs pip install '.[export]'")
huggingface_hub = pytest.importorskip("huggingface_hub", reason="comes with transformers")

BERT = {**ENCODER, "heads": 4, "mlp_width": 48, "max_positions": 40}
QWEN3 = {**DECODER, "kv_heads": None, "head_width": None, "mlp_width": 48}
UNLIKE_QWEN3_8B = {"kv_heads": 2, "head_width": 6, "tie_embeddings": False, "rope_theta": 500.0}
UNLIKE_QWEN3_8B |= {"width_base": 16, "rope_scaling": {"kind": "yarn", "original_positions": 16}}

LINES = [
    "In the beginning God created the heaven and the earth.",
    "床前明月光，疑是地上霜。举头望明月，低头思故乡。",
    "And the earth was without form, and void; and darkness was upon the face of the deep.",
    "白日依山尽，黄河入海流。欲穷千里目，更上一层楼。",
    "The café's naïve WordPiece: 3.14 and 中文 mixed.",
]


SCORE = {"step": 1, "corpus": "", "loss": 4.5, "standard_error": 0.01, "no_context_loss": 5.25, "gain": 0.75}
SCORE |= {"accuracy": 0.25, "bits_per_byte": None, "targets": 12345, "learnt": True}
SCORES = [{**SCORE, "loss": 9.0}, {**SCORE, "step": 4, "loss": 8.0}, SCORE]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The fresh processes read the variable; this one has started already."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory) -> dict:
    """A tokenizer of each kind and a second `bert` one, `other`, trained on a few lines of English and Chinese."""
    root = tmp_path_factory.mktemp("vocabularies")
    (root / "text.txt").write_text("\n\n".join(f"{line} {n}" for n in range(30) for line in LINES), encoding="utf-8")
    made = {}
    sizes = {"bert": 200, "byte": 560, "other": 180, "bert-t5": 200, "byte-t5": 560}
    for name, size in sizes.items():
        made[name] = root / name
        keys = {"kind": "byte" if "byte" in name else "bert", "vocab_size": size, "plot": False}
        keys |= {"sentinels": 5} if "t5" in name else {}
        config = TokenizerConfig(corpus=str(root / "text.txt"), out=str(made[name]), **keys)
        tokenizer_stage.run(config)
    return made


ATTEMPT = {"from_step": 0, "branched": False, "command": "launch/pretrain.py run.yaml", "launcher": "deepspeed"}
ATTEMPT |= {"ranks": 8, "nodes": 2, "device": "NVIDIA H200", "engine": "deepspeed", "precision": "bf16"}
ATTEMPT |= {"torch": "2.13.0", "pretrain": "0.9"}
READ = {"name": "verses", "shards": "5" * 64, "tokens": 30, "padding": 2, "pass_tokens": 20}
HISTORY = {"attempts": [ATTEMPT, {**ATTEMPT, "from_step": 1, "nodes": 1}], "read": [READ]}


def trained(
    run, vocabulary, settings: dict, kind: str = "", history: dict | None = None, sharp: float = 1.0, step: int = 1
):
    """A checkpoint after `step`, with weights of its own, which are so large that a wrong one shows in the logits.

    Relative to its tokens, attention is `sharp` times as sharp.
    """
    tokenizer, model = open_tokenizer(vocabulary), ModelConfig(**settings)
    kind = kind or ("causal_lm" if model.causal else "masked_lm")
    config = OBJECTIVES[kind].Config(kind=kind)
    specials = tokenizer.specials | tokenizer.special_tokens
    objective = OBJECTIVES[kind](config, specials, tokenizer.vocab_size, 16, seed=0)
    transformer = model_of(model, tokenizer.vocab_size)
    generator = torch.Generator().manual_seed(step - 1)
    with torch.no_grad():
        for name, weight in transformer.named_parameters():
            weight.copy_(torch.normal(float(weight.ndim == 1), 0.4, weight.shape, generator=generator))
            if ".q." in name:
                weight *= sharp / (
                    2 * model.E**0.5 if model.positions == "relative" else 1
                )  # what scores are divided by

    engine = LocalEngine(Learner(transformer), AdamW(AdamWConfig(lr=1)), EngineConfig(micro_batch=2), 1.0, World())
    rows = of_stream(np.arange(2 * 17).reshape(2, -1), end=-1)
    engine.backward(engine(objective, objective.batch(rows, np.arange(2))), dict.fromkeys(objective.parts, 1 / 32))
    engine.step(1e-3)
    text = {
        "data": {"tokenizer": str(vocabulary), "shards": "shards"},
        "model": model.model_dump(),
        "objective": config.model_dump(),
        "phases": [{"steps": 4, "seq_len": 16, "batch_tokens": 32}],
        "seed": 0,
    }
    identity = {"shards": "5" * 64, "tokenizer": tokenizer.fingerprint, "recorded": history or {}}
    Writer(run, engine, Peers(World()), yaml.safe_dump(text)).save(TrainState(step, step), identity)
    scores = [*SCORES, {**SCORES[-1], "gain": "0.2"}]  # and damaged lines, which are passed over
    (run / "evaluations.jsonl").write_text("".join(f"{json.dumps(score)}\n" for score in scores) + '{"step": 1, "cor')
    return run


@pytest.fixture(scope="module")
def encoder(tmp_path_factory, vocabularies):
    return trained(tmp_path_factory.mktemp("encoder"), vocabularies["bert"], BERT | {"vocab_multiple": 64})


@pytest.fixture(scope="module")
def decoder(tmp_path_factory, vocabularies):
    settings = QWEN3 | UNLIKE_QWEN3_8B
    return trained(tmp_path_factory.mktemp("decoder"), vocabularies["byte"], settings, history=HISTORY)


@pytest.fixture(scope="module")
def encoder_hf(tmp_path_factory, encoder):
    """The exported folder and its certificate."""
    out = tmp_path_factory.mktemp("hf") / "encoder"
    return out, export.run(ExportConfig(checkpoint=str(encoder), dialect="bert", out=str(out)))


@pytest.fixture(scope="module")
def decoder_hf(tmp_path_factory, decoder):
    out = tmp_path_factory.mktemp("hf") / "decoder"
    return out, export.run(ExportConfig(checkpoint=str(decoder), dialect="qwen3", out=str(out)))


def test_the_mean_of_the_newest_checkpoints_is_exported(tmp_path, vocabularies, capsys):
    run = tmp_path / "run"
    for step in (1, 2, 3):
        trained(run, vocabularies["bert"], BERT, step=step)
    out = tmp_path / "out"
    export.run(ExportConfig(checkpoint=str(run), dialect="bert", out=str(out), average=2))
    second, third = (Checkpoint(checkpoint.folder_of(run, step)) for step in (2, 3))
    mean = (second.weights()["embed.weight"].double() + third.weights()["embed.weight"]).div(2).float()
    found = load_file(out / "model.safetensors")["bert.embeddings.word_embeddings.weight"]
    assert torch.equal(found, mean[: len(found)])
    index, card = json.loads((out / "index.json").read_text()), (out / "README.md").read_text()
    assert index["averaged"] == [second.index["fingerprint"], third.index["fingerprint"]]
    assert "The weights are the mean of those after steps 2, 3." in card
    assert "Not known: held-out text was scored with the weights of single steps, not with their mean." in card
    assert json.loads((out / "model_card.json").read_text())["averaged"] == [2, 3]
    assert "equal to the mean of steps 2, 3 in transformers" in capsys.readouterr().out
    few = ExportConfig(checkpoint=str(second.folder), dialect="bert", out=str(out), average=3)
    with pytest.raises(ResumeError, match=r"too few checkpoints to average 3\n.*: step_00000001, step_00000002\n"):
        export.run(few)
    trained(run, vocabularies["bert"], BERT | {"layers": 1}, step=4)
    with pytest.raises(ExportError, match=r"cannot be averaged with step_00000004\n.*model.layers"):
        export.run(ExportConfig(checkpoint=str(run), dialect="bert", out=str(out), average=2))


@pytest.mark.parametrize("exported", ["encoder_hf", "decoder_hf"])
def test_an_export_is_equal_in_a_fresh_process(exported, request):
    folder, certificate = request.getfixturevalue(exported)
    assert certificate["max_logit_diff"] <= certificate["tolerance"] == 1e-4
    assert certificate["logit_std"] > 0.5, "logits this small would hide a wrong weight"
    assert len(certificate["hidden_diffs"]) == 3 and max(certificate["hidden_diffs"].values()) <= 1e-4
    assert certificate["texts"] == 400 and certificate["padded"] == 4
    assert certificate["transformers"] == transformers.__version__
    index = json.loads((folder / "index.json").read_text())
    assert index["stage"] == "export"
    assert index["recorded"]["certificate"] == certificate
    assert set(listed(index)) == {path.name for path in folder.iterdir()} - {"index.json"}
    card = {"README.md", "model_card.json"}
    assert not card & index["files"].keys(), "what is known of text and scores changes no identity"


def test_the_files_of_a_bert(encoder_hf, encoder):
    folder, _ = encoder_hf
    files = "README.md config.json index.json model.safetensors model_card.json tokenizer.json tokenizer_config.json"
    files += " vocab.txt"
    assert " ".join(sorted(path.name for path in folder.iterdir())) == files
    weights = load_file(folder / "model.safetensors")
    assert not any("pooler" in name or "decoder" in name for name in weights)
    assert not weights["bert.embeddings.token_type_embeddings.weight"].any()
    card = (folder / "README.md").read_text()
    assert "The pooler was not trained" in card
    assert "| all | 4.5000 ± 0.0100 | 5.2500 | 0.7500 | 25.0% | – | 12,345 |" in card, "of this step, the last"
    assert "a text is lower-cased, stripped of accents." in card
    assert "Sources, languages and licences of the text are not known: its shards were not found." in card
    assert "Step 1 of 4, 32 tokens" in card
    assert "mask_ratio: 0.15" in card
    assert Checkpoint(checkpoint.resolve(encoder)).index["fingerprint"] in card
    trained = sum(tensor.numel() for name, tensor in weights.items() if "token_type" not in name)
    padding = (len(Checkpoint(checkpoint.resolve(encoder)).weights()["embed.weight"]) - 200) * 33  # with the bias
    assert padding > 0 and f"{trained:,} weights" in card


def test_the_facts_of_a_card_are_json_of_a_schema_and_leave_out_what_is_not_known(encoder_hf, decoder_hf):
    encoder, decoder = (json.loads((folder / "model_card.json").read_text()) for folder, _ in (encoder_hf, decoder_hf))
    for known in (encoder, decoder):
        assert Facts(**known).written() == known
        assert known.keys() <= Facts.model_json_schema()["properties"].keys()
        assert not known.keys() & set(known["unknown"])
        assert (known["step"], known["planned_steps"], known["input_tokens"]) == (1, 4, 32)
        (score,) = known["held_out"]
        assert score["loss"] == 4.5 and "bits_per_byte" not in score
    lacking = ["step_seconds", "resumes", "text_tokens", "padding", "repeated_tokens", "sources", "attempts"]
    assert encoder["unknown"] == lacking and encoder["dialect"] == "bert"
    said = (encoder_hf[0] / "README.md").read_text()
    assert "Not known: the time that the steps took; how often the run was continued; how much of the windows" in said

    assert decoder["unknown"] == ["step_seconds", "sources"] and decoder["resumes"] == 1
    assert (decoder["text_tokens"], decoder["padding"], decoder["repeated_tokens"]) == (30, 2, 10)
    assert decoder["corpora"][0]["passes"] == 1.5 and decoder["attempts"] == HISTORY["attempts"]
    said = (decoder_hf[0] / "README.md").read_text()
    assert "30 of text, 10 of them beyond one pass over their corpus, and 2 of padding.\n" in said
    assert "\nThe model was trained with 1 restart.\n" in said
    assert "| 8 x NVIDIA H200 | 2 | bf16 | deepspeed, torch 2.13.0 |\n| 8 x NVIDIA H200 | 1 |" in said
    assert "```sh\nlaunch/pretrain.py run.yaml\n```" in said


def test_a_card_names_sources_languages_and_licences_as_the_hub_reads_them(prepared):
    index = Shards(prepared.shards["bert"]).index
    settings = {"data": {"shards": str(prepared.shards["bert"])}}
    texts = provenance.texts(settings, {"shards": index["fingerprint"]})
    said = card.data(texts)
    train = index["sides"]["train"]
    assert f"| tiny | {train['tokens']:,} | {train['raw_bytes']:,} | " in said and "| zh | zh | unstated |" in said
    read = huggingface_hub.ModelCard(card.front_matter("fill-mask", texts) + "text").data
    assert (read.language, read.license, read.pipeline_tag) == (["en", "zh"], "unknown", "fill-mask")
    (gone,) = provenance.texts(settings, {"shards": "0" * 64})
    assert gone.index is None and "its shards were not found" in card.data([gone])
    (alone,) = provenance.texts({"data": {"corpora": []}}, {"corpora": [["law", "1" * 64]]})
    assert alone.name == "law" and alone.index is None


@pytest.mark.parametrize(
    ("licences", "wanted"),
    [
        (["CC BY-SA 4.0", "cc-by-sa-4.0"], ("cc-by-sa-4.0", None)),
        (["public domain"], ("other", "public-domain")),
        (["MIT", "CC0 1.0"], ("other", "several")),
    ],
)
def test_the_licence_of_a_card_is_one_of_the_hub_s_or_other(licences, wanted):
    sources = [{"name": f"{n}", "language": "zh-Hant", "licence": licence} for n, licence in enumerate(licences)]
    text = provenance.CorpusText("x", "0", {"recorded": {"sources": sources}})
    read = huggingface_hub.ModelCard(card.front_matter("fill-mask", [text]) + "text").data
    assert (read.license, read.license_name) == wanted and read.language == ["zh"]


def test_a_card_says_that_a_model_has_learnt_nothing():
    plain = card.quality([SCORE], 1, "masked tokens")
    assert "learnt nothing" not in plain and "Targets are masked tokens; ±" in plain
    assert "it has learnt nothing" in card.quality([SCORE | {"learnt": False}], 1, "masked tokens")
    assert "not scored at step 7" in card.quality([], 7, "masked tokens")


def test_a_prompt_begins_with_the_end_mark_and_generate_stops_on_it(decoder_hf, vocabularies):
    folder, _ = decoder_hf
    assert "add_bos_token=False,max_length=16" in (folder / "README.md").read_text()
    ours = open_tokenizer(vocabularies["byte"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    end, text = ours.specials["eod"], "月光 and the earth"
    *body, last = ours.encode_batch([text])[0].tolist()
    assert last == end
    assert tokenizer(text)["input_ids"] == [end, *body]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    short, long = tokenizer(["月", text], padding=True, return_tensors="pt")["input_ids"]
    assert short[0] == model.config.pad_token_id, "prompts are padded on the left"
    assert long[0] == end
    assert model.generation_config.eos_token_id == end
    prompt = tokenizer(text, return_tensors="pt")
    assert list(prompt) == ["input_ids", "attention_mask"]
    likeliest = int(model(**prompt).logits[0, -1].argmax())
    rows = model.lm_head.weight.data
    rows[[end, likeliest]] = rows[[likeliest, end]]  # now the document is over
    assert model.generate(**prompt, max_new_tokens=3, do_sample=False).tolist() == [[end, *body, end]]


TASKS = {  # the tasks that `pipeline` opens a folder for
    "encoder_hf": ("fill-mask", "feature-extraction", "text-classification", "token-classification"),
    "decoder_hf": ("text-generation", "feature-extraction", "text-classification", "token-classification"),
}


@pytest.mark.parametrize("exported", TASKS)
def test_pipelines_of_transformers_open_the_folder(exported, request):
    folder, _ = request.getfixturevalue(exported)
    text = "the earth"
    tokens = len(transformers.AutoTokenizer.from_pretrained(folder)(text)["input_ids"])
    for task in TASKS[exported]:
        pipe = transformers.pipeline(task, model=str(folder), device="cpu")
        asked = f"the {pipe.tokenizer.mask_token}" if task == "fill-mask" else text
        found = pipe(asked, max_new_tokens=3, do_sample=False) if task == "text-generation" else pipe(asked)
        if task == "fill-mask":
            assert len(found) == 5 and all("token_str" in guess for guess in found)
        elif task == "text-generation":
            assert found[0]["generated_text"].startswith(text)
        elif task == "feature-extraction":
            assert torch.tensor(found).shape == (1, tokens, BERT["width"])
        elif task == "text-classification":
            assert found[0]["label"] in ("LABEL_0", "LABEL_1")
        else:
            assert all(0 <= entry["index"] < tokens for entry in found)


@pytest.mark.parametrize("exported", TASKS)
def test_the_trainer_of_transformers_trains_the_folder(exported, request, tmp_path):
    pytest.importorskip("accelerate", reason="needs pip install '.[finetune]'")
    folder, _ = request.getfixturevalue(exported)
    causal = exported == "decoder_hf"
    auto = transformers.AutoModelForCausalLM if causal else transformers.AutoModelForMaskedLM
    model, tokenizer = auto.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)
    before = model.get_input_embeddings().weight.detach().clone()
    collate = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=not causal, mlm_probability=0.5)
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, save_strategy="no"
    )
    rows = [tokenizer(line, truncation=True, max_length=16) for line in LINES]
    result = transformers.Trainer(model, arguments, train_dataset=rows, data_collator=collate).train()
    assert result.global_step == 2 and np.isfinite(result.training_loss)
    assert not torch.equal(model.get_input_embeddings().weight, before)


@pytest.mark.parametrize(
    ("dialect", "settings"),
    [
        ("bert", BERT | {"heads": 1}),
        ("bert", BERT | {"layers": 1, "width": 48, "head_width": 12, "kv_heads": 4}),
        ("qwen3", QWEN3),
        ("qwen3", QWEN3 | {"kv_heads": 1}),
        ("qwen3", QWEN3 | {"head_width": 16, "tie_embeddings": False}),
        ("qwen3", QWEN3 | UNLIKE_QWEN3_8B | {"norm_eps": 0.1}),
    ],
)
def test_packed_documents_get_the_logits_each_gets_alone(dialect, settings, tmp_path):
    """Positions restart and nothing leaks: two documents in one window of ours are two batches of theirs."""
    config = ModelConfig(**settings)
    ours = Transformer(config, 50)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in ours.parameters():
            weight.copy_(torch.normal(float(weight.ndim == 1), 0.4, weight.shape, generator=generator))
    weights = {name: weight.detach() for name, weight in ours.named_parameters()}
    settings = DIALECTS[dialect].config(config, 50, {"pad": 0, "unk": 1, "eod": 2})
    (tmp_path / "config.json").write_text(json.dumps(settings))
    save_file(DIALECTS[dialect].weights(config, weights), tmp_path / "model.safetensors", metadata={"format": "pt"})
    auto = transformers.AutoModelForCausalLM if config.causal else transformers.AutoModelForMaskedLM
    theirs, report = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())

    first, second = torch.randint(50, (1, 9), generator=generator), torch.randint(50, (1, 14), generator=generator)
    segments = torch.tensor([[0] * 9 + [1] * 14])
    positions = torch.cat((torch.arange(9), torch.arange(14)))[None]
    with torch.no_grad():
        packed = ours.logits(ours.eval()(torch.cat((first, second), 1), Layout(segments, positions, config.causal)))
        alone = torch.cat((theirs(first).logits, theirs(second).logits), 1)
    assert packed.std() > 0.5
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-4)


PAIRS = {
    "llama": ("eurobert", {**QWEN3, "qk_norm": False, "kv_heads": 2}),
    "modernbert_decoder": (
        "modernbert",
        {**BERT, "norm_position": "pre", "positions": "rope", "mlp": "geglu", "embed_norm": True, "first_norm": False}
        | {"window": 3, "global_every": 2, "norm_eps": 1e-5, "bias": False, "local_rope_theta": 100.0},
    ),
}


T5 = {**BERT, "norm": "rmsnorm", "norm_position": "pre", "positions": "relative", "mlp": "geglu_tanh", "bias": False}
T5 |= {"transform_head": False, "decoder_layers": 1, "head_width": 6, "init_std": 0.05}


@pytest.mark.parametrize("tied", [True, False])
def test_an_encoder_with_a_decoder_is_handed_over_for_conditional_generation(tied, vocabularies, tmp_path):
    """Attention of the model that is not tied is so sharp that rounding to fp32 changes logits by more than 1e-4."""
    name = "bert-t5" if tied else "byte-t5"
    settings = {**T5, "tie_embeddings": tied}
    run = trained(tmp_path / "run", vocabularies[name], settings, "span_corruption", sharp=1 if tied else 16)
    out = tmp_path / "t5"
    certificate = export.run(ExportConfig(checkpoint=str(run), dialect="t5", out=str(out)))
    assert certificate["logit_std"] > 0.5
    assert ("rounding" in certificate) == (certificate["max_logit_diff"] > 1e-4) == (not tied)
    assert certificate["max_logit_diff"] <= certificate["tolerance"] <= max(1e-4, certificate["logit_std"] / 100)
    assert ("Rounding to fp32 alone" in (out / "README.md").read_text(encoding="utf-8")) == (not tied)
    assert {"the encoder embeddings", "encoder layer 1", "decoder layer 0"} <= certificate["hidden_diffs"].keys()
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert type(model).__name__ == "T5ForConditionalGeneration" and not model.config.scale_decoder_outputs
    prompt = tokenizer("In the <extra_id_0> God", return_tensors="pt")
    assert tokenizer.convert_tokens_to_ids("<extra_id_0>") in prompt["input_ids"][0]
    assert prompt["input_ids"][0, -1] == model.generation_config.eos_token_id == tokenizer.eos_token_id
    written = model.generate(**prompt, max_new_tokens=5)[0]
    assert written[0] == tokenizer.pad_token_id
    ids = [token for token in written.tolist() if token not in (tokenizer.pad_token_id, tokenizer.eos_token_id)]
    options = {"prompts": ["In the <extra_id_0> God"], "max_new_tokens": 5, "temperature": 0}
    assert generate.run(generate.GenerateConfig(model=str(out), **options)) == [tokenizer.decode(ids)]
    assert "`<extra_id_0>`" in (out / "README.md").read_text(encoding="utf-8")

    weights = Checkpoint(checkpoint.resolve(run)).weights()
    ours = model_of(ModelConfig(**shape_of(str(out), {})), len(weights["embed.weight"]))
    assert fill(ours, str(out), open_tokenizer(vocabularies[name])) == []
    weights |= {"head.decoder.weight": weights["embed.weight"]} if tied else {}  # opened as a head of its own
    assert all(torch.equal(p, weights[key]) for key, p in ours.named_parameters())


def test_a_discriminator_is_handed_over_without_its_generator(vocabularies, tmp_path):
    generator = {"layers": 1, "width": 8, "heads": 2, "mlp_width": 16}
    settings = {**BERT, "transform_head": False, "embed_width": 20, "generator": generator}
    run = trained(tmp_path / "run", vocabularies["bert"], settings, "replaced_token_detection")
    out = tmp_path / "electra"
    certificate = export.run(ExportConfig(checkpoint=str(run), dialect="electra", out=str(out)))
    assert certificate["max_logit_diff"] <= 1e-4 and certificate["logit_std"] > 0.1
    assert not [name for name in load_file(out / "model.safetensors") if "generator" in name]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(out)
    weights = Checkpoint(checkpoint.resolve(run)).weights()
    assert torch.equal(model.get_input_embeddings().weight, weights["embed.weight"])

    ours = model_of(ModelConfig(**shape_of(str(out), {"generator": generator})), len(weights["embed.weight"]))
    lacking = fill(ours, str(out), open_tokenizer(vocabularies["bert"]))
    assert lacking and all(name.startswith("generator.") for name in lacking)
    with pytest.raises(ConfigError, match="it needs a generator"):
        shape_of(str(out), {})


SMALL = {"dtype": "bfloat16", "max_shard_gb": 1e-5}


@pytest.mark.parametrize("decoder_dialect", PAIRS)
def test_a_hybrid_is_handed_over_as_a_decoder_and_as_an_encoder(decoder_dialect, vocabularies, tmp_path):
    """The vocabulary is of kind bert, so the decoder's texts begin with [SEP] and have no [CLS].

    The encoder is written in bfloat16 and as several files.
    """
    encoder_dialect, settings = PAIRS[decoder_dialect]
    run = trained(tmp_path / "run", vocabularies["bert"], {**settings, "causal": True}, "hybrid")
    for dialect, written in ((decoder_dialect, {}), (encoder_dialect, SMALL)):
        out = tmp_path / dialect
        certificate = export.run(ExportConfig(checkpoint=str(run), dialect=dialect, out=str(out), **written))
        assert certificate["max_logit_diff"] <= 1e-4 and certificate["logit_std"] > 0.5
        layers = [f"layer {layer}" for layer in range(settings["layers"])]
        assert list(certificate["hidden_diffs"]) == ["the embeddings", *layers]
        assert max(certificate["hidden_diffs"].values()) <= 1e-4
        assert certificate["dtype"] == written.get("dtype", "float32") and certificate["computed_in"] == "float32"
        tokenizer = transformers.AutoTokenizer.from_pretrained(out)
        sep, cls = tokenizer.sep_token_id, tokenizer.cls_token_id
        ids = tokenizer("the earth")["input_ids"]
        assert ids[0] == (sep if dialect == decoder_dialect else cls) and (ids[-1] == sep) == (
            dialect == encoder_dialect
        )
        assert "predicted by the token before them" in (out / "README.md").read_text(encoding="utf-8")

    weights = Checkpoint(checkpoint.resolve(run)).weights()
    files = sorted(path.name for path in out.glob("*.safetensors*"))
    assert len(files) > 3 and files[-1] == "model.safetensors.index.json"
    assert files[0] == f"model-00001-of-{len(files) - 1:05d}.safetensors"
    stored = {name: tensor for file in files[:-1] for name, tensor in load_file(out / file).items()}
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    places = json.loads((out / files[-1]).read_text())
    assert places["weight_map"].keys() == stored.keys()
    assert places["metadata"]["total_size"] == 2 * sum(tensor.numel() for tensor in stored.values())
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert "The weights are written in bfloat16" in (out / "README.md").read_text(encoding="utf-8")

    ours = Transformer(ModelConfig(**shape_of(str(out), {})), len(weights["embed.weight"]))
    assert fill(ours, str(out), open_tokenizer(vocabularies["bert"])) == []
    assert all(torch.equal(p, weights[name].bfloat16().float()) for name, p in ours.named_parameters())
    classifier = huggingface.open_model(
        str(out), transformers.AutoModelForSequenceClassification, lambda name, model: True, dtype="float32"
    )[0]
    assert torch.equal(classifier.get_input_embeddings().weight, ours.embed.weight)


def test_a_checkpoint_opens_as_the_model_that_was_saved(decoder):
    source = Checkpoint(checkpoint.resolve(decoder))
    model = export.opened(ModelConfig(**QWEN3 | UNLIKE_QWEN3_8B), source.weights())
    assert not model.training
    for name, weight in model.named_parameters():
        assert torch.equal(weight, source.weights()[name])


def test_exporting_again_replaces_the_folder_and_keeps_its_identity(encoder_hf, encoder, monkeypatch):
    # The fresh process works in another folder: a relative path of Python, from PATH=.venv/bin:…, must not lose it.
    monkeypatch.setattr(sys, "executable", os.path.relpath(sys.executable))
    folder, _ = encoder_hf
    before = json.loads((folder / "index.json").read_text())
    again = ExportConfig(checkpoint=str(encoder / "checkpoints/step_00000001"), dialect="bert", out=str(folder))
    export.run(again.model_copy(update={"replace": True}))
    after = json.loads((folder / "index.json").read_text())
    assert after["fingerprint"] == before["fingerprint"]
    assert entries(folder.parent) == [folder.name]


def with_weights(dialect: Dialect, change) -> Dialect:
    """A further dialect: `dialect` with `change` made to its tensors."""

    def weights(model, ours):
        theirs = {name: tensor.clone() for name, tensor in dialect.weights(model, ours).items()}
        change(theirs)
        return theirs

    changed = copy.copy(dialect)
    changed.weights = weights
    return changed


def test_one_wrong_weight_is_found_and_nothing_is_left(encoder, tmp_path, monkeypatch):
    def change(theirs):
        theirs["bert.encoder.layer.1.attention.self.value.bias"][5] += 0.002

    monkeypatch.setitem(DIALECTS, "bert", with_weights(DIALECTS["bert"], change))
    with pytest.raises(ExportError) as caught:
        export.run(ExportConfig(checkpoint=str(encoder), dialect="bert", out=str(tmp_path / "hf")))
    assert "not equal" in caught.value.what
    assert "logits differ by up to" in caught.value.details[0]
    assert "the first difference is in layer 1: hidden states differ" in caught.value.details[1]
    assert "rounding to fp32 changes our logits by up to" in caught.value.details[2]
    assert entries(tmp_path) == []


def test_everything_else_that_differs_is_named(decoder_hf, decoder, vocabularies, tmp_path):
    """A missing weight, a weight without a place, another template, another token and another special token.

    One fresh process finds all of them.
    """
    folder = tmp_path / "hf"
    shutil.copytree(decoder_hf[0], folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up.weight"] = weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer = json.loads((vocabularies["byte"] / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = tokenizer["model"]["vocab"]
    vocab["‿‿"] = vocab.pop("‿a")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": 7}))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"padding_side": "right"}))
    model = export.opened(ModelConfig(**QWEN3 | UNLIKE_QWEN3_8B), Checkpoint(checkpoint.resolve(decoder)).weights())
    reference.write(tmp_path / "said", model, open_tokenizer(vocabularies["byte"]), DIALECTS["qwen3"].auto_class)
    with pytest.raises(ExportError) as caught:
        verify(folder, tmp_path / "said", lambda: reference.write_exact(tmp_path / "said", model))
    said = "\n".join(caught.value.details)
    assert "missing_keys: model.layers.1.mlp.up_proj.weight" in said
    assert "unexpected_keys: model.layers.1.mlp.up.weight" in said
    assert "2 tokens have another id or none, such as '\\u203fa'" in said
    assert "encoding 'the' as text gives" in said
    assert "as a pair" in said
    assert "generation_config.json: eos_token_id is 7, should be 2" in said
    assert "the first difference is in layer 1" in said
    assert "the tokenizer does not pad on the left" in said


def test_another_tokenizer_is_refused(encoder, vocabularies, tmp_path):
    other = vocabularies["other"]
    config = ExportConfig(checkpoint=str(encoder), dialect="bert", out=str(tmp_path / "hf"), tokenizer=str(other))
    with pytest.raises(ExportError, match="another tokenizer") as caught:
        export.run(config)
    said = str(caught.value)
    for folder in (vocabularies["bert"], other):
        assert open_tokenizer(folder).fingerprint[:12] in said
    assert entries(tmp_path) == []


def test_export_without_transformers_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ExportError, match="needs transformers\n  pip install"):
        check_expressible(ModelConfig(**QWEN3), "qwen3", {"eod": 0})


def test_training_does_not_import_transformers_and_the_check_does_not_import_ours():
    command = "import sys, pretrain.export; sys.exit('transformers' in sys.modules)"
    package = Path(export.__file__).parent
    subprocess.run([sys.executable, "-c", command], cwd=package.parent.parent, check=True)
    imports = [line for line in (package / "parity.py").read_text().splitlines() if "import" in line.split()]
    assert imports and not any("pretrain" in line for line in imports)


def test_an_unknown_dialect_and_a_tokenizer_without_a_mask_are_refused():
    with pytest.raises(ConfigError, match="dialect = 'qwen': input should be 'bert', 'electra', 'modernbert',"):
        config.build(ExportConfig, {"checkpoint": "run", "dialect": "qwen", "out": "hf"}, "export.yaml")
    with pytest.raises(ExportError, match="the tokenizer has no special token for mask: bert needs cls, sep, mask"):
        check_expressible(ModelConfig(**BERT), "bert", {"pad": 0, "cls": 1, "sep": 2})
