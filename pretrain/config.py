"""Configuration: one YAML file for a run, and dotted overrides after it. Unknown keys are errors.

A scalar is decoded by the declared type of its key, never by its form: YAML's own rules read `3e-4` as a string and
`no` as False. Every stage declares its configuration as a subclass of `Config` beside the code that reads it.
"""

import copy
import difflib
import math
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from pretrain.errors import ConfigError

NULL = {"", "null", "~", "none", "None"}
LINE = 1500  # the longest line of an error in characters: a value pasted by mistake may have megabytes
Resume = Literal["free", "past", "frozen"]


class Config(BaseModel):
    """Base of every section: immutable, no unknown keys, no infinite numbers.

    A string below a key describes the key: `--help` and the documentation show it.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _decode(cls, values: Any) -> Any:
        """Decode strings that pydantic cannot: null, the numbers of a Literal, a free-form mapping."""
        if not isinstance(values, dict):
            return values
        decoded = {}
        for key, value in values.items():
            if (text := _unwritable(value)) is not None:
                raise ValueError(f"{key}: {text[:60]!a} has a NUL or half of a surrogate pair: correct it")
            field = cls.model_fields.get(key)
            if field is not None and isinstance(value, str) and value in NULL and _admits_none(field.annotation):
                value = None
            if field is not None and typing.get_origin(field.annotation) is dict:
                value = _plain_scalars(value)
                value = {} if value is None else value
            if field is not None and typing.get_origin(field.annotation) is Literal:
                value = next((known for known in typing.get_args(field.annotation) if str(known) == value), value)
            decoded[key] = value
        return decoded


def free(default: Any = ..., **kwargs: Any) -> Any:
    """A key that may change when a run resumes: it affects speed, places or reports, never the result."""
    return Field(default, json_schema_extra={"resume": "free"}, **kwargs)


def past(default: Any = ..., **kwargs: Any) -> Any:
    """A key that may change when a run resumes if no finished step would have been different.

    The run decides this, because it knows its steps: `past_conflicts` in training/resume.py.
    """
    return Field(default, json_schema_extra={"resume": "past"}, **kwargs)


def chosen(known: dict[str, Any]) -> Any:
    """The type of a section: its key `kind` names an entry of `known`, and that entry's `Config` has its other keys."""
    choices = tuple(entry.Config for entry in known.values())
    return Annotated[Union[choices], Field(discriminator="kind")] if len(choices) > 1 else choices[0]  # noqa: UP007


class StageConfig(Config):
    """Base of the configuration of a stage that publishes a folder."""

    replace: bool = free(False)
    """Replace an existing result that was made with other settings."""

    def settings(self) -> dict:
        """The settings that a folder records: all keys except the free ones and `out`, the folder's own place."""
        return {key: value for key, value in frozen(self).items() if key != "out"}

    def differences(self, old: dict) -> list[str]:
        """Lines `key: old → new` for each of `settings` that differs from `old`.

        `old` may be of an older version: a key that it lacks counts as its default.
        """
        lines = []
        for key, new in self.settings().items():
            default = type(self).model_fields[key].get_default(call_default_factory=True)
            was = old.get(key, default.model_dump(mode="json") if isinstance(default, Config) else default)
            lines += _differing(key, was, new)
        return lines


C = TypeVar("C", bound=Config)


def load(kind: type[C], path: Path | str, overrides: Sequence[str] = ()) -> C:
    """Read `path` (YAML) as a `kind`, and apply `overrides` such as `objective.mask_ratio=0.3`.

    Raises ConfigError naming the file or the override, the key, the value found, and the nearest known key.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise ConfigError("no such configuration file", f"looked for: {path}", "configs/ holds examples") from None
    except OSError as error:
        remedy = "change its permissions, or name another file"
        raise ConfigError("a configuration file cannot be read", f"{path}: {error.strerror}", remedy) from None
    except UnicodeDecodeError as error:
        where = f"{path}, byte {error.start + 1}: {error.object[error.start]:#04x}"
        raise ConfigError("a configuration file must be UTF-8", where, "convert it: iconv -f … -t utf-8") from None
    values = parse(text, str(path))
    if not isinstance(values, dict):
        raise ConfigError("a configuration is a mapping of keys to values", f"{path} holds {values!r}")
    said = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"an override is written key=value, not {override!r:.200}")
        _set(values, key.split("."), parse(value, f"override {override!r:.200}"), override)
        said[key] = f"override {override!r:.200}"
    return build(kind, values, str(path), said)


def build(kind: type[C], values: dict, source: str, said: dict[str, str] | None = None) -> C:
    """Validate `values` as a `kind`. Errors name `source`, or the override of a key in `said` (key → override)."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise _explain(kind, error, source, said or {}) from None


