"""The README's figures are those of the committed JSON, and its files exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks import readme, record
from xkd_fast.model.switches import measured_steps


def test_results_are_generated_from_the_committed_json() -> None:
    """Red if someone edits a figure by hand, or commits a JSON without the README."""
    text = readme.README.read_text()
    for name, paragraph in readme.PARAGRAPHS.items():
        assert text == readme.with_paragraph(text, name, paragraph())
    assert re.search(r"\| both \| \d", text)


def test_contestants_without_a_figure_have_a_reason_instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Red if the README cannot be written from what a GPU brings: a contestant that does not fit, or was not reached."""
    kinds = ("seconds", "clips_per_second", "fast_against", "costs", "peak_bytes", "allocation_retries")
    lacking = {"clips": 128, **{kind: {} for kind in kinds}}
    lacking["seconds"] = {"reference": {"out_of_memory": True}, "strong": {"not_reached": True}}
    spread = {"median": 2.0, "min": 1.5, "max": 2.5}
    short = {**lacking, "seconds": {name: spread for name in ("reference", "strong", "fast")}}
    short |= {"fast_against": {name: spread for name in ("reference", "strong")}, "allocation_retries": {"reference": 3}}
    short |= {"clips_per_second": {"fast": 900.0}, "costs": {"fast": {"saved_bytes": 1}, "reference": {"saved_bytes": 2}}}
    told = {"model": "xkd base", "precision": "bfloat16", "device": "a GPU", "torch": "2", "rows": [lacking, short]}
    (tmp_path / "step_cuda_xkd_bfloat16.json").write_text(json.dumps(told))
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    lines = readme.step_paragraph().splitlines()
    assert "| xkd base | bfloat16 | 128 | a GPU | off | – | out of memory | not reached | – |" in lines
    ratios = "2.00 × (1.50-2.50), memory was short | 2.00 × (1.50-2.50)"
    assert f"| xkd base | bfloat16 | 128 | a GPU | off | 900 | {ratios} | 0.50 × |" in lines


def test_the_step_is_told_with_the_switches_that_auto_takes() -> None:
    """Red if the README hides a GPU's fastest step, tells of another set than runs take there, or of one on a CPU."""
    rows = [line for line in readme.step_paragraph().splitlines() if line.startswith("| xkd base | bfloat16 |")]
    for device, precisions in measured_steps().items():
        result = json.loads((record.RESULTS / f"step_{device.lower().replace(' ', '_')}_xkd_bfloat16.json").read_text())
        for row in result["rows"]:
            taken = precisions["bfloat16"][str(row["clips"])]
            speed = max(speed for name, speed in row["clips_per_second"].items() if name not in ("reference", "strong"))
            others = [f"{speed / row['clips_per_second'][name]:.2f} ×" for name in ("reference", "strong")]
            cells = ["", "xkd base", "bfloat16", str(row["clips"]), device, ", ".join(taken), f"{speed:.3g}", *others, "–", ""]
            assert " | ".join(cells).strip() in rows
    assert not [line for line in rows if " | off | " not in line and "NVIDIA" not in line]


def test_objectives_are_told_as_shares_of_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Red if a share is of another contestant's step, of another batch size's, or missing; without a step there is none."""
    spread = {"median": 1.0, "min": 0.5, "max": 2.0}
    row = {"precision": "float32", "clips": 4, "seconds": {"plain": spread, "torch": spread}}
    row |= {"plain_against": {"plain": spread, "torch": spread}, "step_seconds": {"plain": spread, "torch": spread}}
    row |= {"launches": {"plain": 30, "torch": 20}, "saved_bytes": {"plain": 2**24, "torch": 2**23}}
    (tmp_path / "objectives_h.json").write_text(json.dumps({"device": "H", "rows": [row]}))
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    assert "| 30 | 16 |" in readme.objectives_paragraph()
    fast, plain = {"launches": 80, "saved_bytes": 2**24}, {"launches": 300, "saved_bytes": 2**26}
    steps = [{"clips": clips, "costs": {"fast": fast, "reference": plain}} for clips in (2, 4)]
    steps[0]["costs"] = {name: {kind: 1 for kind in fast} for name in steps[0]["costs"]}
    (tmp_path / "step_h_xkd_float32.json").write_text(json.dumps({"rows": steps}))
    told = readme.objectives_paragraph()
    assert "| 30 (10%) | 16 (25%) |" in told and "| 20 (25%) | 8 (50%) |" in told


def test_environment_variables_are_explained() -> None:
    """Red if a test is skipped, or a benchmark runs otherwise, for a variable that no text names."""
    root = readme.README.parent
    files = [path for folder in ("xkd_fast", "tests", "benchmarks") for path in (root / folder).rglob("*.py")]
    read = {name for path in files for name in re.findall(r"environ\W+(?:get\W+)?(XKD_\w+)", path.read_text(encoding="utf-8"))}
    assert read >= {"XKD_TEST_MEDIA"}
    text = (root / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert {name for name in read if f"`{name}=" not in text} == set()


def test_files_that_the_readme_names_exist() -> None:
    """Red if a link or a named file has gone."""
    text = readme.README.read_text()
    named = set(re.findall(r"\]\(((?!http)[^)]+)\)", text)) | set(
        re.findall(r"`((?:tests|xkd_fast|benchmarks)/[\w/.]+\.\w+)`", text)
    )
    assert len(named) >= 6
    missing = [name for name in named if not (readme.README.parent / name).exists()]
    assert not missing
