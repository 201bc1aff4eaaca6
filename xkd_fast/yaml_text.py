"""YAML text in and out: scalars as YAML 1.2 reads them, the line of every key, values on one line."""

from __future__ import annotations

import math
import re
import textwrap
import typing
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """YAML with the plain scalars of YAML 1.2: PyYAML alone reads 1e-4 as text, yes as true and 1:30 as 90."""

    yaml_implicit_resolvers: typing.ClassVar[dict[Any, Any]] = {}


_NUMBER = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", rf"{_NUMBER}|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+.0123456789"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


class InvalidYaml(Exception):
    """Something wrong in a YAML text; ``line`` counts from 1, 0 = unknown."""

    def __init__(self, problem: str, line: int = 0) -> None:
        super().__init__(problem)
        self.line = line


def parse_yaml(text: str) -> tuple[Any, dict[str, int]]:
    """The value of a YAML text, and the line of each dotted key. Raises ``InvalidYaml``."""
    lines: dict[str, int] = {}
    try:
        node = yaml.compose(text, Loader=_Loader)
        return (None if node is None else _value(node, "", lines)), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise InvalidYaml(f"not valid YAML: {error.problem or error.context}", mark.line + 1 if mark else 0) from None
    except yaml.YAMLError as error:
        raise InvalidYaml(f"not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise InvalidYaml("nested too deeply") from None


def _value(node: yaml.Node, key: str, lines: dict[str, int]) -> Any:
    line = node.start_mark.line + 1
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, f"{key}[{index}]", lines) for index, item in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        mapping: dict[str, Any] = {}
        for name_node, value_node in node.value:
            if not isinstance(name_node, yaml.ScalarNode):
                raise InvalidYaml("a key must be a name", name_node.start_mark.line + 1)
            name = _text(name_node.value, name_node.start_mark.line + 1)
            path = f"{key}.{name}" if key else name
            if name in mapping:
                raise InvalidYaml(f"{path} is given twice, here and on line {lines[path]}", name_node.start_mark.line + 1)
            lines[path] = name_node.start_mark.line + 1
            mapping[name] = _value(value_node, path, lines)
        return mapping
    return _scalar(node, line)


def _scalar(node: yaml.Node, line: int) -> Any:
    text, tag = _text(node.value, line), node.tag.rpartition(":")[2]
    if tag == "str":
        return text
    if tag == "null":
        return None
    try:
        if tag == "bool":
            return {"true": True, "false": False}[text.lower()]
        number = {"int": int, "float": float}[tag](text.replace(".inf", "inf").replace(".nan", "nan"))
    except (KeyError, ValueError):
        raise InvalidYaml(f"{shorten(text)} is not a value that is understood here", line) from None
    if not math.isfinite(number) or abs(number) > 1e300 or (tag == "int" and abs(number) >= 2**63):
        raise InvalidYaml(f"{shorten(text)} is no finite number, or too large a one", line)
    return number


def _text(text: str, line: int) -> str:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise InvalidYaml("text holds half of a surrogate pair", line)
    return text


def shorten(text: str) -> str:
    """Text of at most 60 characters, for a message: a longer one is cut between two words and ends in "…"."""
    return textwrap.shorten(text, 60, placeholder=" …") if len(text) > 60 else text


def yaml_value(value: Any) -> str:
    """A value in YAML, on one line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(yaml_value(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{yaml_value(str(name))}: {yaml_value(item)}" for name, item in value.items()) + "}"
    if isinstance(value, str):
        return _plain_or_quoted(value)
    return repr(value)


def _plain_or_quoted(text: str) -> str:
    """Text in YAML: plain where it reads back as itself, quoted and escaped otherwise."""
    if re.fullmatch(r"[A-Za-z_/.~][A-Za-z0-9_/.~+-]*", text) and parse_yaml(text)[0] == text:
        return text
    escaped = []
    for character in text:
        code = ord(character)
        if character in '"\\':
            escaped.append("\\" + character)
        elif 0x20 <= code < 0x7F or (0xA1 <= code < 0xD800 and code not in (0x2028, 0x2029)):
            escaped.append(character)
        else:
            escaped.append(f"\\U{code:08x}")
    return '"' + "".join(escaped) + '"'
