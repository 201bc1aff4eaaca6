"""For all tests: what holds before anything imports Triton, and what is printed at the end.

Without a GPU kernels are interpreted, so that the tests run the very same code.
"""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how far each cell of the engine's matrix was off, also where other processes have run them (``-n 2``)."""
    reports = [report for each in terminalreporter.stats.values() for report in each if getattr(report, "when", "") == "call"]
    rows = [value for report in reports for name, value in report.user_properties if name == "engine_cell"]
    if rows:
        terminalreporter.write_line(f"\n{'ranks':>5}  {'cell':64} {'error':>8} {'of movement':>12} {'together':>9}  largest in")
    for world_size, name, error, worst, of_movement, together in sorted(rows):
        terminalreporter.write_line(f"{world_size:5}  {name:64} {error:8.1e} {of_movement:12.1e} {together:9.1e}  {worst}")
