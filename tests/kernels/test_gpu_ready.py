"""The other tests here would be green on a GPU too: this is what a machine without one can see of that."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

FILES = sorted(Path(__file__).parent.glob("test_*.py"))
HOST_ONLY = {"test_adamw_ema.py", "test_native.py", "test_kernels_readme.py"}  # they choose their own devices, or none
FACTORIES = {"arange", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm", "tensor", "zeros"}


def without_device(source: str) -> list[int]:
    """Where tensors are made by a function, or a statement outside of any, that names no device: it would be the host's."""
    found = []
    for part in ast.parse(source).body:
        defaults = ast.walk(part.args) if isinstance(part, ast.FunctionDef) else ()
        for nodes in (defaults, [node for x in getattr(part, "body", [part]) for node in ast.walk(x)]):
            nodes = list(nodes)
            makes = [x for x in nodes if isinstance(x, ast.Call) and ast.unparse(x.func) in {f"torch.{n}" for n in FACTORIES}]
            told = {x.arg for x in nodes if isinstance(x, ast.keyword)} | {x.id for x in nodes if isinstance(x, ast.Name)}
            told |= {x.attr for x in nodes if isinstance(x, ast.Attribute)}
            if makes and not told & {"device", "DEVICE"}:
                found.append(makes[0].lineno)
    return found


@pytest.mark.parametrize("path", [path for path in FILES if path.name not in HOST_ONLY], ids=lambda path: path.name)
def test_every_tensor_is_told_its_device(path):
    """Catches a test that hands a kernel the host's tensor: green interpreted, red on every GPU."""
    assert without_device(path.read_text(encoding="utf-8")) == []


def test_the_rule_sees_what_it_is_for():
    """Catches a rule that lets everything pass."""
    good = "y = torch.ones(2, device=device)", "def f(z):\n    return torch.zeros(2).to(DEVICE)", "torch.empty(2).to(y.device)"
    assert all(without_device(source) == [] for source in good)
    assert without_device("device = 1\nx = torch.zeros(2)\ndef f(device, z=torch.randn(3)):\n    z.to(device)") == [2, 3]
    assert without_device("def f(device):\n    torch.zeros(2)") == [2]