def parse(text: str, source: str) -> Any:
    """Read YAML with every scalar as a string. A key given twice is an error."""
    try:
        return yaml.load(text, _Strings)
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        where = f"{source}, line {place.line + 1}" if place else source
        raise ConfigError("not valid YAML", where, str(getattr(error, "problem", error))) from None
    except RecursionError:
        raise ConfigError("a configuration is nested too deeply", source, "use fewer levels") from None


def dump(config: Config) -> str:
    """The resolved configuration as YAML that loads back equal."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def read_values(text: str) -> Any:
    """Read YAML with values typed by YAML's own rules: for files that a program wrote.

    Raises ValueError when the text is not valid YAML.
    """
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {error}") from None


def write_values(values: Any) -> str:
    """Plain values as YAML, the keys in their order."""
    return yaml.safe_dump(values, sort_keys=False)


def frozen(config: Config) -> dict:
    """The JSON values of the keys that determine the result: all keys except the free ones."""
    found = {}
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if resume_rule(field) != "free":
            found[name] = frozen(value) if isinstance(value, Config) else config.model_dump(mode="json")[name]
    return found


def resume_rule(field: FieldInfo) -> Resume:
    """Whether a key may change when a run resumes, as `free` and `past` declare it."""
    extra = field.json_schema_extra
    rule = extra.get("resume") if isinstance(extra, dict) else None
    if rule == "free":
        return "free"
    return "past" if rule == "past" else "frozen"


def resume_conflicts(old: Config, new: Config, prefix: str = "") -> list[str]:
    """Lines `key: old → new` for each frozen key that differs. Keys within a section are named one by one."""
    lines = []
    for name, field in type(old).model_fields.items():
        a, b, key = getattr(old, name), getattr(new, name), prefix + name
        if resume_rule(field) != "frozen" or a == b:
            continue
        if isinstance(a, Config) and type(a) is type(b):
            lines += resume_conflicts(a, b, key + ".")
        elif isinstance(a, Config) and isinstance(b, Config):  # another kind of the section, with other keys
            lines.append(f"{key}.kind: {dict(a)['kind']} → {dict(b)['kind']}")
        else:
            lines.append(f"{key}: {short(a)} → {short(b)}")
    return lines


def _differing(key: str, old: Any, new: Any) -> list[str]:
    """Lines for the values that differ. Sections, and lists of equal length, are compared key by key."""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        old, new = dict(enumerate(old)), dict(enumerate(new))
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new or _same_place(old, new) else [f"{key}: {old} → {new}"]
    return [line for name in {**old, **new} for line in _differing(f"{key}.{name}", old.get(name), new.get(name))]


def _same_place(a: Any, b: Any) -> bool:
    """Whether two values name the same file or folder."""
    try:
        return isinstance(a, str) and isinstance(b, str) and Path(a).samefile(b)
    except (OSError, ValueError):
        return False


def short(value: Any) -> str:
    """The text of a value in a line of an error."""
    if isinstance(value, Config):
        value = value.model_dump(mode="json")
    elif isinstance(value, (list, tuple)):
        value = [v.model_dump(mode="json") if isinstance(v, Config) else v for v in value]
    return str(value)


class _Strings(yaml.BaseLoader):
    """Reads every scalar as a string, and refuses a key given twice."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str) or key in seen:
                problem = f"the key {key!r} is given twice" if isinstance(key, str) else f"{key!r} cannot be a key"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes strings so that PyYAML reads them back equal."""

    def represent_text(self, text: str) -> yaml.Node:
        style = '"' if "\x85" in text else None  # in other quotes PyYAML 6.0.3 reads U+0085 as two spaces
        return self.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _Dumper.represent_text)


def _unwritable(value: Any) -> str | None:
    """The first string in a value that is no valid file name and no UTF-8 text: YAML's escapes can make one."""
    if isinstance(value, dict | list):
        inner = value.values() if isinstance(value, dict) else value
        return next((text for item in inner if (text := _unwritable(item)) is not None), None)
    return value if isinstance(value, str) and re.search("[\0\ud800-\udfff]", value) else None


