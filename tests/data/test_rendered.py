"""The demo's videos: rendered where they are missing, replaced when their options change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rich.console import Console

from xkd_fast.config import Config, DataOptions, DemoData
from xkd_fast.data.rendered import ensure_rendered
from xkd_fast.data.synthetic import SyntheticOptions


def test_videos_of_an_earlier_configuration_are_replaced(tmp_path: Path) -> None:
    """Would catch a demo that stops, or goes on with old videos, once its configuration was changed."""
    options = SyntheticOptions(clips_per_class=1, classes=("flash", "slide"), seconds=(0.5, 0.6), fps=8, width=48, height=32)

    def render(seed: int) -> dict[str, bytes]:
        demo = DemoData(
            videos=str(tmp_path / "videos"),
            shards=str(tmp_path / "shards"),
            render=replace(options, seed=seed),
            test_clips_per_class=1,
            short_side=16,
        )
        ensure_rendered(Config(data=DataOptions(demo=demo)), Console(quiet=True), workers=1)
        files = (*(tmp_path / "videos").rglob("*.mp4"), *(tmp_path / "shards").rglob("*.tar"))
        return {str(path): path.read_bytes() for path in files}

    first, second = render(0), render(1)
    assert first.keys() == second.keys() and len(first) == 6
    assert all(first[name] != second[name] for name in first)
    assert render(1) == second
