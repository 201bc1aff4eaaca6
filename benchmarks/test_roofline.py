"""The floors of every kernel and of the whole step, printed."""

from __future__ import annotations

from benchmarks.kernel_cases import CASES, SMALL
from benchmarks.roofline import CLIPS, floors, step_table, table


def test_roofline(measuring: bool) -> None:
    """Fails if a case or the step can no longer be counted."""
    rows = [row for case in (CASES if measuring else SMALL) for row in floors(case)]
    assert all(seconds > 0 for row in rows for seconds in row.seconds.values())
    print("\n".join(table(rows)))
    print("\n".join(step_table(CLIPS if measuring else 2)))
