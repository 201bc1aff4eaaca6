"""How the options of data preparation are declared: documented, checked fields of frozen dataclasses."""

from __future__ import annotations

from dataclasses import field
from typing import Any

FORBID_EXTRA = {"extra": "forbid"}  # read by pydantic where options come from a file; inert otherwise


def option(default: Any, doc: str) -> Any:
    """A dataclass field with a default and its one-line documentation (unit and "off" value included)."""
    return field(default=default, metadata={"doc": doc})


def require(condition: bool, message: str) -> None:
    """Raise ``ValueError(message)`` unless the condition holds; messages name the value, the rule and the key."""
    if not condition:
        raise ValueError(message)
