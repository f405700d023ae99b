"""Ask one program about one exported folder, in an environment that has none of our code (see handoff.py).

    python -P openers.py PROGRAM PLACE RESULT

PLACE has folder/ (the exported folder), answers.json and answers.safetensors (our ids, hidden states and logits of a
few texts) and reference/ (for parity.py). RESULT gets {"outcome": "yes", "difference": largest difference}, perhaps
with a note, or {"outcome": "refused", "reason": one line}. handoff.py takes the last line that names another error.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

TOLERANCE = 1e-3  # of logits, hidden states and sums of log-probabilities, in fp32 on a CPU


CLASSIFIERS = {
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
}


class Refused(Exception):
    """The program opens the folder, or cannot, for a reason that one line says."""


def last_error(stderr: str) -> str:
    """The first sentence of the last line that names an error, else of the last line."""
    lines = [line.strip() for line in stderr.replace("[rank0]: ", "").splitlines() if line.strip()]
    lines = lines or ["it ended without a message"]
    named = [line for line in lines if re.match(r"[\w.]*(Error|ERROR)\b", line)]
    return re.split(r"(?<=\w)\. ", (named or lines)[-1])[0]


class Answers:
    """The exported folder and what our model says about a few texts."""

    def __init__(self, place: Path):
        said = json.loads((place / "answers.json").read_text(encoding="utf-8"))
        tensors = load_file(place / "answers.safetensors")
        self.place, self.folder, self.texts = place, str(place / "folder"), said["texts"]
        self.auto_class, self.pipeline, self.causal = said["auto_class"], said["pipeline"], said["causal"]
        self.ids, self.hidden, self.logits = (  # of each text (T,), (T, D), (T, V)
            [tensors[f"{n}.{kind}"] for n in range(len(self.texts))] for kind in ("ids", "hidden", "logits")
        )
        self.decodes = "0.given" in tensors  # an encoder with a decoder, whose logits are those of the decoder
        self.given = [tensors.get(f"{n}.given") for n in range(len(self.texts))]  # (T,), what that decoder is given

    def model(self):
        import transformers

        return getattr(transformers, self.auto_class).from_pretrained(self.folder).eval()

    def asked(self, n: int) -> dict[str, torch.Tensor]:
        """The arguments of the model for text `n`, each (1, T)."""
        found = {"input_ids": self.ids[n][None]}
        return found | ({"decoder_input_ids": self.given[n][None]} if self.decodes else {})

    def from_logits(self, logits: Callable[..., torch.Tensor]) -> float:
        """The largest difference between our logits and `logits(**asked(n))`, over the texts n."""
        return max(float((logits(**self.asked(n))[0] - ours).abs().max()) for n, ours in enumerate(self.logits))

    def row(self, n: int) -> dict[str, torch.Tensor]:
        """A text with labels for training: its own tokens, or for a detector whether each is replaced."""
        ids = self.ids[n]
        return {"input_ids": ids, "labels": ids if self.logits[n].dim() == 2 else torch.arange(len(ids)) % 2}

    def pooled(self) -> torch.Tensor:
        """(texts, D): the mean of our hidden states over the tokens of each text."""
        return torch.stack([hidden.mean(0) for hidden in self.hidden])


def in_transformers(answers: Answers) -> float | tuple[float, str]:
    """The whole proof of the export stage, with this version: logits, ids, padding, generation, saving again.

    The pipeline of an encoder with a decoder is asked here, because the newest version has none.
    """
    result = answers.place / "parity.json"
    script = Path(__file__).resolve().parent.parent / "pretrain/export/parity.py"
    asked = [sys.executable, "-P", script, answers.folder, answers.place / "reference", result]
    done = subprocess.run(asked, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise Refused(last_error(done.stderr))
    found = json.loads(result.read_text(encoding="utf-8"))
    if found["faults"]:
        raise Refused(found["faults"][0])
    if answers.decodes and has_pipeline(answers.pipeline):
        check_written(answers)
        return found["max_logit_diff"], f"with pipeline('{answers.pipeline}')"
    return found["max_logit_diff"]


def has_pipeline(task: str) -> bool:
    from transformers.pipelines import PIPELINE_REGISTRY

    return task in PIPELINE_REGISTRY.get_supported_tasks()


def check_written(answers: Answers) -> None:
    """Raise Refused unless the dialect's own pipeline, or `generate` where it has none, gives our likeliest token."""
    from transformers import AutoTokenizer, pipeline

    tokenizer, text, task = AutoTokenizer.from_pretrained(answers.folder), answers.texts[0], answers.pipeline
    own = pipeline(task, answers.folder, device="cpu") if has_pipeline(task) else None
    if task == "fill-mask":
        asked = f"In the beginning was the {tokenizer.mask_token}."
        ids = torch.tensor([tokenizer(asked)["input_ids"]])
        at = int((ids[0] == tokenizer.mask_token_id).nonzero())
        ours, theirs = int(answers.model()(ids).logits[0, at].argmax()), own(asked)[0]["token"]
    elif task == "text-generation" or answers.decodes:
        ours = int(answers.logits[0][0 if answers.decodes else -1].argmax())
        options = {"max_new_tokens": 1, "do_sample": False}
        if own is None:
            written = answers.model().generate(answers.ids[0][None], **options)[0]
        else:
            (found,) = own(text, return_tensors=True, **options)
            (written,) = (ids for key, ids in found.items() if key.endswith("token_ids"))
        theirs = int(list(written)[-1])
    else:
        ours = theirs = 0
    if ours != theirs:
        raise Refused(f"{task} answers with token {theirs}, and {ours} is the likeliest")


