"""The README's figures are those of the committed JSON, and its files exist."""

from __future__ import annotations

import json
import re

from benchmarks import readme, record


def test_results_are_generated_from_the_committed_json() -> None:
    """Red if someone edits a figure by hand, or commits a JSON without the README."""
    result = json.loads((record.RESULTS / f"{readme.NAME}.json").read_text())
    text = readme.README.read_text()
    assert text == readme.with_table(text, readme.render(result))
    assert re.search(r"\| both \| \d", text)


def test_files_that_the_readme_names_exist() -> None:
    """Red if a link or a named file has gone."""
    text = readme.README.read_text()
    named = set(re.findall(r"\]\(((?!http)[^)]+)\)", text)) | set(
        re.findall(r"`((?:tests|xkd_fast|benchmarks)/[\w/.]+\.\w+)`", text)
    )
    assert len(named) >= 6
    missing = [name for name in named if not (readme.README.parent / name).exists()]
    assert not missing
