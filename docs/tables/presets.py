"""The page of the presets: what each needs on real machines, computed from its file. Speeds are estimates."""

import re
from functools import cache
from typing import NamedTuple

import torch
from measured import RESULTS, Words, number, rows, say

from pretrain.config import load
from pretrain.model.models import model_of
from pretrain.objectives import OBJECTIVES
from pretrain.training.config import RunConfig
from pretrain.training.engine.config import EngineConfig
from pretrain.training.engine.ranks import World
from pretrain.training.plan import A_NODE, GPUS, Memory, assumed_mfu, command, fitting_micro_batch, memory, tokens_per_s

ROOT = RESULTS.parents[1]
NAMES = sorted(path.stem for path in (ROOT / "configs/presets").glob("*.yaml"))
SENTINELS = {f"<extra_id_{n}>": 100 + n for n in range(100)}
SPECIALS = SENTINELS | {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4, "eod": 5}
LARGE = 3e8  # parameters from which eight nodes are shown, too
USABLE = 0.9  # the share of a GPU's memory that is left to tensors


class Preset(NamedTuple):
    run: RunConfig
    millions: int  # of parameters, as the comment says
    entries: int  # of the vocabulary
    parameters: int
    targets: list[int]  # of a window, for each phase
    tokens: int
    flops_per_token: float  # the mean over all tokens

    def engine(self, ranks: int, stage: int | None = None) -> EngineConfig:
        """The section `engine` on that many GPUs. The micro-batch is smaller where the batch would not divide."""
        size = fitting_micro_batch(self.run.phases, self.run.engine.micro_batch, ranks)
        assert size is not None, (self.run.out, ranks)
        changed = {"micro_batch": size} | ({} if stage is None else {"zero_stage": stage})
        return self.run.engine.model_copy(update=changed)

    def memory(self, ranks: int, stage: int | None = None) -> Memory:
        world = World(0, ranks, launched=ranks > 1)
        return memory(self.run, self.entries, self.targets, self.engine(ranks, stage), world)


@cache
def preset(name: str) -> Preset:
    """A preset, for the vocabulary that its comment speaks of last."""
    path = ROOT / f"configs/presets/{name}.yaml"
    lines = [line.removeprefix("#").strip() for line in path.read_text(encoding="utf-8").splitlines() if line[0] == "#"]
    found = re.findall(r"([\d,]+) M(?: parameters)? with ([\d,]+)(?: entries)?[:\s(]", " ".join(lines))
    millions, entries = (int(figure.replace(",", "")) for figure in found[-1])
    run = load(RunConfig, path)
    with torch.device("meta"):
        model = model_of(run.model, entries)
    targets, tokens, flops = [], 0, 0.0
    for index, phase in enumerate(run.phases):
        section = run.objective_of(index)
        targets.append(OBJECTIVES[section.kind](section, SPECIALS, entries, phase.seq_len, run.seed).targets)
        tokens += phase.steps * phase.batch_tokens
        flops += phase.steps * phase.batch_tokens * model.flops_per_token(phase.seq_len, targets[-1])
    return Preset(run, millions, entries, sum(p.numel() for p in model.parameters()), targets, tokens, flops / tokens)


def head(name: str) -> str:
    """The lines at the head of the file of a preset that say how it starts on a node, and what it needs there."""
    found = preset(name)
    engine = found.engine(A_NODE)
    gb = _gb(found.memory(A_NODE).peak)
    return (
        f"# On {A_NODE} GPUs it takes about {gb} GB of each (computed, not measured: docs/en/guide/presets.md):\n"
        f"#   {_command(name, A_NODE, engine)}\n"
    )


def each(language: str) -> str:
    """A section for each preset."""
    return "\n\n".join(section(one, language) for one in NAMES)


def summary(language: str) -> str:
    """One line for each preset."""
    body = []
    for one in NAMES:
        found, model = preset(one), preset(one).run.model
        layers = f"{model.layers} + {model.decoder_layers}" if model.decoder_layers else str(model.layers)
        body.append(
            [
                f"[{one}](#{one})",
                f"{layers} × {model.width}",
                f"{found.parameters / 1e6:,.0f}",
                f"{found.tokens / 1e9:,.1f}",
                number(found.flops_per_token / 1e9),
                f"{assumed_mfu(model):.0%}",
                _gb(found.memory(A_NODE).peak),
                _hours(found, "H100", A_NODE),
            ]
        )
    heads: list[Words | str] = [
        ("preset", "预设"),
        ("layers × width", "层数 × 宽度"),
        ("million parameters", "百万参数"),
        ("billion tokens", "十亿词元"),
        ("GFLOPs per token", "每词元 GFLOPs"),
        ("assumed MFU", "假定的 MFU"),
        ("GB per rank, 8 GPUs", "8 GPU 时每 rank GB"),
        ("hours on 8 × H100, estimated", "8 × H100 小时数（估计）"),
    ]
    return rows(heads, body, language)


