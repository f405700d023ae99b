"""The reference of the configuration: the keys of every stage, from the classes that check them."""

import html
import json
import re

from pretrain.cli import STAGES, config_of
from pretrain.config import Config
from pretrain.config_reference import Key, keys
from pretrain.corpus.recipe import Recipe
from pretrain.export.facts import Facts

HEADS = {
    "en": ("Key", "Type", "Default", "Meaning", "May change on resume"),
    "zh": ("键", "类型", "默认值", "含义（英文，取自代码）", "续训时可否更改"),
}
CARD_HEADS = {"en": "Fact", "zh": "事实"}
RESUME = {
    "en": {"free": "yes", "past": "for steps to come", "frozen": "no"},
    "zh": {"free": "可以", "past": "仅限尚未执行的步", "frozen": "不可以"},
}
REQUIRED = {"en": "must be given", "zh": "必填"}
ONLY = {"en": "Only with `{}`.", "zh": "仅当 `{}`。"}
NO_INFLUENCE = {
    "en": "These keys do not change the result, so a finished folder does not record them: {}.",
    "zh": "以下各键不影响结果，因此完成的目录不记录它们：{}。",
}
TYPES = {  # the words of config_reference in Chinese
    "list of": "列表：",
    "mapping of": "映射：",
    "sections": "节",
    "section": "节",
    "integer": "整数",
    "number": "数",
    "text": "文本",
    "path": "路径",
    "any value": "任意值",
    "not empty": "不可为空",
    "matching": "匹配",
    "to": "→",
    "or": "或",
}


def page(language: str) -> str:
    """A section for each stage and one for the recipe of a corpus."""
    parts = [_section("recipe.yaml", "recipe", Recipe, language)]
    parts += [_section(stage, stage, config_of(stage), language) for stage in STAGES]
    return "\n\n".join(parts)


def card(language: str) -> str:
    """The keys of model_card.json. `N` stands for the number of an entry of a list."""
    heads = (CARD_HEADS[language], HEADS[language][1], HEADS[language][3])
    lines = [_row(heads), _row(["---"] * len(heads))]
    for key in keys(Facts):
        name, kind, _, meaning, _ = _cells(key, "card", language)
        lines.append(_row((name, kind, meaning)))
    return "\n".join(lines)


def card_schema() -> str:
    """The JSON schema of model_card.json."""
    return json.dumps(Facts.model_json_schema(), ensure_ascii=False, indent=1)


def _section(title: str, anchor: str, kind: type[Config], language: str) -> str:
    found = keys(kind)
    resumable = anchor == "pretrain"
    heads = HEADS[language][: 5 if resumable else 4]
    lines = [f"## {title} {{#{anchor}}}", "", _row(heads), _row(["---"] * len(heads))]
    lines += [_row(_cells(key, anchor, language)[: len(heads)]) for key in found]
    free = [f"`{key.name}`" for key in found if key.resume == "free"]
    if free and not resumable:
        lines += ["", NO_INFLUENCE[language].format(", ".join(free))]
    return "\n".join(lines)


def _cells(key: Key, anchor: str, language: str) -> list[str]:
    default = REQUIRED[language] if key.default is None else _code(key.default)
    if key.section and key.default == "{}":
        default = ""  # its keys have defaults of their own
    meaning = " ".join(filter(None, (ONLY[language].format(key.when) if key.when else "", key.description)))
    identity = f"{anchor}.{key.name}".replace(" ", "")
    shown = html.escape(key.name).replace(".", ".<wbr>")  # a long key is broken after a dot, never within a name
    return [
        f'<code id="{identity}">{shown}</code>',
        _type(key.type, language),
        default,
        " ".join(meaning.split()).replace("|", "&#124;"),
        RESUME[language][key.resume],
    ]


def _type(text: str, language: str) -> str:
    text = text.replace(" | ", " or ")
    if language == "zh":
        words = "|".join(sorted(TYPES, key=len, reverse=True))
        text = re.sub(rf"\b({words})\b", lambda word: TYPES[word[1]], text)
        text = re.sub(r"：\s+", "：", text)
    return html.escape(text).replace("|", "&#124;").replace("*", "&#42;").replace("_", "&#95;")


def _code(text: str) -> str:
    return f"<code>{html.escape(text).replace('|', '&#124;')}</code>"


def _row(cells) -> str:
    return f"| {' | '.join(cells)} |"
