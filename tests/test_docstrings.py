"""Public names explain themselves."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(path for folder in ("xkd_fast", "kernels") for path in (ROOT / folder).rglob("*.py") if path.read_text().strip())


def silent(owner: ast.Module | ast.ClassDef, name: str) -> Iterator[str]:
    """Public names in ``owner``, itself the first, that have no docstring; nothing inside a function or a private class."""
    if not ast.get_docstring(owner):
        yield name
    named = [node for node in owner.body if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))]
    for node in named:
        if node.name.startswith("_"):
            continue
        if isinstance(node, ast.ClassDef):
            yield from silent(node, f"{name}.{node.name}")
        elif not ast.get_docstring(node):
            yield f"{name}.{node.name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_everything_public_has_a_docstring(path: Path) -> None:
    """Red if a module, class, function or method that others use does not say what it takes and gives."""
    assert list(silent(ast.parse(path.read_text(encoding="utf-8")), path.stem)) == []


def test_the_reader_sees_what_is_missing() -> None:
    """Red if the test above is green because it looks at nothing."""
    source = "class A:\n    def b(self): ...\n    def _c(self): ...\nclass _D:\n    def e(self): ...\nasync def f(): ...\n"
    assert list(silent(ast.parse(source), "m")) == ["m", "m.A", "m.A.b", "m.f"]
