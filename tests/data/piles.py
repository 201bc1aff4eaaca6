"""Small piles for tests of `prepare`, and how they are prepared."""

from __future__ import annotations

import csv
import io
import shutil
from pathlib import Path

import numpy as np
from rich.console import Console

from tests.data.media import noise, numbered, write_video
from xkd_fast.data.prepare import REPORT, PrepareOptions, PrepareReport, prepare

SMALL = PrepareOptions(codec="mjpeg", short_side=16, samples_per_shard=3, workers=1)


def run(source: Path, destination: Path, options: PrepareOptions = SMALL, *, retry: bool = False) -> PrepareReport:
    return prepare(source, destination, options, retry=retry, console=Console(file=io.StringIO()))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def report_rows(destination: Path) -> dict[str, dict[str, str]]:
    """Rows of report.csv by source; a source listed twice is an error."""
    with open(destination / REPORT, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len({row["source"] for row in rows}) == len(rows)
    return {row["source"]: row for row in rows}


def make_media(folder: Path) -> Path:
    """One good video, and one of every kind that a folder may hold besides."""
    write_video(folder / "good.mkv", [numbered(k, 24, 32) for k in range(15)], sound=noise(0.6))
    write_video(folder / "mute.mkv", [numbered(k, 24, 32) for k in range(15)])
    write_video(folder / "silent.mkv", [numbered(k, 24, 32) for k in range(15)], sound=np.zeros(9600, np.int16))
    write_video(folder / "short.mkv", [numbered(k, 24, 32) for k in range(4)], sound=noise(0.6))
    (folder / "text.mkv").write_text("no video")
    return folder


def place(media: Path, root: Path, names: dict[str, str]) -> Path:
    """A source folder: path below it → which of the media lies there."""
    for name, kind in names.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(media / f"{kind}.mkv", root / name)
    return root


def make_mixed(media: Path, root: Path) -> Path:
    """20 sources in three classes and the root, four of them bad."""
    names = {f"{name}/{number}.mkv": "good" for name in ("bark", "moo", "purr") for number in range(5)}
    names |= {"bark/mute.mkv": "mute", "moo/text.mkv": "text", "purr/short.mkv": "short", "silent.mkv": "silent"}
    names["root.mkv"] = "good"
    return place(media, root, names)
