"""Every option there is, and what is said about a configuration that is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from xkd_fast.config import load_config
from xkd_fast.errors import UserError


def options_of(value, prefix=""):
    """Every option under a configuration object: (dotted key, value, documentation)."""
    for field in dataclasses.fields(value):
        key, inner = f"{prefix}{field.name}", getattr(value, field.name)
        if dataclasses.is_dataclass(inner):
            yield from options_of(inner, f"{key}.")
        else:
            yield key, inner, field.metadata.get("doc", "")


WITH_DEMO = load_config(None, ["data.demo={}"])
OPTIONS = list(options_of(WITH_DEMO))
KEYS = [key for key, _, _ in OPTIONS]


def error_of(path=None, overrides=()) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def write(folder: Path, text: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path
