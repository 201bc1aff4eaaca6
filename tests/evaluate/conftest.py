"""Tiny rendered shards and a checkpoint of a tiny model, made once."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from tests.evaluate.tiny_run import CLIPS_PER_CLASS, tiny_config, trained_model, write_checkpoint
from xkd_fast.data.prepare import PrepareOptions, prepare
from xkd_fast.data.synthetic import SyntheticOptions, render_dataset


def shards_of(videos: Path, destination: Path, fps: float = 8) -> Path:
    prepare(videos, destination, PrepareOptions(fps=fps, short_side=24, workers=1), console=Console(quiet=True))
    return destination


@pytest.fixture(scope="package")
def world(tmp_path_factory):
    """Shards of three classes, of ``two`` of them, ``unlabelled``, ``slow`` (4 frames/s); and a ``run`` with a checkpoint."""
    root = tmp_path_factory.mktemp("evaluate")
    videos = root / "videos"
    classes = ("bounce", "collide", "flash")
    render_dataset(
        videos, SyntheticOptions(CLIPS_PER_CLASS, classes, seconds=(1.0, 1.6), fps=8, width=32, height=32), workers=1
    )
    shutil.copytree(videos, root / "fewer")
    shutil.rmtree(root / "fewer" / "collide")
    config = tiny_config()
    write_checkpoint(root / "run" / "checkpoints" / "step-00000120", config, trained_model(config))
    return SimpleNamespace(
        shards=shards_of(videos, root / "shards"),
        two=shards_of(root / "fewer", root / "two"),
        unlabelled=shards_of(videos / "flash", root / "unlabelled"),
        slow=shards_of(root / "fewer", root / "slow", fps=4),
        run=root / "run",
        classes=list(classes),
    )
