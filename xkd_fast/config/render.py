"""A configuration as a YAML file that explains every option."""

from __future__ import annotations

import dataclasses
import textwrap
from typing import Any

from xkd_fast.config.fields import fields_of
from xkd_fast.config.options import Config
from xkd_fast.yaml_text import yaml_value


def render_config(config: Config) -> str:
    """The whole configuration as a YAML file with a comment per option; ``load_config`` reads it back as an equal one."""
    lines = [f"# {Config.__doc__ or ''}".rstrip()]
    _render_section(config, "", 0, lines)
    return "\n".join(lines) + "\n"


def _render_section(owner: Any, prefix: str, depth: int, lines: list[str]) -> None:
    indent = "  " * depth
    members = list(fields_of(type(owner), prefix))
    plain: dict[str, str] = {}
    for member in members:
        name = member.key.rpartition(".")[2]
        value = getattr(owner, name)
        if not dataclasses.is_dataclass(value):
            plain[member.key] = f"{indent}{name}: {yaml_value(value)}"
    column = max((len(text) for text in plain.values() if len(text) <= 40), default=0) + 2
    for member in members:
        name = member.key.rpartition(".")[2]
        if member.key not in plain:
            if depth == 0:
                lines.append("")
            lines.append(f"{indent}{name}:  # {member.doc}")
            _render_section(getattr(owner, name), f"{member.key}.", depth + 1, lines)
            continue
        text = f"{plain[member.key]:<{column}}# {member.doc}" if len(plain[member.key]) < column else ""
        if text and len(text) <= 140:
            lines.append(text)
        else:
            lines += textwrap.wrap(member.doc, 120, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
            lines.append(plain[member.key])
