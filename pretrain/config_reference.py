"""Every key of a configuration, read from its `Config` classes: for `--help` and for the documentation.

    for key in keys(RunConfig):
        print(key.name, key.type, key.default, key.description)   # phases.N.steps  integer > 0  None  …

Nothing is written twice: names, types, limits, defaults and descriptions come from the classes that pydantic checks.
"""

import inspect
import json
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from pretrain.config import Config, Resume, StageConfig, resume_rule, sections

PLAIN = {
    bool: "true | false",
    int: "integer",
    float: "number",
    str: "text",
    Path: "path",
    Any: "any value",
    type(None): "null",
}
LIMITS = {Gt: ("gt", ">"), Ge: ("ge", "≥"), Lt: ("lt", "<"), Le: ("le", "≤")}


@dataclass(frozen=True)
class Key:
    """One key of a configuration, or the heading of one of its sections."""

    name: str  # dotted, as in an override; `N` stands for the number of a list's entry, counted from 0
    type: str  # with its limits: `integer ≥ 0 | null`; `section` for a section
    default: str | None  # as in YAML; None: the key must be given
    description: str  # "" if the field has none
    resume: Resume  # may it change on resuming: `free` yes; `past` if no finished step differs; `frozen` no
    when: str  # the choice that the key belongs to, such as `objective.kind = masked_lm`; "" for all other keys
    section: bool  # whether the key is a section; its keys follow


def keys(kind: type[Config]) -> list[Key]:
    """All keys of a configuration, in the order of its class. The keys of a section follow the section."""
    return list(_keys(kind, None, "", "frozen", ""))


def _keys(kind: type[Config], values: Config | None, prefix: str, resume: Resume, when: str) -> Iterator[Key]:
    """The keys of one section. If the section has a default, `values`, it provides the defaults of the keys."""
    for name in _ordered(kind):
        field = kind.model_fields[name]
        default = getattr(values, name) if values is not None else field.get_default(call_default_factory=True)
        rule = resume_rule(field) if resume == "frozen" else resume  # all keys of a free section are free
        inner_sections = sections(field.annotation)
        yield Key(
            prefix + name,
            _typed(field.annotation, field.metadata),
            None if default is PydanticUndefined else _written(default),
            field.description or (_documentation(inner_sections[0]) if len(inner_sections) == 1 else ""),
            rule,
            when,
            bool(inner_sections),
        )
        inner = f"{prefix}{name}.N." if _is_list(field.annotation) else f"{prefix}{name}."
        is_choice = len(inner_sections) > 1
        if is_choice:
            yield _choice(inner, inner_sections, rule, when)
        for section in inner_sections:
            chosen = f"{inner}kind = {_kind(section)}" if is_choice else when
            given = default if isinstance(default, section) else None
            further = _keys(section, given, inner, rule, chosen)
            yield from (key for key in further if not is_choice or key.name != f"{inner}kind")


def _ordered(kind: type[Config]) -> list[str]:
    """The keys in declared order, except that `kind` comes first and the inherited `replace` last."""
    names = kind.model_fields
    is_name = {name: name == "kind" and len(typing.get_args(names[name].annotation)) == 1 for name in names}
    return sorted(names, key=lambda name: (name in StageConfig.model_fields, not is_name[name]))


def _choice(prefix: str, choices: list[type[Config]], resume: Resume, when: str) -> Key:
    """The key `kind`, which selects one of several sections. Each section declares its own value.

    If a section gives `kind` a default, this section is selected when `kind` is left out.
    """
    fields = [section.model_fields["kind"] for section in choices]
    description = next((field.description for field in fields if field.description), "")
    default = next((_written(field.default) for field in fields if field.default is not PydanticUndefined), None)
    return Key(f"{prefix}kind", " | ".join(map(_kind, choices)), default, description, resume, when, False)


def _kind(section: type[Config]) -> str:
    """The value of `kind` that selects this class among the others of a union."""
    return " | ".join(map(str, typing.get_args(section.model_fields["kind"].annotation)))


def _is_list(annotation: Any) -> bool:
    return typing.get_origin(annotation) is list or any(map(_is_list, typing.get_args(annotation)))


def _documentation(section: type[Config]) -> str:
    """The first paragraph of a section's own docstring, on one line."""
    text = inspect.cleandoc(section.__doc__ or "").split("\n\n")[0]
    return " ".join(text.split())


def _typed(annotation: Any, limits: list) -> str:
    """The name of a type in terms of YAML. `limits` are pydantic's marks, such as Gt(0)."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _typed(inner[0], [*_limits(inner[1:]), *limits])
    if origin in (typing.Union, types.UnionType):
        if all(map(sections, inner)):
            return "section"
        return " | ".join(_typed(part, [] if part is type(None) else limits) for part in inner)
    if origin is typing.Literal:
        return " | ".join(_written(value) for value in inner)
    if sections(annotation) and origin is None:
        return "section"
    if origin is list:
        entries = _typed(inner[0], [])
        entries = "sections" if entries == "section" else f"({entries})" if " | " in entries else entries
        least = next((mark.min_length for mark in limits if isinstance(mark, MinLen)), 0)
        return f"list of {entries}" + (", not empty" if least else "")
    if origin is tuple:
        return f"[{', '.join(_typed(part, []) for part in inner)}]"
    if origin is dict:
        return f"mapping of {_typed(inner[0], [])} to {_typed(inner[1], [])}"
    return PLAIN.get(annotation, getattr(annotation, "__name__", str(annotation))) + _limited(limits)


def _limits(marks: tuple) -> list:
    """pydantic's marks inside an Annotated type. A `Field(…)` has its marks in its metadata."""
    return [limit for mark in marks for limit in (mark.metadata if isinstance(mark, FieldInfo) else [mark])]


def _limited(limits: list) -> str:
    said = []
    for mark in limits:
        if type(mark) in LIMITS:
            attribute, sign = LIMITS[type(mark)]
            said.append(f"{sign} {_number(getattr(mark, attribute))}")
        elif isinstance(mark, MinLen):
            said.append("not empty" if mark.min_length == 1 else f"of {mark.min_length} characters or more")
        elif isinstance(mark, MaxLen):
            said.append(f"of at most {mark.max_length} characters")
        elif pattern := getattr(mark, "pattern", None):
            said.append(f"matching {pattern}")
    return (" " if said and said[0][0] in "<>≤≥" else ", " if said else "") + ", ".join(said)


def _number(value: float) -> str:
    """A limit as text. Large powers of two are written as powers: 2^63."""
    if isinstance(value, int):
        return f"2^{value.bit_length() - 1}" if value >= 1 << 16 and value & (value - 1) == 0 else f"{value}"
    return f"{value:g}"


def _written(value: Any) -> str:
    """A default as YAML on one line. A section is `{}`, because its keys have their own defaults."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case list() | tuple():
            return f"[{', '.join(map(_written, value))}]"
        case dict():
            return "{" + ", ".join(f"{name}: {_written(inner)}" for name, inner in value.items()) + "}"
        case Config():
            return "{}"
        case str():
            return value if re.match(r"[\w/.]", value) else json.dumps(value, ensure_ascii=False)
    return str(value)
