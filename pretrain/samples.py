"""What the model says, as text: a held-out window with its blanks filled in, or its beginning continued."""

import numpy as np
import torch

from pretrain.engine import Engine
from pretrain.evaluate import HeldOut
from pretrain.tokenizer import Tokenizer

CONTINUED_TOKENS = 32


def sample_text(heldout: HeldOut, engine: Engine, tokenizer: Tokenizer) -> str:
    """Markdown for TensorBoard; greedy, from the first held-out window. A collective: every rank computes it."""
    engine.train(False)
    with torch.no_grad():
        text = (_continued if heldout.objective.causal else _filled)(heldout, engine, tokenizer)
    engine.train(True)
    return text


def _filled(heldout: HeldOut, engine: Engine, tokenizer: Tokenizer) -> str:
    """The window's text with every target as [guess], or [guess ≠ truth]."""
    batch = heldout.batch(np.zeros(1, np.int64))
    _, likeliest = engine(batch, each=True)
    shown = [tokenizer.token_text(i) for i in batch.inputs[0].tolist()]
    for at, truth, guess, weight in zip(
        batch.target_index[0].tolist(),
        batch.targets[0].tolist(),
        likeliest[0].tolist(),
        batch.weights[0].tolist(),
        strict=True,
    ):
        if weight:
            text = tokenizer.token_text(guess)
            shown[at] = f"**[{text}]**" if guess == truth else f"**[{text} ≠ {tokenizer.token_text(truth)}]**"
    return " ".join(shown)


def _continued(heldout: HeldOut, engine: Engine, tokenizer: Tokenizer) -> str:
    """The first half of the window, and how the model goes on."""
    T = heldout.seq_len
    given = T // 2
    row = heldout.windows.rows(np.zeros(1, np.int64), T, heldout.objective.lead)
    row[0, given:] = row[0, 0]  # what follows is not seen: attention is causal
    for at in range(given, min(T, given + CONTINUED_TOKENS)):
        batch = heldout.objective.batch(row, np.zeros(1, np.int64))
        _, likeliest = engine(batch, each=True)
        row[0, at] = int(likeliest[0, at - 1])
    prompt, continued = tokenizer.decode(row[0, :given].tolist()), tokenizer.decode(row[0, given : at + 1].tolist())
    return f"{prompt} **▸** {continued}"
