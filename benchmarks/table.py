"""``python -m benchmarks.table [SINCE]``: the step benchmarks of this machine's results as a short table.

SINCE: seconds of the epoch; older files, of other runs or machines, are left out.
"""

from __future__ import annotations

import json
import sys

from benchmarks import record


def lines(since: float = 0.0) -> list[str]:
    """One line per measured batch size."""
    found = []
    for path in sorted(record.RESULTS.glob("step_*.json")):
        if path.stat().st_mtime < since:
            continue
        result = json.loads(path.read_text())
        for row in result["rows"]:
            speeds = ", ".join(f"{name} {speed:.4g}" for name, speed in row["clips_per_second"].items())
            ratios = ", ".join(f"{ratio['median']:.2f} × {name}" for name, ratio in row["fast_against"].items())
            what = f"{result['model']}, {result['precision']}, {row['clips']} clips on {result['device']}"
            lost = row.get("out_of_memory", []) + row.get("not_reached", [])
            rest = f"; without {', '.join(lost)} (out of memory or time)" if lost else ""
            found.append(f"{what}: {speeds} clips/s; {ratios}{rest}")
    return found or ["no step was measured"]


if __name__ == "__main__":
    print("\n".join(lines(float(sys.argv[1]) if len(sys.argv) > 1 else 0.0)))