def section(name: str, language: str) -> str:
    found = preset(name)
    title = f"## {name} {{#{name}}}"
    own = found.run.engine.zero_stage
    settings = say((f"The file says ZeRO {own}. ", f"文件中为 ZeRO {own}。"), language)
    lines = [_command(name, 1, found.engine(1))] if found.parameters < LARGE else []
    lines.append(_command(name, A_NODE, found.engine(A_NODE)))
    if found.parameters >= LARGE:
        lines.append(_command(name, 8 * A_NODE, found.engine(8 * A_NODE)))
    commands = "\n".join(lines)
    parts = [title, _memory(found, language), f"{settings}{_fits(found, language)}", _speed(found, language)]
    return "\n\n".join([*parts, f'```sh title="needs: gpu"\n{commands}\n```'])


def _places(found: Preset) -> list[tuple[int, int | None]]:
    """GPUs and ZeRO stage of each line of the table of memory."""
    nodes = [A_NODE, 8 * A_NODE] if found.parameters >= LARGE else [A_NODE]
    return [(1, None), *((ranks, stage) for ranks in nodes for stage in (1, 2, 3))]


def _memory(found: Preset, language: str) -> str:
    body = []
    for ranks, stage in _places(found):
        one = found.memory(ranks, stage)
        place = f"1, {say(('plain torch', '普通 torch'), language)}" if ranks == 1 else f"{ranks}, ZeRO {stage}"
        parts = (one.weights, one.gradients, one.optimizer, one.activations, one.backward_buffers, one.step_buffers)
        micro = found.engine(ranks, stage).micro_batch
        body.append([place, str(micro), *map(_gb, parts), f"**{_gb(one.peak)}**"])
    heads: list[Words | str] = [
        ("GPUs, GB per rank", "GPU 数，每 rank GB"),
        ("micro-batch", "微批"),
        ("weights", "权重"),
        ("gradients", "梯度"),
        ("optimizer", "优化器"),
        ("activations", "激活"),
        ("buffers, backward", "缓冲，反向"),
        ("buffers, step", "缓冲，更新"),
        ("most at once", "同时最多"),
    ]
    return rows(heads, body, language)


def _fits(found: Preset, language: str) -> str:
    """The numbers of GPUs of each kind whose memory is enough."""
    said = []
    for gpu in GPUS:
        places = _enough(found, gpu)
        shown = []
        for ranks in dict.fromkeys(ranks for ranks, _ in places):
            stages = ", ".join(str(stage) for some, stage in places if some == ranks and stage is not None)
            shown.append(f"{ranks} (ZeRO {stages})" if stages else str(ranks))
        said.append(f"{gpu}: {', '.join(shown) or '–'}")
    return say(("Numbers of GPUs with enough memory: ", "内存足够的 GPU 数："), language) + "; ".join(said) + "."


def _enough(found: Preset, gpu: str) -> list[tuple[int, int | None]]:
    """The lines of the table of memory that a kind of GPU has the memory for."""
    there = USABLE * GPUS[gpu].gb * 1e9
    return [place for place in _places(found) if found.memory(*place).peak <= there]


def _speed(found: Preset, language: str) -> str:
    body = [
        [
            gpu,
            number(tokens_per_s(gpu, found.flops_per_token, found.run.model) / 1e3),
            _hours(found, gpu, 1),
            _hours(found, gpu, A_NODE),
        ]
        for gpu in GPUS
    ]
    heads: list[Words | str] = [
        ("estimated", "估计"),
        ("thousand tokens/s per GPU", "每 GPU 千词元/秒"),
        ("hours on 1 GPU", "1 GPU 小时数"),
        (f"hours on {A_NODE} GPUs", f"{A_NODE} GPU 小时数"),
    ]
    return rows(heads, body, language)


def _command(name: str, ranks: int, engine: EngineConfig) -> str:
    return command(f"configs/presets/{name}.yaml", preset(name).run, ranks, engine)


def _hours(found: Preset, gpu: str, ranks: int) -> str:
    if not any(ranks == some for some, _ in _enough(found, gpu)):
        return "–"
    return number(found.tokens / tokens_per_s(gpu, found.flops_per_token, found.run.model) / ranks / 3600)


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f}" if size < 1e10 else f"{size / 1e9:,.1f}"
