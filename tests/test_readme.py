"""The README's figures are those of the committed JSON, and its files exist."""

from __future__ import annotations

import re

from benchmarks import readme


def test_results_are_generated_from_the_committed_json() -> None:
    """Red if someone edits a figure by hand, or commits a JSON without the README."""
    text = readme.README.read_text()
    for name, paragraph in readme.PARAGRAPHS.items():
        assert text == readme.with_paragraph(text, name, paragraph())
    assert re.search(r"\| both \| \d", text)


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
