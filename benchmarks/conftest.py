"""`pytest benchmarks/ --benchmark` measures at full size and writes JSON; without it the same files are smoke tests."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports Triton: kernels are interpreted
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--benchmark``."""
    parser.addoption("--benchmark", action="store_true", help="measure at full size and write benchmarks/results/*.json")


@pytest.fixture
def measuring(request: pytest.FixtureRequest) -> bool:
    """Whether this run measures."""
    return bool(request.config.getoption("--benchmark"))
