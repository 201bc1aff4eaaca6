"""The options as fields with dotted keys: which there are, which one a key was meant to be, what a value must be."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from xkd_fast.config.options import Config
from xkd_fast.yaml_text import yaml_value


@dataclass(frozen=True)
class Field:
    """An option, or a section of options, by its place in the configuration."""

    key: str  # dotted path
    kind: Any  # its type
    doc: str
    inner: type | None  # the dataclass of a section


def _section_type(kind: Any) -> type | None:
    candidates = typing.get_args(kind) if _is_union(kind) else (kind,)
    return next((c for c in candidates if isinstance(c, type) and dataclasses.is_dataclass(c)), None)


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def is_optional(kind: Any) -> bool:
    """Whether a field of this type may be null."""
    return _is_union(kind) and type(None) in typing.get_args(kind)


def fields_of(owner: type, prefix: str = "") -> Iterator[Field]:
    """The options and sections right inside a section, whose own key is ``prefix`` without its last dot."""
    hints = typing.get_type_hints(owner)
    for field in dataclasses.fields(owner):
        kind = hints[field.name]
        yield Field(f"{prefix}{field.name}", kind, field.metadata.get("doc", ""), _section_type(kind))


@cache
def all_fields() -> Mapping[str, Field]:
    """Every option and section by its dotted path."""

    def walk(owner: type, prefix: str) -> Iterator[Field]:
        for member in fields_of(owner, prefix):
            yield member
            if member.inner is not None:
                yield from walk(member.inner, f"{member.key}.")

    return {member.key: member for member in walk(Config, "")}


LEAST_LIKENESS = 0.6  # of two names, 0-1: below it one is no slip of the other


def _likeness(first: str, second: str) -> float:
    return difflib.SequenceMatcher(None, first, second).ratio()


def _nearest(key: str) -> str | None:
    """The option that ``key`` was most probably meant to be: of the same name in any section, of a like one in a like section.

    None where there is none.
    """
    section_name, _, name = key.rpartition(".")

    def is_alike(candidate: str) -> bool:
        place, _, last = candidate.rpartition(".")
        near = not section_name or _likeness(section_name, place) >= LEAST_LIKENESS
        return name == last or (near and _likeness(name, last) >= LEAST_LIKENESS)

    def rank(candidate: str) -> tuple[float, float]:
        whole, last = _likeness(key, candidate), candidate.rpartition(".")[2]
        return max(whole, 0.95 if name == last else 0.85 * _likeness(name, last)), whole  # of equal names the nearest section

    return max(filter(is_alike, all_fields()), key=rank, default=None)


def _choices(key: str) -> str:
    """What stands in the innermost section on the way to ``key``, in words."""
    owner: type = Config
    place = ""
    for name in key.split(".")[:-1]:
        member = all_fields().get(f"{place}{name}")
        if member is None or member.inner is None:
            break
        owner, place = member.inner, f"{member.key}."
    return f"{place[:-1] or 'a configuration'} holds {', '.join(field.name for field in dataclasses.fields(owner))}"


def unknown_key(key: str) -> str:
    """What is said of a key that is no option: the nearest one, or what there is."""
    if key in all_fields():
        section_name, _, name = key.rpartition(".")
        return f"{key} is written with dots, which only overrides are; in a file, write {name} inside {section_name}"
    nearest = _nearest(key)
    return f"{key} is not an option; " + (f"the nearest one is {nearest}" if nearest else _choices(key))


def expected(kind: Any) -> str:
    """What a value of this type is, in words."""
    if _is_union(kind):
        return " or ".join(expected(part) for part in typing.get_args(kind))
    if kind is type(None):
        return "null"
    if _section_type(kind) is not None:
        return "a section with options of its own"
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(yaml_value(value) for value in arguments)
    if typing.get_origin(kind) is tuple:
        if arguments[-1] is Ellipsis:
            return f"a list, each item {expected(arguments[0])}"
        return f"a list of {len(arguments)}, each item {expected(arguments[0])}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]
