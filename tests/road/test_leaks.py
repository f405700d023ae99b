"""No document of a window sees another, with any objective, model, kind of window and attention backend.

Rows are made as in training: windows of a stream, so that the first and last document of a row are parts of longer
ones; or windows of whole documents with padding at the end. The tests replace all tokens of one document of a row. The
logits and gradients of the other documents must not change, on the CPU not even in the last bit.
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
from pretrain.objectives.fill_in_middle import FillInMiddleConfig
from pretrain.objectives.hybrid import HybridConfig
from pretrain.objectives.masked_lm import MaskedLMConfig
from pretrain.objectives.prefix_lm import PrefixBatch, PrefixLMConfig
from pretrain.order.packed import PackedWindows
from pretrain.order.rows import of_stream
from tests.conftest import DECODER, ENCODER

BERT = {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
BYTE = {"pad": 0, "unk": 1, "eod": 2}
MARKS = {"mask": 4, "<fim_prefix>": 5, "<fim_suffix>": 6, "<fim_middle>": 7}
V, T, B = 60, 48, 2
MODELS = {
    "encoder": ENCODER,
    "encoder-pre-rope": {**ENCODER, "norm_position": "pre", "positions": "rope", "mlp": "geglu"},
    "decoder": DECODER,
    "decoder-post-learned": {**DECODER, "norm_position": "post", "positions": "learned", "qk_norm": False},
    "encoder-local": {**ENCODER, "norm_position": "pre", "positions": "rope", "window": 4, "global_every": 2},
    "decoder-local": {**DECODER, "window": 4, "local_rope_theta": 100.0, "mlp": "relu2", "norm_weights": False},
}
MASKED = {
    "token": MaskedLMConfig(kind="masked_lm", mask_ratio=0.3),
    "all masked": MaskedLMConfig(kind="masked_lm", mask_ratio=0.3, mask_share=1, random_share=0),
    "word": MaskedLMConfig(kind="masked_lm", mask_ratio=0.3, unit="word"),
    "span": MaskedLMConfig(kind="masked_lm", mask_ratio=0.3, span={}),
    "word span": MaskedLMConfig(kind="masked_lm", mask_ratio=0.3, unit="word", span={"p": 0.5, "longest": 3}),
}
CAUSAL = {
    "causal": CausalLMConfig(kind="causal_lm"),
    "prefix": PrefixLMConfig(kind="prefix_lm"),
    "fill in": FillInMiddleConfig(kind="fill_in_middle", rate=0.8),
    "hybrid": HybridConfig(kind="hybrid", masked_share=1.0, mask_ratio=0.3),
}
# PyTorch's own choice, and each backend alone. A backend that this machine cannot run is skipped with the reason.
BACKENDS = {
    "default": None,
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# A GPU may sum the blocks of a matrix product in another order when other numbers stand in them.
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
    """Return documents of 0 to 20 tokens with their special tokens. Some are empty, some have a single token."""
    rng, ids = np.random.default_rng(seed), []
    lengths = [9, 1, 0, 20, 3]
    while len(ids) < length:
        text = rng.integers(5, V, lengths.pop(0) if lengths else int(rng.integers(0, 20))).tolist()
        ids += [*text, BYTE["eod"]] if causal else [BERT["cls"], *text, BERT["sep"]]
    return np.array(ids[:length], np.int32)


class Text:
    """A stream with the methods of `Shards` that windows need."""

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
    """Return two windows: "stream" cuts documents at the edges; "documents" has whole documents, one window with
    padding; "whole" has the inside of one long document in each window, for attention without a mask."""
    causal = MODELS[name]["causal"]
    config, specials = (CAUSAL if causal else MASKED)[objective], BYTE if causal else BERT
    made = OBJECTIVES[config.kind](config, specials | (MARKS if causal else {}), V, T, 1)
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
    """Return the positions of each document of a row, as (T,) bool by its number."""
    if batch.segments is None:
        return {0: torch.ones(T, dtype=torch.bool, device=DEVICE)}
    return {int(n): batch.segments[row] == n for n in batch.segments[row].unique()}


def replaced(batch: Batch, row: int, document: torch.Tensor) -> Batch:
    """Replace every token of one document, special tokens included. Targets and layout stay the same."""
    inputs = batch.inputs.clone()
    inputs[row, document] = (inputs[row, document] + 23) % V
    return type(batch)(**{**vars(batch), "inputs": inputs})


def layout(net: Transformer, batch: Batch) -> Layout:
    prefix = batch.prefix if isinstance(batch, PrefixBatch) else None
    return Layout(batch.segments, batch.position_ids, net.config.causal, prefix)


def run(net: Transformer, batch: Batch, scored: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits (B, T, V) and the gradient of the `scored` logits' summed squares by every input embedding."""
    kept = {}
    handle = net.embed.register_forward_hook(lambda _, __, output: kept.update(x=output) or output.retain_grad())
    logits = net.logits(net(batch.inputs, layout(net, batch)))
    handle.remove()
    logits[scored].square().sum().backward()
    net.zero_grad()
    return logits.detach(), kept["x"].grad


def leaks(net: Transformer, batch: Batch, row: int) -> list[str]:
    """List the leaks into the documents of a row: "logits 3 of 1" means that document 3 sees document 1."""
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


