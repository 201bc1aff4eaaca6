"""How counts, bytes and seconds are told."""

from __future__ import annotations


def count_of(count: int, one: str, more: str = "") -> str:
    """So many things, by the name of one or of more; without the latter, that ends in an s."""
    return f"{count} {one if count == 1 else more or f'{one}s'}"


def amount_of(count: float) -> str:
    """So many bytes, three digits of them."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count:.0f} bytes"


def lasting(seconds: float) -> str:
    """So much time, three digits of it."""
    return f"{seconds / 3600:.3g} h" if seconds >= 3600 else f"{seconds / 60:.3g} min" if seconds >= 60 else f"{seconds:.2g} s"
