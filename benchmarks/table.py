"""``python -m benchmarks.table``: the step benchmarks in ``results/`` as a short table."""

from __future__ import annotations

import json

from benchmarks import record


def lines() -> list[str]:
    """One line per measured batch size."""
    found = []
    for path in sorted(record.RESULTS.glob("step_*.json")):
        result = json.loads(path.read_text())
        for row in result["rows"]:
            speeds = ", ".join(f"{name} {speed:.4g}" for name, speed in row["clips_per_second"].items())
            ratios = ", ".join(f"{ratio['median']:.2f} × {name}" for name, ratio in row["fast_against"].items())
            what = f"{result['model']}, {result['precision']}, {row['clips']} clips on {result['device']}"
            found.append(f"{what}: {speeds} clips/s; {ratios}")
    return found


if __name__ == "__main__":
    print("\n".join(lines()))
