"""The demo's videos: rendered where they are missing, replaced when their options change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from xkd_fast.config import Config, DataOptions, DemoData
from xkd_fast.data.prepare import PrepareOptions, prepare
from xkd_fast.data.rendered import ensure_rendered
from xkd_fast.data.synthetic import SyntheticOptions, render_dataset
from xkd_fast.errors import UserError

SMALL = SyntheticOptions(clips_per_class=1, classes=("flash", "slide"), seconds=(0.5, 0.6), fps=8, width=48, height=32)


def test_videos_of_an_earlier_configuration_are_replaced(tmp_path: Path) -> None:
    """Would catch a demo that stops, or goes on with old videos, once its configuration was changed."""

    def render(seed: int) -> dict[str, bytes]:
        demo = DemoData(
            videos=str(tmp_path / "videos"),
            shards=str(tmp_path / "shards"),
            render=replace(SMALL, seed=seed),
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


def test_shards_of_a_demo_serve_a_user_too(tmp_path: Path) -> None:
    """Would catch ``xkd-fast prepare`` refusing a demo's shards as if they were of other videos, though they are the same."""
    demo = DemoData(
        videos=str(tmp_path / "videos"), shards=str(tmp_path / "shards"), render=SMALL, test_clips_per_class=1, short_side=16
    )
    config, console = Config(data=DataOptions(demo=demo)), Console(quiet=True)
    ensure_rendered(config, console, workers=1)
    options = PrepareOptions(fps=config.data.fps, short_side=16, sample_rate=config.data.sample_rate, workers=1)
    source, destination = tmp_path / "videos" / "train", tmp_path / "shards" / "train"
    assert prepare(source, destination, options, console=console).converted_now == 0
    with pytest.raises(UserError, match="seed = 0, this call asks for 1"):
        prepare(source, destination, replace(options, seed=1), console=console)


def test_shards_that_a_user_prepared_are_never_replaced(tmp_path: Path) -> None:
    """Would catch a demo that is pointed at someone's own data set, and deletes it."""
    render_dataset(tmp_path / "own", SMALL)
    prepare(
        tmp_path / "own", tmp_path / "shards" / "train", PrepareOptions(short_side=16, workers=1), console=Console(quiet=True)
    )
    before = {path: path.read_bytes() for path in (tmp_path / "shards").rglob("*") if path.is_file()}
    demo = DemoData(
        videos=str(tmp_path / "videos"), shards=str(tmp_path / "shards"), render=replace(SMALL, seed=1), short_side=16
    )
    with pytest.raises(UserError, match="choose another folder, or delete this one"):
        ensure_rendered(Config(data=DataOptions(demo=demo)), Console(quiet=True), workers=1)
    assert before == {path: path.read_bytes() for path in (tmp_path / "shards").rglob("*") if path.is_file()}