@pytest.fixture(params=[*BACKENDS, "by parts"])
def attention(request, monkeypatch):
    """Use one backend of scaled_dot_product_attention. Skips if it cannot run here with a mask and a backward pass.

    "by parts" never makes a dense mask: documents go one by one, and local layers block by block.
    """
    if request.param == "by parts":
        monkeypatch.setattr(attention_module, "DENSE", 0)
        yield request.param
        return
    q = torch.randn(1, 2, 4, 16, device=DEVICE, requires_grad=True)
    layout = Layout(torch.tensor([[0, 0, 1, 1]], device=DEVICE), torch.arange(4, device=DEVICE)[None], False)
    with backend(request.param):
        try:
            attention_module.attend(q, q, q, layout, None, 0.0).sum().backward()
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
    """The rows have documents cut by the left edge and by the right edge, whole ones, and one with a single token."""
    for name in ("encoder", "decoder"):
        batch = batch_of(name, "token" if name == "encoder" else "causal")
        sizes = [[int(at.sum()) for at in documents(batch, row).values()] for row in range(B)]
        assert all(len(row) >= 4 for row in sizes), sizes
        if name == "decoder":
            assert 1 in sizes[0] + sizes[1], sizes  # an empty document is only its end mark
        starts = batch.position_ids == 0
        mark = BYTE["eod"] if name == "decoder" else BERT["cls"]
        whole = int(starts.sum()) - B  # without the documents that the left edge cuts
        assert (batch.inputs[starts] == mark).sum() >= whole
    ids = stream(False, 5 + B * T + 1)[5:]
    assert ids[0] != BERT["cls"] and ids[T] != BERT["cls"] and ids[T - 1] != BERT["sep"]


def no_segments(layout, window, dtype):
    return right_mask(dataclasses.replace(layout, segments=torch.zeros_like(layout.segments), _made={}), window, dtype)


def neighbours(layout, window, dtype):
    """Let each document see the one before it, as an index that is off by one does."""
    apart = layout.segments[:, :, None] - layout.segments[:, None, :]
    mask = (apart == 0) | (apart == 1)
    return torch.where(mask.tril() if layout.causal else mask, 0.0, float("-inf"))[:, None].to(dtype)


def one_token(layout, window, dtype):
    """Allow a single pair of positions too many, only in the second row."""
    mask = right_mask(layout, window, dtype).clone()
    mask[1, 0, T - 1, 0] = 0
    return mask


right_mask = Layout.mask


@pytest.mark.parametrize("leak", [no_segments, neighbours, one_token])
@pytest.mark.parametrize("name", MODELS)
def test_a_mask_that_leaks_is_found(name, leak, monkeypatch):
    """The tests above would find these leaks."""
    monkeypatch.setattr(Layout, "mask", leak)
    batch = batch_of(name, "causal" if MODELS[name]["causal"] else "token")
    assert leaks(build(name), batch, 1) != []


@pytest.mark.parametrize("kind", ["stream", "documents"])
@pytest.mark.parametrize("name", MODELS)
def test_positions_begin_anew_in_every_document(name, kind):
    """A document gives the same output in a row as alone, so the length of its neighbours has no effect."""
    batch, net = batch_of(name, "causal" if MODELS[name]["causal"] else "span", kind), build(name)
    together = net(batch.inputs, layout(net, batch))
    for row in range(B):
        for tokens in documents(batch, row).values():
            ids = batch.inputs[row : row + 1, tokens]
            positions = torch.arange(ids.shape[1], device=DEVICE)[None]
            alone = net(ids, Layout(None, positions, net.config.causal))
            torch.testing.assert_close(together[row, tokens], alone[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("parts", [False, True], ids=["dense", "by parts"])
@pytest.mark.parametrize("name", ["encoder-local", "decoder-local"])
def test_a_token_of_a_local_layer_reaches_its_window_and_no_further(name, parts, monkeypatch):
    """Two layers, the first of them global, are replaced by one local layer: what token t changes is known."""
    if parts:
        monkeypatch.setattr(attention_module, "DENSE", 0)
    net = build(name)
    net.blocks, net.config = net.blocks[1:], net.config.model_copy(update={"layers": 1})
    net.blocks[0].attention.window = 4
    ids, t = torch.randint(5, V, (1, T), device=DEVICE), 20
    changed = ids.clone()
    changed[0, t] = 5 + (ids[0, t] + 1) % (V - 5)
    plain = Layout(None, torch.arange(T, device=DEVICE)[None], net.config.causal)
    moved = (net(ids, plain) != net(changed, plain)).any(-1)[0].nonzero()[:, 0].tolist()
    assert moved == list(range(t if net.config.causal else t - 4, t + 4 + 1))


@pytest.mark.parametrize("objective", ["prefix", "hybrid"])
def test_a_prefix_is_seen_by_all_of_its_document(objective):
    net, batch = build("decoder"), batch_of("decoder", objective)
    before = net(batch.inputs, layout(net, batch))
    assert batch.prefix.any() and (objective == "hybrid" or (~batch.prefix).any())
    for row, at in batch.prefix.nonzero().tolist()[::5]:
        inputs = batch.inputs.clone()
        inputs[row, at] = (inputs[row, at] + 23) % V
        moved = (net(inputs, layout(net, batch)) != before).any(-1)[row]
        assert torch.equal(moved, batch.segments[row] == batch.segments[row, at])


def test_no_target_after_a_prefix_sees_itself():
    net, batch = build("decoder"), batch_of("decoder", "prefix")
    before = net(batch.inputs, layout(net, batch))
    nexts = [(row, at + 1) for row, at in (batch.weights > 0).nonzero().tolist() if at + 1 < T]
    inside = [(row, at) for row, at in nexts if batch.position_ids[row, at] > 0]
    assert len(inside) > 10
    for row, at in inside:
        inputs = batch.inputs.clone()
        inputs[row, at] = (inputs[row, at] + 23) % V
        assert torch.equal(net(inputs, layout(net, batch))[row, at - 1], before[row, at - 1])
