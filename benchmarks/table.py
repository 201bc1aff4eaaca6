"""``python -m benchmarks.table [SINCE]``: the measured steps as a short table.

SINCE: seconds of the epoch; files written before, by other runs or on other machines, are left out.
"""

from __future__ import annotations

import json
import sys

from benchmarks import record
from benchmarks.race import untimed


def lines(since: float = 0.0) -> list[str]:
    """One line per measured batch size."""
    found = []
    for path in sorted(record.RESULTS.glob("step_*.json")):
        if path.stat().st_mtime < since:
            continue
        result = json.loads(path.read_text())
        for row in result["rows"]:
            speeds = ", ".join(f"{name} {speed:.4g}" for name, speed in row["clips_per_second"].items())
            told = [f"{ratio['median']:.2f} × {name}" for name, ratio in row["fast_against"].items()]
            told += [f"{name} {reason}" for name, reason in untimed(row).items()]
            told += [f"memory was short beside {name}" for name, tries in row["allocation_retries"].items() if tries]
            what = f"{result['model']}, {result['precision']}, {row['clips']} clips on {result['device']}"
            found.append(f"{what}: {speeds} clips/s; {', '.join(told)}")
    return found or ["no step was measured"]


if __name__ == "__main__":
    print("\n".join(lines(*map(float, sys.argv[1:2]))))
