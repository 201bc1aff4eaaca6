"""Keeps the README's results true: they are generated from JSON files in ``benchmarks/results/``.

``python -m benchmarks.readme RUN`` takes up the demo run in the folder RUN (``runs/demo``) as ``demo_cpu.json`` and rewrites
the README's table; without RUN it rewrites the table from the JSON that is there.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks import record

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- demo -->", "<!-- /demo -->"
NAME = "demo_cpu"


def collect(run: Path) -> dict[str, Any]:
    """What a demo run came to: accuracies, speed, sizes."""
    reports = {name: json.loads((run / "svm" / name / "svm.json").read_text()) for name in ("pretrained", "untrained")}
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((run / "demo.json").read_text())
    return {
        **summary,
        "chance": reports["pretrained"]["chance"],
        "top1": {name: report["top1"] for name, report in reports.items()},
        "samples": reports["pretrained"]["samples"],
        "steps": int(rows[-1]["step"]),
        "clips_per_second": statistics.median(row["clips_per_second"] for row in rows),
        "data_wait_share": statistics.median(row["data_wait_share"] for row in rows),
        "teacher_entropy": {m: rows[-1][f"{m}_teacher_entropy"] for m in ("video", "audio")},
    }


def render(result: dict[str, Any]) -> str:
    """The README's paragraph about a demo run."""
    evaluation = result["evaluation"]
    lines = [
        "One run of `make demo`, one seed: top-1 accuracy, in per cent, of linear SVMs on frozen features of",
        f"{result['samples']['test']} videos not seen in training, beside the same model at initialisation. Features of the",
        f"{evaluation['network']}s (the teachers of so short a run lag behind), {evaluation['train_clips']} training clip per",
        f"video, C of {', '.join(f'{c:g}' for c in evaluation['svm_c'])}.",
        "Data and schedule were chosen on clips of another seed than the test's.",
        "",
        "| features | pretrained | untrained | chance |",
        "|---|---|---|---|",
    ]
    for modality in result["top1"]["pretrained"]:
        cells = [result["top1"][name][modality] for name in ("pretrained", "untrained")] + [result["chance"]]
        lines.append(f"| {modality} | " + " | ".join(f"{100 * cell:.1f}" for cell in cells) + " |")
    behind = [m for m, accuracy in result["top1"]["pretrained"].items() if accuracy <= result["top1"]["untrained"][m]]
    if behind:
        lines += ["", f"A run this short does not improve {' and '.join(behind)} features yet."]
    share = f"{result['data_wait_share']:.0%} of the time waiting for data"
    time = f"The whole of it took {result['seconds']:.0f} s with {result['processes']} processes of"
    time += f" {result['threads_per_process']} thread:"
    speed = f"{result['steps']} steps at {result['clips_per_second']:.0f} clips/s (median), {share},"
    lines += ["", time, speed, f"on {result['device']}, torch {result['torch']} (`benchmarks/results/{NAME}.json`)."]
    return "\n".join(lines)


def with_table(readme: str, paragraph: str) -> str:
    """The README's text with the paragraph in its place."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{paragraph}\n{END}{after}"


def main(arguments: list[str]) -> None:
    """Take up a run, if one is named, and rewrite the README."""
    if arguments:
        record.write(NAME, collect(Path(arguments[0])))
    result = json.loads((record.RESULTS / f"{NAME}.json").read_text())
    README.write_text(with_table(README.read_text(), render(result)))


if __name__ == "__main__":
    main(sys.argv[1:])
