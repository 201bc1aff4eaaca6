"""Tiny rendered shards and a checkpoint of a tiny model, made once."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from tests.evaluate.tiny_run import CLIPS_PER_CLASS, tiny_config, trained_model, write_checkpoint
from xkd_fast.data.prepare import PrepareOptions, prepare
from xkd_fast.data.sources import SourceSet, read_list
from xkd_fast.data.synthetic import SyntheticOptions, render_dataset

EXTRA = {"bounce": "|ball", "collide": "|ball", "flash": ""}


def shards_of(videos: Path | SourceSet, destination: Path, fps: float = 8) -> Path:
    prepare(videos, destination, PrepareOptions(fps=fps, short_side=24, workers=1), console=Console(quiet=True))
    return destination


def several_classes(videos: Path, destination: Path, first: int) -> Path:
    """Two of the four clips of every class; bounce and collide are "ball" as well, the last clip of each "late"."""
    rows = ["path,label"]
    for number in (first, first + 1):
        late = "|late" if number % 2 else ""
        rows += [f"{videos}/{name}/clip_{number:06d}.mp4,{name}{more}{late}" for name, more in EXTRA.items()]
    listed = destination.with_suffix(".csv")
    listed.write_text("\n".join(rows))
    return shards_of(read_list(listed), destination)


@pytest.fixture(scope="package")
def world(tmp_path_factory):
    """Shards of three classes, of ``two`` of them, ``unlabelled``, ``slow`` (4 frames/s), ``several`` and ``others`` (classes
    a sample); and a ``run`` with a checkpoint."""
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
        several=several_classes(videos, root / "several", first=0),
        others=several_classes(videos, root / "others", first=2),
        run=root / "run",
        classes=list(classes),
    )
