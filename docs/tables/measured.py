"""How a measured figure is written in a page of either language. All figures come from benchmarks/results."""

import json
import re
from collections.abc import Callable
from pathlib import Path

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
PICTURES = "assets/results"  # in the built site
LANGUAGES = ("en", "zh")
NUMBERS = re.compile(r"[\d–][\d.,%×±()e–+\xa0 -]*")
Words = tuple[str, str]  # English, Chinese
TEXT: Words = ("MB per CPU second", "MB 每 CPU 秒")
TOKENS: Words = ("million tokens per CPU second", "百万词元每 CPU 秒")

# Names of contestants and of texts, phrase by phrase. Proper names such as nanoGPT are not listed and stay as they are.
CHINESE = {
    "accuracy": "准确率",
    "ours": "本项目",
    "cold": "冷启动",
    "warm": "缓存已热",
    "1 worker": "1 个进程",
    "2 workers": "2 个进程",
    "1 thread": "1 个线程",
    "2 threads": "2 个线程",
    "1 and 1": "同时构建两份",
    "causal": "因果",
    "full": "双向",
    "masked": "掩码",
    "masked words": "掩码整词",
    "masked spans": "掩码片段",
    "masked spans of words": "掩码整词片段",
    "as trained": "含顺序与摘要",
    "plain": "单进程",
    "compiled": "已编译",
    "one rank": "一个 rank",
    "two ranks": "两个 rank",
    "deepspeed": "DeepSpeed",
    "before": "之前",
    "after": "之后",
    "whole words": "整词",
    "qwen3's shape": "qwen3 结构",
    "nanoGPT's way": "nanoGPT 的方式",
    "en": "英文",
    "zh": "中文",
    "stream": "连续流",
    "documents": "整篇文档",
}


def read(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def text(name: str, language: str) -> str:
    """A result that is text, in a box that scrolls."""
    lines = _public((RESULTS / f"{name}.txt").read_text(encoding="utf-8")).rstrip()
    return f'<div class="result" markdown>\n\n````text\n{lines}\n````\n\n</div>'


def picture(name: str, language: str) -> str:
    assert (RESULTS / f"{name}.png").is_file(), name
    up = "../" if language == "en" else "../../"  # pages with pictures lie in numbers/
    return f'<a href="{up}{PICTURES}/{name}.png"><img src="{up}{PICTURES}/{name}.png" alt="{name}"></a>'


def _public(text: str) -> str:
    """The folder of the large corpora is a place on the machine where it was measured."""
    return re.sub(r"(\.\./)+shared/corpora/", "corpora/", text)


def say(words: Words | str, language: str) -> str:
    return words if isinstance(words, str) else words[LANGUAGES.index(language)]


def label(name: str, language: str) -> str:
    if language == "en":
        return name
    return "，".join(CHINESE.get(part, part) for part in name.split(", "))


def rows(heads: list[Words | str], body: list[list], language: str) -> str:
    """A Markdown table; columns of numbers are aligned to the right."""
    said = [[say(cell, language) for cell in row] for row in [heads, *body]]
    numeric = [
        all(re.fullmatch(r"[\d–][\d.,%×±()e–+\xa0 -]*", cell) for cell in column)
        for column in zip(*said[1:], strict=True)
    ]
    marks = ["---:" if right else "---" for right in numeric]
    return "\n".join(f"| {' | '.join(row)} |" for row in [said[0], marks, *said[1:]])


def number(value: float) -> str:
    """Three significant digits; whole numbers with their thousands."""
    if isinstance(value, int) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:#.3g}"


def spread(values: list[float] | None) -> str:
    """A median with the least and the most, or the quartiles, of the rounds."""
    return "–" if values is None else f"{number(values[0])} ({number(values[1])}–{number(values[2])})"


def quartiles(values: list[float]) -> str:
    low, middle, high = values
    return spread([middle, low, high])


def times(ratio: float) -> str:
    return f"{ratio:.2f}×" if ratio < 10 else f"{ratio:.0f}×"


def source(found: dict, language: str) -> str:
    """Where the figures of a table come from: command, machine, versions, date."""
    machine = found.get("machine", "")
    if isinstance(machine, dict):
        memory = f", {machine['memory_gb']} GB" if "memory_gb" in machine else ""
        machine = f"{machine['cores']} cores, {machine['processor']}{memory}"
    said = found.get("commands", found.get("command", []))
    said = [said] if isinstance(said, str) else said
    commands = "\n".join(said)
    versions = ", ".join(f"{name} {value}" for name, value in found.get("versions", {}).items() if value)
    facts = [machine, versions, found.get("date", "")]
    summary = say(("How it was measured", "测量方法"), language)
    return (
        f'<details class="source" markdown>\n<summary>{summary}</summary>\n\n'
        f"```text\n{_public(commands)}\n```\n\n{'; '.join(filter(None, facts))}\n\n</details>"
    )


def rates(name: str, value: str, column: Callable[[dict], str], head: Words) -> Callable[[str], str]:
    """A table of contestants by texts: `value` of each contestant in each entry of `results`."""

    def made(language: str) -> str:
        found = read(name)
        entries = found["results"]
        names = list(dict.fromkeys(one for entry in entries for one in entry["contestants"]))
        body = [
            [label(one, language), *(spread(entry["contestants"].get(one, {}).get(value)) for entry in entries)]
            for one in names
        ]
        heads = [say(head, language), *(label(column(entry), language) for entry in entries)]
        return rows(heads, body, language) + "\n\n" + source(found, language)

    return made