def in_pipelines(answers: Answers) -> float | tuple[float, str]:
    """The dialect's own pipeline gives our likeliest token, features are our hidden states, classifiers open."""
    import transformers
    from transformers import AutoTokenizer, pipeline

    check_written(answers)
    lacking, text, whole = [], answers.texts[0], answers.model()
    for task, auto in CLASSIFIERS.items():
        if type(whole.config) in getattr(transformers, auto)._model_mapping:
            pipeline(task, answers.folder, device="cpu")(text)
        else:
            lacking.append(task)
    encoder = whole.get_encoder() if answers.decodes else answers.folder
    tokenizer = AutoTokenizer.from_pretrained(answers.folder)
    features = pipeline("feature-extraction", encoder, tokenizer=tokenizer, device="cpu")
    difference = max(
        float((torch.tensor(features(one)[0]) - ours).abs().max())
        for one, ours in zip(answers.texts, answers.hidden, strict=True)
    )
    notes = [f"transformers has no class for {' and '.join(lacking)}"] if lacking else []
    if not has_pipeline(answers.pipeline):
        notes.append(f"this version has no {answers.pipeline}, and `generate` was asked; features are the encoder's")
    return (difference, "; ".join(notes)) if notes else difference


def in_trainer(answers: Answers) -> float:
    """Two steps of Trainer or Seq2SeqTrainer lower the loss. The difference is that of the logits before them."""
    import transformers

    kind = "Seq2Seq" if answers.decodes else ""
    model = answers.model()
    before = answers.from_logits(lambda **asked: model(**asked).logits)
    settings = getattr(transformers, f"{kind}TrainingArguments")(
        output_dir=str(answers.place / "trainer"), max_steps=2, learning_rate=1e-3, logging_steps=1, report_to=[],
        save_strategy="no", use_cpu=True, disable_tqdm=True, warmup_steps=0, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = getattr(transformers, f"{kind}Trainer")(model=model, args=settings, train_dataset=[answers.row(3)] * 16)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if not losses[1] < losses[0]:
        raise Refused(f"the loss does not fall: {losses}")
    return before


def in_peft(answers: Answers) -> float:
    """A LoRA on every matrix changes nothing at first, learns in a step, and is merged into the weights."""
    from peft import LoraConfig, get_peft_model

    kind = {"task_type": "SEQ_2_SEQ_LM"} if answers.decodes else {}
    model = get_peft_model(answers.model(), LoraConfig(target_modules="all-linear", r=4, **kind)).eval()
    with torch.no_grad():
        before = answers.from_logits(lambda **asked: model(**asked).logits)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        losses.append(model(**{name: tensor[None] for name, tensor in answers.row(3).items()}).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    if not losses[2] < losses[0]:
        raise Refused(f"the loss of the adapter does not fall: {float(losses[0]):.4f}, {float(losses[2]):.4f}")
    with torch.no_grad():
        each = [answers.asked(n) for n in range(len(answers.texts))]
        trained = [model(**asked).logits for asked in each]
        merged = model.merge_and_unload()
        after = [merged(**asked).logits for asked in each]
    changed = max(float((a - b).abs().max()) for a, b in zip(trained, after, strict=True))
    return max(before, changed)


def in_sentence_transformers(answers: Answers) -> float | tuple[float, str]:
    """The mean-pooled embeddings of the texts, encoded as one padded batch."""
    from sentence_transformers import SentenceTransformer, models

    words = models.Transformer(answers.folder)
    pooling = models.Pooling(answers.hidden[0].shape[1], pooling_mode="mean")
    encoder = SentenceTransformer(modules=[words, pooling], device="cpu")

    def difference() -> float:
        return float((encoder.encode(answers.texts, convert_to_tensor=True) - answers.pooled()).abs().max())

    found = difference()
    if found <= TOLERANCE or not answers.causal:
        return found
    encoder.tokenizer.padding_side = "right"
    note = f"after `tokenizer.padding_side = 'right'`; padded on the left, learned positions count it ({found:.1g})"
    return difference(), note


def in_onnx_runtime(answers: Answers) -> float:
    """Exported with torch.onnx for one length, and run with the lengths of the texts."""
    import onnxruntime

    class Logits(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, *given):
            return self.model(**dict(zip(names, given, strict=True)), **self.options).logits

    names = ["input_ids", "attention_mask"] + (["decoder_input_ids"] if answers.decodes else [])
    module, path = Logits(answers.model()), str(answers.place / "model.onnx")
    module.options = {"use_cache": False} if answers.causal or answers.decodes else {}
    ids = torch.stack([answers.ids[3][:12], answers.ids[3][1:13]])
    batch = torch.export.Dim("batch")
    lengths = [{0: batch, 1: torch.export.Dim(name)} for name in ("length", "written")]
    given = (ids, torch.ones_like(ids), ids[:, :7])[: len(names)]
    with torch.no_grad():
        torch.onnx.export(
            module, given, path, dynamo=True, verbose=False, input_names=names, output_names=["logits"],
            dynamic_shapes=(tuple([lengths[0], *lengths][: len(names)]),),
        )  # fmt: skip
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def logits(**asked: torch.Tensor) -> torch.Tensor:
        given = asked | {"attention_mask": torch.ones_like(asked["input_ids"])}
        return torch.from_numpy(session.run(None, {name: tensor.numpy() for name, tensor in given.items()})[0])

    return answers.from_logits(logits)


def in_lm_eval(answers: Answers) -> float:
    """The log-likelihood of each text as a whole, from an encoder with a decoder after the same text."""
    if not answers.causal and not answers.decodes:
        raise Refused("it scores models that read from left to right, and this is an encoder")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    options = {"backend": "seq2seq"} if answers.decodes else {"add_bos_token": False}
    scorer = HFLM(pretrained=answers.folder, device="cpu", dtype="float32", max_length=64, **options)

    def difference() -> float:
        worst = 0.0
        for n, text in enumerate(answers.texts):
            if answers.decodes:
                asked = Instance(request_type="loglikelihood", doc={}, arguments=(text, text), idx=n)
                theirs, scored = scorer.loglikelihood([asked], disable_tqdm=True)[0][0], answers.ids[n][:-1]
            else:
                asked = Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=n)
                theirs, scored = scorer.loglikelihood_rolling([asked], disable_tqdm=True)[0], answers.ids[n][1:]
            # The mark that ends a text, or in a decoder begins it, is not scored.
            each = answers.logits[n][:-1].log_softmax(-1).gather(1, scored[:, None])[:, 0]
            worst = max(worst, abs(float(theirs) - float(each.sum())))
        return worst

    found = difference()
    if answers.decodes and found > TOLERANCE:
        scorer.model.lm_head = answers.model().lm_head
        if difference() <= TOLERANCE:
            raise Refused(
                "it calls `tie_weights`, and transformers 5 then takes the embedding for the head of any T5: "
                f"log-likelihoods differ by up to {found:.2g}; with the head put back they are equal"
            )
    return found


def in_llama_cpp(answers: Answers) -> float:
    """Whether convert_hf_to_gguf.py, which comes with llama-cpp-python's source, makes a GGUF file."""
    source = next((answers.place.parent / "sources").glob("*/vendor/llama.cpp"))
    gguf = answers.place / "model.gguf"
    asked = [sys.executable, source / "convert_hf_to_gguf.py", answers.folder, "--outtype", "f32", "--outfile", gguf]
    done = subprocess.run(asked, capture_output=True, text=True, errors="replace")
    if done.returncode or not gguf.is_file():
        reason = last_error(done.stderr).removeprefix("ERROR:hf-to-gguf:")
        raise Refused(reason.replace(f"{answers.folder}/", ""))
    raise Refused("the file is made, and was not run")


def in_vllm(answers: Answers) -> float | tuple[float, str]:
    """A decoder's log-probabilities and the tokens it writes, or an encoder's logits or hidden states.

    One process does everything, because the error of a process that vLLM starts would say only that it failed.
    """
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    from vllm import LLM, ModelRegistry

    def opened(**options):
        return LLM(
            answers.folder, dtype="float32", enforce_eager=True, distributed_executor_backend="uni",
            kv_cache_memory_bytes=1 << 26, **options,
        )  # fmt: skip

    (architecture,) = json.loads(Path(answers.folder, "config.json").read_text(encoding="utf-8"))["architectures"]
    own = ModelRegistry.get_supported_archs()
    if answers.causal or answers.decodes:
        found = vllm_writes(answers, lambda: opened(max_logprobs=-1))
        return found if architecture in own else (found, "it runs the class of `transformers`")
    if architecture in own:
        return vllm_reads(answers.logits, answers, opened(runner="pooling"), "token_classify")
    body = re.sub(r"For\w+$", "Model", architecture)
    if body in own:
        options = {"hf_overrides": {"architectures": [body]}}
        said = f"opened with `hf_overrides={options['hf_overrides']}`, because its class has no head"
    else:
        options = {"enable_prefix_caching": False}
        said = "it runs the class of `transformers`, opened with `enable_prefix_caching=False`"
    model = opened(runner="pooling", pooler_config={"task": "token_embed"}, **options)
    return vllm_reads(answers.hidden, answers, model, "token_embed"), f"hidden states; {said}"


def vllm_writes(answers: Answers, opened: Callable) -> float:
    """The largest difference of log-probabilities; Refused unless it writes the 8 tokens that `generate` does."""
    from vllm import SamplingParams

    # Before vLLM, which changes classes of `transformers` that it runs.
    stock, worst = answers.model(), 0.0
    wanted = [stock.generate(ids[None], max_new_tokens=8, do_sample=False)[0, len(ids) :] for ids in answers.ids]
    asked = SamplingParams(temperature=0, max_tokens=8, prompt_logprobs=-1, logprobs=-1)
    for n, found in enumerate(same_ids(answers, opened().generate(answers.texts, asked, use_tqdm=False))):
        ours = answers.logits[n].log_softmax(-1)  # (T, V)
        rows = [*found.prompt_logprobs[1:], found.outputs[0].logprobs[0]]
        theirs = torch.tensor([[row[token].logprob for token in range(ours.shape[1])] for row in rows])
        worst = max(worst, float((theirs - ours).abs().max()))
        written = list(found.outputs[0].token_ids)
        if written != wanted[n].tolist():
            raise Refused(f"it writes the tokens {written}, and `generate` {wanted[n].tolist()}")
    return worst


def vllm_reads(ours: list[torch.Tensor], answers: Answers, model, task: str) -> float:
    """The largest difference between our values of every token, each (T, …), and those of a pooling task."""
    from vllm import PoolingParams

    asked = PoolingParams(use_activation=False)
    found = same_ids(answers, model.encode(answers.texts, asked, pooling_task=task, use_tqdm=False))
    return max(float((one.outputs.data - values).abs().max()) for one, values in zip(found, ours, strict=True))


def same_ids(answers: Answers, found: list) -> list:
    """The answers of vLLM for the texts; Refused if its tokens of a text are not ours."""
    for one, ids in zip(found, answers.ids, strict=True):
        if one.prompt_token_ids != ids.tolist():
            raise Refused(f"the ids are {one.prompt_token_ids}, and ours {ids.tolist()}")
    return found


PROGRAMS = {
    "transformers": in_transformers,
    "pipelines": in_pipelines,
    "Trainer": in_trainer,
    "peft": in_peft,
    "sentence-transformers": in_sentence_transformers,
    "ONNX Runtime": in_onnx_runtime,
    "lm-eval": in_lm_eval,
    "llama.cpp": in_llama_cpp,
    "vLLM": in_vllm,
}


def main(program: str, place: Path, result: Path) -> None:
    try:
        said = PROGRAMS[program](Answers(place))
        difference, *note = said if isinstance(said, tuple) else (said,)
        found = {"outcome": "yes", "difference": difference} | ({"note": note[0]} if note else {})
        if not difference <= TOLERANCE:
            found = {"outcome": "refused", "reason": f"the answers differ by up to {difference:.2g}"}
    except Refused as refusal:
        found = {"outcome": "refused", "reason": str(refusal)}
    result.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
