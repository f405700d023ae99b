"""No leaks: packed documents never see each other, in any objective, kind of model, window and attention backend.

Rows are made as training makes them: windows cut out of a stream of documents, so that the first and the last document
of a row are rests of longer ones; or windows of whole documents, with padding behind them. One document of a row is
replaced, all of its tokens, and the others' logits and gradients must stay what they were, to the last bit on the CPU.
"""

import dataclasses
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from pretrain.model import attention as attention_module
from pretrain.model.attention import Layout
from pretrain.model.config import ModelConfig
from pretrain.model.init import initialise
from pretrain.model.transformer import Transformer
from pretrain.objectives import OBJECTIVES
from pretrain.objectives.batch import Batch
from pretrain.objectives.causal_lm import CausalLMConfig
from pretrain.objectives.masked_lm import MaskedLMConfig
from pretrain.order.packed import PackedWindows
from pretrain.order.rows import of_stream
from tests.conftest import DECODER, ENCODER

BERT = {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
BYTE = {"pad": 0, "unk": 1, "eod": 2}
V, T, B = 60, 48, 2
MODELS = {
    "encoder": ENCODER,
    "encoder-pre-rope": {**ENCODER, "norm_position": "pre", "positions": "rope", "mlp": "geglu"},
    "decoder": DECODER,
    "decoder-post-learned": {**DECODER, "norm_position": "post", "positions": "learned", "qk_norm": False},
}
MASKED = {
    "token": MaskedLMConfig(kind="masked_lm", mask_ratio=0.3),
    "all masked": MaskedLMConfig(kind="masked_lm", mask_ratio=0.3, mask_share=1, random_share=0),
    "word": MaskedLMConfig(kind="masked_lm", mask_ratio=0.3, unit="word"),
    "span": MaskedLMConfig(kind="masked_lm", mask_ratio=0.3, span={}),
    "word span": MaskedLMConfig(kind="masked_lm", mask_ratio=0.3, unit="word", span={"p": 0.5, "longest": 3}),
}
CAUSAL = {"causal": CausalLMConfig(kind="causal_lm")}
# SDPA's own choice, and each of its backends made the only one. What a machine cannot run is skipped with its reason.
BACKENDS = {
    "default": None,
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# On a GPU a product's blocks may be summed in another order when other numbers are in them.
TOLERANCE = {"rtol": 0, "atol": 0} if DEVICE.type == "cpu" else {"rtol": 1e-5, "atol": 1e-5}


def cases():
    for name, values in MODELS.items():
        for objective in CAUSAL if values["causal"] else MASKED:
            yield name, objective


def build(name: str) -> Transformer:
    built = Transformer(ModelConfig(**MODELS[name]), V)
    initialise(built, 3)
    return built.eval().to(DEVICE)


def stream(causal: bool, length: int, seed: int = 0) -> np.ndarray:
    """Documents of 0 to 20 tokens with their marks: some are empty, some a single token."""
    rng, ids = np.random.default_rng(seed), []
    lengths = [9, 1, 0, 20, 3]
    while len(ids) < length:
        text = rng.integers(5, V, lengths.pop(0) if lengths else int(rng.integers(0, 20))).tolist()
        ids += [*text, BYTE["eod"]] if causal else [BERT["cls"], *text, BERT["sep"]]
    return np.array(ids[:length], np.int32)


class Text:
    """A stream as shards give it."""

    def __init__(self, ids: np.ndarray, specials: dict[str, int]):
        self.ids, self.tokens, self.specials = ids, len(ids), specials
        self.ends = np.flatnonzero(ids == specials.get("eod", specials.get("sep"))) + 1
        self.begins = np.concatenate([[0], self.ends[:-1]])

    def gather(self, starts: np.ndarray, length: int) -> np.ndarray:
        return self.ids[starts[:, None] + np.arange(length)]

    def spans(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        here = (self.ends > first) & (self.begins < last)
        return self.begins[here], self.ends[here]


def batch_of(name: str, objective: str, kind: str = "stream") -> Batch:
    """Two windows: of one stream, cut where they happen to be; or packed, of which one ends in padding; or each the
    inside of one long document ("whole"), which takes attention without a mask."""
    causal = MODELS[name]["causal"]
    config, specials = (CAUSAL if causal else MASKED)[objective], BYTE if causal else BERT
    made = OBJECTIVES[config.kind](config, specials, V, T, 1)
    end, words = specials.get("eod", specials.get("sep")), None
    if made.wants_words:
        words = np.random.default_rng(1).random((B, T)) < 0.7
    if kind == "documents":
        windows = PackedWindows(Text(stream(causal, 400), specials), 4 * T, 3)
        places = np.arange(windows.blocks)[:, None] * windows.block_tokens + np.arange(windows.per_block(T))
        starts = windows.starts(places.ravel())
        every = windows.rows(starts, T)
        padded, several = (~every.text).any(1), every.begins.sum(1) > 2
        chosen = [np.flatnonzero(padded & several)[0], np.flatnonzero(~padded & several)[0]]
        rows = dataclasses.replace(windows.rows(starts[chosen], T), words=words)
    else:
        whole = np.random.default_rng(2).integers(5, V, B * T + 1).astype(np.int32)
        ids = whole if kind == "whole" else stream(causal, 5 + B * T + 1)[4:]
        rows = of_stream(np.stack([ids[b * T : 1 + (b + 1) * T] for b in range(B)]), end, words)
    return made.batch(rows, np.arange(B) * T).to(DEVICE)


def documents(batch: Batch, row: int) -> dict[int, torch.Tensor]:
    """The documents of a row, by number, each as (T,) bool."""
    if batch.segments is None:
        return {0: torch.ones(T, dtype=torch.bool, device=DEVICE)}
    return {int(n): batch.segments[row] == n for n in batch.segments[row].unique()}


def replaced(batch: Batch, row: int, document: torch.Tensor) -> Batch:
    """Every token of one document another, marks and masks included; what is predicted and the layout stay."""
    inputs = batch.inputs.clone()
    inputs[row, document] = (inputs[row, document] + 23) % V
    return Batch(**{**vars(batch), "inputs": inputs})


def layout(net: Transformer, batch: Batch) -> Layout:
    return Layout(batch.segments, batch.position_ids, net.config.causal)


def run(net: Transformer, batch: Batch, scored: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (B, T, V), and the gradient of `scored` (B, T) positions' summed squares by every input embedding."""
    kept = {}
    handle = net.embed.register_forward_hook(lambda _, __, output: kept.update(x=output) or output.retain_grad())
    logits = net.logits(net(batch.inputs, layout(net, batch)))
    handle.remove()
    logits[scored].square().sum().backward()
    net.zero_grad()
    return logits.detach(), kept["x"].grad


def leaks(net: Transformer, batch: Batch, row: int) -> list[str]:
    """What of a row is reached by what it must not be: "logits 3 of 1" is document 3 seeing document 1."""
    found = []
    inside = documents(batch, row)
    for changed, tokens in inside.items():
        others = torch.ones_like(batch.inputs, dtype=torch.bool)
        others[row] = ~tokens
        logits, gradient = run(net, batch, others)
        after, gradient_after = run(net, replaced(batch, row, tokens), others)
        for which, (a, b) in {"logits": (logits, after), "gradient": (gradient, gradient_after)}.items():
            found += [
                f"{which} {n} of {changed}"
                for n, at in inside.items()
                if n != changed and not torch.allclose(a[row, at], b[row, at], **TOLERANCE)
            ]
            rest = [other for other in range(B) if other != row]
            if not torch.allclose(a[rest], b[rest], **TOLERANCE):
                found.append(f"{which} of another row of {changed}")
        if others.any() and gradient[row, tokens].abs().max() > 0:
            found.append(f"loss of others by {changed}")
        if torch.equal(logits[row, tokens], after[row, tokens]):
            found.append(f"nothing: {changed} does not see itself")
    return found


def backend(name: str):
    return nullcontext() if BACKENDS[name] is None else sdpa_kernel(BACKENDS[name])


@pytest.fixture(params=BACKENDS)
def attention(request):
    """Each backend of scaled_dot_product_attention that can run on this machine with a mask and a backward pass."""
    q = torch.randn(1, 2, 4, 16, device=DEVICE, requires_grad=True)
    mask = torch.zeros(1, 1, 4, 4, device=DEVICE)
    with backend(request.param):
        try:
            attention_module.attend(q, q, q, mask, False, 0.0).sum().backward()
        except RuntimeError as error:
            pytest.skip(f"{request.param} cannot run here with a mask: {str(error).splitlines()[0]}")
        yield request.param


@pytest.mark.parametrize("kind", ["stream", "documents", "whole"])
@pytest.mark.parametrize(("name", "objective"), list(cases()))
def test_a_document_reaches_no_other(name, objective, kind, attention):
    net, batch = build(name), batch_of(name, objective, kind)
    assert (batch.segments is None) == (kind == "whole")
    for row in range(B):
        assert leaks(net, batch, row) == []


def test_the_rows_have_documents_of_every_kind():
    """Cut by the left edge, by the right edge, of one token, and whole ones."""
    for name in ("encoder", "decoder"):
        batch = batch_of(name, "token" if name == "encoder" else "causal")
        sizes = [[int(at.sum()) for at in documents(batch, row).values()] for row in range(B)]
        assert all(len(row) >= 4 for row in sizes), sizes
        if name == "decoder":
            assert 1 in sizes[0] + sizes[1], sizes  # an empty document: its end mark alone
        starts = batch.position_ids == 0
        mark = BYTE["eod"] if name == "decoder" else BERT["cls"]
        assert (batch.inputs[starts] == mark).sum() >= int(starts.sum()) - B  # all but those cut by the left edge
    ids = stream(False, 5 + B * T + 1)[5:]
    assert ids[0] != BERT["cls"] and ids[T] != BERT["cls"] and ids[T - 1] != BERT["sep"]


def no_segments(segments, causal, dtype):
    return model_mask(torch.zeros_like(segments), causal, dtype)


def neighbours(segments, causal, dtype):
    """As if a document saw the one before it: what an index that is off by one does."""
    apart = segments[:, :, None] - segments[:, None, :]
    mask = (apart == 0) | (apart == 1)
    return torch.where(mask.tril() if causal else mask, 0.0, float("-inf"))[:, None].to(dtype)


def one_token(segments, causal, dtype):
    """A single pair of positions too many, of the second row alone."""
    mask = model_mask(segments, causal, dtype)
    mask[1, 0, T - 1, 0] = 0
    return mask


model_mask = attention_module.attention_mask


@pytest.mark.parametrize("leak", [no_segments, neighbours, one_token])
@pytest.mark.parametrize("name", MODELS)
def test_a_mask_that_leaks_is_found(name, leak, monkeypatch):
    """A control of the tests above."""
    monkeypatch.setattr(attention_module, "attention_mask", leak)
    batch = batch_of(name, "causal" if MODELS[name]["causal"] else "token")
    assert leaks(build(name), batch, 1) != []


@pytest.mark.parametrize("kind", ["stream", "documents"])
@pytest.mark.parametrize("name", MODELS)
def test_positions_begin_anew_in_every_document(name, kind):
    """A document is computed as it is alone: how long its neighbours are is not seen either."""
    batch, net = batch_of(name, "causal" if MODELS[name]["causal"] else "span", kind), build(name)
    together = net(batch.inputs, layout(net, batch))
    for row in range(B):
        for tokens in documents(batch, row).values():
            ids = batch.inputs[row : row + 1, tokens]
            positions = torch.arange(ids.shape[1], device=DEVICE)[None]
            alone = net(ids, Layout(None, positions, net.config.causal))
            torch.testing.assert_close(together[row, tokens], alone[0], rtol=1e-5, atol=1e-5)
