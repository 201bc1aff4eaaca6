"""The README's figures are those of the committed JSON, and its files exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks import readme, record


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
    assert "| xkd base | bfloat16 | 128 | a GPU | – | out of memory | not reached | – |" in lines
    assert (
        "| xkd base | bfloat16 | 128 | a GPU | 900 | 2.00 × (1.50-2.50), memory was short | 2.00 × (1.50-2.50) | 0.50 × |"
        in lines
    )


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
