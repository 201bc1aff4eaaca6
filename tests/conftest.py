"""For all tests: what holds before anything imports Triton, and what is printed at the end.

Without a GPU kernels are interpreted, so that the tests run the very same code.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Minutes each: begun first, the rest in the order of collection (Makefile), so that no processor waits for the last of them.
LONG = ("test_training.py", "test_gpu_script.py", "test_engine.py", "test_native.py", "test_resources.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files that take longest first."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture
def single_rank() -> Iterator[None]:
    """A process group of one."""
    from xkd_fast.engine.launch import free_port

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how far each cell of the engine's matrix was off, also where other processes have run them (``-n 2``)."""
    reports = [report for each in terminalreporter.stats.values() for report in each if getattr(report, "when", "") == "call"]
    rows = [value for report in reports for name, value in report.user_properties if name == "engine_cell"]
    if rows:
        terminalreporter.write_line(f"\n{'ranks':>5}  {'cell':64} {'error':>8} {'of movement':>12} {'together':>9}  largest in")
    for world_size, name, error, worst, of_movement, together in sorted(rows):
        terminalreporter.write_line(f"{world_size:5}  {name:64} {error:8.1e} {of_movement:12.1e} {together:9.1e}  {worst}")
