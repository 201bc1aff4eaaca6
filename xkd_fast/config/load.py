"""Configurations from YAML files and dotted overrides, checked here once. All that is wrong is reported at once."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from xkd_fast.config.fields import all_fields, expected, fields_of, is_optional, unknown_key
from xkd_fast.config.options import Config
from xkd_fast.errors import UserError
from xkd_fast.yaml_text import InvalidYaml, parse_yaml, shorten, yaml_value

# --------------------------------------------------------------------------------------------------------------- reading files


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """``above`` laid over ``below``: sections are merged, everything else is replaced."""
    merged = dict(below)
    for name, value in above.items():
        old = merged.get(name)
        merged[name] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def shipped_configs() -> Path:
    """Folder of the configurations that come with the package: inside an installed one, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def _find(path: str | Path, beside: Path) -> Path:
    """The file that ``path`` means: as it is, or the name of a shipped configuration."""
    given = beside / path
    if given.is_file():
        return given
    shipped = sorted(shipped_configs().glob("*.yaml"))
    if len(Path(path).parts) == 1:
        for candidate in shipped:
            if str(path) in (candidate.name, candidate.stem):
                return candidate
    names = ", ".join(candidate.stem for candidate in shipped)
    problem = "is a folder" if given.is_dir() else "does not exist"
    raise UserError(f"configuration file {path} {problem}; name a YAML file, or one of the shipped ones: {names}")


def _read_file(path: Path, opened: tuple[Path, ...] = ()) -> tuple[dict[str, Any], dict[str, str]]:
    """A file's mapping laid over its base's, and where each dotted key stands."""
    if path.resolve() in opened:
        raise UserError(f"{path}: base leads back to this file; remove it from one of {', '.join(map(str, opened))}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"configuration file {path} cannot be read: {error}") from error
    try:
        data, lines = parse_yaml(text)
    except InvalidYaml as error:
        raise UserError(f"{path}{f':{error.line}' if error.line else ''}: {error}") from error
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise UserError(f"{path}: a configuration is a mapping of options, such as `seed: 0`, not {yaml_value(data)}")
    origins = {key: f"{path}:{line}" for key, line in lines.items()}
    base = data.pop("base", None)
    if base is None:
        return data, origins
    if not isinstance(base, str):
        raise UserError(f"{origins['base']}: base = {yaml_value(base)} must be the name of a configuration file")
    below, below_origins = _read_file(_find(base, path.parent), (*opened, path.resolve()))
    return _merge(below, data), below_origins | origins


def _read_override(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise UserError(f"{override!r} is not an override; write key.path=value, such as train.epochs=2")
    try:
        return key, parse_yaml(text)[0]
    except InvalidYaml as error:
        raise UserError(f"{override!r}: {error}") from error


# ------------------------------------------------------------------------------------------------------------------- checking


@cache
def _adapter() -> TypeAdapter[Config]:
    return TypeAdapter(Config)


def _drop_unknown(data: dict[str, Any], owner: type, prefix: str, unknown: list[str]) -> dict[str, Any]:
    """``data`` without keys that are no option (their paths go to ``unknown``) and without sections left empty."""
    members = {member.key: member for member in fields_of(owner, prefix)}
    kept: dict[str, Any] = {}
    for name, value in data.items():
        key = f"{prefix}{name}"
        if key not in members:
            unknown.append(key)
            continue
        member = members[key]
        if member.inner is not None and isinstance(value, dict):
            value = _drop_unknown(value, member.inner, f"{key}.", unknown)
        if member.inner is not None and value is None and not is_optional(member.kind):
            continue  # `log:` with every option commented out
        kept[name] = value
    return kept


def _blame(message: str, where: str) -> tuple[str, str]:
    """The option that a section's own check speaks of, and the message, which names it in full."""
    prefix = f"{where}." if where else ""
    named = re.match(r"[a-z_.]*[a-z_]", message)
    if named is not None and named.group().startswith(prefix) and named.group() in all_fields():
        return named.group(), message
    for word in re.findall(r"[a-z_]+", message):
        if f"{prefix}{word}" in all_fields():
            return f"{prefix}{word}", f"{prefix}{word}: {message}"
    return where, f"{where}: {message}" if where else message


def _problems(error: ValidationError, data: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What is wrong, as (key, sentence); a wrong list is named once, whichever of its items are wrong."""
    named: set[str] = set()
    for item in error.errors():
        if item["type"] == "value_error":  # from a dataclass's own check
            yield _blame(str(item["ctx"]["error"]), ".".join(map(str, item["loc"])))
            continue

        value: Any = data
        path: list[str] = []
        for step in item["loc"]:
            if ".".join([*path, str(step)]) not in all_fields():
                break
            path.append(str(step))
            value = value.get(step) if isinstance(value, dict) else None
        key_path = ".".join(path)
        if key_path not in named:
            named.add(key_path)
            yield key_path, f"{key_path} = {yaml_value(value)} must be {expected(all_fields()[key_path].kind)}"


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read, merge and check a configuration.

    Args:
        path: YAML file, or the name of a shipped one (``demo``, ``xkd_base_k400``, …); None = defaults alone.
        overrides: ``key.path=value`` each, applied in order; a value is YAML, and a section's mapping is merged into it.

    Raises:
        UserError: naming every wrong value with its key, the rule it breaks and the place it stands.
    """
    data: dict[str, Any] = {}
    origins: dict[str, str] = {}
    if path is not None:
        data, origins = _read_file(_find(path, Path()))
    problems: list[tuple[str, str]] = []  # (key, sentence)
    for override in overrides:
        key, value = _read_override(override)
        origins[key] = f"override {shorten(override)}"
        if key not in all_fields():
            problems.append((key, unknown_key(key)))
            continue
        for name in reversed(key.split(".")):
            value = {name: value}
        data = _merge(data, value)
    unknown: list[str] = []
    data = _drop_unknown(data, Config, "", unknown)
    data = _merge(Config().as_dict(), data)  # a section's defaults are its own: audio's and video's differ

    problems += [(key, unknown_key(key)) for key in unknown]
    config = None
    try:
        config = _adapter().validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        problems += _problems(error, data)
    if config is not None and not problems:
        return config
    lines = [f"{sentence} ({origins[key]})" if key in origins else sentence for key, sentence in problems]
    source = "the configuration" if path is None else str(path)
    if len(lines) == 1:
        raise UserError(f"{source}: {lines[0]}")
    raise UserError(f"{source}: {len(lines)} errors\n" + "\n".join(f"  - {line}" for line in lines))