def _plain_scalars(value: Any) -> Any:
    """Decode the scalars of a free-form mapping by the rules of JSON."""
    if isinstance(value, dict):
        return {key: _plain_scalars(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain_scalars(item) for item in value]
    if not isinstance(value, str):
        return value
    if value in NULL:
        return None
    if value in ("true", "false"):
        return value == "true"
    for number in (int, float):
        try:
            found = number(value)
        except ValueError:
            continue
        return found if math.isfinite(found) else value
    return value


def _set(values: dict, keys: list[str], value: Any, override: str) -> None:
    """Apply one override to the parsed file. A number addresses an entry of a list (`phases.0.steps`)."""
    for depth, key in enumerate(keys):
        where = ".".join(keys[:depth])
        if isinstance(values, list):
            if key not in map(str, range(len(values))):
                entries = f"its entries are {where}.0 to {where}.{len(values) - 1}" if values else "it is empty"
                raise ConfigError(f"{where} has no entry {key!r:.200}", f"in override {override!r:.200}", entries)
            key = int(key)
        elif not isinstance(values, dict):
            raise ConfigError(f"{where} is a single value, {values!r:.200}", f"in override {override!r:.200}")
        if depth == len(keys) - 1:
            values[key] = value
            return
        inside = values[key] if isinstance(values, list) or key in values else None
        absent = inside is None or (isinstance(inside, str) and inside in NULL)
        values[key] = {} if absent else copy.copy(inside)  # an alias (`*name`) may share it
        values = values[key]


def _explain(kind: type[Config], error: ValidationError, source: str, said: dict[str, str]) -> ConfigError:
    """One error for all problems of a validation. Each has the key, its place, the value found, and what to do."""
    lines = []
    for problem in error.errors():
        section, loc = _resolve(kind, problem["loc"])
        key = ".".join(map(str, loc)) or "(whole file)"
        within = [text for name, text in said.items() if name.startswith(f"{key}.")]
        above = (text for name, text in said.items() if f"{key}.".startswith(f"{name}."))
        where = next(above, " and ".join([source, *within]))
        match problem["type"]:
            case "extra_forbidden":
                lines.append(f"{where}: unknown key {key}{_did_you_mean(kind, section or kind, loc)}")
            case "missing":
                lines.append(f"{where}: {key} is missing")
            case "value_error" | "assertion_error":
                lines.append(f"{where}: {problem['msg'].split(', ', 1)[-1]}")
            case _:
                message = problem["msg"][0].lower() + problem["msg"][1:]
                lines.append(f"{where}: {key} = {problem['input']!r:.200}: {message}")
    lines = [line if len(line) <= LINE else line[:LINE] + "…" for line in lines]
    what = "this configuration cannot be used" if len(lines) > 1 else lines.pop()
    return ConfigError(what, *lines)


def _resolve(kind: type[Config], loc: tuple) -> tuple[type[Config] | None, list]:
    """The section that holds the last key of a pydantic location, and the location without union tags."""
    section: type[Config] | None = kind
    choices: list[type[Config]] = []
    path: list[int | str] = []
    for part in loc:
        tagged = [choice for choice in choices if part in _tags(choice)]
        if tagged:
            section, choices = tagged[0], []
            continue
        path.append(part)
        if isinstance(part, int) or section is None or len(path) == len(loc):
            continue
        field = section.model_fields.get(part)
        if field is None:
            break
        choices = sections(field.annotation)
        section = choices[0] if choices else section
    return section, path


def _did_you_mean(kind: type[Config], section: type[Config], loc: list) -> str:
    """A hint for an unknown key: its right place, the nearest known key, or all known keys."""
    # First the section's own keys, then inherited keys.
    known, key = sorted(section.model_fields, key=lambda name: name not in section.__annotations__), loc[-1]
    if key in kind.model_fields:  # a right name in a wrong section is as common as a typo
        return f": did you mean {key}, outside of {loc[0]}?"
    for name, field in kind.model_fields.items():
        for inner in sections(field.annotation):
            if key in inner.model_fields and _tags(inner) and name == loc[0]:
                return f": {name}.kind = {_tags(inner)[0]} has it"
            if key in inner.model_fields:
                place = f"{name}.0" if typing.get_origin(field.annotation) is list else name
                return f": did you mean {place}.{key}?"
    near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
    if near:
        return f": did you mean {'.'.join([*map(str, loc[:-1]), near[0]])}?"
    return f" (known here: {', '.join(known)})"


def sections(annotation: Any) -> list[type[Config]]:
    """The Config classes inside an annotation such as `list[Phase]` or `MaskedLMConfig | CausalLMConfig`."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [annotation]
    return [section for inner in typing.get_args(annotation) for section in sections(inner)]


def _tags(section: type[Config]) -> tuple:
    """The values of `kind` that select this section of a union."""
    field = section.model_fields.get("kind")
    return typing.get_args(field.annotation) if field else ()


def _admits_none(annotation: Any) -> bool:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return type(None) in typing.get_args(annotation)
    return annotation is Any
