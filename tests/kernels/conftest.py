"""Every tensor that a kernel is given to write begins as NaN, so a place that it leaves out shows.

On a GPU a kernel is compiled anew for each type and constant, which takes a second or two. So of each test one case of each
type goes before the benchmarks of ``gpu.sh``, and the others, marked ``further``, after them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.kernel_cases import Case

HALF = (torch.bfloat16, torch.float16)
HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)  # before -m is looked at
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as ``further`` every case of a test but the last, and largest, of its types; of half types one is enough."""
    seen = set()
    for item in reversed(items):
        if item.path.parent == HERE and isinstance(item, pytest.Function):
            values = item.callspec.params.values() if hasattr(item, "callspec") else ()
            kinds = (torch.half if value in HALF else value for value in values if isinstance(value, (torch.dtype, Case)))
            case = (item.path, item.originalname, *kinds)
            if case in seen:
                item.add_marker("further")
            seen.add(case)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """``torch.empty`` is filled with NaN (or the largest whole number)."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all(), "memory is not poisoned"
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def device() -> torch.device:
    """The GPU, or the CPU with interpreted kernels."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
