"""The predictions of the model as text: held-out windows with their blanks filled in, or their beginnings continued.

One text a corpus. The ranks divide the corpora among themselves and forward all of their windows at once: an evaluation
costs one forward for a masked model, and for a causal one CONTINUED_TOKENS forwards of at most GIVEN_TOKENS +
CONTINUED_TOKENS tokens, whatever the window's length.
"""

import numpy as np
import torch

from pretrain.objectives.objectives import Batch
from pretrain.tokenizer import Tokenizer
from pretrain.training.engine.engine import Engine
from pretrain.training.engine.ranks import World
from pretrain.training.heldout import HeldOut

GIVEN_TOKENS = 48
CONTINUED_TOKENS = 16


def sample_texts(heldout: list[HeldOut], engine: Engine, world: World, tokenizer: Tokenizer) -> list[str]:
    """Markdown for TensorBoard, greedy, from a window of each of `heldout`; a collective.

    Every rank makes as many forwards, which ZeRO 3 needs: one that has no corpus repeats another rank's.
    """
    count = -(-len(heldout) // world.size)  # windows of a rank
    mine = [(world.rank * count + n) % len(heldout) for n in range(count)]
    once = slice(0, max(0, min(count, len(heldout) - world.rank * count)))
    say = _continued if heldout[0].objective.causal else _filled
    engine.train(False)
    with torch.no_grad():
        said = say([heldout[n] for n in mine], engine)
    engine.train(True)
    every = torch.zeros((len(heldout), *said.shape[1:]), dtype=torch.int64)
    every[mine[once]] = said[once]
    every = engine.total(every)
    show = _shown_continued if heldout[0].objective.causal else _shown_filled
    return [show(found, tokens, tokenizer) for found, tokens in zip(heldout, every, strict=True)]


def _window(heldout: HeldOut) -> Batch:
    """The first of its windows: the same one whatever `max_tokens` is."""
    return heldout.batch(heldout.spread[:1])


def _together(batches: list[Batch]) -> Batch:
    columns = {name: [vars(batch)[name] for batch in batches] for name in vars(batches[0])}
    return Batch(**{name: None if found[0] is None else torch.cat(found) for name, found in columns.items()})


def _filled(heldout: list[HeldOut], engine: Engine) -> torch.Tensor:
    """The likeliest token (B, K) of every target of a window of each."""
    _, likeliest = engine(_together([_window(found) for found in heldout]), each=True)
    return likeliest.cpu()


def _shown_filled(heldout: HeldOut, likeliest: torch.Tensor, tokenizer: Tokenizer) -> str:
    """The window's text with every target as [guess], or [guess ≠ truth]."""
    batch = _window(heldout)
    shown = [tokenizer.token_text(i) for i in batch.inputs[0].tolist()]
    for at, truth, guess, weight in zip(
        batch.target_index[0].tolist(),
        batch.targets[0].tolist(),
        likeliest.tolist(),
        batch.weights[0].tolist(),
        strict=True,
    ):
        if weight:
            text = tokenizer.token_text(guess)
            shown[at] = f"**[{text}]**" if guess == truth else f"**[{text} ≠ {tokenizer.token_text(truth)}]**"
    return " ".join(shown)


def _given(heldout: HeldOut) -> np.ndarray:
    """The prompt for a model, (1 + n,): a token, then the beginning of a window, at most half of it."""
    return _window(heldout).inputs[0, : 1 + min(GIVEN_TOKENS, heldout.seq_len // 2)].numpy()


def _continued(heldout: list[HeldOut], engine: Engine) -> torch.Tensor:
    """The tokens (B, n) with which the model goes on after the beginning of a window of each."""
    given = np.stack([_given(found) for found in heldout])
    count = min(CONTINUED_TOKENS, heldout[0].seq_len + 1 - given.shape[1])
    rows = np.concatenate([given, np.repeat(given[:, :1], count, axis=1)], axis=1)
    for at in range(given.shape[1], rows.shape[1]):
        batch = heldout[0].objective.batch(rows, np.arange(len(rows)))  # what follows is not seen: attention is causal
        _, likeliest = engine(batch, each=True)
        rows[:, at] = likeliest[:, at - 1].cpu().numpy()
    return torch.from_numpy(rows[:, given.shape[1] :].astype(np.int64))


def _shown_continued(heldout: HeldOut, continued: torch.Tensor, tokenizer: Tokenizer) -> str:
    """The beginning of the window, and how the model goes on."""
    return f"{tokenizer.decode(_given(heldout)[1:].tolist())} **▸** {tokenizer.decode(continued.tolist())}"
